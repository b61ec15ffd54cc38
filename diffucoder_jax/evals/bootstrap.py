"""Intervals of means over problems, and over seeds where each problem was sampled with several."""

from typing import NamedTuple

import numpy as np
from scipy import special

DRAWS, LEVEL = 2000, 0.95


class Interval(NamedTuple):
  """A mean and its interval; NaN ends where one cannot be had."""

  value: float
  low: float
  high: float

  def __str__(self):
    return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _weights(rng, draws, size):
  """How often each of `size` things is drawn in each resample, float [draws, size]."""
  if size == 1:
    return np.ones((draws, 1))
  return rng.multinomial(size, np.full(size, 1.0 / size), draws).astype(float)


def resampled(values, seed=0, draws=DRAWS):
  """Means of resamples of problems and, independently, of seeds: float [draws].

  Both are resampled whole (the "pigeonhole" bootstrap of a crossed design; Owen 2007), which is a
  little wide rather than too narrow. With one seed only problems are. NaN where all are missing.

  Args:
    values: float [problems, seeds], NaN where there is none.
    seed: the same one draws the same problems, whatever the values.
  """
  rng = np.random.default_rng(seed)
  problems, seeds = values.shape
  of_problems, of_seeds = _weights(rng, draws, problems), _weights(rng, draws, seeds)
  known = np.isfinite(values)
  total = np.sum((of_problems @ np.where(known, values, 0.0)) * of_seeds, axis=1)
  weight = np.sum((of_problems @ known.astype(float)) * of_seeds, axis=1)
  return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)


def mean_interval(values, seed=0, level=LEVEL):
  """Mean of values [problems, seeds] with its percentile interval; NaN are left out."""
  values = np.asarray(values, float)
  known = np.isfinite(values)
  if not known.any():
    return Interval(np.nan, np.nan, np.nan)
  return _interval(values[known].mean(), resampled(values, seed), level, known.any(axis=1).sum())


def difference_interval(after, before, paired, seed=0, level=LEVEL):
  """Interval of mean(after) - mean(before), float [problems, seeds] each.

  Args:
    paired: whether rows (and columns) are the same problems (and seeds): they are then resampled
      together, and a cell that one of them lacks is left out of both.
  """
  after, before = np.asarray(after, float), np.asarray(before, float)
  if paired:
    return mean_interval(after - before, seed, level)
  known = [np.isfinite(x) for x in (after, before)]
  if not (known[0].any() and known[1].any()):
    return Interval(np.nan, np.nan, np.nan)
  draws = resampled(after, seed) - resampled(before, seed + 1)
  problems = min(k.any(axis=1).sum() for k in known)
  return _interval(after[known[0]].mean() - before[known[1]].mean(), draws, level, problems)


def _interval(value, draws, level, problems):
  if problems < 2:  # nothing is known of the spread
    return Interval(float(value), np.nan, np.nan)
  low, high = np.nanquantile(draws, ((1 - level) / 2, (1 + level) / 2))
  return Interval(float(value), float(low), float(high))


def spread_interval(values, seed=0, draws=DRAWS, level=LEVEL):
  """Standard deviation over problems, the mean of the seeds', with an interval (problems resampled).

  Args:
    values: float [problems, seeds], NaN left out.
  """
  values = np.asarray(values, float)
  known = np.isfinite(values)
  enough = known.sum(axis=0) > 1
  if not enough.any():
    return Interval(np.nan, np.nan, np.nan)
  values, known = values[:, enough], known[:, enough]
  # Around the mean, so that squares do not lose what is small.
  centred = np.where(known, values - np.sum(values, axis=0, where=known) / known.sum(axis=0), 0.0)

  def spread(weights):
    n = weights @ known
    mean = weights @ centred / np.maximum(n, 1)
    variance = (weights @ centred**2 - n * mean**2) / np.maximum(n - 1, 1)
    return np.sqrt(np.maximum(variance, 0)).mean(axis=1)

  drawn = spread(_weights(np.random.default_rng(seed), draws, len(values)))
  return _interval(spread(np.ones((1, len(values))))[0], drawn, level, len(values))


def seed_interval(values, level=LEVEL):
  """Student's interval from the means of the seeds alone: values [problems, seeds].

  What another run with other seeds on the same problems would give. NaN ends with one seed.
  """
  values = np.asarray(values, float)
  known = np.isfinite(values)
  counts = known.sum(axis=0)
  means = np.where(known, values, 0.0).sum(axis=0)[counts > 0] / counts[counts > 0]
  if not len(means):
    return Interval(np.nan, np.nan, np.nan)
  if len(means) < 2:
    return Interval(float(means[0]), np.nan, np.nan)
  half = special.stdtrit(len(means) - 1, (1 + level) / 2) * means.std(ddof=1) / len(means) ** 0.5
  return Interval(float(means.mean()), float(means.mean() - half), float(means.mean() + half))
