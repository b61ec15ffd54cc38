"""Files of records (jsonl, parquet, ArrayRecord, TFDS): cut into ranges, read record by record.

A file that cannot be opened is one lost document, and so is a record that cannot be parsed.
"""

import json
import os

from diffucoder_jax.data import filters, sources
from diffucoder_jax.data.files import Raw, lost, shown, too_large, walk

_RECORDS_PER_CHUNK = 2000
_BLOCK = 1 << 20
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


def container_chunks(pattern, cut_file):
  """A cutter of `path`, a file or a folder of files that match `pattern`."""

  def cutter(data, settings):
    root = os.fspath(sources.existing(data["path"]))
    if os.path.isdir(root):
      entries = walk(root, pattern.split("/"))
    else:
      status = os.stat(root)
      entries = [{"path": root, "size": status.st_size, "changed": status.st_mtime_ns}]
    any_file = False
    for entry in entries:
      any_file |= "path" in entry
      if "path" not in entry:
        lost_file = {**entry, "name": os.path.join(root, entry["name"])}  # as its records' names
        yield {"kind": "files", "weight": 0, "entries": [lost_file]}
        continue
      about = {key: entry[key] for key in ("path", "size", "changed")}
      try:
        for piece in cut_file(about, data, settings):
          yield {**about, **piece}
      except (OSError, _Corrupt) as error:
        why = lost(entry["path"], error) if isinstance(error, OSError) else {
          "name": entry["path"], "reason": "corrupt", "detail": str(error)}  # fmt: skip
        yield {"kind": "files", "weight": 0, "entries": [why]}
    if not any_file:
      raise ValueError(f"the corpus is empty: no {pattern} below data.path={root!r}")

  return cutter


class _Corrupt(Exception):
  pass


def cut_jsonl(about, _, settings):
  """Cuts after the first line end beyond every `chunk_bytes`; names need the number of a line."""
  begin, first, lines, place = 0, 1, 0, 0
  with open(about["path"], "rb") as opened:
    while block := opened.read(_BLOCK):
      at = 0
      while (end := block.find(b"\n", max(at, begin + settings.chunk_bytes - place))) >= 0:
        lines += block.count(b"\n", at, end + 1)
        stop = place + end + 1
        yield {"kind": "lines", "weight": stop - begin, "begin": begin, "end": stop, "first": first}
        begin, first, lines, at = stop, first + lines, 0, end + 1
      lines += block.count(b"\n", at)
      place += len(block)
  if place > begin:
    yield {"kind": "lines", "weight": place - begin, "begin": begin, "end": place, "first": first}


def read_lines(chunk, data, settings):
  """The records of a range of lines."""
  number, place = chunk["first"] - 1, chunk["begin"]
  try:
    with open(chunk["path"], "rb") as opened:
      opened.seek(place)
      while place < chunk["end"]:
        number += 1
        name = shown(f"{chunk['path']}:{number}")
        line = opened.readline(settings.read_limit + 1)
        size = len(line)
        if not line:
          break
        if size > settings.read_limit and not line.endswith(b"\n"):
          while (part := opened.readline(_BLOCK)) and not part.endswith(b"\n"):
            size += len(part)
          size += len(part)
          yield too_large(name, f"a line of {size} bytes", settings)
        elif line.strip():
          yield _parse(name, line, data, settings)
        place += size
  except OSError as error:
    yield Raw(shown(f"{chunk['path']}:{number + 1}"), reason="unreadable", detail=str(error))


def _parse(name, line, data, settings):
  try:
    # Bytes that are no UTF-8 become lone surrogates, which decoding finds and names.
    record = json.loads(line.decode("utf-8", "surrogateescape"))
  except (ValueError, RecursionError) as error:
    return Raw(name, reason="corrupt", detail=f"not JSON: {error}")
  if not isinstance(record, dict):
    return Raw(name, reason="corrupt", detail="not a JSON object")
  return _from_record(name, record, data, settings)


def _from_record(name, record, data, settings):
  text = record.get(data["text_key"])
  if not isinstance(text, str | bytes):
    kind = type(text).__name__ if data["text_key"] in record else f"absent, only {sorted(record)}"
    return Raw(name, reason="no_text", detail=f"{data['text_key']!r} is {kind}")
  if len(text) > settings.read_limit:
    return too_large(name, f"a text of {len(text)}", settings)
  path = next((_as_text(record[key]) for key in ("path", "name") if record.get(key)), "")
  language = _as_text(record.get(settings.language_key)) or filters.language_of(path)
  return Raw(name, text, language, _as_text(record.get(settings.license_key)))


def _as_text(value):
  """A field as text: some corpora list several licences for one file."""
  if isinstance(value, list | tuple) or hasattr(value, "tolist"):
    return ",".join(_as_text(each) for each in list(value))
  if isinstance(value, bytes):
    value = value.decode("utf-8", "backslashreplace")
  return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else ""


def cut_parquet(about, data, settings):
  """One chunk for each row group."""
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ImportError("data.source='parquet' needs pyarrow: pip install -e '.[parquet]'") from error
  try:
    file = pyarrow.parquet.ParquetFile(about["path"])
  except pyarrow.ArrowInvalid as error:
    raise _Corrupt(str(error)) from error
  with file:
    names = file.schema_arrow.names
    if data["text_key"] not in names:
      raise ValueError(
        f"{about['path']} has no column {data['text_key']!r}, only {names}; set data.text_key"
      )
    extra = [settings.language_key, settings.license_key, "path", "name"]
    columns = [data["text_key"], *(key for key in dict.fromkeys(extra) if key in names)]
    first = 0
    for group in range(file.num_row_groups):
      rows = file.metadata.row_group(group).num_rows
      yield {"kind": "rows", "weight": rows, "group": group, "first": first, "columns": columns}
      first += rows


def read_rows(chunk, data, settings):
  """The records of a row group."""
  import pyarrow
  import pyarrow.parquet

  row, path = chunk["first"], shown(chunk["path"])
  try:
    with pyarrow.parquet.ParquetFile(chunk["path"]) as file:
      for batch in file.iter_batches(64, row_groups=[chunk["group"]], columns=chunk["columns"]):
        column = batch.column(data["text_key"])
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
          # As bytes: pyarrow's own decoding would stop at invalid UTF-8 without naming the row.
          column = column.cast(pyarrow.large_binary())
        others = {key: batch.column(key).to_pylist() for key in chunk["columns"]
                  if key != data["text_key"]}  # fmt: skip
        for i, text in enumerate(column.to_pylist()):
          record = {key: values[i] for key, values in others.items()}
          record[data["text_key"]] = text
          yield _from_record(f"{path}:{row}", record, data, settings)
          row += 1
  except (OSError, pyarrow.ArrowException) as error:
    detail = f"the rest of row group {chunk['group']}: {error}"
    yield Raw(f"{path}:{row}", reason="corrupt", detail=detail)


def cut_array_record(about, *_):
  """Ranges of an ArrayRecord file, whose records are UTF-8 texts."""
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(about["path"])
    count = reader.num_records()
    reader.close()
  except (RuntimeError, ValueError, IndexError) as error:
    raise _Corrupt(str(error)) from error
  yield from _ranges("records", count)


def _ranges(kind, count):
  for first in range(0, count, _RECORDS_PER_CHUNK):
    rows = min(_RECORDS_PER_CHUNK, count - first)
    yield {"kind": kind, "weight": rows, "first": first, "end": first + rows}


def read_records(chunk, _, settings):
  """The texts of a range of an ArrayRecord file."""
  from array_record.python import array_record_module

  reader = None
  for i in range(chunk["first"], chunk["end"]):
    name = shown(f"{chunk['path']}:{i}")
    try:
      reader = reader or array_record_module.ArrayRecordReader(chunk["path"], _RANDOM_ACCESS)
      (record,) = reader.read([i])
    except (RuntimeError, ValueError, IndexError) as error:
      yield Raw(name, reason="corrupt", detail=str(error))
      continue
    if len(record) > settings.read_limit:
      yield too_large(name, f"{len(record)} bytes", settings)
    else:
      yield Raw(name, record)


def _tfds_records(path):
  import tensorflow_datasets

  if os.path.exists(path):
    return tensorflow_datasets.builder_from_directory(path).as_data_source(split="train")
  return tensorflow_datasets.data_source(path, split="train")


def cut_tfds(data, _):
  """Ranges of the "train" split."""
  if not data["path"]:
    raise ValueError("data.path is empty; source 'tfds' needs the name or the folder of a dataset")
  records = _tfds_records(data["path"])
  if len(records) and data["text_key"] not in records[0]:
    raise ValueError(
      f"{data['path']} has no {data['text_key']!r}, only {sorted(records[0])}; set data.text_key"
    )
  yield from _ranges("tfds", len(records))


def read_tfds(chunk, data, settings):
  """The records of a range of the "train" split."""
  records = _tfds_records(data["path"])
  for i in range(chunk["first"], chunk["end"]):
    yield _from_record(f"{data['path']}:{i}", records[i], data, settings)
