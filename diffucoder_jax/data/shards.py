"""The last step of a dataset: kept documents gathered into ArrayRecord shards, each written whole."""

import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from diffucoder_jax.data import prepared, records


class Shard(NamedTuple):
  """What goes into a shard: rows of prepared chunks, in order."""

  file: str
  split: str
  parts: tuple  # of (chunk number, int64 rows)
  described: str  # hash of all that decides the contents


def cut(chunks: prepared.Prepared, kept, inputs: list[str], shard_bytes: int) -> list[Shard]:
  """Cuts the kept documents of both splits into shards; neither workers nor chunks matter.

  Args:
    chunks: all prepared chunks.
    kept: bool [D].
    inputs: hash of each chunk's input.
    shard_bytes: a shard begins with the first document after every so many bytes of records.
  """
  shards = []
  for split in records.SPLITS:
    of_split = np.flatnonzero(kept & (chunks.columns["held_out"] == (split == "held_out")))
    sizes = chunks.columns["size"][of_split].astype(np.int64)
    shard_of = (np.cumsum(sizes) - sizes) // shard_bytes
    groups = np.split(of_split, np.flatnonzero(np.diff(shard_of)) + 1) if len(of_split) else []
    for i, group in enumerate(groups):
      numbers = np.searchsorted(chunks.offsets, group, side="right") - 1
      parts, described = [], hashlib.sha256()
      for number in np.unique(numbers):
        rows = group[numbers == number] - chunks.offsets[number]
        parts.append((int(number), rows))
        described.update(inputs[number].encode() + rows.astype("<i8").tobytes())
      name = records.shard_name(split, i, len(groups))
      shards.append(Shard(name, split, tuple(parts), described.hexdigest()))
  return shards


def write(context: prepared.Context, shard: Shard) -> dict:
  """Writes a shard, unless it has been written.

  Returns:
    a row of the manifest: file, split, documents, tokens, bytes (of the texts), size (of the file),
    sha256; and "counts": {field: {value: [documents, tokens, bytes]}}.
  """
  from array_record.python import array_record_module

  directory = pathlib.Path(context.directory)
  path, note = directory / shard.file, directory / "work" / "shards" / f"{shard.file}.json"
  if path.exists() and note.exists():
    written = json.loads(note.read_text())
    if written["input"] == shard.described:
      return written["shard"]
  part = path.with_name(path.name + ".part")
  counts = {"language": {}, "license": {}}
  total = np.zeros(3, np.int64)
  # One record a group, or a random read would decompress its neighbours too.
  writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
  for number, rows in shard.parts:
    folder = prepared.chunk_path(directory / "work", number)
    texts = json.loads((folder / "texts.json").read_text())
    with np.load(folder / "columns.npz") as columns, open(folder / "records", "rb") as opened:
      sizes, tokens, size = columns["size"].astype(np.int64), columns["tokens"], columns["bytes"]
      starts = np.cumsum(sizes) - sizes
      for row in rows:
        opened.seek(starts[row])
        writer.write(opened.read(sizes[row]))
        amount = (1, int(tokens[row]), int(size[row]))
        total += amount
        for key, by_value in counts.items():
          of = by_value.setdefault(texts[key][row], [0, 0, 0])
          of[:] = [a + b for a, b in zip(of, amount, strict=True)]
  writer.close()
  result = {
    "file": shard.file,
    "split": shard.split,
    **dict(zip(("documents", "tokens", "bytes"), total.tolist(), strict=True)),
    "size": part.stat().st_size,
    "sha256": records.file_sha256(part),
    "counts": counts,
  }
  part.replace(path)
  note.parent.mkdir(parents=True, exist_ok=True)
  prepared.write_whole(note, json.dumps({"input": shard.described, "shard": result}))
  return result
