"""Coupled-GRPO as a program: it learns, resumes bitwise anywhere in a round, and replays."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import grpo_7b
from diffucoder_jax import pretrained
from diffucoder_jax.data import toy_problems
from diffucoder_jax.data.problems import write_problems
from diffucoder_jax.grpo import rewards
from diffucoder_jax.model import lora
from diffucoder_jax.runtime import metrics, optim
from tests import tiny

pytest.importorskip("diffucoder_jax.execution.sandbox")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]
CLOCKS = ("seconds/", "per_second")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A workdir to start from; what it knows does not matter here."""
  return tiny.overfitted(tmp_path_factory.getbasetemp(), None)[0]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
  folder = tmp_path_factory.mktemp("problems")
  train, test = toy_problems.make_problems(10, 4)
  write_problems(train, folder / "train.jsonl")
  write_problems(test, folder / "test.jsonl")
  return folder


@pytest.fixture
def letters(monkeypatch):
  """A reward that a random network earns: so many of the letter it writes anyway."""
  monkeypatch.setitem(
    rewards.REWARDS, "letters", lambda answer, _: len(answer.code) % 7 / 7 + answer.code.count("e")
  )


def config(start, problems, **changes):
  c = grpo_7b.get_config()
  c.unlock()
  c.reward.weights = {"letters": 1.0}
  c.lock()
  c.update_from_flattened_dict({
    "problems.set": "problems", "problems.split": "", "rollout.system": "", "sampler.top_p": 1.0,
    "optim.accumulate": 1, "init_from": str(start), "problems.path": str(problems / "train.jsonl"),
    "problems.eval_path": str(problems / "test.jsonl"), "rollout.max_prompt_tokens": 110,
    "sampler.max_new_tokens": 16, "sampler.steps": 4, "sampler.temperature": 1.0,
    "grpo.prompts": 2, "grpo.num_generations": 4, "grpo.ref_every": 3, "optim.steps": 6,
    "optim.lr": 1e-2, "optim.schedule": "constant", "optim.warmup_steps": 0,
    "optim.clip_norm": 1.0, "checkpoint.every": 1,
    "checkpoint.keep": 9, "eval.every": 0, "eval.problems": 4, **changes,
  })  # fmt: skip
  return c


def run(c, workdir, devices=1):
  with tiny.fresh_process(devices):
    return tiny.program("train_grpo").main(c, str(workdir))


def rows(workdir):
  clock = lambda name: name == "time" or any(part in name for part in CLOCKS)  # noqa: E731
  return [{k: v for k, v in r.items() if not clock(k)} for r in metrics.read(workdir)]


def rollouts(workdir):
  return {p.name: p.read_text() for p in sorted((workdir / "rollouts").iterdir())}


@pytest.fixture(scope="module")
def whole(start, problems, tmp_path_factory):
  """Three rounds of two steps that were never stopped."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(rewards.REWARDS, "letters",
                  lambda answer, _: len(answer.code) % 7 / 7 + answer.code.count("e"))  # fmt: skip
    run(config(start, problems), workdir)
  return workdir


def test_what_a_run_leaves_behind(whole):
  found = rows(whole)
  assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
  assert [("reward" in row) for row in found] == [True, False] * 3
  first, second = found[:2]
  # The first step of a round is on-policy: the same masks, the same weights.
  assert first["ratio_min"] == pytest.approx(1, abs=1e-4) == first["ratio_max"]
  assert abs(second["ratio_max"] - 1) > 1e-3 and second["kl"] > first["kl"] == pytest.approx(0, abs=1e-6)
  assert first["grad_norm"] > 0 and 0 < first["ratio_effective_share"] <= 1 + 1e-6
  assert first["judged/answers"] == 8 and first["length"] > 0 and "entropy" in first
  lines = [json.loads(line) for line in rollouts(whole)["000001.jsonl"].splitlines()]
  assert [line["row"] for line in lines] == list(range(8))
  for group in (lines[:4], lines[4:]):
    assert len({line["task_id"] for line in group}) == 1
    reward = np.asarray([line["reward"] for line in group])
    wanted = (reward - reward.mean()) * 4 / 3
    np.testing.assert_allclose([line["advantage"] for line in group], wanted, atol=1e-5)


def test_a_round_is_sampled_again_token_for_token(whole, letters, capsys):
  for name in rollouts(whole):
    for devices in (1, 8) if name == "000001.jsonl" else (1,):
      with tiny.fresh_process(devices):
        same, count = tiny.program("train_grpo").replay(whole / "rollouts" / name)
      assert same == count == 8, (name, devices)
  assert "8 of 8 answers are the same" in capsys.readouterr().out


class Crash(Exception):
  pass


@pytest.mark.parametrize("at", [1, 3, 4])  # 1, 3: between two steps of a round
def test_resume_is_bitwise(start, problems, whole, letters, tmp_path, monkeypatch, at):
  program = tiny.program("train_grpo")
  save = program.checkpoint.save

  def save_and_crash(manager, step, *args, **more):
    save(manager, step, *args, **more)
    manager.wait_until_finished()
    if step == at:
      raise Crash

  with monkeypatch.context() as patch, tiny.fresh_process():
    patch.setattr(program.checkpoint, "save", save_and_crash)
    with pytest.raises(Crash):
      program.main(config(start, problems), str(tmp_path / "run"))
  run(config(start, problems), tmp_path / "run")
  assert rows(tmp_path / "run") == rows(whole)
  assert rollouts(tmp_path / "run") == rollouts(whole)
  assert tiny.final_state(tmp_path / "run") == tiny.final_state(whole)


def test_held_out_problems_are_scored(start, problems, letters, tmp_path):
  c = config(start, problems, **{"optim.steps": 2, "eval.every": 2, "eval.samples": 3})
  last = run(c, tmp_path / "run")
  scored = [row for row in rows(tmp_path / "run") if "eval/pass@1" in row]
  assert [row["step"] for row in scored] == [0, 2] and last["eval/pass@1"] == scored[-1]["eval/pass@1"]
  assert all(0 <= row["eval/pass@1_greedy"] <= 1 for row in scored)
  for step, row in zip((0, 2), scored, strict=True):
    text = (tmp_path / "run" / "answers" / f"{step:06d}.jsonl").read_text()
    answers = [json.loads(line) for line in text.splitlines()]
    drawn = [a["passed"] for a in answers if a["temperature"] > 0]
    greedy = [a["passed"] for a in answers if a["temperature"] == 0]
    assert len(drawn) == 3 * len(greedy) == 12
    assert row["eval/pass@1"] == np.mean(drawn) and row["eval/pass@1_greedy"] == np.mean(greedy)


def test_answers_without_a_verdict_are_masked(start, problems, letters, tmp_path, monkeypatch):
  """Infrastructure that fails: the row takes no part, and is not a zero."""
  score = rewards.score

  def some_fail(*args):
    found = score(*args)
    nothing = rewards.Scored(float("nan"), {"letters": float("nan")}, "", None, False)
    return [nothing if i in (0, 4, 5, 6, 7) else one for i, one in enumerate(found)]

  monkeypatch.setattr(rewards, "score", some_fail)
  run(config(start, problems, **{"optim.steps": 2}), tmp_path / "run")
  first = rows(tmp_path / "run")[0]
  assert first["reward_masked"] == 5 / 8 and np.isfinite(first["loss"])
  lines = [json.loads(line) for line in rollouts(tmp_path / "run")["000000.jsonl"].splitlines()]
  assert [line["reward"] is None for line in lines] == [True] + [False] * 3 + [True] * 4
  reward = np.asarray([line["reward"] for line in lines[1:4]])
  np.testing.assert_allclose([line["advantage"] for line in lines[:4]],
                             [0, *(reward - reward.mean()) * 3 / 2], atol=1e-5)  # fmt: skip


def test_groups_that_teach_nothing_are_replaced(start, problems, letters, tmp_path, monkeypatch):
  """By the other group with its masks: the first step stays on-policy, and all rows count."""
  score = rewards.score

  def second_group_is_equal(*args):
    found = score(*args)
    return [one if i < 4 else dataclasses.replace(one, reward=1.0) for i, one in enumerate(found)]

  monkeypatch.setattr(rewards, "score", second_group_is_equal)
  changes = {"objective.zero_variance": "substitute", "grpo.variance_every": 1, "optim.steps": 2}
  run(config(start, problems, **changes), tmp_path / "run")
  first, second = rows(tmp_path / "run")
  assert first["zero_variance"] == 0.5 and first["grad_norm"] > 0
  assert first["ratio_min"] == pytest.approx(1, abs=1e-4) == first["ratio_max"]
  assert abs(second["ratio_max"] - 1) > 1e-3
  assert first["estimator/variance"] > 0 and first["estimator/variance_ratio"] < 1.5


def test_adapters_alone_are_trained(start, problems, letters, tmp_path):
  """Made for weights that have none, with a reference of their own; saved, resumed and replayed."""
  changes = {"model.lora_rank": 2, "model.lora_alpha": 4.0, "optim.lr": 0.1}
  run(config(start, problems, **changes, **{"optim.steps": 2}), tmp_path / "run")
  more = {"optim.steps": 3, "checkpoint.accept_changes": True}
  run(config(start, problems, **changes, **more), tmp_path / "run")
  before = pretrained.from_pretrained(start)
  after = pretrained.from_pretrained(tmp_path / "run")
  assert (before.config.lora_rank, after.config.lora_rank) == (0, 2)
  jax.tree.map(
    np.testing.assert_array_equal, before.params, jax.device_get(lora.without_adapters(after.params))
  )
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(optim.trained(after.params)))
  for name in ("000000.jsonl", "000001.jsonl"):
    with tiny.fresh_process():
      same, count = tiny.program("train_grpo").replay(tmp_path / "run" / "rollouts" / name)
    assert same == count == 8, name
  with pytest.raises(ValueError, match=r"adapters of rank and alpha \(2, 4.0\)"):
    run(config(tmp_path / "run", problems, **{"model.lora_rank": 3}), tmp_path / "more")


def test_a_mesh_changes_no_answer(start, problems, letters, whole, tmp_path):
  run(config(start, problems, **{"optim.steps": 2}), tmp_path / "run", devices=8)
  assert rollouts(tmp_path / "run")["000000.jsonl"] == rollouts(whole)["000000.jsonl"]
  ours, theirs = rows(tmp_path / "run"), rows(whole)[:2]
  for mine, other in zip(ours, theirs, strict=True):
    for name in mine.keys() & other.keys():
      np.testing.assert_allclose(mine[name], other[name], rtol=2e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"init_from": ""}, "init_from is empty"),
    ({"grpo.num_generations": 1}, "must be at least 2"),
    ({"estimator.name": "coupling"}, "choose one of"),
    ({"problems.set": "mpbb"}, "mpbb"),
    ({"reward.fence": "strict", "sampler.stop_at_eos": True}, "'strict' wants the newline"),
    ({"rollout.max_prompt_tokens": 4}, "the shortest has"),
  ],
)
def test_bad_settings_are_named(start, problems, letters, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run(config(start, problems, **changes), tmp_path / "run")
  jax.set_mesh(None)
