"""Two processes of four devices each train as one process of eight does."""

import collections
import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffucoder_jax.data import batching, corpus
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.runtime import checkpoint
from tests import tiny
from tests.execution import graded

pytestmark = pytest.mark.slow


def changes(mesh, **more):
  sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
  return {**sizes, "objective.anneal_steps": 6, **more}


def start_two(home, workdir, folder, *settings):
  """Starts process 0 and 1 of one run; `settings` are one or two dicts. Returns (process, log)s."""
  logs = [folder / f"{workdir.name}-{i}.log" for i in range(2)]
  return start_both([tiny.flags(home, workdir, None, each) for each in settings], logs)


def start_both(arguments, logs, devices=4, **more):
  """As `start_two`, from one or two lists of arguments, on `devices` devices each.

  `more` is put into their environment.
  """
  started = []
  for i, cluster in enumerate(clusters()):
    own = arguments[i % len(arguments)]
    started.append((tiny.start("train", own, logs[i], devices=devices, **cluster, **more), logs[i]))
  return started


def clusters():
  """The environment that makes each of two processes one of a pair."""
  common = {
    "DIFFUCODER_MULTIHOST": "1", "DIFFUCODER_COORDINATOR": f"127.0.0.1:{tiny.free_port()}",
    "DIFFUCODER_PROCESSES": "2",
  }  # fmt: skip
  return [{**common, "DIFFUCODER_PROCESS": str(i)} for i in range(2)]


def wait_for_both(started, seconds=400):
  """Returns [(exit code, everything it printed)]; leaves no process behind."""
  try:
    codes = [process.wait(timeout=seconds) for process, _ in started]
  finally:
    for process, _ in started:
      process.kill()
  return list(zip(codes, [pathlib.Path(log).read_text() for _, log in started], strict=True))


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)])
def test_two_processes_are_one(home, tmp_path, mesh):
  one, two = tmp_path / "one", tmp_path / "two"
  done = tiny.run("train", tiny.flags(home, one, None, changes(mesh)), devices=8)
  assert done.returncode == 0, done.stderr[-4000:]
  ended = wait_for_both(start_two(home, two, tmp_path, changes(mesh)))
  assert [code for code, _ in ended] == [0, 0], "\n".join(text[-4000:] for _, text in ended)
  for text in (done.stderr, *(text for _, text in ended)):
    assert "nvoluntary full rematerialization" not in text
  assert "2 process(es)" in ended[0][1] and "step 12/12" in ended[0][1]
  assert "step 12/12" not in ended[1][1]  # only the first reports

  assert [row.keys() for row in tiny.rows(two)] == [row.keys() for row in tiny.rows(one)]
  for row, wanted in zip(tiny.rows(two), tiny.rows(one), strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)
  assert tiny.steps_on_file(two) == tiny.steps_on_file(one) == [4, 8, 12]

  # One process goes on from what two have written, and the other way round.
  for workdir in (one, two):
    for step in (8, 12):
      tiny.remove_checkpoint(workdir, step)
  done = tiny.run("train", tiny.flags(home, two, None, changes(mesh)), devices=8)
  assert done.returncode == 0, done.stderr[-4000:]
  assert "continuing from checkpoint" in done.stderr
  ended = wait_for_both(start_two(home, one, tmp_path, changes(mesh)))
  assert [code for code, _ in ended] == [0, 0], "\n".join(text[-4000:] for _, text in ended)
  assert "continuing from checkpoint" in ended[0][1]
  for workdir in (one, two):
    assert list(tiny.losses(workdir)) == list(range(1, 13))
  for row, wanted in zip(tiny.rows(two), tiny.rows(one), strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)


def test_processes_with_different_configs_are_refused(home, tmp_path):
  settings = changes((2, 2, 2)), changes((2, 2, 2), seed=1)
  ended = wait_for_both(start_two(home, tmp_path / "run", tmp_path, *settings))
  for code, text in ended:
    assert code not in (0, 42)
    assert "processes disagree about config.seed" in text, text[-4000:]
  assert not (tmp_path / "run").exists()


# --- Exactly once: a mixture, a kill, another number of processes.

SHARES = {"code": 0.75, "text": 0.25}
EVERY = 7  # steps between checkpoints
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of the time is compilation
MIXED = """
from configs import tiny


def get_config():
  c = tiny.get_config()
  c.tokenizer = {tokenizer!r}
  c.data.source = "mixture"
  c.data.mixture = {parts!r}
  c.optim.steps = 60
  c.checkpoint.every = {every}
  c.eval.every = 20
  c.eval.rows = 8
  return c
"""


def prepare(home, folder):
  """Two small datasets by the real program, of other files each. Returns {source: its folder}."""
  files = sorted(pathlib.Path(home.corpus).iterdir())[:16]
  (folder / "code").mkdir()
  for file in files:
    (folder / "code" / file.name).write_bytes(file.read_bytes())
  lines = [{"content": "\n".join(f"{i} and {j} make {i + j}." for j in range(i, i + 9))}
           for i in range(24)]  # fmt: skip
  (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  from_ = {"code": ("folder", folder / "code"), "text": ("jsonl", folder / "text.jsonl")}
  for name, (source, path) in from_.items():
    changes = {"source": source, "path": path, "held_out": 0.2}
    values = [f"--config.data.{key}={value}" for key, value in changes.items()]
    done = tiny.run("prepare", [
      "dataset", "--config=configs/prepare_stdlib.py", f"--config.tokenizer={home.tokenizer}",
      "--config.prepare.near_threshold=0.0", f"--output={folder / name}_dataset", *values,
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
  return {name: f"{folder / name}_dataset" for name in from_}


def rows_of(c, steps, states):
  """(the mixture, tokens of all rows in the order in which they come) in `steps` steps of a run.

  `states` maps the step at which each part of the run begins to (state, number of processes).
  """
  train = corpus.open_corpus(c.data, load_tokenizer(c.tokenizer), c.seed).train
  stream, begins = [], sorted(states)
  for begin, end in zip(begins, [*begins[1:], steps], strict=True):
    state, processes = states[begin]
    batches = [batching.train_batches(train, c.data, c.seed, (i, processes))
               for i in range(processes)]  # fmt: skip
    for each in batches if state else ():
      each.set_state(state)
    for _ in range(begin, end):
      stream += [row for each in batches for row in next(each)["tokens"]]
  return train, stream


def test_every_row_comes_once_after_a_kill_and_with_twice_the_processes(home, tmp_path):
  pytest.importorskip("rensa")
  config = tmp_path / "mixed.py"
  parts = {name: {"path": path, "share": SHARES[name]}
           for name, path in prepare(home, tmp_path).items()}  # fmt: skip
  config.write_text(MIXED.format(tokenizer=home.tokenizer, parts=parts, every=EVERY))
  whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "run.log"
  flags = lambda workdir: [f"--config={config}", f"--workdir={workdir}"]  # noqa: E731
  done = tiny.run("train", flags(whole), devices=2, **QUICK)
  assert done.returncode == 0, done.stderr[-4000:]

  # One process is killed some steps after a checkpoint; two go on.
  def between():
    step = tiny.last_row(run)["step"]
    return step > 2 * EVERY and step % EVERY in (3, 4)

  process = tiny.start("train", flags(run), log, devices=2, **QUICK)
  assert tiny.wait_until(between, process), log.read_text()[-4000:]
  process.kill()
  assert tiny.wait(process) == -signal.SIGKILL
  step = tiny.steps_on_file(run)[-1]
  assert EVERY <= step < tiny.last_row(run)["step"] < 60
  _, saved, _ = checkpoint.read_text_items(run / "checkpoints" / str(step))
  logs = [tmp_path / "0.log", tmp_path / "1.log"]
  ended = wait_for_both(start_both([flags(run)], logs, devices=1, **QUICK))
  assert [code for code, _ in ended] == [0, 0], "\n".join(text[-4000:] for _, text in ended)
  assert f"continuing from checkpoint {run}/checkpoints/{step}" in ended[0][1]
  assert "2 process(es)" in ended[0][1]

  # It ends as the run that nobody stopped.
  c = ConfigDict(json.loads((run / "config.json").read_text()))
  assert list(tiny.losses(run)) == list(range(1, 61))
  assert [row.keys() for row in tiny.rows(run)] == [row.keys() for row in tiny.rows(whole)]
  for row, wanted in zip(tiny.rows(run), tiny.rows(whole), strict=True):
    counters = [key for key in wanted if key.startswith("data/")]
    assert [row[key] for key in counters] == [wanted[key] for key in counters]
    assert row == pytest.approx(wanted, rel=1e-5)
  # Adam moves every number by up to the learning rate a step, however small its gradient: what was
  # rounded otherwise may show, what was read otherwise would by far.
  ours = tiny.params(run)
  for name, wanted in tiny.params(whole).items():
    assert np.abs(ours[name] - wanted).max() <= 0.01 * c.optim.lr, name

  # The rows that the two lives of the run were given, from the state that the kill left on file.
  states = {0: (None, 1), step: (saved["batches"], 2)}
  mixture, stream = rows_of(c, c.optim.steps, states)
  places = {
    rows[i]["tokens"].tobytes(): (name, i) for name, rows in mixture.parts.items()
    for i in range(len(rows))
  }  # fmt: skip
  assert len(places) == len(mixture), "two rows are equal: nobody could tell them apart"
  seen = collections.defaultdict(list)
  for tokens in stream:
    name, i = places[tokens.tobytes()]
    seen[name].append(i)
  last = [row for row in tiny.rows(run) if "loss" in row][-1]
  for name, rows in mixture.parts.items():
    assert len(seen[name]) > 2 * len(rows)
    for begin in range(0, len(seen[name]), len(rows)):
      epoch = seen[name][begin : begin + len(rows)]
      assert len(set(epoch)) == len(epoch), f"a row of {name} came twice in an epoch"
    assert abs(len(seen[name]) / len(stream) - SHARES[name]) < 0.08
    assert last[f"data/{name}_tokens"] == len(seen[name]) * c.data.seq_len
    assert last[f"data/{name}_epochs"] == len(seen[name]) / len(rows)
  assert sum(map(len, seen.values())) == c.optim.steps * c.data.global_batch


# --- Coupled-GRPO: each process judges its own answers, the first one reports about all.


def test_what_two_processes_report_of_a_round_is_about_both(tmp_path, tmp_path_factory):
  start = tiny.finished(tmp_path_factory.getbasetemp())
  graded.write(tmp_path)
  settings = graded.settings(start, tmp_path, **{"optim.steps": 2, "checkpoint.every": 2})

  def begin(workdir, log, **environment):
    command = [
      sys.executable, "-m", "tests.execution.graded", "--config=configs/grpo_7b.py",
      f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    with open(log, "wb") as out:
      return subprocess.Popen(
        command, cwd=tiny.ROOT, env=tiny.environment(**environment, **QUICK), stdout=out,
        stderr=subprocess.STDOUT,
      )  # fmt: skip

  logs = [tmp_path / f"{name}.log" for name in ("one", "0", "1")]
  one, two = tmp_path / "one", tmp_path / "two"
  ended = wait_for_both([(begin(one, logs[0]), logs[0])])
  ended += wait_for_both([
    (begin(two, log, devices=1, **cluster), log)
    for log, cluster in zip(logs[1:], clusters(), strict=True)
  ])  # fmt: skip
  assert [code for code, _ in ended] == [0, 0, 0], "\n".join(text[-4000:] for _, text in ended)

  def rollouts(workdir):
    files = sorted((workdir / "rollouts").iterdir())
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]

  assert len(list((two / "rollouts").iterdir())) == 2  # each wrote its half
  theirs = rollouts(two)
  for ours, line in zip(rollouts(one), theirs, strict=True):
    for name in ("row", "completion", "tests", "reward", "key"):
      assert ours[name] == line[name]
  halves = [{line["reward"] for line in theirs[i : i + 4]} for i in (0, 4)]
  assert halves[0] != halves[1], "both would report the same of their own"

  clock = lambda name: name == "time" or "second" in name  # noqa: E731
  found, wanted = tiny.rows(two), tiny.rows(one)
  assert [row.keys() for row in found] == [row.keys() for row in wanted]
  for row, other in zip(found, wanted, strict=True):
    for name in row:
      if not clock(name):
        assert row[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name
  first = next(row for row in found if "reward" in row)
  assert first["judged/answers"] == 8
  assert first["reward/code"] == np.mean([line["parts"]["code"] for line in theirs[:8]])
