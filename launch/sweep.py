r"""Runs every cell of a config's sweep(), and puts what they found into one table.

  python launch/sweep.py --config=configs/quickstart_grpo.py --program=train_grpo --output=SWEEP \
    --config.init_from=W/sft --config.problems.path=W/problems/train.jsonl \
    --config.problems.eval_path=W/problems/test.jsonl
  python launch/sweep.py --config=configs/quickstart_frontier.py --program=evaluate --output=SWEEP \
    --config.checkpoint=W/sft --config.data_path=W/problems/test.jsonl

Run it from the project's folder. What --config.KEY=VALUE says holds for all cells. Each cell has the
folder SWEEP/NAME, where NAME is a hash of its whole config, and works there as if the program had
been started by hand; what it prints goes to SWEEP/NAME/output.log. Started again the same way, the
sweep skips what is finished and goes on with what is not; a cell that fails is named, and the others
run. SWEEP/table.md and cells.jsonl have a row for each cell at any time. After evaluations, index.html
and frontier.svg show quality against network evaluations (see diffucoder_jax/evals/frontier.py).

With --submit cells run on pods, and SWEEP is gs:// or another place that they reach as well:

  --submit=tpu  one after the other on the TPU pod NAME, each watched by launch/babysit.sh. Stopping
                the sweep stops no cell; started again, it goes on watching
  --submit=xpk  all at once as workloads NAME-CELL of a GKE cluster, through launch/xpk.sh; their
                queue does the rest. Started again, it submits those that ended and are not finished

The settings of the pod are environment variables, see launch/env.sh; it gets what git has, so the
sweep must be committed. --print writes the commands of cells that are not finished, one a line, and
runs nothing. --table makes the table of what has arrived so far.

Exit code: 0 all cells are finished (xpk: or submitted), 1 some failed, 42 stopped by a signal (start
it again).
"""

import contextlib
import datetime
import fcntl
import importlib.util
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, and `configs`

from absl import app, flags
from ml_collections import config_flags

from diffucoder_jax.execution import isolation
from diffucoder_jax.runtime import cells as cells_lib
from diffucoder_jax.runtime import workdir as workdirs

STOPPED = 42  # as the programs' own: start the same command again
GAVE_UP = 3  # of babysit.sh: the cell's program failed too often
EXISTS = 3  # of xpk.sh: the workload is queued or running
# How a cell's words behind `python` are run.
SUBMIT = {
  None: lambda words: [sys.executable, *words],
  "tpu": lambda words: ["bash", "launch/babysit.sh", "--", "python", *words],
  "xpk": lambda words: ["bash", "launch/xpk.sh", "create", "--", "python", *words],
}

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "file with get_config() and sweep(), and what it says on the command line"
)
_PROGRAM = flags.DEFINE_enum("program", None, list(cells_lib.PROGRAMS), "what runs each cell")
_OUTPUT = flags.DEFINE_string("output", None, "folder of the sweep")
_SUBMIT = flags.DEFINE_enum("submit", None, ["tpu", "xpk"], "run the cells there")
_PRINT = flags.DEFINE_bool("print", False, "write the commands, run nothing")
_TABLE = flags.DEFINE_bool("table", False, "write the table of what is there, run nothing")
_ALONG = flags.DEFINE_string("along", "steps", "of evaluations: the key that changes along a line")


def read_sweep(path):
  """What the sweep() of a config file yields: list of dicts."""
  spec = importlib.util.spec_from_file_location("swept_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "sweep"):
    raise ValueError(
      f"{path} has no sweep(); add one that yields dicts such as {{'optim.lr': 1e-3}}"
    )
  return list(module.sweep())


def frontier_of(program):
  """The module that draws evaluations; None for other programs, which need no matplotlib."""
  if program != "evaluate":
    return None
  try:
    from diffucoder_jax.evals import frontier
  except ImportError as error:
    raise ValueError(
      f"the figure needs matplotlib ({error}): pip install -e '.[report]'"
    ) from error
  return frontier


class Runner:
  """Runs programs one after the other; SIGTERM and SIGINT are passed on to the one that runs."""

  def __init__(self, submit):
    self.stopped, self._child, self._submit = False, None, submit
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._stop)

  def _stop(self, number, frame):
    child, again = self._child, self.stopped
    self.stopped = True
    if child is not None:
      if self._submit:
        print("stopping; the cell goes on where it runs", flush=True)
      else:
        print("stopping; the cell may save itself first (once more: at once)", flush=True)
      child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

  def run(self, words, log):
    """The exit code of `python words`, whose output is appended to the file `log`; None is stdout."""
    me = os.getpid()
    path = os.pathsep.join(x for x in (sys.path[0], os.environ.get("PYTHONPATH")) if x)

    def die_with_me():
      # Should this process be killed, the program must not go on beside the one that is started next.
      isolation.die_with_parent()
      if os.getppid() != me:
        os._exit(1)

    with open(log, "ab") if log else contextlib.nullcontext() as out:
      self._child = subprocess.Popen(
        SUBMIT[self._submit](words),
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT if log else None,
        start_new_session=True,  # Ctrl-C is for this process, which passes it on
        preexec_fn=die_with_me if sys.platform == "linux" else None,
      )
    if self.stopped:
      self._child.terminate()
    code = self._child.wait()
    self._child = None
    return code


def lock(output):
  """Keeps a second sweep out of the folder for as long as this process lives."""
  file = open(output / "sweep.lock", "w")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    raise ValueError(
      f"another sweep works in {output}; wait for it, or name another folder"
    ) from error
  return file


def run_cells(cells, commands, output, report, submit):
  """Runs what is not finished, here or on a pod. Returns the exit code of the sweep."""
  runner, spent, failed = Runner(submit), [], []
  left = [cell for cell in cells if cells_lib.state_of(cell, output / cell.name).kind != "finished"]
  print(f"{len(cells)} cells, {len(cells) - len(left)} are finished", flush=True)
  for i, cell in enumerate(left):
    if runner.stopped:
      return STOPPED
    folder, number = output / cell.name, cells.index(cell) + 1
    what = f"[{number}/{len(cells)}] {cell.name} {cells_lib.shown(cell.changes)}"
    before = cells_lib.state_of(cell, folder)
    print(f"{what}: {'starts' if before.kind == 'waiting' else f'goes on ({before})'}", flush=True)
    cells_lib.write_record(cell, folder)
    log = None if submit else folder / cells_lib.LOG
    began = time.monotonic()
    code = runner.run(commands[cell.name], log)
    spent.append(time.monotonic() - began)
    if runner.stopped or code == STOPPED:
      report()
      print(f"{what}: stopped; start the same command again to go on", flush=True)
      return STOPPED
    if submit and code not in (0, GAVE_UP):
      raise ValueError(
        f"babysit.sh ended with exit code {code}, see above; start the sweep again then"
      )
    state = cells_lib.state_of(cell, folder)
    if state.kind != "finished":
      cells_lib.write_record(cell, folder, why(code, state, log))
      state = cells_lib.state_of(cell, folder)
      failed.append(f"{cell.name} {cells_lib.shown(cell.changes)}: {state.detail}")
    report()
    rest = len(left) - i - 1
    span = [
      datetime.timedelta(seconds=round(x)) for x in (spent[-1], rest * sum(spent) / len(spent))
    ]
    print(f"{what}: {state} after {span[0]}; {rest} left, ETA {span[1]}", flush=True)
  for line in failed:
    print(f"FAILED {line}", flush=True)
  return 1 if failed else 0


def submit_workloads(cells, commands, output):
  """Hands what is not finished to the cluster's queue. Returns the exit code of the sweep."""
  name = os.environ.get("NAME", "diffucoder")
  for number, cell in enumerate(cells, 1):
    what = f"[{number}/{len(cells)}] {cell.name} {cells_lib.shown(cell.changes)}"
    before = cells_lib.state_of(cell, output / cell.name)
    if before.kind == "finished":
      continue
    code = subprocess.run(
      SUBMIT["xpk"](commands[cell.name]), env={**os.environ, "NAME": f"{name}-{cell.name}"}
    ).returncode
    if code not in (0, EXISTS):
      raise ValueError(f"xpk.sh ended with exit code {code}, see above; start the sweep again then")
    if code == 0:
      cells_lib.write_record(cell, output / cell.name)
    print(f"{what}: {'is there already' if code else 'submitted'} ({before})", flush=True)
  return 0


def check_committed(path):
  """A pod gets what git has: a cell whose config is another there would be found out at its end."""
  root = pathlib.Path(__file__).resolve().parents[1]
  if not pathlib.Path(path).resolve().is_relative_to(root) or pathlib.Path(path).is_absolute():
    raise ValueError(
      f"{path} must be named relative to {root}: a pod has the project's folder alone"
    )
  folders = [str(pathlib.Path(path)), "configs", "diffucoder_jax"]
  changed = subprocess.run(
    ["git", "status", "--porcelain", "--", *folders], cwd=root, capture_output=True, text=True
  )
  if changed.returncode or changed.stdout:
    what = (changed.stdout or changed.stderr).strip().splitlines()[0]
    raise ValueError(f"commit first: a pod gets what git has, without {what}")


def why(code, state, log):
  """How a cell's program ended, and the last line it said."""
  if state.kind == "failed":
    return state.detail
  if log is None:
    return (
      "it failed on the pod; bash launch/tpu.sh logs" if code else "it ended and is not finished"
    )
  ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
  text = log.read_bytes().decode(errors="replace")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  said = f": {lines[-1][:200]}" if lines else ""
  return f"{ended}{said if code > 0 else ''} (see {log})"


def write_results(cells, output, title, frontier, along):
  """The table, and of evaluations the frontier's page. Returns (rows, notes)."""
  rows = cells_lib.rows_of(
    cells, output, frontier.metrics_of if frontier else cells_lib.last_evaluation
  )
  notes = []
  others = cells_lib.others(output, cells)
  if others:
    listed = "; ".join(f"{name} ({changes})" for name, changes in others.items())
    notes.append(
      f"Not part of this sweep, because sweep() or the config is another now, and not in the table: "
      f"{listed}. Remove what is of no use any more."
    )
  if frontier:
    try:
      points = frontier.read(rows, along)
      if points:
        frontier.write(output, title, points, cells_lib.table(rows), along, notes)
    except ValueError as error:
      notes.append(f"No frontier: {error}")
      frontier.remove(output)  # one of some cells would look like one of all
  cells_lib.write_table(output, title, rows, notes)
  return rows, notes


def printed(cell, words, submit):
  """The line of shell that runs a cell."""
  if submit is None:
    return shlex.join(["python", *words])
  name = f"NAME={os.environ.get('NAME', 'diffucoder')}-{cell.name} " if submit == "xpk" else ""
  return name + shlex.join(SUBMIT[submit](words))


def main(argv):
  """Reads the sweep, and prints, runs or tells of its cells. Returns the exit code."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
  flag = flags.FLAGS["config"]
  source, common = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
  path = source.split(":")[0]
  cells = cells_lib.expand(_PROGRAM.value, _CONFIG.value, read_sweep(path))
  output = workdirs.absolute(_OUTPUT.value)
  commands = {
    cell.name: cells_lib.command(cell, source, common, output / cell.name) for cell in cells
  }
  submit = _SUBMIT.value
  if submit:
    check_committed(path)
  if _PRINT.value:
    for cell in cells:
      if cells_lib.state_of(cell, output / cell.name).kind != "finished":
        print(printed(cell, commands[cell.name], submit))
    return 0
  title = f"{source}, {_PROGRAM.value}: {len(cells)} cells"
  frontier = frontier_of(_PROGRAM.value)
  report = lambda: write_results(cells, output, title, frontier, _ALONG.value)  # noqa: E731
  code = 0
  if not _TABLE.value:
    remote = "://" in str(output)
    if remote and not submit:
      raise ValueError("cells run here write to a local folder; --submit runs them elsewhere")
    output.mkdir(parents=True, exist_ok=True)
    held = None if remote else lock(output)
    if submit == "xpk":
      code = submit_workloads(cells, commands, output)
    else:
      code = run_cells(cells, commands, output, report, submit)
    if held:
      held.close()
  rows, notes = report()
  finished = sum(row["state"] == "finished" for row in rows)
  print(cells_lib.markdown(cells_lib.table(rows)), end="")
  for note in notes:
    print(note)
  print(f"{finished} of {len(cells)} cells are finished; wrote {output / 'table.md'}")
  return code or (0 if _TABLE.value or submit == "xpk" or finished == len(cells) else 1)


def _main(argv):
  try:
    sys.exit(main(argv))
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f"sweep: {error}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "program", "output"])
  app.run(_main)
