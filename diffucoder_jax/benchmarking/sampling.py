"""Denoising: our sampler against `diffusion_generate` in PyTorch, on the same weights and prompts."""

import contextlib
import functools
import pathlib
import tempfile

import jax
import numpy as np

from diffucoder_jax.benchmarking import networks, table, timing, twins
from diffucoder_jax.diffusion import canvas, sampler
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.model import cost
from diffucoder_jax.model.transformer import Transformer, canvas_features_fn, unembed_fn

OURS, TWIN, DREAM, FLOOR = "ours, jitted", "PyTorch twin", "Dream's own code", "matmul floor"


def add_arguments(parser):
  """Flags of `bench sample`; the defaults take some ten minutes on two cores."""
  networks.add_arguments(parser)
  timing.add_arguments(parser)
  flag = parser.add_argument
  flag(
    "--batch_sizes", type=int, nargs="+", default=(1, 4), metavar="B", help="one after the other"
  )
  flag("--prompt_tokens", type=int, default=64, help="of each prompt, random ids")
  flag("--new_tokens", type=int, default=128, help="for each prompt")
  flag("--steps", type=int, default=0, help="of denoising; 0: one for each new token")
  flag("--alg", choices=("entropy", "maskgit_plus", "topk_margin"), default="entropy",
       help="which positions are written first")  # fmt: skip
  flag("--top_p", type=float, default=1.0, help="1: off")
  flag("--dream", metavar="FOLDER", help="one with the model files of a Dream checkpoint at Hugging "
       "Face; they are run on the weights that all others run on")  # fmt: skip


def run(args):
  """Times sampling at temperature 0; returns a `table.Table`."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "weights"
    folder.mkdir()
    folder, words = networks.write(folder, args)
    ckpt = networks.open_ours(folder)
    models, notes, versions = open_rivals(folder, ckpt, args.dream)
    config = SamplerConfig(
      alg=args.alg, steps=args.steps or args.new_tokens, max_new_tokens=args.new_tokens,
      temperature=0.0, top_p=args.top_p,
    )  # fmt: skip
    rng = np.random.default_rng(args.seed)
    rows = []
    for batch in args.batch_sizes:
      # The mask is in no prompt: it would be a hole to fill.
      ids_BL = rng.integers(0, ckpt.config.vocab_size - 1, (batch, args.prompt_tokens))
      ids_BL += ids_BL >= ckpt.mask_id
      rows += compare(ckpt, models, ids_BL, config, args.repeats, args.matmul_size)
  title = (
    f"sample: {words}, float32; prompts of {args.prompt_tokens} tokens, {args.new_tokens} new ones in "
    f"{config.steps} steps, {config.alg}, temperature 0"
  )
  notes = [
    table.compared(args.repeats),
    "`equal`: new tokens that are ours, at the same place. `gflop per second`: what the network's "
    "projections, attention and the logits of all new tokens need in every evaluation.",
    f"{FLOOR}: these FLOPs at the rate of one float32 product of {args.matmul_size} x "
    f"{args.matmul_size} matrices in JAX.",
    *notes,
  ]
  return table.Table(title, rows, notes, versions)


def open_rivals(folder, ckpt, dream=None):
  """What to compare with: ({name: PyTorch model}, notes on what was left out, versions).

  Args:
    folder: of the weights, a `pathlib.Path`. ckpt: the same, opened.
    dream: folder with Dream's code, or None.
  """
  why = twins.absent()
  if why:
    return {}, [why], {}
  models, notes = {TWIN: twins.open_twin(folder)}, []
  if dream:
    try:
      target = folder.parent / "dream"
      model = twins.open_dream(folder, dream, ckpt.config, target)
      # Some versions load it and cannot run it.
      torch_sampler(model, np.zeros((1, 2), int), SamplerConfig(steps=1, max_new_tokens=1))()
      models[DREAM] = model
    # Code of others, in a version of transformers that it may not be written for.
    except Exception as error:
      notes.append(
        f"left out: {DREAM} at {dream} does not run (it is written for transformers 4.46 to 4.57): "
        f"{type(error).__name__}: {error}"
      )
  return models, notes, twins.versions()


def compare(ckpt, models, ids_BL, config, repeats, matmul_size):
  """Times one batch on all sides.

  Args:
    ckpt: `Pretrained`. models: {name: PyTorch model with `diffusion_generate`} of the same weights.
    ids_BL: int, prompts of one length without masks. config: `SamplerConfig`, at temperature 0.
    repeats: int. matmul_size: of the floor.
  Returns:
    rows of a `table.Table`, ours first, the floor last.
  """
  batch, prompt_tokens = ids_BL.shape
  new, length = config.max_new_tokens, prompt_tokens + config.max_new_tokens
  ours, compile_seconds = our_sampler(ckpt, ids_BL, config)
  theirs = {name: torch_sampler(model, ids_BL, config) for name, model in models.items()}
  multiply, flops = timing.matmul(matmul_size)
  with contextlib.ExitStack() as stack:
    runs = {name: stack.enter_context(counted(model)) for name, model in models.items()}
    seconds, canvases = timing.interleave({OURS: ours, **theirs, FLOOR: multiply}, repeats)

  trace = canvases[OURS]
  evaluations = {OURS: int(np.max(trace.nfe))}
  evaluations |= {name: len(forward) // (repeats + 1) for name, forward in runs.items()}
  tokens_BL = {OURS: np.asarray(trace.tokens)}
  tokens_BL |= {name: canvases[name].numpy() for name in models}
  needed = cost.scoring(ckpt.config, batch * length, length, evaluations[OURS], batch * new).useful
  rows = []
  for name in (OURS, *models):
    equal = tokens_BL[name][:, prompt_tokens:] == tokens_BL[OURS][:, prompt_tokens:]
    rows.append({
      "batch": batch, "who": name, "seconds": seconds[name],
      "tokens_per_second": timing.rates(batch * new, seconds[name]),
      "x_ours": None if name == OURS else timing.ratios(seconds[name], seconds[OURS]),
      "evaluations": evaluations[name], "compile_seconds": compile_seconds if name == OURS else None,
      "tokens": batch * new, "equal": None if name == OURS else int(equal.sum()),
      "gflop_per_second": timing.rates(needed / 1e9, seconds[name]),
    })  # fmt: skip
  floor = [needed / flops * s for s in seconds[FLOOR]]
  rows.append({
    "batch": batch, "who": FLOOR, "seconds": floor,
    "tokens_per_second": timing.rates(batch * new, floor),
    "x_ours": timing.ratios(floor, seconds[OURS]),
    "gflop_per_second": timing.rates(needed / 1e9, floor),
  })  # fmt: skip
  return rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(model_config, config, mask_id, slots, params, canvas_BL, valid_BL, keys_B):
  model = Transformer(model_config)
  return sampler.generate(
    canvas_features_fn(model, params), canvas_BL, valid_BL, keys_B, config,
    mask_id=mask_id, slots=slots, unembed=unembed_fn(model, params),
  )  # fmt: skip


def our_sampler(ckpt, ids_BL, config):
  """Our side of it: (task that returns a `Trace`, seconds of compilation)."""
  length = ids_BL.shape[1] + config.max_new_tokens
  canvas_BL, valid_BL = canvas.lay_out(ids_BL.tolist(), length, config.max_new_tokens, ckpt.mask_id)
  with jax.set_mesh(ckpt.mesh):
    arrays = jax.device_put((canvas_BL, valid_BL, sampler.row_keys(0, len(ids_BL))))
    fixed = ckpt.config, config, ckpt.mask_id, config.max_new_tokens
    program, seconds = timing.compiled(_generate, *fixed, ckpt.params, *arrays)
  return lambda: jax.block_until_ready(program(ckpt.params, *arrays)), seconds


def torch_sampler(model, ids_BL, config):
  """Their side of it: a task that returns the canvas, int64 [B, L]."""
  import torch

  inputs_BL = torch.tensor(ids_BL)
  # Each is named, also where it is off: Dream's code has defaults that depend on the version.
  options = dict(
    attention_mask=torch.ones_like(inputs_BL), max_new_tokens=config.max_new_tokens,
    steps=config.steps, alg=config.alg, alg_temp=0.0, eps=config.eps, temperature=0.0,
    top_p=config.top_p if config.top_p < 1 else None, top_k=config.top_k or None,
    return_dict_in_generate=False, output_history=False,
  )  # fmt: skip
  return lambda: model.diffusion_generate(inputs_BL, **options)


@contextlib.contextmanager
def counted(model):
  """A list that grows by one whenever a PyTorch model of ours or Dream's runs its network."""
  runs = []
  handle = model.model.register_forward_hook(lambda *_: runs.append(None))
  try:
    yield runs
  finally:
    handle.remove()
