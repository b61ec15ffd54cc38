"""Filters, confidences and schedules against closed forms; Dream's own are in the golden tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import remasking

REMOVED = np.finfo(np.float32).min


def test_top_p_keeps_the_token_that_crosses_and_at_least_one():
  logits = jnp.log(jnp.asarray([[[0.5, 0.3, 0.15, 0.05]]]))
  kept = lambda p: (remasking.filtered_probs(logits, top_p=p) > 0)[0, 0].tolist()  # noqa: E731
  assert kept(0.6) == [True, True, False, False]
  assert kept(0.01) == [True, False, False, False]
  assert kept(0.9) == [True, True, True, False]


@pytest.mark.parametrize("top_k, kept", [(1, 1), (2, 3), (3, 3), (4, 4), (0, 4)])
def test_top_k_keeps_ties(top_k, kept):
  logits = jnp.asarray([[[2.0, 1.0, 1.0, 0.0]]])
  probs = remasking.filtered_probs(logits, top_k=top_k)
  assert (probs > 0)[0, 0].tolist() == [i < kept for i in range(4)]


def test_a_token_stays_when_those_above_it_make_exactly_top_p():
  edge = remasking._nucleus_edge(jnp.asarray([[[0.5, 0.25, 0.125, 0.125]]]), 0.75)
  assert edge[0, 0] == 0.125
  edge = remasking._nucleus_edge(jnp.asarray([[[0.5, 0.25, 0.125, 0.125]]]), 0.7)
  assert edge[0, 0] == 0.25


def test_temperature_comes_before_the_nucleus():
  """Squared and renormalised, the first token alone passes 0.6."""
  logits = jnp.log(jnp.asarray([[[0.5, 0.3, 0.2]]]))
  for temperature, kept in ((0.0, 2), (0.5, 1)):
    probs = remasking.filtered_probs(logits, temperature, top_p=0.6)
    assert (probs > 0).sum() == kept


def test_confidences_are_their_definitions():
  probs = jnp.asarray([[[0.5, 0.25, 0.25, 0.0]] * 3])
  drawn = jnp.asarray([[2, 0, 1]])
  wanted = {
    "origin": [0.25, 0.5, 0.25],
    "maskgit_plus": [0.25, 0.5, 0.25],
    "topk_margin": [0.25] * 3,
    "entropy": [0.5 * np.log(0.5) + 0.5 * np.log(0.25)] * 3,  # finite: 0 log 0 = 0
    "left_to_right": [0, -1, -2],
  }
  assert wanted.keys() == remasking.CONFIDENCE.keys()
  for alg, want in wanted.items():
    got = remasking.CONFIDENCE[alg](probs, drawn, jnp.arange(drawn.shape[1])[None])
    np.testing.assert_allclose(got, [want], rtol=1e-6, err_msg=alg)


@pytest.mark.parametrize(
  "alg, counts",
  [
    ("entropy", [2, 2, 2, 4]),  # 2.498, 2.66, 2.994 truncated; without eps the third would be 3.0
    ("left_to_right", [3, 3, 2, 2]),
  ],
)
def test_ten_masks_in_four_steps(alg, counts):
  left, got, ratios_T = jnp.asarray([10]), [], remasking.commit_ratios(4, 1e-3)
  for step in range(4):
    got.append(int(remasking.commit_count(alg, left, step, 4, ratios_T[step])[0]))
    left -= got[-1]
  assert got == counts


@pytest.mark.parametrize("count, chosen", [(0, []), (1, [1]), (2, [1, 2]), (3, [0, 1, 2])])
def test_the_surest_masked_positions_are_chosen_and_the_first_on_ties(count, chosen):
  confidence = jnp.asarray([[0.5, 0.9, 0.9, 0.1, 0.95]])
  masked = jnp.asarray([[True, True, True, True, False]])
  got = remasking.choose_positions(confidence, masked, jnp.asarray([count]))
  assert np.flatnonzero(got[0]).tolist() == chosen


@pytest.mark.parametrize("vocabulary", [7, 300])  # one block of the sum and several
def test_tokens_are_drawn_with_their_probabilities_and_impossible_ones_never(vocabulary):
  rng = np.random.default_rng(0)
  logits_V = rng.normal(size=vocabulary).astype(np.float32) * 2
  logits_V[::3] = REMOVED
  draws = 20_000
  logits_1LV = jnp.broadcast_to(jnp.asarray(logits_V), (1, draws, vocabulary))
  u_1L = jnp.asarray((np.arange(draws) + rng.random(draws)) / draws, jnp.float32)[None]
  probs_1LV = remasking.filtered_probs(logits_1LV)
  drawn_1L, _ = remasking.draw_tokens(logits_1LV, probs_1LV, -1, u_1L)
  share_V = np.bincount(np.asarray(drawn_1L[0]), minlength=vocabulary) / draws
  # One number in each of equal parts of [0, 1): no share is off by more than two parts.
  np.testing.assert_allclose(share_V, probs_1LV[0, 0], atol=2.1 / draws)
  assert (share_V[::3] == 0).all()


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
  probs_V = np.zeros(300, np.float32)
  probs_V[[130, 131, 260]] = 0.1, 0.6, 0.3
  probs_1LV = jnp.asarray(probs_V)[None, None].repeat(3, axis=1)
  u_1L = jnp.asarray([[0.0, np.nextafter(np.float32(1), np.float32(0)), 0.5]])
  assert remasking.draw_tokens(probs_1LV, probs_1LV, -1, u_1L)[0].tolist() == [[130, 260, 131]]


def test_rounding_at_the_end_of_the_interval_draws_no_impossible_token():
  logits_LV = np.random.default_rng(0).normal(size=(4000, 128)).astype(np.float32)
  logits_LV[:, 120:] = REMOVED
  u_1L = jnp.full((1, 4000), np.nextafter(np.float32(1), np.float32(0)))
  logits_1LV = jnp.asarray(logits_LV)[None]
  drawn_1L = remasking.draw_tokens(logits_1LV, remasking.filtered_probs(logits_1LV), -1, u_1L)[0]
  assert int(drawn_1L.max()) < 120


def sorted_filter(logits_NV, top_p, top_k):
  """What stays, by sorting, in float64: all that is at least as likely as the last one that has to."""
  probs_NV = np.exp(logits_NV - logits_NV.max(-1, keepdims=True), dtype=np.float64)
  probs_NV /= probs_NV.sum(-1, keepdims=True)
  kept_NV = np.ones(probs_NV.shape, bool)
  for row, probs_V in enumerate(probs_NV):
    falling_V = np.sort(probs_V)[::-1]
    before_V = np.cumsum(falling_V) - falling_V
    if top_p < 1:
      kept_NV[row] = probs_V >= falling_V[before_V <= top_p][-1]
    left_V = np.where(kept_NV[row], logits_NV[row], -np.inf)
    if 0 < top_k < len(left_V):
      kept_NV[row] &= left_V >= np.sort(left_V)[-top_k]
  return kept_NV


@pytest.mark.parametrize(
  "top_p, top_k", [(0.3, 0), (0.9, 9), (0.999, 256), (0.999, 2), (1.0, 1), (1.0, 50), (1.0, 400)]
)
def test_the_searches_keep_what_a_sort_keeps(top_p, top_k):
  rng = np.random.default_rng(0)
  logits_NV = rng.normal(size=(40, 257)).astype(np.float32) * np.linspace(0.1, 9, 40)[:, None]
  logits_NV = logits_NV.astype(np.float32)
  logits_NV[:9] = np.round(logits_NV[:9], 1)  # ties
  logits_NV[9] = 1.0  # nothing else
  logits_NV[10, 7] = 60.0  # nearly everything
  logits_NV[11] = np.abs(logits_NV[11]) - 50.0  # all of one sign, and zeros
  logits_NV[12] = np.maximum(logits_NV[12], 0.0)
  logits_NV[13, 100:] = -np.inf
  # Each alone: together they go on until the last one is found.
  one = lambda logits_V: remasking.filtered_probs(logits_V[None, None], 0.0, top_p, top_k)[0, 0]  # noqa: E731
  probs_NV = np.asarray(jax.lax.map(one, jnp.asarray(logits_NV)))
  kept_NV = sorted_filter(logits_NV, top_p, top_k)
  # Of what is kept, the least likely may be too unlikely for a float32.
  possible_NV = logits_NV > logits_NV.max(-1, keepdims=True) - 80
  np.testing.assert_array_equal((probs_NV > 0)[possible_NV], kept_NV[possible_NV])
  assert not probs_NV[~kept_NV].any()
  np.testing.assert_allclose(probs_NV.sum(-1), 1, atol=1e-5)


def test_the_margin_of_two_that_are_tied_is_nothing():
  probs = jnp.asarray([[[0.25, 0.4, 0.1, 0.25], [0.1, 0.4, 0.1, 0.4], [0.7, 0.1, 0.1, 0.1]]])
  got = remasking.CONFIDENCE["topk_margin"](probs, None, None)
  np.testing.assert_allclose(got[0], [0.15, 0, 0.6], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 12, 41, 47, 55, 82, 256, 512])
def test_uniform_commits_as_many_at_each_step(steps):
  """41 times the rounded 1 / 41 is less than 1."""
  ratios_T = remasking.commit_ratios(steps, 1e-3, "uniform")
  for each in (1, 3, 7):
    counts = []
    for step in range(steps):
      left = jnp.asarray([each * steps - sum(counts)])
      counts.append(int(remasking.commit_count("entropy", left, step, steps, ratios_T[step])[0]))
    assert counts == [each] * steps


@pytest.mark.parametrize("schedule", sorted(remasking.SCHEDULES))
def test_every_schedule_commits_everything(schedule):
  for steps, left in ((1, 7), (4, 10), (12, 12), (9, 64)):
    ratios_T, counts = remasking.commit_ratios(steps, 1e-3, schedule), []
    for step in range(steps):
      count = remasking.commit_count(
        "entropy", jnp.asarray([left - sum(counts)]), step, steps, ratios_T[step]
      )
      counts.append(int(count[0]))
    assert sum(counts) == left and min(counts) >= 0, (steps, left)
    if schedule == "cosine" and steps > 1:
      assert counts[0] <= counts[-1]


def test_the_entropy_bound_is_on_what_tokens_tell_about_each_other():
  rng = np.random.default_rng(0)
  confidence = rng.normal(size=(20, 9)).astype(np.float32)
  entropy = rng.exponential(size=(20, 9)).astype(np.float32)
  masked = rng.random((20, 9)) < 0.7
  for bound in (0.0, 0.5, 2.0, 100.0):
    got = np.asarray(remasking.within_entropy_bound(bound, confidence, masked, entropy))
    for b in range(20):
      order = [i for i in np.argsort(-confidence[b]) if masked[b, i]]
      fits = [
        n for n in range(1, len(order) + 1)
        if (h := entropy[b, order[:n]]).sum() - h.max() <= bound + 1e-6
      ]  # fmt: skip
      wanted = {*order[: max(fits, default=0)]}
      assert {*np.flatnonzero(got[b])} == wanted


def test_divergence_is_kl():
  rng = np.random.default_rng(0)
  now, before = (rng.dirichlet(np.ones(6), (2, 3)).astype(np.float32) for _ in range(2))
  wanted = np.sum(now * np.log(now / before), axis=-1)
  np.testing.assert_allclose(remasking.divergence(now, before), wanted, atol=1e-5)
  np.testing.assert_allclose(remasking.divergence(now, now), 0, atol=1e-6)


@pytest.mark.parametrize(
  ("steps", "masks", "step", "count"),
  [(478, 956, 96, 2), (484, 968, 75, 2), (490, 980, 20, 2), (493, 986, 2, 1), (500, 1000, 1, 1)],
)
def test_commits_hang_on_the_last_bit_of_the_noise_level(steps, masks, step, count):
  """Counts with the levels of `torch.linspace` (2.13); with those of `jnp.linspace` some are others."""
  ratios_T, left = remasking.commit_ratios(steps, 1e-3), jnp.asarray([masks])
  for now in range(step + 1):
    committed = remasking.commit_count("entropy", left, now, steps, ratios_T[now])
    left = left - committed
  assert committed[0] == count
