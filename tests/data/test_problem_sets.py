import ast
import collections
import gzip
import json
import math
import textwrap

import numpy as np
import pytest

from diffucoder_jax.data import problem_sets
from diffucoder_jax.data.problem_sets import load_problems
from diffucoder_jax.data.problems import Problem, write_problems
from diffucoder_jax.data.rows import read_rows

# Set, file under benchmarks/, problems.
FILES = [
  ("humaneval", "humaneval/HumanEval.jsonl.gz", 164),
  ("humanevalplus", "humanevalplus/HumanEvalPlus-OriginFmt.jsonl.gz", 164),
  ("mbpp", "mbpp/mbpp.jsonl", 974),
  ("mbpp_sanitized", "mbpp/sanitized-mbpp.json", 427),
  ("mbppplus", "mbppplus/MbppPlus-OriginFmt.jsonl.gz", 378),
  ("leetcode", "leetcode/LeetCodeDataset-v0.2.0-train.jsonl.gz", 1890),
  ("leetcode", "leetcode/LeetCodeDataset-v0.3.1-test.jsonl.gz", 228),
]


@pytest.fixture(scope="module")
def benchmark(shared):
  folder = shared / "benchmarks"
  if not folder.is_dir():
    pytest.skip(f"no public problem sets at {folder}")
  return lambda file: folder / file


def check_shape(problem):
  """What the judge relies on: programs, and a reference that defines what they call."""
  defined = [getattr(s, "name", "") for s in ast.parse(problem.reference).body]
  called = ast.parse(problem.entry_point, mode="eval").body
  root = next(n.id for n in ast.walk(called) if isinstance(n, ast.Name))
  assert root in defined, (problem.task_id, root)
  ast.parse(problem.prelude)
  assert problem.tests and problem.prompt.strip() and problem.source
  for test in (*problem.tests, *problem.plus_tests):
    assert {root, "candidate"} & {n.id for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Name)}


def passes(problem, answer=None):
  """How many tests the answer passes; ours or the set's own reference, so that no sandbox is needed."""
  names = {"__name__": "answer"}
  exec(problem.prelude, names)
  exec(problem.reference if answer is None else answer, names)
  names["candidate"] = eval(problem.entry_point, names)
  passed = 0
  for test in (*problem.tests, *problem.plus_tests):
    try:
      exec(test, names)
      passed += 1
    except Exception:
      pass
  return passed


@pytest.mark.parametrize(("name", "file", "size"), [f for f in FILES if f[0] == "humaneval"])
def test_a_published_file(benchmark, name, file, size):
  problems = load_problems(name, benchmark(file))
  assert len(problems) == size
  for problem in problems[::10]:
    check_shape(problem)
    assert passes(problem) == len(problem.tests), problem.task_id


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file", "size"), FILES)
def test_every_reference_defines_what_its_tests_call(benchmark, name, file, size):
  problems = load_problems(name, benchmark(file))
  assert len(problems) == size == len({p.task_id for p in problems})
  for problem in problems:
    check_shape(problem)
    assert not any("import numpy" in test for test in (*problem.tests, *problem.plus_tests))


@pytest.mark.slow
def test_mbpp_plus_is_asked_as_evalplus_asks_it(benchmark):
  published = {row["task_id"]: row for _, row in read_rows(benchmark("mbppplus/MbppPlus.jsonl.gz"))}
  problems = load_problems("mbppplus", benchmark("mbppplus/MbppPlus-OriginFmt.jsonl.gz"))
  assert len(problems) == len(published) == 378
  for problem in problems:
    row = published[problem.task_id]
    assert (problem.stub, problem.entry_point) == (row["prompt"], row["entry_point"])
    assert problem.prompt == f"```\n{row['prompt'].strip()}\n```\n"


@pytest.mark.slow
def test_humaneval_plus_holds_humaneval(benchmark):
  base = load_problems("humaneval", benchmark(FILES[0][1]))
  plus = load_problems("humanevalplus", benchmark(FILES[1][1]))
  assert [(p.task_id, p.tests, p.entry_point) for p in base] == [
    (p.task_id, p.tests, p.entry_point) for p in plus
  ]
  assert all(len(p.plus_tests) == 1 for p in plus) and not any(p.plus_tests for p in base)
  # Its test as published is one that its own reference does not pass.
  (broken,) = (p for p in plus if p.task_id == "HumanEval/32")
  assert passes(broken) == 2
  # Six check functions do more than assert; the others are as many tests as they have asserts.
  whole = [p.task_id.split("/")[1] for p in base if "check(candidate)" in p.tests[-1]]
  assert whole == ["32", "38", "44", "50", "53", "151"]
  assert sum(len(p.tests) for p in base) == 1116


@pytest.mark.slow
def test_what_mbpp_tests_need_of_an_answer(benchmark):
  problems = load_problems("mbpp", benchmark("mbpp/mbpp.jsonl"))
  shared = [p.task_id for p in problems if p.integrity != "isolated"]
  assert shared == ["Mbpp/367", "Mbpp/601", "Mbpp/927"]  # trees and pairs of its own classes


@pytest.mark.slow
def test_mbpp_splits(benchmark):
  path = benchmark("mbpp/mbpp.jsonl")
  sizes = {split: len(load_problems("mbpp", path, split)) for split in problem_sets.SPLITS["mbpp"]}
  assert sizes == {"all": 974, "prompt": 10, "test": 500, "validation": 90, "train": 374}


def humaneval(tmp_path, body, **fields):
  prompt = 'import math\n\n\ndef twice(x):\n  return 2 * x\n\n\ndef add(a, b):\n  """Adds."""\n'
  row = {"task_id": "HumanEval/1", "prompt": prompt, "entry_point": "add",
         "canonical_solution": "  return a + b\n",
         "test": "\n\nMETADATA = {'author': 'jt'}\n\n\ndef check(candidate):\n"
                 + textwrap.indent(textwrap.dedent(body), "  "), **fields}  # fmt: skip
  path = tmp_path / "HumanEval.jsonl.gz"
  path.write_bytes(gzip.compress(json.dumps(row).encode()))
  return path


def test_humaneval_is_asked_as_in_the_paper(tmp_path):
  (p,) = load_problems("humaneval", humaneval(tmp_path, "assert candidate(1, 2) == twice(3) / 2"))
  assert p.prompt == f"Please complete the following problem:\n```\n{p.stub.strip()}\n```\n"
  assert p.prelude == "import math\n\n\ndef twice(x):\n  return 2 * x\n"
  assert p.stub.startswith("import math") and p.reference == p.stub + "  return a + b\n"
  assert (p.task_id, p.source) == ("HumanEval/1", "humaneval") and passes(p) == 1
  # What the prompt defines need not be repeated in an answer.
  assert passes(p, "def add(a, b):\n  return twice(a + b) / 2\n") == 1


def test_a_check_that_only_asserts_is_a_test_each(tmp_path):
  body = '''
    """Says something."""
    print
    assert candidate(1, 2) == 3, "é: text of two bytes"; assert candidate(2, 2) == 4
    # a comment
    assert candidate(
      [1],
        ["two\\n  lines"]) == [
          1, "two\\n  lines"]
    assert True, "good for debugging"
    assert candidate("""a
  b""", "c") == "a\\n  bc"
  '''
  (p,) = load_problems("humaneval", humaneval(tmp_path, body))
  assert len(p.tests) == 4 and p.tests[1] == "assert candidate(2, 2) == 4"
  assert all(test.startswith("assert candidate(") for test in p.tests)
  assert passes(p) == 4  # so that no text lost its indent
  assert passes(p, "def add(a, b):\n  return 4\n") == 1


@pytest.mark.parametrize("body", [
  "import math\nassert candidate(1, 2) == math.sqrt(9)",
  "for i in range(3):\n  assert candidate(i, i) == 2 * i",
  "x = candidate(1, 2)\nassert x == 3",
  "assert candidate(1, 2) == 3\nassert twice(1) == 2",
])  # fmt: skip
def test_another_check_stays_whole(tmp_path, body):
  (p,) = load_problems("humaneval", humaneval(tmp_path, body))
  assert len(p.tests) == 1 and p.tests[0].endswith("\ncheck(candidate)\n")
  assert passes(p) == 1 and passes(p, "def add(a, b):\n  return 7\n") == 0


def test_humaneval_plus_wants_the_file_with_the_base_tests(tmp_path):
  path = humaneval(tmp_path, "for i in range(9):\n  assert candidate(i, 1) == i + 1")
  origin = path.rename(tmp_path / "HumanEvalPlus-OriginFmt.jsonl.gz")
  with pytest.raises(FileNotFoundError, match="HumanEvalPlus.jsonl.gz is not there; it holds"):
    load_problems("humanevalplus", origin)
  base = humaneval(tmp_path, "assert candidate(1, 2) == 3\nassert candidate(2, 2) == 4",
                   plus_input=[[1, 2]])  # fmt: skip
  base = base.rename(tmp_path / "HumanEvalPlus.jsonl.gz")
  (p,) = load_problems("humanevalplus", origin)
  assert (len(p.tests), len(p.plus_tests), p.source) == (2, 1, "humanevalplus") and passes(p) == 3
  assert passes(p, "def add(a, b):\n  return {1: 3, 2: 4}[a] if b == 2 else 0\n") == 2
  with pytest.raises(ValueError, match="without results; give HumanEvalPlus-OriginFmt.jsonl.gz"):
    load_problems("humanevalplus", base)


@pytest.mark.parametrize(("out", "exp"), [
  (1.0, 1.0 + 1e-8), (1.0, 1.0001), (0, 1e-7), (0, 2e-6), (-1e9, -1e9 - 50), (-1e9, -1e9 - 200),
  (math.inf, math.inf), (math.inf, -math.inf), (math.inf, 1.0), (math.nan, math.nan), (True, 1),
  (1j, 1j + 1e-9), ([1.0, 2.0], [1.0, 2.0 + 1e-9]), ((1.0, 2.0), [1.0, 2.1]), ([], []),
  ([[1.0], [2.0]], [(1.0,), (2.0 + 1e-9,)]),
])  # fmt: skip
def test_tests_without_numpy_compare_as_with_it(out, exp):
  names = {}
  exec(problem_sets._without_numpy("import numpy as np\nimport math\n"), names)
  ours = names["np"]
  assert "math" in names and ours is not np
  assert ours.allclose(out, exp, rtol=1e-7, atol=1e-6) == np.allclose(out, exp, 1e-7, 1e-6)
  assert not isinstance(out, ours.ndarray)


MBPP = {"task_id": 11, "text": "Write sum. https://example.org/sum",
        "code": "import sys\r\nclass Node:\r\n  pass\r\ndef sum(xs):\r\n  return len(xs)",
        "test_list": ["assert sum([n, 2]) == 2", "assert sum([3]) == sys.float_info.radix - 1"],
        "test_setup_code": "n = Node()\r\nn.x = 1", "challenge_test_list": []}  # fmt: skip


def test_mbpp_shows_one_test_and_sets_up_each(tmp_path):
  path = tmp_path / "mbpp.jsonl"
  path.write_text("".join(json.dumps({**MBPP, "task_id": i}) + "\n" for i in (10, 11, 510, 601)))
  p = load_problems("mbpp", path)[1]
  assert p.stub == '"""\nWrite sum. \nassert sum([n, 2]) == 2\n"""\n'
  assert p.prompt == '```\n"""\nWrite sum. \nassert sum([n, 2]) == 2\n"""\n```\n'
  # The name of a builtin, and a class that the tests do not mean.
  assert p.integrity == "shared"  # of a class of the answer's
  assert p.entry_point == "sum" and p.task_id == "Mbpp/11" and "\r" not in p.reference
  assert p.tests[0] == "import sys\nn = Node()\nn.x = 1\nassert sum([n, 2]) == 2"
  assert passes(p) == 2
  ids = {s: [p.task_id for p in load_problems("mbpp", path, s)] for s in ("test", "train", "prompt")}
  assert ids == {"test": ["Mbpp/11", "Mbpp/510"], "train": ["Mbpp/601"], "prompt": ["Mbpp/10"]}
  with pytest.raises(ValueError, match="no problem of 'mbpp' in"):
    load_problems("mbpp", path, "validation")


def test_mbpp_sanitized_and_plus(tmp_path):
  row = {"task_id": 2, "prompt": "Root.", "code": "def root(x):\n  return x ** 0.5\n",
         "test_imports": ["import math"], "test_list": ["assert math.isclose(root(4), 2)"] * 3,
         "test": "for i, o in [(1, 1), (9, 3)]:\n  assert root(i) == o\n"}  # fmt: skip
  path = tmp_path / "sanitized-mbpp.json"
  path.write_text(json.dumps([row, {**row, "task_id": 3}]))
  p = load_problems("mbpp_sanitized", path)[1]
  assert (len(p.tests), p.plus_tests, p.task_id) == (3, (), "Mbpp/3") and passes(p) == 3
  (path := tmp_path / "plus.jsonl").write_text(json.dumps(row))
  (p,) = load_problems("mbppplus", path)
  assert (len(p.tests), len(p.plus_tests)) == (3, 1) and passes(p) == 4
  assert passes(p, "def root(x):\n  return 2.0\n") == 3


def test_leetcode_methods_and_their_prelude(tmp_path):
  node = "class ListNode:\n  def __init__(self, val=0):\n    self.val = val\n"
  row = {"task_id": "same", "prompt": f"from typing import *\n\n{node}\n", "query": "Same?",
         "completion": "class Solution:\n  def same(self, a: Optional[ListNode]) -> int:\n"
                       "    return a.val\n", "entry_point": "Solution().same",
         "test": "def check(candidate):\n    assert candidate(a = ListNode(3)) == 3\n"
                 "    assert candidate(a = ListNode(0)) == 0\n"}  # fmt: skip
  (path := tmp_path / "l.jsonl").write_text(json.dumps(row))
  (p,) = load_problems("leetcode", path)
  assert p.entry_point == "Solution().same" and p.task_id == "leetcode/same"
  assert p.tests == ("assert candidate(a = ListNode(3)) == 3", "assert candidate(a = ListNode(0)) == 0")
  check_shape(p)
  assert passes(p) == 2 and p.prompt == "Same?"


def test_errors_name_the_set_and_the_file(tmp_path):
  own = Problem("a/1", "Add.", "f", ("assert f(1) == 2",), (), "def f(x):\n  return x + 1\n", "a")
  path = tmp_path / "own.jsonl"
  write_problems([own], path)
  assert load_problems("problems", path) == [own]
  with pytest.raises(ValueError, match="unknown problem set 'humanevil'; known: problems, acecode"):
    load_problems("humanevil", path)
  with pytest.raises(ValueError, match="humaneval has no split 'train'; known: all"):
    load_problems("humaneval", path, "train")
  with pytest.raises(ValueError, match="own.jsonl has no 'query', as those of 'leetcode' do"):
    load_problems("leetcode", path)
  with pytest.raises(FileNotFoundError, match="is a folder; give one of its files: own.jsonl"):
    load_problems("mbpp", tmp_path)
  with pytest.raises(FileNotFoundError, match="none.jsonl is not there"):
    load_problems("mbpp", tmp_path / "none.jsonl")
  (empty := tmp_path / "empty.jsonl").write_text("\n")
  with pytest.raises(ValueError, match="no problem of 'problems' in .*empty.jsonl"):
    load_problems("problems", empty)


def test_every_set_has_a_reader_and_a_default_split():
  assert set(problem_sets.SPLITS) <= set(problem_sets.PROBLEM_SETS)
  assert problem_sets.SPLITS["acecode"][0] == "released"
  counted = collections.Counter(name for name, *_ in FILES)
  assert set(counted) | {"problems", "acecode"} == set(problem_sets.PROBLEM_SETS)
