"""Blocks with a cache: exact where they can be, and the same in any batch."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import cache, constraints, sampler
from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.model import windows
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, init_params, unembed_fn

MASK, EOS = 30, 1
CONFIG = ModelConfig(
  vocab_size=32, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  rope_theta=1e4, init_std=0.5, remat="none",
)  # fmt: skip
PROMPTS = ([2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [], [13, 14, 15, 16])
NEW = 12
PLAIN = sampler.SamplerConfig(max_new_tokens=NEW, block_size=4, temperature=0.0, top_p=1.0)
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def params():
  return nn.unbox(init_params(Transformer(CONFIG), jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def denoise(layers, config, slots, params, canvas, valid, keys):
  model_config = dataclasses.replace(CONFIG, num_layers=layers)
  used = {**params, "layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
  model, window = Transformer(model_config), cache.WINDOWS.get(config.cache)
  return sampler.generate(
    windows.features_fn(model, used, config.block_size, window), canvas, valid, keys, config,
    mask_id=MASK, end_ids=(EOS,), slots=slots, unembed=unembed_fn(model, used),
  )  # fmt: skip


def run(params, layers=2, prompts=PROMPTS, rows=None, length=8 + NEW, slots=NEW, **changes):
  config = dataclasses.replace(PLAIN, **changes)
  canvas, valid = canvases.lay_out(prompts, length, config.max_new_tokens, MASK)
  keys = sampler.row_keys(0, len(PROMPTS))[
    np.asarray(range(len(prompts)) if rows is None else rows)
  ]
  return denoise(layers, config, slots, params, canvas, valid, keys)


def assert_same(trace, wanted):
  for name in ("tokens", "step", "nfe", "valid"):
    np.testing.assert_array_equal(getattr(trace, name), getattr(wanted, name), err_msg=name)
  np.testing.assert_allclose(trace.confidence, wanted.confidence, rtol=0, atol=1e-5)
  assert (np.asarray(trace.step)[:, -NEW:] >= 0).any(axis=1).all()


WAYS = {
  "greedy": {},
  "drawn": dict(temperature=0.8, top_p=0.9, alg="maskgit_plus"),
  "threshold": dict(threshold=0.3, steps=24),
  "bounds": dict(entropy_bound=0.5, schedule="uniform"),
  "to the end": dict(temperature=1.0, stop_at_eos=True, schedule="cosine"),
  "stable": dict(threshold=0.2, kl_bound=0.3, alg="topk_margin"),
}


QUICK = {("dual", "greedy"), ("prefix", "threshold")}  # the others take a minute of compilation


@pytest.mark.parametrize(
  ("kind", "way"),
  [
    pytest.param(kind, way, marks=[] if (kind, way) in QUICK else pytest.mark.slow)
    for kind in sorted(cache.WINDOWS)
    for way in WAYS
  ],
)
def test_a_cache_that_is_always_fresh_changes_nothing(params, kind, way):
  changes = WAYS[way]
  wanted = run(params, **changes)
  assert_same(run(params, cache=kind, refresh=1, **changes), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(cache.WINDOWS))
def test_one_layer_needs_no_refresh(params, kind):
  """Keys and values of its other places depend on nothing but themselves. So the window is read right,
  and what it holds now, not at the refresh, is seen."""
  assert_same(run(params, 1, cache=kind), run(params, 1))
  drawn = dict(temperature=1.0, top_p=0.9, threshold=0.5)
  assert_same(run(params, 1, cache=kind, **drawn), run(params, 1, **drawn))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(cache.WINDOWS))
def test_a_cache_is_an_approximation_that_refreshing_mends(params, kind):
  exact = run(params)
  apart = [
    (
      np.asarray(run(params, cache=kind, refresh=n).confidence) != np.asarray(exact.confidence)
    ).mean()
    for n in (0, 2, 1)
  ]
  assert apart[0] > 0 and apart[2] == 0, apart


@pytest.mark.parametrize(
  ("kind", "refresh"),
  [
    ("dual", 3),
    pytest.param("prefix", 0, marks=pytest.mark.slow),
    pytest.param("dual", 0, marks=pytest.mark.slow),
  ],
)
def test_rows_do_not_know_of_each_other(params, kind, refresh):
  changes = dict(cache=kind, refresh=refresh, temperature=0.8, threshold=0.6, stop_at_eos=True)
  together = run(params, **changes)
  for row in (0, 1, 3):
    alone = run(params, prompts=[PROMPTS[row]], rows=[row], length=10 + NEW, **changes)
    for name in ("tokens", "step"):
      np.testing.assert_array_equal(
        getattr(alone, name)[0, -NEW:], getattr(together, name)[row, -NEW:], err_msg=name
      )
    assert alone.nfe[0] == together.nfe[row]


@pytest.mark.slow
def test_blocks_come_one_after_the_other(params):
  trace = run(params, steps=6, schedule="uniform")
  step_BN = np.asarray(trace.step)[:, -NEW:]
  np.testing.assert_array_equal(step_BN // 2, np.broadcast_to(np.arange(NEW) // 4, step_BN.shape))
  np.testing.assert_array_equal(trace.nfe, 6)
  # Without the empty prompt: where all is masked all places are alike, and rounding chooses.
  whole = run(params, prompts=PROMPTS[:2], block_size=0)
  for width in (NEW, 5 * NEW):
    tokens = run(params, prompts=PROMPTS[:2], block_size=width).tokens
    np.testing.assert_array_equal(tokens, whole.tokens)


def test_holes_are_written_in_blocks_too(params):
  prompts = [[2, MASK, MASK, 4, MASK], [5, MASK, 6, 7, MASK]]
  trace = run(params, prompts=prompts, length=5, slots=3, max_new_tokens=0, block_size=2, steps=4)
  tokens_BL = np.asarray(trace.tokens)
  assert (tokens_BL != MASK).all()
  assert trace.step[0, 1] < 2 and trace.step[0, 2] < 2 and trace.step[0, 4] >= 2
  assert trace.step[1, 1] < 2 and trace.step[1, 4] < 2
  given_BL = np.asarray(prompts) != MASK
  np.testing.assert_array_equal(tokens_BL[given_BL], np.asarray(prompts)[given_BL])


READ, KEPT = 20, 21  # what the network below writes after each kind of evaluation


def reading(vocabulary, width):
  """A network that tells how it was asked: (fresh, again) of `cache.look`."""
  logits = lambda token, batch: 9.0 * jax.nn.one_hot(  # noqa: E731
    jnp.full((batch, width), token), vocabulary
  )
  fresh = lambda canvas_BL, valid_BL, start: (logits(READ, len(canvas_BL)), jnp.zeros(1))  # noqa: E731
  again = lambda canvas_BL, valid_BL, start, kept: logits(KEPT, len(canvas_BL))  # noqa: E731
  return fresh, again


@pytest.mark.parametrize(
  ("changes", "ids", "kinds"),
  [
    # Of as many steps as places the first commits nothing, the last two.
    (dict(refresh=2), [], [[READ], [KEPT], [READ, READ]] * 3),
    (dict(refresh=0), [], [[READ], [KEPT], [KEPT, KEPT]] * 3),
    (dict(refresh=1), [], [[READ], [READ], [READ, READ]] * 3),
    (dict(refresh=3, schedule="uniform"), [], [[READ], [KEPT], [KEPT], [READ]] * 3),
    # With two of four places forced the first two steps commit nothing.
    (dict(refresh=0), [7, 7], [[READ, READ], *[[READ], [KEPT], [KEPT, KEPT]] * 2]),
    (dict(refresh=2), [7, 7, 7], [[READ], *[[READ], [KEPT], [READ, READ]] * 2]),
    (dict(refresh=0, alg="left_to_right"), [7, 7, 7], [[READ], *[[READ], *[[KEPT]] * 3] * 2]),
  ],
)
def test_evaluations_age_a_cache_and_steps_without_one_do_not(changes, ids, kinds):
  config = dataclasses.replace(PLAIN, cache="dual", **changes)
  canvas, valid = canvases.lay_out([[2, 3]], 2 + NEW, NEW, MASK)
  trace = sampler.generate(
    reading(32, 4), canvas, valid, None, config, mask_id=MASK,
    constraints=constraints.force(ids),
  )  # fmt: skip
  tokens_N, step_N = np.asarray(trace.tokens)[0, 2:], np.asarray(trace.step)[0, 2:]
  steps = [step for step in np.unique(step_N) if step >= 0]
  assert [tokens_N[step_N == step].tolist() for step in steps] == kinds
  assert trace.nfe[0] == len(kinds)


@pytest.mark.parametrize("kind", sorted(cache.WINDOWS))
def test_a_block_with_forced_tokens_is_read_with_its_prompt(params, kind):
  """What each block commits first is what the exact sampler would, given what stands before it."""
  limits = constraints.force([9, 9], at=2)
  for prompt in ([2, 3, 4], [13, 14, 15]):
    traces = []
    for name in (kind, "none"):
      config = dataclasses.replace(PLAIN, cache=name)
      canvas, valid = canvases.lay_out([prompt], 4 + NEW, NEW, MASK)
      model = Transformer(CONFIG)
      window = cache.WINDOWS.get(name)
      traces.append(
        sampler.generate(
          windows.features_fn(model, params, 4, window), canvas, valid, None, config, mask_id=MASK,
          slots=NEW, unembed=unembed_fn(model, params), constraints=limits,
        )  # fmt: skip
      )
    cached, exact = (jax.tree.map(np.asarray, trace) for trace in traces)
    first = exact.step == exact.step[exact.step >= 0].min()
    assert first.any()
    np.testing.assert_array_equal(cached.step == cached.step[cached.step >= 0].min(), first)
    np.testing.assert_array_equal(cached.tokens[first], exact.tokens[first])
    np.testing.assert_allclose(cached.confidence[first], exact.confidence[first], atol=1e-5)


def test_what_cannot_be_cached_is_named(params):
  with pytest.raises(ValueError, match="needs a block_size that divides max_new_tokens"):
    sampler.SamplerConfig(cache="dual", max_new_tokens=10, block_size=4)
  with pytest.raises(ValueError, match="needs a block_size"):
    sampler.SamplerConfig(cache="dual")
  with pytest.raises(ValueError, match="choose one of"):
    sampler.SamplerConfig(cache="both", block_size=8)
  causal = Transformer(dataclasses.replace(CONFIG, attention="causal"))
  with pytest.raises(ValueError, match="networks that see both ways"):
    windows.features_fn(causal, params, 4, cache.WINDOWS["dual"])
  config = dataclasses.replace(PLAIN, cache="dual")
  cache.check(config, NEW)
  cache.check(PLAIN, NEW + 1)
  with pytest.raises(ValueError, match="a row has 13 masks where 12"):
    cache.check(config, NEW + 1)
  with pytest.raises(ValueError, match="a canvas of 12 places has none before its 12 new tokens"):
    sampler.generate(None, np.zeros((2, NEW)), None, None, config, mask_id=MASK)
  with pytest.raises(ValueError, match="leave out batch_sizes"):
    sampler.generate(None, np.zeros((2, 16)), None, None, config, mask_id=MASK, batch_sizes=(1,))
