"""Public problem sets, read from their published files as `Problem` records.

HumanEval and MBPP are asked as the paper does (tables 5 and 6). Tests are the sets' own; a check
function that only asserts becomes one test an assert, any other stays whole.
"""

import ast
import re

from absl import logging
from etils import epath

from diffucoder_jax.data import acecode
from diffucoder_jax.data.problems import Problem, entry_point_of, integrity_of, read_problems
from diffucoder_jax.data.rows import read_rows

COMPLETE = "Please complete the following problem:\n"
# Task ids of MBPP (Austin et al. 2021, section 2.1).
_MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
_URL = re.compile(r"https?://\S+")
# HumanEval+ v0.1.10 in the original format evaluates the polynomial at its coefficients, which no
# answer passes. EvalPlus itself evaluates it at the answer.
_REPAIRS = {
  "HumanEval/32": (
    "assert _poly(*candidate(*inp), inp) <= 0.0001",
    "assert abs(_poly(*inp, candidate(*inp))) <= 0.0001",
  )
}
# The tests of EvalPlus compare numbers with numpy, which takes a fifth of a second to import and
# which a sandbox need not have. This is all they ask of it, for lists and numbers.
_NUMPY = """\
class np:
  ndarray, float64, float32 = (), float, float

  @staticmethod
  def allclose(out, exp, rtol, atol):
    if isinstance(exp, (list, tuple)):
      return len(out) == len(exp) and all(np.allclose(o, e, rtol, atol) for o, e in zip(out, exp))
    return out == exp or abs(out - exp) <= atol + rtol * abs(exp) < float("inf")
"""


def load_problems(name: str, path, split: str = "") -> list[Problem]:
  """Reads a problem set.

  Args:
    name: a key of `PROBLEM_SETS`.
    path: the published file.
    split: one of `SPLITS[name]`, for sets whose file holds several; "" for the first of them.
  Returns:
    the problems, in the order of the file.
  Raises:
    FileNotFoundError: no such file.
    ValueError: an unknown set or split, a damaged file, a record without what the set has, or no
      problem at all; names it.
  """
  if name not in PROBLEM_SETS:
    raise ValueError(f"unknown problem set {name!r}; known: {', '.join(PROBLEM_SETS)}")
  splits = SPLITS.get(name, ("all",))
  if split and split not in splits:
    raise ValueError(f"{name} has no split {split!r}; known: {', '.join(splits)}")
  try:
    problems = PROBLEM_SETS[name](path, split or splits[0])
  except KeyError as error:
    raise ValueError(
      f"a record of {path} has no {error.args[0]!r}, as those of {name!r} do; is it another set's?"
    ) from error
  if not problems:
    raise ValueError(f"no problem of {name!r} in {path}")
  return problems


def _own(path, _):
  """What `write_problems` writes."""
  return read_problems(path)


def _acecode(path, split):
  return acecode.read_acecode(path, split).problems


def _humaneval(path, _):
  """HumanEval.jsonl.gz (Chen et al. 2021): 164 problems."""
  return [_completion(row, _check_tests(row["test"]), ()) for _, row in read_rows(path)]


def _humanevalplus(path, _):
  """HumanEvalPlus-OriginFmt.jsonl.gz (Liu et al. 2023); the tests of HumanEval are read from
  HumanEvalPlus.jsonl.gz beside it, which has no results for the others."""
  rows = [row for _, row in read_rows(path)]
  if rows and "plus_input" in rows[0]:
    raise ValueError(f"{path} has inputs without results; give HumanEvalPlus-OriginFmt.jsonl.gz")
  beside = epath.Path(path).parent / "HumanEvalPlus.jsonl.gz"
  if not beside.exists():
    raise FileNotFoundError(f"{beside} is not there; it holds the tests that are HumanEval's")
  base = {row["task_id"]: row["test"] for _, row in read_rows(beside)}
  problems = []
  for row in rows:
    test = row["test"]
    wrong, right = _REPAIRS.get(row["task_id"], ("", ""))
    if wrong and wrong in test:
      logging.info("repaired the test of %s, which no answer passes", row["task_id"])
      test = test.replace(wrong, right)
    plus = _without_numpy(f"{test.strip()}\n\ncheck(candidate)\n")
    problems.append(_completion(row, _check_tests(base[row["task_id"]]), (plus,)))
  return problems


def _mbpp(path, split):
  """mbpp.jsonl (Austin et al. 2021): 974 problems; `challenge_test_list`, which 11 have, is unused."""
  return [_described(row, row["text"], "mbpp") for row in _mbpp_rows(path, split)]


def _mbpp_sanitized(path, split):
  """sanitized-mbpp.json: 427 of them, checked by hand."""
  return [_described(row, row["prompt"], "mbpp_sanitized") for row in _mbpp_rows(path, split)]


def _mbppplus(path, split):
  """MbppPlus-OriginFmt.jsonl.gz (Liu et al. 2023): 378 of them."""
  return [
    _described(row, row["prompt"], "mbppplus", (_without_numpy(row["test"]),))
    for row in _mbpp_rows(path, split)
  ]


def _leetcode(path, _):
  """LeetCodeDataset-*.jsonl.gz (Xia et al. 2025): methods of a class `Solution`.

  The prelude is the imports, ListNode and TreeNode that the set runs before every answer.
  """
  return [
    Problem(
      task_id=f"leetcode/{row['task_id']}",
      prompt=row["query"],
      entry_point=row["entry_point"],
      tests=_check_tests(row["test"]),
      plus_tests=(),
      reference=row["completion"],
      source="leetcode",
      prelude=row["prompt"].strip() + "\n",
    )
    for _, row in read_rows(path)
  ]


# Name -> function of (path, split), which gives a list of `Problem`.
PROBLEM_SETS = {
  "problems": _own,
  "acecode": _acecode,
  "mbpp": _mbpp,
  "mbpp_sanitized": _mbpp_sanitized,
  "mbppplus": _mbppplus,
  "humaneval": _humaneval,
  "humanevalplus": _humanevalplus,
  "leetcode": _leetcode,
}
_MBPP_ALL = ("all", *_MBPP_SPLITS)
SPLITS = {
  "acecode": tuple(acecode.SPLITS),
  "mbpp": _MBPP_ALL,
  "mbpp_sanitized": _MBPP_ALL,
  "mbppplus": _MBPP_ALL,
}


def _completion(row, tests, plus_tests):
  """A problem that is a signature with a docstring, and perhaps imports and helpers before it."""
  prompt = row["prompt"]
  return Problem(
    task_id=row["task_id"],
    prompt=f"{COMPLETE}```\n{prompt.strip()}\n```\n",
    entry_point=row["entry_point"],
    tests=tests,
    plus_tests=plus_tests,
    reference=prompt + row["canonical_solution"],
    source="humanevalplus" if plus_tests else "humaneval",
    prelude=prelude_of(row),
    stub=prompt,
  )


def prelude_of(row):
  """Imports and helpers before the function that a record of HumanEval asks for."""
  prompt, entry_point = row["prompt"], row["entry_point"]
  signature = re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
  if not signature:
    raise ValueError(f"the prompt of {row['task_id']} does not define {entry_point}")
  before = prompt[: signature.start()].strip()
  return before + "\n" if before else ""


def _mbpp_rows(path, split):
  first, last = _MBPP_SPLITS.get(split, (0, float("inf")))
  return [row for _, row in read_rows(path) if first <= row["task_id"] <= last]


def _described(row, text, source, plus_tests=()):
  """A problem in words. As EvalPlus asks it, the first test is shown: it has the function's name."""
  code = row["code"].replace("\r\n", "\n")
  # Tests own what they import: an answer that forgot to must not be helped. One (596) uses a module
  # that only the reference imports.
  imports = list(row.get("test_imports", ()))
  for test in row["test_list"]:
    imports += [line for line in _imports_used(test, code) if line not in imports]
  # What is set up before the tests is made of the answer's own classes.
  setup = [*imports, row.get("test_setup_code", "").replace("\r\n", "\n").strip()]
  lead = "".join(line + "\n" for line in setup if line)
  tests = tuple(lead + test for test in row["test_list"])
  entry_point = entry_point_of(row["test_list"], code)
  stub = f'"""\n{_URL.sub("", text)}\n{row["test_list"][0]}\n"""\n'
  return Problem(
    task_id=f"Mbpp/{row['task_id']}",
    prompt=f"```\n{stub.strip()}\n```\n",
    entry_point=entry_point,
    tests=tests,
    plus_tests=plus_tests,
    reference=code,
    source=source,
    stub=stub,
    integrity=integrity_of(tests, entry_point, code),
  )


def _without_numpy(test):
  return test.replace("import numpy as np\n", _NUMPY, 1)


def _imports_used(test, code):
  """Import lines for the modules that `code` imports and `test` uses by name."""
  used = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
  modules = [
    alias.name
    for statement in ast.parse(code).body
    if isinstance(statement, ast.Import)
    for alias in statement.names
    if not alias.asname
  ]
  return [f"import {name}" for name in modules if name in used]


def _check_tests(test):
  """`def check(candidate)` as programs: one for each assert if it does nothing else, or else one.

  Asserts of a constant, which HumanEval has where a private test stood, test nothing and are left
  out: each would be a share of the reward for free.
  """
  source = test.replace("\r\n", "\n")
  whole = (f"{source.strip()}\n\ncheck(candidate)\n",)
  checks = [s for s in ast.parse(source).body if not _is_metadata(s)]
  if len(checks) != 1 or getattr(checks[0], "name", "") != "check":
    return whole
  lines = source.encode().split(b"\n")
  programs = []
  for statement in checks[0].body:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant | ast.Name):
      continue
    if not isinstance(statement, ast.Assert):
      return whole
    if isinstance(statement.test, ast.Constant) and statement.test.value:
      continue
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    if "candidate" not in names:
      return whole
    programs.append(_segment(lines, statement))
  return tuple(programs) or whole


def _is_metadata(statement):
  return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "METADATA"


def _segment(lines, node):
  """The text of a statement; `ast.get_source_segment` splits the whole file anew for each."""
  found = lines[node.lineno - 1 : node.end_lineno]
  found[-1] = found[-1][: node.end_col_offset]
  found[0] = found[0][node.col_offset :]
  return b"\n".join(found).decode()
