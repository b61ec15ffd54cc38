"""AceCode-87K (Zeng et al. 2025) as problems: the hard questions that coupled-GRPO is trained on.

Selected and reworded as the released `process_data.py` of DiffuCoder does, or as the paper says.
The data is TIGER-Lab/AceCode-87K on the Hugging Face hub: parquet, or jsonl with the same columns.
"""

import math
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from diffucoder_jax.data import chat
from diffucoder_jax.data.problems import Problem, entry_point_of, integrity_of
from diffucoder_jax.data.rows import read_rows

# Split -> percentiles of all questions: the mean pass rate is at most the first one, its standard
# deviation at least the second. The paper (appendix B.1) takes the bottom 20 % by mean and the top
# 40 % by variance; the released code keeps the deviations above the 40th percentile, the top 60 %.
SPLITS = {"released": (20, 40), "paper": (20, 60), "all": None}
# Difficulty is how these two did; the inferences of other models do not count.
MODELS = ("qwen_coder_2.5", "llama3_instruct")
_COLUMNS = ("id", "source", "question", "test_cases", "inferences")
_NAMES_SHOWN = 5


class Selection(NamedTuple):
  """What was read.

  Attributes:
    problems: questions in the order of the file, each followed by its completion form if it has one.
    counts: how many `records` there were; how many were `kept`, and the others by the first reason
      that applies: `broken`, `no_pass_rates` of the two models, `mean_too_high`, `std_too_low`,
      `no_tests`, `no_entry_point` (its tests call nothing). How many of the kept have a
      `completion_form`, and the others by reason: `says_you`, `no_signature`. How many of the kept
      have tests that can only be judged in the answer's process (`shared`, see `Problem`).
      `problems` in all.
    thresholds: `mean` and `std`, pass rates in [0, 1]; empty for split "all".
  """

  problems: list[Problem]
  counts: dict[str, int]
  thresholds: dict[str, float]


class _Question(NamedTuple):
  record: dict  # without its inferences, 60 kB each
  best: str  # the completion that passed most tests
  best_rate: float
  mean: float  # NaN where neither model was graded
  std: float


def read_acecode(path, split: str = "released", on_broken: str = "error") -> Selection:
  """Reads AceCode questions and keeps those of a split.

  Args:
    path: a .jsonl, .jsonl.gz or .parquet file, or a folder of them, read by name.
    split: a key of `SPLITS`.
    on_broken: "error": the first record that cannot be used stops with its name. "skip": such
      records are counted, and the first few logged.
  Returns:
    `Selection`; its counts are logged as well.
  Raises:
    FileNotFoundError: nothing there.
    ValueError: an unknown split or policy, a broken record, or no question has pass rates; names it.
  """
  if split not in SPLITS:
    raise ValueError(f"unknown AceCode split {split!r}; known: {', '.join(SPLITS)}")
  if on_broken not in ("error", "skip"):
    raise ValueError(f"on_broken must be 'error' or 'skip', got {on_broken!r}")
  names = "records kept broken no_pass_rates mean_too_high std_too_low no_tests no_entry_point "
  names += "completion_form says_you no_signature shared problems"
  counts = dict.fromkeys(names.split(), 0)
  questions = []
  for file in _files(path):
    for name, record in read_rows(file, _COLUMNS):
      counts["records"] += 1
      try:
        questions.append(_question(record))
      except ValueError as error:
        if on_broken == "error":
          raise ValueError(
            f"{name} is no AceCode record: {error}; repair it or set on_broken='skip'"
          ) from error
        counts["broken"] += 1
        if counts["broken"] <= _NAMES_SHOWN:
          logging.warning("skipped %s: %s", name, error)
  thresholds = _thresholds(questions, SPLITS[split], path)
  problems = []
  for question in questions:
    reason = _reason_to_drop(question, thresholds)
    entry_point = reason or entry_point_of(question.record["test_cases"], question.best)
    if reason or not entry_point:
      counts[reason or "no_entry_point"] += 1
      continue
    counts["kept"] += 1
    problems.append(_problem(question, entry_point))
    form, reason = completion_form(question.record["question"], question.best)
    counts[reason or "completion_form"] += 1
    if form:
      problems.append(_problem(question, entry_point, form))
    counts["shared"] += problems[-1].integrity == "shared"
  counts["problems"] = len(problems)
  logging.info("AceCode %s of %s: %s %s", split, path, counts, thresholds)
  return Selection(problems, counts, thresholds)


def completion_form(question: str, best: str) -> tuple[str, str]:
  """A question as the docstring of a function to complete (released `process_data.py`).

  Args:
    question: as AceCode asks it.
    best: the completion of it that passed most tests, whose signature is used.
  Returns:
    (prompt, ""), or ("", why not): "says_you" if the question addresses the reader, which reads ill
    in a docstring; "no_signature" if the completion does not begin with `def`.
  """
  if "you" in question.lower():
    return "", "says_you"
  signature = best.split(":\n")[0].strip()
  if not signature.startswith("def "):
    return "", "no_signature"
  quotes = '"""'
  body = f"{signature}:\n    {quotes}\n    {question}\n    {quotes}\n"
  return f"Please complete the following problem:\n```\n{body}```\n", ""


def rollout_prompt(question: str, tests) -> str:
  """What the model is asked: with the first test where no code tells what to call.

  Source: the released `grpo.py`; "code" is a fence of its own line in the question.
  """
  return question if "\n```\n" in question else f"{question}\nTest cases: {tests[0]}"


def _question(record):
  missing = [name for name in _COLUMNS if name not in record]
  if missing:
    raise ValueError(f"it has no {missing[0]!r}, only {sorted(record)}")
  texts = ("id", "source", "question")
  wrong = [name for name in texts if not isinstance(record[name], str)]
  wrong += [name for name in ("test_cases", "inferences") if not isinstance(record[name], list)]
  if wrong:
    raise ValueError(f"{wrong[0]!r} is a {type(record[wrong[0]]).__name__}")
  if not all(isinstance(test, str) for test in record["test_cases"]):
    raise ValueError("a test case is not a text")
  inferences = record["inferences"]
  try:
    rates = [x["pass_rate"] + 0.0 for x in inferences if x["model_name"] in MODELS]
    best = max(inferences, key=lambda x: x["pass_rate"], default={"completion": "", "pass_rate": 0})
    best, best_rate = best["completion"] + "", best["pass_rate"] + 0.0
  except (KeyError, TypeError) as error:
    raise ValueError(f"an inference lacks or spoils {error}") from error
  return _Question(
    {name: record[name] for name in (*texts, "test_cases")},
    best,
    best_rate,
    # numpy's, as in the released code: ties at a threshold hang on the last bit.
    float(np.mean(rates)) if rates else math.nan,
    float(np.std(rates)) if rates else math.nan,
  )


def _thresholds(questions, percentiles, path):
  if percentiles is None:
    return {}
  graded = [question for question in questions if not math.isnan(question.mean)]
  if not graded:
    raise ValueError(
      f"no question in {path} has pass rates of {' or '.join(MODELS)}; "
      "use split='all', which asks for none"
    )
  mean, std = percentiles
  return {
    "mean": float(np.percentile([question.mean for question in graded], mean)),
    "std": float(np.percentile([question.std for question in graded], std)),
  }


def _reason_to_drop(question, thresholds):
  if thresholds:
    if math.isnan(question.mean):
      return "no_pass_rates"
    if question.mean > thresholds["mean"]:
      return "mean_too_high"
    if question.std < thresholds["std"]:
      return "std_too_low"
  return "" if question.record["test_cases"] else "no_tests"


def _problem(question, entry_point, form=""):
  record = question.record
  tests = tuple(record["test_cases"])
  return Problem(
    task_id=f"acecode/{record['id']}" + ("/completion" if form else ""),
    prompt=rollout_prompt(form or record["question"], tests),
    entry_point=entry_point,
    tests=tests,
    plus_tests=(),
    # In the hard splits few completions passed everything.
    reference=chat.answer_of(question.best) if question.best_rate >= 1 else "",
    source=f"acecode/{record['source']}",
    integrity=integrity_of(tests, entry_point, question.best),
    stub=form.partition("```\n")[2].removesuffix("```\n"),
  )


def _files(path):
  found = epath.Path(path)
  if not found.is_dir():
    return [found]
  endings = (".jsonl", ".jsonl.gz", ".parquet")
  files = sorted(file for file in found.iterdir() if file.name.endswith(endings))
  if not files:
    raise FileNotFoundError(f"no {', '.join(endings)} file in {path}")
  return files
