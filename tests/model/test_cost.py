"""FLOPs and bytes on paper, against closed forms and what XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from diffucoder_jax.model import cost, transformer
from diffucoder_jax.model.config import ModelConfig, preset, train_flops_per_token

SEVEN = ModelConfig(**preset("diffucoder_7b"))


def test_the_seven_b():
  """28 x (4 matrices of attention, 3 of the MLP), and the head; attention 4 N H K L."""
  attention = 3584 * 3584 * 2 + 3584 * 512 * 2
  assert cost.layer_weights(SEVEN) == attention + 3 * 3584 * 18944
  forward = cost.forward_flops(SEVEN, 4096)
  assert forward == (
    2 * 28 * cost.layer_weights(SEVEN), 4 * 28 * 3584 * 4096, 2 * 3584 * 152064
  )  # fmt: skip
  # Backward is twice forward in what MFU counts.
  assert 3 * forward.total == pytest.approx(train_flops_per_token(SEVEN, 4096))


@pytest.mark.parametrize(
  ("remat", "implementation", "layers", "attention"),
  [
    ("none", "xla", 3, 3),
    ("none", "blockwise", 3, 3.5),  # the backward pass makes the scores again
    ("dots", "blockwise", 3, 4.5),
    ("full", "blockwise", 4, 4.5),
    ("attention", "splash", 4, 3.5),
    ("a new one", "blockwise", 4, 4.5),
  ],
)
def test_what_training_executes(remat, implementation, layers, attention):
  config = dataclasses.replace(SEVEN, attention_impl=implementation)
  object.__setattr__(config, "remat", remat)
  work = cost.training(config, 10, 4096, 0.5)
  f = cost.forward_flops(config, 4096)
  wanted = layers * f.layers + attention * f.attention + 3 * 0.5 * f.head
  assert work.executed == pytest.approx(10 * wanted)
  assert work.useful == pytest.approx(10 * 3 * f.total)


def test_policy_steps():
  """Three passes over 8 tokens of which 2 are scored; each runs forward twice, and its layers again."""
  config = dataclasses.replace(SEVEN, remat="full", attention_impl="blockwise")
  f = cost.forward_flops(config, 64)
  scoring = cost.scoring(config, 8, 64, 3, 2)
  assert scoring.useful == scoring.executed == 3 * (8 * (f.layers + f.attention) + 2 * f.head)
  update = cost.policy_update(config, 8, 64, 3, 2)
  assert update.useful == pytest.approx(3 * 3 * (8 * (f.layers + f.attention) + 2 * f.head))
  body = 5 * f.layers + (3 + 2.5) * f.attention
  assert update.executed == pytest.approx(3 * (8 * body + 5 * 2 * f.head))


def test_forward_flops_are_what_xla_counts():
  """One layer, so that its scan hides nothing; XLA also counts what are no products."""
  small = dict(
    vocab_size=4096, embed_dim=256, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=32
  )
  config = ModelConfig(**small, mlp_dim=1024, dtype="float32", remat="none")
  model = transformer.Transformer(config)
  params = jax.eval_shape(lambda: transformer.init_params(model, jax.random.key(0)))
  tokens_BL = jax.ShapeDtypeStruct((2, 128), jnp.int32)

  def fn(params, tokens_BL):
    import flax.linen as nn

    params = nn.unbox(params)
    return transformer.unembed(params, model.apply({"params": params}, tokens_BL))

  counted = jax.jit(fn).lower(params, tokens_BL).compile().cost_analysis()["flops"]
  assert counted == pytest.approx(2 * 128 * cost.forward_flops(config, 128).total, rel=0.03)


def test_least_bytes_grow_with_what_must_move():
  config = dataclasses.replace(SEVEN, remat="full")
  work = cost.training(config, 1 << 20, 4096, 0.5)
  args = dict(shards=32, tensor=1, state_bytes=3e9, trains=True)
  once = cost.least_hbm_bytes(config, work, micro_batches=1, **args)
  weights = 2 * (28 * cost.layer_weights(config) + cost.head_weights(config))
  assert once > 2 * 3e9 + 4 * weights
  twice = cost.least_hbm_bytes(config, work, micro_batches=2, **args)
  assert twice - once == pytest.approx(4 * weights)
