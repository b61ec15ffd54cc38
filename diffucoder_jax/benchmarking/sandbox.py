"""How many programs a second the sandbox judges: correct answers to a small problem with three tests.

Per second of processor time (host, fork servers, solvers and judges; the start and the self-test taken
off), which differs by a tenth between measurements, and per second of wall time.
`python -m diffucoder_jax.execution.bench` prints the same as one line.
"""

from diffucoder_jax.benchmarking import table, timing
from diffucoder_jax.execution import bench


def add_arguments(parser):
  """Flags of `bench sandbox`."""
  some = timing.at_least(1)
  parser.add_argument("--jobs", type=some, default=500, help="of each measurement")
  parser.add_argument("--workers", type=some, default=timing.cores(), help="processes that judge")
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
    _, idle, _ = bench.measure(0, args.workers, args.level)
    level, busy, seconds = bench.measure(args.jobs, args.workers, args.level)
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
