"""The official evalplus gives every sample the verdict that we give it, or we say why not.

The package runs as its users run it, in a process of its own, its data overridden by the local files
(`launch/evalplus.sh` installs it; it isolates nothing, so the hostile samples here are harmless).
About 2,300 samples: every task's own solution, that solution with one operation changed, and for some
tasks answers that are wrong, slow, that crash or that forge their verdict. Each set is cut into parts,
so that one can be run by itself; a part takes about a minute on 2 idle cores.
"""

import ast
import collections
import dataclasses
import gzip
import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest

from diffucoder_jax.evals import benchmarks, verdicts
from diffucoder_jax.execution.sandbox import Limits
from tests.execution.conftest import open_or_skip

pytestmark = pytest.mark.slow

# Ours -> the official name, and the variable that overrides its data.
SETS = {
  "humanevalplus@v0.1.10": ("humaneval", "HUMANEVAL_OVERRIDE_PATH"),
  "humanevalplus@v0.1.9": ("humaneval", "HUMANEVAL_OVERRIDE_PATH"),
  "mbppplus@v0.2.0": ("mbpp", "MBPP_OVERRIDE_PATH"),
  "mbppplus@v0.1.0": ("mbpp", "MBPP_OVERRIDE_PATH"),
}
PARTS = 4
# Seconds of wall time in which one call must answer there (its default of 1 is too little for a
# loaded machine), and of processor time for all calls of the slow answers here.
OFFICIAL_SECONDS, SLOW_SECONDS = 10, 3

# Bodies of the function that is asked for.
ODD = {
  # Wrong.
  "nothing": "return None",
  "words": "return 'as an AI language model'",
  "arguments": "return args",
  "missing": None,  # another function
  "prose": "?",  # no program at all
  # Slow.
  "forever": "while True: pass",
  "asleep": "import time; time.sleep(60)",
  # Crashing.
  "raises": "raise ValueError(1)",
  "exits": "import sys; sys.exit(0)",
  "gone": "import os; os._exit(0)",
  "recursion": "return {name}(*args, **named)",
  "memory": "return [0] * (1 << 34)",
  # Hostile: what it returns, or does to those who look.
  "equal": (
    "class All:\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
    "  return All()"
  ),
  "list": (
    "class All(list):\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
    "  return All()"
  ),
  "peeks": (
    "import sys\n  frame = sys._getframe()\n  while frame:\n    found = frame.f_locals\n"
    "    if 'expected' in found and 'i' in found: return found['expected'][found['i']]\n"
    "    frame = frame.f_back"
  ),
  "forges": (
    "import sys\n  frame = sys._getframe()\n  while frame:\n    found = frame.f_locals\n"
    "    if 'details' in found and 'stat' in found:\n"
    "      for i in range(len(found['details'])): found['details'][i] = True\n"
    "      found['progress'].value = len(found['details'])\n"
    "      found['stat'].value = 0\n      import os; os._exit(0)\n    frame = frame.f_back"
  ),
}
ODD_EVERY = 60  # of so many tasks, one gets all of these

# Verdicts that differ. Kind of sample -> (official, ours, why).
FORGED = "the official verdict is made in the answer's process, which can reach it"
EXPLAINED = {
  "equal": (
    True,
    False,
    "there, equality is the answer's own method; here, only plain data arrives",
  ),
  "list": (True, False, "as above; here it arrives as the list that it is"),
  "peeks": (True, False, f"{FORGED}: it reads what is expected"),
  "forges": (True, False, f"{FORGED}: it writes into the shared memory"),
}
# Whatever solves HumanEval/32 differs as well: where any zero will do, evalplus 0.3.1 goes on to the
# next input (`continue`) without noting that this one passed, finds fewer notes than inputs, and fails
# the answer. No answer passes there, the published reference included.
NEVER_PASSES = "HumanEval/32"
# Returns 1.1 GB, and the process holds what is expected as well: more than the 4 GiB of address space
# that evalplus grants (with EVALPLUS_MAX_MEMORY_BYTES=12000000000 the reference passes there too).
TOO_LARGE = "Mbpp/255"
# References that need seconds, for which 60 s of wall time, the official limit of all inputs together,
# may be too little on a loaded machine. They may time out there, and nothing else may.
HEAVY = {
  *(f"HumanEval/{i}" for i in (15, 36, 59, 83, 94, 100, 130, 139)),
  *(f"Mbpp/{i}" for i in (84, 123, 162, 255, 271, 300, 389, 392, 583, 589, 592, 599, 603, 630)),
}
# Ours in processor time, for the same reason.
PATIENT = dataclasses.replace(verdicts.LIMITS, cpu_seconds=60, wall_seconds=1200, job_seconds=1500)


def mutated(problem):
  """The reference with one comparison, operation or constant changed; "" where there is none."""
  tree = ast.parse(problem.reference)
  function = next(n for n in tree.body if getattr(n, "name", "") == problem.entry_point)
  if any(isinstance(n, ast.While) for n in ast.walk(tree)):
    return ""  # most would not end
  swaps = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Div: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And,
  }  # fmt: skip
  places = []
  for node in ast.walk(function):
    if isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
      places.append((node.ops, 0, swaps[type(node.ops[0])]()))
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in swaps:
      places.append((vars(node), "op", swaps[type(node.op)]()))
    elif isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 100:
      places.append((vars(node), "value", node.value + 1))
  if not places:
    return ""
  where, key, value = random.Random(problem.task_id).choice(places)
  where[key] = value
  return ast.unparse(tree)


def odd(problem, kind):
  body = ODD[kind]
  if body == "?":
    return "Sure! Here is the function you asked for."
  name = problem.entry_point
  if body is None:
    return problem.reference.replace(name, f"{name}_of_mine")
  return f"def {name}(*args, **named):\n  {body.format(name=name) if '{name}' in body else body}\n"


def samples_of(problems):
  """[(task_id, kind, solution)]."""
  samples = [(p.task_id, "reference", p.reference) for p in problems]
  samples += [(p.task_id, "mutated", code) for p in problems if (code := mutated(p))]
  for i, problem in enumerate(problems):
    if i % ODD_EVERY == 7:
      samples += [(problem.task_id, kind, odd(problem, kind)) for kind in ODD]
    elif i % 4 == 1:
      samples.append((problem.task_id, "nothing", odd(problem, "nothing")))
  return samples


@pytest.fixture(scope="module")
def open_set(shared):
  if not (shared / "benchmarks").is_dir():
    pytest.skip(f"no public problem sets at {shared}")
  return lambda name: benchmarks.open_benchmark(name, str(shared / "benchmarks"))


@pytest.fixture(scope="module")
def judged():
  """Verdicts of ours by (problem, solution): most tasks are the same in both versions of a set."""
  return {}


def official_verdicts(name, path, samples, folder):
  """[(status of base, of plus)] of the official command, in the order of the samples."""
  asked = {task_id for task_id, *_ in samples}
  data = folder / "data.jsonl"  # it insists on a sample of each task of its file
  with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as lines:
    data.write_text("".join(line for line in lines if json.loads(line)["task_id"] in asked))
  file = folder / "samples.jsonl"
  file.write_text(
    "".join(json.dumps({"task_id": t, "solution": code}) + "\n" for t, _, code in samples)
  )
  dataset, variable = SETS[name]
  command = [
    sys.executable, "-m", "evalplus.evaluate", "--dataset", dataset, "--samples", str(file),
    "--parallel", "2", "--min_time_limit", str(OFFICIAL_SECONDS), "--gt_time_limit_factor", "20",
  ]  # fmt: skip
  environment = {**os.environ, variable: str(data), "XDG_CACHE_HOME": str(folder / "cache")}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((folder / "samples_eval_results.json").read_text())["eval"]
  queues = {task_id: collections.deque(rows) for task_id, rows in found.items()}
  verdicts_ = []
  for task_id, _, code in samples:
    row = queues[task_id].popleft()
    assert row["solution"] == code
    verdicts_.append((row["base_status"], row["plus_status"]))
  return verdicts_


def our_verdicts(opened, samples, judged):
  """A `Verdict` for each sample."""
  problems = {p.task_id: p for p in opened.problems}
  slow = Limits(cpu_seconds=SLOW_SECONDS, wall_seconds=10, job_seconds=20, memory_bytes=2 << 30)
  for kinds, limits in (
    (lambda kind: kind not in ("forever", "asleep"), PATIENT),
    (lambda kind: kind in ("forever", "asleep"), slow),
  ):
    rows = {
      (task_id, i): {"solution": code}
      for i, (task_id, kind, code) in enumerate(samples)
      if kinds(kind) and (problems[task_id], code) not in judged
    }
    with open_or_skip(limits=limits, packages=verdicts.PACKAGES) as box:
      for v in verdicts.judge(opened, rows, box):
        judged[problems[v.task_id], rows[v.task_id, v.sample]["solution"]] = v
  return [judged[problems[task_id], code] for task_id, _, code in samples]


def why(task_id, kind, official, ours):
  """Why two verdicts differ; "" if we do not know."""
  if kind in EXPLAINED and (official[1] == "pass", ours.solved) == EXPLAINED[kind][:2]:
    return EXPLAINED[kind][2]
  if task_id == NEVER_PASSES and official[0] == "fail" and ours.base == "pass":
    return "evalplus passes no answer to this task"
  if task_id == TOO_LARGE and official == ("pass", "fail") and ours.solved:
    return "its result does not fit into the official limit of memory"
  if task_id in HEAVY and "timeout" in official and ours.solved:
    return "more than 60 s of wall time there"
  return ""


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", SETS)
def test_verdicts_are_the_official_ones(name, part, open_set, judged, tmp_path):
  if importlib.util.find_spec("evalplus") is None:
    pytest.skip("evalplus is not installed: run launch/evalplus.sh")
  opened = open_set(name)
  tasks = [p.task_id for p in opened.problems][part::PARTS]
  samples = [sample for sample in samples_of(opened.problems) if sample[0] in tasks]
  ours = our_verdicts(opened, samples, judged)
  official = official_verdicts(name, opened.paths[0], samples, tmp_path)
  differ, unexplained = [], []
  for (task_id, kind, _), status, verdict in zip(samples, official, ours, strict=True):
    assert "infra" not in (verdict.base, verdict.plus), verdict
    base = status[0] == "pass"
    if (base, base and status[1] == "pass") != (verdict.base == "pass", verdict.solved):
      reason = why(task_id, kind, status, verdict)
      differ.append((task_id, kind, status, verdict.base, verdict.plus, verdict.message, reason))
      unexplained += [] if reason else differ[-1:]
  passed = collections.Counter(
    kind for (_, kind, _), v in zip(samples, ours, strict=True) if v.solved
  )
  print(
    f"\n{name} part {part}: {len(samples)} samples, passed {dict(passed)}, {len(differ)} differ:"
  )
  print(*differ, sep="\n")
  assert not unexplained
  # Every reference passes, HumanEval/32 included; and not everything does.
  assert passed["reference"] == len(tasks)
  assert all(passed[kind] <= 2 for kind in ODD)  # to some tasks nothing is a right answer
  assert passed["mutated"] < sum(kind == "mutated" for _, kind, _ in samples) / 3


def test_there_are_two_thousand_samples(open_set):
  counts = collections.Counter()
  for name in SETS:
    counts.update(kind for _, kind, _ in samples_of(open_set(name).problems))
  assert counts["reference"] == 164 + 164 + 378 + 399
  assert sum(counts.values()) >= 2000 and counts["mutated"] >= 800
  assert all(counts[kind] >= 15 for kind in ODD), counts


def test_inputs_are_read_as_evalplus_reads_them(open_set):
  data = pytest.importorskip("evalplus.data.mbpp")
  from diffucoder_jax.data.rows import read_rows
  from diffucoder_jax.evals import oracle

  deep = lambda x: tuple(map(deep, x)) if isinstance(x, list) else x  # noqa: E731
  for name in ("mbppplus@v0.2.0", "mbppplus@v0.1.0"):
    for _, row in read_rows(open_set(name).paths[0]):
      convert = eval(
        f"lambda args: {oracle._EXPRESSION.get(row['task_id'], 'args')}", {"deep": deep}
      )
      for key in ("base_input", "plus_input"):
        wanted = data.mbpp_deserialize_inputs(row["task_id"], row[key])
        assert [list(convert(args)) for args in row[key]] == [list(args) for args in wanted]
