"""safetensors files, read and written piece by piece, on any path that epath opens.

The `safetensors` library maps a file into memory, which needs a local disk and counts as resident,
and writes only what is in memory as a whole. A 5 GB shard shall cost neither, so the format (eight
bytes of length, a JSON header, the data) is handled here; the tests read and write it with the
library on the other side.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from etils import epath

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
PIECE_BYTES = 128 << 20
MAX_HEADER_BYTES = 100_000_000  # as in the library


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that is somewhere else.

  Attributes:
    shape: of the whole.
    dtype: numpy's (bfloat16 is ml_dtypes'); None if it is not one of `DTYPES`.
    read: (first, last) -> array of these rows, i.e. of [first:last] along the first dimension.
    where: file or checkpoint it comes from, for messages.
    stored_as: the dtype by its name in the file.
  """

  shape: tuple[int, ...]
  dtype: np.dtype | None
  read: Callable[[int, int], np.ndarray]
  where: str
  stored_as: str = ""

  def row_ranges(self):
    """(first, last) of the pieces to read it in, each of about `PIECE_BYTES`."""
    row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
    step = max(1, PIECE_BYTES // row_bytes)
    return [(a, min(a + step, self.shape[0])) for a in range(0, self.shape[0], step)]


def num_bytes(shape, dtype):
  """Bytes of an array."""
  return math.prod(shape) * dtype.itemsize


def all_finite(array):
  """Whether an array of one of `DTYPES` is free of NaN and infinities."""
  exponent = _EXPONENT[str(array.dtype)]
  bits = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
  return not np.any((bits & exponent) == exponent)


def open_folder(folder, stack):
  """Opens model.safetensors, or the shards of model.safetensors.index.json; reads headers only.

  Args:
    folder: a path, also gs://.
    stack: `contextlib.ExitStack` that closes the files.
  Returns:
    {tensor name: `Tensor`}.
  Raises:
    FileNotFoundError, ValueError: a file is absent, cut short or not what the index says; named.
  """
  folder = epath.Path(folder)
  where = None
  if (folder / INDEX).exists():
    where = _weight_map(folder / INDEX)
  elif not (folder / SINGLE).exists():
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".gguf"))
    hint = f"; it has {', '.join(others)}: save it again as safetensors" if others else ""
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
  tensors = {}
  for name in [SINGLE] if where is None else sorted(set(where.values())):
    if not (folder / name).exists():
      raise FileNotFoundError(
        f"{folder / INDEX} names {name}, which is not there; fetch that shard again"
      )
    for tensor, entry in _open_file(folder / name, stack).items():
      if tensor in tensors:
        raise ValueError(f"{tensor} is in both {tensors[tensor].where} and {name}; remove one")
      tensors[tensor] = entry
  for tensor, name in (where or {}).items():
    if tensor not in tensors or tensors[tensor].where != name:
      raise ValueError(
        f"{folder / INDEX} says that {name} holds {tensor}, but it does not; fetch both again"
      )
  return tensors


def _weight_map(path):
  try:
    weight_map = json.loads(path.read_text())["weight_map"]
    assert weight_map and all(isinstance(name, str) for name in weight_map.values())
  except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
    raise ValueError(f"{path} is not a safetensors index ({error!r}); fetch it again") from error
  return weight_map


def _open_file(path, stack):
  file = stack.enter_context(path.open("rb"))
  size = path.stat().length
  try:
    header, start = _header(file, size)
    entries = {name: _entry(name, header[name], size - start) for name in header}
    ends = sorted(end for *_, end in entries.values())
    if entries and ends[-1] != size - start:
      raise ValueError(
        f"the header describes {ends[-1]} bytes of data and {size - start} are there"
      )
  except ValueError as error:
    raise ValueError(
      f"{path} is not a whole safetensors file ({error}); it was probably cut short on the way, so "
      "fetch it again"
    ) from error
  return {
    name: Tensor(shape, DTYPES.get(kind), _reader(file, path, start + first, shape, kind),
                 path.name, kind)
    for name, (shape, kind, first, _) in entries.items()
  }  # fmt: skip


def _header(file, size):
  """(header without its metadata, where the data starts)."""
  length = int.from_bytes(file.read(8), "little")
  if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
    raise ValueError(f"{size} bytes, and a header of {length}")
  header = json.loads(file.read(length))  # JSONDecodeError and bad UTF-8 are ValueErrors
  if not isinstance(header, dict):
    raise ValueError("its header is not a JSON object")
  header.pop("__metadata__", None)
  return header, 8 + length


def _entry(name, entry, data_bytes):
  """(shape, dtype name, first byte, last byte) of a header's entry, checked."""
  try:
    shape, kind = tuple(int(n) for n in entry["shape"]), str(entry["dtype"])
    first, last = (int(n) for n in entry["data_offsets"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"its header's entry of {name} is {entry!r}") from error
  if not 0 <= first <= last <= data_bytes:
    raise ValueError(f"{name} lies at bytes {first} to {last} of {data_bytes}")
  wanted = math.prod(shape) * DTYPES[kind].itemsize if kind in DTYPES else last - first
  if last - first != wanted:
    raise ValueError(f"{name} needs {wanted} bytes and has {last - first}")
  return shape, kind, first, last


def _reader(file, path, start, shape, kind):
  def read(first, last):
    dtype = DTYPES[kind]
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    file.seek(start + first * row_bytes)
    data = file.read((last - first) * row_bytes)
    if len(data) != (last - first) * row_bytes:
      raise ValueError(f"{path} became shorter while it was read")
    return np.frombuffer(data, dtype).reshape(last - first, *shape[1:])

  return read


def write_file(path, tensors, dtype, metadata, advance):
  """Writes one safetensors file.

  Args:
    path: of the file.
    tensors: {name: `Tensor`}, in the order to write them.
    dtype: numpy dtype to store; read pieces are cast.
    metadata: {str: str} for the header.
    advance: called with the bytes of each piece.
  Returns:
    {name: SHA-256 of the stored bytes, as hex}.
  Raises:
    ValueError: NaN or infinite values; names the tensor.
  """
  kind = next(kind for kind, known in DTYPES.items() if known == dtype)
  header, offset = {"__metadata__": metadata}, 0
  for name, tensor in tensors.items():
    end = offset + num_bytes(tensor.shape, dtype)
    header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the data starts aligned, as the library has it
  hashes = {}
  with epath.Path(path).open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in tensors.items():
      digest = hashlib.sha256()
      for first, last in tensor.row_ranges():
        piece = np.ascontiguousarray(cast(tensor.read(first, last), dtype, name, tensor.where))
        data = piece.view(np.uint8).reshape(-1)
        digest.update(data)
        file.write(data)
        advance(data.nbytes)
      hashes[name] = digest.hexdigest()
  return hashes


def cast(piece, dtype, name, where):
  """A piece in another dtype; raises ValueError, naming the tensor, unless all values are finite."""
  with np.errstate(over="ignore"):  # what becomes infinite is found here
    piece = piece.astype(dtype, copy=False)
  if not all_finite(piece):
    raise ValueError(
      f"{name} in {where} has NaN or infinite values (as {dtype}); the file is damaged, or the "
      "training that made it diverged"
    )
  return piece
