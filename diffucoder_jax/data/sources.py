"""Where text comes from: documents by the name of their source, and the train / held-out split.

Every document has a name that leads back to it (a path, `file.jsonl:12`, `file.parquet:3`), and
documents come in an order that depends on the source's contents alone.
"""

import fnmatch
import hashlib
import io
import json
import os
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

import grain
from absl import logging
from etils import epath

# Folders of the standard library that are not programs: tests, other people's packages, and tables
# of data written as Python (code pages, help texts), 18 % of the bytes.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NOT_STDLIB |= {"encodings", "pydoc_data"}
_NAMES_SHOWN = 5


class Document(NamedTuple):
  """One text, with its line ends as they were, and a name that leads back to it."""

  name: str
  text: str


def read_documents(data_config) -> tuple[list[Document], list[str]]:
  """Reads the whole corpus named by the config.

  Args:
    data_config: the `data` section: `source` (a key of `SOURCES`), `path`, `pattern` (folder),
      `text_key` (jsonl, parquet, tfds), `on_undecodable` ("error" or "skip").
  Returns:
    (documents, dropped): dropped are the names of undecodable documents, also logged.
  Raises:
    FileNotFoundError: the path does not exist.
    ValueError: unknown source, empty corpus, a broken record, or an undecodable document.
  """
  if data_config.source not in SOURCES:
    raise ValueError(f"unknown data.source {data_config.source!r}; known: {', '.join(SOURCES)}")
  if data_config.on_undecodable not in ("error", "skip"):
    raise ValueError(
      f"data.on_undecodable must be 'error' or 'skip', got {data_config.on_undecodable!r}"
    )
  documents, dropped = [], []
  for name, raw in SOURCES[data_config.source](data_config):
    try:
      documents.append(Document(name, decode(name, raw)))
    except (UnicodeError, SyntaxError, LookupError) as error:
      where = f"{name} is not valid text: {why(raw, error)}"
      if data_config.on_undecodable == "error":
        remedy = "repair or remove it, or set data.on_undecodable='skip'"
        raise ValueError(f"{where}; {remedy}") from error
      dropped.append(name)
      if len(dropped) <= _NAMES_SHOWN:
        logging.warning("skipped %s", where)
  if dropped:
    logging.warning(
      "skipped %d undecodable document(s) of %d", len(dropped), len(dropped) + len(documents)
    )
  if not documents:
    skipped = f" ({len(dropped)} were undecodable and skipped)" if dropped else ""
    raise ValueError(
      f"the corpus is empty{skipped}: data.source={data_config.source!r}, "
      f"data.path={data_config.path!r}, data.pattern={data_config.pattern!r} gave no document"
    )
  return documents, dropped


def split(documents, held_out: float) -> tuple[list[Document], list[Document]]:
  """Splits into (train, held_out) by the hash of each text.

  A document's side depends on its text alone: equal texts are always on the same side, and adding
  documents moves none of the others.

  Args:
    documents: the documents.
    held_out: expected share of distinct texts held out, in [0, 1).
  Raises:
    ValueError: `held_out` is out of range.
  """
  if not 0 <= held_out < 1:
    raise ValueError(f"data.held_out must be in [0, 1), got {held_out}")
  sides = ([], [])
  for document in documents:
    sides[int(content_hash(document.text)[:16], 16) < held_out * 2**64].append(document)
  return sides


def content_hash(text: str) -> str:
  """SHA-256 of the text's UTF-8 bytes, in hex."""
  return hashlib.sha256(text.encode()).hexdigest()


def stdlib(_) -> Iterator[tuple[str, bytes]]:
  """The running interpreter's standard library without its tests (PSF licence), about 12 MB."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
  for name in sorted(paths):
    *folders, file = name.split("/")
    # _sysconfigdata: what the interpreter was built with, one long dictionary.
    if not NOT_STDLIB & set(folders) and not file.startswith("_sysconfigdata"):
      yield name, paths[name].read_bytes()


def folder(data_config):
  """Every file below `path` that matches the glob `pattern` ("**" = any folders, also none).

  Names are relative to `path`. Links to folders are not followed.
  """
  root = existing(data_config.path)
  if not root.is_dir():
    raise ValueError(f"data.path={data_config.path!r} is a file; source 'folder' needs a folder")
  for name, file in _glob(root, data_config.pattern):
    yield name, file.read_bytes()


def jsonl(data_config):
  """One JSON object a line in a file, or in all the *.jsonl files below a folder."""
  key = data_config.text_key
  for file in _files(data_config.path, "**/*.jsonl"):
    with file.open("rb") as lines:
      for number, line in enumerate(lines, 1):
        if not line.strip():
          continue
        name = f"{file}:{number}"
        try:
          # Bytes that are no UTF-8 become lone surrogates, which `decode` finds and names.
          record = json.loads(line.decode("utf-8", "surrogateescape"))
        except json.JSONDecodeError as error:
          raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(record, dict) or key not in record:
          has = f"only {sorted(record)}" if isinstance(record, dict) else "no object at all"
          raise ValueError(f"{name} has no {key!r}, {has}; set data.text_key")
        yield name, _text(name, key, record[key])


def parquet(data_config):
  """The column `text_key` of a parquet file, or of all the *.parquet files below a folder."""
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ImportError("data.source='parquet' needs pyarrow: pip install -e '.[parquet]'") from error
  key = data_config.text_key
  for file in _files(data_config.path, "**/*.parquet"):
    with file.open("rb") as opened:
      try:
        table = pyarrow.parquet.ParquetFile(opened)
      except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error
      if key not in table.schema_arrow.names:
        raise ValueError(
          f"{file} has no column {key!r}, only {table.schema_arrow.names}; set data.text_key"
        )
      row = 0
      for batch in table.iter_batches(columns=[key]):
        column = batch.column(0)
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
          # As bytes: pyarrow's own decoding would stop at invalid UTF-8 without naming the row.
          column = column.cast(pyarrow.large_binary())
        for value in column.to_pylist():
          name = f"{file}:{row}"
          yield name, _text(name, key, value)
          row += 1


def array_record(data_config):
  """ArrayRecord files whose records are UTF-8 texts: one file, or a folder's *.array_record*."""
  for file in _files(data_config.path, "**/*.array_record*"):
    records = grain.sources.ArrayRecordDataSource([str(file)])
    for i in range(len(records)):
      yield f"{file}:{i}", records[i]


def tfds(data_config):
  """The "train" split of a TFDS dataset stored as ArrayRecord: `path` is its folder or its name."""
  import tensorflow_datasets

  path, key = data_config.path, data_config.text_key
  if not path:
    raise ValueError("data.path is empty; source 'tfds' needs the name or the folder of a dataset")
  if epath.Path(path).exists():
    builder = tensorflow_datasets.builder_from_directory(path)
    records = builder.as_data_source(split="train")
  else:
    records = tensorflow_datasets.data_source(path, split="train")
  for i in range(len(records)):
    record, name = records[i], f"{path}:{i}"
    if key not in record:
      raise ValueError(f"{name} has no {key!r}, only {sorted(record)}; set data.text_key")
    yield name, _text(name, key, record[key])


# Each takes the `data` section and yields (name, contents); contents are bytes not yet decoded, or
# a str where the format decodes by itself.
SOURCES = {
  "stdlib": stdlib,
  "folder": folder,
  "jsonl": jsonl,
  "parquet": parquet,
  "array_record": array_record,
  "tfds": tfds,
}


def existing(path):
  """`path` as an `epath.Path`; an empty one or one that is not there is named as `data.path`."""
  if not path:
    raise ValueError("data.path is empty; this data.source needs one")
  found = epath.Path(path)
  if not found.exists():
    raise FileNotFoundError(f"data.path={str(path)!r} does not exist")
  return found


def _files(path, pattern):
  found = existing(path)
  if not found.is_dir():
    return [found]
  files = [file for _, file in _glob(found, pattern)]
  if not files:
    raise ValueError(f"the corpus is empty: no {pattern} below data.path={str(path)!r}")
  return files


def _glob(root, pattern):
  """Sorted (name below root, file) pairs; `epath` itself has no "**"."""
  found, folders = {}, [("", root)]
  while folders:
    prefix, folder = folders.pop()
    for child in folder.iterdir():
      name = prefix + child.name
      if child.is_dir():
        if not os.path.islink(child):
          folders.append((f"{name}/", child))
      elif matches(name.split("/"), pattern.split("/")) and child.is_file():
        found[name] = child
  return sorted(found.items())


def matches(parts, pattern):
  """Whether the parts of a name match those of a glob, where "**" is any number of folders."""
  if not pattern:
    return not parts
  if pattern[0] == "**":
    return any(matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
  return (
    bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
  )


def _text(name, key, value):
  if not isinstance(value, str | bytes):
    raise ValueError(f"{name}: {key!r} is a {type(value).__name__}, not a text; set data.text_key")
  return value


def decode(name, raw):
  """Text of `raw`, the bytes (or the str) of document `name`.

  Python files say their encoding (PEP 263); all else is UTF-8.

  Raises:
    UnicodeError, SyntaxError, LookupError: it is no text; `why` makes a sentence of it.
  """
  if isinstance(raw, str):
    raw.encode()  # lone surrogates are no text and would fail much later, in the tokenizer
    return raw
  encoding = "utf-8-sig"
  if name.endswith(".py"):
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
  return raw.decode(encoding)


def why(raw, error):
  """What is wrong with `raw`, and where, from the error that `decode` raised."""
  if isinstance(error, SyntaxError) and isinstance(raw, bytes):
    # `detect_encoding` keeps the offset to itself when its first lines are not UTF-8.
    try:
      raw.decode()
    except UnicodeDecodeError as found:
      error = found
  if isinstance(error, UnicodeError):
    unit = "byte" if isinstance(raw, bytes) else "character"
    return f"{error.reason} at {unit} {error.start}"
  return str(error)
