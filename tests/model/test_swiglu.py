"""The gate of the MLP: JAX's own derivative, with less kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.model.swiglu import swiglu


def plain(gate, up):
  return jax.nn.silu(gate) * up


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_plain_formula(dtype, tolerance):
  gate, up, d = (4 * x for x in jax.random.normal(jax.random.key(0), (3, 16, 64)))
  gate, up, d = (x.astype(dtype) for x in (gate, up, d))
  value, backward = jax.vjp(swiglu, gate, up)
  np.testing.assert_array_equal(value, plain(gate, up))
  exact = jax.vjp(plain, *(x.astype(jnp.float32) for x in (gate, up)))[1](d.astype(jnp.float32))
  for got, want in zip(backward(d), exact, strict=True):
    assert got.dtype == dtype
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=tolerance, atol=tolerance * scale)


def test_only_the_two_inputs_are_kept():
  gate, up = jax.random.normal(jax.random.key(0), (2, 16, 64))

  def kept(f):
    return sum(x.size for x in jax.tree.leaves(jax.vjp(f, gate, up)[1]))

  assert kept(swiglu) == gate.size + up.size < kept(plain)
