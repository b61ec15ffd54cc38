"""Raw code and text to a tokenised dataset, over many processes, in constant memory.

The corpus is cut into chunks, which are filtered and tokenised apart from each other; duplicates
are found among all of them; what is kept is gathered into shards. Each piece is written whole, so
that a killed run goes on where it was, and none depends on how many processes there are. Memory
does not grow with the corpus but for about 120 bytes a document while duplicates are found, beside
the signatures, which are mapped from disk. Until the end the folder `work` holds what is in between:
4 bytes a token and 1.5 kB a document.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time

import numpy as np

from diffucoder_jax.data import (
  chunks,
  duplicates,
  filters,
  prepared,
  records,
  shards,
  sources,
  workers,
)
from diffucoder_jax.data.settings import Settings, make_settings
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.runtime import workdir

_DATA_KEYS = ("source", "path", "pattern", "text_key", "held_out")
_SAY_SECONDS = 5.0


def build(config, output, worker_count: int) -> dict:
  """Makes the dataset of a config in the folder `output`, or goes on with it.

  Args:
    config: its `data` and `prepare` sections and `tokenizer` count. `data.on_undecodable` does not:
      here every document that is not kept is listed.
    output: a local folder that is new, empty, or of the same config.
    worker_count: number of processes.
  Returns:
    the manifest.
  Raises:
    ValueError: a bad setting, a folder of another config, or nothing is kept.
    RuntimeError: another process is at work in the folder, or a worker died.
  """
  if worker_count < 1:
    raise ValueError(f"--workers must be at least 1, got {worker_count}")
  settings = make_settings(dict(config.get("prepare", {})))
  data = {key: config.data[key] for key in _DATA_KEYS}
  sources.split([], data["held_out"])  # is it a share?
  unit = config.data.get("unit", "file")  # a manifest's config, made into one again, has none
  if unit != "file":
    raise ValueError(f"a dataset is made of whole documents: data.unit is {unit!r}")
  if not config.tokenizer:
    raise ValueError("a dataset is tokenised: give --config.tokenizer (`prepare tokenizer`)")
  tokenizer = load_tokenizer(config.tokenizer)
  if "://" in str(output):
    raise ValueError(f"{output}: a dataset is built in a local folder; copy it when it is finished")
  directory = pathlib.Path(output)
  context = prepared.Context(str(directory), data, settings, tokenizer)
  with _alone_in(directory), workers.Workers(context, worker_count) as pool:
    identity = _claim(directory, data, settings, tokenizer)
    if (directory / records.MANIFEST).exists():
      manifest = records.read_manifest(directory)
      shutil.rmtree(directory / "work", ignore_errors=True)
      print(f"dataset: {directory} is finished already, {_in_words(manifest)}")
      return manifest

    # What there is, cut into pieces of work.
    began = time.monotonic()
    weights = _write_plan(directory / "work", data, settings)

    # Each piece: filtered, tokenised, and what will be compared.
    summaries = [None] * len(weights)
    progress = _Progress("chunks", weights)
    for number, summary in pool.run(_numbered, range(len(weights))):
      summaries[number] = summary
      progress.add(summary["weight"], summary["read"], summary["read"] - summary["passed"])
    read = sum(summary["read"] for summary in summaries)

    # All together: who is whose copy, and what was dropped for which reason.
    pieces = prepared.Prepared(directory / "work", [summary["passed"] for summary in summaries])
    keeper_D, similarity_D = pieces.duplicates(settings.near_threshold)
    dropped = _write_dropped(directory, pieces.dropped(keeper_D, similarity_D))
    print(f"dataset: {len(pieces)} of {read} documents pass the filters, {_reasons(dropped)}")
    kept = keeper_D < 0
    if not kept.any():
      raise ValueError(
        f"nothing is kept of {read} documents ({_reasons(dropped)}); see {directory}/dropped.jsonl"
      )

    # The shards, their index, and what describes them.
    planned = shards.cut(pieces, kept, [s["input"] for s in summaries], settings.shard_bytes)
    progress = _Progress("shards", [1] * len(planned))
    written = []
    for shard in pool.run(shards.write, planned):
      written.append(shard)
      progress.add(1, shard["documents"], 0)
    order = {shard.file: i for i, shard in enumerate(planned)}
    written.sort(key=lambda shard: order[shard["file"]])
    if read != sum(shard["documents"] for shard in written) + sum(dropped.values()):
      raise RuntimeError(
        f"documents were lost: {read} read, {(keeper_D < 0).sum()} kept, {dropped} dropped"
      )
    _remove_others(directory, {shard["file"] for shard in written})
    _write_index(directory, pieces.columns, kept)
    _write_tfds_metadata(directory, written)
    manifest = _manifest(directory, identity, settings.label or data["source"], read, dropped,
                         written)  # fmt: skip
    prepared.write_whole(directory / records.MANIFEST, json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(directory / "work")
  seconds = time.monotonic() - began
  print(f"dataset: {_in_words(manifest)}; {read / seconds:.0f} documents/s, {seconds:.0f} s")
  return manifest


def _numbered(context, number):
  return number, prepared.prepare_chunk(context, number)


@contextlib.contextmanager
def _alone_in(directory):
  """Two runs in one folder would remove each other's parts."""
  directory.mkdir(parents=True, exist_ok=True)
  opened = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise RuntimeError(f"another process is at work in {directory}; wait for it") from error
    yield
  finally:
    os.close(opened)


def _claim(directory, data, settings, tokenizer):
  """Writes what decides the dataset to config.json, or compares it with what is there."""
  prepare = dataclasses.asdict(settings)
  del prepare["chunk_bytes"]  # how the work is cut, not what comes out
  identity = {
    "version": records.VERSION,
    "data": data,
    "prepare": prepare,
    "tokenizer": tokenizer.fingerprint(),
    "signatures": duplicates.version() if settings.near_threshold else "",
  }
  path = directory / "config.json"
  if path.exists():
    try:
      saved = json.loads(path.read_text())
    except ValueError as error:
      raise ValueError(f"{path} is damaged ({error}); remove {directory}") from error
    if changes := workdir.config_changes(saved, identity):
      lines = "\n  ".join(changes)
      raise ValueError(
        f"{directory} is a dataset of another config (saved -> current):\n  {lines}\n"
        "Use a new --output, or set the old values."
      )
  elif others := sorted(child.name for child in directory.iterdir() if ".part" not in child.name):
    raise ValueError(f"{directory} holds other things ({others[0]}); give a new --output")
  else:
    prepared.write_whole(path, json.dumps(identity, indent=2) + "\n")
  return identity


def _write_plan(work, data, settings: Settings):
  """Writes a description of every chunk; returns their weights."""
  weights = []
  for number, chunk in enumerate(chunks.cut(data, settings)):
    path, text = prepared.plan_path(work, number), json.dumps(chunk)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
      prepared.write_whole(path, text)
    weights.append(chunk["weight"])
  if not weights:
    raise ValueError(
      f"the corpus is empty: data.source={data['source']!r}, data.path={data['path']!r}, "
      f"data.pattern={data['pattern']!r} gave no document"
    )
  for number in itertools.count(len(weights)):  # of a corpus that was larger when the run began
    if not prepared.plan_path(work, number).exists():
      break
    prepared.plan_path(work, number).unlink()
    shutil.rmtree(prepared.chunk_path(work, number), ignore_errors=True)
  return weights


def _write_dropped(directory, lines):
  counts = collections.Counter()
  path = directory / "dropped.jsonl"
  part = path.with_name(path.name + ".part")
  with open(part, "w") as out:
    for line in lines:
      counts[line["reason"]] += 1
      out.write(json.dumps(line) + "\n")
  part.replace(path)
  return {reason: counts[reason] for reason in filters.REASONS if counts[reason]}


def _remove_others(directory, files):
  for path in directory.glob(f"{records.NAME}-*.array_record-*"):
    if path.name not in files:
      path.unlink()


def _write_index(directory, columns, kept):
  index = np.stack([columns["tokens"], columns["bytes"]], axis=1).astype(np.int64)
  for split in records.SPLITS:
    path = directory / records.index_name(split)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as out:
      np.save(out, index[kept & (columns["held_out"] == (split == "held_out"))])
    part.replace(path)


def _write_tfds_metadata(directory, written):
  import tensorflow_datasets as tfds

  template = tfds.core.ShardedFileTemplate(
    data_dir=directory, dataset_name=records.NAME, filetype_suffix="array_record"
  )
  splits = []
  for split in records.SPLITS:
    of_split = [shard for shard in written if shard["split"] == split]
    if of_split:
      splits.append(
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=[shard["documents"] for shard in of_split],
          num_bytes=sum(shard["size"] for shard in of_split),
          filename_template=template.replace(split=split),
        )
      )
  tfds.folder_dataset.write_metadata(
    data_dir=directory, features=records.features(), split_infos=splits, version="1.0.0",
    filename_template=template, check_data=False,  # its check needs TensorFlow
  )  # fmt: skip


def _manifest(directory, identity, source, read, dropped, written):
  """All that is known about the dataset; nothing in it depends on when or how fast it was made."""
  amounts = ("documents", "tokens", "bytes")
  splits = {}
  for split in records.SPLITS:
    of_split = [shard for shard in written if shard["split"] == split]
    total = {key: sum(shard[key] for shard in of_split) for key in amounts}
    by = {"source": {source: dict(total)} if of_split else {}, "language": {}, "license": {}}
    for shard in of_split:
      for field, counts in shard["counts"].items():
        for value, counted in counts.items():
          entry = by[field].setdefault(value, dict.fromkeys(amounts, 0))
          for key, more in zip(amounts, counted, strict=True):
            entry[key] += more
    splits[split] = {**total, **{field: dict(sorted(by[field].items())) for field in by}}
  files = [records.index_name(split) for split in records.SPLITS] + ["dropped.jsonl"]
  hashes = {name: records.file_sha256(directory / name) for name in files}
  whole = {**hashes, **{shard["file"]: shard["sha256"] for shard in written}}
  lines = [f"{whole[name]}  {name}\n" for name in sorted(whole)] + [identity["tokenizer"]]
  return {
    "version": records.VERSION,
    "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    "tokenizer": identity["tokenizer"],
    "documents_read": read,
    "dropped": dropped,
    "splits": splits,
    "shards": [{k: v for k, v in shard.items() if k != "counts"} for shard in written],
    "files": hashes,
    "config": identity,
  }


def _reasons(dropped):
  return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"


def _in_words(manifest):
  parts = [
    f"{split} {of['documents']} documents, {of['tokens']} tokens, {of['bytes']} bytes"
    for split, of in manifest["splits"].items()
  ]
  return f"{'; '.join(parts)}; {len(manifest['shards'])} shards; sha256 {manifest['sha256'][:16]}"


class _Progress:
  """Says how far the work is, at most every few seconds."""

  def __init__(self, what, weights):
    self._what, self._pieces, self._weight = what, len(weights), max(1, sum(weights))
    self._began = self._said = time.monotonic()
    self._done = np.zeros(4, np.int64)

  def add(self, weight, documents, dropped):
    self._done += (1, weight, documents, dropped)
    now = time.monotonic()
    done, weight, documents, dropped = self._done.tolist()
    if now - self._said < _SAY_SECONDS and done < self._pieces:
      return
    self._said, seconds = now, max(now - self._began, 1e-3)
    left = seconds * (self._weight - weight) / max(weight, 1)
    print(
      f"dataset: {done}/{self._pieces} {self._what}, {documents} documents, {dropped} dropped, "
      f"{documents / seconds:.0f} documents/s, ETA {left // 60:.0f}:{left % 60:02.0f}",
      flush=True,
    )
