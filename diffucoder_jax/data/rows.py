"""Records of a file, one by one, each with a name that leads back to it: jsonl, json and parquet."""

import gzip
import json
import zlib

from etils import epath

_ROWS_AT_ONCE = 256  # of parquet


def open_rows(path, columns=()):
  """Finds the records of a .jsonl, .jsonl.gz, .json (a list of objects) or .parquet file.

  Args:
    path: the file.
    columns: of a parquet file, the ones to read; () for all.
  Yields:
    (name, load): `load()` gives the record, or raises a ValueError (or RecursionError) without a
    name, so that whoever asks may go on with the next one.
  Raises:
    FileNotFoundError: no such file.
    ValueError: the file as a whole is damaged, of another kind, or has none of the columns.
  """
  path = epath.Path(path)
  if not path.is_file():
    there = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    hint = f"is a folder; give one of its files: {', '.join(there)}" if there else "is not there"
    raise FileNotFoundError(f"{path} {hint}")
  read = next((read for ending, read in KINDS.items() if path.name.endswith(ending)), None)
  if read is None:
    raise ValueError(f"{path} must end in one of {', '.join(KINDS)}")
  yield from read(path, columns)


def read_rows(path, columns=()):
  """`open_rows` where every record must be a JSON object: yields (name, dict).

  Raises:
    ValueError: as `open_rows`, and for a record that is none; names it.
  """
  for name, load in open_rows(path, columns):
    try:
      row = load()
    # UnicodeDecodeError and JSONDecodeError are ValueErrors.
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(row, dict):
      raise ValueError(f"{name} is a {type(row).__name__}, not a JSON object")
    yield name, row


def _lines(path, _):
  with path.open("rb") as raw:
    lines = gzip.open(raw) if path.name.endswith(".gz") else raw
    number = 0
    try:
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield f"{path}:{number}", lambda line=line: json.loads(line.decode())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def _list(path, _):
  try:
    rows = json.loads(path.read_bytes().decode())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(rows, list):
    raise ValueError(f"{path} is a {type(rows).__name__}, not a list of objects")
  for i, row in enumerate(rows):
    yield f"{path}[{i}]", lambda row=row: row


def _parquet(path, columns):
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ImportError("reading parquet needs pyarrow: pip install -e '.[parquet]'") from error
  with path.open("rb") as opened:
    try:
      table = pyarrow.parquet.ParquetFile(opened)
    except pyarrow.ArrowInvalid as error:
      raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    known = table.schema_arrow.names
    wanted = [name for name in known if not columns or name in columns]
    if not wanted:
      raise ValueError(
        f"{path} has none of the columns {columns}, only {known}; for instruction data set data.schema"
      )
    number = 0
    for batch in table.iter_batches(_ROWS_AT_ONCE, columns=wanted):
      for i in range(batch.num_rows):
        # One by one: text that is no UTF-8 fails where its row has a name.
        yield f"{path}:{number + i}", lambda batch=batch, i=i: batch.slice(i, 1).to_pylist()[0]
      number += batch.num_rows


# Ending -> function of (path, columns).
KINDS = {".jsonl": _lines, ".jsonl.gz": _lines, ".json": _list, ".parquet": _parquet}
