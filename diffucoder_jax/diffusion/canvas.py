"""Canvases: rows of tokens in which masks stand for what is to be written, and which places these are."""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.diffusion.pace import Pace


@flax.struct.dataclass
class Rows:
  """What stays the same of rows while they are denoised. S places of each may be written."""

  canvas: jax.Array  # int32 [B, L]
  valid: jax.Array  # bool [B, L]
  keys: jax.Array  # [B]
  pace: Pace
  index: jax.Array  # int32 [B, S], the places, in their order; where a row has fewer, any others
  generated: jax.Array  # bool [B, S], False at those others
  rank: jax.Array  # int32 [B, L], which of the S a place is, where `written`
  written: jax.Array  # bool [B, L]
  logical: jax.Array  # int32 [B, S], each place's number among the row's real tokens


def rows_of(canvas, valid, keys, pace, mask_id, slots):
  """`Rows` of a canvas with S = `slots`, which may be more than its L places; None: all places."""
  written_BL = (canvas == mask_id) & valid
  logical_BL = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
  length = canvas.shape[1]
  if slots is None:
    index_BS = rank_BL = jnp.broadcast_to(jnp.arange(length), canvas.shape)
    generated_BS, logical_BS = written_BL, logical_BL
  else:
    index_BL = jnp.argsort(~written_BL, axis=1, stable=True)
    more = max(0, slots - length)  # the last block may reach beyond
    index_BS = jnp.pad(index_BL, ((0, 0), (0, more)), mode="edge")[:, :slots]
    rank_BL = jnp.clip(jnp.cumsum(written_BL, axis=1) - 1, 0, slots - 1)
    generated_BS = jnp.arange(slots)[None, :] < jnp.sum(written_BL, axis=1, keepdims=True)
    logical_BS = jnp.take_along_axis(logical_BL, index_BS, axis=1)
  return Rows(canvas, valid, keys, pace, index_BS, generated_BS, rank_BL, written_BL, logical_BS)


def choose(flags_BS, x_BS, others_BS):
  """`jnp.where` for [B, S, ...]."""
  more = (1,) * (jnp.ndim(x_BS) - 2)
  return jnp.where(flags_BS.reshape(*flags_BS.shape, *more), x_BS, others_BS)


def put(rows, x_BS, others_BL):
  """[B, S] on the canvas, `others_BL` (may be a number) elsewhere; also for [B, S, ...]."""
  more = (1,) * (x_BS.ndim - 2)
  found_BL = jnp.take_along_axis(x_BS, rows.rank.reshape(*rows.rank.shape, *more), axis=1)
  return choose(rows.written, found_BL, others_BL)


def places(rows):
  """Which of its row's own places each of the S is, int32 [B, S]; -1: none."""
  return jnp.where(rows.generated, jnp.cumsum(rows.generated, axis=1) - 1, -1)


def by_place(rows, x_BS, others):
  """[B, S] in the order of the row's places; `others`, a number, behind the last."""
  order_BS = jnp.argsort(~rows.generated, axis=1, stable=True)
  count_B1 = jnp.sum(rows.generated, axis=1, keepdims=True)
  is_place_BS = jnp.arange(x_BS.shape[1])[None] < count_B1
  return jnp.where(is_place_BS, jnp.take_along_axis(x_BS, order_BS, axis=1), others)


def lay_out(rows, length, new, mask_id):
  """Canvases for `generate`: rows, left-padded to one length, with `new` masks behind each.

  Args:
    rows: lists of token ids. length: int, at least the longest row and `new`. mask_id: int.
  Returns:
    (canvas int32, valid bool), numpy [B, length].
  """
  canvas_BL = np.zeros((len(rows), length), np.int32)
  valid_BL = np.zeros((len(rows), length), bool)
  for b, row in enumerate(rows):
    canvas_BL[b, length - new :] = mask_id
    canvas_BL[b, length - new - len(row) : length - new] = row
    valid_BL[b, length - new - len(row) :] = True
  return canvas_BL, valid_BL
