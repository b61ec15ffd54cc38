"""Orders compared with each other, and what is decided early: repeated samples, length, entropy sink.

Pure functions on numpy arrays. Here a *problem* is sampled S times on canvases alike, so that positions
correspond; `step` is -1 where nothing was committed.
"""

import numpy as np

from diffucoder_jax.evals import arness

NEAR = 8  # positions right of the prefix that the entropy sink is measured on


def _pairs(step_SL, region_SL):
  """Which of each two positions came first, and which pairs count; float32 [S, L (L-1) / 2] both.

  The first is -1, 0 (one step) or 1, and 0 where the pair does not count.
  """
  step_SL, region_SL = np.asarray(step_SL), np.asarray(region_SL, bool)
  # What stayed masked to the end comes after all others.
  when_SL = np.where(step_SL >= 0, step_SL, arness.NEVER).astype(np.int64)
  i, j = np.triu_indices(step_SL.shape[1], 1)
  counts_SP = (region_SL[:, i] & region_SL[:, j]).astype(np.float32)
  return np.sign(when_SL[:, j] - when_SL[:, i]).astype(np.float32) * counts_SP, counts_SP


def distances(step, region):
  """Normalised Kendall distance, with ties, between the orders of all pairs of samples.

  The share of pairs of positions that are in the other order; a pair of which one sample committed
  both in one step counts half, one that both samples tied not at all (Fagin et al. 2004, "Comparing
  and aggregating rankings with ties", K with p = 1/2). 0: the same order; 1: one is the other reversed;
  two random orders are 0.5 apart on average. Only positions that lie in both regions count, so with the
  tail left out it is the shorter answer's positions.

  Args:
    step: int [S, L]. region: bool [S, L], positions that count.
  Returns:
    float [S, S], symmetric; NaN where two samples share fewer than two positions.
  """
  sign_SP, counts_SP = _pairs(step, region)
  strict_SP = sign_SP**2
  # |a - b| / 2 of signs is (a² + b² - a b - a² b²) / 2.
  both = counts_SP @ counts_SP.T
  found = strict_SP @ counts_SP.T + counts_SP @ strict_SP.T
  found = (found - sign_SP @ sign_SP.T - strict_SP @ strict_SP.T) / 2
  return np.where(both > 0, found / np.maximum(both, 1), np.nan)


def order_entropy(step, region):
  """How undecided the order is between samples: bits for each pair of positions, one number.

  For a pair of positions that all samples have, q is the share of them in which the left one came
  first (one step: half); the mean over pairs of -q log2 q - (1-q) log2 (1-q). 0: always the same
  order; 1: a coin for each pair. With S samples q is rough, so that even coins seem to have less
  (`coin_entropy`): compare only what has as many samples. NaN without a pair, or with one sample.
  """
  sign_SP, counts_SP = _pairs(step, region)
  shared_P = np.all(counts_SP > 0, axis=0)
  if len(sign_SP) < 2 or not shared_P.any():
    return np.nan
  return float(np.mean(_bits((1 + sign_SP[:, shared_P].mean(axis=0)) / 2)))


def _bits(q):
  inside = np.clip(np.asarray(q, float), 1e-12, 1 - 1e-12)
  bits = -inside * np.log2(inside) - (1 - inside) * np.log2(1 - inside)
  return np.where((q > 0) & (q < 1), bits, 0.0)


def coin_entropy(samples):
  """`order_entropy` to expect of that many random orders without ties, bits."""
  heads = np.arange(samples + 1)
  chances = np.cumprod(np.concatenate([[1.0], (samples - heads[:-1]) / (heads[:-1] + 1)]))
  return float(np.sum(chances / 2.0**samples * _bits(heads / samples)))


def mean_distances(distances_SS):
  """Each sample's mean distance to the others, float [S]; NaN where there is none."""
  apart = np.where(np.eye(len(distances_SS), dtype=bool), np.nan, distances_SS)
  known = np.isfinite(apart)
  return arness.ratio(np.where(known, apart, 0.0).sum(axis=1), known.sum(axis=1))


# Length: when the end of an answer is decided, against when its tokens are.


def length_commitment(step, written, region):
  """When each row's end and tail were committed, on the clock of `arness.commit_times`.

  Args:
    step: int [B, L]. written: bool [B, L], the whole canvas. region: bool [B, L],
      `arness.answer_region`: the answer and its first end token.
  Returns:
    dict of float [B], NaN where a row has no tail or no answer; times from 0 to 1:
      "end": when the first end token was committed.
      "tail": mean time of what follows it; "answer": of what precedes it.
      "tail_first": the probability that a token of the tail was committed before one of the answer (ties
        half): 0.5 says that length is decided along with the text, more that it is decided earlier.
  """
  written, region = np.asarray(written, bool), np.asarray(region, bool)
  time_BL = arness.commit_times(step, written)
  tail_BL = written & ~region
  # A canvas that is full to its last position may have no end token; it has no tail, either.
  has_tail_B = tail_BL.any(axis=1)
  last_BL = region & (np.cumsum(region, axis=1) == region.sum(axis=1, keepdims=True))
  parts = {"end": last_BL, "tail": tail_BL, "answer": region & ~last_BL}
  found = {name: _row_mean(time_BL, where_BL) for name, where_BL in parts.items()}
  found["tail_first"] = _first(time_BL, tail_BL, parts["answer"])
  return {name: np.where(has_tail_B, value, np.nan) for name, value in found.items()}


def _row_mean(x_BL, where_BL):
  good_BL = where_BL & np.isfinite(x_BL)
  return arness.ratio(np.where(good_BL, x_BL, 0.0).sum(axis=1), good_BL.sum(axis=1))


def _first(x_BL, ours_BL, theirs_BL):
  """Probability that one of `ours` is smaller than one of `theirs`, ties half; float [B]."""
  found = np.full(len(x_BL), np.nan)
  for b, x_L in enumerate(x_BL):
    ours, theirs = (x_L[where[b] & np.isfinite(x_L)] for where in (ours_BL, theirs_BL))
    if len(ours) and len(theirs):
      theirs = np.sort(theirs)
      above = len(theirs) - np.searchsorted(theirs, ours, "right")
      not_below = len(theirs) - np.searchsorted(theirs, ours, "left")
      found[b] = np.mean(above + not_below) / 2 / len(theirs)
  return found


# Confidence before anything was written.


def entropy_sink(confidence, places, near=NEAR):
  """How much surer the network is right of the prefix, on a canvas that is all masks.

  Args:
    confidence: float [B, L], at the first step, higher is surer. places: bool [B, L], the places that
      count: those of the answer, because a network that was tuned with padding is surest of the far
      end of the canvas. near: how many places count as near the prefix.
  Returns:
    dict of float [B]: "gap", mean confidence of the `near` first places less that of the others; and
    "sink", the probability that a near place is surer than a far one (ties half), which no rescaling
    of confidence changes: 0.5 is no sink, 1 a complete one. NaN where there are no others.
  """
  confidence, places = np.asarray(confidence, float), np.asarray(places, bool)
  number = np.cumsum(places, axis=1) - 1
  close, far = places & (number < near), places & (number >= near)
  return {
    "gap": _row_mean(confidence, close) - _row_mean(confidence, far),
    "sink": _first(-confidence, close, far),
  }


# Maps.


def committed_map(step, written, steps, rows=32):
  """Share of rows that had committed each place after shares of the steps: float [rows, L].

  Args:
    step: int [B, L]. written: bool [B, L], places in use. steps: int, how many were taken at most.
    rows: how finely decoding is divided; row r is after (r + 1) / rows of the steps.
  """
  step, written = np.asarray(step), np.asarray(written, bool)
  edges = (np.arange(1, rows + 1) / rows * steps).astype(int)
  done = (step[None] >= 0) & (step[None] < edges[:, None, None]) & written[None]
  return arness.ratio(done.sum(axis=1), np.broadcast_to(written.sum(axis=0), done.shape[::2]))
