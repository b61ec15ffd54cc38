import os
import pathlib
import subprocess
import sys
import time

import pytest

from diffucoder_jax.data import workers


def double(context, piece):
  if piece == "die":
    os._exit(3)
  if piece == "raise":
    raise ValueError(f"{context} cannot do {piece}")
  return context + 2 * piece


@pytest.mark.parametrize("count", [1, 2])
def test_all_pieces_once(count):
  with workers.Workers(100, count) as pool:
    assert sorted(pool.run(double, iter(range(20)))) == list(range(100, 140, 2))
    assert list(pool.run(double, [])) == []
    with pytest.raises(ValueError, match="100 cannot do raise"):
      list(pool.run(double, ["raise"]))
    assert list(pool.run(double, [1])) == [102], "a failure is not the end of the others"


def test_a_worker_that_dies_is_named():
  with (
    workers.Workers(0, 2) as pool,
    pytest.raises(RuntimeError, match="a worker process died.*run the same command again"),
  ):
    list(pool.run(double, [1, "die", 2]))


SLEEPERS = """
import os, pathlib, time
from diffucoder_jax.data import workers

def sleep(folder, piece):
  (pathlib.Path(folder) / str(os.getpid())).touch()
  time.sleep(600)

if __name__ == "__main__":
  with workers.Workers(os.environ["FOLDER"], 2) as pool:
    list(pool.run(sleep, range(4)))
"""


def test_no_worker_outlives_a_killed_parent(tmp_path):
  (tmp_path / "sleepers.py").write_text(SLEEPERS)
  pids = tmp_path / "pids"
  pids.mkdir()
  root = pathlib.Path(workers.__file__).parents[2]
  path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
  environment = {**os.environ, "FOLDER": str(pids), "PYTHONPATH": path}
  parent = subprocess.Popen([sys.executable, str(tmp_path / "sleepers.py")], env=environment)
  end = time.monotonic() + 60
  while len(list(pids.iterdir())) < 2:
    assert parent.poll() is None and time.monotonic() < end
    time.sleep(0.05)
  parent.kill()
  parent.wait()
  while alive := [file.name for file in pids.iterdir() if _runs(file.name)]:
    assert time.monotonic() < end, alive
    time.sleep(0.05)


def _runs(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
  except FileNotFoundError:
    return False
