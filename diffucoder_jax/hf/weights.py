"""A model's weights, wherever they are, as tensors under Hugging Face's names that are read in pieces.

Both ways of a conversion meet here: a folder and a checkpoint are opened as the same `Weights`.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from diffucoder_jax.hf import load, mapping, shards
from diffucoder_jax.model import lora
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.runtime import checkpoint, streaming

# How the rows of tokens that are new to a vocabulary begin; see `with_new_rows`.
NEW_ROWS = ("mean", "normal", "keep")


@dataclasses.dataclass(frozen=True)
class Weights:
  """Tensors of one network.

  Attributes:
    config: `ModelConfig`.
    tensors: {Hugging Face name: `shards.Tensor`}, layer after layer. Adapters of a checkpoint are
      merged into them: pieces of such a tensor are float32 whatever its dtype says is stored.
    check: () -> None; call it when all was read. Raises if that is not what was once saved.
    apart: the tensors without adapters, and the adapters as {"params/path/of/leaf":
      `streaming.StoredArray`}; None if there are none.
  """

  config: ModelConfig
  tensors: dict[str, shards.Tensor]
  check: Callable[[], None]
  apart: tuple[dict[str, shards.Tensor], dict[str, streaming.StoredArray]] | None = None

  def dtype(self):
    """The dtype that all tensors are stored in; ValueError, naming two of them, if there are more."""
    first = next(iter(self.tensors))
    for name, tensor in self.tensors.items():
      if tensor.dtype != self.tensors[first].dtype:
        raise ValueError(
          f"{name} in {tensor.where} is {tensor.dtype}, but {first} is {self.tensors[first].dtype}; "
          "say which one to write: --dtype bfloat16 or --dtype float32"
        )
    return self.tensors[first].dtype


def _in_order(tensors, config):
  """Layer after layer, so that a shard holds whole layers; the head last."""
  rows = mapping.rows(config)
  layers = [row for row in rows if row.stacked]
  names = [row.name for row in rows if row.path == ("embed",)]
  names += [row.name.format(i=i) for i in range(config.num_layers) for row in layers]
  names += [row.name for row in rows if not row.stacked and row.path != ("embed",)]
  return {name: tensors[name] for name in names}


def from_folder(folder, config, stack):
  """Opens the weights of a Hugging Face folder; reads and checks headers only.

  Args: folder: a path. config: its `ModelConfig`. stack: `contextlib.ExitStack`, closes the files.
  Raises: as `load.load_params`.
  """
  tensors = shards.open_folder(folder, stack)
  load.check(tensors, config)
  return Weights(config, _in_order(tensors, config), lambda: None)


def from_checkpoint(path, config):
  """Opens the weights of one of our checkpoints, written on any mesh; reads no array yet.

  Adapters are merged tensor by tensor, each when it is read, as `lora.merge` does.

  Args: path: workdir, its checkpoints/, or the folder of one step. config: its `ModelConfig`.
  Raises:
    ValueError: names a leaf that is missing, unexpected or mis-shaped. DamagedCheckpoint.
  """
  arrays, _, step_dir = streaming.open_arrays(path)
  found = {name: array for name, array in arrays.items() if name.startswith("params/")}
  wanted = {}
  for row in mapping.rows(config):
    shapes = {"/".join(row.path): mapping.our_shape(row, config)}
    shapes |= mapping.adapter_shapes(row, config)
    wanted |= {"params/" + path: shape for path, shape in shapes.items()}
  problems = [f"{name} is missing" for name in wanted if name not in found]
  problems += [f"{name} is not part of the network" for name in found if name not in wanted]
  for name in sorted(wanted.keys() & found.keys()):
    shape = wanted[name]
    if found[name].shape != shape:
      problems.append(f"{name} has shape {list(found[name].shape)}, the network {list(shape)}")
  if problems:
    raise ValueError(
      f"checkpoint {step_dir} does not hold the network of its own config: {'; '.join(problems)}"
    )
  tensors, merged, adapters = {}, {}, {}
  for row in mapping.rows(config):
    stored = found["params/" + "/".join(row.path)]
    names = [f"params/{path}" for path in mapping.adapter_shapes(row, config)]
    adapter = {name: found[name] for name in names}
    adapters |= adapter
    for i, name in enumerate(row.names(config)):
      tensor = _stored(row, i, stored, config, f"checkpoint {step_dir}")
      tensors[name] = tensor
      merged[name] = _merged(row, i, tensor, adapter.values(), config) if adapter else tensor

  def check():
    for name in wanted:
      found[name].check()

  apart = (_in_order(tensors, config), adapters) if adapters else None
  return Weights(config, _in_order(merged, config), check, apart)


def _stored(row, i, array, config, where):
  """One layer of a stacked leaf of ours, as the Hugging Face tensor that it is."""
  cut = row.theirs.split()[0]  # the dimension that rows are counted in
  shape = array.shape[1:] if row.stacked else array.shape

  def read(first, last):
    starts, sizes = [0] * len(shape), list(shape)
    if len(cut) == 1:
      axis = row.ours.index(cut)
      starts[axis], sizes[axis] = first, last - first
    if row.stacked:
      piece = array.read((i, *starts), (1, *sizes))[0]
    else:
      piece = array.read(starts, sizes)
    theirs = mapping.to_theirs(row, piece)
    return theirs if len(cut) == 1 else theirs[first:last]

  return shards.Tensor(mapping.their_shape(row, config), array.dtype, read, where)


def _read_layer(array, i):
  return array.read((i, *[0] * (len(array.shape) - 1)), (1, *array.shape[1:]))


def _merged(row, i, tensor, adapter, config):
  """A stored tensor with its adapter, the arrays (a, b), added to it in float32."""
  deltas = []  # What is added is made when the first piece is read, and forgotten after the last.

  def read(first, last):
    if not deltas:
      a, b = (_read_layer(array, i)[0] for array in adapter)
      deltas.append(mapping.to_theirs(row, np.asarray(lora.delta(a, b, config))))
    piece = tensor.read(first, last).astype(np.float32) + deltas[0][first:last]
    if last == tensor.shape[0]:
      deltas.clear()
    return piece

  return dataclasses.replace(tensor, read=read)


def to_arrays(weights, dtype, advance):
  """Our tree, ready for `streaming.save`. Adapters stay adapters, in the dtype they have.

  Args:
    weights: `Weights`.
    dtype: numpy dtype to store.
    advance: called with the bytes of each piece.
  Returns:
    {"params/path/of/leaf": `streaming.Incoming`}. Making a piece raises ValueError, naming the
    tensor, for NaN and infinite values.
  """
  tensors, adapters = weights.apart or (weights.tensors, {})
  arrays = {
    "params/" + "/".join(row.path): _incoming(row, tensors, weights.config, dtype, advance)
    for row in mapping.rows(weights.config)
  }
  return arrays | {name: _copied(array) for name, array in adapters.items()}


def _copied(array):
  """One of our arrays that is stacked over the layers, layer by layer as it is."""

  def pieces():
    for i in range(array.shape[0]):
      piece = shards.cast(_read_layer(array, i), array.dtype, array.name, "the checkpoint")
      yield (i, *[0] * (piece.ndim - 1)), piece

  return streaming.Incoming(array.shape, array.dtype, (1, *array.shape[1:]), pieces)


def _incoming(row, tensors, config, dtype, advance):
  shape = mapping.our_shape(row, config)
  chunk = _chunk(shape, dtype.itemsize, row.stacked)
  # What has no layers to be cut into is cut along its first dimension over there, at chunk borders.
  axis = row.ours.index(row.theirs.split()[0][0])

  def pieces():
    for i, name in enumerate(row.names(config)):
      tensor = tensors[name]
      num_rows, step = tensor.shape[0], tensor.shape[0]
      if not row.stacked:
        chunk_bytes = chunk[axis] * math.prod(shape) // shape[axis] * dtype.itemsize
        step = chunk[axis] * max(1, shards.PIECE_BYTES // chunk_bytes)
      for first in range(0, num_rows, step):
        piece = tensor.read(first, min(first + step, num_rows))
        piece = shards.cast(piece, dtype, name, tensor.where)
        advance(piece.nbytes)
        piece = mapping.to_ours(row, piece, config)
        starts = [0] * piece.ndim
        starts[axis] = first
        if row.stacked:
          starts, piece = [i, *starts], piece[None]
        yield tuple(starts), np.ascontiguousarray(piece)

  return streaming.Incoming(shape, dtype, chunk, pieces)


def _chunk(shape, itemsize, stacked):
  """Chunks of one layer at most, halved along the longest side to at most `CHUNK_BYTES`."""
  chunk = [1, *shape[1:]] if stacked else list(shape)
  while math.prod(chunk) * itemsize > checkpoint.CHUNK_BYTES:
    longest = chunk.index(max(chunk))
    chunk[longest] = -(-chunk[longest] // 2)
  return tuple(chunk)


def with_new_rows(weights, ids, init, known=None, seed=0):
  """Gives the rows of new tokens a value, in the embedding and in an untied head.

  Vocabularies of Qwen2.5 have spare rows that no token used; what they hold was never trained.

  Args:
    weights: `Weights` of a folder (those of a checkpoint are fingerprinted and read once).
    ids: ids of the new tokens, all below vocab_size.
    known: rows below this one, `ids` apart, were trained; default: those before the first of `ids`.
    init: "mean" of the known rows: the new token starts as an average word and far from none.
      "normal": drawn around that mean with the known rows' standard deviation in each dimension.
      "keep": what the spare row holds.
    seed: of "normal"; the row of one id does not depend on the others.
  Returns:
    `Weights`.
  """
  if init == "keep" or not ids:
    return weights
  patched = {
    name: _with_rows(weights.tensors[name], sorted(ids), init, known or min(ids), seed)
    for name in (mapping.EMBED, mapping.HEAD)
    if name in weights.tensors
  }
  return dataclasses.replace(weights, tensors={**weights.tensors, **patched})


def _with_rows(tensor, ids, init, known, seed):
  rows = {}

  def make():
    count, total, squares = 0, np.zeros(tensor.shape[1]), np.zeros(tensor.shape[1])
    for first, last in tensor.row_ranges():
      rows_VD = tensor.read(first, min(last, known)) if first < known else ()
      for k in range(0, len(rows_VD), 4096):
        part = rows_VD[k : k + 4096].astype(np.float64)
        part = np.delete(part, [i - first - k for i in ids if 0 <= i - first - k < len(part)], axis=0)
        count += len(part)
        total += part.sum(0)
        squares += np.square(part).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    for i in ids:
      noise = std * np.random.default_rng([seed, i]).normal(size=mean.shape)
      rows[i] = (mean + noise if init == "normal" else mean).astype(tensor.dtype)

  def read(first, last):
    if not rows:
      make()
    piece = np.array(tensor.read(first, last))
    for i in ids:
      if first <= i < last:
        piece[i - first] = rows[i]
    return piece

  return dataclasses.replace(tensor, read=read)
