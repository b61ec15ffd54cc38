"""Keys and values that are kept, so that only the tokens that changed go through the network again.

A `Cache` is plain arrays, passed in and out: `Transformer` reads one and returns the keys and values of
the tokens it was given, and the caller decides which of them to keep and where (`write`). A causal
network needs no position twice, so decoding with it computes what the whole canvas would. The same
call serves a network that sees both ways, of which some positions are kept although they would change.

Dimension key: that of `transformer`; here L are the tokens that are computed and M the cached places.
"""

import flax
import jax
import jax.numpy as jnp

from diffucoder_jax.model import attention
from diffucoder_jax.runtime.sharding import constrain


@flax.struct.dataclass
class Cache:
  """Keys and values of all layers for M places of each row, place m being the m-th of the row."""

  keys: jax.Array  # [N, B, M, J, K], rotated, in the compute dtype
  values: jax.Array  # [N, B, M, J, K]
  segment_ids: jax.Array  # int32 [B, M]; 0: nobody sees this place (padding, or not yet written)


def nothing(config, batch):
  """A cache of no places: what the first tokens of rows are computed with."""
  shape = (config.num_layers, batch, 0, config.num_kv_heads, config.head_dim)
  empty = jnp.zeros(shape, config.compute_dtype)
  return Cache(empty, empty, jnp.zeros((batch, 0), jnp.int32))


def extend(cache, length):
  """The cache with room for `length` places; nobody sees the new ones until they are written."""
  more = length - cache.segment_ids.shape[1]
  pad = lambda x: _placed(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))))  # noqa: E731
  return Cache(pad(cache.keys), pad(cache.values), jnp.pad(cache.segment_ids, ((0, 0), (0, more))))


def write(cache, fresh, start):
  """The cache with the places `start`, `start` + 1, ... of all rows taken from `fresh`.

  Args:
    cache: `Cache` of M places.
    fresh: `Cache` of at most M places, such as the network returns. start: int or int32 scalar.
  """
  put = jax.lax.dynamic_update_slice_in_dim
  return Cache(
    _placed(put(cache.keys, fresh.keys, start, 2)),
    _placed(put(cache.values, fresh.values, start, 2)),
    put(cache.segment_ids, fresh.segment_ids, start, 1),
  )


def _placed(x_NBMJK):
  return constrain(x_NBMJK, "layers", "batch", None, "kv_heads", None)


def seen(cache, pattern, segment_ids_BL, index_BL):
  """Which cached places and which of the tokens themselves each token may see.

  A cached place that is computed anew is not seen in its old state.

  Args:
    cache: `Cache`. pattern: `attention.Pattern`.
    segment_ids_BL: int32, of the tokens that are computed.
    index_BL: int32, their places in the row.
  Returns:
    bool [B, L, M + L]: the cached places first.
  """
  batch, places = cache.segment_ids.shape
  cached_BM = jnp.broadcast_to(jnp.arange(places)[None, :], (batch, places))
  renewed_BM = jnp.any(cached_BM[:, :, None] == index_BL[:, None, :], axis=2)
  key_index_BX = jnp.concatenate([cached_BM, index_BL], axis=1)
  key_segment_BX = jnp.concatenate(
    [jnp.where(renewed_BM, 0, cache.segment_ids), segment_ids_BL], axis=1
  )
  seen_BLX = segment_ids_BL[:, :, None] == key_segment_BX[:, None, :]
  seen_BLX &= key_segment_BX[:, None, :] > 0
  by_place = attention.visible(pattern, index_BL[:, :, None], key_index_BX[:, None, :])
  return seen_BLX if by_place is None else seen_BLX & by_place


def attend(q_BLHK, k_BLJK, v_BLJK, keys_BMJK, values_BMJK, seen_BLX):
  """Grouped-query attention of tokens to cached places and to themselves, as one softmax.

  The two halves meet in the sums, so the cached half is read and never copied. Softmax is float32.

  Args:
    q_BLHK, k_BLJK, v_BLJK: of the tokens, rotated.
    keys_BMJK, values_BMJK: of one layer of the cache.
    seen_BLX: as of `seen`.
  Returns:
    [B, L, H, K] in the dtype of `q_BLHK`.
  """
  places = keys_BMJK.shape[1]
  seen_B1LX = seen_BLX[:, None]
  return attention.over_all_pairs(
    q_BLHK,
    [
      (keys_BMJK, values_BMJK, seen_B1LX[..., :places]),
      (k_BLJK, v_BLJK, seen_B1LX[..., places:]),
    ],
  )
