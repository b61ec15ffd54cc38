import dataclasses
import math
import types

import pytest
from ml_collections import ConfigDict

from diffucoder_jax.data.problems import Problem
from diffucoder_jax.grpo import rewards
from diffucoder_jax.grpo.rewards import Answer, RewardConfig, strict, tolerant

GOOD = "def f(x):\n    return x + 1\n"
BAD = "def f(x)\n    return x + 1\n"
BLOCK = f"```python\n{GOOD}```"


def outcome(*tests, status="fail", integrity="isolated"):
  """What a sandbox reports, for arithmetic that needs no process."""
  return types.SimpleNamespace(tests=tests, status=status, integrity=integrity)


# What a text says ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "format", "code"), [
  (BLOCK, 1, GOOD),
  (f"Here is the code:\n{BLOCK}\nIt adds one.", 1, GOOD),
  (f"{BLOCK}\n\n", 1, GOOD),
  (f"```py\n{GOOD}```", 1, GOOD),
  (f"```\n{GOOD}```", 1, GOOD),
  (f"``` Python\r\n{GOOD}```", 1, GOOD),
  (f"Inline: ```python\n{GOOD.strip()}```.", 1, GOOD.strip()),
  (f"```bash\npip install x\n```\n{BLOCK}", 1, GOOD),
  (f"{BLOCK}\nUse:\n```python\nf(1)\n```", 1, GOOD),
  (f"```python\n{BAD}```", 0.5, BAD),
  (f"{GOOD}```python\n{BAD}```", 0.5, BAD),
  (f"```python\n{BAD}```\n{BLOCK}", 1, GOOD),
  ("```python\nx = '\0'\n```", 0.5, "x = '\0'\n"),
  ("```python\n" + "-" * 100_000 + "1\n```", 0.5, "-" * 100_000 + "1\n"),
  # No block: code that is bare, cut short, empty, or something else's.
  (GOOD, 0, GOOD),
  (f"```python\n{GOOD}", 0, GOOD),
  ("```python\n```", 0, None),
  ("```python\n# nothing\n```", 0, None),
  ("```json\n{}\n```", 0, None),
  ("I cannot.", 0, "I cannot."),
  ("", 0, ""),
  # What follows the end token is not the answer.
  (f"{BLOCK}<|im_end|>\n<|dlm_pad|><|dlm_pad|>", 1, GOOD),
  (f"```python\n{GOOD}<|im_end|>\n```\n", 0, GOOD),
  (f"<|endoftext|>{BLOCK}", 0, ""),
])  # fmt: skip
def test_tolerant(text, format, code):
  found = tolerant(text)
  assert found.format == format
  assert code is None or found.code == code


@pytest.mark.parametrize(("text", "format"), [
  (f"{BLOCK}\n", 1),
  (f"Words\nand `more`.\n{BLOCK}\n", 1),
  (f"x ```python\n{GOOD.strip()}```\n", 1),
  (f"```python\n{BAD}```\n", 0.5),
  ("```python\n```\n", 1),  # as released; it passes no test
  (BLOCK, 0),
  (f"{BLOCK}\n\n", 0),
  (f"{BLOCK}\nDone.\n", 0),
  (f"{BLOCK}\n{BLOCK}\n", 0),
  (f"````python\n{GOOD}```\n", 0),
  (f"```\n{GOOD}```\n", 0),
  (f"```py\n{GOOD}```\n", 0),
  (f"```python \n{GOOD}```\n", 0),
  (GOOD, 0),
  ("", 0),
  # Special tokens go, what they end does not: the template's newline is the one asked for.
  (f"{BLOCK}<|im_end|>\n<|dlm_pad|><|dlm_pad|>", 1),
  (f"{BLOCK}<|im_end|><|dlm_pad|>", 0),
  (f"{BLOCK}<|im_end|>\nmore", 0),
])  # fmt: skip
def test_strict_is_the_released_rule(text, format):
  found = strict(text)
  assert found.format == format
  if format:
    assert tolerant(text).format == format or not found.code
    assert found.code == text.split("```python\n")[1].split("```")[0]
  else:
    assert found.code == ""


# What it earns ------------------------------------------------------------------------------------


def test_the_sum_of_the_paper():
  config = RewardConfig()
  assert (config.weights, config.fence, config.run) == (
    {"code": 2.0, "format": 0.5}, "tolerant", "well_formed")  # fmt: skip
  answer = Answer(GOOD, 1.0)
  for tests, reward in [(("pass",) * 4, 2.5), (("fail",) * 4, 0.5),
                        (("pass", "timeout", "error", "oom"), 1.0)]:  # fmt: skip
    scored = rewards.grade(answer, outcome(*tests), config)
    assert scored.valid and scored.reward == reward
    assert scored.parts == {"code": tests.count("pass") / 4, "format": 1.0}
  assert rewards.grade(Answer(BAD, 0.5), None, config).reward == 0.25
  assert rewards.grade(Answer("", 0.0), None, config).reward == 0.0
  solved = RewardConfig(weights={"solved": 3.0, "code": 0.0})
  assert rewards.grade(answer, outcome("pass", "pass"), solved).reward == 3.0
  assert rewards.grade(answer, outcome("pass", "fail"), solved).parts == {"solved": 0, "code": 0.5}
  assert rewards.grade(answer, None, solved).reward == 0.0


@pytest.mark.parametrize("unknown", [
  outcome(status="infra"),
  outcome("infra", "infra", status="infra"),
  outcome("pass", "infra", status="fail"),
  outcome("pass", "pass", status="pass", integrity="shared"),
])  # fmt: skip
def test_an_answer_that_was_not_judged_has_no_reward(unknown):
  scored = rewards.grade(Answer(GOOD, 1.0), unknown, RewardConfig())
  assert not scored.valid and math.isnan(scored.reward) and scored.outcome is unknown
  assert all(map(math.isnan, scored.parts.values())) and scored.parts
  # A verdict that may be forged can be asked for; one that was not given cannot.
  asked = rewards.grade(Answer(GOOD, 1.0), unknown, RewardConfig(train_on_shared=True))
  assert asked.valid == (unknown.integrity == "shared")


def test_counts():
  config = RewardConfig()
  same = outcome("pass", status="pass")
  scored = [rewards.grade(Answer(GOOD, 1.0), o, config) for o in (
    same, same, outcome("timeout", status="timeout"), outcome(status="infra"),
    outcome("pass", status="pass", integrity="shared"), None,
    outcome("infra", status="infra", integrity="shared"))]  # fmt: skip
  assert rewards.counts(scored) == {
    "answers": 7, "masked": 3, "infra": 2, "shared": 1, "not_run": 1, "judged": 5,
    "judged_pass": 2, "judged_timeout": 1, "judged_infra": 2}  # fmt: skip
  assert rewards.counts([])["masked"] == 0


def test_config_comes_from_a_config_file_and_is_strict():
  section = ConfigDict({"weights": {"code": 1.0}, "fence": "strict", "run": "any"})
  config = RewardConfig(**section)
  assert config.weights == {"code": 1.0} and type(config.weights) is dict
  with pytest.raises(ValueError, match="unknown reward 'formt' in weights; known: code, solved, for"):
    RewardConfig(weights={"formt": 1.0})
  with pytest.raises(ValueError, match="finite"):
    RewardConfig(weights={"code": math.nan})
  with pytest.raises(ValueError, match="one at least"):
    RewardConfig(weights={})
  with pytest.raises(ValueError, match="fence must be one of tolerant, strict, got 'loose'"):
    RewardConfig(fence="loose")
  with pytest.raises(ValueError, match="run must be one of well_formed, any"):
    RewardConfig(run="always")
  with pytest.raises(TypeError, match="fences"):
    RewardConfig(fences="strict")


# Which answers are run ----------------------------------------------------------------------------

PROBLEM = Problem("a/1", "Add one.", "f", ("assert f(1) == 2", "assert f(0) == 1"), (), GOOD, "a",
                  prelude="import math\n")  # fmt: skip


@pytest.fixture
def sandbox_lib():
  return pytest.importorskip("diffucoder_jax.execution.sandbox")


class Counting:
  """A sandbox without processes: every program that has "+ 1" passes."""

  def __init__(self, sandbox_lib, broken=None):
    self.lib, self.broken, self.jobs = sandbox_lib, broken, []

  def run(self, jobs):
    self.jobs += jobs
    outcomes = []
    for job in jobs:
      verdict = "pass" if "+ 1" in job.code else "fail"
      made = self.lib.Outcome(status=verdict, tests=(verdict,) * len(job.tests), message="",
                              integrity=job.integrity, level="none", cpu_seconds=0.0)  # fmt: skip
      outcomes.append(made)
    return self.broken(outcomes) if self.broken else outcomes


def test_equal_answers_are_judged_once(sandbox_lib):
  other = dataclasses.replace(PROBLEM, task_id="a/2", integrity="shared")
  wrong = "```python\ndef f(x):\n    return x\n```"
  texts = [BLOCK, f"Well:\n{BLOCK}", wrong, BLOCK, GOOD, f"```python\n{BAD}```", "no"]
  sandbox = Counting(sandbox_lib)
  problems = [PROBLEM, PROBLEM, PROBLEM, other, PROBLEM, PROBLEM, PROBLEM]
  scored = rewards.score(problems, texts, sandbox, RewardConfig())
  assert [s.reward for s in scored if s.valid] == [2.5, 2.5, 0.5, 0.0, 0.25, 0.0]
  assert [s.valid for s in scored] == [True] * 3 + [False] + [True] * 3
  assert [(j.code, j.integrity) for j in sandbox.jobs] == [
    (GOOD, "isolated"), (wrong[10:-3], "isolated"), (GOOD, "shared")]  # fmt: skip
  assert {(j.entry_point, j.tests, j.prelude) for j in sandbox.jobs} == {
    ("f", PROBLEM.tests, "import math\n")}  # fmt: skip
  assert scored[0].outcome is scored[1].outcome is not scored[3].outcome
  assert rewards.counts(scored)["not_run"] == 3
  # Whatever looks like code may be run as well; what has none never is.
  sandbox = Counting(sandbox_lib)
  config = RewardConfig(run="any", train_on_shared=True)
  loose = rewards.score(problems, [*texts[:-1], ""], sandbox, config)
  assert [s.reward for s in loose] == [2.5, 2.5, 0.5, 2.5, 2.0, 2.25, 0.0]
  assert len(sandbox.jobs) == 4


def test_nothing_to_run_is_not_asked(sandbox_lib):
  sandbox = Counting(sandbox_lib)
  (scored,) = rewards.score([PROBLEM], ["no"], sandbox, RewardConfig())
  assert scored.reward == 0.0 and scored.outcome is None and not sandbox.jobs
  assert rewards.score([], [], sandbox, RewardConfig()) == []
  # The strict fence wants the newline after the end token.
  for text, reward in ((BLOCK + "<|im_end|>\n<|dlm_pad|>", 2.5), (BLOCK + "<|im_end|>", 0.0)):
    (scored,) = rewards.score([PROBLEM], [text], sandbox, RewardConfig(fence="strict"))
    assert scored.reward == reward


def test_a_sandbox_that_answers_something_else_is_refused(sandbox_lib):
  def short(outcomes):
    return [dataclasses.replace(o, tests=o.tests[:1]) for o in outcomes]

  with pytest.raises(ValueError, match="judged 1 tests of a/1, which has 2"):
    rewards.score([PROBLEM], [BLOCK], Counting(sandbox_lib, short), RewardConfig())
  with pytest.raises(ValueError):
    rewards.score([PROBLEM], [BLOCK], Counting(sandbox_lib, lambda _: []), RewardConfig())
  with pytest.raises(ValueError):
    rewards.score([PROBLEM], [], Counting(sandbox_lib), RewardConfig())
  with pytest.raises(ValueError, match="a/1 has no tests"):
    untested = dataclasses.replace(PROBLEM, tests=())
    rewards.score([untested], [BLOCK], Counting(sandbox_lib), RewardConfig())


@pytest.mark.slow
def test_a_real_sandbox(sandbox_lib):
  codes = [GOOD, "def f(x):\n    return 2\n", "def f(x):\n    raise SystemExit(0)\n",
           "import os\nos._exit(0)\n", "class T:\n    __eq__ = lambda s, o: True\n"
           "def f(x):\n    return T()\n"]  # fmt: skip
  with sandbox_lib.Sandbox() as sandbox:
    scored = rewards.score([PROBLEM] * len(codes), [f"```python\n{c}```" for c in codes], sandbox,
                           RewardConfig())  # fmt: skip
  assert [s.reward for s in scored] == [2.5, 1.5, 0.5, 0.5, 0.5]
  assert all(s.valid for s in scored)
