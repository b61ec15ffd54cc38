"""Block-wise denoising with a cache: most places keep the keys and values they had at the last refresh.

In a network that sees both ways everything depends on everything, so that a cache is an approximation
(Fast-dLLM, Wu et al. 2025, arXiv 2505.22618): exact at a refresh, and older with each token that is
written after it. `SamplerConfig.refresh` says how old it may become; at 1 nothing is approximated.

Differences from Fast-dLLM's code: rows of a batch may be of any length (it allows no padding and, with
the dual cache or a threshold, one row); the place before the block is computed with it, since its
hidden state is what scores the block's first token (there that token is committed at the refresh,
whatever its confidence).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Which places are computed anew at each step, [first, last): (block's first, block's last, length).
WINDOWS = {
  "dual": lambda first, last, length: (first - 1, last),  # the block alone
  "prefix": lambda first, last, length: (first - 1, length),  # and all that is behind it
}


class Kept(NamedTuple):
  """What goes from one evaluation to the next."""

  arrays: Any  # of the last refresh, what `fresh` gave
  evaluations: jax.Array  # int32 scalar, of the block so far


def look(network, canvas_BL, valid_BL, start, refresh, kept):
  """Logits (or features) of the block of W places that begins at `start`, and what is kept.

  Args:
    network: (fresh, again). fresh: (canvas_BL, valid_BL, start) -> (logits_BWV, arrays), from the whole
      canvas; again: (canvas_BL, valid_BL, start, arrays) -> logits_BWV, from some places and the rest.
    refresh: `SamplerConfig.refresh`. Evaluations are counted and not steps: those at which the schedule
      commits nothing are not evaluated, and which they are hangs on how many places are forced.
    kept: `Kept`.
  Returns:
    (logits_BWV, kept).
  """
  fresh, again = network
  due = kept.evaluations == 0
  if refresh:
    due = kept.evaluations % refresh == 0
  logits_BWV, arrays = jax.lax.cond(
    due,
    lambda: fresh(canvas_BL, valid_BL, start),
    lambda: (again(canvas_BL, valid_BL, start, kept.arrays), kept.arrays),
  )
  return logits_BWV, Kept(arrays, kept.evaluations + 1)


def nothing_kept(network, canvas_BL, valid_BL):
  """`Kept` before the first evaluation; arguments as for `look`."""
  shapes = jax.eval_shape(lambda: network[0](canvas_BL, valid_BL, 1)[1])
  arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return Kept(arrays, jnp.zeros((), jnp.int32))


def at_block(kept):
  """`Kept` as a block begins: its first evaluation reads the whole canvas."""
  return kept._replace(evaluations=jnp.zeros((), jnp.int32))


def check(config, masks):
  """Raises ValueError where `config.cache` cannot be used for rows of so many masks in all: blocks have
  to lie at the same places in all rows, at their ends, and not in holes."""
  if config.cache != "none" and masks != config.max_new_tokens:
    raise ValueError(
      f"sampler.cache is {config.cache!r}, and a row has {masks} masks where {config.max_new_tokens} "
      "new tokens are asked for; holes cannot be cached: use none"
    )
