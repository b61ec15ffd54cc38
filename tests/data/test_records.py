import pathlib
import pickle
import shutil
import subprocess
import sys

import grain
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffucoder_jax.data import dataset, records, sources

pytest.importorskip("rensa")
TEXTS = {f"{i:02}.py": f"def f{i}(x):\n  return x + {i}  # é\n" * (2 + i % 7) for i in range(60)}


@pytest.fixture(scope="module")
def made(tmp_path_factory, sentencepiece_tokenizer):
  """A dataset of short files, in several shards; nobody may change it."""
  root = tmp_path_factory.mktemp("made")
  (root / "corpus").mkdir()
  for name, text in TEXTS.items():
    (root / "corpus" / name).write_text(text)
  (root / "corpus" / "LICENSE").write_text("Mozilla Public License 2.0")
  sentencepiece_tokenizer.save(root)
  config = ConfigDict({
    "tokenizer": str(root), "data": {"source": "folder", "path": str(root / "corpus"),
    "pattern": "**/*.py", "text_key": "content", "held_out": 0.3},
    "prepare": {"shard_bytes": 4000, "label": "toy", "near_threshold": 0.0},
  })  # fmt: skip
  dataset.build(config, root / "dataset", 1)
  return root / "dataset"


@pytest.fixture
def copy(made, tmp_path):
  return pathlib.Path(shutil.copytree(made, tmp_path / "copy"))


def test_every_document_comes_back(made, sentencepiece_tokenizer):
  documents = [sources.Document(name, text) for name, text in TEXTS.items()]
  for split, expected in zip(records.SPLITS, sources.split(documents, 0.3), strict=True):
    opened = records.open_dataset(made, split)
    assert len(opened) == len(expected) > 5
    assert len(opened.paths) > 1, "one shard shows little"
    for i in np.random.default_rng(0).permutation(len(opened)):
      record, document = opened[i], expected[i]
      assert record["tokens"].dtype == np.int32
      assert record["tokens"].tolist() == sentencepiece_tokenizer.encode(document.text)
      assert record.keys() == {"tokens", "name", "source", "license", "language", "bytes"}
      assert {k: v for k, v in record.items() if k != "tokens"} == {
        "name": document.name, "source": "toy", "license": "MPL-2.0", "language": "python",
        "bytes": len(document.text.encode())}  # fmt: skip
      assert opened.lengths[i] == len(record["tokens"]) and opened.bytes[i] == record["bytes"]
    assert opened.lengths.dtype == opened.bytes.dtype == np.int64
    assert opened.tokenizer_fingerprint == sentencepiece_tokenizer.fingerprint()
    assert opened.fingerprint == records.read_manifest(made)["sha256"] and opened.split == split
    for i in (-1, len(opened)):
      with pytest.raises(IndexError, match=f"document {i} of {len(opened)}"):
        opened[i]


def test_it_travels_to_other_processes(made):
  opened = records.open_dataset(made, "train")
  first = opened[0]
  again = pickle.loads(pickle.dumps(opened))
  assert repr(again) == repr(opened) and opened.fingerprint in repr(opened)
  np.testing.assert_array_equal(again[0]["tokens"], first["tokens"])
  shuffled = grain.MapDataset.source(opened).seed(1).shuffle().map(lambda record: record["name"])
  assert sorted(shuffled) == sorted(opened[i]["name"] for i in range(len(opened)))


@pytest.mark.slow
def test_tfds_opens_it_without_tensorflow(made):
  """In a process of its own: this one may have imported anything."""
  code = f"""
import sys
import tensorflow_datasets as tfds
from diffucoder_jax.data import records
builder = tfds.builder_from_directory({str(made)!r})
for split in records.SPLITS:
  ours, theirs = records.open_dataset({str(made)!r}, split), builder.as_data_source(split=split)
  assert len(ours) == len(theirs) == builder.info.splits[split].num_examples > 0
  for i in range(len(ours)):
    a, b = ours[i], theirs[i]
    assert a.keys() == b.keys(), (a, b)
    assert (a["tokens"] == b["tokens"]).all() and b["tokens"].dtype == a["tokens"].dtype
    assert all(a[key] == b[key].decode() for key in ("name", "source", "language", "license"))
    assert a["bytes"] == b["bytes"]
half = builder.as_data_source(split="train[:50%]")
assert 0 < len(half) < len(builder.as_data_source(split="train"))
assert "tensorflow" not in sys.modules
first = records.open_dataset({str(made)!r}, "train")[0]
print(records.encode_record(first).hex())
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  # Protobuf draws the order of a map's keys anew in each process, unless told not to.
  assert done.stdout.strip() == records.encode_record(records.open_dataset(made, "train")[0]).hex()


def test_a_split_may_be_empty(copy, made, tmp_path):
  config = ConfigDict(records.read_manifest(made)["config"])
  config.tokenizer = str(made.parent)
  config.data.held_out = 0.0
  dataset.build(config, tmp_path / "all", 1)
  assert len(records.open_dataset(tmp_path / "all", "train")) == len(TEXTS)
  nothing = records.open_dataset(tmp_path / "all", "held_out")
  assert len(nothing) == 0 and nothing.lengths.shape == (0,)
  with pytest.raises(IndexError, match="document 0 of 0"):
    nothing[0]


def test_what_is_wrong_with_a_dataset_is_named(copy, tmp_path):
  with pytest.raises(ValueError, match="unknown split 'test'; known: train, held_out"):
    records.open_dataset(copy, "test")
  with pytest.raises(FileNotFoundError, match=r"holds no manifest.json; make one with `python"):
    records.open_dataset(tmp_path / "nowhere", "train")
  shard = copy / records.shard_name("train", 0, len(records.open_dataset(copy, "train").paths))
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1])
  with pytest.raises(ValueError, match=rf"{shard.name} has {len(whole) - 1} bytes, the manifest"):
    records.open_dataset(copy, "train")
  # The same size and other contents: found where it is read.
  shard.write_bytes(b"\xff" * len(whole))
  with pytest.raises(ValueError, match=r"document 0 of train in .* is damaged"):
    records.open_dataset(copy, "train")[0]
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing"):
    records.open_dataset(copy, "train")
  np.save(copy / "index-held_out.npy", np.zeros((3, 2), np.int64))
  with pytest.raises(ValueError, match=r"index-held_out.npy is not the manifest's"):
    records.open_dataset(copy, "held_out")
  manifest = copy / "manifest.json"
  manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 0', 1))
  with pytest.raises(ValueError, match="has version 0, this code reads 1"):
    records.open_dataset(copy, "train")
  manifest.write_text("{")
  with pytest.raises(ValueError, match="manifest.json is damaged"):
    records.open_dataset(copy, "train")
  manifest.unlink()
  (copy / "work").mkdir()
  with pytest.raises(FileNotFoundError, match="it is not finished: run the same command again"):
    records.open_dataset(copy, "train")


def test_shards_of_other_documents_are_noticed(copy):
  opened = records.open_dataset(copy, "train")
  opened.lengths = opened.lengths + 1
  with pytest.raises(ValueError, match=r"document 3 of train \(.*py\) has \d+ tokens, the index"):
    opened[3]
