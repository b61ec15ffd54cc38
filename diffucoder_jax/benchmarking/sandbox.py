"""How many programs a second the sandbox judges: correct answers to a small problem with three tests.

Per second of processor time (host, fork servers, solvers and judges; the start and the self-test taken
off), which differs by a tenth between measurements, and per second of wall time.
Seen with --workers 1 on a 2-core x86-64 VM, otherwise idle, Linux 6.18, Python 3.11, 2026-11-22: medians
of 128 per processor second at level full in the machine's quick phases and of 95 in its slow ones; a
plain prototype of the same walls, in turn with it in a slow phase, 70 against 89.
"""

import resource
import time

from diffucoder_jax.benchmarking import table, timing
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


def add_arguments(parser):
  """Flags of `bench sandbox`."""
  parser.add_argument("--jobs", type=int, default=500, help="of each measurement")
  parser.add_argument("--workers", type=int, default=timing.cores(), help="processes that judge")
  parser.add_argument(
    "--level",
    default="auto",
    choices=("auto", "full", "no-userns"),
    help="of isolation; auto: the best there is",
  )


def run(args):
  """Judges `--jobs` copies of a right answer, `--repeats` times; returns a `table.Table`."""
  processor, wall = [], []
  for _ in range(args.repeats):
    _, idle, _ = measure(0, args.workers, args.level)
    level, busy, seconds = measure(args.jobs, args.workers, args.level)
    processor.append(busy - idle)
    wall.append(seconds)
  row = {
    "programs": args.jobs, "level": level, "workers": args.workers, "seconds": wall,
    "per_second": timing.rates(args.jobs, wall), "processor_seconds": processor,
    "per_processor_second": timing.rates(args.jobs, processor),
  }  # fmt: skip
  notes = [
    table.repeated(args.repeats),
    "Each in a sandbox of its own; all programs were judged right. Processor seconds are those of all "
    "its processes, its start taken off.",
  ]
  return table.Table("sandbox: a right answer to a small problem, three tests", [row], notes)


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
