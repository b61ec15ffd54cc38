"""Chunks hold what `sources` reads, in its order, whatever their size; what cannot be read, too."""

import json
import os
import pathlib

import pytest

from diffucoder_jax.data import chunks, filters, sources
from diffucoder_jax.data.settings import make_settings

TEXTS = [f"value_{i} = {i}\n" * (i % 40) + "é\r\n" for i in range(150)]


def read_all(data_config, **settings):
  """(documents of all chunks, number of chunks); each chunk goes through JSON as it does on disk."""
  data, settings = dict(data_config), make_settings(settings)
  pieces = [json.loads(json.dumps(chunk)) for chunk in chunks.cut(data, settings)]
  return [raw for piece in pieces for raw in chunks.read(piece, data, settings)], len(pieces)


def write_folder(root):
  for i, text in enumerate(TEXTS):
    path = root / ("a", "a.b", "a/c", "")[i % 4] / f"{i}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
  (root / "other.txt").write_text("no")


def write_jsonl(root):
  for name, texts in (("x.jsonl", TEXTS[:100]), ("sub/y.jsonl", TEXTS[100:])):
    lines = [json.dumps({"content": text}) + "\n" * (1 + i % 2) for i, text in enumerate(texts)]
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("".join(lines).rstrip("\n"))
  (root / "none.jsonl").touch()


def write_parquet(root):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  pq.write_table(pa.table({"content": TEXTS}), root / "x.parquet", row_group_size=40)


def write_array_record(root):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(root / "x.array_record"), "group_size:1")
  for text in TEXTS:
    writer.write(text.encode())
  writer.close()


def write_tfds(root):
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module

  features = tfds.features.FeaturesDict({"content": tfds.features.Text()})
  template = tfds.core.ShardedFileTemplate(
    data_dir=root, dataset_name="toy", split="train", filetype_suffix="array_record"
  )
  path = str(root / "toy-train.array_record-00000-of-00001")
  writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
  for text in TEXTS:
    writer.write(features.serialize_example({"content": text}))
  writer.close()
  split = tfds.core.SplitInfo(
    name="train", shard_lengths=[len(TEXTS)], num_bytes=0, filename_template=template
  )
  tfds.folder_dataset.write_metadata(
    data_dir=root, features=features, split_infos=[split], filename_template=template,
    check_data=False,
  )  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 100_000_000])
@pytest.mark.parametrize(
  "source, write",
  [("folder", write_folder), ("jsonl", write_jsonl), ("parquet", write_parquet),
   ("array_record", write_array_record), ("tfds", write_tfds)],
)  # fmt: skip
def test_the_documents_of_sources_in_their_order(data_config, source, write, chunk_bytes):
  root = pathlib.Path(data_config.path)
  root.mkdir()
  write(root)
  data_config.source = source
  expected, _ = sources.read_documents(data_config)
  raws, count = read_all(data_config, chunk_bytes=chunk_bytes)
  got = [(raw.name, filters.decode(raw.name, raw.contents)[0]) for raw in raws]
  assert len(got) == len(TEXTS) and got == [tuple(document) for document in expected]
  if source in ("folder", "jsonl"):
    whole = {"folder": 1, "jsonl": 2}[source]
    assert {1: count >= len(TEXTS), 1000: 10 < count < 100}.get(chunk_bytes, count == whole)
  else:
    assert count == {"parquet": 4}.get(source, 1)


def test_stdlib(data_config):
  data_config.source, data_config.on_undecodable = "stdlib", "skip"
  raws, count = read_all(data_config)
  assert [raw.name for raw in raws] == [d.name for d in sources.read_documents(data_config)[0]]
  assert {raw.license for raw in raws} == {"PSF-2.0"} and count > 1


def test_fields_of_records(data_config):
  root = pathlib.Path(data_config.path)
  root.mkdir()
  rows = [
    {"content": "a", "license": "mit", "language": "Go"},
    {"content": "b", "license": ["mit", "bsd"], "path": "x/y.rs"},
    {"content": "c", "license": None, "language": "", "name": "z.py"},
    {"content": "d"},
  ]
  (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  data_config.source = "jsonl"
  expected = [("Go", "mit"), ("rust", "mit,bsd"), ("python", ""), ("", "")]
  assert [(raw.language, raw.license) for raw in read_all(data_config)[0]] == expected
  raws, _ = read_all(data_config, license_key="path", language_key="license")
  assert [raw.license for raw in raws] == ["", "x/y.rs", "", ""]
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  table = {"content": list("abcd"), "license": [["mit"], ["mit", "bsd"], [], None], "size": [1] * 4,
           "path": ["a.go", "y.rs", "z.py", None]}  # fmt: skip
  pq.write_table(pa.table(table), root / "a.parquet")
  data_config.source = "parquet"
  expected = [("go", "mit"), ("rust", "mit,bsd"), ("python", ""), ("", "")]
  assert [(raw.language, raw.license) for raw in read_all(data_config)[0]] == expected


def test_a_license_file_holds_for_what_lies_below_it(data_config):
  root = pathlib.Path(data_config.path)
  (root / "p" / "deep").mkdir(parents=True)
  (root / "q").mkdir()
  (root / "p" / "LICENSE.txt").write_text("Apache License\nVersion 2.0")
  (root / "p" / "deep" / "COPYING").write_text("some text that says nothing")
  for name in ("a.py", "p/a.py", "p/deep/a.py", "q/a.py"):
    (root / name).write_text("x")
  got = {raw.name: raw.license for raw in read_all(data_config)[0]}
  assert got == {"a.py": "", "p/a.py": "Apache-2.0", "p/deep/a.py": "Apache-2.0", "q/a.py": ""}


def test_what_the_file_system_does_not_give(data_config):
  root = pathlib.Path(data_config.path)
  (root / "sub").mkdir(parents=True)
  (root / "good.py").write_text("x")
  (root / "loop_a.py").symlink_to(root / "loop_b.py")
  (root / "loop_b.py").symlink_to(root / "loop_a.py")
  (root / "broken.py").symlink_to(root / "nowhere")
  (root / "broken.txt").symlink_to(root / "nowhere")  # does not match: nobody asked for it
  (root / "sub" / "up").symlink_to(root, target_is_directory=True)
  os.mkfifo(root / "pipe.py")  # opening it would wait for ever
  with open(root / "large.py", "wb") as sparse:
    sparse.truncate(100_000_000)
  (root / os.fsdecode(b"caf\xe9.py")).write_text("x")
  if os.geteuid():
    (root / "locked.py").touch(0)
    (root / "locked").mkdir(0)
  raws, _ = read_all(data_config)
  got = {raw.name: (raw.reason, raw.detail) for raw in raws if raw.reason}
  expected = {
    "loop_a.py": ("unreadable", "Too many levels of symbolic links"),
    "loop_b.py": ("unreadable", "Too many levels of symbolic links"),
    "broken.py": ("unreadable", "No such file or directory"),
    "sub/up": ("linked_folder", str(root)),
    "pipe.py": ("unreadable", "not a regular file"),
    "large.py": ("too_large", "100000000 bytes > 20000000"),
  }
  if os.geteuid():
    denied = ("unreadable", "Permission denied")
    expected |= {"locked.py": denied, "locked/": denied}
    (root / "locked").chmod(0o700)
  assert got == expected
  assert [raw.name for raw in raws if not raw.reason] == ["caf\\xe9.py", "good.py"]


def test_files_that_change_after_they_were_listed(data_config):
  root = pathlib.Path(data_config.path)
  root.mkdir()
  for name in ("gone.py", "grown.py", "same.py"):
    (root / name).write_text("x" * 10)
  data, settings = dict(data_config), make_settings({"read_limit": 20})
  (chunk,) = chunks.cut(data, settings)
  (root / "gone.py").unlink()
  (root / "grown.py").write_text("x" * 30)
  got = [(raw.name, raw.reason) for raw in chunks.read(chunk, data, settings)]
  assert got == [("gone.py", "unreadable"), ("grown.py", "too_large"), ("same.py", "")]


def test_bad_records(data_config):
  root = pathlib.Path(data_config.path)
  root.mkdir()
  path = root / "a.jsonl"
  with open(path, "wb") as out:
    out.write(b'{"content": "one"}\n{"content": \n[1]\n{"text": "x"}\n{"content": null}\n')
    out.write(b'{"content": "\xff"}\n{"content": "')
    out.seek(100_000_000, os.SEEK_CUR)  # a sparse line of 100 MB
    out.write(b'"}\n\n{"content": "last"}')
  (root / "b.jsonl").symlink_to(root / "nowhere")
  data_config.source = "jsonl"
  for chunk_bytes in (1, 50, 8_000_000):
    raws, _ = read_all(data_config, chunk_bytes=chunk_bytes)
    got = [(raw.name, raw.reason) for raw in raws]
    reasons = ["", "corrupt", "corrupt", "no_text", "no_text", "", "too_large"]
    expected = [(f"{path}:{i}", reason) for i, reason in enumerate(reasons, 1)]
    assert got == [*expected, (f"{path}:9", ""), (f"{root}/b.jsonl", "unreadable")]
    assert filters.decode(raws[5].name, raws[5].contents)[1] == "undecodable"
    assert raws[6].detail == "a line of 100000016 bytes > 20000000" and raws[7].contents == "last"
    assert "not JSON" in raws[1].detail and raws[2].detail == "not a JSON object"
    assert raws[3].detail == "'content' is absent, only ['text']"


def test_containers_that_are_damaged(data_config):
  pq = pytest.importorskip("pyarrow.parquet")
  root = pathlib.Path(data_config.path)
  root.mkdir()
  write_parquet(root)
  write_array_record(root)
  for name in ("x.parquet", "x.array_record"):
    whole = (root / name).read_bytes()
    (root / f"cut.{name}").write_bytes(whole[: len(whole) // 2])
    (root / f"no.{name}").write_bytes(b"something else altogether\n" * 100)
  for source, suffix in (("parquet", "parquet"), ("array_record", "array_record")):
    data_config.source = source
    raws, _ = read_all(data_config)
    lost = {os.path.basename(raw.name).split(":")[0]: raw.reason for raw in raws if raw.reason}
    assert lost == {f"cut.x.{suffix}": "corrupt", f"no.x.{suffix}": "corrupt"}
    assert [raw.contents for raw in raws if not raw.reason] == [t.encode() for t in TEXTS]
  # A page in the middle of a row group.
  with pq.ParquetFile(root / "x.parquet") as file:
    column = file.metadata.row_group(1).column(0)
  contents = bytearray((root / "x.parquet").read_bytes())
  begin = column.dictionary_page_offset or column.data_page_offset
  contents[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
  (root / "x.parquet").write_bytes(contents)
  data_config.source = "parquet"
  raws, _ = read_all(data_config)
  assert [raw.contents for raw in raws if not raw.reason] == [
    t.encode() for t in TEXTS[:40] + TEXTS[80:]]  # fmt: skip
  assert [raw.reason for raw in raws if raw.name == f"{root}/x.parquet:40"] == ["corrupt"]


def test_a_damaged_record_is_not_its_neighbours_end(data_config):
  root = pathlib.Path(data_config.path)
  root.mkdir()
  write_array_record(root)
  contents = bytearray((root / "x.array_record").read_bytes())
  # Chunks of records lie in 64 KiB blocks, whose headers guard the positions; this is in a payload.
  contents[3000:3010] = bytes(10)
  (root / "x.array_record").write_bytes(contents)
  data_config.source = "array_record"
  raws, _ = read_all(data_config)
  bad = [i for i, raw in enumerate(raws) if raw.reason]
  assert 0 < len(bad) <= 2 and {raws[i].reason for i in bad} == {"corrupt"}
  for i, raw in enumerate(raws):
    assert raw.name == f"{root}/x.array_record:{i}"
    assert raw.contents == (None if i in bad else TEXTS[i].encode())


def test_mistakes_are_named(data_config, tmp_path):
  data_config.source = "git"
  with pytest.raises(ValueError, match="unknown data.source 'git'; known: stdlib, folder"):
    read_all(data_config)
  for source in ("folder", "jsonl", "parquet", "array_record"):
    data_config.source, data_config.path = source, str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
      read_all(data_config)
    if source != "folder":
      data_config.path = str(tmp_path)
      with pytest.raises(ValueError, match=rf"the corpus is empty: no .*{source}"):
        read_all(data_config)
  (tmp_path / "file").touch()
  data_config.source, data_config.path = "folder", str(tmp_path / "file")
  with pytest.raises(ValueError, match="is a file; source 'folder' needs a folder"):
    read_all(data_config)
  (tmp_path / "p").mkdir()
  write_parquet(tmp_path / "p")
  data_config.update(source="parquet", path=str(tmp_path / "p"), text_key="code")
  with pytest.raises(ValueError, match=r"no column 'code', only \['content'\]"):
    read_all(data_config)
