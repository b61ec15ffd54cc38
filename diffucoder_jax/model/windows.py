"""Some places of a canvas computed anew, the others as they were, for `diffusion/cache.py`."""

import functools

import jax
import jax.numpy as jnp

from diffucoder_jax.model import kv_cache, layout
from diffucoder_jax.model.transformer import (
  Transformer,
  canvas_features_fn,
  next_logits_fn,
  positions_of,
  unembed_fn,
)


@functools.cache
def network(config):
  """A network as `diffusion.queue.write` runs it; the same functions for the same `ModelConfig`, since
  programs are kept by them.

  Returns:
    (any_order, in_order). any_order: (params, width, window) -> (`features_fn`, `unembed_fn`).
    in_order: (params, valid_BL) -> `next_logits_fn`; None where attention is not causal.
  """
  model = Transformer(config)

  def any_order(params, width, window):
    laid_out = layout.for_many_reads(config, params)
    return features_fn(model, laid_out, width, window), unembed_fn(model, params)

  in_order = functools.partial(next_logits_fn, model) if config.attention == "causal" else None
  return any_order, in_order


def features_fn(model, params, width, window):
  """What `diffusion.sampler.generate` asks for features: `canvas_features_fn`, or with a window a pair.

  Args:
    model, params: with a window, of a network that sees both ways.
    width: W, places of a block.
    window: None, or (first, last, length) -> (first, last): which places `again` computes for a block
      that begins at `first` and ends before `last`. They begin with the one before the block, and end
      with the block or the canvas.
  Returns:
    a function, or (fresh, again) as of `diffusion.cache.look`.
  """
  if window is None:
    return canvas_features_fn(model, params)
  if model.config.attention != "full":
    raise ValueError(
      f"model.attention is {model.config.attention!r}; caches of blocks are for networks that see "
      "both ways"
    )

  def block_features(hidden_BXD, valid_BX, at):
    """Aligned features of the W places behind place `at` of those computed."""
    cut = lambda x, first, size: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)  # noqa: E731
    before_BWD = cut(hidden_BXD, at, width)
    # Nothing stands before the first token of a row: it keeps its own state (`align_with_targets`).
    own_B1D, has_B1 = cut(hidden_BXD, at + 1, 1), cut(valid_BX, at, 1)
    first_B1D = jnp.where(has_B1[..., None], before_BWD[:, :1], own_B1D)
    return jnp.concatenate([first_B1D, before_BWD[:, 1:]], axis=1)

  def fresh(canvas_BL, valid_BL, start):
    empty = kv_cache.nothing(model.config, len(canvas_BL))
    segment_ids_BL = valid_BL.astype(jnp.int32)
    hidden_BLD, kept = model.apply(
      {"params": params}, canvas_BL, segment_ids_BL, positions_of(valid_BL), None, empty
    )
    return block_features(hidden_BLD, valid_BL, start - 1), kept

  def again(canvas_BL, valid_BL, start, kept):
    length = canvas_BL.shape[1]
    first, last = window(start, start + width, length)
    positions_BL = positions_of(valid_BL)

    def read(size):
      """The last `size` places before `last`."""

      def run():
        begin = jnp.asarray(last - size, jnp.int32)
        cut = lambda x_BL: jax.lax.dynamic_slice_in_dim(x_BL, begin, size, axis=1)  # noqa: E731
        index_BX = jnp.broadcast_to(begin + jnp.arange(size), (len(canvas_BL), size))
        hidden_BXD, _ = model.apply(
          {"params": params}, cut(canvas_BL), cut(valid_BL).astype(jnp.int32), cut(positions_BL),
          None, kept, index_BX,
        )  # fmt: skip
        return block_features(hidden_BXD, cut(valid_BL), first - begin)

      return run

    sizes = _sizes(width, length, window)
    kind = jnp.sum(last - first > jnp.asarray(sizes))
    return jax.lax.switch(kind, [read(size) for size in sizes])

  return fresh, again


def _sizes(width, length, window):
  """Numbers of places that are computed together, ascending: those of the last block, and doubled up to
  the first one's. Fewer programs to compile than blocks."""
  first, last = window(length - width, length, length)
  sizes = [last - first]
  farthest = window(1, 1 + width, length)
  while sizes[-1] < farthest[1] - farthest[0]:
    sizes.append(min(2 * sizes[-1], farthest[1] - farthest[0]))
  return sizes
