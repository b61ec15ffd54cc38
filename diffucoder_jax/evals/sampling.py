"""Samples for an evaluation: rows of token ids in, texts out, over all hosts, in any order.

A row draws from fold_in(fold_in(key(seed), problem), sample): the same noise whatever the batch, the
mesh and what was sampled before, so that an evaluation can be killed and go on. Another batch size
rounds otherwise, which changes a text only where two choices are equal to within rounding.

Autoregressive weights that continue rows left to right do so with a cache (`autoregressive`), which
writes the same tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import autoregressive, queue
from diffucoder_jax.evals import benchmarks, prompts
from diffucoder_jax.model import windows


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
  keys = np.asarray(_keys(seed, *(np.asarray([r[i] for r in rows], np.uint32) for i in (0, 1))))
  batches = queue.write(
    windows.network(ckpt.config), ckpt.params, [row.ids for row in rows], keys, config,
    mask_id=ckpt.mask_id, end_ids=stop_ids(ckpt), mesh=ckpt.mesh, batch_size=batch_size,
    limit=ckpt.config.max_seq_len,
  )  # fmt: skip
  for batch in batches:
    seconds = batch.seconds / len(batch.indices)
    yield [
      (i, _sampled(ckpt, rows[i].ids, queue.unpadded(batch.trace, b), seconds))
      for b, i in enumerate(batch.indices)
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


def _sampled(ckpt, ids, trace, seconds):
  """The text in the holes of one row."""
  tokens_L = trace.tokens[0]
  given_L = np.asarray([*ids, *[ckpt.mask_id] * (len(tokens_L) - len(ids))])
  written = [int(token) for token in tokens_L[given_L == ckpt.mask_id]]
  stop = stop_ids(ckpt)
  length = next((i for i, token in enumerate(written) if token in stop), len(written))
  text = ckpt.tokenizer.decode([token for token in written[:length] if token != ckpt.mask_id])
  return Sampled(text, length, length < len(written), int(trace.nfe[0]), seconds, trace)
