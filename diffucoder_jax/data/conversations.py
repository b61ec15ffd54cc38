"""Instruction data as training rows: one conversation a row, its length learnt through pads.

A row is prompt, response and <|dlm_pad|> up to the row's end. The pads are noised and predicted
like the response: that is how a masked diffusion model learns where an answer ends (paper, B.1).
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np
from absl import logging

from diffucoder_jax.data import chat, instructions, sources

PADDING = ("fixed", "flexible")
OVER_LONG = ("error", "truncate", "drop")
_ENCODE_CONVERSATIONS = 4096  # encoded at once: bounds the Python lists alive at a time


class ConversationRows:
  """Rendered conversations, one a row of `seq_len`: a random-access source for Grain.

  Args:
    tokens: int32 [N], prompt and response of each conversation, end to end.
    starts: int64 [rows + 1], ascending, where each conversation begins in `tokens`, and N.
    responses: int64 [rows], where each response begins in `tokens`.
    seq_len: tokens in a row; no conversation is longer.
    pad_id: id of <|dlm_pad|>.
    learned_pads: pads in a row that are attended, noised and learnt; those after them are none of
      the row (segment 0). `seq_len` makes all of them learnt.
  """

  def __init__(self, tokens, starts, responses, seq_len: int, pad_id: int, learned_pads: int):
    self._tokens, self._starts, self._responses = tokens, starts, responses
    self.seq_len, self.pad_id, self.learned_pads = seq_len, pad_id, learned_pads

  def __len__(self):
    return len(self._responses)

  def __repr__(self):  # Grain compares sources by this when it restores
    return (
      f"ConversationRows(conversations={len(self)}, tokens={len(self._tokens)}, "
      f"seq_len={self.seq_len}, learned_pads={self.learned_pads})"
    )

  def __getitem__(self, row):
    """Row `row`: a dict of [seq_len] arrays.

    `tokens` int32; `segment_ids` int32, 1 on the conversation and its learnt pads, 0 beyond;
    `positions` int32, 0 .. seq_len - 1; `maskable` bool, the response and its learnt pads; `prompt`
    bool, the prompt, which a trainer may noise too while it goes over from unconditional training
    (all but position 0, which nothing predicts).
    """
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    begin, end = self._starts[row], self._starts[row + 1]
    length, prompt_length = end - begin, self._responses[row] - begin
    tokens_L = np.full(self.seq_len, self.pad_id, np.int32)
    tokens_L[:length] = self._tokens[begin:end]
    position_L = np.arange(self.seq_len, dtype=np.int32)
    used_L = position_L < length + self.learned_pads
    prompt_L = position_L < prompt_length
    return {
      "tokens": tokens_L,
      "segment_ids": used_L.astype(np.int32),
      "positions": position_L,
      "maskable": used_L & ~prompt_L,
      "prompt": prompt_L,
    }

  def scored_counts(self, vocab_size: int):
    """int64 [vocab_size]: how often each token stands where it is maskable, without the rows."""
    row_N = np.searchsorted(self._starts, np.arange(len(self._tokens)), side="right") - 1
    scored_N = np.arange(len(self._tokens)) >= self._responses[row_N]
    counts_V = np.bincount(self._tokens[scored_N], minlength=vocab_size)
    pads = np.minimum(self.seq_len - np.diff(self._starts), self.learned_pads)
    counts_V[self.pad_id] += pads.sum()
    return counts_V


class Conversations(NamedTuple):
  """As `pipeline.Corpus`. `fingerprint` is equal where conversations, tokenizer and layout are."""

  train: ConversationRows
  held_out: ConversationRows
  report: dict[str, float]
  fingerprint: str


def load_conversations(data_config, tokenizer) -> Conversations:
  """Reads, splits, renders and lays out instruction data.

  A conversation's side depends on its prompt alone, so that all answers to one question are on the
  same side, and adding conversations moves none of the others.

  Args:
    data_config: the `data` section; read here are `path`, `schema`, `on_broken` (see
      `instructions.read_conversations`), `held_out` (share of the distinct prompts), `system` (the
      system message where there is none; "" for none), `seq_len`, and:
      `padding`: "fixed" learns all pads of a row. "flexible" learns `flexible_pads` of them and
        leaves the others out. The paper's flexible rows end with the longest of their batch; here
        a row may not depend on the batch that it sits in, which the number of processes and a
        restart would show in, so each gets the same margin after its own response.
      `over_long`: what to do with a conversation of more than seq_len tokens. "error" stops with
        its name; "truncate" cuts the response, which then has no end token; "drop" leaves it out.
        A prompt that leaves no room for a response is left out under "truncate" too.
    tokenizer: a `Tokenizer` with ChatML's tokens and <|dlm_pad|>.
  Returns:
    `Conversations`; `report` counts `examples` (kept), `held_out_examples`, `broken`, `duplicates`
    (kept), `truncated`, `dropped` (over-long), of these `prompt_too_long`, and of what was kept
    `prompt_tokens`, `response_tokens`, `pad_tokens` (learnt) and `response_min`, `_p50`, `_p90`,
    `_p99`, `_max`: response lengths in tokens, before they were cut.
  Raises:
    ValueError: a setting, a record or a conversation that cannot be used, or nothing to train on.
  """
  seq_len, learned_pads = _checked(data_config)
  pad_id = chat.chat_ids(tokenizer)[chat.PAD]
  found, broken = instructions.read_conversations(
    data_config.path, data_config.schema, data_config.on_broken
  )
  counts = dict.fromkeys(("truncated", "dropped", "prompt_too_long"), 0)
  kept = []  # (hash of the prompt's messages, of all, prompt ids, response ids)
  lengths = []  # of the responses of `kept`, before they were cut
  for conversation, prompt, response in _rendered(found, tokenizer, data_config.system):
    whole = len(response)
    if len(prompt) + whole > seq_len:
      room = seq_len - len(prompt)
      if data_config.over_long == "error":
        raise ValueError(
          f"{conversation.name} is too long: {len(prompt)} + {whole} tokens, data.seq_len is "
          f"{seq_len}; raise it, or set data.over_long to 'truncate' or 'drop'"
        )
      counts["prompt_too_long"] += room < 1
      if data_config.over_long == "drop" or room < 1:
        counts["dropped"] += 1
        continue
      counts["truncated"] += 1
      response = response[:room]
    lengths.append(whole)
    hashes = _hash(conversation.messages[:-1]), _hash(conversation.messages)
    kept.append((*hashes, np.asarray(prompt, np.int32), np.asarray(response, np.int32)))
  limit = data_config.held_out * 2**64
  train = [example for example in kept if int(example[0][:16], 16) >= limit]
  # In an order of their own, so that every run scores the same rows.
  held_out = sorted((e for e in kept if int(e[0][:16], 16) < limit), key=lambda e: e[1])
  if not train:
    raise ValueError(
      f"nothing to train on: {len(found)} conversation(s), {counts['dropped']} dropped as over-long, "
      f"{len(held_out)} held out; raise data.seq_len, lower data.held_out, or give more"
    )

  rows = [_lay_out(side, seq_len, pad_id, learned_pads) for side in (train, held_out)]
  prompt_tokens = sum(len(example[2]) for example in kept)
  response_tokens = sum(len(example[3]) for example in kept)
  quantiles = np.percentile(lengths, (0, 50, 90, 99, 100), method="lower").astype(int).tolist()
  names = ("min", "p50", "p90", "p99", "max")
  report = {
    "examples": len(kept),
    "held_out_examples": len(held_out),
    "broken": len(broken),
    "duplicates": len(kept) - len({example[1] for example in kept}),
    **counts,
    "prompt_tokens": prompt_tokens,
    "response_tokens": response_tokens,
    "pad_tokens": sum(
      min(seq_len - len(example[2]) - len(example[3]), learned_pads) for example in kept
    ),
    **{f"response_{name}": value for name, value in zip(names, quantiles, strict=True)},
  }
  logging.info("conversations: %s", ", ".join(f"{k} {v}" for k, v in report.items()))
  parts = [example[1] for example in (*train, *held_out)]
  parts += [tokenizer.fingerprint(), json.dumps([data_config.system, seq_len, learned_pads])]
  parts += [data_config.over_long, str(len(train))]
  fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
  return Conversations(*rows, report, fingerprint)


def _checked(data_config):
  """(seq_len, number of learnt pads), after all settings have been looked at."""
  if not 0 <= data_config.held_out < 1:
    raise ValueError(f"data.held_out must be in [0, 1), got {data_config.held_out}")
  for name, known in (("padding", PADDING), ("over_long", OVER_LONG)):
    if data_config[name] not in known:
      raise ValueError(f"data.{name} is {data_config[name]!r}; choose one of {known}")
  if data_config.seq_len < 2:
    raise ValueError(f"data.seq_len must be at least 2, got {data_config.seq_len}")
  if data_config.flexible_pads < 0:
    raise ValueError(f"data.flexible_pads must be at least 0, got {data_config.flexible_pads}")
  pads = data_config.seq_len
  if data_config.padding == "flexible":
    pads = min(pads, data_config.flexible_pads)
  return data_config.seq_len, pads


def _rendered(found, tokenizer, system):
  """(conversation, prompt ids, response ids) of each, a block at a time."""
  for i in range(0, len(found), _ENCODE_CONVERSATIONS):
    block = found[i : i + _ENCODE_CONVERSATIONS]
    rendered = chat.render_batch([c.messages for c in block], tokenizer, system)
    for conversation, (prompt, response) in zip(block, rendered, strict=True):
      yield conversation, prompt, response


def _lay_out(examples, seq_len, pad_id, learned_pads):
  parts = [ids for example in examples for ids in example[2:]]
  ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)  # prompt, response, prompt, ...
  tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
  return ConversationRows(tokens, ends[::2], ends[1::2], seq_len, pad_id, learned_pads)


def _hash(messages):
  fields = [[message["role"], message["content"]] for message in messages]
  return sources.content_hash(json.dumps(fields))
