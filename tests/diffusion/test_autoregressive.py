"""Decoding with a cache writes what the sampler writes left to right without one, token for token."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import autoregressive, sampler
from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import (
  Transformer,
  canvas_logits_fn,
  init_params,
  next_logits_fn,
)
from diffucoder_jax.runtime import sharding

MASK, EOS, VOCAB = 30, 1, 32
CONFIG = ModelConfig(
  vocab_size=VOCAB, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  rope_theta=1e4, init_std=0.5, remat="none", attention="causal",
)  # fmt: skip
PROMPTS = ([2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16])
NEW = 10
GREEDY = sampler.SamplerConfig(
  alg="left_to_right", max_new_tokens=NEW, temperature=0.0, top_p=1.0, steps=NEW
)
SETTINGS = {
  "drawn": dict(temperature=0.8, top_p=0.9),
  "greedy": {},
  "greedy, filtered": dict(top_p=0.9, top_k=7),
  "drawn, top k": dict(temperature=1.3, top_k=5, steps=NEW + 9),
  "drawn, to the end": dict(temperature=1.0, stop_at_eos=True),
  "greedy, to the end": dict(stop_at_eos=True, max_new_tokens=24, steps=0),
}
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def params():
  return nn.unbox(init_params(Transformer(CONFIG), jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def cached(model_config, config, params, canvas, valid, keys):
  logits_fn = next_logits_fn(Transformer(model_config), params, valid)
  return autoregressive.generate(
    logits_fn, canvas, valid, keys, config, mask_id=MASK, end_ids=(EOS,)
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def uncached(model_config, config, params, canvas, valid, keys):
  logits_fn = canvas_logits_fn(Transformer(model_config), params)
  return sampler.generate(logits_fn, canvas, valid, keys, config, mask_id=MASK, end_ids=(EOS,))


def assert_same(trace, wanted):
  for name in ("tokens", "step", "confidence", "nfe", "valid"):
    np.testing.assert_array_equal(getattr(trace, name), getattr(wanted, name), err_msg=name)
  assert (np.asarray(trace.step) >= 0).any()
  np.testing.assert_allclose(trace.entropy, wanted.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  "name", [n if n == "drawn" else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS]
)
def test_a_cache_changes_no_token(params, name):
  """Rows of 1 to 7 tokens, padded left; key heads that serve two query heads each."""
  config = dataclasses.replace(GREEDY, **SETTINGS[name])
  new = config.max_new_tokens
  canvas, valid = canvases.lay_out(PROMPTS, 8 + new, new, MASK)
  keys = sampler.row_keys(3, len(PROMPTS))
  trace = cached(CONFIG, config, params, canvas, valid, keys)
  assert_same(trace, uncached(CONFIG, config, params, canvas, valid, keys))
  assert len(np.unique(np.asarray(trace.tokens)[:, -new:])) > 3, (
    "says nothing: all tokens are alike"
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"tied_head": True, "qkv_bias": False},
    {"num_kv_heads": 1},
    {"attention_impl": "blockwise"},
    {"lora_rank": 2},
  ],
)
def test_every_network(changes):
  model_config = dataclasses.replace(CONFIG, **changes)
  params = nn.unbox(init_params(Transformer(model_config), jax.random.key(4)))
  canvas, valid = canvases.lay_out(PROMPTS, 8 + NEW, NEW, MASK)
  config = dataclasses.replace(GREEDY, temperature=0.7)
  arrays = params, canvas, valid, sampler.row_keys(1, 4)
  assert_same(cached(model_config, config, *arrays), uncached(model_config, config, *arrays))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_neighbours_and_padding_change_nothing(params, temperature):
  config = dataclasses.replace(GREEDY, temperature=temperature)
  keys = sampler.row_keys(3, len(PROMPTS))

  def written(rows, padding):
    chosen = [PROMPTS[b] for b in rows]
    length = max(map(len, chosen)) + NEW + padding
    arrays = *canvases.lay_out(chosen, length, NEW, MASK), keys[np.asarray(rows)]
    trace = cached(CONFIG, config, params, *arrays)
    return dict(zip(rows, np.asarray(trace.tokens)[:, -NEW:].tolist(), strict=True))

  together = written([0, 1, 2, 3], 1)
  assert together == written([3, 1, 0, 2], 13)
  for b in range(4):
    assert written([b], 0) == {b: together[b]}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (4, 1, 2)])
def test_a_mesh_changes_no_token(params, shape):
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
  config = dataclasses.replace(GREEDY, temperature=0.8, top_p=0.9)
  canvas, valid = canvases.lay_out(PROMPTS * 2, 8 + NEW, NEW, MASK)
  keys = sampler.row_keys(3, 8)
  wanted = cached(CONFIG, config, params, canvas, valid, keys)
  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(lambda: init_params(Transformer(CONFIG), jax.random.key(0)))
    placed = jax.device_put(params, sharding.shardings(boxed, mesh))
    by_row = sharding.batch_sharding(mesh)
    arrays = [jax.device_put(x, by_row) for x in (canvas, valid, keys)]
    assert_same(jax.device_get(cached(CONFIG, config, placed, *arrays)), wanted)
    # The loop's cache is cut by rows and by key heads: no device holds another's part.
    text = cached.lower(CONFIG, config, placed, *arrays).compile().as_text()
  rows, heads = 8 // (shape[0] * shape[1]), CONFIG.num_kv_heads // shape[2]
  part = f"f32[{CONFIG.num_layers},{rows},{8 + NEW},{heads},{CONFIG.head_dim}]"
  whole = f"f32[{CONFIG.num_layers},8,{8 + NEW},{CONFIG.num_kv_heads},{CONFIG.head_dim}]"
  assert part in text and whole not in text


def counting(script, calls):
  """A network that says `script`[row][place] whatever it reads, and notes what it is asked."""

  def logits_fn(tokens_BS, start, cache):
    jax.debug.callback(
      lambda *x: calls.append([y.tolist() for y in x]), tokens_BS, start, ordered=True
    )
    place = start + tokens_BS.shape[1]
    column_B = jnp.take(jnp.asarray(script), place, axis=1)
    return 9.0 * jax.nn.one_hot(column_B, VOCAB), jnp.zeros(())

  return logits_fn


def test_each_token_is_read_once_and_ended_rows_are_waited_for_no_longer():
  script = np.asarray([[0, 0, 5, 6, EOS, 7, 7, 7, 7], [0, 0, 8, 2, 9, 9, EOS, 3, 3]])
  canvas, valid = canvases.lay_out([[4, 4], [3]], 9, 7, MASK)
  config = dataclasses.replace(GREEDY, max_new_tokens=7, stop_at_eos=True)
  calls = []
  trace = autoregressive.generate(
    counting(script, calls), canvas, valid, None, config, mask_id=MASK, end_ids=(2, EOS)
  )
  jax.effects_barrier()
  assert trace.tokens.tolist() == [
    [4, 4, 5, 6, EOS, *[MASK] * 4], [0, 3, 8, 2, *[MASK] * 5],
  ]  # fmt: skip
  assert trace.step.tolist() == [[-1, -1, 0, 1, 2, *[-1] * 4], [-1, -1, 0, 1, *[-1] * 5]]
  assert trace.nfe.tolist() == [3, 2]
  assert [call[1] for call in calls] == [0, 2, 3]
  assert calls[0][0] == [[4, 4], [0, 3]] and calls[1][0] == [[5], [8]] and calls[2][0][0] == [6]


def test_what_it_cannot_write_is_refused():
  canvas, valid = canvases.lay_out([[4, 4]], 4, 2, MASK)
  short = dataclasses.replace(GREEDY, max_new_tokens=2, steps=0)
  write = lambda config, canvas=canvas: autoregressive.generate(  # noqa: E731
    None, canvas, valid, None, config, mask_id=MASK
  )
  for changes in ({"alg": "entropy"}, {"steps": 1}, {"alg_temp": 0.5}, {"max_new_tokens": 0}):
    with pytest.raises(ValueError, match="one token after the other is alg 'left_to_right'"):
      write(dataclasses.replace(short, **changes))
  with pytest.raises(ValueError, match="no token to start from"):
    write(short, canvas[:, 2:])
  with pytest.raises(ValueError, match="needs an end token"):
    write(dataclasses.replace(short, stop_at_eos=True))
  both_ways = Transformer(dataclasses.replace(CONFIG, attention="full"))
  with pytest.raises(ValueError, match="'full'; only causal networks"):
    next_logits_fn(both_ways, {}, valid)
  assert autoregressive.can_write(short, 2) and not autoregressive.can_write(short, 3)
