import json
import random

import pytest

from diffucoder_jax.data import acecode, chat, instructions, problems
from diffucoder_jax.data.problem_sets import load_problems

SHORT = {"question": "Write add that sums a and b.", "test_cases": ["assert add(1, 2) == 3"]}


def inference(model, rate, completion="def add(a, b):\n    return a + b\n"):
  return {"model_name": model, "completion_id": 0, "completion": completion, "pass_rate": rate}


def record(i, rates=(0.0, 1.0), **fields):
  """An AceCode record; `rates` are of the two models in turn."""
  models = ("qwen_coder_2.5", "llama3_instruct")
  made = [inference(models[j % 2], rate) for j, rate in enumerate(rates)]
  return {"id": f"oss_{i}", "source": "oss", "inferences": made, "context_messages": [],
          **SHORT, **fields}  # fmt: skip


def write(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def percentile(values, q):
  """By its definition: linear between the two neighbours of rank q (n - 1) / 100."""
  ranked = sorted(values)
  rank = q * (len(ranked) - 1) / 100
  below = min(int(rank), len(ranked) - 2)
  return ranked[below] + (rank - below) * (ranked[below + 1] - ranked[below])


@pytest.mark.parametrize(("split", "std_at_least"), [("released", 40), ("paper", 60)])
def test_the_hard_split_by_its_definition(tmp_path, split, std_at_least):
  draw = random.Random(0)
  rates = [  # half of the questions are passed by luck, the others in part whenever they are tried
    [draw.uniform(0.9, 1) * (draw.random() < k / 300 if k % 2 else k / 300) for _ in range(16)]
    for k in range(300)
  ]
  draw.shuffle(rates)
  records = [record(i, r) for i, r in enumerate(rates)]
  for r in records:  # other models are not asked, whatever they passed
    r["inferences"].append(inference("somebody_else", draw.random()))
  means = [sum(r) / 16 for r in rates]
  stds = [(sum((x - m) ** 2 for x in r) / 16) ** 0.5 for r, m in zip(rates, means, strict=True)]
  # Both percentiles are over all questions, the second is not over what the first left.
  hard = [i for i in range(300) if means[i] <= percentile(means, 20)]
  expected = [i for i in hard if stds[i] >= percentile(stds, std_at_least)]
  assert 0 < len(expected) < len(hard) == 60

  found = acecode.read_acecode(write(tmp_path / "a.jsonl", records), split)
  ids = [p.task_id for p in found.problems]
  assert [i for i in ids if not i.endswith("/completion")] == [f"acecode/oss_{i}" for i in expected]
  n = len(expected)
  assert {k: v for k, v in found.counts.items() if v} == {
    "records": 300, "kept": n, "mean_too_high": 240, "std_too_low": 60 - n,
    "completion_form": n, "problems": 2 * n}  # fmt: skip
  assert found.thresholds["mean"] == pytest.approx(percentile(means, 20), rel=1e-12)
  assert found.thresholds["std"] == pytest.approx(percentile(stds, std_at_least), rel=1e-12)


def test_the_paper_keeps_fewer_than_the_released_code(tmp_path):
  rates = [[k / 100 + k % 7 / 10, k / 100] for k in range(100)]
  path = write(tmp_path / "a.jsonl", [record(i, r) for i, r in enumerate(rates)])
  released, paper, everything = (
    {p.task_id for p in load_problems("acecode", path, split)} for split in acecode.SPLITS
  )
  assert paper < released < everything and len(everything) == 200
  assert {p.task_id for p in load_problems("acecode", path)} == released


def test_ties_at_a_threshold_are_kept(tmp_path):
  path = write(tmp_path / "a.jsonl", [record(i, (0.1, 0.3)) for i in range(7)])
  assert acecode.read_acecode(path, "paper").counts["kept"] == 7


def test_prompts_are_the_released_ones(tmp_path):
  best = "def add(a, b):\n    if a:\n        return a + b\n    return b\n"
  mixed = [inference("qwen_coder_2.5", 0.5, "x = 1\n"), inference("other", 1.0, best),
           inference("other", 1.0, "def late(): pass\n")]  # fmt: skip
  path = write(tmp_path / "a.jsonl", [record(0, inferences=mixed)])
  plain, form = acecode.read_acecode(path, "all").problems
  assert plain.prompt == "Write add that sums a and b.\nTest cases: assert add(1, 2) == 3"
  # As released: the first of the best completions, of whatever model, gives the signature, and
  # the form with its code gets no test.
  assert form.prompt == (
    "Please complete the following problem:\n```\ndef add(a, b):\n"
    '    """\n    Write add that sums a and b.\n    """\n```\n'
  )
  assert form.stub == 'def add(a, b):\n    """\n    Write add that sums a and b.\n    """\n'
  assert (plain.task_id, form.task_id) == ("acecode/oss_0", "acecode/oss_0/completion")
  for p in (plain, form):
    assert (p.entry_point, p.tests, p.source) == ("add", ("assert add(1, 2) == 3",), "acecode/oss")
    assert p.reference == best and p.plus_tests == ()


def test_which_questions_get_a_completion_form():
  form = acecode.completion_form
  assert form("Are You there?", "def f(x):\n  pass")[1] == "says_you"
  assert form("In your youth.", "def f(x):\n  pass")[1] == "says_you"
  assert form("Add.", "from typing import List\n\ndef f(x):\n  pass")[1] == "no_signature"
  assert form("Add.", "")[1] == "no_signature"
  prompt, reason = form("Add.", "\n def f(x: int) -> int:\n  pass")
  assert not reason and "```\ndef f(x: int) -> int:\n" in prompt
  # One line: the released code cuts at the first colon that ends a line.
  assert "\ndef f(x): return x:\n" in form("Add.", "def f(x): return x")[0]


def test_a_question_with_code_of_its_own_gets_no_test():
  question = "Complete:\n```\ndef f(x):\n```\n"
  assert acecode.rollout_prompt(question, ["assert f(1)"]) == question
  python = "Complete:\n```python\ndef f(x):\n```"
  assert acecode.rollout_prompt(python, ["t0", "t1"]) == python + "\nTest cases: t0"


def test_everything_dropped_is_counted(tmp_path):
  records = [
    record(0),
    record(1, inferences=[inference("somebody_else", 0.5)]),
    record(2, test_cases=[]),
    record(3, test_cases=["assert 1 + 1 == 2"]),
    record(4, question="You add.", test_cases=["assert add(Pair(1, 2)) == 3"]),
    record(5, inferences=[inference("llama3_instruct", 0.5, "# none\n")]),
  ]
  path = write(tmp_path / "a.jsonl", records)
  found = acecode.read_acecode(path, "all")
  assert {k: v for k, v in found.counts.items() if v} == {
    "records": 6, "kept": 4, "no_tests": 1, "no_entry_point": 1, "completion_form": 2,
    "says_you": 1, "no_signature": 1, "shared": 1, "problems": 6}  # fmt: skip
  assert found.thresholds == {}
  assert acecode.read_acecode(path, "released").counts["no_pass_rates"] == 1
  assert [p.task_id for p in found.problems if p.integrity == "shared"] == ["acecode/oss_4"]
  # Nobody passed all tests of number 5, so that it has no reference: no instruction data.
  last = found.problems[-1]
  assert (last.task_id, last.entry_point, last.reference) == ("acecode/oss_5", "add", "")
  written = tmp_path / "p.jsonl"
  problems.write_problems(found.problems, written)
  assert problems.read_problems(written) == found.problems
  kept, broken = instructions.read_conversations(written, "opencoder", on_broken="skip")
  assert len(kept) == len(broken) == 3
  assert chat.answer_of(kept[0].messages[1]["content"]) == found.problems[0].reference


def test_broken_records_are_named_or_counted(tmp_path):
  good, bad = record(0), [record(1, question=None), record(2, test_cases="assert add"), {"id": "3"},
                          record(4, inferences=[{"model_name": "llama3_instruct"}]),
                          record(5, inferences=[inference("llama3_instruct", None)]),
                          record(6, test_cases=[1])]  # fmt: skip
  path = write(tmp_path / "a.jsonl", [good, *bad])
  with pytest.raises(ValueError, match="a.jsonl:2 is no AceCode record: 'question' is a NoneType"):
    acecode.read_acecode(path)
  found = acecode.read_acecode(path, "all", on_broken="skip")
  assert (found.counts["broken"], found.counts["kept"]) == (6, 1)
  with pytest.raises(ValueError, match="unknown AceCode split 'hard'; known: released, paper, all"):
    acecode.read_acecode(path, "hard")
  with pytest.raises(ValueError, match="on_broken must be"):
    acecode.read_acecode(path, on_broken="maybe")
  write(path, [record(0, rates=())])
  with pytest.raises(ValueError, match="no question in .* has pass rates of qwen_coder_2.5"):
    acecode.read_acecode(path)
  assert load_problems("acecode", path, "all")[0].reference == ""


def test_a_folder_of_parquet_reads_as_its_jsonl(tmp_path):
  arrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
  records = [record(i, (i / 40, i % 3 / 3)) for i in range(40)]
  for n, part in enumerate((records[:25], records[25:])):
    table = arrow.Table.from_pylist(part)
    parquet.write_table(table, tmp_path / f"train-0000{n}-of-00002.parquet")
  read = acecode.read_acecode(tmp_path, "released")
  assert read == acecode.read_acecode(write(tmp_path / "all.jsonl", records).rename(
    tmp_path.parent / "all.jsonl"), "released")  # fmt: skip
  assert read.counts["kept"] > 1
