"""The first layer: rows of a table that is cut over the mesh, without ever putting it together."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from diffucoder_jax.runtime.sharding import BATCH_AXES, constrain


def lookup(embed_VD, tokens_BL, dtype):
  """The rows of a table at some ids.

  On a mesh the table is cut over (tensor, fsdp) and the rows of the batch over (data, fsdp). Each
  device looks up its columns for the rows of all devices along fsdp, and an all-to-all puts the
  columns of its own rows side by side. Only ids and results travel, never the table; the gradient
  takes the way back and is added up where its part of the table lies.

  Args:
    embed_VD: the table.
    tokens_BL: int32 ids; one outside the table reads the nearest row.
    dtype: of the result.
  Returns:
    [B, L, D]. The gradient for the table is summed in float32: half of all tokens may be the mask,
    and a bfloat16 sum of so many stops growing.
  """

  def rows(embed_VD, tokens_BL):
    return jnp.take(embed_VD.astype(jnp.float32), tokens_BL, axis=0, mode="clip").astype(dtype)

  def local(embed_VD, tokens_BL):
    size = embed_VD.shape[0]
    tokens_BL = jax.lax.all_gather(tokens_BL, "fsdp", axis=0, tiled=True)
    tokens_BL = jnp.clip(tokens_BL, 0, size * jax.lax.axis_size("tensor") - 1)
    tokens_BL -= jax.lax.axis_index("tensor") * size
    here_BL1 = ((tokens_BL >= 0) & (tokens_BL < size))[:, :, None]
    x_BLD = jax.lax.psum(jnp.where(here_BL1, rows(embed_VD, tokens_BL), 0), "tensor")
    return jax.lax.all_to_all(x_BLD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return rows(embed_VD, tokens_BL)
  tokens_BL = constrain(tokens_BL, "batch", None)  # refuses by name rows that do not divide
  batch = P(BATCH_AXES)
  return jax.shard_map(local, in_specs=(P("tensor", "fsdp"), batch), out_specs=batch)(
    embed_VD, tokens_BL
  )
