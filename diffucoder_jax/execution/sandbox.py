"""Runs untrusted answers against tests: `Sandbox.run(jobs)`, one outcome per job.

An answer runs in a solver process that sees the arguments of calls and nothing else; the tests run
in a judge process, where the answer is a stub (`judge`, `solver`, `wire`). So an answer passes only
by returning the right values: exiting early, objects equal to everything, patched builtins and
forged output score nothing. What confines both processes is in `isolation` and `seccomp`; a fork
server per core (`zygote`) makes them in milliseconds.

Not covered: kernel bugs, side channels, timing. For hostile rather than merely reward-hacking code,
run the whole program inside a virtual machine too.

  with Sandbox() as box:
    outcomes = box.run([Job(code, "add", ("assert add(1, 2) == 3",))])
"""

import collections
import concurrent.futures
import dataclasses
import logging
import os
import threading

from diffucoder_jax.execution import isolation, selftest, worker

UNSAFE_VARIABLE = "DIFFUCODER_ALLOW_UNSAFE_EXECUTION"
AGAIN_ALONE = ("oom", "killed")  # may be the doing of an earlier test of the same process


class SandboxUnavailable(RuntimeError):
  """This machine cannot isolate untrusted programs; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one test may use, load and call of the answer included.

  Attributes:
    cpu_seconds: processor time of answer and judge together.
    wall_seconds: wall time.
    memory_bytes: address space of each process.
    output_bytes: what the answer may send back in one test, 64 MiB of it in one value (HumanEval+ has
      tests that ask for 100 MB in all). What it prints goes nowhere.
    disk_bytes: size of the answer's own /tmp; 0 for none, as always at level `no-userns`.
    threads: how many threads the answer may have.
    job_seconds: wall time of all the tests of a job together; tests that come too late time out.
    retries: how often a job is tried again after a failure of the machinery, before it is `infra`.
  """

  cpu_seconds: float = 5.0
  wall_seconds: float = 15.0
  memory_bytes: int = 1 << 30
  output_bytes: int = 256 << 20
  disk_bytes: int = 16 << 20
  threads: int = 64
  job_seconds: float = 30.0
  retries: int = 2


@dataclasses.dataclass(frozen=True)
class Job:
  """An answer and its tests.

  Attributes:
    code: the answer, a program that defines the entry point.
    entry_point: its name, or an expression such as `Solution().solve`.
    tests: programs; each passes if it raises nothing. They call the entry point by its name (where
      it is a name) or as `candidate`, and share no variables with one another.
    prelude: the dataset's code for both sides, such as imports and record classes. Never hints at
      expected values: the answer sees it.
    integrity: `isolated`, or `shared` to run the tests in the answer's own process, for tests that
      need its classes or pass functions. A shared verdict can be forged; do not train on it.
  """

  code: str
  entry_point: str
  tests: tuple[str, ...]
  prelude: str = ""
  integrity: str = "isolated"

  def __post_init__(self):
    if isinstance(self.tests, str) or not self.tests:
      raise ValueError("a job needs a tuple of tests; without one, every answer would pass")
    if self.integrity not in ("isolated", "shared"):
      raise ValueError(f"integrity is isolated or shared, not {self.integrity!r}")
    object.__setattr__(self, "tests", tuple(self.tests))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What an answer was worth.

  Attributes:
    status: `pass` if all tests pass, `infra` if the verdict is incomplete, else the status of the
      first test that does not pass. fail: a test's assertion; error: another exception; timeout,
      oom: a limit; killed: the answer's process ended itself, or was ended for what it sent;
      infra: the machinery failed, which says nothing about the answer: mask it, never score it.
    tests: the status of each test.
    message: for humans, of the first test that does not pass.
    integrity: `isolated` or `shared`, as the job asked. level: full, no-userns or unsafe.
    cpu_seconds: processor time of answer and judge.
  """

  status: str
  tests: tuple[str, ...]
  message: str
  integrity: str
  level: str
  cpu_seconds: float


class Sandbox:
  """Fork servers that judge jobs; a context manager. `run` may be called from any one thread.

  Attributes: level: full, no-userns or unsafe. limits: the Limits.
  """

  def __init__(
    self, workers=None, limits=None, level="auto", allow_unsafe=False, packages=(), _omit=()
  ):
    """Starts the fork servers and attacks them (`selftest`) before anybody else does.

    Args:
      workers: how many fork servers; None for one per core.
      limits: Limits; None for the defaults.
      level: `auto` takes the first that works of full, no-userns and, if allowed, unsafe.
      allow_unsafe: whether programs may run without isolation where there is none; the variable
        DIFFUCODER_ALLOW_UNSAFE_EXECUTION=1 says the same. Every outcome is stamped with the level.
      packages: names of installed packages that programs may import, such as numpy for the tests of
        HumanEval+; the standard library only by default. They are imported once, before any fork.
      _omit: mechanisms to leave out, to test the self-test: namespaces, landlock, seccomp, rlimits,
        judge.
    Raises: SandboxUnavailable.
    """
    self.limits = limits or Limits()
    self._packages, self._omit = tuple(packages), tuple(_omit)
    self._lock = threading.Lock()
    self._workers = []
    allow_unsafe = allow_unsafe or os.environ.get(UNSAFE_VARIABLE) == "1"
    try:
      self.level = self._start(level, allow_unsafe)
      others = (workers or len(os.sched_getaffinity(0))) - 1
      if others > 0:  # together: a large host has hundreds of cores, and each takes 0.1 s
        with concurrent.futures.ThreadPoolExecutor(min(others, 16)) as pool:
          started = [pool.submit(self._worker, self.level) for _ in range(others)]
        self._workers += [each.result() for each in started if not each.exception()]
        for each in started:
          each.result()  # raises what kept it from starting; those that did are closed below
    except worker.CannotStart as error:
      self.close()
      raise SandboxUnavailable(f"a fork server could not be started: {error}") from None
    except BaseException:
      self.close()
      raise

  def _worker(self, level):
    return worker.Worker(level, self.limits.disk_bytes, self._packages, self._omit)

  def _start(self, level, allow_unsafe):
    """Starts the first fork server at the best level that holds; returns the level."""
    wanted = {"auto": ("full", "no-userns", "unsafe")}.get(level, (level,))
    if level not in ("auto", "full", "no-userns", "unsafe"):
      raise ValueError(f"level is auto, full, no-userns or unsafe, not {level!r}")
    reasons = []
    for name in wanted:
      missing = isolation.missing(name)
      if name == "unsafe" and not allow_unsafe:
        reasons.append(f"unsafe: needs allow_unsafe=True or {UNSAFE_VARIABLE}=1")
      elif missing:
        reasons.append(f"{name}: this machine lacks {', '.join(missing)}")
      else:
        try:
          self._workers = [self._worker(name)]
        except worker.CannotStart as error:
          reasons.append(f"{name}: {error}")
          continue
        self.level = name
        if name == "unsafe":
          why = "; ".join(reasons) or "as asked for"
          logging.warning("sandbox: UNSAFE, programs run without isolation (%s)", why)
          return name
        escaped = self._attack()
        if not escaped:
          if name != "full":
            why = "; ".join(reasons) or "as asked for"
            logging.warning("sandbox: level no-userns, no namespaces (%s)", why)
          return name
        reasons.append(f"{name}: the self-test got through with {', '.join(escaped)}")
        self.close()
    raise SandboxUnavailable(
      "untrusted programs cannot be isolated here. " + "; ".join(reasons) + ". Remedy: allow user"
      " namespaces, or Landlock and seccomp, or run on another machine; allow_unsafe=True runs"
      " programs without isolation."
    )

  def _attack(self):
    """The self-test, with time enough for a loaded machine whatever the limits are to be."""
    limits = self.limits
    self.limits = dataclasses.replace(limits, cpu_seconds=10, wall_seconds=60, job_seconds=60)
    try:
      return selftest.escapes(self, "shared" if "judge" in self._omit else "isolated")
    finally:
      self.limits = limits

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def close(self):
    """Ends the fork servers."""
    for each in self._workers:
      each.close()
    self._workers = []

  @property
  def pids(self):
    """The process ids of the fork servers."""
    return tuple(each.process.pid for each in self._workers if each.process)

  def run(self, jobs):
    """Judges jobs; returns their outcomes in order. Raises nothing for what a program did."""
    jobs = list(jobs)
    with self._lock:
      if not self._workers:
        raise SandboxUnavailable("the sandbox is closed")
      outcomes = [None] * len(jobs)
      left = collections.deque(range(len(jobs)))

      def work(each):
        while True:
          try:
            i = left.popleft()
          except IndexError:
            return
          outcomes[i] = self._judge(each, jobs[i])

      if len(self._workers) == 1 or len(jobs) < 2:
        work(self._workers[0])
      else:
        with concurrent.futures.ThreadPoolExecutor(len(self._workers)) as pool:
          list(pool.map(work, self._workers))
      return outcomes

  def _judge(self, each, job):
    """One job on one fork server, with as many solvers as its tests need."""
    tests, messages = [], []
    failures, cpu_seconds, left = 0, 0.0, self.limits.job_seconds
    alone = -1  # the test that was tried again in a process of its own

    def add(status, message):
      tests.append(status)
      messages.append(message)

    while len(tests) < len(job.tests):
      if left <= 0:
        add("timeout", f"the job's {self.limits.job_seconds:g} s were over")
        continue
      first = len(tests)
      try:
        if each.process is None or each.process.poll() is not None:
          each.start()
        pair = each.run(job, self.limits, first, left)
      except Exception as error:  # also what nobody foresaw: a job must not end a training run
        if not isinstance(error, (worker.WorkerDied, worker.CannotStart)):
          logging.exception("sandbox: a fork server's host failed")
        each.close()
        failures += 1
        if failures <= self.limits.retries:
          continue
        tests += ["infra"] * (len(job.tests) - first)
        messages += [f"{type(error).__name__}: {error}"] * (len(job.tests) - first)
        break
      left -= pair.seconds
      cpu_seconds += pair.cpu_seconds
      results = list(pair.tests)
      if pair.ended:
        results += [pair.ended] * (len(job.tests) - first if pair.loading else 1)
      for i, (status, message) in enumerate(results):
        at = first + i
        if status == "infra" and failures < self.limits.retries:
          failures += 1
          break
        if status in AGAIN_ALONE and at > first and at > alone and not pair.loading:
          alone = at
          break
        add(status, message)
    return self._outcome(job, tests, messages, cpu_seconds)

  def _outcome(self, job, tests, messages, cpu_seconds):
    bad = [i for i, status in enumerate(tests) if status != "pass"]
    masked = [i for i in bad if tests[i] == "infra"]
    first = (masked or bad or [None])[0]
    return Outcome(
      status="pass" if first is None else tests[first],
      tests=tuple(tests),
      message="" if first is None else messages[first],
      integrity=job.integrity,
      level=self.level,
      cpu_seconds=cpu_seconds,
    )
