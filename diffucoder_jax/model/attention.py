"""Who sees whom, rotary positions, and the attention kernels by name."""

import functools

import flax
import jax
import jax.numpy as jnp
from absl import logging

from diffucoder_jax.model import blockwise, splash
from diffucoder_jax.runtime import sharding


@flax.struct.dataclass
class Pattern:
  """Which keys a query may see, besides the rule that segments never mix.

  `ratio` and `seed` are only set for `annealed`; they are traced, so that one compiled step serves
  the whole annealing.
  """

  kind: str = flax.struct.field(pytree_node=False)
  ratio: jax.Array | None = None  # float32 scalar in [0, 1]
  seed: jax.Array | None = None  # uint32 [2]


FULL = Pattern("full")
CAUSAL = Pattern("causal")
PATTERNS = {"full": FULL, "causal": CAUSAL}


def annealed(ratio, key):
  """Causal attention plus a random share `ratio` of the later positions (attention annealing).

  One draw is shared by the batch, the heads and the layers. Ratio 0 is causal, 1 is full.
  Source: DiffuLLaMA `get_anneal_attn_mask`, which DiffuCoder follows (paper, B.1). There an [L, L]
  matrix is drawn; here the draw for (query, key) is a hash of the two positions, so a kernel can
  evaluate any block of it without that matrix, and it replays from the seed alone.
  """
  seed = jax.random.key_data(key).reshape(-1)[-2:].astype(jnp.uint32)
  return Pattern("annealed", jnp.asarray(ratio, jnp.float32), seed)


def hash_uniform(seed, query_index, key_index):
  """Uniform float32 in [0, 1) for each pair of positions: murmur3's finaliser over both indices.

  Args:
    seed: uint32 [2].
    query_index, key_index: int arrays that broadcast against each other.
  """
  x = query_index.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + seed[0]
  for word in (key_index.astype(jnp.uint32) * jnp.uint32(0x85EBCA77) + seed[1], jnp.uint32(0)):
    x = x ^ word
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x = x ^ (x >> 16)
  return (x >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def visible(pattern, query_index, key_index):
  """True where a query may see a key by position, or None when every pair may.

  Args:
    pattern: a `Pattern`.
    query_index, key_index: int32 positions in the row, shaped to broadcast (say [L, 1] and [1, M]).
  """
  if pattern.kind == "full":
    return None
  earlier = key_index <= query_index
  if pattern.kind == "causal":
    return earlier
  return earlier | (hash_uniform(pattern.seed, query_index, key_index) < pattern.ratio)


def rotary(positions_BL, head_dim, theta):
  """Cosines and sines of the rotary angles, float32 [B, L, head_dim / 2]."""
  inverse_frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)

  def tables(positions_BL):
    angles = positions_BL.astype(jnp.float32)[:, :, None] * inverse_frequency[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)

  if sharding.platform() == "cpu":
    # XLA would compute them again in every loop that reads them, for each head of each layer; what a
    # branch returns it keeps. Either branch is right for any position: sin(-a) is -sin(a). Which one is
    # taken must hang on something that XLA cannot know: it knows that counted positions are not negative.
    def mirrored(positions_BL):
      cos_BLk, sin_BLk = tables(-positions_BL)
      return cos_BLk, -sin_BLk

    return jax.lax.cond(jnp.any(positions_BL > 2**30), mirrored, tables, positions_BL)
  return tables(positions_BL)


def rotate(x_BLHK, cos_BLk, sin_BLk):
  """Rotates the two halves of each head (not interleaved pairs), in float32."""
  x, cos, sin = x_BLHK.astype(jnp.float32), cos_BLk[:, :, None, :], sin_BLk[:, :, None, :]
  if sharding.platform() == "cpu":
    # XLA's loops there branch at each number of a concatenation; halves as an axis need none, neither
    # here nor backward. A training step of 31M parameters takes a thirtieth less so.
    x_BLH2k = x.reshape(*x.shape[:-1], 2, -1)
    signs_11121 = jnp.asarray([-1.0, 1.0], jnp.float32)[None, None, None, :, None]
    cos, sin = cos[..., None, :], sin[..., None, :] * signs_11121
    rotated = x_BLH2k * cos + jnp.flip(x_BLH2k, -2) * sin
    return rotated.reshape(x.shape).astype(x_BLHK.dtype)
  first, second = jnp.split(x, 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BLHK.dtype)


def _mask(segment_ids_BL, pattern, length):
  """bool, broadcastable to [B, 1, L, M], true where a query sees a key; None: everywhere."""
  index = jnp.arange(length)
  seen_LM = visible(pattern, index[:, None], index[None, :])
  mask_B1LM = None if seen_LM is None else seen_LM[None, None]
  if segment_ids_BL is not None:
    query_segment, key_segment = segment_ids_BL[:, None, :, None], segment_ids_BL[:, None, None, :]
    same_B1LM = (query_segment == key_segment) & (key_segment > 0)
    mask_B1LM = same_B1LM if mask_B1LM is None else same_B1LM & mask_B1LM
  return mask_B1LM


def _xla(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern):
  mask_B1LM = _mask(segment_ids_BL, pattern, q_BLHK.shape[1])
  return over_all_pairs(q_BLHK, [(k_BMJK, v_BMJK, mask_B1LM)])


def over_all_pairs(q_BLHK, parts):
  """Attention as one softmax over the scores of all pairs, float32; products take their operands in the
  inputs' dtype.

  The queries of all heads that share a kv head stand in one matrix (R = H / J * L rows), so nothing of
  all pairs is ever transposed; and what the values add up to is divided, not the weights before, so that
  the backward pass reads rows of K and not of M for it (as flash attention, Dao et al. 2022). On CPU a
  training step of 31M parameters takes about a twentieth less so than with
  `jax.nn.dot_product_attention`.

  Args:
    q_BLHK: rotated queries.
    parts: list of (k_BMJK, v_BMJK, mask_B1LM), the keys in parts that are read where they are, M of
      each its own; a mask is bool and broadcasts, None: all are seen.
  Returns:
    [B, L, H, K] in the dtype of `q_BLHK`; finite and meaningless where a query sees nothing.
  """
  (batch, length, heads, head_dim), kv_heads = q_BLHK.shape, parts[0][0].shape[2]
  groups = heads // kv_heads
  into_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  q_BLJGK = q_BLHK.reshape(batch, length, kv_heads, groups, head_dim)
  q_BJRK = q_BLJGK.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)

  def scores(k_BMJK, mask_B1LM):
    s_BJRM = into_float32("BJRK,BJMK->BJRM", q_BJRK, k_BMJK.swapaxes(1, 2)) * head_dim**-0.5
    if mask_B1LM is None:
      return s_BJRM
    s_BJGLM = s_BJRM.reshape(batch, kv_heads, groups, length, -1)
    return jnp.where(mask_B1LM[:, :, None], s_BJGLM, blockwise.HIDDEN).reshape(s_BJRM.shape)

  all_scores = [scores(k_BMJK, mask_B1LM) for k_BMJK, _, mask_B1LM in parts]
  largest = [jnp.max(s_BJRM, -1, keepdims=True) for s_BJRM in all_scores]
  largest_BJR1 = jax.lax.stop_gradient(functools.reduce(jnp.maximum, largest))
  o_BJRK, sum_BJR1 = 0.0, 0.0
  for s_BJRM, (_, v_BMJK, _) in zip(all_scores, parts, strict=True):
    w_BJRM = jnp.exp(s_BJRM - largest_BJR1)
    sum_BJR1 += jnp.sum(w_BJRM, -1, keepdims=True)
    w_BJRM = w_BJRM.astype(v_BMJK.dtype)
    o_BJRK += into_float32("BJRM,BJMK->BJRK", w_BJRM, v_BMJK.swapaxes(1, 2))
  o_BJGLK = (o_BJRK / sum_BJR1).astype(q_BLHK.dtype).reshape(batch, kv_heads, groups, length, -1)
  return o_BJGLK.transpose(0, 3, 1, 2, 4).reshape(q_BLHK.shape)


_blockwise = functools.partial(blockwise.attend, visible)


@functools.cache  # once for each reason
def _say(name, reason):
  logging.info("attention_impl %r: blockwise instead, because %s", name, reason)


def _splash(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern):
  reason = splash.refusal(sharding.platform(), pattern.kind)
  if reason is None:
    return splash.attend(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern)
  _say("splash", reason)
  return _blockwise(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern)


def _cudnn(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern):
  """cuDNN's flash attention, with who sees whom as one [B, 1, L, M] mask. Never run by us."""
  platform, (*_, head_dim) = sharding.platform(), q_BLHK.shape
  reason = None
  if platform not in ("gpu", "cuda"):
    reason = f"cuDNN is for NVIDIA GPUs, not for {platform}"
  elif pattern.kind not in PATTERNS:
    reason = f"its mask of the {pattern.kind} pattern would hold all pairs"
  elif q_BLHK.dtype not in (jnp.bfloat16, jnp.float16):
    reason = f"cuDNN has no {q_BLHK.dtype}"
  elif head_dim > 128 or head_dim % 8:
    reason = f"cuDNN has no heads of {head_dim}"
  if reason is not None:
    _say("cudnn", reason)
    return _blockwise(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern)
  mask_B1LM = None if segment_ids_BL is None else _mask(segment_ids_BL, FULL, q_BLHK.shape[1])
  o_BLHK = jax.nn.dot_product_attention(
    q_BLHK, k_BMJK, v_BMJK, mask=mask_B1LM, is_causal=pattern.kind == "causal",
    implementation="cudnn",
  )  # fmt: skip
  if segment_ids_BL is None:
    return o_BLHK
  return jnp.where((segment_ids_BL > 0)[:, :, None, None], o_BLHK, 0)


# "xla" holds the scores of all pairs, "blockwise" those of one block of pairs at a time, on any
# device. "splash" (TPU) and "cudnn" (NVIDIA GPU) are their makers' kernels; where these cannot run,
# a line in the log says so and why, and "blockwise" does it.
IMPLEMENTATIONS = {"xla": _xla, "blockwise": _blockwise, "splash": _splash, "cudnn": _cudnn}


def attend(q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern, implementation="xla"):
  """Grouped-query attention; key head j serves the query heads j*H/J .. (j+1)*H/J - 1.

  Args:
    q_BLHK, k_BMJK, v_BMJK: rotated queries and keys, values; M = L.
    segment_ids_BL: int32, attention stays inside equal ids, 0 is padding that nobody sees and that
      sees nobody (its output is finite and meaningless); None: one segment everywhere.
    pattern: a `Pattern`.
    implementation: a key of `IMPLEMENTATIONS`; all give the same numbers within rounding.
  Returns:
    [B, L, H, K] in the dtype of `q_BLHK`.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown attention implementation {implementation!r}; choose one of {sorted(IMPLEMENTATIONS)}"
    )
  return IMPLEMENTATIONS[implementation](q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern)
