"""Losses, weights and gradients against the reference's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import loss, process
from diffucoder_jax.model.transformer import Transformer, output_matrix
from tests import golden

pytestmark = pytest.mark.usefixtures("quick_compile")

NAMES = {"1/t": "original", "1-t": "linear", "none": "none", "cart": "cart_dllm_p0.3"}


@pytest.fixture(scope="module")
def case(shared):
  data = golden.tensors(shared / "golden/mdm_loss.safetensors")
  wanted = golden.cases(shared / "golden/mdm_loss.json")
  _, config, params = golden.checkpoint(shared / "golden/checkpoint")
  noised = process.Noised(
    jnp.asarray(data["xt"]), jnp.asarray(data["mask"] > 0), jnp.asarray(data["t"])
  )
  return data, wanted, config, params, noised


def the_loss(config, params, data, noised, weight, normaliser):
  features = Transformer(config).apply({"params": params}, noised.tokens)
  maskable = jnp.asarray(data["maskable"] > 0)
  (total, divisor), nll = loss.masked_diffusion_loss(
    features, output_matrix(params), data["x0"], noised, maskable, jnp.ones_like(noised.tokens),
    weight, normaliser,
  )  # fmt: skip
  return total / divisor, nll


def test_losses(case):
  data, wanted, config, params, noised = case
  names = [name for name in wanted if name.startswith("loss.")]
  assert len(names) == 13
  theirs = {theirs: ours for ours, theirs in NAMES.items()}
  masked = data["mask"] > 0
  for name in names:
    weight, normaliser = name.removeprefix("loss.").rsplit(".per_", 1)
    value, nll = the_loss(config, params, data, noised, theirs[weight], normaliser)
    np.testing.assert_allclose(value, wanted[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(np.asarray(nll)[masked], data["token_nll"][masked], atol=1e-4)
    assert not np.asarray(nll)[~masked].any()


@pytest.mark.parametrize("weight", NAMES)
def test_weights(case, weight):
  data, _, _, _, noised = case
  maskable = jnp.asarray(data["maskable"] > 0)
  segments = jnp.ones_like(noised.tokens)
  weights, _ = loss.diffusion_weights(noised, maskable, segments, weight, "masked")
  wanted = np.where(data["mask"] > 0, data[f"weight.{NAMES[weight]}"], 0)
  np.testing.assert_allclose(weights, wanted, rtol=1e-5, atol=1e-6)


def test_gradients(case):
  data, wanted, config, params, noised = case
  f = lambda params: the_loss(config, params, data, noised, "1/t", "masked")[0]  # noqa: E731
  gradients = jax.grad(f)(params)
  names = [name.removeprefix("grad.") for name in data if name.startswith("grad.")]
  assert len(names) > 10
  for name in names:
    got, want = golden.hf_tensor(gradients, config, name), data["grad." + name]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), name
  frozen = config.frozen_input_id
  assert not np.asarray(gradients["embed"])[frozen].any(), "the pad row must not learn as an input"
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients)))
  np.testing.assert_allclose(norm, wanted["grad_global_norm"], rtol=1e-4)
