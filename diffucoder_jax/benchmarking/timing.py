"""Seconds, taken in turns: the machine's quick and slow phases then fall on all sides alike."""

import argparse
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp

# OpenMP's threads go on spinning for so long when their work is done (libiomp; libgomp less), and
# whatever runs next would get half a machine.
PAUSE = 0.2  # seconds


def interleave(tasks, repeats):
  """Times tasks in turn: a, b, c, a, b, c, ... after each has run once untimed.

  Args:
    tasks: {name: function without arguments that returns when its work is done}.
    repeats: int, at least 1.
  Returns:
    ({name: list of `repeats` wall seconds}, {name: what its untimed run returned}). Seconds at one
    index were measured one after the other.
  """
  results = {name: task() for name, task in tasks.items()}
  seconds = {name: [] for name in tasks}
  for _ in range(repeats):
    for name, task in tasks.items():
      time.sleep(PAUSE)
      start = time.perf_counter()
      task()
      seconds[name].append(time.perf_counter() - start)
  return seconds, results


def side_by_side(sides):
  """{(part, side): task} of {side: {part: task}}, the sides of one part next to each other.

  A side that is absent has no parts."""
  parts = dict.fromkeys(part for tasks in sides.values() for part in tasks)
  return {
    (part, side): tasks[part] for part in parts for side, tasks in sides.items() if part in tasks
  }


def ratios(theirs, ours):
  """Their seconds over ours, turn by turn: a slow phase of the machine then cancels."""
  return [a / b for a, b in zip(theirs, ours, strict=True)]


def compiled(fn, *args):
  """(program, seconds of tracing and compiling) of a jitted function for these arguments."""
  start = time.perf_counter()
  program = fn.lower(*args).compile()
  return program, round(time.perf_counter() - start, 2)


def add_arguments(parser):
  """--matmul_size."""
  parser.add_argument(
    "--matmul_size", type=at_least(1), default=2048, help="of the floor's matrices"
  )


def at_least(low):
  """The type of a flag: a whole number that is not smaller."""

  def whole_number(text):  # argparse takes its name for what is none
    if int(text) < low:
      raise argparse.ArgumentTypeError(f"{text} is less than {low}")
    return int(text)

  return whole_number


def matmul(size):
  """(task, FLOPs) of one float32 product of square matrices: what this machine computes at best."""
  a = jnp.full((size, size), 1e-3, jnp.float32)
  multiply = jax.jit(lambda a: jnp.matmul(a, a, precision="highest")).lower(a).compile()
  return lambda: jax.block_until_ready(multiply(a)), 2.0 * size**3


def rates(work, seconds):
  """`work` per second of each measurement."""
  return [work / s for s in seconds]


def cores():
  """Cores that this process may use; XLA's thread pool has as many threads."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor():
  """The processor's name, as well as the system tells it."""
  try:
    with open("/proc/cpuinfo") as f:
      names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
  except OSError:
    names = []
  return names[0] if names else platform.processor() or platform.machine()


def surroundings():
  """What a number must be read with: {"machine", "devices", "date", "load", "busy", "versions"}.

  Call it before anything is timed: `load` is the mean number of processes that ran or waited in the
  last minute, and `busy` whether these were others that will take part of this machine.
  """
  device, load = jax.devices()[0], os.getloadavg()[0]
  return {
    "machine": f"{cores()} cores of {processor()}, {platform.system()} {platform.release()}",
    "devices": f"{jax.device_count()} x {device.platform} ({device.device_kind})",
    "date": time.strftime("%Y-%m-%d %H:%M"),
    "load": load,
    "busy": load > cores() / 4,
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
  }


def middle(values):
  """(median, smallest, largest)."""
  return statistics.median(values), min(values), max(values)
