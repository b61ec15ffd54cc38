"""Published problems with their own solutions: judging apart from the answer costs no verdict.

Counts: `shared/execution.md`, A5; what is missing fails when run as plain scripts too (other
libraries, bugs of the sets, more than the limits), or needs the answer's classes (MBPP).
"""

import ast
import gzip
import json
import re

import pytest

from diffucoder_jax.execution.sandbox import Job, Limits

pytestmark = pytest.mark.slow

# Generous, since a loaded machine must not fail a correct solution.
LIMITS = Limits(cpu_seconds=60, wall_seconds=200, job_seconds=240)


@pytest.fixture(scope="module")
def benchmarks(shared):
  folder = shared / "benchmarks"
  if not folder.is_dir():
    pytest.skip(f"no problem sets at {folder}")
  return folder


@pytest.fixture(scope="module")
def box(sandbox_or_skip):
  pytest.importorskip("numpy")
  with sandbox_or_skip(limits=LIMITS, packages=("numpy",)) as box:
    yield box


def lines(path):
  with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as f:
    return [json.loads(line) for line in f]


def humaneval(folder, name):
  for row in lines(folder / name):
    code = row["prompt"] + row["canonical_solution"]
    test = f"{row['test']}\ncheck({row['entry_point']})"
    # Some tests call helpers that stand in the prompt.
    yield row["task_id"], Job(code, row["entry_point"], (test,), prelude=row["prompt"] + "    pass")


def called(code, test):
  """The function of `code` that a test calls."""
  names = [x.name for x in ast.walk(ast.parse(code)) if isinstance(x, ast.FunctionDef)]
  return [name for name in names if re.search(rf"\b{name}\s*\(", test)][-1]


def mbpp(folder):
  for row in lines(folder / "mbpp" / "mbpp.jsonl"):
    tests = tuple(row["test_list"])
    entry = called(row["code"], tests[0])
    yield row["task_id"], Job(row["code"], entry, tests, prelude=row["test_setup_code"])


def mbpp_plus(folder):
  for row in lines(folder / "mbppplus" / "MbppPlus-OriginFmt.jsonl.gz"):
    yield row["task_id"], Job(row["code"], called(row["code"], row["test_list"][0]), (row["test"],))


def leetcode(folder, name):
  for row in lines(folder / "leetcode" / name):
    test = f"{row['test']}\ncheck(candidate)"
    yield row["task_id"], Job(row["completion"], row["entry_point"], (test,), prelude=row["prompt"])


SETS = {  # name: (rows, how many pass at least, of how many)
  "humaneval": (lambda f: humaneval(f, "humaneval/HumanEval.jsonl.gz"), 164, 164),
  "humaneval+": (
    lambda f: humaneval(f, "humanevalplus/HumanEvalPlus-OriginFmt.jsonl.gz"),
    163,
    164,
  ),
  "mbpp": (mbpp, 968, 974),
  "mbpp+": (mbpp_plus, 377, 378),
  "leetcode-train": (lambda f: leetcode(f, "LeetCodeDataset-v0.2.0-train.jsonl.gz"), 1877, 1890),
  "leetcode-test": (lambda f: leetcode(f, "LeetCodeDataset-v0.3.1-test.jsonl.gz"), 208, 228),
}


@pytest.mark.parametrize("name", SETS)
def test_canonical_solutions_keep_their_verdicts(name, box, benchmarks):
  rows, least, of = SETS[name]
  names, jobs = zip(*rows(benchmarks), strict=True)
  outcomes = box.run(jobs)
  bad = [(n, o.status, o.message[:100]) for n, o in zip(names, outcomes, strict=True)]
  bad = [row for row in bad if row[1] != "pass"]
  print(f"{name}: {of - len(bad)} of {of} pass, the others: {bad}")
  assert len(jobs) == of
  assert of - len(bad) >= least, bad
  assert not [row for row in bad if row[1] == "infra"]
