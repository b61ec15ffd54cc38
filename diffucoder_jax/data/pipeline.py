"""From documents to rows: tokens laid end to end, cut, and read at random. `batching` makes batches."""

import hashlib
import time
from typing import NamedTuple

import numpy as np
from absl import logging

from diffucoder_jax.data import batching, functions, sources
from diffucoder_jax.data.mixture import Mixture

_ENCODE_CHARACTERS = 4_000_000  # encoded at once: bounds the Python lists alive at a time
_LOG_SECONDS = 10.0


class PackedRows:
  """Documents laid end to end and cut into rows of `seq_len`: a random-access source for Grain.

  Args:
    tokens: int32 [N], all tokens; or what gives them by slices, as `mixture.RecordTokens`.
    starts: int64 [documents], ascending, where each document begins in `tokens`; the first is 0.
    seq_len: tokens in a row. The last row is padded.
    pad_id: what to pad with.
  """

  def __init__(self, tokens, starts, seq_len: int, pad_id: int):
    self.tokens, self.starts = tokens, starts
    self.seq_len, self.pad_id = seq_len, pad_id

  def __len__(self):
    return -(-len(self.tokens) // self.seq_len)

  def __repr__(self):  # Grain compares sources by this when it restores
    return (
      f"PackedRows(tokens={len(self.tokens)}, documents={len(self.starts)}, seq_len={self.seq_len})"
    )

  def __getitem__(self, row):
    """Row `row`: a dict of [seq_len] arrays.

    `tokens` int32; `segment_ids` int32, the document counted from 1 in the row, 0 = padding;
    `positions` int32 from the start of the segment; `maskable` bool, what is scored: all but
    padding and each segment's first token, which no output of its own segment predicts because
    output i - 1 predicts token i.
    """
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    begin = row * self.seq_len
    tokens_L = self.tokens[begin : begin + self.seq_len]
    index_L = np.arange(begin, begin + len(tokens_L))
    document_L = np.searchsorted(self.starts, index_L, side="right") - 1
    # A document that goes on from the row before starts anew here: it cannot see that row.
    position_L = index_L - np.maximum(self.starts[document_L], begin)
    empty = self.seq_len - len(index_L)
    return {
      "tokens": np.pad(tokens_L, (0, empty), constant_values=self.pad_id),
      "segment_ids": np.pad((document_L - document_L[0] + 1).astype(np.int32), (0, empty)),
      "positions": np.pad(position_L.astype(np.int32), (0, empty)),
      "maskable": np.pad(position_L > 0, (0, empty)),
    }

  def scored_counts(self, vocab_size: int):
    """int64 [vocab_size]: how often each token stands where it is maskable, without the rows."""
    scored_N = np.arange(len(self.tokens)) % self.seq_len > 0
    scored_N[self.starts] = False
    return np.bincount(self.tokens[:][scored_N], minlength=vocab_size)


class Corpus(NamedTuple):
  """A tokenised corpus. `fingerprint` is equal where text, tokenizer, seed and row length are."""

  train: PackedRows
  held_out: PackedRows
  report: dict[str, float]
  fingerprint: str


def load_corpus(data_config, tokenizer, seed: int) -> Corpus:
  """Reads, splits, tokenises and packs the corpus.

  Args:
    data_config: the `data` section; this module reads `held_out`, `seq_len` and `unit` here: what a
      document is, a "file", or each "function" of the files, cleaned (see `functions.cleaned`).
    tokenizer: a `Tokenizer`.
    seed: order of the training documents. Held-out rows do not depend on it.
  Returns:
    the corpus; `report` counts documents, held_out_documents, duplicates (kept), empty,
    undecodable, dropped (these two together), bytes (UTF-8), tokens (without bos and eos),
    bytes_per_token and, when some are held out, held_out_bytes_per_token.
  Raises:
    ValueError: nothing to train on, or a tokenizer that gives ids beyond its vocabulary.
  """
  seq_len = data_config.seq_len
  if seq_len < 2:
    raise ValueError(f"data.seq_len must be at least 2, got {seq_len}")
  documents, undecodable = sources.read_documents(data_config)
  texts = [document for document in documents if document.text]
  empty = len(documents) - len(texts)
  train, held_out = sources.split(texts, data_config.held_out)
  if data_config.unit not in ("file", "function"):
    raise ValueError(f"data.unit must be 'file' or 'function', got {data_config.unit!r}")
  if data_config.unit == "function":  # after the split: a held-out file's functions are held out
    train, held_out = functions.cleaned(train, held_out)
    texts = train + held_out
  if not train:
    raise ValueError(
      f"nothing to train on: {len(documents)} document(s), {len(held_out)} of them "
      "held out; give more documents or lower data.held_out"
    )
  hashes = {document.name: sources.content_hash(document.text) for document in texts}
  # The held-out order comes from the texts, so that every run and every seed scores the same rows.
  held_out = sorted(held_out, key=lambda document: hashes[document.name])
  train = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]

  sides = {"train": train, "held_out": held_out}
  rows, size, tokens = {}, {}, {}
  for side, side_documents in sides.items():
    size[side] = sum(len(document.text.encode()) for document in side_documents)
    encoded = _encode(side_documents, tokenizer)
    tokens[side] = sum(map(len, encoded))
    rows[side] = _pack(encoded, tokenizer, seq_len)
  report = {
    "documents": len(texts),
    "held_out_documents": len(held_out),
    "duplicates": len(texts) - len(set(hashes.values())),
    "empty": empty,
    "undecodable": len(undecodable),
    "dropped": empty + len(undecodable),
    "bytes": sum(size.values()),
    "tokens": sum(tokens.values()),
    "bytes_per_token": sum(size.values()) / sum(tokens.values()),
  }
  if held_out:
    report["held_out_bytes_per_token"] = size["held_out"] / tokens["held_out"]
  logging.info(
    "corpus: %s",
    ", ".join(
      f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
      for key, value in report.items()
    ),
  )
  parts = [hashes[document.name] for document in (*train, *held_out)]
  parts += [tokenizer.fingerprint(), str(seq_len)]
  fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
  return Corpus(rows["train"], rows["held_out"], report, fingerprint)


def parts(rows) -> dict:
  """{source: its rows} of a mixture or of a dict of rows; {"": rows} for a single source."""
  return getattr(rows, "parts", rows if isinstance(rows, dict) else {"": rows})


def sources_seen(rows, count_rows) -> dict:
  """{"data/<source>_tokens", "data/<source>_epochs"} after `count_rows` rows of a mixture.

  By arithmetic, so that it is exact after a restart and the same on all processes. {} for a single
  source.
  """
  seen = {}
  for name, taken in rows.rows_taken(count_rows).items() if isinstance(rows, Mixture) else ():
    seen[f"data/{name}_tokens"] = taken * rows.seq_len
    seen[f"data/{name}_epochs"] = taken / len(rows.parts[name])
  return seen


def prompts(rows, count, num_tokens):
  """Beginnings of held-out rows to continue: (prompts, what followed), lists of lists of ids.

  A row with a `prompt` gives that and its answer; of another one, up to `num_tokens` tokens that
  begin a document and as many as follow. The same rows in every run.
  """
  begun, followed = [], []
  for row in np.random.default_rng(1).permutation(len(rows)).tolist():
    if len(begun) == count:
      break
    row = rows[row]
    own_L = row["segment_ids"] == row["segment_ids"][0]
    tokens = row["tokens"][own_L]
    cut = (
      int(np.argmin(row["prompt"][own_L])) if "prompt" in row else min(num_tokens, len(tokens) // 2)
    )
    if cut > 0:
      begun.append(tokens[:cut].tolist())
      followed.append(tokens[cut : cut + num_tokens].tolist())
  return begun, followed


def unigram_bits_per_byte(train_rows, held_out_rows, token_bytes, count_rows=None) -> float:
  """Bits per byte of the best guess that sees no context: what a model must beat.

  Token frequencies are counted on the training side (plus one each) and scored on the maskable
  tokens of the held-out sample. Like a model's own figure it counts the bits of end-of-document
  tokens, which stand for no bytes.

  Args:
    train_rows: rows with `scored_counts`: `PackedRows`, or conversations. A mixture has none: its
      datasets are too large to be counted at every start.
    held_out_rows: rows of the same kind.
    token_bytes: int32 [vocab_size], from the tokenizer.
    count_rows: score the rows that `batching.held_out_batches` gives for this number; all when None.
  Raises:
    ValueError: no held-out rows.
  """
  count_rows = len(held_out_rows) if count_rows is None else count_rows
  counts_V = train_rows.scored_counts(len(token_bytes)) + 1.0
  bits_V = np.log2(counts_V.sum()) - np.log2(counts_V)
  bits = size = 0.0
  for batch in batching.held_out_batches(held_out_rows, count_rows, 64):
    scored = batch["tokens"][batch["maskable"]]
    bits += bits_V[scored].sum()
    size += token_bytes[scored].sum(dtype=np.int64)
  return float(bits / size)


def _encode(documents, tokenizer):
  """Token ids of each document, as a list of int32 arrays."""
  encoded, block, characters = [], [], 0
  logged = time.monotonic()
  for i, document in enumerate(documents):
    block.append(document.text)
    characters += len(document.text)
    if characters < _ENCODE_CHARACTERS and i + 1 < len(documents):
      continue
    encoded += [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(block)]
    block, characters = [], 0
    if time.monotonic() - logged > _LOG_SECONDS:
      logging.info("tokenised %d of %d documents", i + 1, len(documents))
      logged = time.monotonic()
  for document, ids in zip(documents, encoded, strict=True):
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
      bad = next(int(i) for i in ids if not 0 <= i < tokenizer.vocab_size)
      raise ValueError(
        f"the tokenizer gave token id {bad} for {document.name}, outside its "
        f"vocabulary of {tokenizer.vocab_size}; its file is damaged"
      )
  return encoded


def _pack(encoded, tokenizer, seq_len):
  """[bos] + tokens + [eos] of every document in one array; a -1 among those ids leaves it out."""
  bos, eos = ([i] if i >= 0 else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
  parts, starts, end = [], [], 0
  for ids in encoded:
    starts.append(end)
    parts += [np.asarray(bos, np.int32), ids, np.asarray(eos, np.int32)]
    end += len(bos) + len(ids) + len(eos)
  tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
  pad_id = tokenizer.pad_id if tokenizer.pad_id >= 0 else 0  # never read: segment 0
  return PackedRows(tokens, np.asarray(starts, np.int64), seq_len, pad_id)
