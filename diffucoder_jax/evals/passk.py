"""pass@k and its error bars: the unbiased estimator, intervals over problems, paired differences.

Problems are what is drawn at random: intervals say how a score would vary over other problems of
the same kind, and hold the noise of the samples within each.
"""

import math
import statistics

import numpy as np

DRAWS = 10_000


def pass_at_k(samples: int, passed: int, k: int) -> float:
  """Chance that one of `k` samples passes, estimated from `passed` of `samples`.

  Args:
    samples: n, how many were drawn. passed: c, how many of them pass. k: 1 to n.
  Returns:
    1 - C(n-c, k) / C(n, k), exact integers below the division: unbiased for every k.
  Raises:
    ValueError: k is not in 1..n, or c not in 0..n.
  Source: Chen et al. 2021, Eq. 1.
  """
  if not 1 <= k <= samples:
    raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of each problem, not {samples}")
  if not 0 <= passed <= samples:
    raise ValueError(f"{passed} of {samples} samples cannot pass")
  return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def rates(samples_P, passed_P, k: int) -> np.ndarray:
  """pass@k of each problem, float64 [P]; their mean is the score."""
  pairs = zip(samples_P, passed_P, strict=True)
  return np.asarray([pass_at_k(int(n), int(c), k) for n, c in pairs], np.float64)


def wilson(passed: float, trials: int, level: float = 0.95) -> tuple[float, float]:
  """Wilson's score interval of a proportion: (low, high), within [0, 1].

  Args:
    passed: successes, may be fractional. trials: at least 1. level: of confidence.
  Source: Wilson 1927; Brown, Cai and DasGupta 2001 compare.
  """
  z2 = _z(level) ** 2
  rate = passed / trials
  centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
  half = math.sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
  # At 0 and 1 the bound is exact; rounding must not leave the score outside.
  return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))


def bootstrap(values_P, level: float = 0.95, draws: int = DRAWS, seed: int = 0):
  """Percentile interval of the mean over problems: (low, high), the same each time.

  Args:
    values_P: float [P], one value a problem. level: of confidence. draws: resamplings of the
      problems. seed: of the resampling.
  """
  values_P = np.asarray(values_P, np.float64)
  random = np.random.default_rng(seed)
  means = np.empty(draws)
  for first in range(0, draws, 1000):  # in pieces: an index for each problem and draw is large
    index = random.integers(0, len(values_P), (min(1000, draws - first), len(values_P)))
    means[first : first + len(index)] = values_P[index].mean(axis=1)
  tail = 50 * (1 - level)
  return tuple(float(x) for x in np.percentile(means, (tail, 100 - tail)))


def interval(values_P, level: float = 0.95) -> tuple[float, float, str]:
  """The interval of a score, and its name.

  Wilson's where every problem is passed or not, as with one sample each; the bootstrap over
  problems where there are shares, unless all are alike, of which it would make an interval of
  width 0: then Wilson's, which is wider than need be.

  Args:
    values_P: float [P] in [0, 1], as of `rates`.
  Returns:
    (low, high, "wilson" or "bootstrap").
  Raises:
    ValueError: no problem.
  """
  values_P = np.asarray(values_P, np.float64)
  if not len(values_P):
    raise ValueError("an interval needs at least one problem")
  if np.isin(values_P, (0.0, 1.0)).all() or np.ptp(values_P) == 0:
    return *wilson(float(values_P.sum()), len(values_P), level), "wilson"
  return *bootstrap(values_P, level), "bootstrap"


def paired_difference(values_P, others_P, level: float = 0.95) -> dict:
  """How much better one run is than another on the same problems.

  Problems differ far more than runs do; pairing takes their spread out of the error bar.

  Args:
    values_P, others_P: float [P], pass@k of the same problems in the same order.
  Returns:
    {"difference": mean of the first minus that of the second, "low", "high", "method", "only_first",
    "only_second": problems on which either is better, "p": of McNemar's exact test that neither is,
    only where each problem is passed or not}. The interval is Bonett and Price's adjusted Wald
    interval for such, and a bootstrap over problems for shares.
  Raises:
    ValueError: not the same number of problems, or none.
  Source: Bonett and Price 2012 (adjusted Wald); McNemar 1947.
  """
  first_P, second_P = (np.asarray(x, np.float64) for x in (values_P, others_P))
  if first_P.shape != second_P.shape or not len(first_P):
    raise ValueError(f"runs of {len(first_P)} and {len(second_P)} problems cannot be paired")
  difference_P = first_P - second_P
  more, less = int((difference_P > 0).sum()), int((difference_P < 0).sum())
  report = {"difference": float(difference_P.mean()), "only_first": more, "only_second": less}
  if np.isin(np.concatenate([first_P, second_P]), (0.0, 1.0)).all():
    total = len(first_P) + 2
    up, down = (more + 1) / total, (less + 1) / total
    half = _z(level) * math.sqrt((up + down - (up - down) ** 2) / total)
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return {**report, "low": low, "high": high, "method": "adjusted wald", "p": mcnemar(more, less)}
  low, high = bootstrap(difference_P, level)
  return {**report, "low": low, "high": high, "method": "bootstrap"}


def mcnemar(more: int, less: int) -> float:
  """Two-sided p of the exact test that problems on which two runs differ fall either way alike."""
  total, least = more + less, min(more, less)
  tail = sum(math.comb(total, i) for i in range(least + 1))
  return min(1.0, 2 * tail / 2**total)


def _z(level):
  return statistics.NormalDist().inv_cdf(0.5 + level / 2)
