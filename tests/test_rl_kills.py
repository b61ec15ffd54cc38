"""Coupled-GRPO that is killed with SIGKILL, anywhere and often, ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from diffucoder_jax.execution import isolation
from diffucoder_jax.runtime import metrics
from tests import tiny
from tests.execution import graded

pytest.importorskip("diffucoder_jax.execution.sandbox")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]
KILLS = 10
STEPS = 36
CHANGES = {  # checkpoints between the two steps of a round as well as behind them
  "optim.steps": STEPS, "checkpoint.every": 3, "checkpoint.keep": 2, "eval.every": 5,
  "eval.samples": 2,
}  # fmt: skip
# Seconds that a kill may come after its moment has begun: on any machine most are still within.
LATE = {"sampling": 0.003, "judging": 0.2, "evaluating": 0.03, "between": 0.003, "saving": 0.03}


def children():
  """The processes that this one has started, or inherited from such that ended."""
  found = set()
  for thread in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{thread}/children") as file:
      found |= set(map(int, file.read().split()))
  return found


@pytest.fixture
def left_over():
  """A function that tells which processes are left of those that were started, after half a minute.

  Inside, whoever loses his parent becomes a child of this process: it can be listed, wherever in a
  tree of fork servers, judges and answers it was.
  """
  before = children()
  isolation.adopt_orphans()

  def wait():
    end = time.monotonic() + 30
    while True:
      for pid in children() - before:
        os.waitpid(pid, os.WNOHANG)
      if not children() - before or time.monotonic() > end:
        return [open(f"/proc/{pid}/cmdline").read() for pid in children() - before]
      time.sleep(0.05)

  yield wait
  for pid in children() - before:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  isolation.libc.prctl(isolation.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Run:
  """A workdir and the command that works on it."""

  def __init__(self, start, problems, folder, name, **environment):
    self.workdir, self.log, self.told = (folder / f"{name}{end}" for end in ("", ".log", ".told"))
    values = graded.settings(start, problems, **CHANGES)
    self.command = [
      sys.executable, "-m", "tests.execution.graded", "--config=configs/grpo_7b.py",
      f"--workdir={self.workdir}", *(f"--config.{key}={value}" for key, value in values.items()),
    ]  # fmt: skip
    self.environment = tiny.environment(GRADED_TOLD=str(self.told), **environment)

  def start(self):
    """A process in a group of its own; what it tells of itself begins anew."""
    self.told.write_text("")
    with open(self.log, "ab") as out:
      return subprocess.Popen(
        self.command, cwd=tiny.ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=out,
        stderr=subprocess.STDOUT, start_new_session=True,
      )  # fmt: skip

  def finish(self):
    process = self.start()
    assert tiny.wait(process) == 0, self.log.read_text()[-4000:]

  def inside(self):
    """What the program is doing, such as {"evaluating", "judging"}; it may be several things."""
    open_ = []
    for line in self.told.read_text().splitlines():
      if line.startswith("after "):
        open_.remove(line.removeprefix("after "))
      else:
        open_.append(line)
    return set(open_)

  def saving(self):
    """Whether a checkpoint is being written; it has a temporary name until it is whole."""
    folder = self.workdir / "checkpoints"
    return folder.is_dir() and any(not path.name.isdigit() for path in folder.iterdir())

  def rows(self):
    """The rows of metrics.jsonl without what the clock decides."""
    clock = lambda name: name == "time" or "second" in name  # noqa: E731
    return [{k: v for k, v in row.items() if not clock(k)} for row in metrics.read(self.workdir)]

  def rollouts(self):
    return {p.name: p.read_text() for p in sorted((self.workdir / "rollouts").iterdir())}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
  folder = tmp_path_factory.mktemp("graded")
  graded.write(folder)
  return folder


def moment_has_come(run, moment):
  if moment == "saving":
    return run.saving()
  inside = run.inside()
  if moment == "evaluating":
    return moment in inside
  if moment == "between":  # two steps of the same round
    return tiny.last_row(run.workdir)["step"] % 2 == 1 and not inside
  return inside == {moment}


def test_killed_ten_times_anywhere(problems, tmp_path, tmp_path_factory, left_over, capsys):
  """In start-up, rollouts, judging, between steps of a round, evaluation, and saves."""
  start = tiny.finished(tmp_path_factory.getbasetemp())
  # Compiled once, by the run that is never killed: a torn file there is JAX's affair.
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
  }  # fmt: skip
  seconds = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
  whole = Run(start, problems, tmp_path, "whole", **cache, **{seconds: "0"})
  run = Run(start, problems, tmp_path, "run", **cache, **{seconds: "1e9"})
  began = time.monotonic()
  whole.finish()
  assert left_over() == []

  rng = random.Random(0)
  moments = ["start"] * 2 + ["between"] * 2 + ["saving"] * 2 + ["sampling", "judging", "evaluating"]
  rng.shuffle(moments)
  moments = ["judging", *moments]  # the first life tells how long a start takes
  assert len(moments) == KILLS
  newest, start_seconds, history = 0, None, []
  for number, moment in enumerate(moments):
    born = time.time()
    process = run.start()
    if moment == "start":  # imports, reading, the sandbox's self-test, restoring
      time.sleep(rng.uniform(0, start_seconds))
    else:
      assert tiny.wait_until(run.inside, process), run.log.read_text()[-4000:]
      start_seconds = start_seconds or time.time() - born
      step = min(newest + rng.randint(1, 6), STEPS - 8)

      def far_enough(born=born, step=step, moment=moment):
        row = tiny.last_row(run.workdir)
        return row["time"] > born and row["step"] >= step and moment_has_come(run, moment)

      assert tiny.wait_until(far_enough, process), (history, run.log.read_text()[-4000:])
      time.sleep(rng.uniform(0, LATE[moment]))
    # Alone, its fork servers have to see that nobody is there; or all at once.
    if number % 2:
      process.kill()
    else:
      os.killpg(process.pid, signal.SIGKILL)
    code = tiny.wait(process)
    steps = tiny.steps_on_file(run.workdir)
    row, within = tiny.last_row(run.workdir), run.inside()
    if row["time"] > born:  # or it is about the life before
      odd = row["step"] % 2 and not within & {"sampling", "judging", "evaluating"}
      within |= {"between"} if odd else set()
      within |= {"saving"} if run.saving() else set()
    history.append((moment, sorted(within), row["step"], steps[-1:]))
    assert code == -signal.SIGKILL, (history, "it ended before it was killed")
    assert max(steps, default=0) >= newest, (history, "a checkpoint was lost")
    newest = max(steps, default=0)
    assert left_over() == [], history

  run.finish()
  assert left_over() == []
  with capsys.disabled():
    print(f"\nkilled {KILLS} times in {time.monotonic() - began:.0f} s: {history}")
  assert "Traceback" not in run.log.read_text()
  assert not (run.workdir / "checkpoints_damaged").exists(), "a kill must not damage a checkpoint"
  # The kills were where they should be, and the rewards had something to say.
  hit = {name for _, within, *_ in history for name in within}
  assert set(LATE) <= hit, history
  lines = [json.loads(line) for text in whole.rollouts().values() for line in text.splitlines()]
  assert len(lines) == STEPS // 2 * 8 and all(line["valid"] for line in lines)
  assert {tuple(line["tests"]) for line in lines} == {
    ("pass",) * n + ("fail",) * (4 - n) for n in range(5)
  }
  assert all(line["tests"] == graded.verdicts(line["completion"]) for line in lines)

  assert run.rollouts() == whole.rollouts()
  assert run.rows() == whole.rows()
  assert [row["step"] for row in run.rows() if "loss" in row] == list(range(1, STEPS + 1))
  step, leaves, _ = tiny.final_state(run.workdir)
  assert step == STEPS
  assert {name.split("/")[0] for name in leaves} == {"step", "params", "opt_state", "ref", "batch"}
  assert tiny.final_state(run.workdir) == tiny.final_state(whole.workdir)
  assert leaves["params/embed"] != tiny.final_state(start)[1]["params/embed"]
