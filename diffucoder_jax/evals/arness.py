"""AR-ness: how near the order in which tokens were committed is to left to right.

Pure functions on arrays (numpy, host). The definitions are Gong et al. 2025, appendix A.2, for one
token a step: p_t is the position committed at step t, M_{t-1} the positions still masked before it.

  local@k, "set" (A.2): {p_{t-1}, ..., p_{t-k}} = {p_t - 1, ..., p_t - k}.
  local@k, "sequence" (caption of figure 3, stricter from k = 2 on): p_{t-j} = p_t - j for each j.
  global@k: p_t is among the k smallest of M_{t-1}.

What the paper leaves open, and what is done here:
- *Denominator.* The first k tokens have no k tokens before them. "seen" (default) leaves them out of
  local@k, so that left to right scores 1 whatever the length; "all" counts them as misses, so that
  it scores (n - k) / n. Global@k always has all tokens below it; its last k are hits by nature.
- *Tail.* What follows the answer's first end token is left out by default (`answer_region`), as if
  it had never been on the canvas: tokens of the tail committed in between do not break a sequence.
- *Several tokens in one step* have no order among them. They are read left to right by default,
  which is the highest global AR-ness that any order of them has; "right_to_left" is the lowest one,
  "random" draws one. With one token a step the three agree. `tied_share` says how much it matters.
- *Holes and padding.* Positions are counted among those that were to be written, so that filling two
  holes left to right scores 1, too.
- *Tokens that were masked again* (`sampler.revoke`) count at the step that wrote them last.
- A row with nothing to count is NaN, not 0.

Under A.2 local@k is *not* bound to fall with k: the order 6, 5, 7 scores 0 at k = 1 and 1 at k = 2.
"""

import math
from typing import NamedTuple

import numpy as np

LOCAL_K, GLOBAL_K = 9, 4  # as far as the paper's figures go
NEVER = np.iinfo(np.int32).max  # step of a position that was never committed
CHUNK = 1 << 24  # cells of a pairwise comparison that are held at once


class Orders(NamedTuple):
  """Rows of tokens in the order they were committed; T is the longest row.

  Attributes:
    place_BT: int32, the t-th token's place among the row's positions to be written.
    left_BT: int32, positions left of it that were still masked.
    count_B: int32, tokens committed; entries from there on mean nothing.
  """

  place_BT: np.ndarray
  left_BT: np.ndarray
  count_B: np.ndarray


# How tokens of one step are put in a row: (rng, shape) -> a key that is sorted upwards.
TIES = {
  "left_to_right": lambda rng, shape: np.broadcast_to(np.arange(shape[1]), shape),
  "right_to_left": lambda rng, shape: np.broadcast_to(-np.arange(shape[1]), shape),
  "random": lambda rng, shape: rng.random(shape),
}


def _named(what, name, known):
  if name not in known:
    raise ValueError(f"{what} is {name!r}; choose one of {', '.join(known)}")


def answer_region(tokens, written, end_ids):
  """The positions of an answer up to and including its first end token, bool [B, L].

  Args:
    tokens: int [B, L]. written: bool [B, L], what was to be written. end_ids: ids that end an answer.
  """
  ends_BL = np.isin(tokens, list(end_ids)) & written
  return written & (np.cumsum(ends_BL, axis=1) - ends_BL == 0)


def ratio(over, under):
  """over / under, NaN where there is nothing below."""
  return np.where(under > 0, over / np.where(under > 0, under, 1), np.nan)


def column_means(values):
  """Means over the first axis of what is not NaN; NaN where all of it is."""
  known = np.isfinite(values)
  return ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0))


def orders_of(step, region=None, ties="left_to_right", seed=0):
  """Sorts the tokens of each row by the step that committed them.

  Args:
    step: int [B, L], -1 where nothing was committed.
    region: bool [B, L], positions that count; those of them with step -1 stayed masked to the end.
      None: those with step >= 0.
    ties: a key of `TIES`. seed: read by "random".
  Returns:
    `Orders`, T = L.
  """
  _named("ties", ties, TIES)
  step_BL = np.asarray(step)
  region_BL = step_BL >= 0 if region is None else np.asarray(region, bool)
  if step_BL.ndim != 2 or region_BL.shape != step_BL.shape:
    raise ValueError(
      f"step and region must be [B, L] alike, got {list(step_BL.shape)} and {list(region_BL.shape)}"
    )
  committed_BL = region_BL & (step_BL >= 0)
  when_BL = np.where(committed_BL, step_BL, NEVER)
  key_BL = TIES[ties](np.random.default_rng(seed), step_BL.shape)
  order_BT = np.lexsort((key_BL, when_BL), axis=1)
  rank_BL = np.argsort(order_BT, axis=1)
  rank_BL = np.where(committed_BL, rank_BL, step_BL.shape[1])
  place_BL = np.cumsum(region_BL, axis=1) - 1
  left_BL = _left_masked(rank_BL, region_BL)
  take = lambda x_BL: np.take_along_axis(x_BL, order_BT, axis=1).astype(np.int32)  # noqa: E731
  return Orders(take(place_BL), take(left_BL), np.sum(committed_BL, axis=1).astype(np.int32))


def _left_masked(rank_BL, region_BL):
  """How many positions of the region left of each one come after it, int [B, L]."""
  rows, length = rank_BL.shape
  found_BL = np.zeros(rank_BL.shape, np.int64)
  before_LL = np.tri(length, k=-1, dtype=bool)  # [i, j]: j < i
  size = max(1, CHUNK // max(length * length, 1))
  for begin in range(0, rows, size):
    rank, inside = rank_BL[begin : begin + size], region_BL[begin : begin + size]
    later_BLL = (rank[:, None, :] > rank[:, :, None]) & inside[:, None, :] & before_LL
    found_BL[begin : begin + size] = np.count_nonzero(later_BLL, axis=2)
  return found_BL


def tied_share(step, region=None):
  """Share of each row's committed tokens that shared their step with another, float [B]."""
  step_BL = np.asarray(step)
  region_BL = step_BL >= 0 if region is None else np.asarray(region, bool)
  inside_BL = region_BL & (step_BL >= 0)
  sizes_BL = np.take_along_axis(_step_sizes(step_BL, inside_BL), np.maximum(step_BL, 0), axis=1)
  return ratio(np.sum(inside_BL & (sizes_BL > 1), axis=1), np.sum(inside_BL, axis=1))


def _step_sizes(step_BL, inside_BL):
  """How many tokens each step committed, int [B, steps]."""
  sizes_BS = np.zeros((len(step_BL), max(step_BL.max(initial=0), 0) + 1), np.int64)
  row, column = np.nonzero(inside_BL)
  np.add.at(sizes_BS, (row, step_BL[row, column]), 1)
  return sizes_BS


def commit_times(step, region=None):
  """When each token was committed, from 0 (the row's first) to 1 (its last), float [B, L].

  The share of the row's other tokens that came before it, those of the same step counting half. NaN
  where nothing was committed, and 0.5 for a row's only token.
  """
  step_BL = np.asarray(step)
  region_BL = step_BL >= 0 if region is None else np.asarray(region, bool)
  inside_BL = region_BL & (step_BL >= 0)
  sizes_BS = _step_sizes(step_BL, inside_BL)
  middle_BS = np.cumsum(sizes_BS, axis=1) - sizes_BS + (sizes_BS - 1) / 2
  middle_BL = np.take_along_axis(middle_BS, np.maximum(step_BL, 0), axis=1)
  count_B1 = np.sum(inside_BL, axis=1, keepdims=True)
  time_BL = np.where(count_B1 > 1, middle_BL / np.maximum(count_B1 - 1, 1), 0.5)
  return np.where(inside_BL, time_BL, np.nan)


# Hits, token by token.


def local_hits(orders, max_k=LOCAL_K, definition="set"):
  """Whether each token continues the k before it: float [B, T, max_k], k = 1..max_k.

  1.0 or 0.0; NaN where a token has fewer than k before it, or there is no token.
  """
  _named("definition", definition, ("set", "sequence"))
  place_BT, count_B = orders.place_BT, orders.count_B
  rows, length = place_BT.shape
  t_T = np.arange(length)
  hits = np.full((rows, length, max_k), np.nan)
  nearest_BT = np.full(place_BT.shape, length)
  farthest_BT, in_line_BT = np.zeros_like(place_BT), np.ones(place_BT.shape, bool)
  for k in range(1, min(max_k, length - 1) + 1):
    gap_BT = np.zeros_like(place_BT)
    gap_BT[:, k:] = place_BT[:, k:] - place_BT[:, :-k]
    nearest_BT = np.minimum(nearest_BT, gap_BT)
    farthest_BT = np.maximum(farthest_BT, gap_BT)
    in_line_BT &= gap_BT == k
    # Places differ, so k of them between 1 and k left of this one are all there are.
    as_set_BT = (nearest_BT >= 1) & (farthest_BT <= k)
    hit_BT = as_set_BT if definition == "set" else in_line_BT
    counts_BT = (t_T >= k)[None] & (t_T[None] < count_B[:, None])
    hits[:, :, k - 1] = np.where(counts_BT, hit_BT, np.nan)
  return hits


def global_hits(orders, max_k=GLOBAL_K):
  """Whether each token was among the k leftmost masked ones: float [B, T, max_k], k = 1..max_k."""
  exists_BT = np.arange(orders.left_BT.shape[1])[None] < orders.count_B[:, None]
  hits = orders.left_BT[:, :, None] < np.arange(1, max_k + 1)[None, None]
  return np.where(exists_BT[:, :, None], hits, np.nan)


def local_arness(orders, max_k=LOCAL_K, definition="set", denominator="seen"):
  """Local AR-ness@k (the paper's NTP@k) of each row, float [B, max_k]; see the module's header."""
  _named("denominator", denominator, ("seen", "all"))
  hits = local_hits(orders, max_k, definition)
  seen = np.sum(np.isfinite(hits), axis=1)
  under = seen if denominator == "seen" else np.broadcast_to(orders.count_B[:, None], seen.shape)
  return ratio(np.nansum(hits, axis=1), under)


def global_arness(orders, max_k=GLOBAL_K):
  """Global AR-ness@k (the paper's FMS@k) of each row, float [B, max_k]; rises with k."""
  hits = global_hits(orders, max_k)
  return ratio(np.nansum(hits, axis=1), np.sum(np.isfinite(hits), axis=1))


def by_step(hits, count, bins=20):
  """Mean of hits [B, T] over the course of decoding: float [bins], NaN where there are none.

  Token t of a row of n falls into the bin of (t + 1/2) / n, so that rows of all lengths compare.
  """
  t_BT = np.broadcast_to(np.arange(hits.shape[1]), hits.shape)
  share_BT = (t_BT + 0.5) / np.maximum(count, 1)[:, None]
  return _binned(hits, np.minimum((share_BT * bins).astype(int), bins - 1), bins, 1)


def by_position(hits, place, size, least=1):
  """Mean of hits [B, T] by the place of their token, float [size]; NaN where there are under `least`."""
  return _binned(hits, np.minimum(place, size - 1), size, least)


def _binned(hits_BT, bin_BT, bins, least):
  good_BT = np.isfinite(hits_BT)
  sums = np.bincount(bin_BT[good_BT], hits_BT[good_BT], minlength=bins)
  counts = np.bincount(bin_BT[good_BT], minlength=bins)
  return np.where(counts >= least, ratio(sums, counts), np.nan)


# What a uniformly random order of n tokens scores on average.


def random_local(n, k, definition="set", denominator="seen"):
  """Expected local AR-ness@k of a random order of n tokens; NaN where none has k before it.

  Any k + 1 successive tokens are a random ordered choice of k + 1 of the n places, of which there
  are n! / (n-k-1)!. "sequence" wants one of the n - k runs in rising order, so it has probability
  (n-k) (n-k-1)! / n! = (n-k)! / n!. "set" lets the first k come in any of k! orders: k! (n-k)! / n! =
  1 / C(n, k). "all" counts n - k of the n tokens.
  """
  _named("definition", definition, ("set", "sequence"))
  _named("denominator", denominator, ("seen", "all"))
  if n <= k:
    return 0.0 if denominator == "all" and n else math.nan
  chance = 1.0 / math.comb(n, k)
  if definition == "sequence":
    chance /= math.factorial(k)
  return chance * ((n - k) / n if denominator == "all" else 1.0)


def random_global(n, k):
  """Expected global AR-ness@k of a random order of n tokens, NaN for n = 0.

  With m masks left the next one is any of them, so it is among the k leftmost with probability
  min(1, k / m), and m takes each value from n to 1 once.
  """
  return sum(min(1.0, k / m) for m in range(1, n + 1)) / n if n else math.nan


# For the trainer's log.


def mean_arness(step, completion, lengths=None, local_k=1, global_k=1):
  """Mean AR-ness of a batch of answers, for metrics: by the defaults of this module.

  Args:
    step: int [B, L], `trace.step`.
    completion: bool [B, L], what was to be written; or already cut after the first end token.
    lengths: int [B], tokens of each answer up to and including its end token; None: all.
    local_k, global_k: k of each.
  Returns:
    {"arness_local", "arness_global"}: float means over the rows that have one, NaN if none has.
  """
  region_BL = np.asarray(completion, bool)
  if lengths is not None:
    region_BL = region_BL & (np.cumsum(region_BL, axis=1) <= np.asarray(lengths)[:, None])
  orders = orders_of(step, region_BL)
  local_B = local_arness(orders, local_k)[:, -1]
  global_B = global_arness(orders, global_k)[:, -1]
  return {
    name: float(np.mean(found[np.isfinite(found)])) if np.isfinite(found).any() else math.nan
    for name, found in (("arness_local", local_B), ("arness_global", global_B))
  }
