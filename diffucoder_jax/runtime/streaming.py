"""Checkpoints written and read piece by piece, for what no memory holds at once.

The files are Orbax's and those of `checkpoint.py`, fingerprints included: what is written here is
restored there, onto any mesh, and the other way round.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from diffucoder_jax.runtime import checkpoint, fingerprint
from diffucoder_jax.runtime import workdir as workdirs


@dataclasses.dataclass(frozen=True, eq=False)
class Incoming:
  """An array to be written.

  Attributes:
    shape, dtype: of the whole.
    chunk: shape of the chunks it is stored in. Pieces must begin and end at their borders.
    pieces: () -> iterable of (starts, numpy array) that cover the whole once.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  chunk: tuple[int, ...]
  pieces: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]


def _storage(step_dir, process=None):
  """Tensorstore's name of the key-value store in which Orbax keeps a checkpoint's arrays."""
  folder = f"{step_dir / 'state'}/" + ("" if process is None else f"ocdbt.process_{process}/")
  return {
    "driver": "ocdbt",
    "base": folder if "://" in folder else {"driver": "file", "path": folder},
  }


def _region(starts, shape):
  return tuple(slice(a, a + n) for a, n in zip(starts, shape, strict=True))


# --- Writing.


class _Handler(ocp.type_handlers.TypeHandler):
  """Teaches Orbax to write an `Incoming`, which it then takes for an ordinary array."""

  def __init__(self):
    self.leaves = {}  # name -> what `fingerprint.describe` would say

  def typestr(self):
    return "jax.Array"

  async def metadata(self, infos):
    raise io.UnsupportedOperation("this handler writes; read with streaming.open_arrays")

  async def deserialize(self, infos, args=None):
    raise io.UnsupportedOperation("this handler writes; read with streaming.open_arrays")

  async def serialize(self, values, infos, args=None):
    for array, info in zip(values, infos, strict=True):
      await info.await_path_creation()
      self.leaves[info.name.replace(".", "/")] = await self._write(array, info)
    return []

  async def _write(self, array, info):
    kind = "bfloat16" if array.dtype == jnp.bfloat16 else array.dtype.str
    spec = {
      "driver": "zarr",
      "kvstore": {**_storage(info.parent_dir.parent, process=0), "path": f"{info.name}/"},
      "metadata": {
        "shape": array.shape, "chunks": array.chunk, "dtype": kind,
        "compressor": {"id": "zstd", "level": 1},
      },
    }  # fmt: skip
    store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
    total, written = 0, None
    try:
      for starts, piece in array.pieces():
        if written is not None:
          await written  # one piece is compressed while the next one is made
        written = store[_region(starts, piece.shape)].write(piece)
        total += fingerprint.of_piece(piece, starts, array.shape)
    finally:  # also when a piece is refused: nothing may write behind the caller's back
      if written is not None:
        await written
    shape, dtype = list(array.shape), str(array.dtype)
    return {"shape": shape, "dtype": dtype, "fingerprint": total % (1 << 32)}


def save(step_dir, arrays, data_state, config):
  """Writes one checkpoint; not atomic: write to another name and rename.

  Args:
    step_dir: folder to make, `<workdir>/checkpoints/<step>`.
    arrays: {"path/of/leaf": `Incoming`}. They are made one after the other.
    data_state, config: JSON values, as for `checkpoint.save`.
  """
  step_dir = workdirs.absolute(step_dir)
  step_dir.mkdir(parents=True)
  tree = {}
  for name, array in arrays.items():
    *folders, last = name.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = array
  writer = _Handler()
  registry = ocp.type_handlers.create_type_handler_registry(
    (Incoming, writer), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  handler.save(step_dir / "state", args=ocp.args.PyTreeSave(tree))
  handler.finalize(step_dir / "state")
  texts = checkpoint.text_items(writer.leaves, data_state, config)
  for name, value in texts.items():
    (step_dir / name).mkdir()
    ocp.JsonCheckpointHandler().save(step_dir / name, args=ocp.args.JsonSave(value))
  (step_dir / "commit_success.txt").write_text("")  # by which Orbax knows a whole one on gs://


# --- Reading.


class StoredArray:
  """An array of a checkpoint, read in pieces.

  Attributes: shape, dtype: of the whole. name: "path/of/leaf".
  """

  def __init__(self, step_dir, name, description):
    self.name, self.shape = name, tuple(description["shape"])
    self.dtype = jnp.dtype(description["dtype"])
    self._step_dir, self._fingerprint = step_dir, description["fingerprint"]
    self._seen = {}
    self._store = None

  def read(self, starts, shape):
    """The piece of this shape that begins at `starts`."""
    if self._store is None:
      path = self.name.replace("/", ".") + "/"
      spec = {"driver": "zarr", "kvstore": {**_storage(self._step_dir), "path": path}}
      self._store = self._attempt(lambda: ts.open(ts.Spec(spec), open=True, read=True).result())
    piece = self._attempt(lambda: self._store[_region(starts, shape)].read().result())
    if piece.dtype != self.dtype or piece.shape != tuple(shape):
      raise checkpoint.DamagedCheckpoint(
        f"checkpoint {self._step_dir}: {self.name} is {piece.dtype}"
      )
    self._seen[tuple(starts)] = fingerprint.of_piece(piece, starts, self.shape)
    return piece

  def _attempt(self, read):
    try:
      return read()
    except (ValueError, OSError, IndexError) as error:  # what tensorstore raises, by kind of damage
      raise checkpoint.DamagedCheckpoint(
        f"checkpoint {self._step_dir} is damaged: {self.name}: {' '.join(str(error).split())[:300]}"
      ) from error

  def check(self):
    """Raises DamagedCheckpoint unless the pieces read, which must be all, are what was saved."""
    if sum(self._seen.values()) % (1 << 32) != self._fingerprint:
      raise checkpoint.DamagedCheckpoint(
        f"checkpoint {self._step_dir} is damaged: values of {self.name} changed since they were "
        "saved; give the path of another one beside it"
      )


def open_arrays(path):
  """Opens the arrays of a checkpoint.

  Args:
    path: workdir (newest checkpoint), its checkpoints/, or the folder of one step.
  Returns:
    ({"path/of/leaf": `StoredArray`}, config dict, folder of the step).
  Raises:
    FileNotFoundError: no checkpoint there. DamagedCheckpoint: not what was saved.
  """
  step_dir = epath.Path(checkpoint.find_step(path))
  content, _, config = checkpoint.read_text_items(step_dir)
  arrays = {
    name: StoredArray(step_dir, name, description)
    for name, description in content["leaves"].items()
    if not description["dtype"].startswith("key<")
  }
  return arrays, config, step_dir
