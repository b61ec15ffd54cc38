"""A checkout, and the launch scripts in it against a world that is played by fake_cloud.py."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import time

import pytest

from tests import tiny
from tests.launch import fake_cloud

SETTINGS = {
  "PROJECT": "my-project", "ZONE": "us-east5-a", "NAME": "adapt-7b", "ACCELERATOR_TYPE": "v5p-64",
  "CLUSTER": "my-cluster", "IMAGE": "us-east5-docker.pkg.dev/my-project/images/diffucoder:1",
}  # fmt: skip


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
  """A git repository of the files as they are now, committed: what setup ships."""
  folder = tmp_path_factory.mktemp("checkout")
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "launch", "configs",
     "diffucoder_jax", "setup.py", "README.md", ".gitignore"],
    cwd=tiny.ROOT, capture_output=True, text=True)  # fmt: skip
  if listed.returncode:
    pytest.skip(f"git does not know this folder: {listed.stderr.strip()}")
  for name in listed.stdout.splitlines():
    if (tiny.ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(tiny.ROOT / name, folder / name)
  git = [
    "git",
    "-c",
    "user.name=t",
    "-c",
    "user.email=t@example.com",
    "-c",
    "init.defaultBranch=main",
  ]
  for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all", "--no-verify"]):
    subprocess.run([*git, *words], cwd=folder, check=True)
  return folder


class Launch:
  """Runs scripts of a checkout against a `World`."""

  def __init__(self, checkout, folder):
    self.checkout, self.world = checkout, fake_cloud.World(folder / "world")
    (folder / "bin").mkdir()
    for name in ("gcloud", "xpk"):
      fake_cloud.script(
        folder / "bin" / name,
        f'exec {fake_cloud.PYTHON} "{pathlib.Path(fake_cloud.__file__)}" {name} "$@"',
      )
    self.environment = {
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder),
      "FAKE_CLOUD": str(self.world.folder), "POLL_SECONDS": "0.05", **SETTINGS,
    }  # fmt: skip

  def start(self, script, *words, log=subprocess.PIPE, **settings):
    return subprocess.Popen(
      ["bash", f"launch/{script}", *map(str, words)], cwd=self.checkout, stdin=subprocess.DEVNULL,
      env={**self.environment, **settings}, stdout=log, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

  def __call__(self, script, *words, **settings):
    """(exit code, all that it printed)."""
    process = self.start(script, *words, **settings)
    try:
      text = process.communicate(timeout=60)[0]
    finally:
      process.kill()
    return process.returncode, text

  def run_jax(self):
    """Gives the machines what a JAX program needs on this one, as one process of one."""
    environment = {
      "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "NPROC": "4", "DIFFUCODER_PROCESSES": "1",
      "DIFFUCODER_PROCESS": "0", "DIFFUCODER_COORDINATOR": f"localhost:{tiny.free_port()}",
      "JAX_COMPILATION_CACHE_DIR": str(self.world.folder / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }  # fmt: skip
    (self.world.folder / "environment.json").write_text(json.dumps(environment))

  def ready(self, **settings):
    """A pod that is there, with the code."""
    for words in (["create", "--wait"], ["setup"]):
      code, text = self("tpu.sh", *words, **settings)
      assert code == 0, text

  def workers(self):
    """The states of the workers, as status says."""
    text = self("tpu.sh", "status")[1]
    return re.findall(r"^worker \S+ (\w+(?: code=\d+)?)", text, re.M)

  def wait_for(self, *states):
    end = time.monotonic() + 20
    while self.workers() != list(states):
      assert time.monotonic() < end, self("tpu.sh", "status")[1]


@pytest.fixture
def launch(checkout, tmp_path):
  made = Launch(checkout, tmp_path)
  yield made
  for folder in (made.world.folder / "machines").iterdir():
    made.world.destroy(folder.name)
