"""How many programs a second are judged: `python -m diffucoder_jax.execution.bench`.

Prints, for a correct answer to a small problem with three tests, judged programs per second of
processor time (host, fork servers, solvers and judges; the start and the self-test taken off) and
per second of wall time: the median of several measurements, which differ by a tenth, and their range.
Seen with --workers 1 on a 2-core x86-64 VM, otherwise idle, Linux 6.18, Python 3.11, 2026-11-22: medians
of 128 per processor second at level full in the machine's quick phases and of 95 in its slow ones; a
plain prototype of the same walls, in turn with it in a slow phase, 70 against 89.
"""

import argparse
import platform
import resource
import statistics
import time

from diffucoder_jax.execution.sandbox import Job, Sandbox

ANSWER = '''
def sorted_unique(values):
  """The values in order, each once."""
  return sorted(set(values))
'''
JOB = Job(
  code=ANSWER,
  entry_point="sorted_unique",
  tests=(
    "assert sorted_unique([3, 1, 2, 3]) == [1, 2, 3]",
    "assert sorted_unique([]) == []",
    "assert sorted_unique(list(range(50)) * 2) == list(range(50))",
  ),
)


def _processor_seconds():
  uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(use.ru_utime + use.ru_stime for use in uses)


def measure(jobs, workers, level):
  """Judges `jobs` copies; returns (level, processor seconds, wall seconds), children included."""
  before = _processor_seconds()
  with Sandbox(workers=workers, level=level) as box:
    start = time.perf_counter()
    outcomes = box.run([JOB] * jobs)
    wall = time.perf_counter() - start
  wrong = [outcome for outcome in outcomes if outcome.status != "pass"]
  assert not wrong, wrong[0]
  return box.level, _processor_seconds() - before, wall  # children count once they are reaped


def main():
  """Measures and prints one line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--jobs", type=int, default=500, help="of each measurement")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--workers", type=int, default=None, help="default: one per core")
  parser.add_argument("--level", default="auto", choices=("auto", "full", "no-userns"))
  args = parser.parse_args()
  per_cpu, per_wall = [], []
  for _ in range(args.repeats):
    _, idle, _ = measure(0, args.workers, args.level)
    level, busy, wall = measure(args.jobs, args.workers, args.level)
    per_cpu.append(args.jobs / (busy - idle))
    per_wall.append(args.jobs / wall)
  print(
    f"{args.repeats} x {args.jobs} programs, 3 tests each, level {level}: "
    f"{statistics.median(per_cpu):.0f} per processor second ({min(per_cpu):.0f} to "
    f"{max(per_cpu):.0f}), {statistics.median(per_wall):.0f} per second of wall time; "
    f"{platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
  )


if __name__ == "__main__":
  main()
