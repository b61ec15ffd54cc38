"""Splash attention: the TPU kernel that JAX brings, on one device or on every device of a mesh.

Like flash attention it never holds the scores of all pairs, and it skips blocks of keys that a
causal query cannot see. It runs on TPU; `interpret` runs the very kernel elsewhere, slowly, for
tests. `refusal` says what it cannot do.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import PartitionSpec as P

from diffucoder_jax.model import blockwise
from diffucoder_jax.runtime.sharding import BATCH_AXES

LANES = 128  # a vector register of a TPU is this wide, and a block of positions a multiple of it
LARGEST_BLOCK = 512  # positions; at 128 per head, 4096 overflow the vector memory of v6e
MASKS = {
  "full": lambda length: kernels.FullMask((length, length)),
  "causal": lambda length: kernels.CausalMask((length, length)),
}


def block_size(length):
  """(positions of a block of queries, blocks): equal parts in multiples of 128, at most 512."""
  blocks = max(1, -(-length // LARGEST_BLOCK))
  return LANES * -(-length // (LANES * blocks)), blocks


def refusal(platform, kind):
  """Why splash attention cannot run, as the end of a sentence; None: it can.

  Args:
    platform: what the program is compiled for, "tpu", "cpu" or "gpu".
    kind: of an `attention.Pattern`. An annealed one draws its pairs from a seed and a ratio that
      are only known when the step runs, and the kernel wants its mask when it is compiled.
  """
  if kind not in MASKS:
    return f"the kernel has no {kind} pattern"
  return None if platform == "tpu" else f"the kernel is for TPU, not for {platform}"


def attend(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern, interpret=False):
  """Grouped-query attention as `attention.attend` describes it.

  Rows are cut over (data, fsdp) and heads over `tensor` by the mesh in force, and nothing is
  communicated. A row whose length the blocks do not divide is filled up with padding. Padding
  gives exact zeros and passes no gradient.

  Args:
    q_BLHK, k_BMJK, v_BMJK: rotated queries and keys, values; M = L, any length, K any size.
    segment_ids_BL: int32 or None.
    pattern: an `attention.Pattern` that `refusal` does not refuse.
    interpret: run the kernel in JAX's interpreter, for devices that are no TPU.
  Returns:
    [B, L, H, K] in the dtype of `q_BLHK`.
  Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
  """
  batch, length = q_BLHK.shape[:2]
  block, blocks = block_size(length)
  extra = block * blocks - length
  if extra and segment_ids_BL is None:  # What fills the last block must stay unseen.
    segment_ids_BL = jnp.ones((batch, length), jnp.int32)

  def local(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL):
    fill = lambda x: jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    q_BHLK, k_BJMK, v_BJMK = (fill(x).swapaxes(1, 2) for x in (q_BLHK, k_BMJK, v_BMJK))
    q_BHLK = q_BHLK * q_BHLK.shape[-1] ** -0.5  # the kernel does not
    # Made here, where it is traced, so that the masks are no arrays.
    kernel = _kernel(pattern.kind, q_BHLK.shape[1], block, blocks, interpret)
    if segment_ids_BL is None:
      return jax.vmap(kernel)(q_BHLK, k_BJMK, v_BJMK).swapaxes(1, 2)
    filled_BL = fill(segment_ids_BL)
    o_BHLK = jax.vmap(kernel)(q_BHLK, k_BJMK, v_BJMK, kernels.SegmentIds(filled_BL, filled_BL))
    # To the kernel padding is a segment like any other, which sees itself.
    real_BL = segment_ids_BL > 0
    return jnp.where(real_BL[:, :, None, None], o_BHLK.swapaxes(1, 2)[:, :length], 0)

  args = (q_BLHK, k_BMJK, v_BMJK, segment_ids_BL)
  if jax.sharding.get_abstract_mesh().empty:
    return local(*args)
  heads = P(BATCH_AXES, None, "tensor", None)
  rows = None if segment_ids_BL is None else P(BATCH_AXES, None)
  # The kernel's outputs do not say over which axes they vary, hence no check.
  run = jax.shard_map(local, in_specs=(*(heads,) * 3, rows), out_specs=heads, check_vma=False)
  return run(*args)


def _kernel(kind, heads, block, blocks, interpret):
  """The kernel for one row: (q [H, L, K], k, v [J, L, K], segment ids) -> [H, L, K]."""
  length = block * blocks
  keys = 2 * block if blocks % 2 == 0 else block  # fewer, longer loads
  sizes = kernels.BlockSizes(
    block_q=block, block_kv=keys, block_kv_compute=block,
    block_q_dkv=block, block_kv_dkv=keys, block_kv_dkv_compute=block,
    block_q_dq=block, block_kv_dq=keys,
  )  # fmt: skip
  mask = kernels.MultiHeadMask([MASKS[kind](length)] * heads)
  make = functools.partial(kernels.make_splash_mha, head_shards=1, q_seq_shards=1)
  return make(
    mask, block_sizes=sizes, residual_checkpoint_name=blockwise.SAVED, interpret=interpret
  )
