"""Two processes of four devices each train as one process of eight does."""

import pathlib

import pytest

from tests import tiny

pytestmark = pytest.mark.slow


def changes(mesh, **more):
  sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
  return {**sizes, "objective.anneal_steps": 6, **more}


def start_two(home, workdir, folder, *settings):
  """Starts process 0 and 1 of one run; `settings` are one or two dicts. Returns (process, log)s."""
  port = tiny.free_port()
  started = []
  for i in range(2):
    cluster = {
      "DIFFUCODER_MULTIHOST": "1", "DIFFUCODER_COORDINATOR": f"127.0.0.1:{port}",
      "DIFFUCODER_PROCESSES": "2", "DIFFUCODER_PROCESS": str(i),
    }  # fmt: skip
    arguments = tiny.flags(home, workdir, None, settings[i % len(settings)])
    log = folder / f"{workdir.name}-{i}.log"
    started.append((tiny.start("train", arguments, log, devices=4, **cluster), log))
  return started


def wait_for_both(started, seconds=400):
  """Returns [(exit code, everything it printed)]; leaves no process behind."""
  try:
    codes = [process.wait(timeout=seconds) for process, _ in started]
  finally:
    for process, _ in started:
      process.kill()
  return list(zip(codes, [pathlib.Path(log).read_text() for _, log in started], strict=True))


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)])
def test_two_processes_are_one(home, tmp_path, mesh):
  one, two = tmp_path / "one", tmp_path / "two"
  done = tiny.run("train", tiny.flags(home, one, None, changes(mesh)), devices=8)
  assert done.returncode == 0, done.stderr[-4000:]
  ended = wait_for_both(start_two(home, two, tmp_path, changes(mesh)))
  assert [code for code, _ in ended] == [0, 0], "\n".join(text[-4000:] for _, text in ended)
  for text in (done.stderr, *(text for _, text in ended)):
    assert "nvoluntary full rematerialization" not in text
  assert "2 process(es)" in ended[0][1] and "step 12/12" in ended[0][1]
  assert "step 12/12" not in ended[1][1]  # only the first reports

  assert [row.keys() for row in tiny.rows(two)] == [row.keys() for row in tiny.rows(one)]
  for row, wanted in zip(tiny.rows(two), tiny.rows(one), strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)
  assert tiny.steps_on_file(two) == tiny.steps_on_file(one) == [4, 8, 12]

  # One process goes on from what two have written, and the other way round.
  for workdir in (one, two):
    for step in (8, 12):
      tiny.remove_checkpoint(workdir, step)
  done = tiny.run("train", tiny.flags(home, two, None, changes(mesh)), devices=8)
  assert done.returncode == 0, done.stderr[-4000:]
  assert "continuing from checkpoint" in done.stderr
  ended = wait_for_both(start_two(home, one, tmp_path, changes(mesh)))
  assert [code for code, _ in ended] == [0, 0], "\n".join(text[-4000:] for _, text in ended)
  assert "continuing from checkpoint" in ended[0][1]
  for workdir in (one, two):
    assert list(tiny.losses(workdir)) == list(range(1, 13))
  for row, wanted in zip(tiny.rows(two), tiny.rows(one), strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)


def test_processes_with_different_configs_are_refused(home, tmp_path):
  settings = changes((2, 2, 2)), changes((2, 2, 2), seed=1)
  ended = wait_for_both(start_two(home, tmp_path / "run", tmp_path, *settings))
  for code, text in ended:
    assert code not in (0, 42)
    assert "processes disagree about the config" in text, text[-4000:]
  assert not (tmp_path / "run").exists()
