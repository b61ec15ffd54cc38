"""Constraints are kept in every setting, change nothing else, and cost no compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.diffusion import constraints, sampler
from diffucoder_jax.diffusion.pace import Pace
from tests.diffusion.toy import VOCAB, network

MASK, END, NEW = 14, 1, 8
PROMPTS = ([2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12])
PLAIN = sampler.SamplerConfig(
  alg="maskgit_plus", max_new_tokens=NEW, temperature=0.0, top_p=1.0, alternatives=2
)
pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.partial(jax.jit, static_argnames=("config", "slots", "batch_sizes"))
def denoise(canvas, valid, keys, given=None, config=PLAIN, slots=None, batch_sizes=()):
  return sampler.generate(
    network, canvas, valid, keys, config, mask_id=MASK, end_ids=(END,), slots=slots,
    batch_sizes=batch_sizes, constraints=given,
  )  # fmt: skip


def run(given=None, prompts=PROMPTS, rows=None, length=5 + NEW, **changes):
  slots, sizes = changes.pop("slots", None), changes.pop("batch_sizes", ())
  config = dataclasses.replace(PLAIN, **changes)
  canvas, valid = canvases.lay_out(prompts, length, config.max_new_tokens, MASK)
  rows = np.arange(len(prompts)) if rows is None else np.asarray(rows)
  keys = sampler.row_keys(0, len(PROMPTS))[rows]
  return jax.device_get(denoise(canvas, valid, keys, given, config, slots, sizes))


def new_tokens(trace):
  return trace.tokens[:, -NEW:]


def test_no_constraints_are_none():
  jax.tree.map(np.testing.assert_array_equal, run(constraints.together()), run())
  jax.tree.map(np.testing.assert_array_equal, run(constraints.ban([])), run())


def test_a_banned_token_is_as_if_the_network_never_meant_it():
  """Tokens, confidence, entropy and alternatives are those of the distribution without it."""
  logits_V = jnp.log(jnp.asarray([0.5, 0.2, 0.2, 0.1] + [0.0] * 12) + 1e-30)
  canvas = jnp.full((1, 3), MASK)
  trace = sampler.generate(
    lambda c, _: jnp.broadcast_to(logits_V, (*c.shape, VOCAB)), canvas, canvas > 0, None,
    dataclasses.replace(PLAIN, max_new_tokens=3), mask_id=MASK,
    constraints=constraints.ban([0], places=[1, 2]),
  )  # fmt: skip
  assert trace.tokens.tolist() == [[0, 1, 1]]
  np.testing.assert_allclose(trace.confidence, [[0.5, 0.4, 0.4]], rtol=1e-5)
  left = np.asarray([0.4, 0.4, 0.2])
  all_ = np.asarray([0.5, 0.2, 0.2, 0.1])
  entropy = [-(p * np.log(p)).sum() for p in (all_, left, left)]
  np.testing.assert_allclose(trace.entropy, [entropy], rtol=1e-5)
  assert trace.alternatives[0].tolist() == [[0, 1], [1, 2], [1, 2]]
  np.testing.assert_allclose(trace.alternative_probs[0, 1], [0.4, 0.4], rtol=1e-5)


def test_forced_tokens_are_there_from_the_start_and_cost_nothing():
  """What a canvas that holds them already gives, token for token; places count from the row's masks."""
  both = constraints.together(constraints.force([5, 6], at=2), constraints.force([9, 3], at=-2))
  trace = run(both, steps=NEW, schedule="uniform")
  prompts = [[*p, MASK, MASK, 5, 6, MASK, MASK, 9, 3] for p in PROMPTS]
  wanted = run(
    prompts=prompts, rows=range(4), max_new_tokens=0, steps=NEW, schedule="uniform", length=5 + NEW
  )
  np.testing.assert_array_equal(trace.tokens, wanted.tokens)
  np.testing.assert_array_equal(trace.step, wanted.step)
  assert (trace.step[:, -NEW:][:, [2, 3, 6, 7]] == -1).all() and trace.nfe.max() <= NEW - 4
  np.testing.assert_array_equal(sampler.history(trace, MASK)[0][:, [-6, -5, -2, -1]],
                                np.broadcast_to([5, 6, 9, 3], (4, 4)))  # fmt: skip


def test_a_forced_end_stops_a_row():
  rules = constraints.together(constraints.force([END], at=3), constraints.ban([END], [0, 1, 2]))
  trace = run(rules, stop_at_eos=True, alg="left_to_right")
  assert (new_tokens(trace)[:, 4:] == MASK).all() and (new_tokens(trace)[:, :3] != MASK).all()
  assert (trace.nfe == 3).all()


def end_after(least, logits_BWV, place_BW, written_BP, step_B):
  """A rule on the state: no end token while fewer than `least` tokens stand."""
  count_B = jnp.sum(written_BP != MASK, axis=1)
  early_B11 = (count_B < least)[:, None, None] & (step_B >= 0)[:, None, None]
  return jnp.where(
    early_B11 & (jnp.arange(VOCAB) == END)[None, None], constraints.NEVER, logits_BWV
  )


def repeated(token, tokens_BW, place_BW, written_BP, step_B):
  return jnp.where(place_BW % 3 == 0, token, tokens_BW)


EVERYTHING = constraints.together(
  constraints.ban([0, 13]),
  constraints.ban([2, 3, 4], places=[0, 1, 5]),
  constraints.only([5, 6, 7], places=[4]),
  constraints.force([10, 11], at=-2),
  constraints.on_tokens(repeated, 12),
)
SETTINGS = {
  "greedy": {},
  "drawn": dict(temperature=1.5, alg="entropy"),
  "origin": dict(alg="origin", temperature=1.0, steps=5),
  "left to right": dict(alg="left_to_right", temperature=1.0),
  "filtered": dict(alg="topk_margin", temperature=0.9, top_p=0.7, top_k=3),
  "blocks": dict(block_size=3, threshold=0.3, slots=NEW),
  "bounds": dict(entropy_bound=1.0, temperature=1.0, alg_temp=0.5, slots=NEW),
  "stable": dict(threshold=0.2, kl_bound=0.5, batch_sizes=(1, 2)),
  "revoked": dict(threshold=0.2, revoke=0.6, temperature=1.0, slots=NEW),
}


def assert_kept(trace):
  tokens_BN = new_tokens(trace)
  assert not np.isin(tokens_BN, [0, 13, MASK]).any()
  assert (tokens_BN[:, -2:] == [10, 11]).all()
  assert (tokens_BN[:, [0, 3]] == 12).all()
  assert not np.isin(tokens_BN[:, [1, 5]], [2, 3, 4]).any()
  assert np.isin(tokens_BN[:, 4], [5, 6, 7]).all()
  shown = sampler.history(trace, MASK)[:, :, -NEW:]
  assert not np.isin(shown, [0, 13]).any() and (shown[:, :, -2:] == [10, 11]).all()
  likely = trace.alternatives[:, -NEW:][trace.alternative_probs[:, -NEW:] > 0]
  assert not np.isin(likely, [0, 13]).any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_breaks_a_constraint(setting):
  assert_kept(run(EVERYTHING, **SETTINGS[setting]))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["drawn", "blocks", "revoked"])
def test_rows_do_not_know_of_each_other_nor_of_padding(setting):
  rules = constraints.together(EVERYTHING, constraints.on_logits(end_after, 5))
  together = run(rules, **SETTINGS[setting])
  for row in (0, 1):
    alone = run(rules, [PROMPTS[row]], [row], length=9 + NEW, **SETTINGS[setting])
    for name in ("tokens", "step"):
      np.testing.assert_array_equal(
        getattr(alone, name)[0, -NEW:], getattr(together, name)[row, -NEW:], err_msg=name
      )
    assert alone.nfe[0] == together.nfe[row]


def test_places_are_the_holes_of_a_row_in_their_order():
  prompts = [[2, MASK, 3, MASK, MASK], [MASK, 4, MASK, 5, 6, MASK]]
  rules = constraints.together(
    constraints.force([7], at=1),
    constraints.only([8], places=[0]),
    constraints.only([9], places=[2]),
  )
  for slots in (None, 3):
    trace = run(rules, prompts, length=8, max_new_tokens=0, steps=3, slots=slots)
    assert trace.tokens[0, 3:].tolist() == [2, 8, 3, 7, 9]
    assert trace.tokens[1, 2:].tolist() == [8, 4, 7, 5, 6, 9]


def test_a_rule_may_look_at_what_stands():
  """The bias towards the end token is so strong that without the rule it is all that is written."""

  def logits_fn(canvas, valid):
    return network(canvas, valid).at[..., END].add(100.0)

  canvas, valid = canvases.lay_out(PROMPTS, 5 + NEW, NEW, MASK)
  sample = functools.partial(
    sampler.generate, logits_fn, canvas, valid, None, PLAIN, mask_id=MASK, end_ids=(END,)
  )
  assert (np.asarray(sample().tokens)[:, -NEW:] == END).all()
  trace = sample(constraints=constraints.on_logits(end_after, 5))
  np.testing.assert_array_equal((np.asarray(trace.tokens)[:, -NEW:] == END).sum(axis=1), NEW - 5)


def test_a_token_that_a_hook_writes_is_the_one_that_is_measured():
  trace = run(constraints.on_tokens(repeated, 12))
  hooked = new_tokens(trace)[:, ::3]
  assert (hooked == 12).all()
  assert (trace.confidence[:, -NEW:][:, ::3] < 0.5).any()  # it was hardly ever the likeliest
  kept = run(constraints.on_tokens(repeated, MASK))  # the mask is not taken
  np.testing.assert_array_equal(kept.tokens, run().tokens)


def test_where_nothing_is_left_a_place_stays_masked_and_the_batch_does_not_notice():
  def nothing(logits_BWV, place_BW, written_BP, step_B):
    return jnp.where((place_BW == 2)[..., None], constraints.NEVER, logits_BWV)

  canvas, valid = canvases.lay_out(PROMPTS[:2], 5 + NEW, NEW, MASK)
  pace = Pace(np.asarray([2, 6], np.int32), np.full((2, 6), 0.5, np.float32))
  trace = jax.device_get(
    sampler.generate(
      network, canvas, valid, None, PLAIN, mask_id=MASK, pace=pace,
      constraints=constraints.on_logits(nothing),
    )
  )  # fmt: skip
  assert (new_tokens(trace)[:, 2] == MASK).all() and (trace.step[:, -NEW:][:, 2] == -1).all()
  assert (np.delete(new_tokens(trace), 2, axis=1) != MASK).all()
  assert np.isfinite(trace.confidence).all()
  assert trace.nfe[0] <= 2  # its own steps, and not its neighbour's


def test_other_ids_of_the_same_number_are_the_same_program():
  run(constraints.together(constraints.ban([3, 4]), constraints.force([5], at=0)))
  before = denoise._cache_size()
  traces = [
    run(constraints.together(constraints.ban(ids), constraints.force([token], at=at)))
    for ids, token, at in (([5, 6], 7, 1), ([7, 8], 9, -1))
  ]
  assert denoise._cache_size() == before
  assert (new_tokens(traces[0])[:, 1] == 7).all() and (new_tokens(traces[1])[:, -1] == 9).all()
  run(constraints.ban([3, 4, 5]))
  assert denoise._cache_size() > before


def test_what_cannot_be_kept_is_named():
  check = functools.partial(constraints.check, places=NEW, vocab_size=VOCAB, mask_id=MASK)
  check(EVERYTHING)
  check(constraints.together())
  check(constraints.force([]))
  for wrong, words in (
    (constraints.ban([VOCAB]), "id 16 is outside the vocabulary 0..15"),
    (constraints.ban([*range(MASK), 15]), "everything is banned at place 0"),
    (constraints.together(constraints.ban([5]), constraints.only([5], [3])), "banned at place 3"),
    (constraints.force([3], at=NEW), "at place 8, and the row has 8 places"),
    (constraints.force([3], at=-NEW - 1), "at place -9, and the row has 8 places"),
    (constraints.force([VOCAB]), "forced id 16 is outside the vocabulary"),
    (constraints.force([3, MASK]), r"the mask \(id 14\) is forced at place 1"),
    (constraints.together(constraints.force([3], 7), constraints.force([4], -1)), "tokens 3 and 4"),
    (constraints.together(constraints.force([3], 2), constraints.ban([3])), "place 2, and banned"),
  ):
    with pytest.raises(ValueError, match=words):
      check(wrong)
  for wrong, words in (
    (lambda: constraints.ban([-1]), "banned id -1 is negative"),
    (lambda: constraints.ban([1], [-1]), "place -1 is negative"),
    (lambda: constraints.force([1, 2, 3], at=-2), "beyond the row's end"),
  ):
    with pytest.raises(ValueError, match=words):
      wrong()


@pytest.mark.slow
def test_a_cache_keeps_them_too():
  """Blocks, read through a cache that is always as good as new."""

  def block(canvas_BL, valid_BL, start, kept=None):
    logits_BWV = jax.lax.dynamic_slice_in_dim(network(canvas_BL, valid_BL), start, 4, axis=1)
    return (logits_BWV, jnp.zeros(1)) if kept is None else logits_BWV

  canvas, valid = canvases.lay_out(PROMPTS, 5 + NEW, NEW, MASK)
  cached = dataclasses.replace(PLAIN, block_size=4, cache="dual")
  trace = jax.device_get(
    sampler.generate(
      (block, block), canvas, valid, None, cached, mask_id=MASK, constraints=EVERYTHING
    )
  )
  wanted = run(EVERYTHING, block_size=4, slots=NEW)
  for name in ("tokens", "step", "nfe"):
    np.testing.assert_array_equal(getattr(trace, name), getattr(wanted, name), err_msg=name)
  np.testing.assert_allclose(trace.confidence, wanted.confidence, rtol=0, atol=1e-5)
  assert_kept(trace)
