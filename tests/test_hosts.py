"""Real processes on loopback: what they tell each other, and how they end and start together."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from configs import sft_7b
from diffucoder_jax.data.problems import write_problems
from diffucoder_jax.data.toy_problems import make_problems
from diffucoder_jax.runtime import heartbeat, hosts, metrics
from diffucoder_jax.runtime import workdir as workdirs
from tests import tiny
from tests.execution import graded

TRAIN = ("-m", "diffucoder_jax.train")
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of the time is compilation
STEPS = 40
# Meshes of four devices over (data, fsdp, tensor).
MESH = {"mesh.data": 2, "mesh.fsdp": 2}
LONG = {**MESH, "optim.steps": STEPS, "checkpoint.every": 4, "eval.every": 20, "eval.rows": 8}


class Pod:
  """Processes of one run of a program, `devices` each. `order`: which is started first."""

  def __init__(self, arguments, folder, processes, devices=1, order=None, program=TRAIN):
    common = {
      "DIFFUCODER_MULTIHOST": "1", "DIFFUCODER_COORDINATOR": f"127.0.0.1:{tiny.free_port()}",
      "DIFFUCODER_PROCESSES": str(processes), **QUICK,
    }  # fmt: skip
    number = len(list(folder.glob("*.log")))
    self.logs = [folder / f"{number + i}.log" for i in range(processes)]
    self.processes = [None] * processes
    for i in order or range(processes):
      with open(self.logs[i], "wb") as log:
        self.processes[i] = subprocess.Popen(
          [sys.executable, *program, *arguments], cwd=tiny.ROOT, stdin=subprocess.DEVNULL,
          stdout=log, stderr=log, env=tiny.environment(devices, DIFFUCODER_PROCESS=str(i), **common),
        )  # fmt: skip

  def reach(self, workdir, step):
    """Waits for a step to be on file."""
    seen = lambda: tiny.last_row(workdir)["step"] >= step  # noqa: E731
    assert tiny.wait_until(seen, self.processes[0]), self.text(0)[-4000:]

  def signal(self, number, processes):
    for i in processes:
      self.processes[i].send_signal(number)

  def lose(self, victim):
    """Kills one process; the others have to end within a minute, and to say why."""
    began = time.monotonic()
    self.signal(signal.SIGKILL, [victim])
    codes = self.wait()
    assert time.monotonic() - began < 60
    # Whoever finds a broken connection says so itself; JAX ends those that hear of it otherwise,
    # above all from a coordinator that is gone.
    told = {hosts.LOST: "it lost the others", -signal.SIGABRT: "indicates that another task died"}
    assert codes[victim] == -signal.SIGKILL
    assert victim == 0 or codes[0] == hosts.LOST, codes
    for i in {*range(len(codes))} - {victim}:
      assert told[codes[i]] in self.text(i), codes

  def wait(self, seconds=400):
    """Exit codes; leaves no process behind."""
    try:
      end = time.monotonic() + seconds
      return [each.wait(max(1, end - time.monotonic())) for each in self.processes]
    finally:
      for each in self.processes:
        each.kill()

  def text(self, i):
    return pathlib.Path(self.logs[i]).read_text()


@pytest.mark.slow
def test_four_processes_through_everything(home, tmp_path):
  """Killed twice and preempted, started again in another order and then as two on another mesh."""
  straight, broken = tmp_path / "straight", tmp_path / "broken"
  arguments = lambda workdir, changes: tiny.flags(home, workdir, None, {**LONG, **changes})  # noqa: E731
  pod = Pod(arguments(straight, {}), tmp_path, 4)
  assert pod.wait() == [0] * 4, pod.text(0)[-4000:]
  assert "4 process(es)" in pod.text(0)

  for victim, step in ((2, 6), (0, 14)):  # 0 is the coordinator
    pod = Pod(arguments(broken, {}), tmp_path, 4, order=[3, 1, 0, 2])
    pod.reach(broken, step)
    pod.lose(victim)
  pod = Pod(arguments(broken, {}), tmp_path, 4)
  pod.reach(broken, 22)
  pod.signal(signal.SIGTERM, range(4))
  assert pod.wait() == [hosts.PREEMPTED] * 4, pod.text(0)[-4000:]
  saved = tiny.steps_on_file(broken)[-1]
  assert f"preempted: saved step {saved}" in pod.text(0) and 22 <= saved < STEPS
  assert "continuing from checkpoint" in pod.text(0)

  # As two processes on another mesh: the same rows and noise, other rounding.
  other = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
  pod = Pod(arguments(broken, other), tmp_path, 2, devices=2, order=[1, 0])
  assert pod.wait() == [0] * 2, pod.text(0)[-4000:]
  assert f"continuing from checkpoint {broken}/checkpoints/{saved}" in pod.text(0)
  wanted, found = tiny.losses(straight), tiny.losses(broken)
  assert list(found) == list(wanted) == list(range(1, STEPS + 1))
  assert [found[i] for i in range(1, saved + 1)] == [wanted[i] for i in range(1, saved + 1)]
  assert found == pytest.approx(wanted, rel=1e-5)

  # And all of it as in one process.
  alone = tmp_path / "alone"
  done = tiny.run("train", arguments(alone, {}), devices=4, **QUICK)
  assert done.returncode == 0, done.stderr[-4000:]
  assert tiny.losses(alone) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_two_processes_tune_as_one_does(home, tmp_path):
  """Stage 3: conversations, prompts that are noised in some rows, and a batch that is filled up."""
  train, _ = make_problems(train=60, test=4)
  write_problems(train, tmp_path / "problems.jsonl")
  changes = {
    "tokenizer": home.tokenizer, "data.path": tmp_path / "problems.jsonl", "data.seq_len": 256,
    "data.global_batch": 6, "data.fill_batch": True, "mesh.data": 4, "optim.steps": 6,
    "checkpoint.every": 6, "eval.every": 6, "objective.condition_steps": 4,
  }  # fmt: skip
  assert changes.keys() <= workdirs.flat(sft_7b.get_config("tiny").to_dict()).keys()
  values = [f"--config.{key}={value}" for key, value in changes.items()]
  one, two = ([f"--workdir={tmp_path / name}", "--config=configs/sft_7b.py:tiny", *values]
              for name in ("one", "two"))  # fmt: skip
  done = tiny.run("train", one, devices=4, **QUICK)
  assert done.returncode == 0, done.stderr[-4000:]
  pod = Pod(two, tmp_path, 2, devices=2)
  assert pod.wait() == [0, 0], pod.text(0)[-4000:]
  wanted, found = tiny.rows(tmp_path / "one"), tiny.rows(tmp_path / "two")
  assert len(found) == len(wanted)
  for row, other in zip(found, wanted, strict=True):
    assert row == pytest.approx(other, rel=1e-5)
  assert any("hosts/own_seconds_slowest" in row for row in metrics.read(tmp_path / "two"))


@pytest.mark.slow
def test_two_processes_reinforce_through_everything(tmp_path, tmp_path_factory):
  """Coupled-GRPO: one dies, then both are told to end; what is learnt and logged stays the same."""
  start = tiny.finished(tmp_path_factory.getbasetemp())
  graded.write(tmp_path)
  changes = {"mesh.data": 2, "checkpoint.every": 2, "optim.steps": 12}
  settings = graded.settings(start, tmp_path, **changes)
  flags = ["--config=configs/grpo_7b.py", *(f"--config.{key}={x}" for key, x in settings.items())]

  def pod(workdir):
    arguments = [*flags, f"--workdir={workdir}"]
    return Pod(arguments, tmp_path, 2, program=("-m", "tests.execution.graded"))

  straight, broken = tmp_path / "straight", tmp_path / "broken"
  both = pod(straight)
  assert both.wait() == [0, 0], both.text(0)[-4000:]
  both = pod(broken)
  both.reach(broken, 2)
  both.lose(1)
  both = pod(broken)
  both.reach(broken, 4)
  both.signal(signal.SIGTERM, range(2))
  assert both.wait() == [hosts.PREEMPTED] * 2, both.text(0)[-4000:]
  both = pod(broken)
  assert both.wait() == [0, 0], both.text(0)[-4000:]
  assert tiny.contents(broken / "rollouts") == tiny.contents(straight / "rollouts")
  assert tiny.losses(broken) == tiny.losses(straight)
  assert len(tiny.losses(broken)) == settings["optim.steps"]


HANGS = """
import sys, time
from diffucoder_jax.runtime.heartbeat import Heartbeat
with Heartbeat(0.5) as alive:
  for step in range(1, 4):
    time.sleep(0.3)  # three steps take longer than the limit, one does not
    alive.beat(step, 0.0)
  print("alive", flush=True)
  time.sleep(float(sys.argv[1]))
print("the end", flush=True)
"""


@pytest.mark.parametrize("seconds", ["0", "30"])
def test_a_program_that_hangs_is_ended(tmp_path, seconds):
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", HANGS, seconds], cwd=tiny.ROOT, env=tiny.environment(),
    capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert "alive" in done.stdout
  if seconds == "0":
    assert done.returncode == 0 and "the end" in done.stdout
    return
  assert done.returncode == hosts.LOST and "the end" not in done.stdout
  assert "hangs after step 3: nothing has finished for" in done.stderr
  assert "most recent call first" in done.stderr and "time.sleep" not in done.stdout
  assert time.monotonic() - began < 30


def test_who_straggles():
  assert not heartbeat.straggles([0.01, 0.02, 0.05, 0.03])  # nobody waits long for that
  assert heartbeat.straggles([0.1, 0.1, 0.1, 0.5])
  assert not heartbeat.straggles([0.4, 0.5, 0.5, 0.6])


STRAGGLES = """
import json, jax
from diffucoder_jax.runtime import heartbeat, hosts
hosts.start_distributed()
alive = heartbeat.Heartbeat(0)
own = 0.9 if jax.process_index() == 1 else 0.1
reports = []
for step in range(1, 4):
  alive.beat(step, own)
  alive.beat(step, own + 0.2)
  alive.beat(step)  # an evaluation, say
  reports.append(alive.report())
  assert alive.own == alive.steps == 0
print(json.dumps(reports))
"""


@pytest.mark.slow
def test_a_straggler_is_named(tmp_path):
  pod = Pod([], tmp_path, 3, devices=2, program=("-c", STRAGGLES))
  assert pod.wait() == [0] * 3, pod.text(0)
  first, *others = json.loads(pod.text(0).splitlines()[-1])
  assert first == {}  # what is said is known one report later: nobody waits for it
  for report in others:
    wanted = {"hosts/own_seconds": (0.2 + 1.0 + 0.2) / 3, "hosts/own_seconds_slowest": 1.0}
    assert report == pytest.approx(wanted)
  assert pod.text(2).count("process 1 is slow: it spends 1.00 s a step") == 2


FAILS = """
import jax
from diffucoder_jax.runtime import hosts
hosts.start_distributed()
def main():
  hosts.gather(0)
  if jax.process_index() == 1:
    raise OSError("no space left")
  hosts.gather(0)
hosts.together(main)
"""


@pytest.mark.slow
def test_one_error_ends_all_processes_at_once(tmp_path):
  pod = Pod([], tmp_path, 2, program=("-c", FAILS))
  codes = pod.wait(100)  # a Python that ends by itself waits for the other for ever
  assert codes[1] == 1 and "OSError: no space left" in pod.text(1)
  assert "process 1 of 2" in pod.text(1) and "the others with it" in pod.text(1)
  assert codes[0] == hosts.LOST and "it lost the others" in pod.text(0)


def test_one_process_has_nobody_to_compare_with():
  alive = heartbeat.Heartbeat(0)
  alive.beat(1, 5.0)
  assert alive.report() == alive.report() == {}


@pytest.mark.parametrize(
  ("error", "is_lost"),
  [
    (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
    (ValueError("UNKNOWN: Gloo AllGather failed: Read error"), True),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy"), True),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False),
    (ValueError("the config is wrong"), False),
    (OSError("UNAVAILABLE"), False),
  ],
)
def test_an_error_of_ones_own_is_no_lost_process(error, is_lost):
  assert hosts.lost(error) == is_lost


def test_disagreement_is_named(monkeypatch):
  hosts.check_same_everywhere({"anything": 1})  # one process agrees with itself
  mine = {"config.seed": 1, "the code": "a", "the text": "x"}
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(hosts, "gather", lambda value: [value] * 3)
  hosts.check_same_everywhere(mine)
  monkeypatch.setattr(hosts, "gather", lambda value: [value, value, {**value, "the": 0}])
  with pytest.raises(ValueError, match=r"about the \(here 'absent'; other than process 0: \[2\]"):
    hosts.check_same_everywhere(mine)
  other = lambda value: [value, {**value, "config.seed": 0}, value]  # noqa: E731
  monkeypatch.setattr(hosts, "gather", other)
  with pytest.raises(ValueError, match=r"disagree about config.seed \(here 1; other .*: \[1\]\)\. Start"):
    hosts.check_same_everywhere(mine)
