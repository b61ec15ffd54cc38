"""The fork server: one per core, started by exec, which forks a confined solver and judge per job.

It knows limits, descriptors and exit codes, never a line of an answer or a test: whatever lies in
its memory is inherited by every solver (an early version was robbed with gc.get_objects()). Code and
tests reach the children through sockets that are only passed on, and verdicts go from the judge to
the host directly. Each child leaves its process group (`kill(0, ...)` crosses pid namespaces).
"""

import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import sys
import time

from diffucoder_jax.execution import isolation, judge, seccomp, solver, wire

# What answers and tests import all the time. Each module makes every fork dearer, so those that one
# answer in a hundred wants (dataclasses, hashlib, statistics, threading, ...) are for it to import.
PRELOADED = (
  "abc bisect collections contextlib copy datetime decimal enum fractions functools heapq io"
  " itertools json math operator random re string time types typing"
).split()
UNFINISHED = 3  # exit code of a judge (or solver) that could not come to the end
TICK = 0.02  # seconds; processor clocks are read at least this often once a test is near its limit


def main(control_fd):
  """Reads a configuration, goes into the jail, says {"ready"}, then serves jobs until the host ends.

  Configuration: {"level": full | no-userns | unsafe, "omit": [names], "disk_bytes", "packages":
  [names], "package_paths": [folders]}. `omit` leaves a mechanism out (namespaces, landlock, seccomp,
  rlimits): for tests of the self-test.
  """
  config, _ = wire.receive(control_fd)
  preload(config)
  server = Server(config)
  try:
    server.enter()
  except OSError as error:
    wire.send(control_fd, {"ready": False, "missing": str(error)})
    return
  os.environ.clear()
  gc.collect()
  gc.freeze()
  wire.send(control_fd, {"ready": True})
  control = socket.socket(fileno=control_fd)
  while True:
    message, fds, _, _ = socket.recv_fds(control, 65536, 4)
    if not message:
      os._exit(0)
    try:
      report = server.run(json.loads(message), fds)
    except OSError as error:  # no processes left, no memory for a namespace
      report = {"infra": f"the fork server: {error}"}
    wire.send(control_fd, report)


def preload(config):
  """Imports what answers use, once for all of them."""
  # random would take a new seed in every child, and threading, which packages import, look for threads
  # that this process does not have. Without their hooks every job also starts alike.
  register, os.register_at_fork = os.register_at_fork, lambda **hooks: None
  for name in [*PRELOADED, *(["threading"] if config["packages"] else [])]:
    importlib.import_module(name)
  os.register_at_fork = register
  sys.modules["random"].seed(0)
  sys.path += config["package_paths"]
  for name in config["packages"]:
    importlib.import_module(name)


class Server:
  """What is made once and used for every job."""

  def __init__(self, config):
    self.config, self.omit = config, set(config["omit"])
    self.jailed = config["level"] == "full" and "namespaces" not in self.omit
    self.landlocked = config["level"] != "unsafe" and "landlock" not in self.omit
    if config["level"] == "full":  # where it is one wall of several
      self.landlocked = self.landlocked and isolation.landlock_abi() > 0
    self.filtered = config["level"] != "unsafe" and "seccomp" not in self.omit
    self.disk = config["disk_bytes"] if self.jailed else 0
    self.pid_namespace = self.tmp = None
    self.rulesets = {}  # whether it is the solver's: descriptor
    self.capabilities = 0
    self.tasks = 0  # of this user outside the sandbox, which RLIMIT_NPROC counts too

  def enter(self):
    """Into the jail, as far as the level asks for one. Raises OSError where it is refused."""
    paths = isolation.python_paths() + self.config["package_paths"]
    if self.jailed:
      self.pid_namespace = isolation.enter_jail(paths)
    else:
      self.capabilities = isolation.leave_root(paths)
      self.tasks = isolation.tasks_of_this_user() + 256
    if self.config["level"] == "unsafe":
      isolation.adopt_orphans()
    if self.disk:
      self.tmp = isolation.Tmp(self.disk, paths)
    if "rlimits" not in self.omit:
      isolation.set_common_rlimits()  # here once, and not in every child
    self.paths = ["/"] if self.jailed else [*paths, *isolation.DEVICES]
    self._rule()
    if self.filtered:
      for writes in (False, True):  # built here once, and not in every child
        seccomp.program(os.uname().machine, writes)

  def _rule(self):
    """The Landlock rulesets, which name /tmp by its inode and not by its path."""
    for fd in self.rulesets.values():
      os.close(fd)
    if self.landlocked:
      writable = [self.tmp.path] if self.tmp else []
      self.rulesets = {
        solves: isolation.landlock_ruleset(self.paths, writable if solves else [])
        for solves in (False, True)
      }

  def run(self, job, fds):
    """Runs one job: forks, watches, reaps. Takes ownership of `fds`.

    Args: job: {"shared": bool, "seconds", "cpu_seconds", "wall_seconds", "memory_bytes", "threads"}.
      fds: the sockets to the host, solver's and judge's (`shared`: one, the solver's).
    Returns: {"why": None | cpu | wall | job, "solver", "judge": exit codes, negative for a signal,
      None where the process was still running when the other had ended; "cpu": seconds}.
    """
    rpc = [end.detach() for end in socket.socketpair()]
    tick = os.pipe()
    pids, why = [], None
    try:
      if job["shared"]:
        pids.append(self._fork(lambda: self._shared(job, fds[0], tick[1]), [fds[0], tick[1]]))
      else:
        pids.append(self._fork(lambda: self._solver(job, fds[0], rpc[0]), [fds[0], rpc[0]]))
        ends = [fds[1], rpc[1], tick[1]]
        pids.append(self._fork(lambda: self._judge(job, *ends), ends, own_pids=False))
      for fd in (*fds, *rpc, tick[1]):
        os.close(fd)
      why = watch(pids, tick[0], job)
    finally:
      # The judge first: whether it had its verdicts decides how the solver's end is to be read.
      codes = [self._end(pids.pop()) for _ in pids[-1:]]
      if pids:
        codes.insert(0, self._end(pids[0], patient=codes[-1][0] == UNFINISHED and why is None))
      os.close(tick[0])
    if self.config["level"] == "unsafe":  # elsewhere nobody can leave a process behind
      isolation.kill_children()
    if self.tmp and self.tmp.renew():
      self._rule()
    return {
      "why": why,
      "solver": codes[0][0],
      "judge": codes[-1][0],
      "cpu": sum(usage.ru_utime + usage.ru_stime for _, usage in codes),
    }

  def _end(self, pid, patient=False):
    """Kills and reaps a child and its process group; returns (exit code or None, usage).

    None: it was alive. `patient`: its socket closed, which it does a moment before it can be reaped.
    """
    found, status, usage = os.wait4(pid, os.WNOHANG)
    if not found and patient:
      watched = os.pidfd_open(pid)
      select.select([watched], [], [], 0.1)
      os.close(watched)
      found, status, usage = os.wait4(pid, os.WNOHANG)
    try:
      os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
      pass
    if found:
      return os.waitstatus_to_exitcode(status), usage
    os.kill(pid, signal.SIGKILL)  # it may not have left our group yet
    return None, os.wait4(pid, 0)[2]

  # The children -----------------------------------------------------------------------------------

  def _fork(self, body, keep, own_pids=True):
    """A child with nothing open but `keep`; it never returns from here."""
    own_pids = own_pids and self.pid_namespace is not None
    if own_pids:
      isolation.unshare(isolation.NEWPID)
    pid = os.fork()
    if pid == 0:
      try:
        isolation.die_with_parent()
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
          os.dup2(null, fd)
        low = 3
        for fd in sorted([*keep, *self.rulesets.values(), *([self.tmp.fd] if self.tmp else [])]):
          os.closerange(low, fd)
          low = fd + 1
        os.closerange(low, 4096)
        os._exit(0 if body() else UNFINISHED)
      finally:
        os._exit(1)
    if own_pids:
      isolation.enter(self.pid_namespace, isolation.NEWPID)
    return pid

  def _confine(self, job, solves):
    """Before the first byte of an answer or a test runs; the last step is the seccomp filter."""
    if self.jailed:
      os.chdir(self.tmp.path if self.tmp else "/")
    if "rlimits" not in self.omit:
      cpu_seconds = math.ceil(job["seconds"]) + 2
      files = 2 * self.disk if solves else 0  # so that a full /tmp says so
      isolation.set_rlimits(job["memory_bytes"], files, cpu_seconds, self.tasks + job["threads"])
    isolation.drop_privileges(self.capabilities)
    if self.landlocked:
      isolation.landlock_restrict(self.rulesets[solves])
      for fd in self.rulesets.values():
        os.close(fd)
    if solves and self.tmp:
      os.close(self.tmp.fd)
    if self.filtered:
      isolation.filter_calls(writes=bool(solves and self.disk))

  def _solver(self, job, host, rpc):
    payload, _ = wire.receive(host)
    os.close(host)
    self._confine(job, solves=True)
    return solver.serve(payload, rpc)

  def _judge(self, job, host, rpc, tick):
    payload, _ = wire.receive(host)
    self._confine(job, solves=False)
    return judge.serve(payload, host, rpc, tick, self.tmp.fd if self.tmp else None)

  def _shared(self, job, host, tick):
    payload, _ = wire.receive(host)
    self._confine(job, solves=True)
    return solver.serve_shared(payload, host, tick)


def watch(pids, tick, job):
  """Waits for the last of `pids` to end, within the limits of the job and of each test.

  A byte on `tick` begins a test. Processor time is that of all `pids` together, read from their
  clocks; it is not enforced by signals, which the first process of a pid namespace may ignore.
  Returns: None, or what ran out: cpu, wall or job.
  """
  ended = os.pidfd_open(pids[-1])
  poll = select.poll()
  poll.register(ended, select.POLLIN)
  poll.register(tick, select.POLLIN)
  start = began = time.monotonic()
  spent = 0.0
  try:
    while True:
      now = time.monotonic()
      wall_left = min(start + job["seconds"], began + job["wall_seconds"]) - now
      cpu_left = spent + job["cpu_seconds"] - sum(map(processor_seconds, pids))
      if cpu_left <= 0:
        return "cpu"
      if wall_left <= 0:
        return "wall" if now < start + job["seconds"] else "job"
      ready = poll.poll(math.ceil(1000 * min(wall_left, max(cpu_left, TICK))))
      if any(fd == ended for fd, _ in ready):
        return None
      if ready:
        if os.read(tick, 4096):
          began, spent = time.monotonic(), sum(map(processor_seconds, pids))
        else:
          poll.unregister(tick)
  finally:
    os.close(ended)


def processor_seconds(pid):
  """What a child and its threads have used, by its clock (clock_getcpuclockid(3)), in seconds."""
  try:
    return time.clock_gettime((~pid << 3) | 2)
  except OSError:
    return 0.0
