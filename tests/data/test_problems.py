import collections
import dataclasses
import gzip
import json
import subprocess
import sys

import pytest

from diffucoder_jax.data import chat, instructions, problems, toy_problems
from diffucoder_jax.data import rows as rows_lib
from diffucoder_jax.data.problems import Problem
from diffucoder_jax.data.tokenizer import train_sentencepiece

# Runs (answer, tests) pairs; prints how many tests of each pass.
JUDGE = """
import json, sys
for answer, tests in json.load(sys.stdin):
  names, passed = {}, 0
  exec(answer, names)
  for test in tests:
    try:
      exec(test, names)
      passed += 1
    except Exception:
      pass
  print(passed)
"""


def judge(pairs):
  """How many of its tests each answer passes; the answers are ours, so no sandbox."""
  done = subprocess.run([sys.executable, "-I", "-c", JUDGE], input=json.dumps(list(pairs)),
                        capture_output=True, text=True, check=True, timeout=60)
  return [int(line) for line in done.stdout.split()]


def all_tests(problem):
  return [*problem.tests, *problem.plus_tests]


@pytest.fixture(scope="module")
def toys():
  return toy_problems.make_problems()


def test_every_reference_passes_its_asserts(toys):
  # The expected values come from functions that the references know nothing of.
  made = [*toys[0], *toys[1]]
  passed = judge((p.reference, ["\n".join(all_tests(p))]) for p in made)
  assert passed == [1] * len(made)
  assert judge((chat.answer_of(p.answer), all_tests(p)) for p in made[::100]) == [8] * 32


def test_numbers_and_shape(toys):
  train, test = toys
  assert (len(train), len(test)) == (3000, 200)
  ids = [p.task_id for p in (*train, *test)]
  assert len(set(ids)) == 3200 and ids[0] == "toy/train/0" and ids[-1] == "toy/test/199"
  for p in (*train, *test):
    assert p.source == "toy" and len(p.tests) == 3 and len(p.plus_tests) == 5
    assert len(set(all_tests(p))) == 8
    description, signature = p.prompt.split("\n")
    assert description.startswith("Take ") and description.endswith(".") and "{" not in description
    assert signature.startswith(f"def {p.entry_point}(") and p.reference.startswith(signature + "\n")
  kinds = collections.Counter(p.prompt.split("(")[1] for p in test)
  assert set(kinds) == {p.prompt.split("(")[1] for p in train} and min(kinds.values()) >= 3


def test_train_and_test_share_no_question_and_no_function(toys):
  train, test = toys

  def behaviour(p):
    """What the reference computes on all inputs of its kind, found by running it."""
    names = {}
    exec(p.reference, names)
    argument = p.reference.split("(")[1].split(")")[0]
    kind = next(k for k, known in toy_problems.ARGUMENTS.items() if argument == known)
    function, inputs = names[p.entry_point], toy_problems.INPUTS[kind]
    return kind, tuple(repr(function(*x) if kind == "pair" else function(x)) for x in inputs)

  behaviours = [behaviour(p) for p in (*train, *test)]
  assert len(set(behaviours)) == len(behaviours)  # also within each side
  descriptions = [p.prompt.split(".\n")[0] for p in (*train, *test)]
  assert not set(descriptions[:3000]) & set(descriptions[3000:])


def test_asserts_tell_functions_apart(toys):
  """Answers to other questions with the same signature hardly ever pass."""
  train, test = toys
  pairs = []
  for p in test[:40]:
    head = p.reference.split("\n")[0]
    others = [q for q in train if q.reference.split("\n")[0] == head]
    pairs += [(q.reference, all_tests(p)) for q in others[:40]]
  passed = judge(pairs)
  assert len(pairs) > 1000
  assert sum(n == 8 for n in passed) <= 1
  # But tests are passed in part, so that a reward has more to say than yes or no.
  assert sum(0 < n < 8 for n in passed) > len(pairs) // 10


def test_deterministic_and_independent_of_the_train_size(toys):
  train, test = toys
  fewer, same = toy_problems.make_problems(train=10)
  assert same == test and fewer == train[:10]
  assert toy_problems.make_problems(10, 20, seed=1)[1] != test[:20]
  # Nothing hangs on the order of sets or the salt of hashes: another process makes the same.
  code = "from diffucoder_jax.data import toy_problems as t\nprint(t.make_problems(10, 200))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)})
  assert done.stdout == f"{(fewer, same)}\n"
  # The two ways to make it harder.
  harder = toy_problems.make_problems(500, 0, largest=12, names=("f", "run"))[0]
  assert {p.entry_point for p in harder} == {"f", "run"} and {p.entry_point for p in train} == {"f"}
  assert any("12" in p.prompt for p in harder) and not any("10" in p.prompt for p in train)
  assert judge((p.reference, all_tests(p)) for p in harder) == [8] * 500
  with pytest.raises(ValueError, match="asked for 100000 . 200 problems, and there are only"):
    toy_problems.make_problems(100_000)


def test_written_problems_are_instruction_data(toys, tmp_path, tokenizer):
  path = tmp_path / "deep" / "toys.jsonl"
  problems.write_problems(toys[1], path)
  assert problems.read_problems(path) == toys[1]
  found, broken = instructions.read_conversations(path, "opencoder")
  assert len(found) == 200 and not broken
  for conversation, p in zip(found, toys[1], strict=True):
    user, assistant = conversation.messages
    assert user["content"] == p.prompt and chat.answer_of(assistant["content"]) == p.reference
    prompt, response = chat.render(conversation.messages, tokenizer, system="")
    assert p.reference.rstrip() in tokenizer.decode(response)
    assert response.count(tokenizer.end_of_turn_id) == 1


def test_conversations_of_toys_fit_a_short_row(toys, tmp_path, training_texts):
  """With a vocabulary of 1,000 pieces trained on Python, every problem fits into 96 tokens."""
  texts = [*training_texts, *(p.prompt + "\n" + p.answer for p in toys[0][:300])]
  tokenizer = train_sentencepiece(texts, tmp_path / "tokenizer.model", vocab_size=1000)
  sizes = [sum(map(len, chat.render(
    [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.answer}],
    tokenizer, system=""))) for p in (*toys[0][::10], *toys[1])]
  assert max(sizes) <= 96


PROBLEM = Problem("a/1", "Add.", "f", ("assert f(1) == 2",), (), "def f(x):\n    return x + 1\n", "a")


def test_problem_errors(tmp_path):
  path = tmp_path / "p.jsonl"
  with pytest.raises(ValueError, match="two problems are called 'a/1'"):
    problems.write_problems([PROBLEM, PROBLEM], path)
  problems.write_problems([PROBLEM], path)
  assert problems.read_problems(path) == [PROBLEM]
  row = json.loads(path.read_text())
  del row["tests"]
  path.write_text(json.dumps(row) + "\n{")
  with pytest.raises(ValueError, match="p.jsonl:1 has no 'tests'"):
    problems.read_problems(path)
  path.write_text("{")
  with pytest.raises(ValueError, match="p.jsonl:1 is not JSON"):
    problems.read_problems(path)


def test_fields_that_most_problems_lack_are_not_written(tmp_path):
  path = tmp_path / "p.jsonl"
  full = dataclasses.replace(PROBLEM, task_id="a/2", prelude="import math\n", stub="def f(x):\n")
  bare = dataclasses.replace(PROBLEM, task_id="a/3", reference="")
  problems.write_problems([PROBLEM, full, bare], path)
  assert problems.read_problems(path) == [PROBLEM, full, bare]
  first, second, third = (json.loads(line) for line in path.read_text().splitlines())
  assert set(first) == set(third) == set(second) - {"prelude", "stub"}
  # Nothing that could be learned as an answer.
  assert third["output"] == "" and bare.answer == "" and first["output"].startswith("```python\n")
  problems.write_problems([], path)
  assert problems.read_problems(path) == []


@pytest.mark.parametrize(("tests", "code", "name"), [
  (["assert f(g(1)) == 2", "assert f(2) == 3"], "def g(x): pass\ndef f(x): pass", "f"),
  (["assert f(A(1)) == 2"], "class A: pass\ndef f(x): pass", "f"),
  (["a = A(1)\nassert a.go() == 2"], "class A: pass\ndef helper(): pass", "A"),
  (["assert sum(len(x)) == 2"], "def sum(x): pass", "sum"),
  (["assert set(f(1)) == {2}", "not python ("], "no python either (", "f"),
  (["def t():\n  return f(1)\nassert t() == 1"], "", "f"),
  (["assert len([1]) == 1"], "def f(): pass", ""),
  ([], "def f(): pass", ""),
])  # fmt: skip
def test_entry_point_of(tests, code, name):
  assert problems.entry_point_of(tests, code) == name


@pytest.mark.parametrize(("tests", "code", "integrity"), [
  (["import math\nassert f(math.sqrt(len([4]))) == max(1, 2)"], "", "isolated"),
  (["def make(n):\n  return [n]\nx = make(3)\nassert all(f(y) for y in x)"], "", "isolated"),
  (["assert sorted(f(1), key=lambda z: -z) == [2]", "assert f(int)"], "", "isolated"),
  (["assert f(1) == 2", "assert f(lambda x: x) == 2"], "", "shared"),
  (["assert f(g=[lambda x: x]) == 2"], "", "shared"),
  (["def g(x):\n  return x\nassert f(g) == 2"], "", "shared"),
  (["def g(x):\n  return x\nassert f(g(1)) == 2"], "", "isolated"),
  (["assert f(Node(1)) == 2"], "class Node: pass", "shared"),
  (["n = f(1)\nassert n.x == 2"], "class f: pass", "shared"),
  (["not python (", "assert f(1)"], "", "isolated"),
])  # fmt: skip
def test_integrity_of(tests, code, integrity):
  assert problems.integrity_of(tests, "f", code) == integrity


def test_rows_of_every_kind_of_file(tmp_path):
  arrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
  rows = [{"a": 1, "b": [{"c": "é"}]}, {"a": 2, "b": []}]
  lines = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
  (tmp_path / "r.jsonl").write_bytes(lines)
  (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines))
  (tmp_path / "r.json").write_text(json.dumps(rows))
  parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "r.parquet")
  for kind in ("jsonl", "jsonl.gz", "json", "parquet"):
    assert [row for _, row in rows_lib.read_rows(tmp_path / f"r.{kind}")] == rows, kind
  (name, row), _ = rows_lib.read_rows(tmp_path / "r.parquet", ("a", "z"))
  assert row == {"a": 1} and name.endswith("r.parquet:0")


@pytest.mark.parametrize(("name", "content", "message"), [
  ("r.csv", b"", "r.csv must end in one of .jsonl, "),
  ("r.jsonl", b'{"a": 1}\n[]', "r.jsonl:2 is a list, not a JSON object"),
  ("r.jsonl", b'{"a": "\xff"}', "r.jsonl:1 is not JSON"),
  ("r.json", b'{"a": 1}', "r.json is a dict, not a list"),
  ("r.json", b"[1]", r"r.json\[0\] is a int, not a JSON object"),
  ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "r.jsonl.gz is damaged after line"),
  ("r.jsonl.gz", b"no gzip", "r.jsonl.gz is damaged after line 0"),
  ("r.parquet", b"no parquet", "r.parquet is not a readable parquet file"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(rows_lib.read_rows(tmp_path / name))
