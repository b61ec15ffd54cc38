"""Blockwise attention: the numbers of `xla`, memory linear in L, the same on any mesh."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from diffucoder_jax.hf import load, mapping
from diffucoder_jax.model import attention, blockwise
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, init_params, unembed
from diffucoder_jax.runtime import sharding
from tests import test_meshes

pytestmark = pytest.mark.usefixtures("quick_compile")

BLOCK = 16
LENGTH = 37  # three blocks, the last one with five positions
SEGMENTS_L = np.repeat([1, 2, 0], (20, 10, 7)).astype(np.int32)
PATTERNS = {**attention.PATTERNS, "annealed": attention.annealed(0.3, jax.random.key(1))}


def inputs(batch=2, length=LENGTH, heads=4, kv_heads=2, head_dim=8, dtype="float32"):
  """q, k, v and the output's cotangent, of standard deviation 1."""
  rng = np.random.default_rng(0)
  shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def in_blocks(*args):
  return blockwise.attend(attention.visible, *args, block=BLOCK)


def both_passes(attend, q, k, v, do, segment_ids, pattern):
  """[output, dq, dk, dv]; padding gets and gives nothing, as in a loss that leaves it out."""
  if segment_ids is not None:
    do = do * (segment_ids > 0)[:, :, None, None].astype(do.dtype)
  o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids, pattern), q, k, v)
  if segment_ids is not None:
    o = jnp.where((segment_ids > 0)[:, :, None, None], o, 0)
  return [o, *pull(do)]


def near(ours, wanted, tolerance):
  for name, got, want in zip(("o", "dq", "dk", "dv"), ours, wanted, strict=True):
    assert np.abs(want).max() > 0.5, name
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kv_heads", (2, 4))
@pytest.mark.parametrize("packed", (False, True))
def test_equals_xla(packed, kv_heads):
  segment_ids = np.stack([SEGMENTS_L, np.roll(SEGMENTS_L, 3)]) if packed else None
  args = inputs(kv_heads=kv_heads)

  @jax.jit
  def run():
    return {
      name: [both_passes(f, *args, segment_ids, pattern) for f in (in_blocks, attention._xla)]
      for name, pattern in PATTERNS.items()
    }

  outputs = []
  for ours, wanted in run().values():
    near(ours, wanted, 5e-6)
    outputs.append(wanted[0])
  assert min(np.abs(outputs[0] - outputs[1]).max(), np.abs(outputs[1] - outputs[2]).max()) > 0.1


@functools.cache
def masks():
  """A compiled function from a pattern to the bool [L, L] mask that the blocks really apply."""
  length = 1000
  q = k = jnp.zeros((1, length, 1, 1), jnp.float32)
  # Every score is 0 and value j is the j-th unit vector, so a query's output is its mask's average.
  v = jnp.eye(length)[None, :, None, :]
  attend = functools.partial(blockwise.attend, attention.visible, block=256)
  q, k = (jnp.broadcast_to(x, v.shape) for x in (q, k))
  return jax.jit(lambda pattern: attend(q, k, v, None, pattern)[0, :, 0, :] > 0)


def annealed_mask(ratio, seed=0):
  return np.asarray(masks()(attention.annealed(ratio, jax.random.key(seed))))


@pytest.mark.slow
def test_annealing_starts_causal_and_ends_full():
  causal_LM = np.tril(np.ones((1000, 1000), bool))
  np.testing.assert_array_equal(annealed_mask(0.0), causal_LM)
  np.testing.assert_array_equal(masks()(attention.CAUSAL), causal_LM)
  assert annealed_mask(1.0).all() and masks()(attention.FULL).all()


@pytest.mark.parametrize("ratio", (0.01, 0.1, 0.3, 0.5, 0.75, 0.99))
def test_annealing_opens_the_asked_share(ratio):
  mask_LM = annealed_mask(ratio)
  later_LM = np.triu(np.ones_like(mask_LM), 1)
  assert mask_LM[~later_LM].all()
  assert abs(mask_LM[later_LM].mean() - ratio) < 0.005


def test_annealing_replays_from_the_seed_and_does_not_see_the_blocks():
  mask_LM, index = annealed_mask(0.4, seed=7), jnp.arange(1000)
  pattern = attention.annealed(0.4, jax.random.key(7))
  np.testing.assert_array_equal(mask_LM, attention.visible(pattern, index[:, None], index[None, :]))
  np.testing.assert_array_equal(mask_LM, annealed_mask(0.4, seed=7))
  assert (mask_LM != annealed_mask(0.4, seed=8)).mean() > 0.2


@pytest.mark.slow
def test_bfloat16_is_about_as_close_as_xla_in_bfloat16():
  """`xla` adds the heads that share values in float32, we in bfloat16: a little further in dv."""
  pattern, segment_ids = PATTERNS["annealed"], np.stack([SEGMENTS_L] * 2)
  run = jax.jit(both_passes, static_argnums=0)
  exact = run(attention._xla, *inputs(), segment_ids, pattern)
  theirs = run(attention._xla, *inputs(dtype="bfloat16"), segment_ids, pattern)
  ours = run(in_blocks, *inputs(dtype="bfloat16"), segment_ids, pattern)
  for got, other, want in zip(ours, theirs, exact, strict=True):
    assert got.dtype == jnp.bfloat16
    error, allowed = (np.abs(x.astype(jnp.float32) - want) for x in (got, other))
    assert error.mean() < 1.2 * allowed.mean()
    assert 0 < error.max() < float(jnp.finfo("bfloat16").eps) * np.abs(want).max()


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_padding_neither_gets_nor_gives(name):
  """Also a row of nothing but padding, and a loss that reads what padding returns."""
  segment_ids = np.stack([SEGMENTS_L, 0 * SEGMENTS_L])
  q, k, v, do = inputs()

  @jax.jit
  def run():
    o, pull = jax.vjp(lambda q, k, v: in_blocks(q, k, v, segment_ids, PATTERNS[name]), q, k, v)
    return [o, *pull(do)]

  for x in run():
    assert np.isfinite(x).all()
    assert (x[segment_ids == 0] == 0).all() and np.abs(x[segment_ids > 0]).max() > 0.5


def test_causal_attention_skips_the_blocks_that_nobody_sees():
  """A hidden pair would still multiply its value by zero, and zero times NaN is NaN."""
  q, k, v, do = inputs()
  v, do = v.at[:, 2 * BLOCK :].set(np.nan), do.at[:, 2 * BLOCK :].set(0)

  def finite(pattern):
    o, dq, *_ = jax.jit(both_passes, static_argnums=0)(in_blocks, q, k, v, do, None, pattern)
    return [np.isfinite(x[:, : 2 * BLOCK]).all() for x in (o, dq)]

  assert finite(attention.CAUSAL) == [True, True]
  assert finite(attention.annealed(0.0, jax.random.key(0))) == [False, False]


def test_blocks_cover_any_length():
  assert [blockwise.block_size(n) for n in (1, 37, 512, 1024, 4096)] == [1, 37, 512, 512, 512]
  for length in (*range(513, 3000, 7), 8191, 8193):
    block = blockwise.block_size(length)
    blocks = -(-length // block)
    assert block <= blockwise.LARGEST_BLOCK and block % 16 == 0
    assert blocks * block - length < 16 * blocks


def temporary_bytes(implementation, length):
  """Of the gradients of a two-layer network with annealed attention over packed rows."""
  config = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
    remat="full", attention_impl=implementation,
  )  # fmt: skip
  model = Transformer(config)

  def total(params, tokens_BL, segment_ids_BL, ratio):
    pattern = attention.annealed(ratio, jax.random.key(0))
    features = model.apply({"params": params}, tokens_BL, segment_ids_BL, pattern=pattern)
    return jnp.sum(jnp.square(features))

  params = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
  row, ratio = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
  compiled = jax.jit(jax.grad(total)).lower(params, row, row, ratio).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_linearly():
  """Through the layers' scan and remat, which once kept the masks of all the blocks."""
  half, whole = (temporary_bytes("blockwise", length) for length in (4096, 8192))
  assert whole <= 2.3 * half
  other_half, other_whole = (temporary_bytes("xla", length) for length in (4096, 8192))
  assert other_whole > 3.5 * other_half and whole < other_whole / 50


def test_a_sharded_mesh_computes_in_place(capfd):
  """Rows over (data, fsdp), heads over tensor: one device's numbers, and no communication."""
  segment_ids = np.stack([np.roll(SEGMENTS_L, 2 * row) for row in range(8)])
  args = (*inputs(batch=8), segment_ids)
  run = jax.jit(lambda *args: both_passes(in_blocks, *args, PATTERNS["annealed"]))
  wanted = run(*args)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    rows, heads = (PartitionSpec(sharding.BATCH_AXES, None, *axes) for axes in ((), ("tensor",)))
    placed = [jax.device_put(x, NamedSharding(mesh, heads if x.ndim == 4 else rows)) for x in args]
    compiled = run.lower(*placed).compile()
    ours = compiled(*placed)
  assert "nvoluntary full rematerialization" not in capfd.readouterr().err
  assert " while(" in compiled.as_text()
  assert not re.findall(r"all-\w+|reduce-scatter|collective-\w+", compiled.as_text())
  assert {x.addressable_shards[0].data.shape for x in ours} == {(2, 37, 2, 8), (2, 37, 1, 8)}
  near(ours, wanted, 5e-6)


@pytest.mark.slow
def test_the_whole_step_does_not_depend_on_the_mesh(monkeypatch, capfd):
  monkeypatch.setattr(blockwise, "LARGEST_BLOCK", BLOCK)  # two blocks for a row of 24
  config = dataclasses.replace(test_meshes.CONFIG, attention_impl="blockwise")
  one, many = (test_meshes.mesh_of(shape) for shape in ((1, 1, 1), (2, 2, 2)))
  params = jax.device_get(test_meshes.fresh_params(config, one))
  value, gradients = test_meshes.loss_and_gradients(config, one, "diffusion", params)
  other_value, others = test_meshes.loss_and_gradients(config, many, "diffusion", params)
  assert value > 1
  np.testing.assert_allclose(other_value, value, rtol=1e-5)
  for want, got in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
  assert "nvoluntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("largest", (blockwise.LARGEST_BLOCK, BLOCK))
def test_golden_logits(shared, largest, monkeypatch):
  """Dream's own numbers through the whole network: in one block, and padded in several."""
  monkeypatch.setattr(blockwise, "LARGEST_BLOCK", largest)
  golden = load_file(shared / "golden" / "forward.safetensors")
  folder = shared / "golden" / "checkpoint"
  config = ModelConfig(**mapping.config_from_hf(load.read_config(folder)))
  params = load.load_params(folder, config)
  model = Transformer(dataclasses.replace(config, attention_impl="blockwise"))

  @jax.jit
  def logits(*args):
    _, kept = model.apply({"params": params}, *args, mutable="intermediates")
    return unembed(params, kept["intermediates"]["hidden_BLD"][0])

  if largest == BLOCK:
    valid_BL = golden["leftpad.attention_mask"]
    logits_BLV = logits(golden["leftpad.input_ids"], valid_BL, golden["leftpad.position_ids"])
    ours, wanted = (x[valid_BL == 1] for x in (logits_BLV, golden["leftpad.logits"]))
  else:
    ours, wanted = logits(golden["input_ids"]), golden["logits"]
  assert golden["leftpad.input_ids"].shape[1] > BLOCK
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)
