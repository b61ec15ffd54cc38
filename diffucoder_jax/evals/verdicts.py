"""Which samples pass: each host judges its share in the sandbox, and all know all verdicts."""

import dataclasses
import importlib.util
from typing import NamedTuple

import jax

from diffucoder_jax.evals import benchmarks, prompts
from diffucoder_jax.execution.sandbox import Job, Limits
from diffucoder_jax.runtime import hosts

# One test of these benchmarks has all inputs of a problem. The slowest reference takes 9 s of
# processor time; an answer that never ends takes it all.
LIMITS = Limits(cpu_seconds=30, wall_seconds=90, job_seconds=120, memory_bytes=2 << 30)
# Solutions may import it, as where published scores were made; its numbers cross as plain ones.
PACKAGES = ("numpy",)


class Verdict(NamedTuple):
  """Attributes:
  task_id, sample: which.
  base, plus: status of the set's own tests, and of those that EvalPlus added: "pass", "fail",
    "error", "timeout", "oom", "killed", "infra" or "not run"; plus is "" where there are none, and
    "not run" after base tests that do not pass.
  message: of what did not pass.
  integrity: "isolated"; "shared": the answer could have forged the verdict.
  """

  task_id: str
  sample: int
  base: str
  plus: str
  message: str
  integrity: str

  @property
  def solved(self) -> bool:
    """All tests there are."""
    return self.base == "pass" and self.plus in ("pass", "")


def judge(opened, rows, sandbox) -> list[Verdict]:
  """Judges samples. Equal solutions of a task are run once.

  Args:
    opened: `benchmarks.Opened`. rows: {(task_id, sample): {"solution": text}}, the same on all hosts.
    sandbox: `Sandbox`, one on each host; None for benchmarks whose answers are not run.
  Returns:
    a `Verdict` for each row, in their order, the same on all hosts.
  """
  problems = {problem.task_id: problem for problem in opened.problems}
  wanted = list(dict.fromkeys((task_id, row["solution"]) for (task_id, _), row in rows.items()))
  mine = wanted[jax.process_index() :: jax.process_count()]
  one = _number if opened.benchmark.judge == "number" else _sandboxed
  found = one(opened, [(problems[task_id], solution) for task_id, solution in mine], sandbox)
  shares = hosts.gather(found)
  verdicts = {}
  for process, share in enumerate(shares):
    verdicts.update(zip(wanted[process :: len(shares)], share, strict=True))
  return [
    Verdict(task_id, sample, *verdicts[task_id, row["solution"]])
    for (task_id, sample), row in rows.items()
  ]


def missing_packages(opened) -> dict[str, list[str]]:
  """task_id -> the packages that its tests need and this machine does not have."""
  needed = {name for names in opened.needs.values() for name in names}
  absent = {name for name in needed if importlib.util.find_spec(name) is None}
  missing = {task: [n for n in names if n in absent] for task, names in opened.needs.items()}
  return {task: names for task, names in missing.items() if names}


def packages_of(opened) -> tuple[str, ...]:
  """The installed packages that the sandbox must offer for this benchmark's tests."""
  needed = {name for names in opened.needs.values() for name in names}
  here = sorted(name for name in needed if importlib.util.find_spec(name) is not None)
  return tuple(dict.fromkeys([*PACKAGES, *here]))


def _number(opened, pairs, _):
  same = [prompts.same_number(solution, problem.reference) for problem, solution in pairs]
  return [["pass" if ok else "fail", "", "", "isolated"] for ok in same]


def _sandboxed(opened, pairs, sandbox):
  """[base, plus, message, integrity] of each (problem, solution)."""
  absent = missing_packages(opened)
  run = [pair for pair in pairs if pair[0].task_id not in absent]
  base = iter(_run(sandbox, run, "tests"))
  found = []
  for problem, _ in pairs:
    if problem.task_id in absent:
      found.append(
        ["not run", "", f"needs {', '.join(absent[problem.task_id])}", problem.integrity]
      )
      continue
    outcome = next(base)
    plus = "not run" if problem.plus_tests else ""
    found.append([outcome.status, plus, outcome.message, outcome.integrity])
  # Extra tests count with the set's own alone, so what has failed is not run again.
  left = [i for i, (p, _) in enumerate(pairs) if p.plus_tests and found[i][0] == "pass"]
  for i, outcome in zip(left, _run(sandbox, [pairs[i] for i in left], "plus_tests"), strict=True):
    found[i][1:3] = [outcome.status, outcome.message]
  return found


def _run(sandbox, pairs, part):
  """The outcomes of one part of the tests, tasks known to be slow with more time."""
  limits, outcomes = sandbox.limits, [None] * len(pairs)
  factors = [benchmarks.SLOW.get(problem.task_id, 1) for problem, _ in pairs]
  try:
    for factor in sorted(set(factors)):
      chosen = [i for i, f in enumerate(factors) if f == factor]
      times = ("cpu_seconds", "wall_seconds", "job_seconds")
      longer = {name: factor * getattr(limits, name) for name in times}
      sandbox.limits = dataclasses.replace(limits, **longer)
      jobs = [
        Job(solution, p.entry_point, getattr(p, part), p.prelude, p.integrity)
        for p, solution in (pairs[i] for i in chosen)
      ]
      for i, outcome in zip(chosen, sandbox.run(jobs), strict=True):
        outcomes[i] = outcome
  finally:
    sandbox.limits = limits
  return outcomes
