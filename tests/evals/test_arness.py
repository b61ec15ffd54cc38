"""AR-ness against hand-worked orders and closed forms; distances, dumps and intervals of orders."""

import itertools
import json
import math

import numpy as np
import pytest

from diffucoder_jax.diffusion import sampler
from diffucoder_jax.evals import arness, bootstrap, decoding, dumps, orders

MASK, END = 9, 7


def steps_of(*orders_):
  """step [B, L] of orders, each a list of positions as they were committed."""
  width = max(max(order, default=0) for order in orders_) + 1
  step = np.full((len(orders_), width), -1)
  for row, order in zip(step, orders_, strict=True):
    row[order] = np.arange(len(order))
  return step


def local(order, k, *way):
  return arness.local_arness(arness.orders_of(steps_of(order)), k, *way)[0, -1]


def global_(order, k):
  return arness.global_arness(arness.orders_of(steps_of(order)), k)[0, -1]


# --- The definitions, by hand.


def test_left_to_right_scores_one_and_all_tokens_below_it_less():
  order = [*range(12)]
  for k in range(1, 10):
    assert local(order, k, "set") == local(order, k, "sequence") == global_(order, k) == 1.0
    assert local(order, k, "set", "all") == local(order, k, "sequence", "all") == (12 - k) / 12


def test_the_definitions_part_on_six_five_seven():
  # paper.md, section 4.1, trap (a): {6, 5} is {7 - 1, 7 - 2}, but 6, 5, 7 is no rising sequence. As
  # positions 1, 0, 2 of three. A.2 even rises with k here.
  assert [local([1, 0, 2], k, "set") for k in (1, 2)] == [0.0, 1.0]
  assert [local([1, 0, 2], k, "sequence") for k in (1, 2)] == [0.0, 0.0]
  assert local([1, 0, 2], 2, "set", "all") == 1 / 3
  assert [global_([1, 0, 2], k) for k in (1, 2)] == [2 / 3, 1.0]


def test_an_order_worked_by_hand():
  # 2 (0, 1 open), 3, 0 (leftmost), 4 (1 open), 1.
  order = [2, 3, 0, 4, 1]
  assert local(order, 1) == 1 / 4  # 3 after 2
  assert local(order, 2) == local(order, 3) == 0.0
  assert [global_(order, k) for k in (1, 2, 3)] == [2 / 5, 3 / 5, 1.0]
  # The reverse: each is the last of what is masked.
  assert [global_([4, 3, 2, 1, 0], k) for k in (1, 2, 5)] == [1 / 5, 2 / 5, 1.0]
  assert local([4, 3, 2, 1, 0], 1) == 0.0


def test_every_order_of_six_averages_to_the_closed_forms():
  n = 6
  every = arness.orders_of(steps_of(*map(list, itertools.permutations(range(n)))))
  for definition, denominator in itertools.product(("set", "sequence"), ("seen", "all")):
    found = arness.local_arness(every, n - 1, definition, denominator).mean(axis=0)
    wanted = [arness.random_local(n, k, definition, denominator) for k in range(1, n)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
  wanted = [arness.random_global(n, k) for k in range(1, n + 1)]
  np.testing.assert_allclose(arness.global_arness(every, n).mean(axis=0), wanted, rtol=1e-12)
  assert math.isnan(arness.random_local(3, 3)) and arness.random_local(3, 3, denominator="all") == 0


def test_long_random_orders_match_within_error():
  rng = np.random.default_rng(0)
  drawn = arness.orders_of(rng.permuted(np.tile(np.arange(60), (600, 1)), axis=1))
  for found, wanted in (
    (arness.local_arness(drawn, 1)[:, 0], arness.random_local(60, 1)),
    (arness.global_arness(drawn, 4)[:, 3], arness.random_global(60, 4)),
  ):
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert 0 < error < 0.01 and abs(found.mean() - wanted) < 4 * error


# --- Ties, tails, holes, and rows with little in them.


def test_tokens_of_one_step_are_read_as_asked():
  step = np.array([[0, 0, 1, 1]])

  def score(ties, seed=0):
    return arness.global_arness(arness.orders_of(step, ties=ties, seed=seed), 1)[0, 0]

  assert score("left_to_right") == 1.0
  assert score("right_to_left") == 0.5
  assert {score("random", seed) for seed in range(20)} == {0.5, 0.75, 1.0}
  np.testing.assert_array_equal(arness.tied_share(np.array([[0, 0, 1, -1]])), [2 / 3])
  with pytest.raises(ValueError, match="'coin'.*right_to_left"):
    arness.orders_of(step, ties="coin")


def test_the_tail_is_left_out_as_if_it_had_never_been_there():
  # a b END pad pad; the tail is committed first, and between a and b.
  tokens, step = np.array([[1, 2, END, END, END]]), np.array([[1, 3, 4, 2, 0]])
  region = arness.answer_region(tokens, np.ones((1, 5), bool), [END])
  np.testing.assert_array_equal(region, [[1, 1, 1, 0, 0]])
  trimmed, kept = arness.orders_of(step, region), arness.orders_of(step)
  assert arness.local_arness(trimmed, 1)[0, 0] == arness.global_arness(trimmed, 1)[0, 0] == 1.0
  assert arness.local_arness(kept, 1)[0, 0] == 1 / 4  # END after b alone
  assert arness.global_arness(kept, 1)[0, 0] == 3 / 5


def test_places_count_what_was_to_be_written_and_open_masks_stay_open():
  # Two holes, at 1 and 3-4, filled left to right; and padding that never counts.
  assert local([1, 3, 4], 2) == 1.0
  # With position 0 in the region, but never committed, it is the leftmost mask to the end.
  orders_ = arness.orders_of(np.array([[-1, 0, 1]]), np.ones((1, 3), bool))
  assert arness.global_arness(orders_, 2)[0].tolist() == [0.0, 1.0]


def test_empty_and_single_answers_have_no_local_arness():
  step, region = np.array([[-1, -1], [0, -1]]), np.array([[False, False], [True, False]])
  orders_ = arness.orders_of(step, region)
  assert np.isnan(arness.local_arness(orders_, 2)).all()
  np.testing.assert_array_equal(arness.local_arness(orders_, 1, "set", "all"), [[np.nan], [0.0]])
  np.testing.assert_array_equal(arness.global_arness(orders_, 1), [[np.nan], [1.0]])
  found = arness.mean_arness(step, region)
  assert math.isnan(found["arness_local"]) and found["arness_global"] == 1.0


def test_a_rollout_batch_is_cut_at_its_lengths():
  # Prompt, then four tokens of which the last two follow the end: both rows left to right.
  step = np.array([[-1, 2, 3, 0, 1], [-1, 0, 1, 2, 3]])
  completion = np.array([[False, True, True, True, True]] * 2)
  assert arness.mean_arness(step, completion, lengths=[2, 4]) == {
    "arness_local": 1.0, "arness_global": 1.0,
  }  # fmt: skip
  assert completion[:, 1:].all()  # the caller's array is as it was
  assert arness.mean_arness(step, completion)["arness_global"] == (0.5 + 1.0) / 2
  with pytest.raises(ValueError, match=r"\[2, 5\] and \[2, 4\]"):
    arness.mean_arness(step, completion[:, 1:])


def test_where_arness_is_lost():
  orders_ = arness.orders_of(steps_of([3, 0, 1, 2], [0, 1, 2, 3]))
  hits = arness.global_hits(orders_, 1)[:, :, 0]
  np.testing.assert_array_equal(arness.by_step(hits, orders_.count_B, 4), [0.5, 1, 1, 1])
  np.testing.assert_array_equal(arness.by_position(hits, orders_.place_BT, 4), [1, 1, 1, 0.5])


# --- Orders compared.


def test_distances_between_orders():
  everywhere = np.ones((4, 4), bool)
  step = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 0], [1, 0, 2, 3]])
  apart = orders.distances(step, everywhere)
  np.testing.assert_allclose(apart[0], [0, 1, 0.5, 1 / 6], atol=1e-6)
  np.testing.assert_array_equal(apart, apart.T)
  assert apart[2, 2] == 0  # tied in both
  # Only what both hold counts: without position 0 the first and the last are the same.
  assert orders.distances(step[[0, 3]], np.array([[1, 1, 1, 1], [0, 1, 1, 1]]))[0, 1] == 0
  assert np.isnan(orders.distances(step[:2], np.array([[1, 1, 0, 0], [0, 1, 1, 1]]))[0, 1])
  assert orders.mean_distances(apart)[0] == pytest.approx((1 + 0.5 + 1 / 6) / 3)


def test_order_entropy_from_none_to_a_coin():
  pairs = np.ones((2, 3), bool)
  assert orders.order_entropy(np.array([[0, 1, 2]] * 2), pairs) == 0.0
  assert orders.order_entropy(np.array([[0, 1, 2], [2, 1, 0]]), pairs) == 1.0
  assert math.isnan(orders.order_entropy(np.array([[0, 1, 2]]), pairs[:1]))
  # By hand for three samples: 3/4 of the outcomes of three coins are 2 to 1.
  two_to_one = -(1 / 3) * math.log2(1 / 3) - (2 / 3) * math.log2(2 / 3)
  assert orders.coin_entropy(3) == pytest.approx(0.75 * two_to_one)
  rng = np.random.default_rng(1)
  drawn = rng.permuted(np.tile(np.arange(20), (200, 3, 1)), axis=2)
  found = np.array([orders.order_entropy(step, np.ones(step.shape)) for step in drawn])
  assert abs(found.mean() - orders.coin_entropy(3)) < 4 * found.std() / math.sqrt(200) < 0.03


def test_when_length_is_decided():
  # Answer 0-1, its end at 2, tail 3-5: first row tail first, second row last.
  step = np.array([[4, 5, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
  written = np.ones(step.shape, bool)
  region = np.arange(6) < np.array([[3], [3]])
  found = orders.length_commitment(step, written, region)
  np.testing.assert_allclose(found["end"], [3 / 5, 2 / 5])
  np.testing.assert_allclose(found["tail"], [1 / 5, 4 / 5])
  np.testing.assert_allclose(found["answer"], [4.5 / 5, 0.5 / 5])
  np.testing.assert_array_equal(found["tail_first"], [1.0, 0.0])
  without = orders.length_commitment(step, written, written)
  assert all(np.isnan(value).all() for value in without.values())


def test_entropy_sink_of_a_step_and_of_a_flat_line():
  sink = np.where(np.arange(20) < 4, -1.0, -3.0)
  found = orders.entropy_sink(np.stack([sink, np.zeros(20)]), np.ones((2, 20), bool), near=4)
  np.testing.assert_array_equal(found["gap"], [2.0, 0.0])
  np.testing.assert_array_equal(found["sink"], [1.0, 0.5])
  assert np.isnan(orders.entropy_sink(sink[None], np.arange(20)[None] < 4, near=4)["sink"]).all()


def test_the_map_of_what_is_committed():
  grid = orders.committed_map(np.array([[0, 1, 2, 3], [3, 2, 1, -1]]), np.ones((2, 4), bool), 4, 4)
  np.testing.assert_array_equal(grid[[0, 3]], [[0.5, 0, 0, 0], [1, 1, 1, 0.5]])


# --- Intervals.


def test_intervals_cover_problems_and_seeds():
  rng = np.random.default_rng(0)
  values = 1.0 + rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(1, 4))
  found = bootstrap.mean_interval(values)
  assert found.value == pytest.approx(values.mean()) and found.low < found.value < found.high
  # The same shift everywhere is beyond doubt when paired, and drowns in the spread when not.
  paired = bootstrap.difference_interval(values + 0.1, values, paired=True)
  assert paired.low == pytest.approx(0.1) and paired.high == pytest.approx(0.1)
  apart = bootstrap.difference_interval(values + 0.1, values, paired=False)
  assert apart.low < 0 < apart.high
  # What is missing weighs nothing in any resample.
  holes = np.where(rng.random((40, 3)) < 0.3, np.nan, 1.0)
  np.testing.assert_allclose(bootstrap.resampled(holes), 1.0)
  assert math.isnan(bootstrap.mean_interval(np.full((3, 2), np.nan)).value)
  assert math.isnan(bootstrap.mean_interval(np.ones((1, 3))).low)
  spread = bootstrap.spread_interval(values)
  assert spread.value == pytest.approx(values.std(axis=0, ddof=1).mean())
  assert spread.low < spread.value < spread.high
  # Student's quantile for 3 seeds is 4.303.
  low = bootstrap.seed_interval(np.array([[1.0, 2.0, 3.0]])).low
  assert low == pytest.approx(2 - 4.303 / math.sqrt(3), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("of_seeds", [0.0, 0.2])
def test_intervals_cover_the_truth_as_often_as_they_say(of_seeds):
  rng, hits = np.random.default_rng(0), {"mean": [], "difference": [], "seeds": [], "spread": []}
  for _ in range(400):
    problems, noise = rng.normal(size=(30, 1)), rng.normal(size=(30, 3))
    a, b = (
      problems + of_seeds * rng.normal(size=(1, 3)) + noise,
      problems + rng.normal(size=(30, 3)),
    )
    for name, found, truth in (
      ("mean", bootstrap.mean_interval(a), 0.0),
      ("difference", bootstrap.difference_interval(a, b, paired=True), 0.0),
      ("seeds", bootstrap.seed_interval(a - problems), 0.0),  # on these very problems
      ("spread", bootstrap.spread_interval(b), math.sqrt(2)),
    ):
      hits[name].append(found.low <= truth <= found.high)
  shares = {name: np.mean(hit) for name, hit in hits.items()}
  # Resampling both is on the wide side where only problems differ; a percentile interval of a spread
  # is known to be on the narrow one.
  assert 0.93 <= shares["mean"] <= 0.99 and 0.93 <= shares["difference"] <= 1.0, shares
  assert 0.92 <= shares["seeds"] <= 0.98 and 0.85 <= shares["spread"] <= 0.97, shares


# --- What was recorded.


def trace(step, tokens):
  step, tokens = np.array([step]), np.array([tokens])
  zeros = np.zeros(step.shape)
  return sampler.Trace(tokens, step, zeros, zeros, np.array([3]), np.ones(step.shape, bool))


def test_a_trace_and_a_history_of_one_decoding_are_the_same(tmp_path):
  # Prompt 5; step 0 commits nothing, as Dream's first does; the last mask stays one.
  history = np.array([[[5, MASK, MASK, MASK]], [[5, MASK, 2, MASK]], [[5, 1, 2, MASK]]])
  np.savez(tmp_path / "0.npz", history=history, mask_id=MASK, prompt_length=1)
  sampler.save_trace(tmp_path / "1.npz", trace([-1, 2, 1, -1], [5, 1, 2, MASK]))
  ours, theirs = dumps.read_folder(tmp_path, dumps.Ids(MASK, (END,))).rows
  for name in ("tokens", "step", "written", "region", "ended", "revised"):
    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
  assert ours.prompt() == theirs.prompt() and not ours.revised
  np.testing.assert_array_equal(ours.step, [-1, 2, 1, -1])
  np.testing.assert_array_equal(ours.written, [False, True, True, True])


def test_a_history_that_takes_tokens_back_says_so(tmp_path):
  history = np.array([[[5, 1, MASK]], [[5, MASK, 2]], [[5, 3, 2]]])
  np.savez(tmp_path / "0.npz", history=history, mask_id=MASK, canvas=[[5, MASK, MASK]])
  row = dumps.read_file(tmp_path / "0.npz", dumps.Ids(), "keep")[0]
  assert row.step.tolist() == [-1, 2, 1] and row.revised == 1


def test_what_cannot_be_read_is_named_with_a_remedy(tmp_path):
  history = np.full((2, 1, 3), MASK)
  for name, arrays, wanted in (
    ("no_prompt", {"history": history, "mask_id": MASK}, "no_prompt.npz.*save one of them"),
    ("no_mask", {"history": history, "prompt_length": 1}, "no_mask.npz lacks 'mask_id'"),
    ("flat", {"history": history[0], "mask_id": MASK}, "flat.npz.*np.stack"),
    ("shape", {"history": history, "mask_id": MASK, "canvas": [[1]]}, "shape.npz: 'canvas'"),
    ("other", {"x": history}, "other.npz is neither.*holds x"),
  ):
    np.savez(tmp_path / f"{name}.npz", **arrays)
    with pytest.raises(ValueError, match=wanted):
      dumps.read_file(tmp_path / f"{name}.npz", dumps.Ids(-1, (END,)))
  (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:60])
  with pytest.raises(ValueError, match="cut.npz is not a whole"):
    dumps.read_file(tmp_path / "cut.npz", dumps.Ids(MASK, (END,)))
  with pytest.raises(FileNotFoundError, match="generate --traces"):
    (tmp_path / "empty").mkdir()
    dumps.read_folder(tmp_path / "empty", dumps.Ids())
  with pytest.raises(ValueError, match="--tail keep"):
    dumps.read_folder(tmp_path, dumps.Ids(MASK, ()))
  sampler.save_trace(tmp_path / "ours.npz", trace([0], [1]))
  with pytest.raises(ValueError, match="ours.npz.*--tokenizer"):
    dumps.read_file(tmp_path / "ours.npz", dumps.Ids(-1, (END,)))
  (tmp_path / dumps.ABOUT).write_text(json.dumps({"mask_id": MASK}))
  with pytest.raises(ValueError, match="about.json must hold.*end_ids"):
    dumps.read_folder(tmp_path, dumps.Ids())


def test_pass_at_k_is_found_where_it_stands(tmp_path):
  path = tmp_path / "r.json"
  path.write_text(
    json.dumps({"humaneval": {"pass@1": [0.5, 0.4, 0.6], "pass@10": [0.7, 0.6, 0.8]}})
  )
  found = dumps.read_pass_at_k([f"0.2={path}"], ["0.2"])
  assert found["pass_at_k_humaneval"]["0.2"]["k"] == [1, 10]
  assert found["pass_at_k_humaneval"]["0.2"]["low"] == [0.4, 0.6]
  with pytest.raises(ValueError, match="labels are 0.2"):
    dumps.read_pass_at_k([f"1={path}"], ["0.2"])


# --- Groups.


def group(tmp_path, label, steps, prompt=5):
  """Two seeds of rows [step]: each a decoding of three tokens behind a prompt, the last its end."""
  folders = [tmp_path / label / str(seed) for seed in range(len(steps))]
  for folder, rows in zip(folders, steps, strict=True):
    folder.mkdir(parents=True)
    for i, step in enumerate(rows):
      sampler.save_trace(folder / f"{i}.npz", trace([-1, *step], [prompt, 1, 2, END]))
  read = [dumps.read_folder(folder, dumps.Ids(MASK, (END,))) for folder in folders]
  return decoding.grouped([label] * len(read), read, folders)[0]


def test_labels_are_compared_problem_by_problem(tmp_path):
  straight, back = [0, 1, 2], [2, 1, 0]
  low = group(tmp_path, "0.2", [[straight] * 3] * 2)
  high = group(tmp_path, "1.2", [[back] * 3] * 2)
  options = decoding.Options()
  values = {g.label: decoding.measure(g, options) for g in (low, high)}
  found = {x["measure"]: x for x in decoding.changes([low, high], values)}
  assert found["global@1"]["paired"] and found["global@1"]["change"] == "falls"
  assert found["global@1"]["difference"] == pytest.approx(1 / 3 - 1)
  # Random orders of three tokens score (1 + 1/2 + 1/3) / 3 = 11/18.
  over = values["1.2"]["global@1 over chance"]
  np.testing.assert_allclose(over, (1 / 3 - 11 / 18) / (1 - 11 / 18))
  assert (values["0.2"]["global@1 over chance"] == 1).all()
  assert found["distance"]["change"] == "not told"  # each repeats itself exactly
  means, beyond = decoding.order_matrix([low, high])
  np.testing.assert_array_equal(means, [[0, 1], [1, 0]])
  np.testing.assert_array_equal(beyond, np.ones((3, 1)))
  # Seeds that differ are not compared with themselves.
  mixed = group(tmp_path, "mixed", [[straight] * 3, [back] * 3])
  np.testing.assert_array_equal(decoding.order_matrix([mixed, mixed])[0], np.ones((2, 2)))
  assert decoding.measure(mixed, options)["distance"].tolist() == [[1, 1]] * 3
  other = group(tmp_path, "math", [[back] * 2], prompt=6)
  assert not decoding.same_problems(low, other)
  with pytest.raises(ValueError, match="problem 0 of there.*another label"):
    decoding.grouped(["a", "a"], [low.seeds[0], other.seeds[0]], ["here", "there"])
