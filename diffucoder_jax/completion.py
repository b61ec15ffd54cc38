"""Prompts to text: lays out canvases, samples them in batches, cuts the result at the end token."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import autoregressive, cache, canvas, process
from diffucoder_jax.diffusion import sampler as sampler_lib
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.model import windows
from diffucoder_jax.model.transformer import Transformer, next_logits_fn, unembed_fn
from diffucoder_jax.runtime import sharding

# Canvases are padded to a multiple of this, so that prompts of similar length share one program.
LENGTH_STEP = 32
# So are the masks of a row, of which only those need logits.
SLOTS_STEP = 8
HOLE = re.compile(r"<\|fill:(\d+)\|>")


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was written for one prompt.

  Attributes:
    text: the text written, up to the first end or padding token; several holes are joined by
      newlines.
    full_text: the prompt with it: what an infill template is wanted for.
    tokens: int32, all written token ids, also after the end token (mask_id where none was).
    trace: `sampler.Trace` of this row alone, B = 1, without padding.
    length: number of tokens of `text`: those before an end or padding token.
    ended: whether one of these was written.
  """

  text: str
  full_text: str
  tokens: np.ndarray
  trace: sampler_lib.Trace
  length: int
  ended: bool


def infill_prompt(ckpt, template):
  """Token ids of a text with holes: `<|fill:N|>` stands for N masked tokens.

  With the begin token if the tokenizer wants one, as for prompts.

  Raises:
    ValueError: no hole, or the checkpoint has no mask token or no tokenizer.
  """
  if ckpt.mask_id < 0:
    raise ValueError("this checkpoint has no mask token, so it cannot fill holes")
  if ckpt.tokenizer is None:
    raise ValueError("this checkpoint came without a tokenizer; give templates as token ids")
  pieces = HOLE.split(template)  # text, N, text, N, ..., text
  if len(pieces) == 1:
    raise ValueError("the template has no hole; mark one of N tokens with <|fill:N|>")
  ids = [ckpt.tokenizer.bos_id] if ckpt.tokenizer.adds_bos else []
  for i, piece in enumerate(pieces):
    ids += [ckpt.mask_id] * int(piece) if i % 2 else ckpt.tokenizer.encode(piece)
  return ids


def prompt_ids(ckpt, prompt):
  """Token ids of a prompt (string or ids), with the begin token if the tokenizer wants one."""
  if not isinstance(prompt, str):
    return [int(token) for token in prompt]
  if ckpt.tokenizer is None:
    raise ValueError("this checkpoint came without a tokenizer; give prompts as token ids")
  begin = [ckpt.tokenizer.bos_id] if ckpt.tokenizer.adds_bos else []
  return begin + list(ckpt.tokenizer.encode(prompt))


def generate(ckpt, prompts, sampler=None, seed=0, batch_size=8):
  """Completes or infills prompts.

  Args:
    ckpt: `pretrained.Pretrained`.
    prompts: strings, or lists of token ids, in which mask ids are holes to fill
      (`infill_prompt` makes such lists).
    sampler: `SamplerConfig`; None: its defaults, or left to right for autoregressive weights, which
      keep the keys and values of what is written (`autoregressive`).
    seed: int. Prompt i draws from fold_in(key(seed), i): the same tokens whatever the batch.
    batch_size: prompts sampled together; results do not depend on it.
  Returns:
    list of `Completion`, in the order of the prompts.
  Raises:
    ValueError: an empty or over-long prompt, a token id outside the vocabulary; names the prompt.
  """
  causal = ckpt.config.attention == "causal"
  config = sampler or SamplerConfig(alg="left_to_right" if causal else "entropy")
  if ckpt.mask_id < 0 and not (causal and config.alg == "left_to_right"):
    raise ValueError(
      "this checkpoint has no mask token: only autoregressive weights with alg='left_to_right' can "
      "generate without one"
    )
  rows = [prompt_ids(ckpt, prompt) for prompt in prompts]
  for i, row in enumerate(rows):
    _check_prompt(i, row, ckpt, config)
  keys = process.row_keys(jax.random.key(seed), max(len(rows), 1))
  # Alike lengths go together, so that little is padded; rows with other numbers of masks go apart
  # where that decides the number of steps, or the blocks.
  kinds = [canvas.kind(config, row.count(ckpt.mask_id) + config.max_new_tokens) for row in rows]
  order = sorted(range(len(rows)), key=lambda i: (kinds[i], len(rows[i])))
  completions = [None] * len(rows)
  while order:
    chosen = [i for i in order[:batch_size] if kinds[i] == kinds[order[0]]]
    order = order[len(chosen) :]
    # The last batch is filled up, so that it needs no program of its own.
    filled = chosen + chosen[-1:] * (min(batch_size, len(rows)) - len(chosen))
    now = dataclasses.replace(config, steps=kinds[chosen[0]][0])
    trace = _sample(ckpt, [rows[i] for i in filled], keys[np.asarray(filled)], now)
    for j, i in enumerate(chosen):
      completions[i] = _completion(ckpt, rows[i], jax.tree.map(lambda x, j=j: x[j : j + 1], trace))
  return completions


def _check_prompt(i, row, ckpt, config):
  if not row:
    raise ValueError(f"prompt {i} is empty; give at least one token to start from")
  wrong = [token for token in row if not 0 <= token < ckpt.config.vocab_size]
  if wrong:
    raise ValueError(
      f"prompt {i} has token id {wrong[0]}, outside the vocabulary 0..{ckpt.config.vocab_size - 1}"
    )
  length = len(row) + config.max_new_tokens
  if length > ckpt.config.max_seq_len:
    raise ValueError(
      f"prompt {i} is too long: {len(row)} tokens and {config.max_new_tokens} new ones make {length}, "
      f"the model's context is {ckpt.config.max_seq_len}; shorten it or ask for fewer new tokens"
    )
  if not config.max_new_tokens and ckpt.mask_id not in row:
    raise ValueError(f"prompt {i} has no masks and max_new_tokens is 0: there is nothing to write")
  cache.check(config, row.count(ckpt.mask_id) + config.max_new_tokens)


def _sample(ckpt, rows, keys, config):
  """Runs one batch: left-pads the rows to one length and samples. Returns a host `Trace`."""
  length = max(len(row) for row in rows) + config.max_new_tokens
  length += -length % LENGTH_STEP
  shards = 1 if ckpt.mesh is None else sharding.batch_shards(ckpt.mesh)
  fill = -len(rows) % shards  # rows that the mesh needs and nobody sees
  rows = rows + rows[-1:] * fill
  keys = jnp.concatenate([keys, *[keys[-1:]] * fill])
  canvas_BL, valid_BL = canvas.lay_out(rows, length, config.max_new_tokens, ckpt.mask_id)
  slots = int(np.max(np.sum((canvas_BL == ckpt.mask_id) & valid_BL, axis=1)))
  causal = ckpt.config.attention == "causal"
  run = _run_cached if causal and autoregressive.can_write(config, slots) else _run
  slots += 0 if config.block_size else -slots % SLOTS_STEP  # blocks share the steps of all places
  run = functools.partial(run, ckpt.config, config, ckpt.mask_id, ckpt.eos_id, slots)
  if ckpt.mesh is None:
    trace = run(ckpt.params, canvas_BL, valid_BL, keys)
  else:
    with jax.set_mesh(ckpt.mesh):
      by_row = sharding.batch_sharding(ckpt.mesh)
      trace = run(ckpt.params, *(jax.device_put(x, by_row) for x in (canvas_BL, valid_BL, keys)))
  return jax.device_get(trace)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(model_config, sampler_config, mask_id, eos_id, slots, params, canvas_BL, valid_BL, keys_B):
  window = cache.WINDOWS.get(sampler_config.cache)
  model = Transformer(model_config)
  features_fn = windows.features_fn(model, params, sampler_config.block_size, window)
  return sampler_lib.generate(
    features_fn, canvas_BL, valid_BL, keys_B, sampler_config,
    mask_id=mask_id, eos_id=eos_id, slots=slots, unembed=unembed_fn(model, params),
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run_cached(
  model_config, sampler_config, mask_id, eos_id, slots, params, canvas_BL, valid_BL, keys_B
):
  del slots  # as many as new tokens
  logits_fn = next_logits_fn(Transformer(model_config), params, valid_BL)
  return autoregressive.generate(
    logits_fn, canvas_BL, valid_BL, keys_B, sampler_config,
    mask_id=mask_id, end_ids=(eos_id,) if eos_id >= 0 else (),
  )  # fmt: skip


def _completion(ckpt, prompt, trace):
  valid_L = trace.valid[0]
  trace = jax.tree.map(lambda x: x[:, valid_L] if x.ndim > 1 else x, trace)
  tokens_L = trace.tokens[0]
  given = np.asarray([*prompt, *[ckpt.mask_id] * (len(tokens_L) - len(prompt))])
  hole_L = given == ckpt.mask_id
  stop = {ckpt.eos_id, ckpt.pad_id} - {-1}
  if ckpt.tokenizer is not None:
    # Instruction tuning ends answers with these pads, which in a SentencePiece file are not pad_id.
    stop |= {ckpt.tokenizer.end_of_turn_id, ckpt.tokenizer.special_ids.get(chat.PAD, -1)} - {-1}
  texts, full, length, ended = [], [], 0, False
  for first, last, is_hole in _runs(hole_L):
    ids = [int(token) for token in tokens_L[first:last]]
    if is_hole:
      cut = next((i for i, token in enumerate(ids) if token in stop), len(ids))
      length, ended = length + cut, ended or cut < len(ids)
      ids = ids[:cut]
      texts.append([token for token in ids if token != ckpt.mask_id])
    full += [token for token in ids if token != ckpt.mask_id]
  text = full_text = ""
  if ckpt.tokenizer is not None:
    text = "\n".join(map(ckpt.tokenizer.decode, texts))
    full_text = ckpt.tokenizer.decode(full)
  return Completion(text, full_text, tokens_L[hole_L], trace, length, ended)


def _runs(flags_L):
  """(first, last, flag) of each run of equal flags."""
  edges = [0, *(np.flatnonzero(np.diff(flags_L)) + 1), len(flags_L)]
  return [(a, b, bool(flags_L[a])) for a, b in zip(edges[:-1], edges[1:], strict=True)]
