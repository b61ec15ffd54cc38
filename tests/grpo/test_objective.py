"""Advantages, zero-variance groups, the clipped loss and the reference, against formulas by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.grpo import objective
from diffucoder_jax.runtime import optim

pytestmark = pytest.mark.usefixtures("quick_compile")


# ---------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_hand():
  rewards = np.asarray([[2.5, 0, 1.25, 0.25], [1, 1, 1, 1]])
  got = objective.advantages(rewards)
  np.testing.assert_allclose(got, [[1.5, -1, 0.25, -0.75], [0, 0, 0, 0]])
  assert got.dtype == np.float32
  others = objective.advantages(rewards, "leave_one_out")
  np.testing.assert_allclose(others, got * 4 / 3, rtol=1e-6)
  scaled = objective.advantages(rewards, "leave_one_out", scale_std=True)
  np.testing.assert_allclose(scaled[0], others[0] / (rewards[0].std(ddof=1) + 1e-4), rtol=1e-6)
  assert not scaled[1].any()


@pytest.mark.parametrize("kind", objective.ADVANTAGES)
@pytest.mark.parametrize("scale_std", [False, True])
def test_invalid_rewards_take_no_part(kind, scale_std):
  rng = np.random.default_rng(1)
  rewards, valid = rng.random((3, 6)), rng.random((3, 6)) < 0.6
  valid[2] = np.arange(6) == 1  # nothing to compare it with
  got = objective.advantages(np.where(valid, rewards, np.nan), kind, scale_std, valid)
  for p in range(2):
    assert 2 <= valid[p].sum() < 6
    want = objective.advantages(rewards[p : p + 1, valid[p]], kind, scale_std)
    np.testing.assert_allclose(got[p, valid[p]], want[0], rtol=1e-5)
  assert not got[~valid].any() and not got[2].any()
  with pytest.raises(ValueError, match="not finite"):
    objective.advantages([[1.0, np.nan]])


def test_groups_without_variance():
  rewards = np.asarray([[1, 1], [0, 2], [0, 0], [3, 1], [9, 5], [1, 2]])
  valid = np.asarray([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [0, 0]], bool)
  zero = [True, False, True, False, True, True]
  keep, drop, swap = (
    objective.select_groups(rewards, kind, valid) for kind in ("keep", "drop", "substitute")
  )
  for got in (keep, drop, swap):
    assert got.zero_variance.tolist() == zero
  assert keep.used.all() and keep.index.tolist() == drop.index.tolist() == [0, 1, 2, 3, 4, 5]
  assert drop.used.tolist() == [not z for z in zero]
  assert swap.used.all() and swap.index.tolist() == [1, 1, 3, 3, 1, 3]
  alike = objective.select_groups(np.ones((3, 2)), "substitute")
  assert alike.index.tolist() == [0, 1, 2] and alike.zero_variance.all()


# ---------------------------------------------------------------------------------------------
# The loss


def case(rows=6, length=9, seed=2):
  rng = np.random.default_rng(seed)
  start, end = rng.integers(1, 3, (rows, 1)), rng.integers(4, length + 1, (rows, 1))
  column = np.arange(length)[None]
  new = rng.normal(-1, 1, (rows, length)).astype(np.float32)
  return {
    "new": new,
    "old": new + rng.normal(0, 0.6, new.shape).astype(np.float32),
    "ref": new + rng.normal(0, 0.6, new.shape).astype(np.float32),
    "advantages": rng.normal(0, 1, rows).astype(np.float32),
    "mask": (column >= start) & (column < end),
  }


def by_hand(c, config, loss_weights=None):
  """Terms of each token in plain numpy, float64, token by token."""
  terms = np.zeros(c["mask"].shape)
  for b, k in zip(*c["mask"].nonzero(), strict=True):
    new, old, ref = (float(c[name][b, k]) for name in ("new", "old", "ref"))
    ratio, a, d = np.exp(new - old), float(c["advantages"][b]), ref - new
    clipped = min(max(ratio, 1 - config.epsilon_low), 1 + config.epsilon_high)
    weight = 1 if loss_weights is None else loss_weights[b, k]
    terms[b, k] = -min(ratio * a, clipped * a) * weight + config.beta * (np.exp(d) - d - 1)
  return terms


def run(c, config, **more):
  return objective.policy_loss(
    c["new"], c["old"], c["ref"], c["advantages"], c["mask"], config, **more
  )


CONFIG = objective.Objective(epsilon_low=0.2, epsilon_high=0.4, beta=0.1)


def test_loss_and_metrics_by_hand():
  c = case()
  weights = np.random.default_rng(1).uniform(1, 3, c["mask"].shape)
  for loss_weights in (None, weights):
    (total, weight), metrics = run(c, CONFIG, loss_weights_BL=loss_weights)
    assert weight == c["mask"].sum()
    np.testing.assert_allclose(total, by_hand(c, CONFIG, loss_weights).sum(), rtol=1e-5)
  ratio, a = np.exp(c["new"] - c["old"]), c["advantages"][:, None]
  d = c["ref"] - c["new"]
  want = {
    "kl": np.exp(d) - d - 1, "ratio": ratio, "ratio_squared": ratio**2, "logp": c["new"],
    "logp_change": c["new"] - c["old"], "clip_low": (ratio < 0.8) & (a < 0),
    "clip_high": (ratio > 1.4) & (a > 0),
  }  # fmt: skip
  want["clip"] = want["clip_low"] | want["clip_high"]
  assert set(metrics) == set(want) and metrics["clip"][0] > metrics["clip_low"][0] > 0
  for name, x in want.items():
    total, weight = metrics[name]
    np.testing.assert_allclose(total, x[c["mask"]].sum(), rtol=1e-5, err_msg=name)
    assert weight == c["mask"].sum()


def test_aggregations_by_hand():
  c = case()
  c["mask"][2] = False
  terms, lengths = by_hand(c, CONFIG), c["mask"].sum(1)
  want = {
    "token_mean": terms.sum() / lengths.sum(), "micro_batch": terms.sum() / lengths.sum(),
    "row_sum": terms.sum() / 5, "row_mean": np.sum(terms.sum(1) / np.maximum(lengths, 1)) / 5,
  }  # fmt: skip
  assert set(want) == set(objective.AGGREGATIONS)
  for name, value in want.items():
    config = objective.Objective(**{**vars(CONFIG), "aggregation": name})
    (total, weight), _ = run(c, config)
    np.testing.assert_allclose(total / weight, value, rtol=1e-5, err_msg=name)
  assert want["row_mean"] != pytest.approx(want["token_mean"], rel=1e-2)
  # Over micro-batches all but one are the global mean; that one is the mean of means, by its name.
  parts = [{name: x[rows] for name, x in c.items()} for rows in (slice(0, 3), slice(3, 6))]
  for name in want:
    config = objective.Objective(**{**vars(CONFIG), "aggregation": name})
    sums = np.asarray([run(part, config)[0] for part in parts], np.float64)
    value = want[name]
    if name == "micro_batch":
      value = np.mean([by_hand(part, CONFIG).sum() / part["mask"].sum() for part in parts])
      assert value != pytest.approx(want["token_mean"], rel=1e-2)
    np.testing.assert_allclose(sums[:, 0].sum() / sums[:, 1].sum(), value, rtol=1e-5, err_msg=name)


def test_rows_that_take_no_part_change_nothing():
  c = case()
  valid = np.asarray([1, 0, 1, 1, 0, 1], bool)
  (want, weight), want_metrics = run({name: x[valid] for name, x in c.items()}, CONFIG)
  spoilt = {**c, "advantages": np.where(valid, c["advantages"], np.nan)}
  spoilt["old"] = np.where(valid[:, None], c["old"], -1e30).astype(np.float32)

  def loss(new):
    (total, count), metrics = run({**spoilt, "new": new}, CONFIG, valid_B=valid)
    return total, (count, metrics)

  (total, (count, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(c["new"])
  np.testing.assert_allclose((total, count), (want, weight), rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), metrics, want_metrics)
  assert np.isfinite(gradient).all() and not np.asarray(gradient)[~valid].any()
  assert not np.asarray(gradient)[~c["mask"]].any() and np.abs(gradient).max() > 0


def test_gradient_is_the_policy_gradient_and_clipping_stops_it():
  c = case()
  f = lambda new, old, config: objective.policy_loss(  # noqa: E731
    new, old, None, c["advantages"], c["mask"], config
  )[0][0]
  config = objective.Objective(beta=0.0, epsilon_low=0.2, epsilon_high=0.2)
  got = jax.grad(f)(c["new"], None, config)  # ratio 1: -A for each token
  np.testing.assert_allclose(got, np.where(c["mask"], -c["advantages"][:, None], 0), rtol=1e-6)
  got = np.asarray(jax.grad(f)(c["new"], c["old"], config))
  ratio, a = np.exp(c["new"] - c["old"]), c["advantages"][:, None]
  stopped = ((ratio < 0.8) & (a < 0)) | ((ratio > 1.2) & (a > 0))
  assert (stopped & c["mask"]).any()
  want = np.where(c["mask"] & ~stopped, -a * ratio, 0)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_far_away_policies_stay_finite():
  c = case()
  far = {**c, "old": c["new"] - 500, "ref": c["new"] + 500}
  (total, _), metrics = run(far, CONFIG)
  assert np.isfinite(total) and all(np.isfinite(x[0]) for x in metrics.values())
  same = {**c, "old": c["new"], "ref": c["new"]}
  _, metrics = run(same, CONFIG)
  assert metrics["kl"][0] == 0 and metrics["clip"][0] == 0
  assert metrics["ratio"][0] == metrics["ratio"][1]
  empty = {**c, "mask": np.zeros_like(c["mask"])}
  (total, weight), _ = run(empty, CONFIG)
  assert total == 0 and weight == 0


def test_completion_mask_ends_with_the_first_end_token():
  tokens = np.asarray(
    [[7, 1, 7, 3, 7, 2], [1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7], [1, 1, 1, 1, 1, 7]]
  )
  completion = np.arange(6)[None].repeat(4, 0) >= 1
  got = objective.completion_mask(tokens, completion, 7).astype(int)
  assert got.tolist() == [
    [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]
  ]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The reference


def test_reference_moves_and_survives_donation():
  rng = np.random.default_rng(0)
  params = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
  ref = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16)}
  got = objective.ref_update(ref, params, 0.6)["a"]
  want = 0.4 * np.asarray(ref["a"], np.float32) + 0.6 * np.asarray(params["a"])
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, np.asarray(want).astype(jnp.bfloat16))
  held = np.asarray(params["a"]).copy()
  same = {"a": jnp.zeros((3, 4))}
  hard = jax.jit(lambda ref, params: objective.ref_update(ref, params, 1.0))(same, params)
  jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
  assert params["a"].is_deleted()
  np.testing.assert_array_equal(hard["a"], held)
  with pytest.raises(ValueError, match="alpha is 1.5"):
    objective.ref_update(ref, ref, 1.5)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(advantage="gae"), "objective.advantage is 'gae'; choose one of"),
    (dict(zero_variance="skip"), "objective.zero_variance is 'skip'; choose one of"),
    (dict(aggregation="mean"), "objective.aggregation is 'mean'; choose one of"),
    (dict(epsilon_low=1.5), "epsilon_low and epsilon_high are 1.5"),
    (dict(beta=-1.0), "beta is -1.0"),
  ],
)
def test_wrong_objectives_are_refused_by_name(changes, match):
  with pytest.raises(ValueError, match=match):
    objective.Objective(**changes)


def test_a_reference_is_asked_for():
  c = case()
  with pytest.raises(ValueError, match="needs ref_BL"):
    objective.policy_loss(c["new"], c["old"], None, c["advantages"], c["mask"], CONFIG)


@pytest.mark.slow
def test_accumulation_divides_once():
  """Through the trainer's own summing: slices of unequal weight give the whole batch's loss."""
  c = {name: jnp.asarray(x) for name, x in case(rows=8).items()}

  def loss_fn(params, rows):
    return run({**rows, "new": rows["new"] * params["scale"]}, CONFIG)

  params = {"scale": jnp.ones(())}
  results = [optim.accumulated_value_and_grad(loss_fn, params, c, n) for n in (1, 4)]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), *results)
