"""Who denoises beside us, in PyTorch on the same weights: our twin, Dream's own code, Fast-dLLM's.

PyTorch is optional, and imported in these functions only. The code of others is run from folders that
the user names; none of it is here.
"""

import contextlib
import sys
import types
from typing import NamedTuple

import numpy as np

from diffucoder_jax.benchmarking import twins
from diffucoder_jax.diffusion import canvas
from diffucoder_jax.diffusion.sampler import SamplerConfig

TWIN, DREAM = "PyTorch twin", "Dream's own code"
BLOCKS, FAST_DLLM = "PyTorch twin, in blocks", "Fast-dLLM's code"
FAST_FILE = "generation_utils_block.py"
ALG = "maskgit_plus"  # the order of Fast-dLLM's threshold


class Answers(NamedTuple):
  """New tokens of all prompts, int [R, N]; network evaluations of a batch, mean over batches, and of one
  row, mean over rows; and of ours the step that wrote each."""

  tokens_RN: np.ndarray
  evaluations: float
  of_a_row: float
  step_RN: np.ndarray | None = None


def answer(model, sample, batches, config, pad_id=0):
  """One side's `Answers`. `batches`: lists of prompts, which are ids."""
  with counted(model) as runs:
    found = [sample(model, rows, config, pad_id).numpy() for rows in batches]
  tokens_RN = np.concatenate([x_BL[:, x_BL.shape[1] - config.max_new_tokens :] for x_BL in found])
  return Answers(tokens_RN, *[len(runs) / len(batches)] * 2)


def open_all(folder, ckpt, config, dream=None, fast_dllm=None):
  """What to compare with: ({name: (model, sampler)}, notes on what was left out, versions).

  A sampler is a function (model, rows, config, pad_id) -> canvas, int64 [B, L]; `rows` are lists of ids.

  Args:
    folder: of the weights, a `pathlib.Path`. ckpt: the same, opened. config: `SamplerConfig` to time.
    dream, fast_dllm: folders with their code, or None.
  """
  why = twins.absent()
  if why:
    named = ((DREAM, dream), (FAST_DLLM, fast_dllm))
    return {}, [why, *(f"left out with it: {name} at {code}" for name, code in named if code)], {}
  twin, notes = twins.open_twin(folder), []
  found = {TWIN: (twin, whole)}
  if config.block_size:
    found[BLOCKS] = twin, in_blocks
  others = {
    DREAM: (dream, (), whole, "4.46 to 4.57"),
    FAST_DLLM: (fast_dllm, (FAST_FILE,), fast_blocks, "4.49"),
  }
  for name, (code, more, sample, wanted) in others.items():
    if not code:
      continue
    try:
      target = folder.parent / name.split("'")[0]
      model = twins.open_other(folder, code, more, ckpt.config, target)
      # Some versions load it and cannot run it.
      small = SamplerConfig(steps=1, max_new_tokens=1, block_size=1, threshold=0.5, cache="dual")
      sample(model, [[0, 0]], small, 0)
      found[name] = model, sample
    # Code of others, in a version of transformers that it may not be written for.
    except Exception as error:
      notes.append(
        f"left out: {name} at {code} does not run (it is written for transformers {wanted}): "
        f"{type(error).__name__}: {error}"
      )
  return found, notes, twins.versions()


def _inputs(rows, pad_id):
  """Left-padded: (ids, valid), int64 tensors [B, L]."""
  import torch

  ids_BL, valid_BL = canvas.lay_out(rows, max(map(len, rows)), 0, pad_id)
  return torch.tensor(np.where(valid_BL, ids_BL, pad_id)).long(), torch.tensor(valid_BL).long()


def _options(config):
  """Each is named, also where it is off: Dream's code has defaults that depend on the version."""
  return dict(
    max_new_tokens=config.max_new_tokens, steps=config.steps, alg=config.alg, alg_temp=0.0,
    eps=config.eps, temperature=0.0, top_p=config.top_p if config.top_p < 1 else None,
    top_k=config.top_k or None, return_dict_in_generate=False, output_history=False,
  )  # fmt: skip


def whole(model, rows, config, pad_id):
  """Dream's `diffusion_generate`: the whole buffer, all steps."""
  ids_BL, valid_BL = _inputs(rows, pad_id)
  return model.diffusion_generate(ids_BL, attention_mask=valid_BL, **_options(config))


def in_blocks(model, rows, config, pad_id):
  """What the twin's `diffusion_generate` does, block by block: the whole canvas is read at each step,
  logits are of the block's masks alone, and all steps are run."""
  import torch

  code = sys.modules[type(model).__module__]
  c = code.settings(model.config, None, _options(config))
  with torch.no_grad():
    x_BL, valid_BL = code.canvas(model.config, *_inputs(rows, pad_id), c)
    attention_mask = None if valid_BL.all() else valid_BL
    width, new = config.block_size, c.max_new_tokens
    blocks = -(-new // width)
    t = torch.linspace(1.0, c.eps, -(-c.steps // blocks) + 1)
    shares = [*(1.0 - t[1:-1] / t[:-2]).tolist(), 1.0]
    place_L = torch.arange(x_BL.shape[1]) - (x_BL.shape[1] - new)
    for block in range(blocks):
      inside_L = (place_L >= block * width) & (place_L < (block + 1) * width)
      for share in shares:
        masked_BL = (x_BL == c.mask_token_id) & valid_BL & inside_L
        count_B = (masked_BL.sum(1).float() * share).long()
        masked_BL &= (count_B > 0)[:, None]
        if not masked_BL.any():
          continue
        x_BLD = code.align_with_targets(model.model(x_BL, attention_mask)[0], valid_BL)
        proposed = code.propose(x_BLD[masked_BL], model.unembed, c)
        x_BL = code.commit(x_BL, masked_BL, count_B, *proposed)
  return x_BL


def fast_blocks(model, rows, config, pad_id):
  """Fast-dLLM's `diffusion_generate` with a threshold; rows of one length, since it allows no padding."""
  from transformers import dynamic_module_utils

  name = f"{FAST_FILE.removesuffix('.py')}.DreamGenerationMixin"
  mixin = dynamic_module_utils.get_class_from_dynamic_module(name, model.config._name_or_path)
  model._sample = types.MethodType(mixin._sample, model)  # as its own eval.py does
  ids_BL, valid_BL = _inputs(rows, pad_id)
  # It compares ids with that of padding, which not all weights name.
  options = _options(config) | {"alg": "confidence_threshold", "pad_token_id": -1}
  return mixin.diffusion_generate(
    model, ids_BL, attention_mask=valid_BL, **options, threshold=config.threshold,
    block_length=config.block_size, dual_cache=config.cache == "dual",
  )  # fmt: skip


@contextlib.contextmanager
def counted(model):
  """A list that grows by one whenever a PyTorch model of ours or Dream's runs its network."""
  runs = []
  handle = model.model.register_forward_hook(lambda *_: runs.append(None))
  try:
    yield runs
  finally:
    handle.remove()
