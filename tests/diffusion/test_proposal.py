"""Where proposals are made, a few at a time, against `propose` of everything at once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import proposal
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.runtime import sharding

BATCH, PLACES, WIDTH, VOCAB, MASK = 8, 7, 16, 300, 5
CONFIG = SamplerConfig(temperature=0.7, top_p=0.9, top_k=50, alternatives=2)


@pytest.fixture(scope="module")
def given():
  """(features, unembed, uniform, index)."""
  rng = np.random.default_rng(0)
  x_BSD = jnp.asarray(rng.normal(size=(BATCH, PLACES, WIDTH)), jnp.float32)
  matrix_DV = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), jnp.float32)
  uniform_BS = jnp.asarray(rng.random((BATCH, PLACES)), jnp.float32)
  index_BS = jnp.broadcast_to(jnp.arange(PLACES), (BATCH, PLACES))
  return x_BSD, lambda x_BSD: x_BSD @ matrix_DV, uniform_BS, index_BS


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_in_blocks_is_at_once(given, monkeypatch, temperature):
  """What CPUs do, and what others do, which nothing else here runs."""
  x_BSD, unembed, uniform_BS, index_BS = given
  config = SamplerConfig(temperature=temperature, top_p=0.9, top_k=50, alternatives=2)
  arrays = {"logits": unembed(x_BSD), "index": index_BS, "before": None, "standing": None,
            "uniform": uniform_BS if temperature else None}  # fmt: skip
  fn = functools.partial(proposal._propose, config, MASK, None)
  monkeypatch.setattr(proposal, "CPU_BLOCK", 2 * VOCAB)
  wanted = jax.jit(fn)(arrays)
  run = jax.jit(functools.partial(proposal._in_blocks, fn))
  for number in (PLACES, 3, 1, 0):
    got = run(arrays, jnp.asarray(number))
    for name, array in got.items():
      np.testing.assert_allclose(
        array[:, :number], wanted[name][:, :number], atol=1e-5, err_msg=name
      )


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_only_what_is_needed_is_proposed(given, monkeypatch, share, shards):
  """In chunks of 4 positions; on a mesh each device has others, and of them another number."""
  x_BSD, unembed, uniform_BS, index_BS = given
  wanted = proposal.propose(unembed(x_BSD), uniform_BS, index_BS, CONFIG, MASK)
  needed_BS = np.random.default_rng(1).random((BATCH, PLACES)) < share
  monkeypatch.setattr(proposal, "CHUNK", 4)
  monkeypatch.setattr(proposal, "platform", lambda: "tpu")
  seen = []

  def counted(x_BSD):
    jax.debug.callback(lambda _: seen.append(1), x_BSD[0, 0, 0])
    return unembed(x_BSD)

  @jax.jit
  def run(needed_BS, x_BSD, uniform_BS, index_BS):
    return proposal.propose_where(needed_BS, x_BSD, counted, uniform_BS, index_BS, CONFIG, MASK)

  mesh = sharding.make_mesh(dict(data=shards, fsdp=1, tensor=1), jax.devices()[:shards])
  with jax.set_mesh(mesh):
    got = run(needed_BS, x_BSD, uniform_BS, index_BS)
    jax.effects_barrier()
  most = needed_BS.reshape(shards, -1).sum(1).max()
  assert len(seen) == -(-most // 4)
  assert got.keys() == wanted.keys()
  for name, array in got.items():
    np.testing.assert_allclose(
      np.asarray(array)[needed_BS], np.asarray(wanted[name])[needed_BS], atol=1e-5, err_msg=name
    )


@pytest.mark.slow
def test_a_vocabulary_that_is_cut_is_neither_sorted_nor_put_together(topology):
  """As compiled for TPUs; a device's part, 192, is no multiple of larger blocks of the draw."""
  mesh = sharding.make_mesh(dict(data=2, fsdp=1, tensor=2), topology("v5e:2x2"))
  vocabulary = 384
  config = SamplerConfig(temperature=0.7, top_p=0.9, top_k=50, alg="topk_margin")

  def run(needed_BS, x_BSD, matrix_DV, uniform_BS, index_BS):
    def unembed(x_BSD):
      return sharding.constrain(x_BSD @ matrix_DV, "batch", None, "vocab")

    return proposal.propose_where(needed_BS, x_BSD, unembed, uniform_BS, index_BS, config, MASK)

  def array(dtype, *shape, axes=("data",)):
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=spec)

  with jax.set_mesh(mesh):
    shape = BATCH, 64
    text = jax.jit(run).lower(
      array(bool, *shape), array(jnp.float32, *shape, WIDTH),
      array(jnp.float32, WIDTH, vocabulary, axes=(None, "tensor")), array(jnp.float32, *shape),
      array(jnp.int32, *shape),
    ).compile().as_text()  # fmt: skip
  lines = [line.split("metadata")[0] for line in text.splitlines()]
  moved = [line for line in lines if re.search(r" (sort|all-gather|all-to-all)(-start)?\(", line)]
  assert moved and "all-reduce" in text
  assert not [line for line in moved if re.search(r"[\[,](384|192)[\],]", line)]
