"""The table of stages on the page, from real results files."""

import json

import pytest

from diffucoder_jax.evals import scores, stages
from diffucoder_jax.evals.verdicts import Verdict

SAMPLER = {"alg": "entropy", "steps": 12, "temperature": 0.0}
PINS = {name: "x" for name in (*scores.PINS, *scores.SAMPLED)} | {
  "benchmark": "problems", "source": "sampled", "samples": 1, "sampler": SAMPLER,
}  # fmt: skip
COSTS = {"nfe": 12.0, "tokens_per_second": 5.0, "length": 30.0, "ended": 0.5, "seconds": 1.0}


def written(folder, solved, pins=PINS):
  found = [
    Verdict(f"t/{i}", 0, "pass" if right else "fail", "", "", "isolated")
    for i, right in enumerate(solved)
  ]
  folder.mkdir()
  (folder / "results.json").write_text(json.dumps(scores.summarise(pins, found, COSTS)))
  return str(folder)


def test_stages_are_compared_problem_by_problem(tmp_path):
  warm = PINS | {"sampler": SAMPLER | {"temperature": 1.2, "steps": 0}}
  page = "\n".join(
    stages.scores_of([
      ("before", written(tmp_path / "a", [True] * 4 + [False] * 36)),
      ("warm", written(tmp_path / "b", [True] * 40, warm)),
      ("after <b>", written(tmp_path / "c", [False] + [True] * 39)),
    ])
  )  # fmt: skip
  assert "40 held-out problems" in page and page.count("<tr>") == 4
  assert "greedy, entropy, 12 steps" in page and "temperature 1.2, entropy, one token a step" in page
  # The warm stage was sampled otherwise, so the first is compared with the third.
  assert page.count("From “") == 1
  assert "From “before” to “after &lt;b&gt;”, greedy, entropy, 12 steps: +87.5 points of pass@1" in page
  assert "36 problems gained, 1 lost" in page and "chance" not in page
  assert "97.5" in page and "50%" in page


def test_a_change_that_may_be_chance_is_called_so(tmp_path):
  folders = [written(tmp_path / name, [True] * right + [False] * (9 - right)) for name, right in
             (("a", 4), ("b", 5))]  # fmt: skip
  page = "\n".join(stages.scores_of([("a", folders[0]), ("b", folders[1])]))
  assert "+11.1 points" in page and "which may be chance" in page


def test_stages_of_other_problems_are_not_compared(tmp_path):
  folders = [written(tmp_path / name, [True] * count) for name, count in (("a", 4), ("b", 5))]
  with pytest.raises(ValueError, match="judged in one of the runs alone: t/4"):
    stages.scores_of([("a", folders[0]), ("b", folders[1])])
