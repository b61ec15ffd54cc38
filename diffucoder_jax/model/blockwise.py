"""Attention block by block: no [L, L] array in either pass, so memory grows linearly with L.

The arithmetic of flash attention (Dao et al. 2022) in plain JAX, for CPU, GPU and TPU alike: for
each block of queries a loop over the blocks of keys keeps a running maximum and sum, and the
backward pass makes each block's scores anew from the saved log-sum. Who sees whom is asked block by
block, so the random draw of annealed attention is never held whole either.

Dimension key: that of `transformer`, and S blocks, P positions of a block, R = H / J * P, the
queries of a block in all the heads that share a kv head. These stand in one matrix, so the keys and
values of grouped-query attention are never repeated.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The name by which a rematerialisation policy may keep the output and log-sums of a kernel.
SAVED = "attention"
LARGEST_BLOCK = 512
# The score of a pair that may not meet. Finite, so that no difference of two scores is NaN.
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def block_size(length):
  """Positions per block: the whole row up to 512, then equal parts in multiples of 16."""
  blocks = max(1, -(-length // LARGEST_BLOCK))
  return length if blocks == 1 else 16 * -(-length // (16 * blocks))


def attend(visible, q_BLHK, k_BMJK, v_BMJK, segment_ids_BL, pattern, block=None):
  """Grouped-query attention as `attention.attend` describes it, in memory linear in L.

  Softmax and all sums over keys are float32; products take their operands in the inputs' dtype.
  A position that sees nobody (padding) gives exact zeros and passes no gradient.

  Args:
    visible: `attention.visible`, asked with the positions of one block of queries and of keys.
    q_BLHK, k_BMJK, v_BMJK: rotated queries and keys, values; M = L, any length.
    segment_ids_BL: int32 or None.
    pattern: an `attention.Pattern`.
    block: positions per block; None: `block_size(L)`.
  Returns:
    [B, L, H, K] in the dtype of `q_BLHK`.
  """
  batch, length, heads, head_dim = q_BLHK.shape
  kv_heads = k_BMJK.shape[2]
  block = block_size(length) if block is None else block
  blocks = -(-length // block)
  extra = blocks * block - length
  if extra and segment_ids_BL is None:  # What fills the last block must stay unseen.
    segment_ids_BL = jnp.ones((1, length), jnp.int32)

  def split(x, *inner):
    """Pads and cuts [B, L, ...] into [S, B, P, *inner]."""
    x = jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2))) if extra else x
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, block, *inner), 1, 0)

  q_SBPJGK = split(q_BLHK, kv_heads, heads // kv_heads, head_dim)
  q_SBJRK = q_SBPJGK.transpose(0, 1, 3, 4, 2, 5).reshape(blocks, batch, kv_heads, -1, head_dim)
  k_SBJPK, v_SBJPK = (split(x, kv_heads, head_dim).swapaxes(2, 3) for x in (k_BMJK, v_BMJK))
  segment_ids_SBP = None if segment_ids_BL is None else split(segment_ids_BL)

  o_SBJRK = _attend(visible, q_SBJRK, k_SBJPK, v_SBJPK, segment_ids_SBP, pattern)
  o_SBJGPK = o_SBJRK.reshape(blocks, batch, kv_heads, heads // kv_heads, block, head_dim)
  o_BLHK = o_SBJGPK.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)
  return o_BLHK[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(visible, q_SBJRK, k_SBJPK, v_SBJPK, segment_ids_SBP, pattern):
  return _forward(visible, q_SBJRK, k_SBJPK, v_SBJPK, segment_ids_SBP, pattern)[0]


def _forward(visible, q_SBJRK, k_SBJPK, v_SBJPK, segment_ids_SBP, pattern):
  """Returns the output, and what `_backward` reads."""
  blocks = q_SBJRK.shape[0]

  def query_block(_, xs):
    i, q_BJRK = xs

    def key_block(j, carry):
      o_BJRK, top_BJR1, sum_BJR1 = carry
      seen = _seen(visible, pattern, segment_ids_SBP, i, j, k_SBJPK.shape[3])
      s_BJRP = _scores(q_BJRK, _at(k_SBJPK, j), seen)
      higher_BJR1 = jnp.maximum(top_BJR1, s_BJRP.max(-1, keepdims=True))
      p_BJRP, shrink_BJR1 = jnp.exp(s_BJRP - higher_BJR1), jnp.exp(top_BJR1 - higher_BJR1)
      o_BJRK = o_BJRK * shrink_BJR1 + _product("BJRP,BJPK->BJRK", p_BJRP, _at(v_SBJPK, j))
      return o_BJRK, higher_BJR1, sum_BJR1 * shrink_BJR1 + p_BJRP.sum(-1, keepdims=True)

    row_BJR1 = jnp.zeros((*q_BJRK.shape[:-1], 1), jnp.float32)
    start = jnp.zeros(q_BJRK.shape, jnp.float32), row_BJR1 + HIDDEN, row_BJR1
    o_BJRK, top_BJR1, sum_BJR1 = _loop(_key_blocks(pattern, i, blocks), key_block, start)
    # A query that saw nobody has summed hidden pairs: zero, and probabilities of zero from here on.
    saw_BJR1 = top_BJR1 > HIDDEN
    o_BJRK = jnp.where(saw_BJR1, o_BJRK / sum_BJR1, 0).astype(q_BJRK.dtype)
    return None, (o_BJRK, jnp.where(saw_BJR1, top_BJR1 + jnp.log(sum_BJR1), -HIDDEN))

  _, (o_SBJRK, logsum_SBJR1) = jax.lax.scan(query_block, None, (jnp.arange(blocks), q_SBJRK))
  o_SBJRK, logsum_SBJR1 = checkpoint_name((o_SBJRK, logsum_SBJR1), SAVED)
  inputs = q_SBJRK, k_SBJPK, v_SBJPK, segment_ids_SBP, pattern
  return o_SBJRK, (*inputs, o_SBJRK, logsum_SBJR1)


def _backward(visible, residuals, do_SBJRK):
  q_SBJRK, k_SBJPK, v_SBJPK, segment_ids_SBP, pattern, o_SBJRK, logsum_SBJR1 = residuals
  blocks, scale = q_SBJRK.shape[0], q_SBJRK.shape[-1] ** -0.5

  def query_block(carry, xs):
    i, q_BJRK, o_BJRK, logsum_BJR1, do_BJRK = xs
    inner_BJR1 = (do_BJRK.astype(jnp.float32) * o_BJRK).sum(-1, keepdims=True)

    def key_block(j, carry):
      dq_BJRK, dk_SBJPK, dv_SBJPK = carry
      k_BJPK = _at(k_SBJPK, j)
      seen = _seen(visible, pattern, segment_ids_SBP, i, j, k_SBJPK.shape[3])
      p_BJRP = jnp.exp(_scores(q_BJRK, k_BJPK, seen) - logsum_BJR1)
      dp_BJRP = _product("BJRK,BJPK->BJRP", do_BJRK, _at(v_SBJPK, j))
      ds_BJRP = p_BJRP * (dp_BJRP - inner_BJR1) * scale
      dq_BJRK += _product("BJRP,BJPK->BJRK", ds_BJRP, k_BJPK)
      dk_SBJPK = _add_at(dk_SBJPK, j, _product("BJRP,BJRK->BJPK", ds_BJRP, q_BJRK))
      dv_SBJPK = _add_at(dv_SBJPK, j, _product("BJRP,BJRK->BJPK", p_BJRP, do_BJRK))
      return dq_BJRK, dk_SBJPK, dv_SBJPK

    start = jnp.zeros(q_BJRK.shape, jnp.float32), *carry
    dq_BJRK, *carry = _loop(_key_blocks(pattern, i, blocks), key_block, start)
    return tuple(carry), dq_BJRK.astype(q_BJRK.dtype)

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_SBJPK, v_SBJPK))
  xs = jnp.arange(blocks), q_SBJRK, o_SBJRK, logsum_SBJR1, do_SBJRK
  (dk_SBJPK, dv_SBJPK), dq_SBJRK = jax.lax.scan(query_block, start, xs)
  return dq_SBJRK, dk_SBJPK.astype(k_SBJPK.dtype), dv_SBJPK.astype(v_SBJPK.dtype), None, None


_attend.defvjp(_forward, _backward)


def _key_blocks(pattern, i, blocks):
  """How many blocks of keys, from the first, query block `i` has to look at."""
  return i + 1 if pattern.kind == "causal" else blocks


def _loop(count, body, start):
  """`fori_loop(0, count, body, start)`, but never as a scan.

  The masks depend on no layer. When the layers are scanned and differentiated, JAX looks for such
  values to compute them once: it would cut a scan in two and keep the masks of all the blocks, an
  [L, L] array. It does not look into a while loop.
  """

  def step(state):
    j, carry = state
    return j + 1, body(j, carry)

  return jax.lax.while_loop(lambda state: state[0] < count, step, (jnp.int32(0), start))[1]


def _seen(visible, pattern, segment_ids_SBP, i, j, block):
  """Which pairs of query block `i` and key block `j` meet: bool [B or 1, 1, 1, P, P]; None: all."""
  index = jnp.arange(block)
  seen = visible(pattern, (i * block + index)[:, None], (j * block + index)[None, :])
  seen = None if seen is None else seen[None, None, None]
  if segment_ids_SBP is None:
    return seen
  query_segment = _at(segment_ids_SBP, i)[:, None, None, :, None]
  key_segment = _at(segment_ids_SBP, j)[:, None, None, None, :]
  same = (query_segment == key_segment) & (key_segment > 0)
  return same if seen is None else same & seen


def _scores(q_BJRK, k_BJPK, seen):
  s_BJRP = _product("BJRK,BJPK->BJRP", q_BJRK, k_BJPK) * q_BJRK.shape[-1] ** -0.5
  if seen is None:
    return s_BJRP
  s_BJGPP = s_BJRP.reshape(*s_BJRP.shape[:2], -1, *seen.shape[-2:])
  return jnp.where(seen, s_BJGPP, HIDDEN).reshape(s_BJRP.shape)


def _product(equation, x, y):
  """A product in the narrower dtype of the two, summed in float32."""
  dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
  return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _at(x, i):
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _add_at(x, i, value):
  return jax.lax.dynamic_update_index_in_dim(x, _at(x, i) + value, i, 0)
