"""Where arrays live: the mesh, the one rule table from logical to mesh axes, and batches.

The mesh always has the axes ("data", "fsdp", "tensor"); one device is the 1x1x1 mesh of the same
path. The user picks a parallelism by mesh shape alone.
"""

import math

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffucoder_jax.runtime import flags, hosts

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES = (
  ("batch", BATCH_AXES),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("layers", None),
)


def is_main_process():
  """True on the one process that writes text and metrics."""
  return jax.process_index() == 0


def make_mesh(mesh_config, devices=None):
  """Builds the ("data", "fsdp", "tensor") mesh; one size may be -1, meaning "the rest".

  Args:
    mesh_config: mapping with the int sizes `data`, `fsdp`, `tensor`.
    devices: the devices to use; all of them when None.
  Raises:
    ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of the
      number of TPU slices: only it may cross the network between them.
  """
  flags.set_flags()  # for programs that make no use of `start_distributed`
  hosts.enough_threads()
  devices = jax.devices() if devices is None else devices
  sizes = [int(mesh_config[axis]) for axis in AXES]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    asked = ", ".join(f"{axis}={int(mesh_config[axis])}" for axis in AXES)
    raise ValueError(
      f"mesh ({asked}) does not fit {len(devices)} devices: the three sizes must multiply to "
      f"{len(devices)}; give at most one of them as -1 to fill it in"
    )
  grid = _grid(sizes, devices)
  # Linen does not run on Explicit meshes (constraints become asserts), so every axis is Auto.
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(sizes, devices):
  """The devices in the mesh's shape, slice by slice along `data`, neighbours next to each other.

  Each process must hold one block of rows (`batch_shard`). The order that follows a torus's links
  scatters them on most shapes (v5p-64, v6e-64); then devices go host by host, whose chips are
  neighbours too. Collectives find their links by themselves.
  """
  slices = {}
  for device in devices:
    of_tpu = device.platform == "tpu"
    slices.setdefault(getattr(device, "slice_index", 0) if of_tpu else 0, []).append(device)
  if len(slices) > 1:
    data, rest = divmod(sizes[0], len(slices))
    if rest:
      raise ValueError(
        f"mesh data={sizes[0]} cannot be divided over {len(slices)} TPU slices; make it a multiple"
      )
    parts = [_grid((data, *sizes[1:]), slices[index]) for index in sorted(slices)]
    return np.concatenate(parts)
  grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  held = {}  # {process: rows}
  for row, group in enumerate(grid.reshape(-1, sizes[2])):
    for device in group:
      held.setdefault(device.process_index, set()).add(row)
  if all(_is_block(sorted(rows), sizes[0] * sizes[1]) for rows in held.values()):
    return grid
  by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
  return np.asarray(by_host).reshape(sizes)


def _is_block(rows, count):
  """Whether sorted row numbers are one of the equal blocks that `count` rows can be cut into."""
  whole = rows == list(range(rows[0], rows[0] + len(rows)))
  return whole and not rows[0] % len(rows) and not count % len(rows)


def platform():
  """What is compiled for, "tpu", "gpu" or "cpu": that of the mesh in force, else of this machine.

  The two differ when a program is compiled here for a TPU elsewhere.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _mesh_axes(logical_axes):
  known = dict(RULES)
  for axis in logical_axes:
    if axis is not None and axis not in known:
      raise ValueError(f"logical axis {axis!r} has no rule; the rules know {sorted(known)}")
  return PartitionSpec(*(None if axis is None else known[axis] for axis in logical_axes))


def _check_divisible(name, shape, spec, mesh):
  for size, axes in zip(shape, spec, strict=False):
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
      raise ValueError(
        f"{name} has a dimension of {size}, which mesh axes {axes} cannot divide into {shards} equal "
        f"parts; choose mesh sizes whose product divides {size}"
      )


def constrain(x, *logical_axes):
  """Pins activation `x` to the mesh by logical axis names; the identity when no mesh is set.

  JAX silently replicates a constrained dimension that does not divide, and Flax silently skips
  constraints outside its context; both are errors here.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = _mesh_axes(logical_axes)
  if len(spec) != x.ndim:
    raise ValueError(f"constrain got axes {logical_axes} for an array of shape {x.shape}")
  _check_divisible(f"an activation with axes {logical_axes}", x.shape, spec, mesh)
  return jax.lax.with_sharding_constraint(x, spec)


def shardings(boxed, mesh):
  """Shardings of a tree whose parameters carry logical axes (Linen metadata boxes).

  Args:
    boxed: abstract tree, e.g. `jax.eval_shape` of an init that returns Linen variables.
    mesh: the mesh.
  Returns:
    the tree, unboxed, with a `NamedSharding` at each leaf.
  Raises:
    ValueError: names the parameter that an axis does not divide.
  """

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_boxed = isinstance(leaf, nn.LogicallyPartitioned)
    spec = _mesh_axes(leaf.names) if is_boxed else PartitionSpec()
    _check_divisible(
      f"parameter {name}", leaf.unbox().shape if is_boxed else leaf.shape, spec, mesh
    )
    return NamedSharding(mesh, spec)

  is_leaf = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_leaf)


def abstract(boxed, mesh):
  """The unboxed tree of `jax.ShapeDtypeStruct` with shardings: what to restore or compile for."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    nn.unbox(boxed),
    shardings(boxed, mesh),
  )


def replicated(mesh):
  """The sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
  """The sharding of an array whose first dimension is the global batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh=None):
  """Into how many parts a batch is cut; of the mesh in force when `mesh` is None (1 without one)."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_shard(mesh):
  """Which rows of each global batch this process must read.

  Returns:
    (index, count): the batch is cut into `count` equal blocks of rows, this process reads block
    `index`. Processes that only differ along `tensor` read the same block.
  """
  shards = batch_shards(mesh)
  # One row per shard is enough to see who holds which part of the batch.
  held = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
  rows = sorted({(index[0].start or 0) for index in held})
  if not _is_block(rows, shards):
    raise ValueError(
      f"this mesh gives process {jax.process_index()} the batch shards {rows}, which are not one "
      "block; choose mesh sizes so that each process holds neighbouring rows"
    )
  return rows[0] // len(rows), shards // len(rows)


def put_batch(batch, mesh):
  """Makes global device arrays of this process's rows (numpy arrays, first dimension = rows)."""
  sharding = batch_sharding(mesh)
  _, count = batch_shard(mesh)
  shards = batch_shards(mesh)

  def put(x):
    rows = x.shape[0] * count
    if rows % shards:
      raise ValueError(
        f"a global batch of {rows} rows cannot be divided over {shards} devices "
        f"(mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}); make it a multiple, or set "
        "data.fill_batch in training"
      )
    return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

  return jax.tree.map(put, batch)


def local_rows(x):
  """This process's block of an array that is sharded by rows, as numpy."""
  blocks = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])


def all_rows(x, mesh):
  """The whole array on every process, from this process's block of its rows (numpy)."""
  if jax.process_count() == 1:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  _, count = batch_shard(mesh)
  index = np.asarray(batch_shard(mesh)[0])
  blocks, indices = multihost_utils.process_allgather((np.asarray(x), index))
  # Processes that differ along `tensor` only hold the same block: the first one counts.
  return np.concatenate([blocks[int(np.argmax(indices == i))] for i in range(count)])


def log_mesh(mesh):
  """One line saying what the program runs on."""
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  logging.info(
    "mesh: %s on %d %s device(s), %d process(es)",
    shape,
    mesh.size,
    jax.devices()[0].device_kind,
    jax.process_count(),
  )
