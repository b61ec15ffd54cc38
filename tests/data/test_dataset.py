"""The whole way from raw files to a dataset, in this process but where processes are the point."""

import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffucoder_jax.data import dataset, filters, prepared, records, sources
from diffucoder_jax.data.settings import make_settings

pytest.importorskip("rensa")


def code(seed, lines=60):
  """A file of functions that shares no five words in a row with other seeds."""
  return "".join(f"def f_{seed}_{i}(x_{seed}):\n  return x_{seed} + {i}\n" for i in range(lines))


def edited(text, count):
  """The text with `count` words changed, far from each other."""
  lines = text.splitlines()
  for i in range(count):
    lines[i * len(lines) // count] += f" # edit_{i}"
  return "\n".join(lines)


@pytest.fixture
def config(data_config, sentencepiece_tokenizer, tmp_path):
  """A config of a folder that is still empty."""
  sentencepiece_tokenizer.save(tmp_path / "tokenizer")
  pathlib.Path(data_config.path).mkdir()
  return ConfigDict({"tokenizer": str(tmp_path / "tokenizer"), "data": data_config.to_dict(),
                     "prepare": {"chunk_bytes": 3000, "shard_bytes": 20_000}})  # fmt: skip


def write(config, files):
  for name, contents in files.items():
    path = pathlib.Path(config.data.path) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def contents(folder):
  return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.is_file()}


def dropped(folder):
  lines = (pathlib.Path(folder) / "dropped.jsonl").read_text().splitlines()
  return {line["name"]: (line["reason"], line["detail"]) for line in map(json.loads, lines)}


def kept(folder):
  return [record["name"] for split in records.SPLITS for record in _records(folder, split)]


def _records(folder, split):
  opened = records.open_dataset(folder, split)
  return [opened[i] for i in range(len(opened))]


@pytest.mark.slow
def test_the_same_bytes_for_any_workers_and_chunks(config, tmp_path, capsys):
  write(config, {f"{i:03}.py": code(i % 90, 10 + i % 7) for i in range(100)})
  write(config, {"empty.py": "", "bad.py": b"\xff"})
  first = dataset.build(config, tmp_path / "a", 1)
  assert len(first["shards"]) > 3 and sum(first["dropped"].values()) > 2
  dataset.build(config, tmp_path / "b", 2)
  config.prepare.chunk_bytes = 10**9
  dataset.build(config, tmp_path / "c", 1)
  expected = contents(tmp_path / "a")
  assert "manifest.json" in expected and not (tmp_path / "a" / "work").exists()
  assert contents(tmp_path / "b") == contents(tmp_path / "c") == expected
  assert "documents/s, ETA 0:00" in capsys.readouterr().out
  # Again: nothing is read, nothing is written.
  shutil.rmtree(config.data.path)
  times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
  assert dataset.build(config, tmp_path / "a", 2) == first
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == times
  assert "is finished already" in capsys.readouterr().out


def test_every_reason_is_counted_and_listed(config, tmp_path):
  root = pathlib.Path(config.data.path)
  config.prepare.update(max_bytes=20_000, max_line=500, max_mean_line=80.0, read_limit=1_000_000)
  good = code("good")
  write(config, {
    "good.py": good, "same.py": good.replace("\n", "  \r\n"), "similar.py": edited(good, 2),
    "other.py": code("other"), "b/empty.py": " \n", "b/short.py": "x = 1\n",
    "b/cut.py": "é".encode()[:1], "b/binary.py": b"MZ\0\0" * 10, "b/long.py": code("long", 600),
    "b/line.py": code("line") + "x" * 501, "b/mean.py": ("y" * 90 + "\n") * 50,
    "b/signs.py": "-=-=\n" * 50,
  })  # fmt: skip
  (root / "b" / "loop.py").symlink_to(root / "b" / "loop.py")
  (root / "b" / "up").symlink_to(root, target_is_directory=True)
  with open(root / "b" / "one_line.py", "wb") as sparse:
    sparse.truncate(100_000_000)
  expected = {
    "same.py": "exact_duplicate", "similar.py": "near_duplicate", "b/empty.py": "empty",
    "b/short.py": "too_short", "b/cut.py": "undecodable", "b/binary.py": "binary",
    "b/long.py": "too_long", "b/line.py": "long_line", "b/mean.py": "long_mean_line",
    "b/signs.py": "few_alphanumeric", "b/loop.py": "unreadable", "b/up": "linked_folder",
    "b/one_line.py": "too_large",
  }  # fmt: skip
  manifest = dataset.build(config, tmp_path / "out", 1)
  got = dropped(tmp_path / "out")
  assert {name: reason for name, (reason, _) in got.items()} == expected
  assert list(got) == sorted(got), "not in the order of the documents"
  assert got["same.py"][1] == "of good.py"
  detail = got["similar.py"][1]
  assert detail.endswith(" similar to good.py") and 0.8 <= float(detail.split()[0]) < 1
  assert sorted(kept(tmp_path / "out")) == ["good.py", "other.py"]
  assert manifest["documents_read"] == len(expected) + 2
  assert manifest["dropped"] == dict.fromkeys(sorted(expected.values(), key=list(
    filters.REASONS).index), 1)  # fmt: skip

  (root / "a.jsonl").write_text(json.dumps({"content": good}) + '\n{"content"\n{"text": "x"}\n')
  config.data.source = "jsonl"
  dataset.build(config, tmp_path / "records", 1)
  reasons = {reason for reason, _ in dropped(tmp_path / "records").values()}
  assert reasons == {"corrupt", "no_text", "linked_folder"}
  assert kept(tmp_path / "records") == [f"{root}/a.jsonl:1"]
  assert reasons | set(expected.values()) == set(filters.REASONS)


def test_a_thousand_bad_files(config, tmp_path):
  root = pathlib.Path(config.data.path)
  config.prepare.chunk_bytes = 100_000
  generator = np.random.default_rng(0)
  write(config, {f"good/{i}.py": code(i) for i in range(5)})
  write(config, {f"binary/{i}.py": generator.bytes(300) + b"\0\xff" for i in range(300)})
  write(config, {f"cut/{i}.py": (code(i) + "é").encode()[:-1] for i in range(300)})
  write(config, {f"empty/{i}.py": "\n" * i for i in range(300)})
  for i in range(50):
    with open(root / f"{i}.py", "wb") as sparse:
      sparse.write(b"x = 1")
      sparse.truncate(100_000_000)
    (root / f"loop{i}.py").symlink_to(root / f"loop{(i + 1) % 50}.py")
  manifest = dataset.build(config, tmp_path / "out", 1)
  assert manifest["dropped"] == {
    "unreadable": 50,
    "too_large": 50,
    "undecodable": 600,
    "empty": 300,
  }
  assert sorted(kept(tmp_path / "out")) == [f"good/{i}.py" for i in range(5)]
  got = dropped(tmp_path / "out")
  assert len(got) == 1000 and manifest["documents_read"] == 1005
  kinds = {"binary": "undecodable", "cut": "undecodable", "empty": "empty"}
  for name, (reason, detail) in got.items():
    expected = kinds.get(name.split("/")[0], "unreadable" if "loop" in name else "too_large")
    assert reason == expected and detail, name


def test_duplicates_across_chunks_and_near_misses(config, tmp_path):
  files = {}
  for i in range(12):
    files |= {f"a/{i}.py": code(i), f"b/{i}.py": edited(code(i), 2), f"c/{i}.py": code(i) + "\n\n"}
    files[f"d/{i}.py"] = edited(code(i), 20)
  write(config, files)
  manifest = dataset.build(config, tmp_path / "out", 1)
  assert manifest["dropped"] == {"exact_duplicate": 12, "near_duplicate": 12}
  assert {name.split("/")[0] for name in kept(tmp_path / "out")} == {"a", "d"}
  got = dropped(tmp_path / "out")
  assert all(got[f"c/{i}.py"] == ("exact_duplicate", f"of a/{i}.py") for i in range(12))
  assert all(got[f"b/{i}.py"][1].endswith(f"similar to a/{i}.py") for i in range(12))
  config.prepare.near_threshold = 0.0
  assert dataset.build(config, tmp_path / "off", 1)["dropped"] == {"exact_duplicate": 12}
  config.prepare.near_threshold = 0.5
  manifest = dataset.build(config, tmp_path / "low", 1)
  assert manifest["dropped"] == {"exact_duplicate": 12, "near_duplicate": 24}


def test_the_manifest_says_what_is_there(config, tmp_path, sentencepiece_tokenizer):
  config.data.pattern = "**/*"
  write(config, {f"{i}.py": code(i, 5 + i) for i in range(20)} | {"x.go": code("go"), "t": ""})
  write(config, {"p/LICENSE": "Mozilla Public License 2.0 " * 5, "p/y.go": code("y")})
  manifest = dataset.build(config, tmp_path / "out", 1)
  everything = {split: _records(tmp_path / "out", split) for split in records.SPLITS}
  for split, rows in everything.items():
    of = manifest["splits"][split]
    assert rows and of["documents"] == len(rows)
    assert of["tokens"] == sum(len(row["tokens"]) for row in rows)
    assert of["bytes"] == sum(row["bytes"] for row in rows)
    for field in ("source", "language", "license"):
      assert set(of[field]) == {row[field] for row in rows}
      for value, amounts in of[field].items():
        mine = [row for row in rows if row[field] == value]
        assert amounts == {"documents": len(mine), "bytes": sum(row["bytes"] for row in mine),
                           "tokens": sum(len(row["tokens"]) for row in mine)}  # fmt: skip
    # The split is the one that training from raw text makes.
    texts = [sources.Document(row["name"], sentencepiece_tokenizer.decode(row["tokens"]))
             for row in rows]  # fmt: skip
    assert sources.split(texts, config.data.held_out)[split == "held_out"] == texts
  assert manifest["tokenizer"] == sentencepiece_tokenizer.fingerprint()
  for shard in manifest["shards"]:
    path = tmp_path / "out" / shard["file"]
    assert shard["sha256"] == records.file_sha256(path) and shard["size"] == path.stat().st_size
  for name, sha256 in manifest["files"].items():
    assert sha256 == records.file_sha256(tmp_path / "out" / name)
  assert manifest["config"]["data"]["held_out"] == config.data.held_out


def test_the_hash_depends_on_contents_and_tokenizer(config, tmp_path, hf_tokenizer):
  files = {f"{i}.py": code(i) for i in range(8)}
  write(config, files)
  hashes = [dataset.build(config, tmp_path / "a", 1)["sha256"]]
  hf_tokenizer.save(tmp_path / "hf")
  config.tokenizer = str(tmp_path / "hf")
  hashes.append(dataset.build(config, tmp_path / "b", 1)["sha256"])
  write(config, {"3.py": code(3).replace("+ 7", "+ 8")})
  hashes.append(dataset.build(config, tmp_path / "c", 1)["sha256"])
  assert len(set(hashes)) == 3


def test_prepared_chunks_are_not_made_again_unless_their_input_changes(
  config, tmp_path, sentencepiece_tokenizer
):
  write(config, {f"{i}.py": code(i) for i in range(6)})
  data, settings = config.data.to_dict(), make_settings({"chunk_bytes": 1})
  context = prepared.Context(str(tmp_path / "out"), data, settings, sentencepiece_tokenizer)
  work = tmp_path / "out" / "work"

  def prepare():
    count = len(dataset._write_plan(work, data, settings))
    summaries = [prepared.prepare_chunk(context, number) for number in range(count)]
    return summaries, [prepared.chunk_path(work, i).stat().st_ino for i in range(count)]

  first = prepare()
  assert len(first[0]) == 6 and prepare() == first
  # What a killed process leaves behind is in nobody's way.
  shutil.copytree(prepared.chunk_path(work, 0), work / "chunks" / "000002.part")
  shutil.rmtree(prepared.chunk_path(work, 2))
  write(config, {"4.py": code("new")})
  os.utime(pathlib.Path(config.data.path) / "4.py", ns=(time.time_ns(), time.time_ns() + 10**9))
  summaries, nodes = prepare()
  same = [a == b for a, b in zip(first[1], nodes, strict=True)]
  assert same[:2] == [True, True] and same[3] and same[5] and not same[4]
  assert summaries[4]["input"] != first[0][4]["input"]
  assert [s["passed"] for s in summaries] == [1] * 6
  (pathlib.Path(config.data.path) / "5.py").unlink()
  assert len(prepare()[0]) == 5 and not prepared.chunk_path(work, 5).exists()


def test_shards_of_an_interrupted_run_on_other_input_are_made_again(config, tmp_path):
  write(config, {f"{i}.py": code(i) for i in range(12)})
  dataset.build(config, tmp_path / "a", 1)
  expected = contents(tmp_path / "a")
  out, notes = tmp_path / "out", tmp_path / "out" / "work" / "shards"
  notes.mkdir(parents=True)
  (out / "config.json").write_bytes(expected["config.json"])
  shard = next(name for name in expected if "train" in name and "array_record" in name)
  (out / shard).write_text("other")
  (notes / f"{shard}.json").write_text(json.dumps({"input": "other", "shard": {}}))
  (out / records.shard_name("train", 7, 99)).write_text("of a corpus that was larger")
  dataset.build(config, out, 1)
  assert contents(out) == expected


def test_another_config_is_refused_key_by_key(config, tmp_path, hf_tokenizer):
  write(config, {f"{i}.py": code(i) for i in range(8)})
  out = tmp_path / "out"
  dataset.build(config, out, 1)
  before = contents(out)
  hf_tokenizer.save(tmp_path / "hf")
  config.tokenizer = str(tmp_path / "hf")
  config.data.held_out, config.prepare.max_line = 0.5, 77
  config.data.seq_len = 999  # not of the dataset
  with pytest.raises(ValueError, match="is a dataset of another config") as error:
    dataset.build(config, out, 1)
  lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
  assert lines[:2] == ["data.held_out: 0.25 -> 0.5", "prepare.max_line: 1000 -> 77"]
  assert len(lines) == 3 and lines[2].startswith("tokenizer: ")
  assert contents(out) == before


def test_refusals_are_named(config, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(ValueError, match="the corpus is empty: data.source='folder'"):
    dataset.build(config, out, 1)
  write(config, {"a.py": "", "b.py": "x"})
  with pytest.raises(ValueError, match=r"nothing is kept of 2 documents \(1 empty, 1 too_short\)"):
    dataset.build(config, out, 1)
  assert list(dropped(out)) == ["a.py", "b.py"] and not (out / "manifest.json").exists()
  with pytest.raises(FileNotFoundError, match="it is not finished"):
    records.open_dataset(out, "train")
  with pytest.raises(ValueError, match="--workers must be at least 1, got 0"):
    dataset.build(config, out, 0)
  with pytest.raises(ValueError, match="is built in a local folder"):
    dataset.build(config, "gs://bucket/x", 1)
  (out / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is damaged"):
    dataset.build(config, out, 1)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").touch()
  with pytest.raises(ValueError, match=r"holds other things \(thesis.tex\)"):
    dataset.build(config, tmp_path / "mine", 1)
  with (
    dataset._alone_in(tmp_path / "busy"),
    pytest.raises(RuntimeError, match="another process is at work in .*busy"),
  ):
    dataset.build(config, tmp_path / "busy", 1)
  config.data.held_out = 1.5
  with pytest.raises(ValueError, match=r"data.held_out must be in \[0, 1\), got 1.5"):
    dataset.build(config, tmp_path / "new", 1)
  config.data.held_out = 0.25
  config.prepare.typo = 1
  with pytest.raises(ValueError, match=r"unknown key prepare.typo"):
    dataset.build(config, tmp_path / "new", 1)
  del config.prepare
  config.tokenizer = ""
  with pytest.raises(ValueError, match="give --config.tokenizer"):
    dataset.build(config, tmp_path / "new", 1)
  assert not (tmp_path / "new").exists()


def test_a_damaged_tokenizer_is_named(config, tmp_path, sentencepiece_tokenizer):
  write(config, {"a.py": code(1)})
  settings = make_settings({})
  dataset._write_plan(tmp_path / "out" / "work", config.data.to_dict(), settings)
  sentencepiece_tokenizer.vocab_size, right = 5, sentencepiece_tokenizer.vocab_size
  try:
    context = prepared.Context(
      str(tmp_path / "out"), config.data.to_dict(), settings, sentencepiece_tokenizer
    )
    with pytest.raises(
      ValueError, match=r"gave token id \d+ for a.py, outside its vocabulary of 5"
    ):
      prepared.prepare_chunk(context, 0)
  finally:
    sentencepiece_tokenizer.vocab_size = right


def test_odd_names_survive(config, tmp_path):
  name = os.fsdecode(b"caf\xe9 \xe2\x82\xac.py")
  write(config, {name: code(1), "b\nc.py": code(2), "d.py": code(1)})
  dataset.build(config, tmp_path / "out", 1)
  assert sorted(kept(tmp_path / "out")) == ["b\nc.py", "caf\\xe9 €.py"]
  assert dropped(tmp_path / "out") == {"d.py": ("exact_duplicate", "of caf\\xe9 €.py")}
  assert np.load(tmp_path / "out" / "index-train.npy").dtype == np.int64
