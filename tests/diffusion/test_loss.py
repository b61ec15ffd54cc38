"""The chunked cross-entropy against the dense one, weights against their definitions, the bound
against an exact likelihood."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import likelihood, loss, process


def dense_nll(features, matrix, targets, needed):
  log_probs = jax.nn.log_softmax(jnp.einsum("BLD,DV->BLV", features, matrix))
  picked = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
  return jnp.where(needed, -picked, 0)


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_chunked_equals_dense_forward_and_backward(chunk, share):
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(3, 11, 8)), jnp.float32)
  matrix = jnp.asarray(rng.normal(size=(8, 29)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 29, (3, 11)), jnp.int32)
  needed = jnp.asarray(rng.random((3, 11)) < share)
  weights = jnp.asarray(rng.normal(size=(3, 11)), jnp.float32)

  def total(nll_fn):
    return lambda f, m: jnp.sum(weights * nll_fn(f, m))

  chunked = lambda f, m: loss.token_nll(f, m, targets, needed, chunk)  # noqa: E731
  dense = lambda f, m: dense_nll(f, m, targets, needed)  # noqa: E731
  np.testing.assert_allclose(chunked(features, matrix), dense(features, matrix), atol=2e-6)
  got = jax.grad(total(chunked), (0, 1))(features, matrix)
  want = jax.grad(total(dense), (0, 1))(features, matrix)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, atol=5e-6)


def test_memory_does_not_hold_all_logits():
  rows, length, width, vocab = 4, 1024, 16, 152_064
  shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731

  def f(features, matrix, targets, needed):
    return jnp.sum(loss.token_nll(features, matrix, targets, needed))

  compiled = (
    jax.jit(jax.grad(f, (0, 1)))
    .lower(
      shape(rows, length, width), shape(width, vocab), shape(rows, length, dtype=jnp.int32),
      shape(rows, length, dtype=jnp.bool_),
    )
    .compile()
  )  # fmt: skip
  one_copy_of_the_logits = rows * length * vocab * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * one_copy_of_the_logits


def test_bfloat16_features_keep_float32_log_probabilities():
  rng = np.random.default_rng(1)
  features = jnp.asarray(rng.normal(size=(2, 8, 32)), jnp.bfloat16)
  matrix = jnp.asarray(rng.normal(size=(32, 64)), jnp.bfloat16)
  targets, needed = jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8), bool)
  got = loss.token_nll(features, matrix, targets, needed)
  assert got.dtype == jnp.float32
  want = dense_nll(features.astype(jnp.float32), matrix.astype(jnp.float32), targets, needed)
  np.testing.assert_allclose(got, want, rtol=1e-4)


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


def test_bits_per_byte():
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
