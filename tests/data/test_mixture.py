"""Mixtures: proportions, epochs, and what a place holds, all by arithmetic."""

import collections

import numpy as np
import pytest

from diffucoder_jax.data import batching, pipeline
from diffucoder_jax.data.mixture import BLOCK, Mixture, RecordTokens
from diffucoder_jax.data.pipeline import PackedRows

SHARES = {"code": 0.78, "text": 0.2, "math": 0.02}


def rows(count, first):
  """`count` rows of 4 tokens, all equal to the row's own number."""
  tokens = np.repeat(np.arange(first, first + count, dtype=np.int32), 4)
  return PackedRows(tokens, np.arange(0, 4 * count, 4), 4, pad_id=0)


def mixture():
  return Mixture({"code": rows(50, 0), "text": rows(20, 100), "math": rows(7, 200)}, SHARES)


def ids(dataset, places):
  return [int(dataset[place]["tokens"][0]) for place in places]


def test_proportions():
  mixed = mixture()
  taken = mixed.rows_taken(BLOCK)
  for name, share in SHARES.items():
    assert abs(taken[name] - share * BLOCK) <= 1
  names = collections.Counter(mixed.place(row)[0] for row in range(5000))
  assert mixed.rows_taken(5000) == dict(names)
  for name, share in SHARES.items():
    assert abs(names[name] / 5000 - share) < 4 * np.sqrt(share * (1 - share) / 5000)


def test_every_source_comes_once_an_epoch():
  """Across a block's border too, and in a new order each time."""
  mixed = mixture()
  begin = 3 * BLOCK - 700
  seen = collections.defaultdict(list)
  for row in range(begin, begin + 1400):
    name, index = mixed.place(row)
    seen[name].append(index)
  for name, indices in seen.items():
    first = mixed.rows_taken(begin)[name]
    assert indices == list(range(first, first + len(indices)))
  dataset = mixed.shuffled(seed=3)
  stream = ids(dataset, range(400))
  code = [i for i in stream if i < 100]
  assert sorted(code[:50]) == sorted(code[50:100]) == list(range(50))
  assert code[:50] != code[50:100] != sorted(code[50:100])
  assert ids(mixed.shuffled(seed=3), range(400)) == stream
  assert ids(mixed.shuffled(seed=4), range(400)) != stream


def test_batches_do_not_depend_on_processes_or_restarts(data_config):
  data_config.global_batch = 8
  whole = batching.train_batches(mixture(), data_config, seed=3)
  whole = np.stack([next(whole)["tokens"] for _ in range(40)])
  first = [batching.train_batches(mixture(), data_config, 3, (i, 1)) for i in range(1)]
  parts = [next(first[0])["tokens"] for _ in range(15)]
  state = first[0].get_state()
  second = [batching.train_batches(mixture(), data_config, 3, (i, 2)) for i in range(2)]
  for batches in second:
    batches.set_state(state)
  parts += [np.concatenate([next(batches)["tokens"] for batches in second]) for _ in range(25)]
  np.testing.assert_array_equal(np.stack(parts), whole)
  # Of that run of one process and then two: every row of a source once in each of its epochs.
  stream = np.concatenate(parts)[:, 0].tolist()
  for name, own in (("code", range(50)), ("text", range(100, 120)), ("math", range(200, 207))):
    seen = [row for row in stream if row in own]
    assert len(seen) == mixture().rows_taken(len(stream))[name]
    assert abs(len(seen) / len(stream) - SHARES[name]) < 0.1
    for begin in range(0, len(seen), len(own)):
      epoch = seen[begin : begin + len(own)]
      assert len(set(epoch)) == len(epoch)
  assert {row for row in stream if row < 200} == {*range(50), *range(100, 120)}


def test_wrong_shares_are_named():
  parts = {"code": rows(5, 0), "text": rows(5, 10)}
  with pytest.raises(ValueError, match="share of source text is 0"):
    Mixture(parts, {"code": 1.0, "text": 0.0})
  with pytest.raises(ValueError, match="text has less than one row in"):
    Mixture(parts, {"code": 1.0, "text": 1e-6})
  with pytest.raises(ValueError, match="source text .* has no rows"):
    Mixture(parts | {"text": rows(0, 0)}, {"code": 1.0, "text": 1.0})
  with pytest.raises(ValueError, match="must name the same"):
    Mixture(parts, {"code": 1.0})


class Records:
  """What `RecordTokens` needs of a prepared dataset."""

  def __init__(self, documents):
    self.documents = documents
    self.lengths = np.asarray([len(d) for d in documents])

  def __getitem__(self, i):
    return {"tokens": np.asarray(self.documents[i], np.int32)}


@pytest.mark.parametrize("bos, eos", [([1], [2]), ([], [2]), ([], [])])
def test_records_pack_as_texts_in_memory_do(bos, eos):
  rng = np.random.default_rng(0)
  documents = [rng.integers(3, 99, n).tolist() for n in (5, 1, 17, 3, 30, 2)]
  stream = RecordTokens(Records(documents), bos, eos)
  flat = np.concatenate([np.asarray([*bos, *d, *eos], np.int32) for d in documents])
  assert len(stream) == len(flat)
  for begin in range(0, len(flat), 3):
    for end in (begin, begin + 1, begin + 9, len(flat)):
      np.testing.assert_array_equal(stream[begin:end], flat[begin:end])
  one, two = (PackedRows(tokens, stream.starts, 8, 0) for tokens in (stream, flat))
  for i in range(len(two)):
    for key, value in two[i].items():
      np.testing.assert_array_equal(one[i][key], value)


def test_prepared_datasets_are_mixed_and_packed(tmp_path, data_config, sentencepiece_tokenizer):
  """From texts to batches: two prepared datasets, their shares, and what must agree."""
  pytest.importorskip("rensa")
  from ml_collections import config_dict

  from diffucoder_jax.data import corpus, dataset

  sentencepiece_tokenizer.save(tmp_path)
  parts = config_dict.create()
  for name, share in (("code", 0.75), ("text", 0.25)):
    folder = tmp_path / f"{name}_texts"
    folder.mkdir()
    for i in range(30):
      (folder / f"{i}.py").write_text("".join(f"{name}_{i}_{j} = {i * j}\n" for j in range(20)))
    c = config_dict.create(data=data_config.copy_and_resolve_references())
    c.tokenizer = str(tmp_path / "tokenizer.model")
    c.data.source, c.data.path, c.data.held_out = "folder", str(folder), 0.2
    c.prepare = {"near_threshold": 0.0}
    dataset.build(c, str(tmp_path / name), 1)
    parts[name] = config_dict.create(path=str(tmp_path / name), share=share)
  data_config.source, data_config.mixture = "mixture", parts
  opened = corpus.open_corpus(data_config, sentencepiece_tokenizer, seed=0)
  assert opened.report["code_share"] == 0.75
  assert set(opened.held_out) == {"code", "text"}
  batches = batching.train_batches(opened.train, data_config, seed=1)
  texts = [
    sentencepiece_tokenizer.decode(row) for _ in range(50) for row in next(batches)["tokens"]
  ]
  code = sum("code_" in text for text in texts)
  assert all(("code_" in text) != ("text_" in text) for text in texts)
  assert abs(code / len(texts) - 0.75) < 0.1
  seen = pipeline.sources_seen(opened.train, len(texts))
  assert seen["data/code_tokens"] == code * data_config.seq_len
  again = corpus.open_corpus(data_config, sentencepiece_tokenizer, seed=0)
  assert again.fingerprint == opened.fingerprint

  parts.text.share = 0.5
  assert (
    corpus.open_corpus(data_config, sentencepiece_tokenizer, 0).fingerprint != opened.fingerprint
  )
  parts.text.path = ""
  with pytest.raises(ValueError, match="data.mixture.text.path is empty"):
    corpus.open_corpus(data_config, sentencepiece_tokenizer, seed=0)
