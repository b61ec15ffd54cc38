"""No attack of `escapes` escapes and none of `forgeries` scores, at each level that this machine has."""

import os
import socket

import pytest

from diffucoder_jax.execution.sandbox import Job, Limits
from tests.execution.escapes import ESCAPES, HONEST, contain_job
from tests.execution.forgeries import FORGERIES, HEAVY, PATIENT


@pytest.fixture
def bait(public_folder):
  """What attacks look for, on the host; at the end nothing of it has been touched."""
  (public_folder / "secret").write_text("secret")
  listeners = {name: socket.socket(socket.AF_UNIX) for name in ("unix", "abstract")}
  listeners["tcp"] = socket.create_server(("127.0.0.1", 0))
  datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
  datagrams.bind(listeners["tcp"].getsockname())
  abstract = f"diffucoder-{os.getpid()}"
  listeners["unix"].bind(str(public_folder / "unix"))
  listeners["abstract"].bind("\0" + abstract)
  os.environ["DIFFUCODER_TEST_TOKEN"] = "token"
  for each in listeners.values():
    each.listen()
    each.setblocking(False)
  yield {
    "folder": str(public_folder),
    "port": listeners["tcp"].getsockname()[1],
    "unix": str(public_folder / "unix"),
    "abstract": abstract,
    "pid": os.getpid(),
    "variable": "DIFFUCODER_TEST_TOKEN",
  }
  del os.environ["DIFFUCODER_TEST_TOKEN"]
  for name, each in listeners.items():
    with pytest.raises(BlockingIOError):
      each.accept()
      pytest.fail(f"somebody connected to {name}")
    each.close()
  datagrams.setblocking(False)
  with pytest.raises(BlockingIOError):
    datagrams.recv(1)
  datagrams.close()
  assert sorted(os.listdir(public_folder)) == ["secret", "unix"]
  assert (public_folder / "secret").read_text() == "secret"


def test_no_attack_escapes(box, bait):
  outcomes = box.run([contain_job(body, bait) for body in ESCAPES.values()])
  bad = [
    (name, outcome.status, outcome.message)
    for name, outcome in zip(ESCAPES, outcomes, strict=True)
    if outcome.status != "pass"
  ]
  assert not bad


def test_no_test_escapes(box, bait):
  """Tests are confined like answers: nobody has read all of a dataset's."""
  about_tests = ("tests among objects", "tests in frames", "tests in the heap", "other descriptors")
  names = [name for name in ESCAPES if name not in about_tests]
  jobs = []
  for name in names:
    lines = "".join(f"    {line}\n" for line in ESCAPES[name].splitlines())
    test = f"bait = {bait!r}\ndef attack():\n  try:\n{lines}"
    test += "  except (OSError, RuntimeError, MemoryError): return\n  assert False\nattack()"
    jobs.append(Job("def solve(): pass", "solve", (test,)))
  for name, outcome in zip(names, box.run(jobs), strict=True):
    assert outcome.status == "pass", (name, outcome)


def test_no_attack_scores(box):
  jobs = [Job(code, "solve", HONEST.tests) for code in FORGERIES.values()]
  outcomes = box.run([*jobs, HONEST])
  for name, outcome in zip(FORGERIES, outcomes, strict=False):
    assert "pass" not in outcome.tests, name
    if name != "a full disk":  # masked, as a failure of the sandbox's, where there is a disk
      assert outcome.status in ("fail", "error", "oom", "killed", "timeout"), (name, outcome)
  assert outcomes[-1].status == "pass"


LOOPS = {  # tests that an answer could slip through in one process, by what it raises or returns
  "for x in map(f, [1, 2]): assert x == 0": "raise StopIteration",
  "for x, y in zip(map(f, [1]), [2]): assert x == y": "raise StopIteration",
  "assert not [0 for x in map(f, [1]) if x != 2] == []": "raise StopIteration",
  "try: f(1)\nexcept Exception: pass\nelse: assert False": "raise SystemExit",
  "try: f(1)\nexcept: pass": "import os; os._exit(0)",
  "assert f(1).same(2)": "n = Node(); n.same = bool; return n",
  "assert f(1).same(3)": "Node.same = lambda *a: True; return Node()",
  "assert f(1)(2) is True": "return bool",
  "assert f(1)": "return type('X', (), {})()",
  "x = [2]\nf(x)\nassert x.pop() == 3": "x.pop = lambda: 3",
  "assert f([1]).pop() == 3": "return type('X', (list,), {'pop': lambda s: 3})()",
}


def test_no_answer_slips_through_the_way_a_test_is_written(box):
  prelude = "class Node:\n  def same(self, other): return False\n"
  jobs = [
    Job(f"def f(x):\n  {body}", "f", (test,), prelude=prelude) for test, body in LOOPS.items()
  ]
  for job, outcome in zip(jobs, box.run(jobs), strict=True):
    assert outcome.status in ("fail", "error", "killed"), (job, outcome)


def test_an_answer_leaves_nothing_to_the_next(box):
  """Files, threads, modules and patches of one job are gone in the next, on the same fork server."""
  leave = (
    "import builtins, math, threading, time\nbuiltins.left = math.left = 1\n"
    "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
    "try: open('/tmp/left', 'w').write('x')\nexcept OSError: pass\ndef solve(): return 1"
  )
  look = (
    "import builtins, math, os, threading\ndef solve():\n"
    "  there = os.path.exists('/tmp') and os.access('/tmp/left', os.F_OK)\n"
    "  return [hasattr(builtins, 'left'), hasattr(math, 'left'), there, threading.active_count()]"
  )
  tests = ("assert solve() == 1",), ("assert solve() == [False, False, False, 1]",)
  outcomes = box.run([Job(leave, "solve", tests[0]), Job(look, "solve", tests[1])] * 2)
  assert [outcome.status for outcome in outcomes] == ["pass"] * 4, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("level", ["full", "no-userns"])
def test_no_attack_outlasts_its_limits(level, sandbox_or_skip):
  limits = Limits(cpu_seconds=1, wall_seconds=4, job_seconds=12)
  with sandbox_or_skip(workers=2, limits=limits, level=level) as box:
    jobs = [Job(code, "solve", HONEST.tests) for code in PATIENT.values()]
    jobs += [Job(code, "solve", HONEST.tests) for code in HEAVY.values()]
    outcomes = box.run([*jobs, HONEST])
  for name, outcome in zip(PATIENT, outcomes, strict=False):
    assert outcome.status == "timeout", (name, outcome)
  for name, outcome in zip(HEAVY, outcomes[len(PATIENT) :], strict=False):
    assert outcome.status in ("fail", "oom", "killed", "timeout"), (name, outcome)
  assert outcomes[-1].status == "pass"
