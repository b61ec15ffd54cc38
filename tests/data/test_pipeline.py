import collections
import dataclasses
import json
import math
import pathlib

import grain
import numpy as np
import pytest

from diffucoder_jax.data import batching, pipeline, sources
from diffucoder_jax.data.pipeline import PackedRows


@pytest.fixture
def corpus_config(data_config):
  """A folder of 60 short files, two of them equal and one empty."""
  root = pathlib.Path(data_config.path)
  root.mkdir()
  for i in range(58):
    (root / f"f{i:02}.py").write_text(f"def f{i}(x):\n  return x + {i}\n" * (1 + i % 5))
  (root / "copy.py").write_text((root / "f07.py").read_text())
  (root / "empty.py").touch()
  return data_config


@pytest.fixture
def corpus(corpus_config, sentencepiece_tokenizer):
  return pipeline.load_corpus(corpus_config, sentencepiece_tokenizer, seed=0)


def all_rows(rows):
  return [rows[i] for i in range(len(rows))]


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_rows_by_hand():
  rows = PackedRows(np.arange(10, 21, dtype=np.int32), np.asarray([0, 3, 8]), 6, pad_id=7)
  first, second = all_rows(rows)
  assert first["tokens"].tolist() == [10, 11, 12, 13, 14, 15]
  assert first["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2]
  assert first["positions"].tolist() == [0, 1, 2, 0, 1, 2]
  assert first["maskable"].tolist() == [False, True, True, False, True, True]
  # The second document goes on in the second row, as a segment of its own; one place is padding.
  assert second["tokens"].tolist() == [16, 17, 18, 19, 20, 7]
  assert second["segment_ids"].tolist() == [1, 1, 2, 2, 2, 0]
  assert second["positions"].tolist() == [0, 1, 0, 1, 2, 0]
  assert second["maskable"].tolist() == [False, True, False, True, True, False]
  dtypes = {key: value.dtype for key, value in second.items()}
  assert dtypes == {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32,
                    "maskable": bool}
  with pytest.raises(IndexError):
    rows[2]
  assert repr(rows) == "PackedRows(tokens=11, documents=3, seq_len=6)"


def test_every_document_comes_back_out_of_the_rows(corpus_config, tokenizer):
  corpus = pipeline.load_corpus(corpus_config, tokenizer, seed=0)
  documents, _ = sources.read_documents(corpus_config)
  train, held_out = sources.split(documents, corpus_config.held_out)
  for rows, side in ((corpus.train, train), (corpus.held_out, held_out)):
    tokens, fresh = [], []
    for row in all_rows(rows):
      real = row["segment_ids"] > 0
      assert (row["tokens"][~real] == tokenizer.pad_id).all() and not row["maskable"][~real].any()
      # Segments count up by one where positions restart, and only segment starts are not scored.
      np.testing.assert_array_equal(row["maskable"], real & (row["positions"] > 0))
      np.testing.assert_array_equal(row["segment_ids"][real],
                                    np.cumsum(row["positions"][real] == 0))
      steps = np.diff(row["positions"][real])
      assert ((steps == 1) | (row["positions"][real][1:] == 0)).all()
      tokens += row["tokens"][real].tolist()
      fresh += (row["positions"][real] == 0).tolist()
    # A document is bos + text + eos, and no position but a row's start begins a segment otherwise.
    texts, place = [], 0
    for start, stop in zip(rows.starts, [*rows.starts[1:], len(tokens)], strict=True):
      assert tokens[start] == tokenizer.bos_id and tokens[stop - 1] == tokenizer.eos_id
      begins = [i for i in range(start, stop) if fresh[i]]
      assert begins == [i for i in range(start, stop) if i == start or i % rows.seq_len == 0]
      texts.append(tokenizer.decode(tokens[start + 1 : stop - 1]))
      place = stop
    assert place == len(tokens) == len(rows.tokens)
    assert collections.Counter(texts) == collections.Counter(d.text for d in side if d.text)


def test_report_counts(corpus_config, corpus, sentencepiece_tokenizer):
  documents = [d for d in sources.read_documents(corpus_config)[0] if d.text]
  held_out = sources.split(documents, corpus_config.held_out)[1]
  ids = [sentencepiece_tokenizer.encode(document.text) for document in documents]
  size = sum(len(document.text) for document in documents)
  held_ids = [sentencepiece_tokenizer.encode(document.text) for document in held_out]
  assert corpus.report == {
    "documents": 59, "held_out_documents": len(held_out), "duplicates": 1, "empty": 1,
    "undecodable": 0, "dropped": 1, "bytes": size, "tokens": sum(map(len, ids)),
    "bytes_per_token": size / sum(map(len, ids)),
    "held_out_bytes_per_token": sum(len(d.text) for d in held_out) / sum(map(len, held_ids)),
  }
  assert len(corpus.train.tokens) + len(corpus.held_out.tokens) == sum(map(len, ids)) + 2 * 59


def test_corpus_is_a_function_of_text_and_seed(corpus_config, corpus, sentencepiece_tokenizer):
  again = pipeline.load_corpus(corpus_config, sentencepiece_tokenizer, seed=0)
  other = pipeline.load_corpus(corpus_config, sentencepiece_tokenizer, seed=1)
  np.testing.assert_array_equal(again.train.tokens, corpus.train.tokens)
  assert again.fingerprint == corpus.fingerprint != other.fingerprint
  assert (other.train.tokens != corpus.train.tokens).any()
  np.testing.assert_array_equal(other.held_out.tokens, corpus.held_out.tokens)


def test_small_blocks_encode_the_same(corpus_config, corpus, sentencepiece_tokenizer, monkeypatch):
  monkeypatch.setattr(pipeline, "_ENCODE_CHARACTERS", 200)
  monkeypatch.setattr(pipeline, "_LOG_SECONDS", -1.0)
  again = pipeline.load_corpus(corpus_config, sentencepiece_tokenizer, seed=0)
  np.testing.assert_array_equal(again.train.tokens, corpus.train.tokens)


@pytest.mark.parametrize("count", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(corpus, corpus_config, count):
  steps = 3 * len(corpus.train) // corpus_config.global_batch  # into the third epoch
  whole = take(batching.train_batches(corpus.train, corpus_config, seed=3), steps)
  parts = [take(batching.train_batches(corpus.train, corpus_config, 3, (i, count)), steps)
           for i in range(count)]
  for step, batch in enumerate(whole):
    assert batch["tokens"].shape == (8, 16)
    assert parts[0][step]["tokens"].shape == (8 // count, 16)
    assert_equal(batch, {key: np.concatenate([part[step][key] for part in parts]) for key in batch})


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_batch_that_the_mesh_does_not_divide_is_filled_up(corpus, corpus_config, count, caplog):
  """8 rows for 6 batch shards: 4 of padding at the end, whoever reads them; the rows stay the same."""
  whole = take(batching.train_batches(corpus.train, corpus_config, seed=3), 5)
  assert batching.placed_rows(corpus_config, 6) == 8  # only where it is asked for
  corpus_config.fill_batch = True
  placed = batching.placed_rows(corpus_config, 6)
  assert placed == 12 and "4 empty rows fill up 8 to 12" in caplog.text
  assert batching.placed_rows(corpus_config, 4) == 8
  iterators = [batching.train_batches(corpus.train, corpus_config, 3, (i, count), placed)
               for i in range(count)]  # fmt: skip
  take(iterators[-1], 4)
  iterators[-1].set_state({"next_index": 0})
  for batch in whole:
    blocks = [next(iterator) for iterator in iterators]
    assert {len(block["tokens"]) for block in blocks} == {12 // count}
    filled = {key: np.concatenate([block[key] for block in blocks]) for key in batch}
    assert_equal({key: x[:8] for key, x in filled.items()}, batch)
    assert not filled["segment_ids"][8:].any() and not filled["maskable"][8:].any()
    assert (filled["tokens"][8:] == corpus.train.pad_id).all()


def test_each_epoch_shows_every_row_once_in_a_new_order(corpus, corpus_config):
  rows = len(corpus.train)
  assert rows % 8  # epochs end inside a batch
  batches = take(batching.train_batches(corpus.train, corpus_config, seed=3), rows)  # 8 epochs
  seen = [tokens.tobytes() for batch in batches for tokens in batch["tokens"]]
  expected = collections.Counter(row["tokens"].tobytes() for row in all_rows(corpus.train))
  epochs = [seen[i : i + rows] for i in range(0, len(seen), rows)]
  assert all(collections.Counter(epoch) == expected for epoch in epochs)
  assert epochs[0] != epochs[1]
  other = take(batching.train_batches(corpus.train, corpus_config, seed=4), 1)
  assert (other[0]["tokens"] != batches[0]["tokens"]).any()


def test_resume_continues_exactly_with_another_process_count(corpus, corpus_config):
  whole = take(batching.train_batches(corpus.train, corpus_config, seed=3), 30)
  first = batching.train_batches(corpus.train, corpus_config, 3, (1, 2))
  assert first.get_state() == {"next_index": 0}
  take(first, 11)
  state = json.loads(json.dumps(first.get_state()))
  assert state == {"next_index": 11}
  for index, count in ((0, 1), (3, 4)):
    resumed = batching.train_batches(corpus.train, corpus_config, 3, (index, count))
    take(resumed, 2)  # also when it was already running
    resumed.set_state(state)
    assert resumed.get_state() == state
    local = 8 // count
    for step in range(11, 30):
      block = {key: x[index * local : (index + 1) * local] for key, x in whole[step].items()}
      assert_equal(next(resumed), block)
  assert resumed.get_state() == {"next_index": 30}


def test_rows_are_a_grain_source(corpus):
  assert isinstance(corpus.train, grain.sources.RandomAccessDataSource)


@pytest.mark.parametrize("count_rows", [1, 5, 10, 1000])
def test_held_out_batches_cover_the_sample_once(corpus, count_rows):
  rows = corpus.held_out
  batches = list(batching.held_out_batches(rows, count_rows, 4))
  assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
  stacked = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  real = stacked["segment_ids"].any(axis=1)
  taken = min(count_rows, len(rows))
  assert real.sum() == taken and real[:taken].all() and len(real) == math.ceil(taken / 4) * 4
  assert (stacked["tokens"][~real] == rows.pad_id).all() and not stacked["maskable"][~real].any()
  possible = collections.Counter(row["tokens"].tobytes() for row in all_rows(rows))
  chosen = collections.Counter(tokens.tobytes() for tokens in stacked["tokens"][real])
  assert chosen <= possible
  # A larger sample begins with the smaller one; processes hold blocks of the same batches.
  everything = next(batching.held_out_batches(rows, len(rows), taken))
  np.testing.assert_array_equal(stacked["tokens"][:taken], everything["tokens"])
  parts = [list(batching.held_out_batches(rows, count_rows, 4, (i, 2))) for i in range(2)]
  for step, batch in enumerate(batches):
    assert_equal(batch, {key: np.concatenate([part[step][key] for part in parts]) for key in batch})


def test_held_out_sample_is_spread_over_the_rows(corpus):
  tokens = next(batching.held_out_batches(corpus.held_out, 6, 6))["tokens"]
  assert (tokens != np.stack([row["tokens"] for row in all_rows(corpus.held_out)[:6]])).any()


def test_unigram_by_hand():
  # Two documents "0 1 1 2" and "0 1 2"; scored are 1 1 2 1 2 in train, and 1 1 in held-out.
  train = PackedRows(np.asarray([0, 1, 1, 2, 0, 1, 2], np.int32), np.asarray([0, 4]), 10, 0)
  held_out = PackedRows(np.asarray([0, 1, 1], np.int32), np.asarray([0]), 10, 0)
  token_bytes = np.asarray([0, 3, 0, 5], np.int32)
  got = pipeline.unigram_bits_per_byte(train, held_out, token_bytes)
  # Counts plus one: 1, 4, 3, 1 of 9.
  assert got == pytest.approx(-2 * math.log2(4 / 9) / 6)
  # In rows of two, the second "1" of the held-out text begins a row and is not scored.
  short = PackedRows(held_out.tokens, held_out.starts, 2, 0)
  got = pipeline.unigram_bits_per_byte(train, short, token_bytes)
  assert got == pytest.approx(-math.log2(4 / 9) / 3)
  # In rows of two, training is "0 1 | 1 2 | 0 1 | 2", of which 1 2 1 are scored.
  cut = PackedRows(train.tokens, train.starts, 2, 0)
  got = pipeline.unigram_bits_per_byte(cut, short, token_bytes)
  assert got == pytest.approx(-math.log2(3 / 7) / 3)


@pytest.mark.parametrize("seq_len", [2, 7, 1000])
def test_scored_counts_are_those_of_the_rows(corpus, seq_len):
  rows = PackedRows(corpus.train.tokens, corpus.train.starts, seq_len, pad_id=0)
  scored = np.concatenate([row["tokens"][row["maskable"]] for row in all_rows(rows)])
  np.testing.assert_array_equal(rows.scored_counts(700), np.bincount(scored, minlength=700))


def test_unigram_scores_the_rows_that_are_asked_for(corpus, sentencepiece_tokenizer):
  sizes = sentencepiece_tokenizer.token_bytes()
  some, most = (pipeline.unigram_bits_per_byte(corpus.train, corpus.held_out, sizes, count)
                for count in (3, None))
  assert some != most and 0 < most < 8


def test_errors_by_name(corpus, corpus_config, sentencepiece_tokenizer):
  for index, count in ((0, 3), (0, 16)):
    with pytest.raises(ValueError, match=f"data.global_batch=8 cannot be cut into {count} equal"):
      batching.train_batches(corpus.train, corpus_config, 0, (index, count))
  with pytest.raises(ValueError, match="shard 2 of 2"):
    batching.train_batches(corpus.train, corpus_config, 0, (2, 2))
  corpus_config.global_batch = len(corpus.train) + 1
  with pytest.raises(ValueError, match=r"fewer than data.global_batch=.*give more text"):
    batching.train_batches(corpus.train, corpus_config, 0)
  with pytest.raises(ValueError, match="the evaluation batch=3 cannot be cut into 2"):
    batching.held_out_batches(corpus.held_out, 8, 3, (0, 2))
  with pytest.raises(ValueError, match="asked for 0 of"):
    batching.held_out_batches(corpus.held_out, 0, 4)
  corpus_config.held_out = 0.0
  everything = pipeline.load_corpus(corpus_config, sentencepiece_tokenizer, 0)
  assert len(everything.held_out) == 0 and "held_out_bytes_per_token" not in everything.report
  with pytest.raises(ValueError, match=r"of 0 held-out rows; raise data\.held_out"):
    batching.held_out_batches(everything.held_out, 8, 4)
  corpus_config.held_out = 0.9999999
  with pytest.raises(ValueError, match="nothing to train on: 60 document.*lower data.held_out"):
    pipeline.load_corpus(corpus_config, sentencepiece_tokenizer, 0)
  corpus_config.seq_len = 1
  with pytest.raises(ValueError, match="data.seq_len must be at least 2"):
    pipeline.load_corpus(corpus_config, sentencepiece_tokenizer, 0)


@dataclasses.dataclass
class BrokenTokenizer:
  vocab_size: int = 10
  bos_id: int = 1
  eos_id: int = 2
  pad_id: int = 0

  def encode_batch(self, texts):
    return [[3, 12] if "f30" in text else [3] for text in texts]


def test_token_ids_beyond_the_vocabulary_are_named(corpus_config):
  with pytest.raises(ValueError, match=r"token id 12 for f30\.py, outside its vocabulary of 10"):
    pipeline.load_corpus(corpus_config, BrokenTokenizer(), 0)


def test_a_tokenizer_without_bos_or_pad(corpus_config):
  class Bare(BrokenTokenizer):
    def encode_batch(self, texts):
      return [[3, 4, 5] for _ in texts]

    def fingerprint(self):
      return "bare"

  corpus = pipeline.load_corpus(corpus_config, Bare(bos_id=-1, eos_id=-1, pad_id=-1), 0)
  assert set(corpus.train.tokens.tolist()) == {3, 4, 5} and corpus.train.pad_id == 0
