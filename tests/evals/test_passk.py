"""pass@k against its definition, and intervals against the coverage they claim."""

import itertools
import math

import numpy as np
import pytest

from diffucoder_jax.evals import passk


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
  for n in range(1, 8):
    for c in range(n + 1):
      outcomes = [True] * c + [False] * (n - c)
      for k in range(1, n + 1):
        subsets = [any(chosen) for chosen in itertools.combinations(outcomes, k)]
        wanted = sum(subsets) / len(subsets)
        assert passk.pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-12)
  assert passk.pass_at_k(200, 3, 100) == pytest.approx(1 - 100 * 99 * 98 / (200 * 199 * 198))
  np.testing.assert_allclose(passk.rates([4, 2], [1, 2], 2), [0.5, 1.0])


def test_pass_at_k_is_unbiased():
  """Its mean over all that can be drawn is the chance 1 - (1-p)^k, to rounding."""
  n, p = 6, 0.3
  weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
  for k in (1, 2, 5):
    mean = sum(w * passk.pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("bad", [(3, 1, 4), (3, 1, 0), (3, 4, 1), (0, 0, 1)])
def test_what_cannot_be_estimated_is_refused(bad):
  with pytest.raises(ValueError, match="sample"):
    passk.pass_at_k(*bad)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
def test_wilson_covers_as_it_says(rate):
  """Exactly, over the binomial distribution: no simulation noise."""
  n = 164
  covered = 0.0
  for c in range(n + 1):
    low, high = passk.wilson(c, n)
    if low <= rate <= high:
      covered += math.exp(
        math.lgamma(n + 1) - math.lgamma(c + 1) - math.lgamma(n - c + 1)
        + c * math.log(rate) + (n - c) * math.log(1 - rate)
      )  # fmt: skip
  assert 0.93 < covered < 0.97
  assert passk.wilson(0, n)[0] == 0 and passk.wilson(n, n)[1] == 1
  low, high = passk.wilson(50, 100, 0.99)
  assert low < passk.wilson(50, 100)[0] and high > passk.wilson(50, 100)[1]


def test_the_bootstrap_covers_as_it_says():
  """Problems of many difficulties, 4 samples each: 95 % of intervals hold the true mean."""
  random = np.random.default_rng(0)
  runs, problems = 300, 120
  inside = 0
  for run in range(runs):
    chance_P = random.beta(0.7, 0.7, problems)
    values_P = passk.rates([4] * problems, random.binomial(4, chance_P), 2)
    low, high = passk.bootstrap(values_P, draws=400, seed=run)
    inside += low <= 1 - _miss(2) <= high
  assert 0.91 < inside / runs < 0.985  # four standard errors around 0.95


def _miss(k):
  """E[(1-p)^k] for p of Beta(0.7, 0.7)."""
  return math.prod((0.7 + i) / (1.4 + i) for i in range(k))


def test_the_paired_interval_covers_as_it_says():
  random = np.random.default_rng(1)
  runs, problems = 1500, 164
  inside = 0
  for _ in range(runs):
    hard_P = random.random(problems)
    # Runs that agree on most problems: one passes below 0.6, the other below 0.66.
    first_P, second_P = hard_P < 0.66, hard_P < 0.60
    flipped_P = random.random(problems) < 0.05
    found = passk.paired_difference(first_P, second_P ^ flipped_P)
    truth = 0.66 - (0.60 * 0.95 + 0.40 * 0.05)
    inside += found["low"] <= truth <= found["high"]
  assert 0.925 < inside / runs < 0.98


def test_pairing_takes_the_problems_spread_away():
  first_P = np.asarray([1.0] * 100 + [0.0] * 60)
  second_P = first_P.copy()
  second_P[:8] = 0
  found = passk.paired_difference(first_P, second_P)
  assert (found["only_first"], found["only_second"], found["method"]) == (8, 0, "adjusted wald")
  assert found["difference"] == pytest.approx(0.05) and found["low"] > 0
  assert found["p"] == pytest.approx(2 / 2**8)
  alone = [passk.interval(x) for x in (first_P, second_P)]
  assert alone[0][0] < alone[1][1]  # the intervals of the two scores overlap
  shares = passk.paired_difference(first_P * 0.5, second_P * 0.5)
  assert shares["method"] == "bootstrap" and "p" not in shares
  assert shares["low"] < 0.025 < shares["high"]
  same = passk.paired_difference(first_P, first_P)
  assert same["difference"] == 0 and same["low"] < 0 < same["high"] and same["p"] == 1
  with pytest.raises(ValueError, match="160 and 3 problems"):
    passk.paired_difference(first_P, first_P[:3])


def test_intervals_are_chosen_by_what_was_measured():
  assert passk.interval([1.0, 0.0, 1.0])[2] == "wilson"
  assert passk.interval([0.5, 0.5])[2] == "wilson"  # and no interval of width 0
  low, high, method = passk.interval([0.25, 0.5, 1.0] * 20)
  assert method == "bootstrap" and low < 1.75 / 3 < high
  assert passk.interval([0.25, 0.5, 1.0] * 20) == (low, high, method)  # the same each time
  with pytest.raises(ValueError, match="at least one"):
    passk.interval([])
