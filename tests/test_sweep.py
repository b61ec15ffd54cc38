"""Sweeps: cells with names of their own, killed and resumed, failing and edited, ending in one table."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import config_dict

from configs import quickstart_frontier
from diffucoder_jax import evaluate
from diffucoder_jax.data.problems import Problem, write_problems
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.runtime import cells
from tests import tiny
from tests.hf import folders

# --- Names, commands and tables, without a process.


def config(**changes):
  c = config_dict.ConfigDict({
    "seed": 0, "optim": {"lr": 1e-3, "steps": 4}, "mesh": (1, 2), "text": config_dict.placeholder(str),
  })  # fmt: skip
  c.update_from_flattened_dict(changes)
  return c


def names(c, *sweep, program="train"):
  return [cell.name for cell in cells.expand(program, c, sweep or [{}])]


def test_names_are_stable_and_distinct():
  # Written down: another host, Python or run must find the same folder.
  assert names(config()) == ["0cac8e83c705"]
  assert names(config(), {"optim.lr": 1e-3}) == names(config())  # what it is, not how it was said
  assert names(config(), {"optim.lr": 2}) == names(config(), {"optim.lr": 2.0})
  backwards = config_dict.ConfigDict(dict(reversed(list(config().to_dict().items()))))
  assert names(backwards) == names(config())
  others = [
    names(config(), change)[0]
    for change in ({"seed": 1}, {"optim.lr": 2e-3}, {"optim.steps": 5}, {"mesh": (2, 1)},
                   {"text": ""}, {"text": "x"}, {"optim.lr": 1.0000000001e-3})
  ]  # fmt: skip
  everything = {*names(config()), *names(config(), program="train_grpo"), *others}
  assert len(everything) == 9


@pytest.mark.parametrize(
  ("sweep", "message"),
  [
    ([], "yields no cell"),
    ([{"seed": 1}, {"optim.lrr": 1.0}], 'cell 2 of sweep.*Did you mean "lr"'),
    ([{"seed": "one"}], "cell 1 of sweep.*seed=one"),
    ([{"optim": {"lr": 1.0}}], "optim to a dict"),
    ([{"seed": 1}, {"seed": 2}, {"seed": 1}], "cells 1 and 3 .* are the same run"),
  ],
)
def test_what_is_wrong_with_a_sweep_is_named(sweep, message):
  with pytest.raises(ValueError, match=message):
    cells.expand("train", config(), sweep)


def test_commands_say_what_the_cell_is():
  (cell,) = cells.expand("train", config(seed=3), [{"optim.lr": 0.1, "mesh": (2, 2)}])
  assert cells.command(cell, "c.py:arg", {"seed": 3}, "W") == [
    "-m", "diffucoder_jax.train", "--config=c.py:arg", "--workdir=W", "--config.seed=3",
    "--config.optim.lr=0.1", "--config.mesh=(2, 2)",
  ]  # fmt: skip
  with pytest.raises(ValueError, match="text=None cannot be said"):
    cells.command(cell._replace(changes={"text": None}), "c.py", {}, "W")
  flags = config_dict.ConfigDict({
    "chat": True, "traces": False, "system": "", "threshold": 0.9, "primer": config_dict.placeholder(str)
  })  # fmt: skip
  (cell,) = cells.expand("evaluate", flags, [{"threshold": 0.5}])
  assert cells.command(cell, "c.py", {}, "W") == [
    "-m", "diffucoder_jax.evaluate", "--output=W", "--chat", "--system=", "--threshold=0.5"
  ]  # fmt: skip


def test_a_config_of_another_program_is_named():
  (cell,) = cells.expand("evaluate", config(), [{}])
  with pytest.raises(ValueError, match="c.py has a section 'optim'"):
    cells.command(cell, "c.py", {}, "W")
  (cell,) = cells.expand("train", config_dict.create(steps=4), [{}])
  with pytest.raises(ValueError, match="c.py has no optim.steps; it is no config of train"):
    cells.command(cell, "c.py", {}, "W")


def test_the_frontiers_keys_are_flags_of_evaluate():
  c = quickstart_frontier.get_config()
  c.checkpoint, c.data_path = "W/sft", "W/test.jsonl"
  for cell in cells.expand("evaluate", c, quickstart_frontier.sweep()):
    args = evaluate.parse_arguments(cells.command(cell, "c.py", {}, "W")[2:])
    assert (
      args.chat and args.system == "" and args.output == "W" and args.data_path == "W/test.jsonl"
    )
    assert {key: getattr(args, key) for key in cell.changes} == cell.changes


def test_the_table_shows_errors_and_intervals():
  rows = [
    {"cell": "a", "changes": {"lr": 0.1}, "state": "finished", "detail": "", "metrics": {
      "step": 4, "eval/bits": 1.23456, "eval/bits_se": 0.01, "eval/seconds": 3.0,
      "x/pass@1": 0.5, "x/pass@1_low": 0.25, "x/pass@1_high": 0.75}},
    {"cell": "b", "changes": {"seed": 1}, "state": "failed", "detail": "a | b", "metrics": {}},
  ]  # fmt: skip
  assert cells.table(rows) == [
    ["cell", "lr", "seed", "state", "step", "eval/bits", "x/pass@1"],
    ["a", "0.1", "", "finished", "4", "1.235 ± 0.01", "50.0 (25.0 to 75.0) %"],
    ["b", "", "1", "failed: a / b", "", "", ""],
  ]
  assert cells.markdown(cells.table(rows)).splitlines()[1].startswith("| ---- | --- |")


# --- Real sweeps.

TRAINED = """
from configs import tiny

def get_config(arg=None):
  c = tiny.get_config(arg)
  c.eval.rows = {rows}
  return c

def sweep():
  {sweep}
"""
SIX = (
  "for lr in (1e-3, 1e-2):\n    for seed in (0, 1, 2):\n      yield {'optim.lr': lr, 'seed': seed}"
)


class Sweep:
  """A config file, a folder, and the command that works on them."""

  def __init__(self, folder, program, config_flags, cache):
    self.config, self.output, self.log = folder / "c.py", folder / "out", folder / "log"
    self.command = [
      sys.executable, "launch/sweep.py", f"--config={self.config}", f"--program={program}",
      f"--output={self.output}", *(f"--config.{k}={v}" for k, v in config_flags.items()),
    ]  # fmt: skip
    self.environment = tiny.environment(
      JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
      JAX_DISABLE_MOST_OPTIMIZATIONS="true",
    )  # fmt: skip

  def start(self):
    with open(self.log, "wb") as out:
      return subprocess.Popen(self.command, cwd=tiny.ROOT, env=self.environment, stdout=out,
                              stderr=subprocess.STDOUT)  # fmt: skip

  def run(self, *flags):
    """(exit code, what it printed)."""
    done = subprocess.run([*self.command, *flags], cwd=tiny.ROOT, env=self.environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3600)  # fmt: skip
    return done.returncode, done.stdout

  def cells(self):
    """The rows of cells.jsonl."""
    return [json.loads(line) for line in (self.output / "cells.jsonl").read_text().splitlines()]

  def folders(self):
    return [path for path in self.output.iterdir() if path.is_dir()]


def child_of(pid):
  return int(open(f"/proc/{pid}/task/{pid}/children").read().split()[0])


def lives(pid):
  try:
    return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.fixture
def trained(home, tmp_path, tmp_path_factory):
  flags = {"tokenizer": home.tokenizer, **{
    f"data.{key}": value
    for key, value in (("source", "folder"), ("path", home.corpus), ("held_out", 0.2))
  }}  # fmt: skip
  return Sweep(tmp_path, "train", flags, tmp_path_factory.getbasetemp() / "programs")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_six_cells_are_stopped_killed_and_resumed(trained):
  trained.config.write_text(TRAINED.format(rows=16, sweep=SIX))
  printed = trained.run("--print")[1].splitlines()
  order = [line.split("--workdir=")[1].split()[0].rsplit("/")[-1] for line in printed]
  assert len(set(order)) == 6 and not trained.output.exists()

  # SIGTERM: the cell saves itself.
  process = trained.start()
  first = trained.output / order[0]
  assert tiny.wait_until(lambda: tiny.last_row(first)["step"] >= 1, process, 1800), (
    trained.log.read_text()
  )
  process.send_signal(signal.SIGTERM)
  assert tiny.wait(process, 1800) == 42, trained.log.read_text()
  assert "start the same command again" in trained.log.read_text()
  (row, *others) = trained.cells()
  assert row["state"] in ("unfinished", "finished") and row["metrics"].get("step") in (None, 12)
  assert {other["state"] for other in others} == {"waiting"}

  # SIGKILL, in the middle of the third cell: nothing goes on.
  process = trained.start()
  third = trained.output / order[2]
  saved = lambda: 4 in tiny.steps_on_file(third)  # noqa: E731
  assert tiny.wait_until(saved, process, 1800), trained.log.read_text()
  child = child_of(process.pid)
  process.kill()
  process.wait()
  end = time.monotonic() + 60
  while lives(child) and time.monotonic() < end:
    time.sleep(0.05)
  assert not lives(child), "the cell goes on without its sweep"
  finished = {name: tiny.contents(trained.output / name) for name in order[:2]}
  assert all(tiny.steps_on_file(trained.output / name)[-1] == 12 for name in finished)
  before = [row["time"] for row in map(json.loads, (third / "metrics.jsonl").open())
            if row["step"] <= 4]  # fmt: skip

  code, text = trained.run()
  assert code == 0, text
  assert "6 cells, 2 are finished" in text and "goes on (unfinished: step 4 of 12 is saved)" in text
  assert "3 left, ETA " in text and "0 left, ETA 0:00:00" in text
  assert {name: tiny.contents(trained.output / name) for name in order[:2]} == finished
  after = [row["time"] for row in map(json.loads, (third / "metrics.jsonl").open())
           if row["step"] <= 4]  # fmt: skip
  assert after == before, "the killed cell began anew"
  rows = trained.cells()
  assert [row["cell"] for row in rows] == order
  assert [(row["state"], row["metrics"]["step"]) for row in rows] == [("finished", 12)] * 6
  for row in rows:
    last = [x for x in tiny.rows(row["folder"]) if "eval/bits_per_byte" in x][-1]
    assert row["metrics"]["eval/bits_per_byte"] == last["eval/bits_per_byte"]
  lines = (trained.output / "table.md").read_text().splitlines()
  assert len(lines) == 10 and all(
    order[i] in lines[4 + i] and " ± " in lines[4 + i] for i in range(6)
  )
  assert trained.run("--print") == (0, "")


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_an_edited_config_begins_anew(trained):
  sweep = "yield {'objective.kind': 'guesswork'}\n  yield {'seed': 1}"
  trained.config.write_text(TRAINED.format(rows=16, sweep=sweep))
  trained.output.mkdir()
  with open(trained.output / "sweep.lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    code, text = trained.run()
    assert code == 1 and "another sweep works in" in text and not trained.folders()
  code, text = trained.run()
  assert code == 1 and "1 of 2 cells are finished" in text
  bad, good = trained.cells()
  assert (bad["state"], good["state"]) == ("failed", "finished") and bad["metrics"] == {}
  assert "exit code 1" in bad["detail"] and "guesswork" in bad["detail"]
  assert f"FAILED {bad['cell']} objective.kind=guesswork: exit code 1" in text
  assert "output.log" in bad["detail"]

  # Put right in the config: the good cell is kept, the other one is another now.
  trained.config.write_text(TRAINED.format(rows=16, sweep="yield {'seed': 1}\n  yield {'seed': 2}"))
  code, text = trained.run("--table")
  assert code == 0 and "1 of 2 cells are finished" in text
  assert [row["state"] for row in trained.cells()] == ["finished", "waiting"]
  assert f"not in the table: {bad['cell']} (objective.kind=guesswork)" in text
  # A value that no cell names: all are others, and what was found stays out of the table.
  trained.config.write_text(TRAINED.format(rows=8, sweep="yield {'seed': 1}"))
  code, text = trained.run("--table")
  (row,) = trained.cells()
  assert row["state"] == "waiting" and row["cell"] not in (bad["cell"], good["cell"])
  assert good["cell"] in (trained.output / "table.md").read_text().split("Not part of")[1]

  # A file that was edited while its cell ran: the run is not what its folder's name says.
  path = trained.output / row["cell"]
  shutil.copytree(good["folder"], path)
  code, text = trained.run("--table")
  (row,) = trained.cells()
  assert row["state"] == "failed" and "eval.rows: 8 -> 16" in row["detail"] and not row["metrics"]


EVALUATED = """
from ml_collections import config_dict

def get_config(arg=None):
  return config_dict.create(
    checkpoint="", benchmark="problems", data_path="", max_new_tokens=8, steps=8, alg="entropy",
    temperature=0.0, batch_size=4,
  )

def sweep():
  for alg in ("entropy", "maskgit_plus"):
    for steps in (2, 8):
      yield {"alg": alg, "steps": steps}
"""


@pytest.mark.slow
def test_a_sweep_of_evaluations_ends_in_a_frontier(home, tmp_path, tmp_path_factory):
  tokenizer = load_tokenizer(home.tokenizer)
  special = {
    f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "pad", "eos")
  }
  sizes = {"vocab_size": 512, "max_position_embeddings": 256}
  folders.make(tmp_path / "model", "Dream", np.float32, **sizes, **special)
  shutil.copy(home.tokenizer, tmp_path / "model" / "tokenizer.model")
  problems = [
    Problem(f"own/{i}", f"Add {i}.", "f", (f"assert f(0) == {i}",), (), f"def f(x):\n  return x + {i}\n",
            "own", stub="def f(x):")
    for i in range(4)
  ]  # fmt: skip
  write_problems(problems, tmp_path / "own.jsonl")
  given = {"checkpoint": tmp_path / "model", "data_path": tmp_path / "own.jsonl"}
  sweep = Sweep(tmp_path, "evaluate", given, tmp_path_factory.getbasetemp() / "programs")
  sweep.config.write_text(EVALUATED)
  code, text = sweep.run()
  assert code == 0, text
  rows = sweep.cells()
  # Of as many steps as masks the first commits nothing (`remasking.commit_count`) and is not evaluated.
  assert [row["metrics"]["nfe"] for row in rows] == [2, 7, 2, 7]
  for row in rows:
    results = json.loads(open(os.path.join(row["folder"], "results.json")).read())
    score = results["scores"]["base"]["pass@1"]
    found = [row["metrics"][f"base/pass@1{end}"] for end in ("", "_low", "_high")]
    assert found == [score["value"], score["low"], score["high"]] and score["high"] > score["value"]
    assert results["pins"]["sampler"]["alg"] == row["changes"]["alg"]
  page = (sweep.output / "index.html").read_text()
  assert (
    "maskgit_plus" in page and page.count("<svg") == 1 and all(x["cell"] in page for x in rows)
  )
  assert (sweep.output / "frontier.svg").exists()
