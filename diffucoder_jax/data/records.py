"""Tokenised datasets on disk: what a record is, and reading them at random.

A dataset is a folder of ArrayRecord files, TFDS's metadata for them, an index of the lengths, and a
manifest. `prepare dataset` writes it; TFDS opens it too (`tfds.builder_from_directory(folder)`).
"""

import functools
import hashlib
import json
import operator
import pathlib

import grain
import numpy as np

NAME = "code"  # of the dataset in TFDS
SPLITS = ("train", "held_out")
MANIFEST = "manifest.json"
VERSION = 1  # of the format; stands in the manifest
_TEXTS = ("name", "source", "language", "license")


@functools.cache
def features():
  """The TFDS features of a record. Tokens are kept as raw bytes, which read fast."""
  import tensorflow_datasets as tfds

  of = tfds.features
  tokens = of.Tensor(shape=(None,), dtype=np.int32, encoding=of.Encoding.BYTES)
  return of.FeaturesDict(
    {"tokens": tokens, "bytes": np.int64, **{key: of.Text() for key in _TEXTS}}
  )


@functools.cache
def _serializer():
  import tensorflow_datasets as tfds

  return tfds.core.example_serializer.ExampleSerializer(features().get_serialized_info())


def encode_record(record: dict) -> bytes:
  """A record (tokens int32 [n]; bytes int; name, source, language, license str) as bytes.

  The same bytes in every process, which TFDS's own `serialize_example` does not promise: a
  tf.Example is a map, and protobuf writes maps in an order that each process draws anew.
  """
  example = _serializer().get_tf_example(features().encode_example(record))
  return example.SerializeToString(deterministic=True)


def decode_record(encoded: bytes) -> dict:
  """What `encode_record` was given."""
  record = features().deserialize_example_np(encoded)
  texts = {key: record[key].decode() for key in _TEXTS}
  return {"tokens": record["tokens"], **texts, "bytes": int(record["bytes"])}


def shard_name(split: str, number: int, of: int) -> str:
  """File name of a shard, as TFDS wants it."""
  return f"{NAME}-{split}.array_record-{number:05d}-of-{of:05d}"


def index_name(split: str) -> str:
  """File name of the index of a split: int64 [documents, 2], tokens and bytes of each."""
  return f"index-{split}.npy"


def file_sha256(path) -> str:
  """SHA-256 of a file in hex, read piece by piece."""
  with open(path, "rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def read_manifest(directory) -> dict:
  """The manifest of a finished dataset.

  Raises:
    FileNotFoundError: there is none: not a dataset, or not finished.
    ValueError: it is not one of this version's.
  """
  path = pathlib.Path(directory) / MANIFEST
  if not path.exists():
    begun = (path.parent / "work").exists()
    remedy = "it is not finished: run the same command again" if begun else (
      "make one with `python -m diffucoder_jax.prepare dataset`")  # fmt: skip
    raise FileNotFoundError(f"{directory} holds no {MANIFEST}; {remedy}")
  try:
    manifest = json.loads(path.read_text())
    version = manifest["version"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); make the dataset again") from error
  if version != VERSION:
    raise ValueError(f"{path} has version {version}, this code reads {VERSION}; make it again")
  return manifest


def open_dataset(directory, split: str) -> "Dataset":
  """Opens one split of a dataset that `prepare dataset` has finished; reads the index alone.

  Args:
    directory: the `--output` of `prepare dataset`.
    split: "train" or "held_out".
  Raises:
    FileNotFoundError: no finished dataset, or a file of it is missing.
    ValueError: unknown split, or a file that is not the manifest's.
  """
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
  directory = pathlib.Path(directory)
  manifest = read_manifest(directory)
  shards = [shard for shard in manifest["shards"] if shard["split"] == split]
  for shard in shards:
    path = directory / shard["file"]
    if not path.exists():
      raise FileNotFoundError(f"{path} is missing; copy it again or make the dataset again")
    if path.stat().st_size != shard["size"]:
      raise ValueError(
        f"{path} has {path.stat().st_size} bytes, the manifest says {shard['size']}; "
        "copy it again or make the dataset again"
      )
  path = directory / index_name(split)
  if file_sha256(path) != manifest["files"][path.name]:
    raise ValueError(f"{path} is not the manifest's; copy it again or make the dataset again")
  return Dataset(
    split, [str(directory / shard["file"]) for shard in shards], np.load(path), manifest["sha256"],
    manifest["tokenizer"],
  )  # fmt: skip


class Dataset:
  """The documents of a split, at random. Picklable; the shards are opened at the first access.

  Attributes:
    lengths: int64 [documents], tokens of each, without bos and eos.
    bytes: int64 [documents], UTF-8 bytes of each text.
    fingerprint: SHA-256 of the whole dataset, both splits, in hex.
    tokenizer_fingerprint: `Tokenizer.fingerprint()` of the tokenizer that made it.
  """

  def __init__(self, split, paths, index, fingerprint, tokenizer_fingerprint):
    self.split, self.paths = split, paths
    self.lengths, self.bytes = np.ascontiguousarray(index[:, 0]), np.ascontiguousarray(index[:, 1])
    self.fingerprint, self.tokenizer_fingerprint = fingerprint, tokenizer_fingerprint
    self._records = None

  def __len__(self):
    return len(self.lengths)

  def __repr__(self):  # Grain compares sources by this when it restores
    return f"Dataset({self.split}, documents={len(self)}, fingerprint={self.fingerprint})"

  def __getstate__(self):
    return {**self.__dict__, "_records": None}  # open files do not travel

  def __getitem__(self, i):
    """Document `i`: {"tokens": int32 [n], "name", "source", "language", "license": str, "bytes": int}.

    Raises:
      IndexError: there is no such document.
      ValueError: the record is not the one that the index describes.
    """
    i = operator.index(i)
    if not 0 <= i < len(self):
      raise IndexError(f"document {i} of {len(self)}")
    try:
      if self._records is None:
        self._records = grain.sources.ArrayRecordDataSource(self.paths)
      record = decode_record(self._records[i])
    except Exception as error:  # what protobuf and Riegeli raise has no common base
      raise ValueError(
        f"document {i} of {self.split} in {self.paths} is damaged: {error}"
      ) from error
    if (len(record["tokens"]), record["bytes"]) != (self.lengths[i], self.bytes[i]):
      raise ValueError(
        f"document {i} of {self.split} ({record['name']}) has {len(record['tokens'])} tokens, the "
        f"index says {self.lengths[i]}; the files in {self.paths[:1]} are not of one dataset"
      )
    return record
