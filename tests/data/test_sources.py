import builtins
import json
import pathlib
import sys
import textwrap

import pytest
from absl import logging

from diffucoder_jax.data import sources
from diffucoder_jax.data.sources import Document


def write(config, files):
  for name, contents in files.items():
    path = pathlib.Path(config.path) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def texts_of(config):
  return [document.text for document in sources.read_documents(config)[0]]


def test_stdlib_is_the_library_without_tests(data_config):
  data_config.source, data_config.on_undecodable = "stdlib", "skip"
  documents, dropped = sources.read_documents(data_config)
  names = [document.name for document in documents]
  assert names == sorted(names) and len(names) == len(set(names)) > 400 and not dropped
  assert {"textwrap.py", "json/decoder.py"} <= set(names)
  parts = {part for name in names for part in name.split("/")[:-1]}
  assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
  text = dict(documents)["textwrap.py"]
  assert text.encode() == pathlib.Path(textwrap.__file__).read_bytes()


def test_folder_is_sorted_and_exact(data_config):
  files = {"b.py": "b\r\n\t", "a/z.py": "z", "a.py": "é\f\0", "c.txt": "no", "d.py/e.py": "dir"}
  write(data_config, files)
  assert sources.read_documents(data_config) == ([
    Document("a.py", "é\f\0"), Document("a/z.py", "z"), Document("b.py", "b\r\n\t"),
    Document("d.py/e.py", "dir")], [])


@pytest.mark.parametrize("pattern, names", [
  ("*.py", ["a.py"]),
  ("**/*.txt", ["c.txt", "x/y/c.txt"]),
  ("x/**/*.py", ["x/b.py", "x/y/b.py", "x/y/z/b.py"]),
  ("x/*/[bc].*", ["x/y/b.py", "x/y/c.txt"]),
  ("**/y/**", ["x/y/b.py", "x/y/c.txt", "x/y/z/b.py"]),
])
def test_folder_patterns(data_config, pattern, names):
  write(data_config, dict.fromkeys(
    ["a.py", "c.txt", "x/b.py", "x/y/b.py", "x/y/c.txt", "x/y/z/b.py"], "text"))
  root = pathlib.Path(data_config.path)
  (root / "x" / "loop.py").symlink_to(root, target_is_directory=True)
  (root / "broken.py").symlink_to(root / "nowhere")
  data_config.pattern = pattern
  assert [document.name for document in sources.read_documents(data_config)[0]] == names


def test_python_files_say_their_encoding(data_config):
  write(data_config, {"a.py": "# coding: latin-1\n# é\n".encode("latin-1"),
                      "b.py": b"\xef\xbb\xbfx = 1\n"})
  assert texts_of(data_config) == ["# coding: latin-1\n# é\n", "x = 1\n"]


@pytest.mark.parametrize("contents, why", [
  (b"a\nb\nc\n\xff", "at byte 6"),
  (b"\xff", "at byte 0"),
  (b"# coding: klingon\n", "klingon"),
  (b"# coding: rot13\n", "rot13"),
])
def test_undecodable_files_are_named_or_counted(data_config, contents, why, caplog, monkeypatch):
  write(data_config, {"good.py": "x", "bad.py": contents})
  with pytest.raises(ValueError, match=rf"bad\.py is not valid text.*{why}.*on_undecodable='skip'"):
    sources.read_documents(data_config)
  data_config.on_undecodable = "skip"
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
  assert sources.read_documents(data_config) == ([Document("good.py", "x")], ["bad.py"])
  assert "bad.py" in warnings[0] and why in warnings[0]
  assert "1 undecodable document(s) of 2" in warnings[1]


def test_only_undecodable_files_is_an_empty_corpus(data_config):
  write(data_config, {"bad.py": b"\xff"})
  data_config.on_undecodable = "skip"
  with pytest.raises(ValueError, match=r"empty \(1 were undecodable and skipped\)"):
    sources.read_documents(data_config)


def test_empty_and_missing_are_named(data_config):
  with pytest.raises(FileNotFoundError, match="corpus' does not exist"):
    sources.read_documents(data_config)
  write(data_config, {"a.txt": "x"})
  with pytest.raises(ValueError, match=r"corpus is empty.*corpus'.*\*\*/\*\.py"):
    sources.read_documents(data_config)
  data_config.path += "/a.txt"
  with pytest.raises(ValueError, match="is a file"):
    sources.read_documents(data_config)
  data_config.path = data_config.path.removesuffix("/a.txt")
  for source in ("jsonl", "parquet", "array_record"):
    data_config.source = source
    with pytest.raises(ValueError, match=f"corpus is empty: no .*{source}.* below data.path="):
      sources.read_documents(data_config)
  data_config.path = ""
  for source in ("folder", "jsonl", "parquet", "array_record", "tfds"):
    data_config.source = source
    with pytest.raises(ValueError, match=r"data\.path is empty"):
      sources.read_documents(data_config)


def test_unknown_choices_are_named(data_config):
  data_config.source = "floppy"
  with pytest.raises(ValueError, match="unknown data.source 'floppy'; known: stdlib, folder"):
    sources.read_documents(data_config)
  data_config.source, data_config.on_undecodable = "stdlib", "ignore"
  with pytest.raises(ValueError, match="on_undecodable must be"):
    sources.read_documents(data_config)


def test_jsonl_file_and_folder(data_config):
  lines = [json.dumps({"content": text, "n": 1}) for text in ("a\n", "\u2028", "é")]
  write(data_config, {"b.jsonl": "\n".join(lines[:2]) + "\n\n", "sub/a.jsonl": lines[2]})
  data_config.source = "jsonl"
  root = data_config.path
  assert sources.read_documents(data_config)[0] == [
    Document(f"{root}/b.jsonl:1", "a\n"), Document(f"{root}/b.jsonl:2", "\u2028"),
    Document(f"{root}/sub/a.jsonl:1", "é")]
  data_config.path = f"{root}/sub/a.jsonl"
  assert texts_of(data_config) == ["é"]


@pytest.mark.parametrize("line, message", [
  ("{", r"a\.jsonl:2 is not JSON"),
  ('{"text": "x"}', r"a\.jsonl:2 has no 'content', only \['text'\]; set data.text_key"),
  ("[1]", r"a\.jsonl:2 has no 'content', no object"),
  ('{"content": 3}', r"a\.jsonl:2: 'content' is a int"),
  (b'{"content": "ab\xff"}', r"a\.jsonl:2 is not valid text.*at character 2"),
  (r'{"content": "ab\ud800"}', r"a\.jsonl:2 is not valid text.*at character 2"),
])
def test_broken_jsonl_lines_are_named(data_config, line, message):
  line = line if isinstance(line, bytes) else line.encode()
  write(data_config, {"a.jsonl": b'{"content": "good"}\n' + line + b"\n"})
  data_config.source = "jsonl"
  with pytest.raises(ValueError, match=message):
    sources.read_documents(data_config)


def test_parquet(data_config, monkeypatch):
  pa = pytest.importorskip("pyarrow")
  pq = pytest.importorskip("pyarrow.parquet")
  root = pathlib.Path(data_config.path)
  root.mkdir()
  pq.write_table(pa.table({"content": ["a\n", "é"], "n": [1, 2]}), root / "a.parquet")
  data_config.source = "parquet"
  assert sources.read_documents(data_config)[0] == [
    Document(f"{root}/a.parquet:0", "a\n"), Document(f"{root}/a.parquet:1", "é")]
  data_config.text_key = "n"
  with pytest.raises(ValueError, match=r"a\.parquet:0: 'n' is a int"):
    sources.read_documents(data_config)
  data_config.text_key = "code"
  with pytest.raises(ValueError, match=r"no column 'code', only \['content', 'n'\]"):
    sources.read_documents(data_config)
  data_config.text_key = "content"
  bad = pa.array([b"ok", b"\xff", None], pa.binary()).cast(pa.string(), safe=False)
  pq.write_table(pa.table({"content": bad}), root / "a.parquet")
  with pytest.raises(ValueError, match=r"a\.parquet:1 is not valid text.*at byte 0"):
    sources.read_documents(data_config)
  data_config.on_undecodable = "skip"
  with pytest.raises(ValueError, match=r"a\.parquet:2: 'content' is a NoneType"):
    sources.read_documents(data_config)
  (root / "a.parquet").write_bytes(b"not parquet at all")
  with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
    sources.read_documents(data_config)


def test_parquet_without_pyarrow_names_the_extra(data_config, monkeypatch):
  real_import = builtins.__import__

  def without_pyarrow(name, *args, **kwargs):
    if name.startswith("pyarrow"):
      raise ImportError(name)
    return real_import(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without_pyarrow)
  data_config.source = "parquet"
  with pytest.raises(ImportError, match=r"pip install -e '\.\[parquet\]'"):
    sources.read_documents(data_config)


def test_array_record(data_config):
  module = pytest.importorskip("array_record.python.array_record_module")
  path = pathlib.Path(data_config.path) / "a.array_record"
  path.parent.mkdir()
  writer = module.ArrayRecordWriter(str(path), "group_size:1")
  for text in ("a\r\n", "é"):
    writer.write(text.encode())
  writer.close()
  data_config.source = "array_record"
  assert sources.read_documents(data_config)[0] == [
    Document(f"{path}:0", "a\r\n"), Document(f"{path}:1", "é")]


BUILDER = """
import tensorflow_datasets as tfds

class ToyCode(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict({"content": tfds.features.Text()})
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, _):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield 0, {"content": "a\\n"}
    yield 1, {"content": "b = 'é'"}
"""


def test_tfds(data_config, tmp_path, monkeypatch):
  pytest.importorskip("tensorflow_datasets")
  package = tmp_path / "toy_package_for_tfds"
  package.mkdir()
  (package / "__init__.py").touch()
  (package / "toy_code.py").write_text(BUILDER)
  monkeypatch.syspath_prepend(tmp_path)
  from toy_package_for_tfds.toy_code import ToyCode

  builder = ToyCode(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  assert "tensorflow" not in sys.modules
  data_config.source, data_config.path = "tfds", str(builder.data_path)
  assert sorted(texts_of(data_config)) == ["a\n", "b = 'é'"]
  data_config.text_key = "code"
  with pytest.raises(ValueError, match=r"has no 'code', only \['content'\]"):
    sources.read_documents(data_config)


def test_split_is_by_content():
  documents = [Document(f"{i}.py", f"text {i % 500}") for i in range(1000)]
  train, held_out = sources.split(documents, 0.2)
  assert len(train) + len(held_out) == 1000 and 140 < len(held_out) < 260
  # Duplicates never straddle the split, and nothing but the text decides.
  assert not {d.text for d in train} & {d.text for d in held_out}
  renamed = [Document("x", document.text) for document in reversed(documents[:300])]
  assert {d.text for d in sources.split(renamed, 0.2)[1]} <= {d.text for d in held_out}
  assert [d.name for d in train] == sorted((d.name for d in train), key=lambda n: int(n[:-3]))


def test_split_share_is_checked_and_nested():
  documents = [Document(str(i), str(i)) for i in range(200)]
  assert sources.split(documents, 0.0) == (documents, [])
  small, large = (set(sources.split(documents, share)[1]) for share in (0.1, 0.3))
  assert small < large
  for share in (-0.1, 1.0):
    with pytest.raises(ValueError, match="data.held_out must be in"):
      sources.split(documents, share)
