"""Reads a Hugging Face folder of safetensors straight into sharded parameters. No PyTorch."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from diffucoder_jax.hf import mapping, shards
from diffucoder_jax.model.transformer import Transformer
from diffucoder_jax.runtime import sharding


def read_config(folder):
  """config.json of a Hugging Face folder, as a dict."""
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; a Hugging Face folder has a config.json")
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def one_device_mesh():
  """The mesh of this process's first device alone."""
  return sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])


def abstract_params(model_config, mesh):
  """The tree of parameters as `jax.ShapeDtypeStruct` with their shardings; allocates nothing."""
  # One device cuts nothing: what does not fit `mesh` is found below, where parameters have names.
  with jax.set_mesh(one_device_mesh()):
    tokens_BL = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Transformer(model_config).init, jax.random.key(0), tokens_BL)["params"]
  return sharding.abstract(boxed, mesh)


def load_params(folder, model_config, mesh=None, dtype=None):
  """Loads the weights of a Hugging Face folder (Qwen2, Llama or Dream names), one tensor at a time.

  Every name and shape is checked before anything is allocated. Each process reads only the slices
  its devices hold, so host memory stays at one tensor beyond the parameters.

  Args:
    folder: a path with model.safetensors, or model.safetensors.index.json and its shards.
    model_config: `ModelConfig`; `ModelConfig(**mapping.config_from_hf(read_config(folder)))`.
    mesh: where the parameters go; None: this process's first device.
    dtype: of the parameters; None: `model_config.param_dtype`. On disk they may be float32, float16
      or bfloat16.
  Returns:
    params, nested dicts of sharded arrays, as `Transformer(model_config).init` makes them.
  Raises:
    FileNotFoundError, ValueError: say which tensor or file is wrong and what to do.
  """
  mesh = one_device_mesh() if mesh is None else mesh
  dtype = jnp.dtype(model_config.param_dtype if dtype is None else dtype)
  abstract = abstract_params(model_config, mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))  # the caller may be on another one
    tensors = shards.open_folder(folder, stack)
    check(tensors, model_config)
    progress = _progress(model_config)
    params = {}
    for row in mapping.rows(model_config):
      leaf = mapping.get(abstract, row)
      mapping.put(params, row, _load_row(row, tensors, model_config, leaf, dtype, progress))
  return params


def check(tensors, config):
  """Compares every name, shape and dtype with what a network needs; reads headers only.

  Args:
    tensors: {name: `shards.Tensor`}. A second copy of a tied head is taken out of it.
    config: `ModelConfig`.
  Raises:
    ValueError: names the tensor and what to do.
  """
  wanted = mapping.hf_shapes(config)
  found = {name for name in tensors if not name.endswith(mapping.IGNORED_SUFFIX)}
  missing = [name for name in wanted if name not in found]
  extra = sorted(name for name in found if name not in wanted)
  if config.tied_head and mapping.HEAD in extra:
    _check_tied(tensors)
    extra.remove(mapping.HEAD)
  if missing:
    raise ValueError(
      f"{_some(missing)} missing from the safetensors files; check num_hidden_layers, model_type "
      "and tie_word_embeddings in config.json, and that the download is complete"
    )
  if extra:
    raise ValueError(
      f"{_some(extra)} in the safetensors files, but not part of this network; config.json "
      "(model_type, num_hidden_layers, tie_word_embeddings) does not describe these weights"
    )
  for name, shape in wanted.items():
    tensor = tensors[name]
    if tensor.shape != shape:
      raise ValueError(
        f"{name} in {tensor.where} has shape {tensor.shape}, but config.json asks for {shape}; one "
        "of them belongs to another model"
      )
    if tensor.dtype is None:
      raise ValueError(
        f"{name} in {tensor.where} is stored as {tensor.stored_as}; only "
        f"{', '.join(shards.DTYPES)} are read: save the weights again in one of them"
      )


def _some(names):
  shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
  return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _check_tied(tensors):
  """A tied network may store its embedding twice, but not two different matrices."""
  head, embed = tensors[mapping.HEAD], tensors[mapping.EMBED]
  if embed.dtype is None:
    return  # refused later, by name
  same = (head.shape, head.dtype) == (embed.shape, embed.dtype) and all(
    np.array_equal(head.read(*part), embed.read(*part)) for part in embed.row_ranges()
  )
  if not same:
    raise ValueError(
      f"config.json says tie_word_embeddings, but {mapping.HEAD} in {head.where} differs from "
      f"{mapping.EMBED}; set tie_word_embeddings to false to use both"
    )


def _load_row(row, tensors, config, abstract, dtype, progress):
  """One leaf of our tree: the row's tensors read, laid out, and stacked over the layers."""
  mesh, axes = abstract.sharding.mesh, tuple(abstract.sharding.spec)
  axes += (None,) * (len(abstract.shape) - len(axes))
  axes = mapping.their_axes(row, axes[1:] if row.stacked else axes)
  source, shape = NamedSharding(mesh, PartitionSpec(*axes)), mapping.their_shape(row, config)
  # Rows of one shape share a compiled program, so what tells them apart is left out.
  kind = row._replace(path=row.path[:1], name="")
  allocate, fill = _filler(kind, config, abstract.shape, dtype, abstract.sharding)
  leaf = allocate() if row.stacked else None
  for i, name in enumerate(row.names(config)):
    tensor = jax.make_array_from_callback(shape, source, _reader(tensors[name]))
    leaf, finite = fill(leaf, tensor, i)
    if not bool(finite):  # Waits for the device, so that the host holds one tensor at a time.
      raise ValueError(
        f"{name} in {tensors[name].where} has NaN or infinite values (as {dtype}); the file is "
        "damaged, or the training that made it diverged"
      )
    progress(tensor.nbytes)
  return leaf


@functools.lru_cache
def _filler(kind, config, shape, dtype, target):
  """Compiled functions: one makes an empty leaf, one puts a tensor into it (and checks it)."""

  def fill(leaf, tensor, i):
    tensor = mapping.to_ours(kind, tensor, config).astype(dtype)
    finite = jnp.isfinite(tensor).all()
    if kind.stacked:
      tensor = jax.lax.dynamic_update_index_in_dim(leaf, tensor, i, 0)
    return tensor, finite

  out_shardings = (target, sharding.replicated(target.mesh))
  allocate = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=target)
  return allocate, jax.jit(fill, donate_argnums=0, out_shardings=out_shardings)


def _reader(tensor):
  """Reads slices of a stored tensor; rows that several local devices want are read once."""
  read = {}

  def slice_at(index):
    first, last, _ = index[0].indices(tensor.shape[0])
    if (first, last) not in read:
      read[first, last] = tensor.read(first, last)
    return read[first, last][:, *index[1:]]

  return slice_at


def _progress(config):
  """A function to call with the bytes of each tensor; logs about every GB of a large folder."""
  total = len(mapping.hf_shapes(config))
  done = {"tensors": 0, "bytes": 0, "next": 1e9}

  def advance(num_bytes):
    done["tensors"] += 1
    done["bytes"] += num_bytes
    if done["bytes"] >= done["next"] and sharding.is_main_process():
      done["next"] += 1e9
      logging.info("read %d of %d tensors, %.1f GB", done["tensors"], total, done["bytes"] / 1e9)

  return advance
