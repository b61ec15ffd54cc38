"""What the page says of a run of RL is what its logs say."""

import json

import pytest

from diffucoder_jax.evals import reinforced


def answer(task, passed, temperature=0.0, text="code", sample=0):
  return {"task_id": task, "sample": sample, "temperature": temperature, "prompt": f"do {task}",
          "completion": text, "passed": passed}  # fmt: skip


@pytest.fixture
def run(tmp_path):
  rows = [
    {"step": 0, "eval/pass@1": 0.25, "eval/pass@1_se": 0.1, "eval/pass@1_greedy": 0.5,
     "eval/pass@1_greedy_se": 0.1},
    {"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.5},
    {"step": 2, "eval/pass@1": 0.375, "eval/pass@1_se": 0.1, "eval/pass@1_greedy": 0.45,
     "eval/pass@1_greedy_se": 0.1},
  ]  # fmt: skip
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "config.json").write_text(json.dumps({"sampler": {"temperature": 0.8}}))
  (tmp_path / "answers").mkdir()
  before = [answer("a", False, text="<b>old</b>"), answer("b", True), answer("c", True),
            answer("d", False), answer("a", True, 0.8)]  # fmt: skip
  after = [answer("a", True, text="new"), answer("b", False), answer("c", True),
           answer("d", True), answer("a", False, 0.8)]  # fmt: skip
  for name, found in (("000000.0-of-2", before[:2]), ("000000.1-of-2", before[2:]), ("000002", after)):
    lines = "".join(json.dumps(row) + "\n" for row in found)
    (tmp_path / "answers" / f"{name}.jsonl").write_text(lines)
  return tmp_path


def test_the_page_shows_the_change_and_answers_of_both_kinds(run):
  page = "".join(reinforced.improvement_of(run))
  assert "<td>temperature 0.8</td><td>25.0 ± 10.0</td><td>37.5 ± 10.0</td><td>+12.5</td>" in page
  assert "<td>greedy</td><td>50.0 ± 10.0</td><td>45.0 ± 10.0</td><td>-5.0</td>" in page
  assert "2 wrong ones became right, 1 right ones wrong, 1 stayed as they were" in page
  assert "&lt;b&gt;old&lt;/b&gt;" in page and "step 0: wrong" in page and "step 2: wrong" in page
  assert page.count("<svg") == 2 and page.count("<h3>") == 3


def test_a_spoilt_answer_is_never_hidden_behind_mended_ones():
  before = {(f"t{i}", 0, 0): answer(f"t{i}", i == 9) for i in range(10)}
  after = {(f"t{i}", 0, 0): answer(f"t{i}", i != 9) for i in range(10)}
  pairs, counts = reinforced.examples(before, after)
  assert counts == {"mended": 9, "spoilt": 1, "same": 0}
  assert [(old["passed"], new["passed"]) for old, new in pairs] == [(False, True)] * 2 + [(True, False)]


def test_a_broken_log_is_named(run):
  with (run / "answers" / "000002.jsonl").open("a") as f:
    f.write("{\n")
  with pytest.raises(ValueError, match="000002.jsonl line 6 is not an answer"):
    reinforced.improvement_of(run)
