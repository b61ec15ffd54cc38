"""Other machines: an ordinary user, a container without namespaces, a kernel without Landlock.

A copy of the checkout is tested by uid 65534 with an interpreter that such a user can reach; the
container is a seccomp filter that refuses what Docker's refuses.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import diffucoder_jax

pytestmark = pytest.mark.slow

NOBODY = 65534
ROOT = pathlib.Path(diffucoder_jax.__file__).parents[1]


def as_nobody(command, **arguments):
  return subprocess.run(
    command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, **arguments
  )


@pytest.fixture
def python():
  """An interpreter that anybody may start: this one, or the system's if ours lies below /root."""
  if os.getuid() != 0:
    pytest.skip("only root can become an ordinary user; this run is one already")
  tried = (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")
  for path in filter(os.path.exists, tried):
    try:
      if as_nobody([path, "-c", "import sys; assert sys.version_info >= (3, 11)"]).returncode == 0:
        return path
    except PermissionError:
      pass
  pytest.skip(f"uid {NOBODY} can start none of {tried}")


PROGRAM = """
import os, pathlib, sys
from diffucoder_jax.execution.sandbox import Job, Sandbox, SandboxUnavailable
from tests.execution.escapes import ESCAPES, HONEST, contain_job
from tests.execution.forgeries import FORGERIES

assert os.getuid() == 65534
folder = pathlib.Path(sys.argv[1])
(folder / "secret").write_text("secret")
bait = dict(folder=str(folder), port=9, unix="/x", abstract="x", pid=os.getpid(), variable="HOME")
for level in ("full", "no-userns"):
  try:
    box = Sandbox(workers=1, level=level)
  except SandboxUnavailable as error:
    print("skipped", level, error)
    continue
  with box:
    jobs = [contain_job(body, bait) for body in ESCAPES.values()]
    for name, outcome in zip(ESCAPES, box.run(jobs), strict=True):
      assert outcome.status == "pass", (level, name, outcome)
    jobs = [Job(code, "solve", HONEST.tests) for code in FORGERIES.values()]
    for name, outcome in zip(FORGERIES, box.run(jobs), strict=True):
      assert "pass" not in outcome.tests, (level, name, outcome)
    assert box.run([HONEST])[0].status == "pass"
    assert os.listdir(folder) == ["secret"]
    print("held", level, len(ESCAPES), len(FORGERIES))
"""


def test_no_attack_succeeds_for_an_ordinary_user(python, public_folder):
  project = public_folder / "project"
  for part in ("diffucoder_jax/execution", "tests/execution"):
    shutil.copytree(ROOT / part, project / part)
  shutil.copy(ROOT / "diffucoder_jax" / "__init__.py", project / "diffucoder_jax")
  bait = public_folder / "bait"
  bait.mkdir()
  os.chown(bait, NOBODY, NOBODY)
  environment = {"PYTHONPATH": str(project), "HOME": "/", "PATH": "/usr/bin:/bin"}
  done = as_nobody([python, "-c", PROGRAM, str(bait)], env=environment, cwd="/")
  assert done.returncode == 0, done.stderr[-3000:]
  print(done.stdout)
  assert "held" in done.stdout, done.stdout


CONTAINER = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
op = lambda code, value, yes=0, no=0: struct.pack("HBBI", code, yes, no, value)
numbers = {"x86_64": {"unshare": 272, "setns": 308, "mount": 165, "landlock": 444},
           "aarch64": {"unshare": 97, "setns": 268, "mount": 40, "landlock": 444}}[os.uname().machine]
program = op(0x20, 0)
for name in sys.argv[1].split(","):  # EPERM, and ENOSYS for what the kernel is to lack
  error = 38 if name == "landlock" else 1
  program += op(0x15, numbers[name], 0, 1) + op(0x06, 0x50000 | error)
program += op(0x06, 0x7FFF0000)
text = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
  _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
filter_ = Program(len(program) // 8, ctypes.cast(text, ctypes.c_void_p))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(filter_), 0, 0) == 0
from diffucoder_jax.execution.sandbox import *
try:
  with Sandbox(workers=1, level=sys.argv[2]) as box:
    (outcome,) = box.run([Job("def f(x): return x", "f", ("assert f(1) == 1", "assert f(1) == 2"))])
    print(outcome.level, *outcome.tests)
except SandboxUnavailable as error:
  print("refused:", error)
"""


@pytest.mark.parametrize(
  "denied, level, told",
  [
    ("unshare,setns,mount", "auto", "no-userns pass fail"),
    ("mount", "auto", "no-userns pass fail"),  # Ubuntu 24.04 refuses only what follows unshare
    ("unshare,setns,mount", "full", "refused: .*full: .*unshare: Operation not permitted"),
    ("landlock", "auto", "full pass fail"),
    ("landlock", "no-userns", "refused: .*lacks Landlock"),
    ("landlock,unshare", "auto", "refused: .*unshare.*lacks Landlock.*allow_unsafe=True"),
  ],
)
def test_what_a_machine_lacks_decides_the_level(denied, level, told, sandbox_or_skip):
  for each in ("full", "no-userns"):
    sandbox_or_skip(workers=1, level=each).close()
  command = [sys.executable, "-c", CONTAINER, denied, level]
  environment = {k: v for k, v in os.environ.items() if not k.startswith("DIFFUCODER_ALLOW")}
  done = subprocess.run(
    command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}
  )
  assert re.match(told, done.stdout), (done.stdout, done.stderr)
  if told.startswith("no-userns"):  # a warning of one line
    assert done.stderr.count("\n") == 1 and "no namespaces" in done.stderr
