"""Sweeps whose cells run on a pod, or on a cluster."""

import os
import re
import signal
import subprocess
import sys

import pytest

from diffucoder_jax.runtime import metrics
from tests import tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machines have /proc")
CONFIG = """
from configs import tiny

def get_config(arg=None):
  c = tiny.get_config(arg)
  c.optim.steps = 60
  c.eval.every = 60
  return c

def sweep():
  for seed in (0, 1):
    yield {"seed": seed}
"""


class Sweep:
  """A committed config in a checkout, and the command that sweeps over it."""

  def __init__(self, launch, home, folder):
    self.launch, self.output, self.log = launch, folder / "out", folder / "log"
    self.config = f"swept_{folder.name}.py"
    (launch.checkout / self.config).write_text(CONFIG)
    flags = [f"--config.{key}={value}" for key, value in tiny.settings(home).items()]
    self.command = [
      sys.executable, "launch/sweep.py", f"--config={self.config}", "--program=train",
      f"--output={self.output}", *flags,
    ]  # fmt: skip
    self.environment = tiny.environment(**launch.environment)

  def program(self):
    """The number of the process that runs on the pod's first machine."""
    machine = self.launch.world.machines("adapt-7b")[0]
    return int((machine / "diffucoder/run/pid").read_text())

  def commit(self):
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["add", "-A"], ["commit", "-q", "-m", "a sweep", "--no-verify", "--allow-empty"]):
      subprocess.run([*git, *words], cwd=self.launch.checkout, check=True)

  def start(self, *flags):
    with open(self.log, "w") as out:
      return subprocess.Popen([*self.command, *flags], cwd=self.launch.checkout, env=self.environment,
                              stdout=out, stderr=subprocess.STDOUT)  # fmt: skip

  def run(self, *flags):
    """(exit code, what it printed)."""
    return tiny.wait(self.start(*flags), 300), self.log.read_text()


@pytest.fixture
def sweep(launch, home, tmp_path):
  return Sweep(launch, home, tmp_path)


@pytest.mark.slow
def test_a_sweep_on_a_pod_is_killed_and_ends_in_one_table(sweep):
  code, text = sweep.run("--submit=tpu")
  assert code == 1 and f"commit first: a pod gets what git has, without ?? {sweep.config}" in text
  sweep.commit()
  sweep.launch.run_jax()
  process = sweep.start("--submit=tpu")
  begun = lambda: any(tiny.last_row(x)["step"] > 2 for x in sweep.output.glob("*/"))  # noqa: E731
  assert tiny.wait_until(begun, process, 300), sweep.log.read_text()
  # The program is held until it is watched again: it could end before that, with nobody looking.
  program = sweep.program()
  os.kill(program, signal.SIGSTOP)
  process.send_signal(signal.SIGKILL)
  process.wait()
  (first,) = sweep.output.glob("*/")
  assert tiny.last_row(first)["step"] < 60, "too fast for this test"

  process = sweep.start("--submit=tpu")
  watched = lambda: "1 worker(s) running" in sweep.log.read_text()  # noqa: E731
  seen = tiny.wait_until(watched, process, 300)
  os.kill(program, signal.SIGCONT)
  assert seen, sweep.log.read_text()
  code, text = tiny.wait(process, 300), sweep.log.read_text()
  assert code == 0, text
  assert (
    "2 cells, 0 are finished" in text and "goes on" in text and "2 of 2 cells are finished" in text
  )
  # The pod went on with the first cell: it was watched, not started again.
  assert text.count("worker.sh start") == 1 and text.count("queued-resources create") == 0, text
  times = [row["time"] for row in metrics.read(first)]
  assert times == sorted(times)
  lines = (sweep.output / "table.md").read_text().splitlines()
  assert len([line for line in lines if "| finished |" in line]) == 2
  assert sweep.run("--submit=tpu", "--print") == (0, "")


@pytest.mark.slow
def test_a_sweep_on_a_cluster_submits_each_cell_once(sweep):
  sweep.commit()
  code, text = sweep.run("--submit=xpk", "--print")
  lines = text.splitlines()
  assert len(lines) == 2 and all(
    re.fullmatch(r"NAME=adapt-7b-[0-9a-f]{12} bash launch/xpk.sh create -- python -m .*", line)
    for line in lines
  )
  names = [line.split()[0].removeprefix("NAME=") for line in lines]
  code, text = sweep.run("--submit=xpk")
  workloads = sweep.launch.world.folder / "workloads"
  assert code == 0 and text.count(": submitted (waiting)") == 2, text
  assert sorted(path.name for path in workloads.iterdir()) == sorted(names)
  (workloads / names[0]).write_text("FAILED")
  code, text = sweep.run("--submit=xpk")
  assert (
    code == 0 and text.count(": submitted (") == 1 and text.count(": is there already (") == 1
  ), text
