"""Splash attention: the numbers of `xla` in JAX's interpreter, and its real compilation for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from diffucoder_jax.model import attention, splash
from diffucoder_jax.runtime import sharding
from tests.model.test_blockwise import both_passes

pytestmark = pytest.mark.usefixtures("quick_compile")

interpreted = functools.partial(splash.attend, interpret=True)
# Packed documents with padding on the right, on the left, on both sides, and nothing but padding.
PACKED = ((1, 1, 2, 0), (0, 1, 2, 3), (0, 0, 4, 0), (0, 0, 0, 0))


def inputs(length, heads, kv_heads, head_dim, dtype="float32", batch=4):
  """q, k, v and the output's cotangent, of standard deviation 1."""
  rng = np.random.default_rng(0)
  shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def packed(length, batch=4):
  """int32 [batch, length]: four unequal parts of each row, by `PACKED`."""
  part = np.searchsorted((length // 5, length // 2, length - 9), np.arange(length), side="right")
  return np.asarray([np.asarray(PACKED[row % 4], np.int32)[part] for row in range(batch)])


def compare(length, heads, kv_heads, head_dim, kind, segments, dtype="float32"):
  """Largest error of each of (o, dq, dk, dv) against `xla` in float32, over its largest value."""
  segment_ids = packed(length) if segments else None
  run = jax.jit(both_passes, static_argnums=0)
  pattern = attention.PATTERNS[kind]
  args = inputs(length, heads, kv_heads, head_dim, dtype)
  ours = run(interpreted, *args, segment_ids, pattern)
  wanted = run(attention._xla, *(x.astype("float32") for x in args), segment_ids, pattern)
  for got, want in zip(ours, wanted, strict=True):
    assert got.dtype == dtype and np.abs(want).max() > 0.5
  return [
    np.abs(got.astype("float32") - want).max() / max(1, np.abs(want).max())
    for got, want in zip(ours, wanted, strict=True)
  ]


@pytest.mark.parametrize(
  "length, heads, kv_heads, kind, segments",
  [
    (37, 2, 1, "full", True),  # one block, which it fills in part; one head of keys for all
    (100, 2, 2, "full", False),  # filled up without segments
    (128, 4, 2, "causal", False),
    pytest.param(128, 2, 2, "full", False, marks=pytest.mark.slow),
    pytest.param(200, 4, 2, "causal", True, marks=pytest.mark.slow),
    pytest.param(600, 2, 1, "causal", True, marks=pytest.mark.slow),  # two blocks of 384
    pytest.param(1100, 2, 1, "full", True, marks=pytest.mark.slow),  # three, so keys one by one
    pytest.param(1024, 3, 3, "causal", False, marks=pytest.mark.slow),
  ],
)
def test_equals_xla(length, heads, kv_heads, kind, segments):
  assert max(compare(length, heads, kv_heads, 16, kind, segments)) <= 1e-5
  assert max(compare(length, heads, kv_heads, 16, kind, segments, "bfloat16")) <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", (8, 64, 96, 128))
def test_equals_xla_at_other_head_dims(head_dim):
  assert max(compare(140, 2, 1, head_dim, "causal", True)) <= 1e-5


def test_padding_neither_gets_nor_gives():
  """Also a row of nothing but padding, and a loss that reads what padding returns."""
  segment_ids = packed(37)
  q, k, v, do = inputs(37, 2, 1, 8)

  @jax.jit
  def run():
    o, pull = jax.vjp(lambda q, k, v: interpreted(q, k, v, segment_ids, attention.FULL), q, k, v)
    return [o, *pull(do)]

  for x in run():
    assert np.isfinite(x).all()
    assert (x[segment_ids == 0] == 0).all() and np.abs(x[segment_ids > 0]).max() > 0.5


def test_a_sharded_mesh_computes_in_place():
  """Rows over (data, fsdp), heads over tensor: one device's numbers."""
  segment_ids = packed(40, batch=8)
  args = (*inputs(40, 4, 2, 8, batch=8), segment_ids)
  run = jax.jit(lambda *args: both_passes(interpreted, *args, attention.CAUSAL))
  wanted = run(*args)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    rows, heads = (PartitionSpec(sharding.BATCH_AXES, None, *axes) for axes in ((), ("tensor",)))
    placed = [jax.device_put(x, NamedSharding(mesh, heads if x.ndim == 4 else rows)) for x in args]
    ours = run(*placed)
  assert {x.addressable_shards[0].data.shape for x in ours} == {(2, 40, 2, 8), (2, 40, 1, 8)}
  for got, want in zip(ours, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_blocks_cover_any_length():
  assert [splash.block_size(n) for n in (1, 128, 129, 512, 4096)] == [
    (128, 1), (128, 1), (256, 1), (512, 1), (512, 8)
  ]  # fmt: skip
  for length in range(1, 9000, 7):
    block, blocks = splash.block_size(length)
    assert block <= splash.LARGEST_BLOCK and block % splash.LANES == 0
    assert 0 <= block * blocks - length < splash.LANES * blocks


@pytest.mark.parametrize("name", ("splash", "cudnn"))
def test_where_a_kernel_cannot_run_a_line_says_so_once(name, monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "info", lambda line, *args: lines.append(line % args))
  attention._say.cache_clear()
  q, k, v, _ = inputs(20, 2, 1, 8)
  patterns = {**attention.PATTERNS, "annealed": attention.annealed(0.3, jax.random.key(0))}
  for pattern in patterns.values():
    for _ in range(2):
      o = attention.attend(q, k, v, packed(20), pattern, name)
    np.testing.assert_array_equal(o, attention.attend(q, k, v, packed(20), pattern, "blockwise"))
  reasons = {"for TPU, not for cpu", "no annealed pattern"} if name == "splash" else {"not for cpu"}
  assert len(lines) == len(reasons) and all(name in line for line in lines)
  assert all(any(reason in line for line in lines) for reason in reasons)


@pytest.mark.slow
def test_compiles_for_tpu(topology):
  """Three kernels, forward and backward, for v5e-16 with the heads cut in two."""
  mesh = sharding.make_mesh(dict(data=1, fsdp=-1, tensor=2), topology("v5e:4x4"))
  heads = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, None, "tensor", None))
  rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, None))

  def total(q, k, v, segment_ids, kind):
    o = attention.attend(q, k, v, segment_ids, attention.PATTERNS[kind], "splash")
    return jnp.sum(o.astype(jnp.float32))

  with jax.set_mesh(mesh):
    for length, head_dim, kind in ((2048, 128, "full"), (300, 64, "causal")):
      q, k = (
        jax.ShapeDtypeStruct((8, length, n, head_dim), jnp.bfloat16, sharding=heads) for n in (8, 4)
      )
      segment_ids = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=rows)
      step = jax.jit(jax.grad(total, argnums=(0, 1, 2)), static_argnums=4)
      text = step.lower(q, k, k, segment_ids, kind).compile().as_text()
      assert text.count('custom_call_target="tpu_custom_call"') == 3
      assert "all-gather" not in text and "all-reduce" not in text
