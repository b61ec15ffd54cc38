"""Diagnostics against formulas by hand, and on an injected collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.grpo import diagnostics, masks

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_score_variance_is_over_draws_and_masked_tokens():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(5, 3, 7)) * np.asarray([1.0, 2.0, 3.0])[None, :, None]
  mask = rng.random((3, 7)) < 0.7
  want = scores.var(axis=0, ddof=1)[mask].mean()
  np.testing.assert_allclose(diagnostics.score_variance(scores, mask), want, rtol=1e-5)
  with pytest.raises(ValueError, match="at least 2 draws"):
    diagnostics.score_variance(scores[:1], mask)


@pytest.mark.parametrize("pairs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_variance_of_coupled_beside_decoupled(pairs):
  """Scores of 1 nat for each token: what is left is the estimator's own noise, v^2 / 2N apart."""
  completion = np.arange(30)[None].repeat(40, 0) >= 2

  def score_fn(key, e):
    passes = masks.draw_masks(key, jnp.arange(40), completion, e)
    return -jnp.sum(passes.weights, axis=0)

  e = masks.Estimator(pairs=pairs, full_mask_term=False, normalise="unit", t_per="row")
  run = jax.jit(lambda key: diagnostics.estimator_variance(score_fn, e, key, 32, completion))
  got = jax.device_get(run(jax.random.key(0)))
  # E[1/t] over [0.2, 0.8] is ln(4) / 0.6; a token's single term is 1/t with probability t.
  second = np.log(4) / 0.6
  np.testing.assert_allclose(got["variance_decoupled"], (second - 1) / (2 * pairs), rtol=0.1)
  np.testing.assert_allclose(got["variance"], (second - 2) / (2 * pairs), rtol=0.1)
  np.testing.assert_allclose(
    got["variance_ratio"], got["variance"] / got["variance_decoupled"], rtol=1e-6
  )


def test_ratio_extremes_and_effective_share():
  new = np.log(np.asarray([[1.0, 2.0, 4.0, 9.0], [0.5, 1.0, 1.0, 1e9]], np.float32))
  mask = np.asarray([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
  got = diagnostics.ratio_extremes(new, np.zeros_like(new), mask)
  ratio = np.asarray([1, 2, 4, 0.5, 1])
  np.testing.assert_allclose(got["ratio_min"], 0.5, rtol=1e-6)
  np.testing.assert_allclose(got["ratio_max"], 4, rtol=1e-6)
  want = ratio.sum() ** 2 / (5 * (ratio**2).sum())
  np.testing.assert_allclose(got["ratio_effective_share"], want, rtol=1e-6)
  assert diagnostics.effective_share(jnp.ones(()), jnp.ones(())) == 1
  same = diagnostics.ratio_extremes(new, new, mask)
  assert {float(x) for x in same.values()} == {1.0}


def test_rewards_and_answers():
  rewards = np.asarray([[1, 1, np.nan], [0, 2, 1]])
  valid = np.asarray([[1, 1, 0], [1, 1, 1]], bool)
  got = diagnostics.reward_summary(rewards, valid)
  want = np.asarray([1, 1, 0, 2, 1])
  assert got["reward"] == want.mean() and got["reward_std"] == pytest.approx(want.std())
  assert got["reward_masked"] == pytest.approx(1 / 6) and got["zero_variance"] == 0.5
  completion = np.arange(6)[None].repeat(2, 0) >= 2
  answer = completion & (np.arange(6)[None] < np.asarray([[4], [6]]))
  entropy = np.arange(12.0).reshape(2, 6)
  got = diagnostics.answer_summary(answer, completion, entropy)
  assert got["length"] == 3 and got["unended"] == 0.5
  assert got["entropy"] == np.mean([2, 3, 8, 9, 10, 11])


def test_collapse_is_called_by_its_name():
  first = {"logp": -0.8, "entropy": 0.5, "reward": 1.2, "kl": 0.1}
  limits = diagnostics.Limits(logp_change=1.0, entropy_share=0.3, reward_share=0.5)
  assert diagnostics.collapse(first, {**first, "logp": -1.5, "entropy": 0.2}, limits) == []
  bad = {"logp": -2.0, "entropy": 0.1, "reward": 0.3, "kl": float("nan")}
  found = diagnostics.collapse(first, bad, limits)
  assert len(found) == 4 and "kl is nan" in found[0]
  for name, sentence in zip(
    ("logp moved by -1.2", "entropy fell", "reward fell"), found[1:], strict=True
  ):
    assert name in sentence
  assert len(diagnostics.collapse(first, bad, diagnostics.Limits())) == 1
  assert diagnostics.collapse({}, {"logp": -5.0}, limits) == []
