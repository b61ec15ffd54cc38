"""The processes of a pod: how they join, what they tell each other, and how they end together.

Every process runs the same program text and calls the functions here in the same order.
"""

import importlib.metadata
import json
import logging as python_logging
import os
import pathlib
import socket
import sys
import traceback
import zlib

import jax
import numpy as np
from absl import logging

from diffucoder_jax.runtime import flags, heap

PREEMPTED = 42  # the exit code that tells launchers to start the same command again
LOST = 43  # of a process that others have left, or that hangs: the same remedy
# Seconds without a sign of life after which a process is taken for dead and all others end. JAX's
# own 100 leave a pod idle for longer than a restart takes.
HEARTBEAT_SECONDS = 30
# What an error says when another process is gone: status codes of JAX's runtime, and its library for
# CPUs. Others, such as RESOURCE_EXHAUSTED, are this process's own.
LOST_SIGNS = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "Gloo", "heartbeat")


def start_distributed():
  """Joins the processes of a pod when the launch script asked for it; call before any JAX work.

  DIFFUCODER_MULTIHOST=1 is set by launch scripts. On TPU everything else is found by JAX; elsewhere
  DIFFUCODER_COORDINATOR (host:port), DIFFUCODER_PROCESSES and DIFFUCODER_PROCESS say who is who.
  DIFFUCODER_HEARTBEAT_SECONDS changes `HEARTBEAT_SECONDS`. Being explicit means that a misconfigured
  pod stops instead of training once per host.
  """
  flags.set_flags()
  heap.keep_freed_memory()
  enough_threads()
  if os.environ.get("DIFFUCODER_MULTIHOST") != "1":
    return
  seconds = int(os.environ.get("DIFFUCODER_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS))
  coordinator = os.environ.get("DIFFUCODER_COORDINATOR")
  found = {}
  if coordinator is not None:
    found = {
      "coordinator_address": coordinator,
      "num_processes": int(os.environ["DIFFUCODER_PROCESSES"]),
      "process_id": int(os.environ["DIFFUCODER_PROCESS"]),
    }
  jax.distributed.initialize(**found, heartbeat_timeout_seconds=seconds)


def enough_threads():
  """Gives XLA's thread pool on CPU more threads than there are fake devices.

  It has one for each by default. Devices wait for each other inside these threads, so two
  collectives in flight at once use them all up and the program hangs.
  """
  if jax.config.jax_num_cpu_devices > 1:
    os.environ.setdefault("NPROC", str(4 * jax.config.jax_num_cpu_devices))


def name():
  """Who this process is, for log lines: `process 3 of 8 (host-name)`."""
  return f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()})"


def together(main, *args):
  """Calls `main(*args)`; an error on one process of several ends it at once.

  A Python program with an error would first wait, at its exit, for the other processes, which wait
  for it in a collective: until heartbeats run out, a pod would stand still. When a process dies, the
  others find a broken connection; their last line says so, and their exit code is `LOST`.
  """
  try:
    return main(*args)
  except Exception as error:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    if lost(error):
      end(
        f"{name()} ends: it lost the others (the error above), so another process has ended, and its "
        "log says why. Start all processes again with the same command; they go on from the last "
        "checkpoint"
      )
    end(f"{name()} ends because of the error above, and the others with it", 1)


def lost(error):
  """Whether an exception says that another process is gone: by `LOST_SIGNS`, in an error of JAX's
  runtime or in the ValueError that some of JAX's functions make of it."""
  of_runtime = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
  return of_runtime and any(sign in str(error) for sign in LOST_SIGNS)


def end(line, code=LOST):
  """Logs a line and ends this process, without a word to the others."""
  logging.error("%s", line)
  python_logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def gather(value) -> list:
  """The JSON values of all processes, on all of them, in the order of the processes.

  All must call it. With one process it is [value].
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.asarray(len(raw), np.int32))).ravel()
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(raw)] = raw
  everywhere = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
  return [
    json.loads(bytes(row[:size]).decode()) for row, size in zip(everywhere, sizes, strict=True)
  ]


def from_main(function):
  """What `function()` gives on the main process, on all of them; its ValueError is raised on all."""
  found = error = None
  if jax.process_index() == 0:
    try:
      found = function()
    except (ValueError, FileNotFoundError) as e:
      error = str(e)
      if jax.process_count() == 1:
        raise
  found, error = gather([found, error])[0]
  if error:
    raise ValueError(error)
  return found


def largest_everywhere(value):
  """The largest of the processes' numbers."""
  return np.max(gather(float(value))) if jax.process_count() > 1 else value


def versions():
  """What all processes must have in common before they read a config: code and libraries."""
  package = pathlib.Path(__file__).parents[1]
  files = sorted(package.rglob("*.py"))
  code = zlib.crc32(b"".join(f"{f.relative_to(package)}".encode() + f.read_bytes() for f in files))
  return {
    "the code": f"{code:08x}", "Python": sys.version.split()[0],
    **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
  }  # fmt: skip


def check_same_everywhere(values):
  """Raises when processes disagree, which would make them hang or diverge later.

  Args:
    values: {what it is: anything that prints the same where it is the same}.
  Raises:
    ValueError: names what differs, and the processes that have something else than process 0.
  """
  if jax.process_count() == 1:
    return
  everywhere = gather({key: zlib.crc32(str(value).encode()) for key, value in values.items()})
  first, wrong = everywhere[0], []
  for key in sorted({key for one in everywhere for key in one}):
    others = [i for i, one in enumerate(everywhere) if one.get(key) != first.get(key)]
    if others:
      wrong.append(f"{key} (here {values.get(key, 'absent')!r:.200}; other than process 0: {others})")
  if wrong:
    raise ValueError(
      f"processes disagree about {'; '.join(wrong)}. Start all of them with the same code, files and "
      "flags"
    )
