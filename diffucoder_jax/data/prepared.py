"""A chunk after filtering and tokenising, as a folder on disk that appears whole or not at all.

What later steps need is kept apart by use: columns of numbers, names, drops, signatures, records.
"""

import functools
import hashlib
import json
import pathlib
import shutil
from typing import NamedTuple

import numpy as np

from diffucoder_jax.data import chunks, duplicates, filters, records, sources
from diffucoder_jax.data.settings import Settings
from diffucoder_jax.data.tokenizer import Tokenizer

# For each document that passed the filters; `position` counts all documents of the chunk.
COLUMNS = {
  "position": np.int32,
  "compared": bool,  # has a signature
  "held_out": bool,
  "tokens": np.int32,
  "bytes": np.int32,  # of the text
  "size": np.int32,  # of the record
}


class Context(NamedTuple):
  """What all pieces of work share."""

  directory: str
  data: dict
  settings: Settings
  tokenizer: Tokenizer


def plan_path(work, number) -> pathlib.Path:
  """Where a chunk's description lies."""
  return pathlib.Path(work) / "plan" / f"{number:06d}.json"


def chunk_path(work, number) -> pathlib.Path:
  """The folder of a prepared chunk."""
  return pathlib.Path(work) / "chunks" / f"{number:06d}"


def write_whole(path: pathlib.Path, contents: str) -> None:
  """Writes a file so that a reader sees all of it or nothing."""
  part = path.with_name(path.name + ".part")
  part.write_text(contents)
  part.replace(path)


def prepare_chunk(context: Context, number: int) -> dict:
  """Reads, filters and tokenises a chunk, unless that has been done.

  Returns:
    {"input": hash of the chunk's description, "read": documents, "passed": those kept so far,
    "weight"}.
  Raises:
    ValueError: the tokenizer gives ids outside its vocabulary.
  """
  work = pathlib.Path(context.directory) / "work"
  plan, done = plan_path(work, number).read_text(), chunk_path(work, number)
  described = hashlib.sha256(plan.encode()).hexdigest()
  if (done / "chunk.json").exists():
    summary = json.loads((done / "chunk.json").read_text())
    if summary["input"] == described:
      return summary
  part = done.with_name(done.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  chunk = json.loads(plan)
  summary = {"input": described, "weight": chunk["weight"], **_write(context, chunk, part)}
  (part / "chunk.json").write_text(json.dumps(summary))
  shutil.rmtree(done, ignore_errors=True)
  part.replace(done)
  return summary


def _write(context, chunk, folder):
  settings, data = context.settings, context.data
  columns, keys, signatures = {name: [] for name in COLUMNS}, [], []
  texts = {"name": [], "language": [], "license": []}
  position = -1
  with open(folder / "records", "wb") as out, open(folder / "dropped.jsonl", "w") as dropped:
    for position, raw in enumerate(chunks.read(chunk, data, settings)):
      text, reason, detail = "", raw.reason, raw.detail
      if not reason:
        text, reason, detail = filters.decode(raw.name, raw.contents)
      if not reason:
        reason, detail = filters.judge(text, settings)
      if reason:
        dropped.write(json.dumps([position, raw.name, reason, detail]) + "\n")
        continue
      record = {
        "tokens": _encode(context.tokenizer, raw.name, text),
        "name": raw.name,
        "source": settings.label or data["source"],
        "language": raw.language,
        "license": filters.declared_license(text) or raw.license,
        "bytes": len(text.encode()),
      }
      encoded = records.encode_record(record)
      out.write(encoded)
      signed = None
      if settings.near_threshold:
        signed = duplicates.signature(text, settings.shingle_words)
      keys.append(duplicates.exact_key(text))
      signatures.append(np.zeros(duplicates.HASHES, np.uint32) if signed is None else signed)
      held_out = bool(sources.split([sources.Document(raw.name, text)], data["held_out"])[1])
      row = (position, signed is not None, held_out, len(record["tokens"]), record["bytes"])
      for name, value in zip(COLUMNS, (*row, len(encoded)), strict=True):
        columns[name].append(value)
      for name, values in texts.items():
        values.append(record[name])
  signatures = np.asarray(signatures, np.uint32).reshape(-1, duplicates.HASHES)
  np.savez(folder / "columns.npz", keys=np.asarray(keys, np.uint64).reshape(-1, 2),
           **{name: np.asarray(columns[name], dtype) for name, dtype in COLUMNS.items()})  # fmt: skip
  if settings.near_threshold:
    np.save(folder / "signatures.npy", signatures)
    np.save(folder / "bands.npy", duplicates.band_keys(signatures, settings.near_threshold))
  (folder / "texts.json").write_text(json.dumps(texts))
  return {"read": position + 1, "passed": len(keys)}


def _encode(tokenizer, name, text):
  tokens = np.asarray(tokenizer.encode(text), np.int32)
  if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
    bad = next(int(i) for i in tokens if not 0 <= i < tokenizer.vocab_size)
    raise ValueError(
      f"the tokenizer gave token id {bad} for {name}, outside its vocabulary of "
      f"{tokenizer.vocab_size}; its file is damaged"
    )
  return tokens


class Prepared:
  """All prepared chunks, with one number for every document that passed the filters.

  Memory is 35 bytes for each of them; signatures and names stay on disk.

  Args:
    work: folder.
    passed: documents of each chunk that passed.
  """

  def __init__(self, work, passed: list[int]):
    self.work = pathlib.Path(work)
    self.offsets = np.concatenate([[0], np.cumsum(passed, dtype=np.int64)])
    self.columns = {name: np.zeros(len(self), dtype) for name, dtype in COLUMNS.items()}
    self.columns["keys"] = np.zeros((len(self), 2), np.uint64)
    for number in range(self.chunks):
      with np.load(chunk_path(self.work, number) / "columns.npz") as loaded:
        for name, values in self.columns.items():
          values[self.of(number)] = loaded[name]
    self._texts = functools.lru_cache(64)(self._read_texts)

  @property
  def chunks(self):
    return len(self.offsets) - 1

  def __len__(self):
    return int(self.offsets[-1])

  def of(self, number) -> slice:
    """The documents of a chunk."""
    return slice(int(self.offsets[number]), int(self.offsets[number + 1]))

  def duplicates(self, threshold: float):
    """(keeper int64 [D], similarity float32 [D]): who is dropped as the copy of whom.

    Keeper is -1 for what is kept; similarity is 0 but for near duplicates.
    """
    keeper_D = duplicates.find_exact(self.columns["keys"])
    similarity_D = np.zeros(len(self), np.float32)
    if threshold and len(self):
      candidates = np.flatnonzero((keeper_D < 0) & self.columns["compared"])
      near_D, similarity_D = duplicates.find_near(
        self._bands(), self._signatures(), candidates, threshold
      )
      keeper_D = np.where(near_D >= 0, near_D, keeper_D)
    return keeper_D, similarity_D

  def _bands(self):
    files = [chunk_path(self.work, number) / "bands.npy" for number in range(self.chunks)]
    for band in range(len(np.load(files[0], mmap_mode="r"))):
      yield np.concatenate([np.load(file, mmap_mode="r")[band] for file in files])

  def _signatures(self):
    joined = np.lib.format.open_memmap(
      self.work / "signatures.npy", "w+", np.uint32, (len(self), duplicates.HASHES)
    )
    for number in range(self.chunks):
      joined[self.of(number)] = np.load(chunk_path(self.work, number) / "signatures.npy")
    return joined

  def _read_texts(self, number):
    return json.loads((chunk_path(self.work, number) / "texts.json").read_text())

  def name(self, document: int) -> str:
    """The name of a document."""
    number = int(np.searchsorted(self.offsets, document, side="right")) - 1
    return self._texts(number)["name"][document - int(self.offsets[number])]

  def dropped(self, keeper_D, similarity_D):
    """Yields {"name", "reason", "detail"} of all dropped documents, in the order of documents."""
    for number in range(self.chunks):
      lines = []
      with open(chunk_path(self.work, number) / "dropped.jsonl") as opened:
        for line in opened:
          position, name, reason, detail = json.loads(line)
          lines.append((position, name, reason, detail))
      here = self.of(number)
      for document in here.start + np.flatnonzero(keeper_D[here] >= 0):
        of = self.name(keeper_D[document])
        reason, detail = "exact_duplicate", f"of {of}"
        if similarity_D[document]:
          reason, detail = "near_duplicate", f"{similarity_D[document]:.3f} similar to {of}"
        name = self.name(document)
        lines.append((int(self.columns["position"][document]), name, reason, detail))
      for _, name, reason, detail in sorted(lines):
        yield {"name": name, "reason": reason, "detail": detail}
