"""Rewards: what an answer earns by its form and by the tests that it passes (paper, appendix B.1).

    reward = 2.0 * share of tests passed + 0.5 * format

An answer that could not be judged has no reward at all, rather than none of the points: it is
masked, and counted.
"""

import ast
import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffucoder_jax.data import chat
from diffucoder_jax.data.problems import Problem

# What ends an answer, where special tokens were decoded as text.
ENDS = (chat.END, chat.PAD, "<|endoftext|>")
# A block of whatever language, closed.
_BLOCK = re.compile(r"```[ \t]*([\w+#.-]*)[ \t]*\r?\n(.*?)```", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")
# All of a text is one block, after words and before one newline.
_STRICT = re.compile(r"(?:(?!```).)*```python\n((?:(?!```).)*)```\n", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """How answers are rewarded.

  Attributes:
    weights: name in `REWARDS` -> its factor. The recipe: code 2.0, format 0.5.
    fence: a key of `FENCES`: what counts as a fenced block.
    run: "well_formed": only an answer whose format reward is 1 is run, as released; the others pass
      no test. "any": whatever looks most like code is run.
    train_on_shared: keep rewards that were judged in the answer's own process ("shared"), where it
      could have reached the verdict.
  """

  weights: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {"code": 2.0, "format": 0.5}
  )
  fence: str = "tolerant"
  run: str = "well_formed"
  train_on_shared: bool = False

  def __post_init__(self):
    object.__setattr__(self, "weights", dict(self.weights))
    unknown = [name for name in self.weights if name not in REWARDS]
    if unknown:
      raise ValueError(f"unknown reward {unknown[0]!r} in weights; known: {', '.join(REWARDS)}")
    wrong = [name for name, weight in self.weights.items() if not math.isfinite(weight)]
    if wrong or not self.weights:
      raise ValueError(f"the weights must be finite numbers, and one at least: {self.weights}")
    for key, known in (("fence", tuple(FENCES)), ("run", ("well_formed", "any"))):
      if getattr(self, key) not in known:
        raise ValueError(f"{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}")


class Answer(NamedTuple):
  """What a text says: `code`, and `format`: 1 a block that parses, 0.5 one that does not, 0 none."""

  code: str
  format: float


@dataclasses.dataclass(frozen=True)
class Scored:
  """What an answer earned.

  Attributes:
    reward: the weighted sum of the parts; NaN if not valid.
    parts: each reward before its weight; NaN if not valid.
    code: the code found in the text, run or not.
    outcome: the sandbox's, with the status of every test; None if the code was not run.
    valid: False if nobody knows what the answer is worth: the sandbox failed ("infra"), or the
      verdict is not trusted ("shared"). Leave such rows out of the loss and of the group's mean.
  """

  reward: float
  parts: dict[str, float]
  code: str
  outcome: Any
  valid: bool


def score(
  problems: Sequence[Problem], texts: Sequence[str], sandbox, config: RewardConfig
) -> list[Scored]:
  """Scores answers. Equal code for the same problem is run once.

  Args:
    problems: one for each text; repeated for the G answers to a prompt.
    texts: what was written, cut at the end token or with special tokens as text (`ENDS`); after the
      primer, if the prompt ended with one. Fence "strict" wants special tokens and what follows.
    sandbox: an `execution.sandbox.Sandbox`, or whatever has its `run`.
    config: `RewardConfig`.
  Returns:
    a `Scored` for each text.
  Raises:
    ValueError: a problem without tests, or the sandbox answers something else than it was asked.
  """
  from diffucoder_jax.execution.sandbox import Job

  answers = [FENCES[config.fence](text) for text in texts]
  pairs = list(zip(problems, answers, strict=True))
  for problem in problems:
    if not problem.tests:
      raise ValueError(f"{problem.task_id} has no tests, so nothing tells its answers apart")
  wanted = dict.fromkeys((p, a.code) for p, a in pairs if _is_run(a, config))
  jobs = [Job(code, p.entry_point, p.tests, p.prelude, p.integrity) for p, code in wanted]
  outcomes = dict(zip(wanted, sandbox.run(jobs) if jobs else [], strict=True))
  for (problem, _), outcome in outcomes.items():
    if not _is_infra(outcome) and len(outcome.tests) != len(problem.tests):
      raise ValueError(
        f"the sandbox judged {len(outcome.tests)} tests of {problem.task_id}, which has "
        f"{len(problem.tests)}"
      )
  return [grade(a, outcomes[p, a.code] if _is_run(a, config) else None, config) for p, a in pairs]


def grade(answer: Answer, outcome, config: RewardConfig) -> Scored:
  """The reward of an answer, given its outcome or None if it was not run."""
  shared = outcome is not None and outcome.integrity == "shared"
  valid = not _is_infra(outcome) and (config.train_on_shared or not shared)
  parts = {name: REWARDS[name](answer, outcome) if valid else math.nan for name in config.weights}
  reward = sum(weight * parts[name] for name, weight in config.weights.items())
  return Scored(reward, parts, answer.code, outcome, valid)


def counts(scored: Sequence[Scored]) -> dict[str, int]:
  """How many answers there are: `answers`; `masked`, of them `infra` and `shared`; `not_run`; and
  `judged`, runs after equal answers were joined, each by its status as in `judged_timeout`."""
  found = collections.Counter(answers=len(scored), masked=0, infra=0, shared=0, not_run=0, judged=0)
  for one in scored:
    found["not_run"] += one.outcome is None
    if not one.valid:
      found["masked"] += 1
      found["infra" if _is_infra(one.outcome) else "shared"] += 1
  runs = {id(one.outcome): one.outcome for one in scored if one.outcome is not None}
  found["judged"] = len(runs)
  found.update(f"judged_{outcome.status}" for outcome in runs.values())
  return dict(found)


def tolerant(text: str) -> Answer:
  """The answer in a text up to its end token: a closed block of Python wherever it stands.

  Which code is taken is `chat.answer_of`'s choice, as in evaluation. A block without a statement is
  none: it would be the cheapest way to a format reward.
  """
  text = text[: min((i for i in map(text.find, ENDS) if i >= 0), default=len(text))]
  blocks = [m for m in _BLOCK.finditer(text) if m[1].lower() in _PYTHON and _statements(m[2]) != 0]
  # From the first block on: a program before it is no answer to a format of blocks.
  code = chat.answer_of(text[blocks[0].start() :] if blocks else text)
  if blocks and not _statements(code):  # fences that do not stand on lines of their own
    code = next((m[2] for m in blocks if _statements(m[2])), blocks[0][2])
  return Answer(code, (1.0 if _statements(code) else 0.5) if blocks else 0.0)


def strict(text: str) -> Answer:
  """The answer as the released code wants it: nothing after the block but one newline.

  The newline is the one that the chat template puts after `<|im_end|>`, so that the text is taken
  with all that follows the end token, only the special tokens are removed.
  Source: `get_code_format_reward` and `extract_code` of the released rewards.py.
  """
  for special in ENDS:
    text = text.replace(special, "")
  block = _STRICT.fullmatch(text)
  if not block:
    return Answer("", 0.0)
  return Answer(block[1], 0.5 if _statements(block[1].strip()) is None else 1.0)


# Name -> function from a text to `Answer`.
FENCES = {"tolerant": tolerant, "strict": strict}


def _code(_, outcome):
  """Share of the tests passed."""
  return 0.0 if outcome is None else outcome.tests.count("pass") / len(outcome.tests)


def _solved(_, outcome):
  """1 if every test is passed."""
  return float(outcome is not None and set(outcome.tests) == {"pass"})


def _format(answer, _):
  """1: a fenced block that parses; 0.5: one that does not; 0: none."""
  return answer.format


# Name -> function of (answer, outcome or None if it was not run), which gives a number.
REWARDS = {"code": _code, "solved": _solved, "format": _format}


def _is_infra(outcome):
  return outcome is not None and (outcome.status == "infra" or "infra" in outcome.tests)


def _is_run(answer, config):
  return bool(answer.code.strip()) and (config.run == "any" or answer.format == 1)


def _statements(code):
  """How many statements; None if it does not parse."""
  try:
    return len(ast.parse(code).body)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None
