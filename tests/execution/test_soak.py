"""Thousands of jobs on the same fork servers: no wrong verdict, and nothing grows."""

import os
import resource

import pytest

from diffucoder_jax.execution.sandbox import Job, Limits

pytestmark = pytest.mark.slow

TESTS = ("assert f(2) == 4", "assert f([1]) == [1, 1]", "assert f('a') == 'aa'")
KINDS = {  # what a program does: the verdicts it must get
  "return x * 2": ("pass", "pass", "pass"),
  "return x * 3": ("fail", "fail", "fail"),
  "return x * (2 if x != 'a' else 3)": ("pass", "pass", "fail"),
  "return y": ("error", "error", "error"),
  "return x * (1 << 40)": ("fail", "oom", "oom"),
  "import os; os._exit(0)": ("killed", "killed", "killed"),
  "import os\n  if x == 2: os._exit(0)\n  return x * 2": ("killed", "pass", "pass"),
  "open('/tmp/a', 'w').close()\n  return x * 2": ("pass", "pass", "pass"),
  "import sys; sys.exit(0)": ("error", "error", "error"),
  "x = [x] * 100000\n  return x[0] * 2": ("pass", "pass", "pass"),
}


def descendants(pid):
  yield pid
  with open(f"/proc/{pid}/task/{pid}/children") as f:
    for child in f.read().split():
      yield from descendants(int(child))


def footprint(box):
  """(processes, descriptors of host and fork servers, their resident kilobytes)."""
  pids = [os.getpid(), *(p for root in box.pids for p in descendants(root))]
  fds = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
  kilobytes = 0
  for pid in pids[1:]:
    with open(f"/proc/{pid}/status") as f:
      kilobytes += sum(int(x.split()[1]) for x in f if x.startswith("VmRSS"))
  return len(pids), fds, kilobytes


def test_two_thousand_jobs(sandbox_or_skip):
  with sandbox_or_skip(workers=2, level="full", limits=Limits(wall_seconds=60)) as box:
    kinds = list(KINDS)
    jobs = [Job(f"def f(x):\n  {kinds[i % len(kinds)]}", "f", TESTS) for i in range(2000)]
    box.run(jobs[:100])  # everything that is made once is there
    before, host = footprint(box), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = box.run(jobs)
    after = footprint(box)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - host
  print(f"(processes, descriptors, kB) before {before}, after {after}; host grew by {grown} kB")
  wrong = [
    (job.code, outcome)
    for job, outcome in zip(jobs, outcomes, strict=True)
    if outcome.tests != KINDS[job.code.removeprefix("def f(x):\n  ")]
  ]
  assert not wrong, wrong[:3]
  assert after[:2] == before[:2]
  assert after[2] < before[2] + 2048 and grown < 32768
