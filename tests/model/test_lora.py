"""Adapters: nothing at first, trained alone, the same on any mesh, merged exactly."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from configs import tiny as tiny_config
from diffucoder_jax import pretrained, train
from diffucoder_jax.hf import load
from diffucoder_jax.model import lora
from diffucoder_jax.model.config import ModelConfig, preset, train_flops_per_token
from diffucoder_jax.model.transformer import Transformer, init_params, unembed
from diffucoder_jax.runtime import checkpoint, optim, sharding
from tests.hf import folders

# Slow: they compile networks many times.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

BASE = ModelConfig(
  vocab_size=96, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128,
  remat="full", lora_alpha=8.0,
)  # fmt: skip
CONFIG = dataclasses.replace(BASE, lora_rank=4)
ADAPTED = {"attn/q/kernel", "attn/k/kernel", "attn/v/kernel", "attn/o"} | {
  f"mlp/{name}" for name in ("gate", "up", "down")
}


@functools.cache
def fresh(config):
  init = lambda: nn.unbox(init_params(Transformer(config), jax.random.key(0)))  # noqa: E731
  return jax.jit(init)()


def tuned(params, std=0.05, seed=1):
  """Random adapters, about as large as the weights: alpha / rank * A B has a std of 0.025."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = jnp.asarray(std * rng.normal(size=leaf.shape), jnp.float32)
    return leaf if path[-1].key == "a" else noise

  return optim.joined(params, jax.tree_util.tree_map_with_path(draw, optim.trained(params)))


def named(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def same(one, other):
  one, other = named(one), named(other)
  assert one.keys() == other.keys()
  for name, leaf in one.items():
    assert np.asarray(leaf).tobytes() == np.asarray(other[name]).tobytes(), name


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
  tokens_BL = np.random.default_rng(0).integers(0, 90, (4, 24))
  return unembed(params, Transformer(config).apply({"params": params}, tokens_BL))


def test_a_network_begins_as_the_one_it_adapts():
  params = fresh(CONFIG)
  same(lora.without_adapters(params), fresh(BASE))
  same(logits(CONFIG, params), logits(BASE, lora.without_adapters(params)))
  adapters = named(optim.trained(params))
  assert adapters.keys() == {f"layers/{name}_lora/{part}" for name in ADAPTED for part in "ab"}
  for name, leaf in adapters.items():
    if name.endswith("/b"):
      assert not leaf.any()
    else:  # x A is as large as x
      inputs = leaf[0, ..., 0].size
      np.testing.assert_allclose(jnp.std(leaf), inputs**-0.5, rtol=0.15, err_msg=name)
      assert np.abs(leaf[0] - leaf[1]).max() > 0  # layers differ


@pytest.mark.parametrize("seed", [1, 2])
def test_merging_is_exact(seed):
  params = tuned(fresh(CONFIG), seed=seed)
  merged, config = lora.merge(params, CONFIG)
  assert config == dataclasses.replace(CONFIG, lora_rank=0)
  unmerged_logits, merged_logits = logits(CONFIG, params), logits(config, merged)
  before = logits(BASE, lora.without_adapters(params))
  scale = np.abs(before).max()
  assert np.abs(unmerged_logits - before).max() > 0.5 * scale  # the adapters matter
  assert np.abs(unmerged_logits - merged_logits).max() <= 3e-6 * scale  # processors round otherwise
  leaves, old = named(merged), named(params)
  assert leaves.keys() == named(fresh(BASE)).keys()
  for name, leaf in leaves.items():
    if name.removeprefix("layers/") not in ADAPTED:
      assert leaf is old[name]
      continue
    a, b = (np.asarray(old[f"{name}_lora/{part}"], np.float64) for part in "ab")
    product = np.stack([np.tensordot(a[i], b[i], 1) for i in range(2)]) * (8.0 / 4)
    want = np.asarray(old[name], np.float64) + product
    np.testing.assert_allclose(leaf, want, rtol=1e-6, atol=1e-7, err_msg=name)
  assert lora.merge(merged, config) == (merged, config)


def test_merging_rounds_bfloat16_once():
  config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
  kinds = jax.tree.map(
    lambda leaf: leaf.dtype, load.abstract_params(config, load.one_device_mesh())
  )
  assert set(jax.tree.leaves(optim.trained(kinds))) == {jnp.dtype("float32")}
  assert set(jax.tree.leaves(lora.without_adapters(kinds))) == {jnp.dtype("bfloat16")}
  params = jax.tree.map(lambda x, kind: x.astype(kind), tuned(fresh(CONFIG)), kinds)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  (got, _), (want, _) = lora.merge(params, config), lora.merge(wide, CONFIG)
  for name, leaf in named(got).items():
    want_leaf = np.asarray(named(want)[name]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(leaf, want_leaf, err_msg=name)


# --- Training.


def batch(rows=16):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 90, (rows, 24)).astype(np.int32)
  segments = np.where(np.arange(24) < rng.integers(4, 20, (rows, 1)), 1, 2).astype(np.int32)
  segments[:4, 18:] = 0
  first = np.concatenate([np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
  positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
  maskable = (segments > 0) & ~first
  return {"tokens": tokens, "segment_ids": segments, "positions": positions, "maskable": maskable}


def optimizer():
  return optim.make_optimizer(
    ConfigDict(
      dict(steps=10, lr=1e-2, warmup_steps=0, schedule="constant", lr_floor=1.0, b1=0.9, b2=0.95,
           eps=1e-8, weight_decay=0.1, decay="matrices", clip_norm=1.0,
           rounding="nearest", moment_dtype="float32")
    )
  )[0]  # fmt: skip


def run_steps(config, shape, objective, accumulate=1, steps=2, start=None):
  """(state, metrics of the last step) after some steps on a mesh of this shape."""
  mesh = sharding.make_mesh(
    dict(zip(sharding.AXES, shape, strict=True)), jax.devices()[: int(np.prod(shape))]
  )
  model, tx = Transformer(config), optimizer()
  init = lambda key: optim.init_state(init_params(model, key), tx)  # noqa: E731
  with jax.set_mesh(mesh):
    placed = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    params = jax.device_put(jax.device_get(start), placed.params)
    state = jax.jit(functools.partial(optim.init_state, tx=tx), out_shardings=placed)(params)
    step = jax.jit(
      functools.partial(train.train_step, model, tx, objective, 95, accumulate),
      out_shardings=(placed, sharding.replicated(mesh)),
    )
    for _ in range(steps):
      state, metrics = step(state, sharding.put_batch(batch(), mesh), jax.random.key(3))
  return state, jax.device_get(metrics)


def test_only_adapters_are_trained_on_any_mesh(capfd):
  objective, start = train.Objective(anneal_steps=4), tuned(fresh(CONFIG))
  one, metrics = run_steps(CONFIG, (1, 1, 1), objective, start=start)
  many, other = run_steps(CONFIG, (2, 2, 2), objective, accumulate=2, start=start)
  assert "nvoluntary full rematerialization" not in capfd.readouterr().err
  for name, value in metrics.items():
    np.testing.assert_allclose(other[name], value, rtol=1e-5, err_msg=name)
  same(lora.without_adapters(one.params), lora.without_adapters(start))
  same(lora.without_adapters(many.params), lora.without_adapters(start))
  before, after = named(optim.trained(start)), named(optim.trained(one.params))
  for name, leaf in named(optim.trained(many.params)).items():
    assert np.abs(after[name] - before[name]).max() > 1e-3, name  # each of them learns
    np.testing.assert_allclose(leaf, after[name], rtol=0, atol=1e-5, err_msg=name)
  # The optimiser keeps two moments of each adapter, cut as it is, and of nothing else.
  for state in (one, many):
    moments = [optax.tree.get(state.opt_state, moment) for moment in ("mu", "nu")]
    adapters = named(optim.trained(state.params))
    for tree in moments:
      shardings = {name: leaf.sharding for name, leaf in named(tree).items()}
      assert shardings == {name: leaf.sharding for name, leaf in adapters.items()}
    scalars = [leaf for leaf in jax.tree.leaves(state.opt_state) if not leaf.ndim]
    assert len(jax.tree.leaves(state.opt_state)) == 2 * len(adapters) + len(scalars)
  specs = {name: leaf.sharding.spec for name, leaf in adapters.items()}
  for name, want in {
    "attn/q/kernel_lora/a": (None, "fsdp", None),
    "attn/q/kernel_lora/b": (None, None, "tensor", None),
    "attn/o_lora/a": (None, "tensor", None, None),
    "mlp/down_lora/a": (None, "tensor", None),
    "mlp/down_lora/b": (None, None, "fsdp"),
  }.items():
    assert specs[f"layers/{name}"] == PartitionSpec(*want), name


def test_gradients_are_those_of_the_whole_tree_and_remat_changes_nothing():
  params, rows = tuned(fresh(CONFIG)), batch(4)

  def loss_fn(params, rows, remat="full"):
    model = Transformer(dataclasses.replace(CONFIG, remat=remat))
    features_BLD = model.apply({"params": params}, rows["tokens"], rows["segment_ids"])
    return (jnp.sum(jnp.sin(features_BLD)), jnp.float32(3)), {}

  step = jax.jit(lambda p: optim.accumulated_value_and_grad(loss_fn, p, rows, 1)[1])
  got = named(step(params))
  assert got.keys() == named(optim.trained(params)).keys()
  whole = jax.jit(jax.grad(lambda p: loss_fn(p, rows, "none")[0][0] / 3))(params)
  for name, want in named(optim.trained(whole)).items():
    atol = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(got[name], want, rtol=0, atol=atol, err_msg=name)


def test_the_7b_has_40_million_to_train():
  params = {}
  for rank in (0, 16):
    config = ModelConfig(**{**preset("diffucoder_7b"), "lora_rank": rank})
    init = functools.partial(init_params, Transformer(config))
    params[rank] = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
  assert optim.log_trained(params[16]) == (40_370_176, 7_615_616_512 + 40_370_176)
  assert optim.log_trained(params[0]) == (7_615_616_512,) * 2
  flops = [train_flops_per_token(ModelConfig(**{**preset("diffucoder_7b"), "lora_rank": rank}), 0)
           for rank in (0, 16)]  # fmt: skip
  assert flops[1] == flops[0] * 4 / 6 + 6 * 40_370_176


# --- Starting from weights without adapters.


def abstract(config):
  mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=1), jax.devices()[:2])
  return load.abstract_params(config, mesh)


def save(workdir, config, params):
  settings = ConfigDict(dict(every=1, keep=1, keep_every=0))
  with checkpoint.open_manager(workdir, settings) as manager:
    item = {"model": dataclasses.asdict(config)}
    checkpoint.save(manager, 3, {"params": params, "step": jnp.int32(3)}, {}, item, force=True)
  return workdir


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_base_weights_get_the_adapters_of_the_key(tmp_path, source):
  if source == "folder":
    folders.make(tmp_path, "Dream", np.float32)
    base = folders.CONFIG
    base = dataclasses.replace(pretrained.describe(tmp_path).config, max_seq_len=base.max_seq_len)
    weights = load.load_params(tmp_path, base)
  else:
    base, weights = BASE, jax.tree.map(jnp.cos, lora.without_adapters(fresh(CONFIG)))
    save(tmp_path, base, weights)
  config = dataclasses.replace(base, lora_rank=4)
  got = pretrained.load_params(tmp_path, config, abstract(config), jax.random.key(0))
  same(lora.without_adapters(got), weights)
  if source == "checkpoint":
    same(optim.trained(got), optim.trained(fresh(CONFIG)))
  for name, leaf in named(optim.trained(got)).items():
    assert np.any(leaf) == name.endswith("/a")
  shardings = jax.tree.map(lambda leaf: leaf.sharding, (got, abstract(config)))
  assert shardings[0] == shardings[1]
  with pytest.raises(
    ValueError, match="model.lora_rank is set, but these weights have no adapters"
  ):
    pretrained.load_params(tmp_path, config, abstract(config))


def test_a_checkpoint_with_adapters_is_used_as_it_is(tmp_path):
  params = tuned(fresh(CONFIG))
  save(tmp_path, CONFIG, params)
  ckpt = pretrained.from_pretrained(tmp_path)
  assert ckpt.config == CONFIG
  same(ckpt.params, params)
  same(pretrained.load_params(tmp_path, CONFIG, abstract(CONFIG), jax.random.key(4)), params)
  for change, words in (
    ({"lora_rank": 0}, "model.lora_rank is 4 there and 0 in the config.*convert"),
    ({"lora_rank": 8}, "model.lora_rank is 4 there and 8 in the config"),
    ({"lora_alpha": 4.0}, "model.lora_alpha is 8.0 there and 4.0 in the config"),
  ):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match=words):
      pretrained.load_params(tmp_path, config, abstract(config), jax.random.key(4))


def test_mistakes_are_named():
  with pytest.raises(TypeError, match="lora_rnak"):
    ModelConfig(**preset("tiny"), lora_rnak=4)
  c = tiny_config.get_config().lock()
  c.update_from_flattened_dict({"model.lora_rank": 4, "model.lora_alpha": 8.0})
  assert ModelConfig(**c.model).lora_rank == 4
  with pytest.raises((KeyError, AttributeError), match="lora_rnak"):
    c.update_from_flattened_dict({"model.lora_rnak": 4})
  for name, value in (("lora_rank", -1), ("lora_alpha", 0.0)):
    with pytest.raises(ValueError, match=f"model.{name} is {value}"):
      dataclasses.replace(BASE, **{name: value})
