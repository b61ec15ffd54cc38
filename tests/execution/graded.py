"""An answer for whatever a network writes, so that RL of an untrained one has verdicts to learn from.

The fence "graded" makes a program of any text: its checksum decides how many of the tests it passes,
and so does `worth` for who wants to know what the sandbox should say. As a program this is
`train_grpo` with that fence, on the same arguments:

  python -m tests.execution.graded --config=... --workdir=... --config.reward.fence=graded

With the variable GRADED_TOLD it also appends to that file which part of a round it begins and ends.
"""

import functools
import os
import runpy
import sys
import zlib

from diffucoder_jax.data.problems import Problem, write_problems
from diffucoder_jax.grpo import rewards

COUNT = 4  # tests of a problem; the answer's argument is the number of the test
TESTS = tuple(f"assert f({i}) == {i}" for i in range(COUNT))


def worth(text):
  """How many of the tests the answer for a text passes: the first ones."""
  return zlib.crc32(text.encode(errors="replace")) % (COUNT + 1)


def program(text, before=""):
  """The answer for a text; `before` are lines of its function that are run first."""
  lines = "".join(f"  {line}\n" for line in before.splitlines())
  checksum = zlib.crc32(text.encode(errors="replace"))  # so that answers differ
  return f"def f(x):  # {checksum:08x}\n{lines}  return x if x < {worth(text)} else -1\n"


def verdicts(text):
  """What the sandbox says of `program(text)`."""
  return ["pass"] * worth(text) + ["fail"] * (COUNT - worth(text))


def fence(text, before="import time; time.sleep(0.02)"):
  """As those in `rewards.FENCES`."""
  return rewards.Answer(program(text, before), 1.0)


def write(folder, train=6, test=4):
  """Problems in train.jsonl and test.jsonl; they only differ in what is asked."""
  for name, count in (("train", train), ("test", test)):
    problems = [
      Problem(f"{name}/{i}", f"Write f, number {i}.", "f", TESTS, (), program(""), "graded")
      for i in range(count)
    ]
    write_problems(problems, folder / f"{name}.jsonl")


def settings(start, folder, **changes):
  """Flat overrides of configs/grpo_7b.py: rounds of 2 prompts x 4 answers, 2 steps each."""
  return {
    "problems.set": "problems", "problems.split": "", "rollout.system": "", "sampler.top_p": 1.0,
    "optim.accumulate": 1, "init_from": str(start), "problems.path": str(folder / "train.jsonl"),
    "problems.eval_path": str(folder / "test.jsonl"), "reward.fence": "graded",
    "rollout.max_prompt_tokens": 110, "sampler.max_new_tokens": 16, "sampler.steps": 4,
    "sampler.temperature": 1.0, "grpo.prompts": 2, "grpo.num_generations": 4,
    "grpo.num_iterations": 2, "grpo.ref_every": 3, "optim.steps": 6, "optim.lr": 1e-2,
    "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.clip_norm": 1.0,
    "checkpoint.every": 1, "checkpoint.keep": 9, "eval.every": 0, "eval.problems": 4, **changes,
  }  # fmt: skip


def _telling(path, name, function):
  @functools.wraps(function)
  def told(*args, **kwargs):
    for line in (f"{name}\n", f"after {name}\n"):
      with open(path, "a") as file:  # a line at once, so that a kill leaves whole ones
        file.write(line)
      if line == f"{name}\n":
        result = function(*args, **kwargs)
    return result

  return told


def main():
  """Runs the real program in this process."""
  rewards.FENCES["graded"] = fence
  path = os.environ.get("GRADED_TOLD")
  if path:
    from diffucoder_jax.grpo import rollout
    from diffucoder_jax.grpo.rounds import Rounds
    from diffucoder_jax.runtime import checkpoint

    for owner, name, word in (
      (rollout, "sample", "sampling"), (rewards, "score", "judging"),
      (Rounds, "solved", "evaluating"), (checkpoint, "save", "saving"),
    ):  # fmt: skip
      setattr(owner, name, _telling(path, word, getattr(owner, name)))
  sys.argv[0] = "train_grpo"
  runpy.run_module("diffucoder_jax.train_grpo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
