"""Evaluation: samples that are never drawn twice, verdicts, and scores that are refused without pins."""

import dataclasses
import gzip
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from diffucoder_jax import evaluate, pretrained
from diffucoder_jax.data.problems import Problem, write_problems
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.diffusion.sampler import SamplerConfig, load_trace
from diffucoder_jax.evals import sample_log, scores, verdicts
from diffucoder_jax.evals.verdicts import Verdict
from diffucoder_jax.runtime import hosts
from tests import tiny
from tests.hf import folders
from tests.test_hosts import Pod
from tests.test_processes import wait_for_both

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]

# No near ties that the rounding of another batch size could decide otherwise, as random weights would
# give them where the surest position goes first.
DRAWN = SamplerConfig(max_new_tokens=12, temperature=1.0, top_p=1.0, alg="left_to_right")
NUMBERS = range(6)


def problem(number):
  """`f` adds its number; the extra test tells it from an answer that is right at 0 alone."""
  code = f"def f(x):\n  return x + {number}\n"
  return Problem(
    f"own/{number}", f"Add {number}.", "f", (f"assert f(0) == {number}",),
    (f"assert f(5) == {number + 5}",), code, "own", stub=f'"""Add {number}."""\ndef f(x):',
  )  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  path = tmp_path_factory.mktemp("own") / "own.jsonl"
  write_problems([problem(i) for i in NUMBERS], path)
  return str(path)


@pytest.fixture(scope="module")
def workdir(home, tmp_path_factory):
  """A folder of random weights and a real tokenizer: what it writes is noise, drawn like any text."""
  folder = tmp_path_factory.mktemp("model") / "hf"
  ids = load_tokenizer(home.tokenizer)
  special = {f"{name}_token_id": getattr(ids, f"{name}_id") for name in ("mask", "pad", "eos")}
  sizes = {"vocab_size": 512, "max_position_embeddings": 256}
  folders.make(folder, "Dream", np.float32, **sizes, **special)
  shutil.copy(home.tokenizer, folder / "tokenizer.model")
  return folder


@pytest.fixture(scope="module")
def ckpt(workdir):
  return pretrained.from_pretrained(workdir)


COMPLETE = evaluate.Asked(how="complete")


def drawn(ckpt, own, folder, **changes):
  arguments = {"sampler": DRAWN, "samples": 2, "batch_size": 4, "data": own, **changes}
  return evaluate.run(ckpt, "problems", folder, arguments.pop("asked", COMPLETE), **arguments)


def samples(folder):
  lines = (folder / "samples.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  found = {(row["task_id"], row["sample"]): row["text"] for row in rows}
  assert len(found) == len(rows), "a sample was drawn twice"
  return found


def write_given(path, solutions):
  """`solutions`: [(task number, code)]."""
  rows = [{"task_id": f"own/{number}", "solution": code} for number, code in solutions]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


RIGHT = [(i, problem(i).reference) for i in NUMBERS]
AT_ZERO = "def f(x):\n  return 1"  # passes the test of task 1, not the extra one


# --- Given samples.


def test_given_samples_are_judged(own, tmp_path):
  others = [*RIGHT[1:], (1, AT_ZERO), *[(i, "def f(x):\n  return x") for i in NUMBERS if i != 1]]
  path = write_given(tmp_path / "given.jsonl", [RIGHT[0], *others])
  results = evaluate.run_given(path, "problems", tmp_path / "out", data=own)
  # Task 0: both right; task 1: one right and one at 0 alone; the others: one right.
  assert results["problems"]["own/0"] == {"samples": 2, "base": 2, "solved": 2}
  assert results["problems"]["own/1"] == {"samples": 2, "base": 2, "solved": 1}
  base, plus = results["scores"]["base"], results["scores"]["plus"]
  assert base["pass@1"]["value"] == pytest.approx((1 + 1 + 4 * 0.5) / 6)
  assert plus["pass@1"]["value"] == pytest.approx((1 + 5 * 0.5) / 6)
  assert base["pass@2"]["value"] == plus["pass@2"]["value"] == 1
  assert plus["pass@1"]["low"] < plus["pass@1"]["value"] < plus["pass@1"]["high"]
  assert results == json.loads((tmp_path / "out" / "results.json").read_text())
  pins = results["pins"]
  assert pins["sandbox"] in ("full", "no-userns") and pins["limits"]["cpu_seconds"] == 30
  assert pins["source"].startswith("given.jsonl sha256 ") and pins["published_data"] == "own file"
  text = (tmp_path / "out" / "table.txt").read_text()
  assert "pass@2  plus    100.0 %" in text and all(f"  {name}: " in text for name in pins)
  lines = (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()
  at_zero = [
    row for row in map(json.loads, lines) if (row["base"], row["plus"]) == ("pass", "fail")
  ]
  assert [(row["task_id"], row["sample"], row["solved"]) for row in at_zero] == [
    ("own/1", 1, False)
  ]


@pytest.mark.parametrize(
  ("solutions", "message"),
  [
    (RIGHT[1:], r"must have 1 sample\(s\) of each of 6 tasks: own/0 has 0"),
    ([*RIGHT, RIGHT[3]], "own/3 has 2.*Remove what is duplicated"),
    ([*RIGHT, (9, "x")], "line 7 is of 'own/9', which this benchmark does not have"),
    ([*RIGHT[:5], (5, None)], "line 6 has neither a text"),
    ([], "holds no samples"),
  ],
)
def test_what_is_wrong_with_given_samples_is_named(own, tmp_path, solutions, message):
  path = write_given(tmp_path / "given.jsonl", solutions)
  with pytest.raises(ValueError, match=message):
    evaluate.run_given(path, "problems", tmp_path / "out", data=own)
  assert not (tmp_path / "out").exists()


def test_runs_are_compared_in_pairs(own, tmp_path, capsys):
  wrong = [(i, AT_ZERO) for i in NUMBERS]
  for name, solutions in (("right", RIGHT), ("wrong", wrong)):
    path = write_given(tmp_path / f"{name}.jsonl", solutions)
    evaluate.run_given(path, "problems", tmp_path / name, data=own)
  evaluate.main(
    evaluate.parse_arguments(["--compare", *(str(tmp_path / x) for x in ("right", "wrong"))])
  )
  printed = capsys.readouterr().out
  assert "pass@1  plus   100.0 %    0.0 %    +100.0 %" in printed
  assert "pass@1  base   100.0 %   16.7 %     +83.3 %" in printed
  assert "better on 6 tasks, worse on 0" in printed and "pins that differ\n  source: " in printed
  results = scores.read_results(tmp_path / "wrong")
  results["pins"]["data"] = {"own.jsonl": "0" * 64}
  with pytest.raises(ValueError, match="differ in data"):
    scores.compare(scores.read_results(tmp_path / "right"), results)
  del results["pins"]["limits"]
  (tmp_path / "wrong" / "results.json").write_text(json.dumps(results))
  with pytest.raises(ValueError, match="missing: limits"):
    scores.read_results(tmp_path / "wrong")


# --- Scores.


def test_no_score_without_a_pin(own, tmp_path):
  path = write_given(tmp_path / "given.jsonl", RIGHT)
  pins = evaluate.run_given(path, "problems", tmp_path / "out", data=own)["pins"]
  for name in scores.PINS:
    with pytest.raises(ValueError, match=f"missing: {name}"):
      scores.summarise({**pins, name: None}, [Verdict("t", 0, "pass", "", "", "isolated")], {})
  with pytest.raises(ValueError, match="missing: checkpoint, sampler, seed, prompt"):
    scores.summarise({**pins, "source": "sampled"}, [], {})


def test_a_failure_of_the_sandbox_is_no_verdict(own, tmp_path):
  path = write_given(tmp_path / "given.jsonl", RIGHT)
  pins = evaluate.run_given(path, "problems", tmp_path / "out", data=own)["pins"]
  found = [Verdict("own/0", 0, "pass", "infra", "", "isolated")]
  with pytest.raises(ValueError, match="sandbox failed on samples of own/0"):
    scores.summarise(pins, found, {})


# --- Sampling.


@pytest.fixture(scope="module")
def whole(ckpt, own, tmp_path_factory):
  """An evaluation that was never interrupted: (folder, results)."""
  folder = tmp_path_factory.mktemp("whole")
  return folder, drawn(ckpt, own, folder, traces=True)


def test_an_evaluation_has_all_that_it_depends_on(whole, ckpt):
  folder, results = whole
  pins = results["pins"]
  assert pins["sampler"] == dataclasses.asdict(DRAWN) and pins["source"] == "sampled"
  assert pins["post_processing"] == "humaneval_continuation" and pins["prompt"] == "complete"
  assert len(pins["checkpoint"]["fingerprint"]) == 8 and pins["commit"]
  assert results["costs"]["nfe"] in (11, 12) and results["costs"]["tokens_per_second"] > 0
  rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
  assert len(rows) == 12 and all(r["solution"].startswith('"""Add ') for r in rows)  # for evalplus
  trace = load_trace(folder / "traces" / "own_3-1.npz")
  text = samples(folder)["own/3", 1]
  assert ckpt.tokenizer.decode(trace.tokens[0].tolist()).count(text)
  other = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), ckpt.params)
  assert evaluate.pins_lib.fingerprint_of(other) != pins["checkpoint"]["fingerprint"]


def test_samples_depend_on_nothing_but_the_seed(whole, ckpt, own, tmp_path):
  wanted = samples(whole[0])
  assert len(set(wanted.values())) > 6  # they are drawn
  drawn(ckpt, own, tmp_path / "one", batch_size=1)
  assert samples(tmp_path / "one") == wanted
  # Fewer tasks and samples, then more: the same ones, and none drawn again.
  drawn(ckpt, own, tmp_path / "more", samples=1)
  before = (tmp_path / "more" / "samples.jsonl").read_bytes()
  drawn(ckpt, own, tmp_path / "more", samples=2, batch_size=5)
  assert samples(tmp_path / "more") == wanted
  assert (tmp_path / "more" / "samples.jsonl").read_bytes().startswith(before)
  drawn(ckpt, own, tmp_path / "seed", seed=1)
  assert samples(tmp_path / "seed") != wanted


def arguments(workdir, own, folder, *more):
  return [
    "--checkpoint", str(workdir), "--benchmark", "problems", "--data_path", own, "--output",
    str(folder), "--samples", "2", "--max_new_tokens", "12", "--temperature", "1.0", "--top_p", "1.0",
    "--alg", "left_to_right", *more,
  ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_evaluation_that_is_ended_goes_on(whole, workdir, own, tmp_path, number):
  folder = tmp_path / "ended"
  path = folder / "samples.jsonl"
  command = arguments(workdir, own, folder, "--batch_size", "1")
  process = tiny.start("evaluate", command, tmp_path / "log")
  seen = lambda: path.exists() and path.read_bytes().count(b"\n") >= 3  # noqa: E731
  assert tiny.wait_until(seen, process), (tmp_path / "log").read_text()
  os.kill(process.pid, number)
  code, raw = process.wait(), path.read_bytes()
  kept = raw[: raw.rfind(b"\n") + 1]
  assert 3 <= kept.count(b"\n") < 12 and not (folder / "results.json").exists()
  if number == signal.SIGKILL:
    assert code == -signal.SIGKILL
    path.write_bytes(kept + b'{"task_id": "own/5", "sam')  # as if it had died in a line
  else:  # told to end, it first writes what it has
    assert code == hosts.PREEMPTED and raw == kept
    told = f"preempted: {kept.count(bytes([10]))} samples are in"
    assert told in (tmp_path / "log").read_text()
  done = tiny.run("evaluate", command)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "12 of 12 samples" in done.stderr and "pass@2" in done.stdout
  assert path.read_bytes().startswith(kept) and samples(folder) == samples(whole[0])
  assert json.loads((folder / "results.json").read_text())["problems"] == whole[1]["problems"]


def test_two_processes_are_one(whole, workdir, own, tmp_path):
  folder, port = tmp_path / "two", tiny.free_port()
  started = []
  for i in range(2):
    cluster = {
      "DIFFUCODER_MULTIHOST": "1", "DIFFUCODER_COORDINATOR": f"127.0.0.1:{port}",
      "DIFFUCODER_PROCESSES": "2", "DIFFUCODER_PROCESS": str(i),
    }  # fmt: skip
    command = arguments(workdir, own, folder, "--batch_size", "4", "--data", "2", "--fsdp", "1")
    log = tmp_path / f"{i}.log"
    started.append((tiny.start("evaluate", command, log, devices=1, **cluster), log))
  ended = wait_for_both(started)
  assert [code for code, _ in ended] == [0, 0], "\n".join(text[-3000:] for _, text in ended)
  assert samples(folder) == samples(whole[0])
  results = json.loads((folder / "results.json").read_text())
  assert results["problems"] == whole[1]["problems"]
  assert (
    results["pins"]["checkpoint"]["fingerprint"] == whole[1]["pins"]["checkpoint"]["fingerprint"]
  )
  assert "pass@2" in ended[0][1] and "pass@2" not in ended[1][1]  # only the first reports
  # One of them dies: the other ends, and both go on.
  (folder / "samples.jsonl").unlink()
  command = [*command, "--batch_size", "2"]
  pod = Pod(command, tmp_path, 2, program=("-m", "diffucoder_jax.evaluate"))
  seen = lambda: (folder / "samples.jsonl").exists() and samples(folder)  # noqa: E731
  assert tiny.wait_until(seen, pod.processes[0]), pod.text(0)
  pod.lose(1)
  kept = (folder / "samples.jsonl").read_bytes()
  pod = Pod(command, tmp_path, 2, program=("-m", "diffucoder_jax.evaluate"))
  assert pod.wait() == [0, 0], pod.text(0)
  assert (folder / "samples.jsonl").read_bytes().startswith(kept) and len(kept) > 0
  assert samples(folder) == samples(whole[0])
  # What stops one stops both, by name.
  (folder / "samples.jsonl").write_text("{}\n")
  started = [
    (tiny.start("evaluate", [*command], tmp_path / f"{i}.bad", devices=1, **{
      **cluster, "DIFFUCODER_PROCESS": str(i),
      "DIFFUCODER_COORDINATOR": f"127.0.0.1:{port + 1}"}), tmp_path / f"{i}.bad")
    for i in range(2)
  ]  # fmt: skip
  for code, text in wait_for_both(started):
    assert code != 0 and "line 1 has no 'task_id'" in text


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda lines: [lines[0], "{oops", *lines[1:]], "samples.jsonl line 2 is not JSON"),
    (lambda lines: [*lines, lines[4]], r"line 13 is sample \d of own/\d once more"),
    (lambda lines: [lines[0].replace("own/", "HumanEval/"), *lines[1:]], "'HumanEval/.'"),
    (lambda lines: ["[1]", *lines], "line 1 is a list"),
    (lambda lines: [lines[0].replace('"text"', '"words"')], "line 1 has no 'text'"),
  ],
)
def test_a_damaged_file_of_samples_is_refused(whole, ckpt, own, tmp_path, damage, message):
  for name in ("samples.jsonl", "pins.json"):
    (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
  path = tmp_path / "samples.jsonl"
  path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
  before = path.read_bytes()
  with pytest.raises(ValueError, match=message):
    drawn(ckpt, own, tmp_path)
  assert path.read_bytes() == before


def test_samples_of_something_else_are_refused(whole, ckpt, own, tmp_path):
  for name in ("samples.jsonl", "pins.json"):
    (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
  with pytest.raises(ValueError, match="sampler.temperature: 1.0 -> 0.5"):
    drawn(ckpt, own, tmp_path, sampler=dataclasses.replace(DRAWN, temperature=0.5))
  other = jax.tree.map(lambda x: x + 1e-3, ckpt.params)
  with pytest.raises(ValueError, match="checkpoint.fingerprint"):
    drawn(dataclasses.replace(ckpt, params=other), own, tmp_path)
  longer = tmp_path / "own.jsonl"
  write_problems([problem(i) for i in range(7)], longer)
  with pytest.raises(ValueError, match="data.own.jsonl: "):
    drawn(ckpt, str(longer), tmp_path)
  (tmp_path / "pins.json").unlink()
  with pytest.raises(ValueError, match="without pins.json"):
    drawn(ckpt, own, tmp_path)


def test_a_chat_begins_with_the_primer(ckpt, own, tmp_path):
  asked = evaluate.Asked(how="chat", system="", primer="```python\ndef f(x):\n  return ", first=2)
  results = drawn(ckpt, own, tmp_path, asked=asked, samples=1)
  assert results["pins"]["prompt"] == {"system": "", "primer": asked.primer}
  assert results["pins"]["tasks"] == "first 2" and len(results["problems"]) == 2
  rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
  assert all(row["solution"].startswith("def f(x):\n  return ") for row in rows)


def test_holes_have_the_given_length_or_a_maximum(ckpt, tmp_path):
  row = {
    "task_id": "SingleLineInfilling/HumanEval/0/L0", "entry_point": "f", "prompt": "def f(x):\n",
    "suffix": "  return y\n", "canonical_solution": "  y = x + 1\n",
    "test": "def check(candidate):\n  assert candidate(1) == 2\n",
  }  # fmt: skip
  data = tmp_path / "HumanEval-SingleLineInfilling.jsonl.gz"
  data.write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
  hole = len(ckpt.tokenizer.encode(row["canonical_solution"]))
  for masks, nfe in ((0, hole), (20, 20)):
    asked = evaluate.Asked(how="infill", hole_tokens=masks)
    results = evaluate.run(
      ckpt, "infilling_single", tmp_path / str(masks), asked, DRAWN, data=str(data),
      accept_unknown=True,
    )  # fmt: skip
    assert results["costs"]["nfe"] in (nfe - 1, nfe) and results["pins"]["published_data"] is False
    rows = [
      json.loads(x) for x in (tmp_path / str(masks) / "samples.jsonl").read_text().splitlines()
    ]
    assert rows[0]["solution"] == f"def f(x):\n{rows[0]['text']}  return y\n"
  given = tmp_path / "given.jsonl"
  solution = row["prompt"] + row["canonical_solution"] + row["suffix"]
  given.write_text(json.dumps({"task_id": row["task_id"], "solution": solution}) + "\n")
  results = evaluate.run_given(
    given, "infilling_single", tmp_path / "out", asked, data=str(data), accept_unknown=True
  )
  assert results["scores"]["base"]["pass@1"]["value"] == 1


def test_prompts_that_do_not_fit_are_named(ckpt, own, tmp_path):
  with pytest.raises(ValueError, match="own/0 needs .* the model's context is"):
    drawn(ckpt, own, tmp_path, sampler=dataclasses.replace(DRAWN, max_new_tokens=10_000))
  assert not (tmp_path / "samples.jsonl").exists()


def test_two_estimators_of_one_bound(ckpt, workdir, own, tmp_path):
  """Monte Carlo and complementary masks agree; the network sees nothing of what it must guess."""
  results = evaluate.run_likelihood(
    ckpt, "problems", tmp_path, COMPLETE, draws=64, batch_size=4, data=own
  )
  found = results["likelihood"]
  one, other = found["monte_carlo"], found["complementary"]
  error = (one["standard_error"] ** 2 + other["standard_error"] ** 2) ** 0.5
  assert abs(one["bits_per_byte"] - other["bits_per_byte"]) < 4 * error + 0.05
  # Random weights know little more than that there are 512 tokens of a byte or two.
  assert 3 < one["bits_per_byte"] < 20
  assert results == json.loads((tmp_path / "likelihood.json").read_text())
  again = evaluate.run_likelihood(
    ckpt, "problems", tmp_path, COMPLETE, draws=64, batch_size=6, data=own
  )["likelihood"]
  assert again["monte_carlo"]["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)


# --- Benchmarks that need more, or less, than a sandbox.


def test_numbers_are_compared_without_a_sandbox(tmp_path):
  rows = [{"question": f"{i} + 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(3)]
  for name in ("test", "train"):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  given = tmp_path / "given.jsonl"
  answers = ["It is 1.", "It is 3", "so 2 + 1 = 3.0"]
  given.write_text(
    "".join(
      json.dumps({"task_id": f"gsm8k/test/{i}", "solution": a}) + "\n"
      for i, a in enumerate(answers)
    )
  )
  results = evaluate.run_given(
    given, "gsm8k", tmp_path / "out", data=str(tmp_path / "test.jsonl"), accept_unknown=True
  )
  assert [row["base"] for row in results["problems"].values()] == [1, 0, 1]
  assert results["pins"]["sandbox"] == "not needed"


def test_tasks_without_their_libraries_make_a_subset(tmp_path):
  test = (
    "import unittest\nclass TestCases(unittest.TestCase):\n"
    "  def test_one(self):\n    self.assertEqual(task_func(), 1)\n"
  )
  row = {
    "complete_prompt": "def task_func():\n", "instruct_prompt": "One.",
    "code_prompt": "def task_func():\n", "entry_point": "task_func", "test": test,
    "canonical_solution": "  return 1\n",
  }  # fmt: skip
  libs = ["['os']", "['numpy']", "['no_such_library']"]
  data, given = tmp_path / "BigCodeBench-hf.jsonl", tmp_path / "given.jsonl"
  rows = [{**row, "task_id": f"BigCodeBench/{i}", "libs": lib} for i, lib in enumerate(libs)]
  data.write_text("".join(json.dumps(r) + "\n" for r in rows))
  codes = ["def task_func():\n  return 1", "def task_func():\n  return 2", "x"]
  given.write_text(
    "".join(
      json.dumps({"task_id": r["task_id"], "solution": c}) + "\n"
      for r, c in zip(rows, codes, strict=True)
    )
  )
  results = evaluate.run_given(
    given, "bigcodebench_instruct", tmp_path / "out", data=str(data), accept_unknown=True
  )
  assert results["not_run"] == ["BigCodeBench/2"] and results["shared"] == 2
  assert [row["base"] for row in results["problems"].values()] == [1, 0]
  text = scores.table(results)
  assert (
    "A SUBSET: 1 tasks were not run" in text and "2 verdicts were given in the answer's" in text
  )


def test_what_evalplus_reads_is_what_was_written(whole, tmp_path):
  """Round trip through our own reader of its format; tests/test_evalplus.py asks the real one."""
  rows = sample_log.read_given(whole[0] / "samples.jsonl", [problem(i) for i in NUMBERS])
  assert len(rows) == 12
  assert verdicts.LIMITS.cpu_seconds == 30 and np.isfinite(verdicts.LIMITS.wall_seconds)
