"""Prompts to text: token ids in, sampled in batches, the result cut at the end token."""

import dataclasses
import re

import jax
import numpy as np

from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import cache, process, queue
from diffucoder_jax.diffusion import constraints as constraints_lib
from diffucoder_jax.diffusion import sampler as sampler_lib
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.model import windows

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
    length: number of tokens of `text`: those written before an end or padding token.
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


def generate(ckpt, prompts, sampler=None, seed=0, batch_size=8, constraints=None):
  """Completes or infills prompts.

  Args:
    ckpt: `pretrained.Pretrained`.
    prompts: strings, or lists of token ids, in which mask ids are holes to fill
      (`infill_prompt` makes such lists).
    sampler: `SamplerConfig`; None: its defaults, or left to right for autoregressive weights, which
      keep the keys and values of what is written (`autoregressive`).
    seed: int. Prompt i draws from fold_in(key(seed), i): the same tokens whatever the batch.
    batch_size: prompts sampled together; results do not depend on it.
    constraints: `diffusion.constraints.Constraints` for every prompt: tokens that are banned or forced.
  Returns:
    list of `Completion`, in the order of the prompts.
  Raises:
    ValueError: as `check`.
  """
  causal = ckpt.config.attention == "causal"
  config = sampler or SamplerConfig(alg="left_to_right" if causal else "entropy")
  rows = check(ckpt, prompts, config, constraints)
  # As many keys as a power of two, or each number of prompts would be another program.
  keys = process.row_keys(jax.random.key(seed), 1 << max(len(rows) - 1, 0).bit_length())
  batches = queue.write(
    windows.network(ckpt.config), ckpt.params, rows, np.asarray(jax.random.key_data(keys)), config,
    mask_id=ckpt.mask_id, end_ids=_end_ids(ckpt), mesh=ckpt.mesh, batch_size=batch_size,
    limit=ckpt.config.max_seq_len, constraints=constraints,
  )  # fmt: skip
  completions = [None] * len(rows)
  for batch in batches:
    for b, i in enumerate(batch.indices):
      completions[i] = _completion(ckpt, rows[i], queue.unpadded(batch.trace, b))
  return completions


def check(ckpt, prompts, config, constraints=None, names=None):
  """The token ids of each prompt, if `generate` can complete them all.

  Args: ckpt, prompts, config, constraints: as for `generate`. names: what errors call each prompt; None:
    "prompt 0" and so on.
  Raises:
    ValueError: an empty or over-long prompt, a token id outside the vocabulary, nothing to write, a cache
      or constraints (`constraints.check`) that cannot be kept; names the prompt. Or the prompts are one
      text, or the checkpoint lacks what they need.
  """
  if isinstance(prompts, str):
    raise ValueError("prompts is one text; give a list of them")
  if ckpt.mask_id < 0 and not (ckpt.config.attention == "causal" and config.alg == "left_to_right"):
    raise ValueError(
      "this checkpoint has no mask token: only autoregressive weights with alg='left_to_right' can "
      "generate without one"
    )
  if config.alternatives > ckpt.config.vocab_size:
    raise ValueError(
      f"sampler.alternatives is {config.alternatives}, and the vocabulary has {ckpt.config.vocab_size} "
      "tokens; ask for no more than these"
    )
  if ckpt.mask_id < 0 and constraints is not None:
    raise ValueError("this checkpoint has no mask token, which constraints need")
  rows = [prompt_ids(ckpt, prompt) for prompt in prompts]
  names = [f"prompt {i}" for i in range(len(rows))] if names is None else names
  for name, row in zip(names, rows, strict=True):
    _check_prompt(name, row, ckpt, config)
  places = [row.count(ckpt.mask_id) + config.max_new_tokens for row in rows]
  for name, count in zip(names, places, strict=True):
    try:
      cache.check(config, count)
      if constraints is not None and name == names[places.index(count)]:
        constraints_lib.check(constraints, count, ckpt.config.vocab_size, ckpt.mask_id)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
  return rows


def _check_prompt(name, row, ckpt, config):
  if not row:
    raise ValueError(f"{name} is empty; give at least one token to start from")
  wrong = [token for token in row if not 0 <= token < ckpt.config.vocab_size]
  if wrong:
    raise ValueError(
      f"{name} has token id {wrong[0]}, outside the vocabulary 0..{ckpt.config.vocab_size - 1}"
    )
  length = len(row) + config.max_new_tokens
  if length > ckpt.config.max_seq_len:
    raise ValueError(
      f"{name} is too long: {len(row)} tokens and {config.max_new_tokens} new ones make {length}, "
      f"the model's context is {ckpt.config.max_seq_len}; shorten it or ask for fewer new tokens"
    )
  if not config.max_new_tokens and ckpt.mask_id not in row:
    raise ValueError(f"{name} has no masks and max_new_tokens is 0: there is nothing to write")


def _end_ids(ckpt):
  """The ids at which a text ends, ascending."""
  ends = {ckpt.eos_id, ckpt.pad_id}
  if ckpt.tokenizer is not None:
    # Instruction tuning ends answers with these pads, which in a SentencePiece file are not pad_id.
    ends |= {ckpt.tokenizer.end_of_turn_id, ckpt.tokenizer.special_ids.get(chat.PAD, -1)}
  return tuple(sorted(ends - {-1}))


def _completion(ckpt, prompt, trace):
  tokens_L = trace.tokens[0]
  given = np.asarray([*prompt, *[ckpt.mask_id] * (len(tokens_L) - len(prompt))])
  hole_L = given == ckpt.mask_id
  stop = _end_ids(ckpt)
  texts, full, ended = [], [], False
  for first, last, is_hole in _runs(hole_L):
    ids = [int(token) for token in tokens_L[first:last]]
    if is_hole:
      cut = next((i for i, token in enumerate(ids) if token in stop), len(ids))
      ended = ended or cut < len(ids)
      ids = [token for token in ids[:cut] if token != ckpt.mask_id]
      texts.append(ids)
    full += ids
  text = full_text = ""
  if ckpt.tokenizer is not None:
    text = "\n".join(map(ckpt.tokenizer.decode, texts))
    full_text = ckpt.tokenizer.decode(full)
  return Completion(text, full_text, tokens_L[hole_L], trace, sum(map(len, texts)), ended)


def _runs(flags_L):
  """(first, last, flag) of each run of equal flags."""
  edges = [0, *(np.flatnonzero(np.diff(flags_L)) + 1), len(flags_L)]
  return [(a, b, bool(flags_L[a])) for a, b in zip(edges[:-1], edges[1:], strict=True)]
