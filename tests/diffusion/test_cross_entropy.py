"""The chunked cross-entropy and its gradients against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import cross_entropy
from diffucoder_jax.runtime import sharding


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

  chunked = lambda f, m: cross_entropy.token_nll(f, m, targets, needed, chunk)  # noqa: E731
  dense = lambda f, m: dense_nll(f, m, targets, needed)  # noqa: E731
  np.testing.assert_allclose(chunked(features, matrix), dense(features, matrix), atol=2e-6)
  got = jax.grad(total(chunked), (0, 1))(features, matrix)
  want = jax.grad(total(dense), (0, 1))(features, matrix)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, atol=5e-6)

  def weighted(f, m, scale=1.0):
    found, nll = cross_entropy.weighted_nll(f, m, targets, needed, weights, chunk)
    return scale * found + jnp.sum(nll), nll  # to gradients the single values are constants

  found, nll = weighted(features, matrix)
  np.testing.assert_allclose(nll, dense(features, matrix), atol=2e-6)
  np.testing.assert_allclose(found, total(dense)(features, matrix) + nll.sum(), rtol=1e-5, atol=1e-5)
  got, aux = jax.grad(weighted, (0, 1), has_aux=True)(features, matrix, 0.5)
  np.testing.assert_array_equal(aux, nll)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, 0.5 * w, atol=5e-6)


def test_a_known_weight_spares_a_product():
  """Forward and gradient take three products with the matrix; with the logits made twice it is four."""
  arguments = jnp.ones((2, 8, 4)), jnp.ones((4, 16)), jnp.ones((2, 8), jnp.int32), jnp.ones((2, 8), bool)

  def products(f):
    grad = jax.grad(lambda features, matrix: f(features, matrix, *arguments[2:]), (0, 1))
    return str(jax.make_jaxpr(grad)(*arguments[:2])).count("dot_general[")

  token = products(lambda *a: jnp.sum(cross_entropy.token_nll(*a)))
  weighted = products(lambda *a: cross_entropy.weighted_nll(*a, jnp.ones((2, 8)))[0])
  assert (token, weighted) == (4, 3)


NLL = {
  "single": cross_entropy.token_nll,
  "weighted": lambda *a: cross_entropy.weighted_nll(*a, jnp.ones(a[2].shape))[0],
}


@pytest.mark.parametrize("nll_fn", NLL.values(), ids=NLL)
def test_memory_does_not_hold_all_logits(nll_fn):
  rows, length, width, vocab = 4, 1024, 16, 152_064
  shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731

  compiled = (
    jax.jit(jax.grad(lambda *arguments: jnp.sum(nll_fn(*arguments)), (0, 1)))
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
  got = cross_entropy.token_nll(features, matrix, targets, needed)
  assert got.dtype == jnp.float32
  want = dense_nll(features.astype(jnp.float32), matrix.astype(jnp.float32), targets, needed)
  np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("nll_fn", NLL.values(), ids=NLL)
def test_many_chunks_add_up_in_float32(nll_fn, monkeypatch):
  """Each of 2000 positions adds 1/256 (a bfloat16 sum would stop growing at 1)."""
  features = jnp.full((2, 1000, 1), 1 / 128, jnp.bfloat16)
  matrix = jnp.zeros((1, 2), jnp.float32)  # both tokens have probability 1/2
  targets, needed = jnp.zeros((2, 1000), jnp.int32), jnp.ones((2, 1000), bool)
  monkeypatch.setattr(cross_entropy, "chunk_size", lambda: 4)
  gradient = jax.grad(lambda m: jnp.sum(nll_fn(features, m, targets, needed)))(matrix)
  np.testing.assert_allclose(gradient, [[-2000 / 256, 2000 / 256]], rtol=1e-5)


def test_large_logits_stay_finite_on_a_mesh():
  """exp(logit) overflows here, also where the largest one lies on another device."""
  rng = np.random.default_rng(3)
  features = jnp.asarray(300 * rng.normal(size=(2, 5, 8)), jnp.float32)
  matrix = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
  targets, needed = jnp.asarray(rng.integers(0, 16, (2, 5)), jnp.int32), jnp.ones((2, 5), bool)
  want = dense_nll(features, matrix, targets, needed)
  with jax.set_mesh(sharding.make_mesh(dict(data=1, fsdp=1, tensor=2), jax.devices()[:2])):
    got = jax.jit(cross_entropy.token_nll)(features, matrix, targets, needed)
  assert want.max() > 1000
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
