"""Signs of life: a program that hangs is ended, and a host that is slower than the others is named.

In a collective every host waits for the slowest one, so their steps all take the same time. What
tells them apart is the time that a host spends on its own, outside the waiting: reading and placing
batches, judging answers.
"""

import faulthandler
import statistics
import sys
import threading
import time

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffucoder_jax.runtime import hosts


class Heartbeat:
  """Told of each step by `beat`. A context manager; its thread ends with it.

  Attributes: step: the last one; None before the first. own: seconds that this host spent on its own
    since the last `report`, in `steps` steps.
  """

  def __init__(self, limit):
    """Args: limit: seconds without a finished step after which the process ends; 0: never. The first
    step may take three times as long, since it compiles. Work that is no step calls `beat` as well."""
    self.limit, self.own = limit, 0.0
    self.steps, self.step = 0, None
    self._told = None  # of the last report: on its way
    self._last, self._done = time.monotonic(), threading.Event()
    self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

  def __enter__(self):
    if self.limit:
      self._thread.start()
    return self

  def __exit__(self, *unused):
    self._done.set()

  def beat(self, step, own=None):
    """A step is done, in which this host spent `own` seconds on its own; None: work between steps."""
    if own is not None:
      self.steps, self.own = self.steps + 1, self.own + own
    self.step, self._last = step, time.monotonic()

  def report(self):
    """What hosts spent on their own a step; all processes call it.

    What they say now is sent, and what they said at the call before is returned: to wait for it would
    be to wait for the step that is running.

    Returns:
      {"hosts/own_seconds": mean over hosts, "hosts/own_seconds_slowest"}; {} at the first call, and
      with one process.
    """
    mine, told = self.own / max(1, self.steps), self._told
    self.own, self.steps = 0.0, 0
    self._told = to_all(mine) if jax.process_count() > 1 else None
    if told is None:
      return {}
    everywhere = by_process(told)
    slowest = max(range(len(everywhere)), key=everywhere.__getitem__)
    if straggles(everywhere):
      logging.warning(
        "process %d is slow: it spends %.2f s a step on its own (reading, judging), where half of the "
        "processes spend at most %.2f s; the others wait for it",
        slowest, everywhere[slowest], statistics.median(everywhere),
      )  # fmt: skip
    mean = statistics.fmean(everywhere)
    return {"hosts/own_seconds": mean, "hosts/own_seconds_slowest": everywhere[slowest]}

  def _watch(self):
    while not self._done.wait(min(1.0, self.limit / 4)):
      quiet = time.monotonic() - self._last
      if quiet > self.limit * (3 if self.step is None else 1):
        where = "before its first step" if self.step is None else f"after step {self.step}"
        faulthandler.dump_traceback(sys.stderr)
        hosts.end(
          f"{hosts.name()} hangs {where}: nothing has finished for {quiet:.0f} s "
          "(hosts.hang_seconds). What each thread was doing stands above. Start all processes again "
          "with the same command; they go on from the last checkpoint"
        )


def to_all(number):
  """Sends a process's number to all others, without waiting. Returns float32 [devices], replicated."""
  # Over all devices, in an order that all processes know, whatever the program's mesh is.
  mesh = Mesh(np.asarray(jax.devices()), ("device",))
  own = np.full(jax.local_device_count(), number, np.float32)
  with jax.set_mesh(mesh):
    sent = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("device")), own)
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(sent)


def by_process(numbers):
  """The numbers of `to_all`, one for each process, list of floats; waits until they have come."""
  found = {d.process_index: float(x) for d, x in zip(jax.devices(), np.asarray(numbers), strict=True)}
  return [found[i] for i in sorted(found)]


def straggles(seconds):
  """Whether the slowest host spends more than twice what half of them spend, and over a tenth of a
  second more."""
  typical = statistics.median(seconds)
  return max(seconds) > 2 * typical and max(seconds) > typical + 0.1
