"""Tokens that are masked again: when, how often, and what a trace says of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.diffusion import sampler, trace
from diffucoder_jax.evals import dumps, replay, viewer
from diffucoder_jax.evals import trace as pictures
from tests.diffusion.toy import VOCAB, network

MASK, END, NEW = 14, 1, 8
PROMPTS = ([2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12])
WINO = sampler.SamplerConfig(
  alg="maskgit_plus", max_new_tokens=NEW, temperature=0.0, top_p=1.0, threshold=0.7, revoke=0.5,
  steps=12,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_compile")


def probable(tokens, probs):
  """Logits that give each of `tokens` its probability, and tokens 8 to 13 the rest."""
  tokens, probs = (jnp.stack(jnp.broadcast_arrays(*x), axis=-1) for x in (tokens, probs))
  others_V = np.arange(VOCAB)
  rest = jnp.asarray(((others_V >= 8) & (others_V < MASK)) / 6)[None, None]
  one = jax.nn.one_hot(tokens, VOCAB)
  return jnp.log(one * probs[..., None] + rest * (1 - probs[..., None]) + 1e-30)


def changes_its_mind(canvas, valid):
  """Place 0 is 4, but 6 where place 1 is 5; place 2 is only sure of what stands there."""
  late = canvas[:, 1] == 5
  last = jnp.where(canvas[:, 2] == 7, 0.9, 0.6)
  return probable((jnp.where(late, 6, 4), 5, 7), (jnp.where(late, 0.9, 0.8), 0.75, last))


def fickle(canvas, valid):
  """Place 0 is 4, until that stands there; the others are not sure."""
  open_ = canvas[:, 0] == MASK
  first = (jnp.where(open_, 4, 6), jnp.where(open_, 0.9, 0.8))
  return probable((first[0], *[5] * 7), (first[1], *[0.6] * 7))


def one_row(logits_fn, places, **changes):
  canvas = jnp.full((1, places), MASK)
  config = dataclasses.replace(WINO, max_new_tokens=places, **changes)
  run = jax.jit(
    lambda: sampler.generate(
      logits_fn, canvas, canvas > 0, None, config, mask_id=MASK, end_ids=(END,)
    )
  )
  return jax.device_get(run())


def test_what_is_doubted_in_view_of_the_rest_is_masked_and_written_again():
  found = one_row(changes_its_mind, 3)
  assert found.tokens.tolist() == [[6, 5, 7]] and found.step.tolist() == [[2, 0, 1]]
  assert found.revoked.tolist() == [[[[4, 0, 1]], [[-1] * 3], [[-1] * 3]]]
  assert found.nfe.tolist() == [3]
  np.testing.assert_allclose(found.confidence, [[0.9, 0.75, 0.6]], rtol=1e-5)
  assert sampler.history(found, MASK)[:, 0].tolist() == [[4, 5, MASK], [MASK, 5, 7], [6, 5, 7]]


def test_a_rows_last_step_revokes_nothing():
  found = one_row(changes_its_mind, 3, steps=2)
  assert found.tokens.tolist() == [[4, 5, 7]] and (found.revoked == -1).all()


def test_the_bound_is_on_the_probability_of_what_stands():
  """Place 1 keeps 0.75."""
  for bound, events in ((0.74, 1), (0.76, 2)):
    assert (one_row(changes_its_mind, 3, revoke=bound).revoked[..., 0] >= 0).sum() == events


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_each_position_is_revoked_so_often_at_most(limit):
  found = one_row(fickle, 8, revoke_limit=limit, steps=40)
  assert found.tokens.tolist() == [[4, *[5] * 7]]
  wanted = [[4, 2 * i, 2 * i + 1] for i in range(limit)]
  assert found.revoked[0, 0].tolist() == wanted and (found.revoked[0, 1:] == -1).all()
  assert found.step[0, 0] == 2 * limit


def test_what_is_not_written_again_leaves_nothing_but_the_event():
  """The row ends, since all before its end token stands, in the step that revokes what is behind."""

  def logits_fn(canvas, valid):
    ended = canvas[:, 1] == END
    return probable((4, END, jnp.where(ended, 6, 7)), (0.3, 0.9, jnp.where(ended, 0.9, 0.8)))

  found = one_row(logits_fn, 3, stop_at_eos=True, alternatives=2)
  assert found.tokens.tolist() == [[4, END, MASK]] and found.step.tolist() == [[1, 0, -1]]
  assert found.revoked[0, 2].tolist() == [[7, 0, 1]]
  assert found.confidence[0, 2] == found.entropy[0, 2] == 0
  assert (found.alternatives[0, 2] == -1).all() and (found.alternative_probs[0, 2] == 0).all()
  assert sampler.history(found, MASK)[:, 0].tolist() == [[MASK, END, 7], [4, END, MASK]]


# On a network in which all hangs together.


@functools.partial(jax.jit, static_argnames=("config", "slots", "batch_sizes"))
def denoise(canvas, valid, keys, config, slots=None, batch_sizes=()):
  return sampler.generate(
    network, canvas, valid, keys, config, mask_id=MASK, end_ids=(END,), slots=slots,
    batch_sizes=batch_sizes,
  )  # fmt: skip


def run(prompts=PROMPTS, rows=None, length=5 + NEW, slots=None, batch_sizes=(), **changes):
  config = dataclasses.replace(WINO, **changes)
  canvas, valid = canvases.lay_out(prompts, length, config.max_new_tokens, MASK)
  rows = np.arange(len(prompts)) if rows is None else np.asarray(rows)
  keys = sampler.row_keys(0, len(PROMPTS))[rows]
  return jax.device_get(denoise(canvas, valid, keys, config, slots, batch_sizes))


SETTINGS = {
  "greedy": {},
  "drawn": dict(temperature=1.0, alg="entropy", alternatives=2),
  "blocks": dict(block_size=3, slots=NEW, temperature=1.0, revoke_limit=3),
  "scheduled": dict(threshold=1.0, temperature=0.7, schedule="uniform", steps=20, alg_temp=0.3),
  "bounds": dict(entropy_bound=1.0, slots=NEW, revoke=0.9, revoke_limit=2),
  "stable": dict(kl_bound=0.5, threshold=0.2, batch_sizes=(1, 2), alg="topk_margin"),
  "to the end": dict(stop_at_eos=True, temperature=1.3, batch_sizes=(2,)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_end_in_time_with_all_written(setting):
  changes = SETTINGS[setting]
  found, limit = run(**changes), changes.get("revoke_limit", 1)
  assert found.revoked.shape[2] == limit and (found.revoked[..., 0] >= 0).any()
  if "stop_at_eos" not in changes:
    assert (found.tokens[:, -NEW:] != MASK).all()
  assert (found.nfe <= changes.get("steps", WINO.steps)).all()
  token, committed, revoked = np.moveaxis(found.revoked, -1, 0)
  real = token >= 0
  assert (token[real] != MASK).all() and (committed[real] >= 0).all()
  assert (revoked[real] > committed[real]).all()
  given = np.broadcast_to((found.step < 0) & (found.tokens != MASK), real.shape[:2])
  assert not real[given].any()  # what was given stays


@pytest.mark.parametrize("setting", ["drawn", "blocks", "scheduled"])
def test_rows_do_not_know_of_each_other_nor_of_padding(setting):
  together = run(**SETTINGS[setting])
  for row in (0, 1):
    alone = run([PROMPTS[row]], [row], length=9 + NEW, **SETTINGS[setting])
    for name in ("tokens", "step", "revoked"):
      np.testing.assert_array_equal(
        getattr(alone, name)[0, -NEW:], getattr(together, name)[row, -NEW:], err_msg=name
      )
    assert alone.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("setting", ["drawn", "blocks", "scheduled"])
def test_history_is_what_the_network_saw(setting):
  seen, changes = [], dict(SETTINGS[setting])
  slots = changes.pop("slots", None)
  config = dataclasses.replace(WINO, **changes)
  canvas, valid = canvases.lay_out([PROMPTS[0]], 3 + NEW, NEW, MASK)
  sample = lambda keys: sampler.generate(  # noqa: E731
    functools.partial(network, seen=seen), canvas, valid, keys, config, mask_id=MASK, slots=slots
  )
  found = jax.device_get(jax.jit(sample)(sampler.row_keys(0, 1)))
  jax.effects_barrier()
  assert (found.revoked[..., 0] >= 0).any() and len(seen) == found.nfe[0]
  after = [canvas, *sampler.history(found, MASK)]
  changed = [b for a, b in zip(after[:-1], after[1:], strict=True) if (a != b).any()]
  np.testing.assert_array_equal(np.stack([canvas, *changed[:-1]]), np.stack(seen))
  np.testing.assert_array_equal(changed[-1], found.tokens)
  # And so do those that draw it, and those that ask the network again.
  states = [pictures.first_state(found, 0, MASK), *pictures.states(found, 0, MASK)]
  np.testing.assert_array_equal(np.stack(states), np.stack([canvas, *changed])[:, 0])


def test_a_bound_that_nothing_falls_below_changes_nothing():
  off, on = run(revoke=0.0), run(revoke=1e-30)
  assert off.revoked is None and (on.revoked == -1).all()
  for name in ("tokens", "step", "nfe", "confidence"):
    np.testing.assert_array_equal(getattr(off, name), getattr(on, name), err_msg=name)


# Files and pictures.


def test_files_say_that_they_hold_more(tmp_path):
  found = run(**SETTINGS["drawn"])
  sampler.save_trace(tmp_path / "2.npz", found)
  again = sampler.load_trace(tmp_path / "2.npz")
  jax.tree.map(np.testing.assert_array_equal, again, found)
  assert np.load(tmp_path / "2.npz")["version"] == 2
  plain = run(revoke=0.0)
  sampler.save_trace(tmp_path / "1.npz", plain)
  with np.load(tmp_path / "1.npz") as data:
    assert data["version"] == 1 and "revoked" not in data.files
  jax.tree.map(np.testing.assert_array_equal, sampler.load_trace(tmp_path / "1.npz"), plain)


def test_readers_of_traces_know_of_revocations(tmp_path):
  found = one_row(changes_its_mind, 3)
  sampler.save_trace(tmp_path / "0.npz", found)
  (row,) = dumps.read_file(tmp_path / "0.npz", dumps.Ids(MASK, (END,)), "keep")
  assert row.revised == 1 and row.step.tolist() == [2, 0, 1]
  before = [replay.canvas_before(row, step, MASK).tolist() for step in range(3)]
  assert before == [[MASK] * 3, [4, 5, MASK], [MASK, 5, 7]]
  assert pictures.events(found, 0) == [(0, 4, 0, 1)] and trace.last_step(found) == 2
  with pytest.raises(ValueError, match="masked again"):
    viewer.record(found, 0, None, "a")
  shapes = []
  pictures._plot_panel(shapes, found, 0, MASK, lambda step: f"#00000{step}", 3, 300.0, 0.0)
  boxes = [s for s in shapes if isinstance(s, pictures.Box) and "revoked" in s.title]
  assert [box.title for box in boxes] == ["position 0: committed at step 1, revoked at step 2"]
  down = pictures.PLOT_HEIGHT / 4
  np.testing.assert_allclose((boxes[0].y, boxes[0].height), (down, down))


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    (dict(revoke=1.5), r"sampler.revoke is 1.5; use a number in \[0, 1\]"),
    (dict(revoke=0.5, alg="origin"), "alg 'origin' does not commit by confidence"),
    (dict(revoke=0.5, alg="left_to_right"), "alg 'left_to_right' does not"),
    (
      dict(revoke=0.5, cache="dual", block_size=4, max_new_tokens=8),
      "set sampler.cache to none",
    ),
    (dict(revoke_limit=0), "sampler.revoke_limit is 0"),
  ],
)
def test_what_cannot_be_revoked_is_named(wrong, words):
  with pytest.raises(ValueError, match=words):
    sampler.SamplerConfig(**wrong)
