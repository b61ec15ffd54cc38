"""Pods from nothing to their end in a world that is played by fake_cloud.py; commands run for real."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from diffucoder_jax.runtime import metrics
from tests import tiny
from tests.launch import fake_cloud

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machines have /proc")
TRAIN = "python -m diffucoder_jax.train --config=configs/adapt_7b.py --workdir=gs://B/adapt".split()
AUTH = "ERROR: (gcloud.auth) You do not currently have an active account selected."


def test_a_pod_from_nothing_to_its_end(launch):
  (launch.world.folder / "workers").write_text("2")
  code, text = launch("tpu.sh", "status")
  assert code == 0 and "request adapt-7b MISSING" in text
  launch.ready(SLICES="2")
  launch.environment["SLICES"] = "2"
  machines = launch.world.machines("adapt-7b")
  assert [m.name for m in machines] == ["0-0", "0-1", "1-0", "1-1"]
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=launch.checkout, capture_output=True, text=True
  )
  for machine in machines:
    assert (machine / "diffucoder" / "commit").read_text() == commit.stdout
    assert (machine / "diffucoder" / "code" / "diffucoder_jax" / "train.py").exists()
  assert launch.workers() == ["idle"] * 4

  # All or none: a slice that runs alone would wait for the others for ever.
  (launch.world.folder / "unreachable").write_text("adapt-7b-1")
  for words in (["status"], ["setup"], ["run", "true"]):
    code, text = launch("tpu.sh", *words)
    assert code and "exited with return code [255]" in text, words
  assert "not started" in text and "worker.sh start" not in text
  (launch.world.folder / "unreachable").unlink()
  assert launch("tpu.sh", "setup")[0] == 0

  # On all workers, with their environment, in the code's folder, and once at a time.
  command = ("bash", "-c", 'trap "exit 42" TERM; echo "up $DIFFUCODER_MULTIHOST $(cat ../data) $1"; '
             "while true; do sleep 0.05; done", "x", "a b")  # fmt: skip
  code, text = launch("tpu.sh", "run", *command, PREPARE='basename "$PWD" >../data')
  assert code == 0, text
  assert launch.workers() == ["running"] * 4
  code, text = launch("tpu.sh", "run", *command)
  assert code == 1 and "not started: a command is running" in text
  script = machines[0] / "diffucoder" / "code" / "launch" / "worker.sh"  # two at the same time
  second = subprocess.run(["bash", script, "start", "x", "true"], capture_output=True, text=True)
  assert second.returncode == 1 and "a command is running already" in second.stderr
  code, text = launch("tpu.sh", "setup")
  assert code == 1 and "stop it first" in text
  code, text = launch("tpu.sh", "logs", "--node=1", "--worker=1", "--lines=1")
  assert code == 0 and text.splitlines()[-1] == "up 1 code a b"

  code, text = launch("tpu.sh", "stop", "--seconds=20")
  assert code == 0 and text.count("exited code=42") == 4, text
  assert launch.workers() == ["exited code=42"] * 4

  code, text = launch("tpu.sh", "delete", "--yes")
  assert code == 0 and not launch.world.machines("adapt-7b")


def test_every_ending_of_a_command_is_told(launch):
  launch.ready()
  (machine,) = launch.world.machines("adapt-7b")
  # One that does not listen to SIGTERM.
  assert (
    launch("tpu.sh", "run", "bash", "-c", 'trap "" TERM; while true; do sleep 0.05; done')[0] == 0
  )
  code, text = launch("tpu.sh", "stop", "--seconds=0")
  assert "SIGKILL" in text and launch.workers() == ["exited code=137"]

  assert launch("tpu.sh", "run", "true", PREPARE="mount nothing")[0] == 0
  launch.wait_for("exited code=1")
  assert "PREPARE failed" in launch("tpu.sh", "logs")[1]

  # Nothing of a command stays behind; and what ends without a word is called lost.
  assert launch("tpu.sh", "run", "bash", "-c", "sleep 1234 & echo $! >../child; exit 3")[0] == 0
  launch.wait_for("exited code=3")
  child = pathlib.Path("/proc", (machine / "diffucoder" / "child").read_text().strip(), "stat")
  end = time.monotonic() + 5
  while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
    assert time.monotonic() < end
  assert launch("tpu.sh", "run", "sleep", "1234")[0] == 0
  fake_cloud.kill(machine, signal.SIGKILL)
  assert launch.workers() == ["lost"]
  (machine / "diffucoder" / "run" / "pid").write_text(str(os.getpid()))  # its number was given away
  assert launch.workers() == ["lost"]


def test_an_ending_at_the_moment_of_the_look_is_not_lost(launch, tmp_path):
  launch.ready()
  (machine,) = launch.world.machines("adapt-7b")
  script = machine / "diffucoder" / "code" / "launch" / "worker.sh"
  (tmp_path / "slow").mkdir()  # a machine on which looking and noting take their time
  for name, seconds in (("cat", 0.05), ("date", 0.2)):
    slowly = f'sleep {seconds}; exec {shutil.which(name)} "$@"'
    fake_cloud.script(tmp_path / "slow" / name, slowly)
  environment = {**os.environ, "PATH": f"{tmp_path / 'slow'}:{os.environ['PATH']}"}
  call = lambda *words: subprocess.Popen(  # noqa: E731
    ["bash", script, *words], stdout=subprocess.PIPE, text=True, env=environment
  )
  assert call("start", "x", "sleep", "0.5").wait() == 0
  looks = []
  for _ in range(40):
    looks.append(call("status"))
    time.sleep(0.02)
  said = [look.communicate()[0] for look in looks]
  assert all(" exited code=0 " in line or " running " in line for line in said), said
  assert " exited code=0 " in said[-1]


def test_what_gcloud_says_is_shown(launch):
  (launch.world.folder / "error").write_text(AUTH)
  for words in (["tpu.sh", "create"], ["tpu.sh", "status"], ["babysit.sh", "true"]):
    code, text = launch(*words)
    assert code == 1 and AUTH in text, text
  assert len(launch.world.calls()) == 3, "asked again and again"


def test_a_request_that_fails_is_explained(launch):
  (launch.world.folder / "states").write_text("ACCEPTED FAILED")
  code, text = launch("tpu.sh", "create", "--wait")
  assert code == 1 and "is ACCEPTED" in text and "Quota 'TPUS_PER_PROJECT' exceeded" in text
  code, text = launch("babysit.sh", "--failures=2", "true")
  assert code == 1 and "failure 2 of 2" in text and "Quota" in text and "giving up" in text


def test_setup_without_a_network_says_so(launch):
  assert launch("tpu.sh", "create", "--wait")[0] == 0
  (launch.world.folder / "no_network").write_text("")
  code, text = launch("tpu.sh", "setup")
  assert code == 1 and "is there a network?" in text
  code, text = launch("tpu.sh", "run", "true")
  assert (
    "is there a network" not in text
  )  # it has the code; what was not installed shows in the log


def test_the_babysitter_starts_again_what_saved_itself(launch):
  count = 'n=$(cat ../n 2>/dev/null || echo 0); echo $((n + 1)) >../n; echo "try $n"; '
  code, text = launch(
    "babysit.sh", "--delete-when-done", "bash", "-c", count + '[ "$n" -ge 2 ] || exit 42'
  )
  assert (
    code == 0 and text.count("saved itself; starting it again") == 2 and "failure" not in text
  ), text
  assert "done: the command ended with exit code 0" in text and not launch.world.request("adapt-7b")


@pytest.mark.slow
def test_the_babysitter_gives_up_and_shows_the_log_of_the_first_to_fail(launch):
  (launch.world.folder / "workers").write_text("2")
  command = 'case $(hostname) in *-1) echo "no such weights"; exit 1 ;; esac; '
  command += "sleep 1.2; echo abort; exit 134"
  code, text = launch("babysit.sh", "--failures=2", "bash", "-c", command)
  assert code == 3, text
  assert "failure 1 of 2" in text and "failure 2 of 2" in text and "giving up" in text
  end = text.split("failure 2 of 2")[1]
  assert "\nno such weights\n" in end and "\nabort\n" not in end
  assert launch.world.request("adapt-7b"), "the pod was deleted"
  # Failures that are long past do not count.
  command = "n=$(cat ../n 2>/dev/null || echo 0); echo $((n + 1)) >../n; sleep 0.7; exit $((n < 2))"
  code, text = launch("babysit.sh", "--failures=2", "--window=1", "bash", "-c", command)
  assert code == 0 and text.count("failure 1 of 2") == 2, text


@pytest.mark.slow
def test_the_babysitter_watches_what_runs_and_minds_other_commands(launch):
  launch.ready()
  command = ["bash", "-c", "while [ ! -e ../stop ]; do sleep 0.05; done"]
  assert launch("tpu.sh", "run", *command)[0] == 0
  code, text = launch("babysit.sh", "true")
  assert code == 1 and "another command runs on adapt-7b" in text
  process = launch.start("babysit.sh", *command)
  (machine,) = launch.world.machines("adapt-7b")
  time.sleep(1)
  (machine / "diffucoder" / "stop").write_text("")
  text = process.communicate(timeout=30)[0]
  assert process.returncode == 0 and "worker.sh start" not in text, text
  # Done is done, for this command and not for another.
  code, text = launch("babysit.sh", *command)
  assert code == 0 and "done: " in text and "starting" not in text
  code, text = launch("babysit.sh", "bash", "-c", "echo other")
  assert code == 0 and "worker.sh start" in text


@pytest.mark.slow
def test_a_machine_that_was_replaced_is_no_failure(launch, tmp_path):
  process = launch.start("babysit.sh", "bash", "-c", f"[ -e {tmp_path}/new ] || sleep 1234")
  launch.wait_for("running")
  (machine,) = launch.world.machines("adapt-7b")
  (tmp_path / "new").write_text("")
  fake_cloud.kill(machine, signal.SIGKILL)
  (machine / "diffucoder").rename(machine / "gone")  # at once, as a new machine comes
  text = process.communicate(timeout=60)[0]
  assert process.returncode == 0 and "is a new one; starting" in text, text
  assert text.count("worker.sh start") == 2


@pytest.mark.slow
def test_workers_that_hang_when_others_ended_are_stopped(launch):
  (launch.world.folder / "workers").write_text("2")
  command = (
    "[ ! -e ../n ] || exit 0; touch ../n; case $(hostname) in *-1) exit 1 ;; esac; sleep 1234"
  )
  code, text = launch("babysit.sh", "bash", "-c", command, STRAGGLER_SECONDS="1")
  assert code == 0 and "only 1 of 2 workers run" in text and "failure 1 of 5" in text, text


def test_workloads_of_xpk(launch):
  code, text = launch("xpk.sh", "create", *TRAIN)
  assert code == 0, text
  path = launch.world.folder / "workloads" / "adapt-7b"
  assert path.read_text() == f"QUEUED\nexec bash launch/worker.sh exec {' '.join(TRAIN)}\n"
  code, text = launch("xpk.sh", "create", *TRAIN)
  assert code == 3 and "adapt-7b is QUEUED already" in text
  path.write_text("FAILED\nx\n")
  (path.parent / "adapt-7b-2").write_text("RUNNING\nx\n")  # a longer name is another
  code, text = launch("xpk.sh", "create", *TRAIN)
  assert code == 0 and path.read_text().startswith("QUEUED"), text
  code, text = launch("xpk.sh", "list")
  assert code == 0 and "QUEUED" in text and "adapt-7b-2" not in text
  code, text = launch("xpk.sh", "delete", "--yes")
  assert code == 0 and not path.exists()
  (launch.world.folder / "error").write_text("[XPK] no credentials")
  code, text = launch("xpk.sh", "create", *TRAIN)
  assert code == 1 and "no credentials" in text


def test_a_container_becomes_the_program(launch):
  """As xpk runs it: no shell between the signal and the program; see Dockerfile."""
  command = "import os, sys; print(os.getpid(), os.environ['DIFFUCODER_MULTIHOST'], sys.argv[1:])"
  process = launch.start(
    "worker.sh", "exec", sys.executable, "-c", command, "a b", JAX_PLATFORMS="cpu"
  )
  text = process.communicate(timeout=60)[0]
  assert text.split(maxsplit=1) == [str(process.pid), "1 ['a b']\n"]


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_flags_of_libtpu_come_from_the_package_where_it_has_them(launch, tmp_path, platform):
  """`diffucoder_jax.runtime.flags` prints NAME=VALUE lines, quoted for a shell or not."""
  code = tmp_path / "code"
  (code / "launch").mkdir(parents=True)
  shutil.copy(tiny.ROOT / "launch" / "worker.sh", code / "launch")
  package = code / "diffucoder_jax" / "runtime"
  package.mkdir(parents=True)
  for path in (package.parent / "__init__.py", package / "__init__.py"):
    path.write_text("")
  fake_cloud.script(tmp_path / "bin" / "python", f'exec "{sys.executable}" "$@"')
  show = "import os; print(os.environ.get('LIBTPU_INIT_ARGS'), os.environ.get('XLA_FLAGS'))"
  command = ["bash", code / "launch" / "worker.sh", "exec", "python", "-c", show]
  environment = {**launch.environment, "JAX_PLATFORMS": platform}
  run = lambda: subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: E731
  assert run().stdout == "None None\n"
  lines = "export LIBTPU_INIT_ARGS='--a=1 --b=2'\nXLA_FLAGS=--c --d"
  (package / "flags.py").write_text(f'print("""{lines}""")')
  wanted = "--a=1 --b=2 --c --d\n" if platform == "tpu" else "None None\n"
  assert run().stdout.splitlines(keepends=True)[-1] == wanted


# --- A real training run.


@pytest.mark.slow
def test_a_preempted_run_is_made_again_and_resumes(launch, home, tmp_path):
  """create, run, preempted with SIGKILL, made again, saved by SIGTERM (42), resumed, done."""
  workdir = tmp_path / "work"
  changes = {"optim.steps": 100, "checkpoint.every": 4, "eval.every": 100, "eval.rows": 8}
  words = ["python", "-m", "diffucoder_jax.train", *tiny.flags(home, workdir, None, changes)]
  launch.run_jax()
  log = tmp_path / "babysit.log"
  said = lambda: log.read_text()[-6000:]  # noqa: E731
  with open(log, "w") as out:
    process = launch.start("babysit.sh", "--delete-when-done", *words, log=out)

  saved = lambda: 4 in tiny.steps_on_file(workdir)  # noqa: E731
  assert tiny.wait_until(saved, process, 300), said()
  launch.world.preempt("adapt-7b")
  killed = tiny.last_row(workdir)["step"]
  times = lambda: [row["time"] for row in metrics.read(workdir) if row["step"] <= 4]  # noqa: E731
  before = times()
  assert 4 <= killed < 90 and not launch.world.machines("adapt-7b")

  further = lambda: tiny.last_row(workdir)["step"] > killed  # noqa: E731
  assert tiny.wait_until(further, process, 300), said()
  (machine,) = launch.world.machines("adapt-7b")
  fake_cloud.kill(machine, signal.SIGTERM)  # all processes, as a machine that shuts down does it
  assert tiny.wait(process, 300) == 0, said()
  text = log.read_text()
  assert "SUSPENDED" in text and text.count("queued-resources create") == 2
  assert text.count("worker.sh start") == 3 and "saved itself; starting it again" in text
  assert times() == before, "the run began anew"
  assert "failure" not in text and "done: " in text and not launch.world.request("adapt-7b")
  assert (
    list(tiny.losses(workdir)) == list(range(1, 101)) and tiny.steps_on_file(workdir)[-1] == 100
  )
