"""The host's end of one fork server: starts it, sends it jobs, reads verdicts, starts it again."""

import dataclasses
import importlib.util
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

from diffucoder_jax.execution import wire

ROOT = pathlib.Path(__file__).parents[2]  # where `diffucoder_jax` is imported from
GRACE = 10.0  # seconds beyond a job's own after which its fork server is taken for dead
START = 60.0  # seconds a fork server may take to start
EVENT_BYTES = 1 << 12  # what a judge may tell the host about one test
STATUSES = ("pass", "fail", "error", "timeout", "oom", "killed", "infra")

# The library's folder leaves sys.path again, so that an answer has the standard library only.
START_CODE = (
  "import sys; sys.path.insert(0, sys.argv[2]);"
  " from diffucoder_jax.execution import zygote; del sys.path[0], sys.argv[2];"
  " zygote.main(int(sys.argv[1]))"
)


# A fork keeps none of the threads that a numerical library starts when it is imported.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WorkerDied(RuntimeError):
  """The fork server is gone, does not answer, or could not do its work; nobody's answer is to blame."""


class CannotStart(RuntimeError):
  """The fork server refuses to start; the message says what the machine lacks."""


@dataclasses.dataclass(frozen=True)
class Pair:
  """What one solver and its judge came to.

  Attributes: tests: (status, message) of the tests that ended, in order. ended: None when all did,
    else (status, message) of the one that was running. loading: whether that was the answer itself.
    seconds, cpu_seconds: wall and processor time.
  """

  tests: tuple
  ended: tuple | None
  loading: bool
  seconds: float
  cpu_seconds: float


class Worker:
  """One fork server. Not for two threads at once."""

  def __init__(self, level, disk_bytes, packages=(), omit=()):
    """Starts it; raises CannotStart, and ImportError for a package that is not installed here."""
    self.config = {"level": level, "disk_bytes": disk_bytes, "omit": list(omit)}
    self.config |= {"packages": list(packages), "package_paths": _folders(packages)}
    self.process = self.control = None
    self.start()

  def start(self):
    """Starts the fork server, anew if there was one. Raises CannotStart."""
    self.close()
    ours, theirs = socket.socketpair()
    # By exec and with an empty environment: a fork of a JAX process would have its locks, and its
    # memory and environment hold tokens. PYTHONHASHSEED: a verdict must not depend on set order
    # (so not -I, which ignores it). -S -P: nothing but the standard library can be imported.
    command = [sys.executable, "-s", "-S", "-P", "-c", START_CODE, str(theirs.fileno()), str(ROOT)]
    self.process = subprocess.Popen(
      command,
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      cwd="/",
      env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", **ONE_THREAD},
    )
    theirs.close()
    self.control = ours
    self.control.settimeout(START)
    try:
      self._send(self.config)
      told = self._receive()
    except (OSError, EOFError, wire.WireError) as error:
      self.process.kill()
      lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
      self.close()
      reason = lines[-1] if lines else repr(error)
      raise CannotStart(f"the fork server ended at its start: {reason}") from None
    if not told["ready"]:
      self.close()
      raise CannotStart(told["missing"])

  def close(self):
    """Ends the fork server and everything below it."""
    if self.process is None:
      return
    self.control.close()  # it ends when its socket does
    try:
      self.process.wait(1.0)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self.process.stderr.close()
    self.process = self.control = None

  def _send(self, message):
    body = json.dumps(message).encode()
    self.control.sendall(len(body).to_bytes(4, "little") + body)

  def _receive(self):
    """A frame from the fork server; the socket's timeout holds. Raises OSError, EOFError."""
    parts = b""
    while len(parts) < 4 or len(parts) < 4 + int.from_bytes(parts[:4], "little"):
      part = self.control.recv(65536)
      if not part:
        raise EOFError("the fork server is gone")
      parts += part
    return wire.parse(parts[4:])

  def run(self, job, limits, first, seconds):
    """Judges a job's tests from number `first` on with one solver; returns a Pair.

    Args: job, limits: as in `sandbox`. seconds: wall time for all of it.
    Raises: WorkerDied when the machinery failed; then nothing is known of the answer.
    """
    start = time.monotonic()
    shared = job.integrity == "shared"
    answer = {"code": job.code, "prelude": job.prelude, "entry_point": job.entry_point}
    tests = {
      "prelude": job.prelude,
      "entry_point": job.entry_point,
      "tests": job.tests[first:],
      "output_bytes": limits.output_bytes,
    }
    payloads = [answer | tests] if shared else [answer, tests]
    order = {"shared": shared, "seconds": seconds}
    for name in ("cpu_seconds", "wall_seconds", "memory_bytes", "threads"):
      order[name] = getattr(limits, name)
    deadline = start + seconds + GRACE
    ends = [socket.socketpair() for _ in payloads]
    try:
      self.control.settimeout(GRACE)
      socket.send_fds(self.control, [json.dumps(order).encode()], [end.fileno() for _, end in ends])
      for _, end in ends:
        end.close()
      room = EVENT_BYTES * (16 + len(tests["tests"]))
      events = self._events([end for end, _ in ends], payloads, room, deadline)
      self.control.settimeout(max(1.0, deadline - time.monotonic()))
      report = self._receive()
    except (OSError, EOFError, wire.WireError) as error:
      raise WorkerDied(f"a fork server ended or hung: {error!r}") from None
    finally:
      for pair in ends:
        for end in pair:
          end.close()
    if "infra" in report:
      raise WorkerDied(report["infra"])
    wanted = len(job.tests) - first
    return _pair(events, report, shared, wanted, limits, seconds, time.monotonic() - start)

  def _events(self, ends, payloads, room, deadline):
    """Sends each child its payload and reads what the judge tells: a list of dicts.

    With `integrity="shared"` it is the answer that tells, and may tell anything.
    """
    for end, payload in zip(ends, payloads, strict=True):
      body = json.dumps(payload).encode()
      end.settimeout(max(0.1, deadline - time.monotonic()))
      try:
        end.sendall(len(body).to_bytes(4, "little") + body)
      except (BrokenPipeError, ConnectionResetError, TimeoutError):
        break  # a child is gone; the report says why
    told, parts = b"", []
    while len(told) < room:
      ends[-1].settimeout(max(0.1, deadline - time.monotonic()))
      try:
        part = ends[-1].recv(65536)
      except (ConnectionResetError, TimeoutError):
        break
      if not part:
        break
      told += part
    while len(told) >= 4:
      count = int.from_bytes(told[:4], "little")
      if len(told) < 4 + count:
        break
      try:
        parts.append(wire.parse(told[4 : 4 + count]))
      except wire.WireError:
        break
      told = told[4 + count :]
    return [part for part in parts if isinstance(part, dict)]


def _folders(packages):
  """Where the packages lie, for sys.path: absolute folders."""
  folders = []
  for name in packages:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
      raise ImportError(f"the sandbox is to offer {name!r}, which is not installed")
    folder = pathlib.Path(spec.origin).parents[1 if spec.submodule_search_locations else 0]
    if str(folder) not in folders:
      folders.append(str(folder))
  return folders


def _pair(events, report, shared, wanted, limits, seconds, wall):
  """Puts the judge's events and the fork server's report together. Raises WorkerDied."""
  tests, loading, gone, loaded = [], True, None, None
  ready = any("ready" in event for event in events)
  for event in events:
    message = _printable(event.get("message"))
    if "load" in event:
      loading = event["load"] is not None
      loaded = (_status(event["load"]), message) if loading else None
    elif "test" in event and len(tests) < wanted:
      tests.append((_status(event["test"]), message))
    elif "gone" in event:
      gone = (event["gone"], message)
  done = len(tests) == wanted
  ended = None
  why = report["why"]
  if not done and loaded is not None:
    ended = loaded
  elif not done and why is not None:
    ended = ("timeout", _SLOW[why].format(limits=limits))
  elif not done and not ready:
    raise WorkerDied(f"an answer could not be confined or its judge failed: {report}")
  elif not done and report["cpu"] >= seconds:  # RLIMIT_CPU, behind the fork server's own watch
    ended = ("timeout", _SLOW["job"].format(limits=limits))
  elif not done and gone is None and not shared:
    raise WorkerDied(f"a judge failed (exit {report['judge']})")
  elif not done and report["solver"] == -signal.SIGKILL:
    # An answer cannot send itself SIGKILL, and its limits are watched: this came from outside.
    raise WorkerDied("an answer's process was killed from outside")
  elif not done:
    status, message = gone or (None, "the answer's process ended")
    ended = (
      (_status(status), message) if status else ("killed", f"{message} (exit {report['solver']})")
    )
  return Pair(tuple(tests), ended, loading, wall, report["cpu"])


def _printable(message):
  """One line that any log can hold: the answer may have put control characters into its text."""
  message = message[:400] if isinstance(message, str) else ""
  return "".join(c if c.isprintable() else " " for c in message)


def _status(word):
  return word if word in STATUSES else "error"


_SLOW = {
  "cpu": "used {limits.cpu_seconds:g} s of processor time",
  "wall": "ran for {limits.wall_seconds:g} s",
  "job": "the job's {limits.job_seconds:g} s were over",
}
