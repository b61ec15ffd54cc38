"""What a sandbox reports: statuses, per-test limits, failures of the machinery, and its own care."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffucoder_jax.execution.sandbox import Job, Limits, Sandbox, SandboxUnavailable

LIMITS = Limits(cpu_seconds=0.5, wall_seconds=20, job_seconds=40, output_bytes=1 << 20)


@pytest.fixture(scope="module")
def quick(sandbox_or_skip):
  """Two fork servers with tight limits."""
  with sandbox_or_skip(workers=2, limits=LIMITS) as box:
    yield box


def solve(body, *tests, **fields):
  lines = "".join(f"  {line}\n" for line in body.splitlines())
  return Job(f"def f(x):\n{lines}", "f", tests, **fields)


def test_each_test_has_its_own_verdict_and_limits(quick):
  """One job, and every way to fail: no test costs another its credit."""
  body = """
import os, time
if x == 'loop':
  while True: pass
if x == 'exit': os._exit(0)
if x == 'memory': return bytearray(1 << 31)
if x == 'raise': raise KeyError(x)
if x == 'output': return 'x' * (2 << 20)
if x == 'segfault': __import__('ctypes').string_at(0)
return x"""
  names = (
    "a",
    "loop",
    "b",
    "exit",
    "c",
    "memory",
    "d",
    "raise",
    "wrong",
    "output",
    "segfault",
    "e",
  )
  tests = [f"assert f({name!r}) == {name!r}" for name in names]
  tests[8] = "assert f('wrong') == 'right', 'the message'"
  (outcome,) = quick.run([solve(body, *tests)])
  assert outcome.tests == (
    "pass", "timeout", "pass", "killed", "pass", "oom", "pass", "error", "fail", "killed", "killed",
    "pass",
  )  # fmt: skip
  assert outcome.status == "timeout" and "0.5 s of processor time" in outcome.message
  assert outcome.integrity == "isolated" and outcome.level == quick.level
  assert outcome.cpu_seconds > 0.5


@pytest.mark.slow
def test_clocks_start_again_with_each_test(quick):
  body = "import time\nt = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
  (outcome,) = quick.run([solve(body, *["f(1)"] * 3)])
  assert outcome.tests == ("pass",) * 3, outcome


def test_what_an_earlier_test_left_behind_is_not_charged_to_the_next(quick):
  body = """
import math, mmap
math.hoard = getattr(math, 'hoard', [])
math.hoard.append(mmap.mmap(-1, 700 << 20))"""
  (outcome,) = quick.run([solve(body, *["f(1)"] * 3)])
  assert outcome.tests == ("pass",) * 3


def test_a_job_has_a_limit_of_its_own(sandbox_or_skip):
  limits = Limits(wall_seconds=0.4, job_seconds=0.9)
  with sandbox_or_skip(workers=1, limits=limits) as box:
    tests = ("f(0)", *["f(99)"] * 3, "f(0)")
    (outcome,) = box.run([solve("__import__('time').sleep(x)", *tests)])
    assert outcome.tests == ("pass", *["timeout"] * 4)  # the last comes too late


def test_messages_name_the_failure(quick):
  jobs = [
    solve("return x", "assert f(1) == 2, 'one is not two'"),
    solve("return y", "f(1)"),
    Job("def f(x:", "f", ("f(1)",)),
    Job("1 / 0", "f", ("f(1)",)),
    Job("g = 1", "f", ("f(1)",)),
    solve("return x", "f(lambda: 1)"),
    solve("return x", "f(1)", prelude="import nothing_of_this_name"),
    solve(r"raise ValueError('\x1b[31m\ud800\n' + 'x' * 10**6)", "f(1)"),
  ]
  messages = [outcome.message for outcome in quick.run(jobs)]
  parts = ["one is not two", "NameError", "SyntaxError", "ZeroDivisionError", "'f' is not defined"]
  parts += ["integrity='shared'", "nothing_of_this_name", "ValueError:  [31m  x"]
  assert all(part in message for part, message in zip(parts, messages, strict=True)), messages
  assert all(message.isprintable() and len(message) < 500 for message in messages)
  assert {outcome.status for outcome in quick.run(jobs[1:])} == {"error"}


FORGED = """
from diffucoder_jax.execution import wire
def f(x):
  send = wire.send
  wire.send = lambda fd, message: send(fd, message | {'value': None, 'error': CLAIM})
"""
FORGED_LOAD = """
from diffucoder_jax.execution import wire
send = wire.send
wire.send = lambda fd, message: send(fd, {'load': CLAIM})
"""
RAISED = """
class Odd(Exception): errno = NUMBER
def f(x): raise Odd('odd')
"""


def test_what_an_answer_says_of_its_exception_is_bounded(quick):
  """Else it chose its own status: cut off as if the judge had failed, it would be masked."""
  claims = (
    ["OSError", "x", 12.0], ["OSError", "x", [12]], ["OSError", "x", {}], ["OSError"], "OSError", 7,
    ["KeyError", "x" * 10**5, None], ["x" * 10**5, "x", None], ["x" * 10**5, "y" * 10**5],
  )  # fmt: skip
  jobs = [
    Job(code.replace("CLAIM", repr(claim)), "f", ("f(1)",))
    for code in (FORGED, FORGED_LOAD)
    for claim in claims
  ]
  numbers = ("object()", "[12]", "12.0", "True", "10 ** 5000", "-(10 ** 5000)", "1 << 64")
  jobs += [Job(RAISED.replace("NUMBER", number), "f", ("f(1)",)) for number in numbers]
  jobs += [
    Job(f"class E(Exception): errno = {number}\nraise E", "f", ("f(1)",)) for number in numbers
  ]
  for job, outcome in zip(jobs, quick.run(jobs), strict=True):
    assert outcome.status == "error" and len(outcome.message) < 500, (job.code[-99:], outcome)
  # What is a number of the right kind counts.
  real = Job(RAISED.replace("NUMBER", "12"), "f", ("f(1)",))
  assert [outcome.status for outcome in quick.run([real])] == ["oom"]


def test_calls_are_like_calls(quick):
  """Keywords, changes in place, identity, exceptions, entry expressions, records of the dataset."""
  prelude = "import math\nclass Node:\n  def __init__(self, v, n=None): self.v, self.n = v, n\n"
  jobs = [
    solve("x.append(len(x))\nreturn x", "a = [1]\nassert f(a) is a and a == [1, 1]"),
    solve("x['k'].add(2)", "a = {'k': {1}}\nb = a['k']\nf(x=a)\nassert b == {1, 2}"),
    solve("x[:] = [1.0]", "a = [1]\nf(a)\nassert type(a[0]) is float"),
    solve("raise ValueError('no')", "try: f(1)\nexcept ValueError as e: assert str(e) == 'no'"),
    solve("x.append(1)\nraise KeyError", "a = []\ntry: f(a)\nexcept KeyError: assert a == [1]"),
    Job(
      "class S:\n  def g(self, self_=0, *, s): return s",
      "S().g",
      ("assert candidate(s=3) == 3", "assert S().g(s=4) == 4"),
    ),
    solve(
      "while x.n: x = x.n\nreturn Node(x.v, x)",
      "b = Node(2)\nr = f(Node(1, b))\nassert type(r) is Node and r.v == 2 and r.n is b",
      prelude=prelude,
    ),
    solve("return math.pi", "assert f(0) == math.pi", prelude=prelude),
    Job("def f(self): return self", "f", ("assert f(self=3) == 3",)),
    solve("import random; return random.random()", f"assert f(0) == {random.Random(0).random()!r}"),
    solve("import sys\nfor g in (sys.stdout, sys.stderr): g.write('x' * (1 << 20))", "f(0)"),
    solve("return x", "y = 1\nassert f(1) == 1", "assert 'y' not in globals()"),
    solve("return x", "assert f(1) == 1 and sys.maxsize and math.pi and re.match('a', 'a')"),
  ]
  outcomes = quick.run(jobs)
  assert [outcome.status for outcome in outcomes] == ["pass"] * len(jobs), outcomes


def test_packages_are_there_when_asked_for(sandbox_or_skip, public_folder, monkeypatch):
  """Also where they lie below /tmp, which a jail has a /tmp of its own in the place of."""
  (public_folder / "offered.py").write_text("VALUE = 42")
  monkeypatch.syspath_prepend(str(public_folder))
  use = "import offered, tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')\n"
  job = solve(f"{use}return offered.VALUE", "import offered; assert f(0) == offered.VALUE")
  with sandbox_or_skip(workers=1, level="full", packages=("offered",)) as box:
    assert [outcome.status for outcome in box.run([job] * 2)] == ["pass"] * 2
  with sandbox_or_skip(workers=1) as box:
    assert "No module named 'offered'" in box.run([job])[0].message
  with pytest.raises(ImportError, match="absent_package"):
    Sandbox(workers=1, packages=("absent_package",))


def test_shared_verdicts_say_so(quick):
  tests = ("assert f(1) == 1", "assert C().g(lambda: 2) == 2", "assert f(1) == 2")
  code = "class C:\n  def g(self, h): return h()\ndef f(x): return x"
  (outcome,) = quick.run([Job(code, "f", tests, integrity="shared")])
  assert outcome.tests == ("pass", "pass", "fail") and outcome.integrity == "shared"
  job = Job("import os\ndef f(x): os._exit(0)", "f", tests, integrity="shared")
  assert quick.run([job])[0].status == "killed"


def test_a_job_needs_tests():
  with pytest.raises(ValueError, match="every answer would pass"):
    Job("x = 1", "x", ())
  with pytest.raises(ValueError, match="tuple"):
    Job("x = 1", "x", "assert x")


def lives(pid):
  try:
    with open(f"/proc/{pid}/stat") as f:
      return f.read().rsplit(")")[-1].split()[0] not in "ZX"  # an orphan waits for init to reap it
  except FileNotFoundError:
    return False


def eventually(holds):
  deadline = time.monotonic() + 20
  while not holds():
    assert time.monotonic() < deadline, "a process that should have ended lives"
    time.sleep(0.01)


def descendants(pid):
  yield pid
  for thread in os.listdir(f"/proc/{pid}/task"):
    with open(f"/proc/{pid}/task/{thread}/children") as f:
      for child in f.read().split():
        yield from descendants(int(child))


@pytest.mark.slow
def test_workers_that_are_killed_cost_nobody_anything(quick):
  """Fork servers, solvers and judges are killed while jobs run: every job still has its verdict."""
  good = solve("import time; time.sleep(0.1)\nreturn x", "assert f(1) == 1", "assert f(2) == 2")
  bad = solve("return 2", "assert f(1) == 1")
  found = []
  thread = threading.Thread(target=lambda: found.extend(quick.run([good, bad] * 5)))
  thread.start()
  for _ in range(4):
    time.sleep(0.12)
    for pid in [p for root in quick.pids for p in descendants(root)][-2:]:
      try:
        os.kill(pid, signal.SIGKILL)
      except ProcessLookupError:
        pass
  thread.join(60)
  assert not thread.is_alive()
  wrong = [o for o in found if o.status not in ("pass", "fail", "infra")]
  assert len(found) == 10 and not wrong, wrong
  # infra is possible after three kills in a row, a wrong verdict is not
  assert {o.status for o in found[::2]} <= {"pass", "infra"}
  assert {o.status for o in found[1::2]} <= {"fail", "infra"}
  assert [o.status for o in quick.run([good, bad])] == ["pass", "fail"]


@pytest.mark.parametrize("which", [0, -1], ids=["fork server", "judge"])
def test_one_failure_is_made_good(which, sandbox_or_skip):
  with sandbox_or_skip(workers=1) as box:
    job = solve("import time; time.sleep(0.3)\nreturn x", "assert f(1) == 1")
    found = []
    thread = threading.Thread(target=lambda: found.extend(box.run([job])))
    (root,) = box.pids
    idle = set(descendants(root))
    thread.start()
    while len(busy := set(descendants(root)) - idle) < 2:
      time.sleep(0.01)
    os.kill(sorted(busy)[which] if which else root, signal.SIGKILL)
    thread.join(60)
    assert [outcome.status for outcome in found] == ["pass"], found
    if root not in box.pids:  # what lived below a fork server has gone with it
      for pid in idle | busy:
        eventually(lambda pid=pid: not lives(pid))


def test_a_full_tmp_is_masked_and_gone_with_the_job(sandbox_or_skip):
  with sandbox_or_skip(workers=1, level="full") as box:
    fill = "with open('/tmp/x', 'wb') as g:\n  while True: g.write(bytes(1 << 20))"
    write = "open('/tmp/y', 'w').write('1')\nreturn open('/tmp/y').read()"
    claim = "raise OSError(28, 'No space left on device')"
    jobs = [solve(fill, "f(1)"), solve(write, "assert f(1) == '1'"), solve(claim, "f(1)")]
    jobs.append(Job(claim, "f", ("f(1)",)))
    assert [outcome.status for outcome in box.run(jobs)] == ["infra", "pass", "error", "error"]


@pytest.mark.parametrize(
  "level, omit, escaped",
  [
    ("full", ("seccomp",), "a namespace"),
    pytest.param("full", ("namespaces",), "the host's files", marks=pytest.mark.slow),
    pytest.param("full", ("rlimits",), "more memory", marks=pytest.mark.slow),
    ("full", ("judge",), "an object equal to everything"),
    pytest.param("no-userns", ("seccomp",), "a process", marks=pytest.mark.slow),
    ("no-userns", ("landlock",), "reading a file"),
  ],
)
def test_the_self_test_refuses_what_is_broken_on_purpose(level, omit, escaped, sandbox_or_skip):
  sandbox_or_skip(workers=1, level=level).close()  # whole, it is accepted
  with pytest.raises(SandboxUnavailable, match=escaped):
    Sandbox(workers=1, level=level, _omit=omit)


def test_no_isolation_is_refused_by_name_unless_allowed(monkeypatch, caplog):
  with pytest.raises(SandboxUnavailable, match="allow_unsafe=True or DIFFUCODER_ALLOW_UNSAFE"):
    Sandbox(workers=1, level="unsafe")
  job = solve("return x", "assert f(1) == 1", "assert f(1) == 2")
  for allowed in (True, False):
    if not allowed:
      monkeypatch.setenv("DIFFUCODER_ALLOW_UNSAFE_EXECUTION", "1")
    with Sandbox(workers=1, level="unsafe", allow_unsafe=allowed) as box:
      left = "import os, time\nif os.fork() == 0:\n  os.setsid(); time.sleep(99)\nreturn x"
      (outcome, _) = box.run([job, solve(left, "f(1)")])
      assert list(descendants(*box.pids)) == list(box.pids)
    assert outcome.level == "unsafe" and outcome.tests == ("pass", "fail")
    assert "UNSAFE" in caplog.text
    caplog.clear()


def test_closing_and_dying_leave_no_process(sandbox_or_skip):
  with sandbox_or_skip(workers=2) as box:
    pids = [pid for root in box.pids for pid in descendants(root)]
  assert len(pids) >= 2 and not any(map(lives, pids))
  with pytest.raises(SandboxUnavailable, match="closed"):
    box.run([solve("return 1", "f(1)")])
  code = (
    "import os, sys; from diffucoder_jax.execution.sandbox import Sandbox\n"
    f"box = Sandbox(workers=1, level={box.level!r}); print(*box.pids, flush=True)\n"
    "os.kill(os.getpid(), 9)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == -9, done.stderr
  eventually(lambda: not lives(int(done.stdout)))
