"""Programming problems with tests: the one record that tuning, RL and evaluation read."""

import dataclasses
import json

from etils import epath


@dataclasses.dataclass(frozen=True)
class Problem:
  """A task whose answer can be run.

  Attributes:
    task_id: unique in its set.
    prompt: what the user asks.
    entry_point: name of the function that the answer defines.
    tests: programs that run after the answer, each by itself; one passes that raises nothing.
      Rewards are the share that passes.
    plus_tests: more of them, which only evaluation runs.
    reference: an answer that passes them all; code, without a fence.
    source: the set it is from.
  """

  task_id: str
  prompt: str
  entry_point: str
  tests: tuple[str, ...]
  plus_tests: tuple[str, ...]
  reference: str
  source: str

  @property
  def answer(self) -> str:
    """The reference as an assistant writes it: one fenced block, which `chat.answer_of` opens."""
    return f"```python\n{self.reference.rstrip()}\n```"


_FIELDS = tuple(field.name for field in dataclasses.fields(Problem))


def write_problems(problems, path) -> None:
  """Writes one JSON object a line: the fields, and `instruction` and `output` for tuning.

  The file is instruction data in the OpenCoder schema (see `instructions.py`) and problems at once.

  Raises:
    ValueError: two problems have one task_id.
  """
  ids = [problem.task_id for problem in problems]
  if len(set(ids)) < len(ids):
    twice = next(i for i in ids if ids.count(i) > 1)
    raise ValueError(f"two problems are called {twice!r}; a task_id must be unique")
  rows = [
    {**dataclasses.asdict(problem), "instruction": problem.prompt, "output": problem.answer}
    for problem in problems
  ]
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_problems(path) -> list[Problem]:
  """Reads what `write_problems` wrote.

  Raises:
    ValueError: a line is no JSON, or lacks a field; names the line.
  """
  problems = []
  for number, line in enumerate(epath.Path(path).read_text().splitlines(), 1):
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    missing = [name for name in _FIELDS if name not in row]
    if missing:
      raise ValueError(f"{path}:{number} has no {missing[0]!r}; write it with write_problems")
    fields = {name: row[name] for name in _FIELDS}
    lists = {name: tuple(row[name]) for name in ("tests", "plus_tests")}
    problems.append(Problem(**{**fields, **lists}))
  return problems
