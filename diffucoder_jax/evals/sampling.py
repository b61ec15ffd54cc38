"""Samples for an evaluation: rows of token ids in, texts out, over all hosts, in any order.

A row draws from fold_in(fold_in(key(seed), problem), sample): the same noise whatever the batch, the
mesh and what was sampled before, so that an evaluation can be killed and go on. Another batch size
rounds otherwise, which changes a text only where two choices are equal to within rounding.

Autoregressive weights that continue rows left to right do so with a cache (`autoregressive`), which
writes the same tokens.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import autoregressive, cache, canvas, sampler
from diffucoder_jax.evals import benchmarks, prompts
from diffucoder_jax.model import windows
from diffucoder_jax.model.transformer import Transformer, next_logits_fn, unembed_fn
from diffucoder_jax.runtime import sharding

LENGTH_STEP = 32  # canvases are padded to multiples of this, so that few programs are compiled
SLOTS_STEP = 8


class Row(NamedTuple):
  """A sample to draw: `problem`, its number in the whole benchmark; `sample`, which of its samples;
  `ids`, the prompt, in which mask ids are holes."""

  problem: int
  sample: int
  ids: list[int]


class Sampled(NamedTuple):
  """A sample: `text` up to the first end or pad token, its `length` in tokens, whether it `ended`,
  the network evaluations `nfe`, and its share of the `seconds` of its batch. `trace` is
  `sampler.Trace` of this row, B = 1, without padding."""

  text: str
  length: int
  ended: bool
  nfe: int
  seconds: float
  trace: Any


def prompt_of(ckpt, problem, asked, system, primer, hole_tokens=0):
  """Token ids of what a model is asked.

  Args:
    ckpt: `Pretrained` with a tokenizer. problem: `Problem`.
    asked: "chat", "complete" or "infill". system, primer: of a chat.
    hole_tokens: of an infilling problem; 0 for as many as the missing part has.
  Raises:
    ValueError: a problem without a text to continue, or a model without a mask token to infill.
  """
  tokenizer = ckpt.tokenizer
  if asked == "chat":
    return chat.render_prompt(prompts.messages_of(problem), tokenizer, system, primer)
  begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
  if asked == "complete":
    if not problem.stub:
      raise ValueError(f"{problem.task_id} has no text to continue; ask with --chat")
    text = problem.stub if problem.source == "gsm8k" else prompts.continued(problem)
    return begin + tokenizer.encode(text)
  if ckpt.mask_id < 0:
    raise ValueError("this checkpoint has no mask token, so it cannot infill")
  before, after = problem.prompt.split(prompts.HOLE)
  hole = hole_tokens or max(1, len(tokenizer.encode(benchmarks.missing_part(problem))))
  return [*begin, *tokenizer.encode(before), *[ckpt.mask_id] * hole, *tokenizer.encode(after)]


def check_lengths(ckpt, rows, config, names):
  """Refuses prompts that do not fit, by name, before anything is sampled."""
  for row in rows:
    length = len(row.ids) + config.max_new_tokens
    if length > ckpt.config.max_seq_len:
      raise ValueError(
        f"{names[row.problem]} needs {len(row.ids)} tokens and {config.max_new_tokens} new ones; the "
        f"model's context is {ckpt.config.max_seq_len}: ask for fewer with --max_new_tokens"
      )


def sample(ckpt, rows, config, seed=0, batch_size=8):
  """Draws samples, batch by batch.

  Args:
    ckpt: `Pretrained`; its params are laid out over `ckpt.mesh`, which all hosts share.
    rows: list of `Row`, the same on all hosts.
    config: `SamplerConfig`; steps of 0 means one for each mask of the row.
    seed: int. batch_size: rows sampled together, rounded up to what the mesh divides.
  Yields:
    lists of (index into `rows`, `Sampled`), the same on all hosts.
  """
  shards = 1 if ckpt.mesh is None else sharding.batch_shards(ckpt.mesh)
  keys = np.asarray(_keys(seed, *(np.asarray([r[i] for r in rows], np.uint32) for i in (0, 1))))
  # A shorter last batch is filled up, so that it needs no program of its own.
  batch_size = min(batch_size, len(rows))
  batch_size += -batch_size % shards
  masks = [row.ids.count(ckpt.mask_id) + config.max_new_tokens for row in rows]
  cache.check(config, max(masks))
  kinds = [canvas.kind(config, count) for count in masks]
  # Alike lengths go together, so that little is padded.
  order = sorted(range(len(rows)), key=lambda i: (kinds[i], len(rows[i].ids)))
  while order:
    chosen = [i for i in order[:batch_size] if kinds[i] == kinds[order[0]]]
    slots = kinds[chosen[0]][1] or max(masks) + -max(masks) % SLOTS_STEP
    order = order[len(chosen) :]
    filled = chosen + chosen[-1:] * (batch_size - len(chosen))
    now = dataclasses.replace(config, steps=kinds[chosen[0]][0])
    began = time.monotonic()
    cached = is_cached(ckpt.config, now, max(masks[i] for i in chosen))
    trace = _batch(ckpt, [rows[i].ids for i in filled], keys[filled], now, slots, cached)
    seconds = (time.monotonic() - began) / len(chosen)
    yield [
      (i, _sampled(ckpt, rows[i].ids, jax.tree.map(lambda x, j=j: x[j : j + 1], trace), seconds))
      for j, i in enumerate(chosen)
    ]


def is_cached(model_config, config, masks):
  """Whether rows of so many masks in all, holes and new tokens, are written with a cache."""
  return model_config.attention == "causal" and autoregressive.can_write(config, masks)


def decoding_of(model_config, config) -> str:
  """How texts without holes are written, in words: by what network, in which order."""
  if is_cached(model_config, config, config.max_new_tokens):
    return "autoregressive network, left_to_right, with a cache"
  network = "autoregressive" if model_config.attention == "causal" else "diffusion"
  return f"{network} network, {config.alg}"


def stop_ids(ckpt):
  """The ids at which a text ends, ascending."""
  tokenizer = ckpt.tokenizer
  pad = tokenizer.special_ids.get(chat.PAD, -1)
  return tuple(sorted({ckpt.eos_id, ckpt.pad_id, tokenizer.end_of_turn_id, pad} - {-1}))


@functools.partial(jax.jit, static_argnums=0)
def _keys(seed, problem_B, sample_B):
  key = jax.random.key(seed)
  one = lambda p, s: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, p), s))  # noqa: E731
  return jax.vmap(one)(problem_B, sample_B)


def _batch(ckpt, rows, keys, config, slots, cached):
  """Left-pads the rows to one length and samples; gives all rows' `Trace` on every host."""
  length = max(map(len, rows)) + config.max_new_tokens
  length += -length % LENGTH_STEP
  canvas_BL, valid_BL = canvas.lay_out(rows, length, config.max_new_tokens, ckpt.mask_id)
  if cached:
    run = functools.partial(_run_cached, ckpt.config, config, ckpt.mask_id, stop_ids(ckpt))
  else:
    eos_id = ckpt.eos_id if ckpt.eos_id >= 0 else ckpt.tokenizer.end_of_turn_id
    run = functools.partial(_run, ckpt.config, config, ckpt.mask_id, eos_id, min(slots, length))
  arrays = canvas_BL, valid_BL, keys
  if ckpt.mesh is None:
    return jax.device_get(run(ckpt.params, *arrays))
  index, count = sharding.batch_shard(ckpt.mesh)
  block = slice(index * len(rows) // count, (index + 1) * len(rows) // count)
  with jax.set_mesh(ckpt.mesh):
    placed = sharding.put_batch(tuple(x[block] for x in arrays), ckpt.mesh)
    trace = run(ckpt.params, *placed)
    return jax.tree.map(lambda x: sharding.all_rows(sharding.local_rows(x), ckpt.mesh), trace)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(model_config, config, mask_id, eos_id, slots, params, canvas_BL, valid_BL, keys_B2):
  window = cache.WINDOWS.get(config.cache)
  model = Transformer(model_config)
  features_fn = windows.features_fn(model, params, config.block_size, window)
  keys_B = jax.random.wrap_key_data(keys_B2)
  return sampler.generate(
    features_fn, canvas_BL, valid_BL, keys_B, config,
    mask_id=mask_id, eos_id=eos_id, slots=slots, unembed=unembed_fn(model, params),
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run_cached(model_config, config, mask_id, end_ids, params, canvas_BL, valid_BL, keys_B2):
  logits_fn = next_logits_fn(Transformer(model_config), params, valid_BL)
  keys_B = jax.random.wrap_key_data(keys_B2)
  return autoregressive.generate(
    logits_fn, canvas_BL, valid_BL, keys_B, config, mask_id=mask_id, end_ids=end_ids
  )


def _sampled(ckpt, ids, trace, seconds):
  """The text in the holes of one row."""
  valid_L = trace.valid[0]
  trace = jax.tree.map(lambda x: x[:, valid_L] if x.ndim > 1 else x, trace)
  tokens_L = trace.tokens[0]
  given_L = np.asarray([*ids, *[ckpt.mask_id] * (len(tokens_L) - len(ids))])
  written = [int(token) for token in tokens_L[given_L == ckpt.mask_id]]
  stop = stop_ids(ckpt)
  length = next((i for i, token in enumerate(written) if token in stop), len(written))
  text = ckpt.tokenizer.decode([token for token in written[:length] if token != ckpt.mask_id])
  return Sampled(text, length, length < len(written), int(trace.nfe[0]), seconds, trace)
