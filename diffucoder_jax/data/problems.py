"""Programming problems with tests: the one record that tuning, RL and evaluation read."""

import ast
import builtins
import collections
import dataclasses
import json

from etils import epath

from diffucoder_jax.data.rows import read_rows


@dataclasses.dataclass(frozen=True)
class Problem:
  """A task whose answer can be run.

  Attributes:
    task_id: unique in its set.
    prompt: what the user asks, the whole turn.
    entry_point: name of the function that the answer defines, or an expression that gives it, such
      as `Solution().twoSum`.
    tests: programs, each by itself; one passes that raises nothing. They call what was answered by
      the entry point's name or as `candidate`. Rewards are the share that passes.
    plus_tests: more of them, which only evaluation runs.
    reference: an answer that passes them all; code, without a fence. "" where none is known.
    source: the set it is from.
    prelude: code of the set's own, such as imports and helpers, which answer and tests both find
      already run.
    stub: the beginning of a program that states the task, for models that continue a text rather
      than answer. "" where the set has none.
    integrity: "isolated" if tests see nothing of an answer but what calls return; "shared" if they
      must run in its own process, because they use its classes or hand it functions. An answer
      could forge such a verdict, so rewards leave it out unless told otherwise.
  """

  task_id: str
  prompt: str
  entry_point: str
  tests: tuple[str, ...]
  plus_tests: tuple[str, ...]
  reference: str
  source: str
  prelude: str = ""
  stub: str = ""
  integrity: str = "isolated"

  @property
  def answer(self) -> str:
    """The reference as an assistant writes it: one fenced block, which `chat.answer_of` opens.

    "" without a reference: no answer, which instruction data refuses by name.
    """
    return f"```python\n{self.reference.rstrip()}\n```" if self.reference else ""


_FIELDS = dataclasses.fields(Problem)
_OPTIONAL = {f.name: f.default for f in _FIELDS if f.default is not dataclasses.MISSING}


def write_problems(problems, path) -> None:
  """Writes one JSON object a line: the fields, and `instruction` and `output` for tuning.

  The file is instruction data in the OpenCoder schema (see `instructions.py`) and problems at once.

  Raises:
    ValueError: two problems have one task_id.
  """
  (most, times), *_ = collections.Counter(p.task_id for p in problems).most_common(1) or [("", 0)]
  if times > 1:
    raise ValueError(f"two problems are called {most!r}; a task_id must be unique")
  rows = []
  for problem in problems:
    row = dataclasses.asdict(problem)
    row = {name: value for name, value in row.items() if value != _OPTIONAL.get(name)}
    rows.append({**row, "instruction": problem.prompt, "output": problem.answer})
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_problems(path) -> list[Problem]:
  """Reads what `write_problems` wrote.

  Raises:
    ValueError: a line is no JSON, or lacks a field; names the line.
  """
  problems = []
  for name, row in read_rows(path):
    missing = [f.name for f in _FIELDS if f.name not in row and f.name not in _OPTIONAL]
    if missing:
      raise ValueError(f"{name} has no {missing[0]!r}; write it with write_problems")
    fields = {f.name: row[f.name] for f in _FIELDS if f.name in row}
    lists = {key: tuple(row[key]) for key in ("tests", "plus_tests")}
    problems.append(Problem(**{**fields, **lists}))
  return problems


def entry_point_of(tests, code: str) -> str:
  """The function that tests are about: of what they call and `code` defines, what most of them do.

  Functions come before classes. Where nothing that is called is defined, as when the code is a
  wrong answer, what most tests call; tests that are no Python are passed over.

  Args:
    tests: programs.
    code: a program.
  Returns:
    a name; "" if the tests call nothing.
  """
  known = {}  # name -> 0 for a function, 1 for a class
  for statement in getattr(_parse(code), "body", ()):
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      known[statement.name] = int(isinstance(statement, ast.ClassDef))
  called = collections.Counter()
  for tree in filter(None, map(_parse, tests)):
    nodes = list(ast.walk(tree))
    names = [n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    names = [n for n in names if n in known or not hasattr(builtins, n)]  # some are called `sum`
    called.update(list(dict.fromkeys(n for n in names if n not in own)))
  # min() keeps the first of equals, and a Counter the order in which names were met.
  return min(called, key=lambda name: (known.get(name, 2), -called[name]), default="")


def integrity_of(tests, entry_point: str, code: str) -> str:
  """`Problem.integrity` of tests that find nothing but the entry point defined.

  Args:
    tests: programs.
    entry_point: a name.
    code: a program that defines it; a class as entry point gives objects that tests look into.
  Returns:
    "isolated" or "shared".
  """
  classes = {n.name for n in getattr(_parse(code), "body", ()) if isinstance(n, ast.ClassDef)}
  return (
    "shared"
    if entry_point in classes
    or any(_reaches_in(tree, entry_point) for tree in filter(None, map(_parse, tests)))
    else "isolated"
  )


def _parse(code):
  try:
    return ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def _reaches_in(tree, entry_point):
  """Whether a test uses a name of the answer's besides the entry point, or hands it a function."""
  nodes = list(ast.walk(tree))
  names = [n for n in nodes if isinstance(n, ast.Name)]
  functions = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
  bound = functions | {n.id for n in names if isinstance(n.ctx, ast.Store)}
  bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
  bound |= {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
  if any(not hasattr(builtins, n.id) for n in names if n.id not in bound | {entry_point}):
    return True
  calls = [n for n in nodes if isinstance(n, ast.Call)]
  called = {id(n.func) for n in calls}
  given = [
    value
    for call in calls
    if isinstance(call.func, ast.Name) and call.func.id == entry_point
    for argument in (*call.args, *(k.value for k in call.keywords))
    for value in ast.walk(argument)
    if id(value) not in called
  ]
  return any(
    isinstance(value, ast.Lambda) or isinstance(value, ast.Name) and value.id in functions
    for value in given
  )
