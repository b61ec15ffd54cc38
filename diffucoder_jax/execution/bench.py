"""How many programs a second are judged: `python -m diffucoder_jax.execution.bench`.

Prints, for a correct answer to a small problem with three tests, judged programs per second of
processor time (host, fork servers, solvers and judges; the start and the self-test taken off) and
per second of wall time. Measured with --workers 1 on a 2-core x86-64 VM that others kept busy (load
6.5), Linux 6.18, Python 3.11, 2026-11-21: 122 per processor second at level full, 126 at no-userns.
"""

import argparse
import platform
import resource
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
  parser.add_argument("--jobs", type=int, default=1000)
  parser.add_argument("--workers", type=int, default=None, help="default: one per core")
  parser.add_argument("--level", default="auto", choices=("auto", "full", "no-userns"))
  args = parser.parse_args()
  _, idle, _ = measure(0, args.workers, args.level)
  level, busy, wall = measure(args.jobs, args.workers, args.level)
  used = busy - idle
  print(
    f"{args.jobs} programs, 3 tests each, level {level}: {args.jobs / used:.0f} per processor second"
    f" ({1000 * used / args.jobs:.1f} ms each), {args.jobs / wall:.0f} per second of wall time;"
    f" {platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
  )


if __name__ == "__main__":
  main()
