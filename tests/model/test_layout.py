"""Parameters laid out for a CPU: the same network."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.model import layout, windows
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, canvas_logits_fn, init_params

CONFIG = ModelConfig(
  vocab_size=32, embed_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40,
  rope_theta=1e4, init_std=0.5, remat="none",
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_compile")


def both(**changes):
  """The model, and its parameters twice. Biases and norms are no longer what they begin as."""
  model = Transformer(dataclasses.replace(CONFIG, **changes))
  params = nn.unbox(init_params(model, jax.random.key(0)))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = jax.tree.unflatten(
    tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  )
  return model, params, jax.jit(layout.unrolled)(params)


CANVAS_BL = np.arange(20).reshape(2, 10) % 30
VALID_BL = np.arange(10) >= np.asarray([[0], [3]])


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_logits_are_the_same(tied):
  model, params, laid = both(tied_head=tied, qkv_bias=not tied)
  assert "layers" not in laid and sum(x.size for x in jax.tree.leaves(laid)) == sum(
    x.size for x in jax.tree.leaves(params)
  )
  wanted, found = (canvas_logits_fn(model, p)(CANVAS_BL, VALID_BL) for p in (params, laid))
  np.testing.assert_allclose(found, wanted, atol=2e-4)
  assert np.abs(wanted).max() > 1


@pytest.mark.slow
def test_windows_are_the_same():
  model, params, laid = both()
  dual = lambda first, last, length: (first - 1, last)  # noqa: E731
  found = []
  for p in (params, laid):
    fresh, again = windows.features_fn(model, p, 2, dual)
    features, kept = fresh(CANVAS_BL, VALID_BL, 6)
    assert kept.keys.shape == (3, 2, 10, 2, 8)
    found.append((features, again(jnp.asarray(CANVAS_BL)[:, ::-1], VALID_BL, 6, kept)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *found)


@pytest.mark.slow
def test_adapters_are_refused():
  model = Transformer(dataclasses.replace(CONFIG, lora_rank=2))
  with pytest.raises(ValueError, match="adapters"):
    layout.unrolled(nn.unbox(init_params(model, jax.random.key(0))))


def test_it_is_for_few_layers_on_one_cpu_and_no_adapters():
  model, params, _ = both()
  assert "layer_0" in layout.for_many_reads(model.config, params)
  for changes in ({"num_layers": 13}, {"lora_rank": 2}):
    config = dataclasses.replace(model.config, **changes)
    assert layout.for_many_reads(config, params) is params
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    assert layout.for_many_reads(model.config, params) is params
