"""Weights against their definitions, the bound against an exact likelihood."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import likelihood, loss, process
from tests.diffusion.test_cross_entropy import dense_nll


def test_weights_and_normalisers_are_their_definitions():
  masked = jnp.asarray([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
  maskable = jnp.asarray([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
  segments = jnp.ones((3, 4), jnp.int32)
  noised = process.Noised(jnp.zeros((3, 4), jnp.int32), masked, jnp.asarray([0.25, 0.5, 1.0]))
  per_row = {"1/t": [4, 2, 1], "1-t": [0.75, 0.5, 0], "none": [1, 1, 1]}
  cart = np.asarray(loss.cart_weights(masked, segments))
  ones = [1, 1, 1]  # the third row has nothing to predict, so it is no sequence
  divisors = {
    "masked": (ones, 3), "maskable": (ones, 4), "sequence": ([1 / 3, 1, 1], 2), "batch": (ones, 3),
  }  # fmt: skip
  assert {*per_row, "cart"} == set(loss.WEIGHTS) and set(divisors) == set(loss.NORMALISERS)
  for weight, normaliser in itertools.product(loss.WEIGHTS, loss.NORMALISERS):
    weights, total = loss.diffusion_weights(noised, maskable, segments, weight, normaliser)
    factors, divisor = divisors[normaliser]
    token_BL = cart if weight == "cart" else np.asarray(per_row[weight])[:, None]
    want = masked * token_BL * np.asarray(factors)[:, None]
    np.testing.assert_allclose(weights, want, rtol=1e-6, err_msg=f"{weight} {normaliser}")
    assert total == divisor, normaliser


def test_both_losses_are_weighted_sums_over_their_targets():
  rng = np.random.default_rng(4)
  features = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
  matrix = jnp.asarray(rng.normal(size=(4, 9)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, 9, (2, 6)), jnp.int32)
  maskable = jnp.arange(6)[None, :] >= jnp.asarray([[1], [3]])
  masked = maskable & (jnp.arange(6) % 2 == 1)[None, :]
  noised = process.Noised(jnp.where(masked, 8, tokens), masked, jnp.asarray([0.5, 0.25]))
  (total, weight), nll = loss.masked_diffusion_loss(
    features, matrix, tokens, noised, maskable, jnp.ones_like(tokens)
  )
  want = dense_nll(features, matrix, tokens, masked)
  np.testing.assert_allclose(nll, want, atol=1e-5)
  np.testing.assert_allclose(total, jnp.sum(want / noised.t[:, None]), rtol=1e-5)
  assert weight == masked.sum() == 5
  (total, weight), nll = loss.autoregressive_loss(features, matrix, tokens, maskable)
  want = dense_nll(features, matrix, tokens, maskable)
  np.testing.assert_allclose(nll, want, atol=1e-5)
  np.testing.assert_allclose(total, want.sum(), rtol=1e-5)
  assert weight == maskable.sum() == 8


def test_cart_is_its_definition_within_segments():
  rng = np.random.default_rng(2)
  masked = rng.random((3, 17)) < 0.5
  segments = np.where(np.arange(17) < 9, 1, 2)[None].repeat(3, 0)
  want = np.zeros((3, 17))
  for b, i, j in itertools.product(range(3), range(17), range(17)):
    if i != j and not masked[b, j] and segments[b, i] == segments[b, j]:
      want[b, i] += 0.5 * 0.3 * 0.7 ** (abs(i - j) - 1)
  got = loss.cart_weights(jnp.asarray(masked), jnp.asarray(segments))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_unknown_names_are_refused():
  noised = process.Noised(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), jnp.ones(1))
  ones = jnp.ones((1, 2), jnp.int32)
  with pytest.raises(ValueError, match="unknown loss weight or normaliser 'elbo'"):
    loss.diffusion_weights(noised, ones > 0, ones, "elbo", "masked")
  with pytest.raises(ValueError, match="unknown loss weight or normaliser 'tokens'"):
    loss.diffusion_weights(noised, ones > 0, ones, "1/t", "tokens")


def test_the_bound_equals_the_average_over_orders():
  """The NELBO of absorbing diffusion is the mean over orders of the factorised log-likelihood
  (Ou et al. 2024): an exact number to compare the estimator with."""
  vocab, length, rows = 4, 3, 4096
  table = jax.random.normal(jax.random.key(0), (2**length, length, vocab))

  def nll_fn(noisy_BL, targets_BL, needed_BL):
    seen_B = jnp.sum((noisy_BL != vocab) * 2 ** jnp.arange(length)[None, :], axis=1)
    log_probs = jax.nn.log_softmax(table[seen_B])
    nll = -jnp.take_along_axis(log_probs, targets_BL[..., None], -1)[..., 0]
    return jnp.where(needed_BL, nll, 0)

  tokens = jnp.asarray([[1, 3, 0]], jnp.int32)
  exact = 0.0
  for order in itertools.permutations(range(length)):
    seen = 0
    for position in order:
      exact -= float(jax.nn.log_softmax(table[seen, position])[tokens[0, position]]) / 6
      seen += 2**position
  many = jnp.repeat(tokens, rows, 0)
  draws = 8
  nats = jnp.mean(
    jnp.stack(
      [
        likelihood.nelbo_rows(
          nll_fn, jax.random.key(1), many, jnp.ones_like(many, bool), vocab, d, draws
        )
        for d in range(draws)
      ]
    ),
    axis=0,
  )
  error = float(jnp.std(nats)) / np.sqrt(rows)
  assert error < 0.02 * exact
  # The levels below T_MIN are never drawn, which leaves out less than 0.1 %.
  assert abs(float(jnp.mean(nats)) - exact) < 4 * error + 1e-3 * exact


def test_the_draws_of_a_row_are_spread_and_masked_afresh():
  rows, draws = 64, 4
  t = np.stack([likelihood.stratified_t(jax.random.key(2), rows, d, draws) for d in range(draws)])
  u = (np.sort(t, axis=0) - process.T_MIN) / (1 - process.T_MIN)
  np.testing.assert_allclose(np.diff(u, axis=0), 1 / draws, atol=1e-5)
  assert u.min() >= 0 and u.max() < 1 and len(set(u[0].tolist())) == rows
  # Row keys with one stream of numbers for all draws would nest the masks in each other.
  masks, ones = [], jnp.ones((rows, 16), jnp.int32)

  def keep_mask(noisy_BL, targets_BL, needed_BL):
    masks.append(np.asarray(needed_BL))
    return jnp.zeros(needed_BL.shape)

  for draw in (0, 1):
    likelihood.nelbo_rows(keep_mask, jax.random.key(2), ones, ones > 0, 3, draw, 2)
  first, second = masks
  assert ((first & ~second).any(1) & (second & ~first).any(1)).any()


def test_bits_per_byte():
  # By hand: 3 and 5 bits in 2 bytes each; the two rows miss the ratio's 4 by 1 on either side.
  nats = np.asarray([3, 5]) * np.log(2)
  assert likelihood.bits_per_byte(nats, [2, 2]) == pytest.approx((2, np.sqrt(2 * 2 / 1) / 4))
  value, error = likelihood.bits_per_byte([10.0, 20.0, 5.0], [5, 10, 0])
  assert value == pytest.approx(2 / np.log(2)) and error == pytest.approx(0)
  rng = np.random.default_rng(0)
  num_bytes = rng.integers(50, 100, 400)
  value, error = likelihood.bits_per_byte(
    num_bytes * rng.normal(2, 0.5, 400) * np.log(2), num_bytes
  )
  assert abs(value - 2) < 4 * error and error == pytest.approx(0.5 / 20, rel=0.15)
  with pytest.raises(ValueError, match="at least 2 rows"):
    likelihood.bits_per_byte([1.0], [3])
