"""Stop and go: a run that was stopped, killed or damaged ends as if nothing had happened."""

import gc
import os
import pathlib
import random
import shutil
import signal
import time
import warnings

import pytest

from diffucoder_jax.data import batching
from diffucoder_jax.runtime import metrics
from tests import tiny

pytestmark = [
  pytest.mark.usefixtures("programs"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The workdir of a run of 12 steps that was never stopped; checkpoints 4, 8, 12."""
  return tiny.finished(tmp_path_factory.getbasetemp())


class Crash(Exception):
  """Stands for whatever ends a program between two steps."""


def at_step(monkeypatch, number, act):
  """Calls `act` while the `number`-th step of a run, counted from its start, gets its batch."""
  take, taken = batching.TrainBatches.__next__, []

  def take_and_act(self):
    taken.append(self)
    if len(taken) == number:
      act()
    return take(self)

  monkeypatch.setattr(batching.TrainBatches, "__next__", take_and_act)


# --- Inside this process.


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on_bitwise(home, whole, tmp_path, monkeypatch):
  workdir, c = tmp_path / "run", tiny.config(home)
  for run, end in ((5, 5), (2, 7)):  # steps of this run, and the step it ends at
    with monkeypatch.context() as patch:
      at_step(patch, run, lambda: os.kill(os.getpid(), signal.SIGTERM))
      with pytest.raises(SystemExit) as stopped:
        tiny.run_training(c, workdir)
    assert stopped.value.code == 42
    assert tiny.steps_on_file(workdir)[-1] == end
    assert max(tiny.losses(workdir)) == end
  tiny.run_training(c, workdir)
  tiny.assert_same_run(workdir, whole)


def test_a_crash_costs_only_the_steps_since_the_last_checkpoint(home, whole, tmp_path, monkeypatch):
  def crash():
    raise Crash

  workdir, c = tmp_path / "run", tiny.config(home)
  with monkeypatch.context() as patch:
    at_step(patch, 8, crash)
    with pytest.raises(Crash):
      tiny.run_training(c, workdir)
  deadline = time.monotonic() + 30  # the save of step 4 goes on behind the program's back
  while tiny.steps_on_file(workdir) != [4]:
    assert time.monotonic() < deadline
  assert max(tiny.losses(workdir)) > 4  # rows that the next run writes again
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 7, "time": 17')  # as a crash in the middle of a line leaves it
  tiny.run_training(c, workdir)
  tiny.assert_same_run(workdir, whole)


@pytest.mark.slow
def test_rows_survive_where_files_cannot_be_appended_to(home, whole, tmp_path, monkeypatch):
  """In a bucket metrics.jsonl is written now and then; a checkpoint must never be ahead of it."""
  monkeypatch.setattr(metrics, "_can_append", lambda workdir: False)
  workdir, c = tmp_path / "run", tiny.config(home)
  with monkeypatch.context() as patch:
    at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
      tiny.run_training(c, workdir)
  assert list(tiny.losses(workdir)) == [1, 2, 3, 4, 5]
  tiny.run_training(c, workdir)
  tiny.assert_same_run(workdir, whole)


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 16
  path.write_bytes(content)


@pytest.fixture
def forgotten_reads():
  """Orbax leaves reads un-awaited after a failed one; this is where Python may complain of them."""
  yield
  with warnings.catch_warnings(action="ignore"):
    time.sleep(0.2)
    gc.collect()


@pytest.mark.usefixtures("forgotten_reads")
@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(home, whole, tmp_path, damage, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  files = [path for path in (workdir / "checkpoints" / "12" / "state").rglob("*") if path.is_file()]
  damage(max(files, key=lambda path: path.stat().st_size))
  tiny.run_training(tiny.config(home), workdir)
  loud = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
  assert any("checkpoints/12 is DAMAGED" in line and "the one before" in line for line in loud)
  tiny.assert_same_run(workdir, whole)
  assert (workdir / "checkpoints_damaged" / "12").is_dir()


# --- In processes of their own.


LONG = {
  "optim.steps": 60, "checkpoint.every": 4, "eval.every": 20, "eval.rows": 8,
  "objective.anneal_steps": 30,
}  # fmt: skip


def finish(home, workdir, log, changes=LONG, **options):
  """Runs training to its end in a process of its own."""
  process = tiny.start("train", tiny.flags(home, workdir, None, changes), log, **options)
  assert tiny.wait(process) == 0, pathlib.Path(log).read_text()[-4000:]


def assert_close_runs(workdir, other):
  assert [row.keys() for row in tiny.rows(workdir)] == [row.keys() for row in tiny.rows(other)]
  for row, wanted in zip(tiny.rows(workdir), tiny.rows(other), strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)


def stop_at(home, workdir, log, step, number, changes=LONG, **options):
  """Starts training and sends the signal `number` once it reports `step`. Returns the exit code."""
  process = tiny.start("train", tiny.flags(home, workdir, None, changes), log, **options)
  reported = lambda: tiny.last_row(workdir)["step"] >= step  # noqa: E731
  assert tiny.wait_until(reported, process), pathlib.Path(log).read_text()[-4000:]
  process.send_signal(number)
  return tiny.wait(process)


@pytest.mark.slow
def test_sigterm_of_a_real_process(home, tmp_path):
  finish(home, tmp_path / "whole", tmp_path / "whole.log")
  code = stop_at(home, tmp_path / "run", tmp_path / "run.log", 10, signal.SIGTERM)
  assert code == 42, (tmp_path / "run.log").read_text()[-4000:]
  stopped = tiny.steps_on_file(tmp_path / "run")[-1]
  assert 10 <= stopped < 60 and max(tiny.losses(tmp_path / "run")) == stopped
  assert f"preempted: saved step {stopped}" in (tmp_path / "run.log").read_text()
  finish(home, tmp_path / "run", tmp_path / "run.log")
  tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_eight_devices_then_four_then_one(home, tmp_path):
  finish(home, tmp_path / "whole", tmp_path / "whole.log", devices=8)
  stops = []
  for devices, step in ((8, 10), (4, 30)):
    log = tmp_path / f"{devices}.log"
    code = stop_at(home, tmp_path / "run", log, step, signal.SIGTERM, devices=devices)
    assert code == 42, log.read_text()[-4000:]
    stops.append(tiny.steps_on_file(tmp_path / "run")[-1])
    assert f"on {devices} cpu device(s)" in log.read_text()
  assert 10 <= stops[0] < stops[1] < 60
  finish(home, tmp_path / "run", tmp_path / "1.log", devices=1)
  assert list(tiny.losses(tmp_path / "run")) == list(range(1, 61))
  assert_close_runs(tmp_path / "run", tmp_path / "whole")


KILLS = 10


@pytest.mark.slow
def test_killed_ten_times_at_random(home, tmp_path, capsys):
  """kill -9 in start-up, between steps and within saves: always the same run in the end."""
  changes = {
    **LONG, "optim.steps": 200, "objective.anneal_steps": 100, "checkpoint.every": 3,
    "checkpoint.keep": 2,
  }  # fmt: skip
  rng = random.Random(0)
  # Programs are compiled once, by the run that is never killed: a kill in the middle of writing a
  # compiled program is JAX's affair.
  cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
  writes = {**cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  reads = {**cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
  began = time.monotonic()
  finish(home, tmp_path / "whole", tmp_path / "whole.log", changes, **writes)

  workdir, log = tmp_path / "run", tmp_path / "run.log"
  folder = workdir / "checkpoints"
  moments = ["start"] * 3 + ["step"] * 2 + ["save"] * 4
  rng.shuffle(moments)
  moments = ["step", *moments]  # the first life tells how long a start takes
  assert len(moments) == KILLS
  newest, start_seconds, history = 0, None, []
  for moment in moments:
    born = time.time()
    process = tiny.start("train", tiny.flags(home, workdir, None, changes), log, **reads)
    # How far this life may come: so far that ten of them do not reach the end.
    step = min(newest + rng.randint(1, 25), 170)

    def far_enough(born=born, step=step):
      row = tiny.last_row(workdir)
      return row["time"] > born and row["step"] >= step

    def saving():  # a checkpoint that is being written has a temporary name
      return any(not path.name.isdigit() for path in folder.iterdir())

    if moment == "start":  # anywhere before the steps: imports, reading text, restoring
      time.sleep(rng.uniform(0, start_seconds))
    else:
      assert tiny.wait_until(far_enough, process), log.read_text()[-4000:]
      start_seconds = start_seconds or time.time() - born
      if moment == "save":
        tiny.wait_until(saving, process)
      time.sleep(rng.uniform(0, 0.02))
    process.kill()
    code = tiny.wait(process)
    steps = tiny.steps_on_file(workdir)
    history.append((moment, steps[-1:], "in a save" if folder.is_dir() and saving() else ""))
    assert code == -signal.SIGKILL, (history, "it ended before it was killed")
    assert max(steps, default=0) >= newest, (history, "a checkpoint was lost")
    newest = max(steps, default=0)

  finish(home, workdir, log, changes, **reads)
  with capsys.disabled():
    print(f"\nkilled {KILLS} times in {time.monotonic() - began:.0f} s: {history}")
  assert "Traceback" not in log.read_text()
  assert not (workdir / "checkpoints_damaged").exists(), "a kill must not damage a checkpoint"
  assert list(tiny.losses(workdir)) == list(range(1, 201))
  tiny.assert_same_run(workdir, tmp_path / "whole")
  # The kills were where they should be.
  assert any(where for *_, where in history)
  assert len({steps[0] for _, steps, _ in history if steps}) > 2
