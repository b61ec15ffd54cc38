"""Block-wise denoising with a cache: most places keep the keys and values they had at the last refresh.

In a network that sees both ways everything depends on everything, so that a cache is an approximation
(Fast-dLLM, Wu et al. 2025, arXiv 2505.22618): exact at a refresh, and older with each token that is
written after it. `SamplerConfig.refresh` says how old it may become; at 1 nothing is approximated.

Differences from Fast-dLLM's code: rows of a batch may be of any length (it allows no padding and, with
the dual cache or a threshold, one row); the place before the block is computed with it, since its
hidden state is what scores the block's first token (there that token is committed at the refresh,
whatever its confidence).
"""

import jax
import numpy as np

from diffucoder_jax.diffusion import remasking

# Which places are computed anew at each step, [first, last): (block's first, block's last, length).
WINDOWS = {
  "dual": lambda first, last, length: (first - 1, last),  # the block alone
  "prefix": lambda first, last, length: (first - 1, length),  # and all that is behind it
}


def look(network, canvas_BL, valid_BL, start, refresh, kept):
  """Logits (or features) of the block of W places that begins at `start`, and what is kept.

  Args:
    network: (fresh, again). fresh: (canvas_BL, valid_BL, start) -> (logits_BWV, kept), from the whole
      canvas; again: (canvas_BL, valid_BL, start, kept) -> logits_BWV, from some places and the rest.
    refresh: bool scalar, whether to read the whole canvas.
  Returns:
    (logits_BWV, kept).
  """
  fresh, again = network
  return jax.lax.cond(
    refresh,
    lambda: fresh(canvas_BL, valid_BL, start),
    lambda: (again(canvas_BL, valid_BL, start, kept), kept),
  )


def check(config, masks):
  """Raises ValueError where `config.cache` cannot be used for rows of so many masks in all: blocks have
  to lie at the same places in all rows, at their ends, and not in holes."""
  if config.cache != "none" and masks != config.max_new_tokens:
    raise ValueError(
      f"sampler.cache is {config.cache!r}, and a row has {masks} masks where {config.max_new_tokens} "
      "new tokens are asked for; holes cannot be cached: use none"
    )


def refreshes(config, steps):
  """At which steps of a block the whole canvas is read, bool [steps], numpy.

  Steps at which the schedule commits nothing are not evaluated and do not count, so that a row's cache
  is as old in any batch.
  """
  possible_T = np.ones(steps, bool)
  if config.alg not in ("origin", "left_to_right") and not config.in_parallel:
    ratios_T = remasking.commit_ratios(steps, config.eps, config.schedule)
    left = np.float32(config.block_size)
    for step in range(steps - 1):
      count = np.trunc(left * ratios_T[step])
      possible_T[step], left = count > 0, left - count
  number_T = np.cumsum(possible_T) - 1  # of the evaluation
  every = config.refresh or steps
  return possible_T & (number_T % every == 0)
