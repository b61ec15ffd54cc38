"""The cells of a sweep: their names and commands, how far each has come, and the table of all.

A cell is one run of a program with one of the changes that a config's `sweep()` yields. Its folder
has the name of a hash of the program and of its whole config, defaults included: the same values
have the same name on every host, and a value that changes anywhere makes another cell, so that
results of two configs never meet in one folder.
"""

import hashlib
import json
import re
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from diffucoder_jax.runtime import metrics, workdir

RECORD, LOG = "cell.json", "output.log"
# Flags of `evaluate` that have no value.
SWITCHES = ("chat", "traces")


class Cell(NamedTuple):
  """One run. `changes` is what `sweep()` yielded, `config` the nested dict of all values."""

  name: str
  program: str
  changes: dict
  config: dict


class State(NamedTuple):
  """`kind` is "finished", "failed", "unfinished" or "waiting"; `detail` says more, or nothing."""

  kind: str
  detail: str = ""

  def __str__(self):
    return f"{self.kind}: {self.detail}" if self.detail else self.kind


def expand(program, config, sweep):
  """The cells of a sweep, in its order.

  Args:
    program: key of `PROGRAMS`. config: `ConfigDict` with what the command line says. sweep: dicts of
      dotted keys to values.
  Returns:
    list of `Cell`.
  Raises:
    ValueError: no cell, an unknown key, a value that is no value of that key, or two cells that are
      the same run; says which.
  """
  found = {}
  for number, changes in enumerate(sweep, 1):
    changed = config.copy_and_resolve_references().lock()
    for key, value in changes.items():
      if isinstance(value, dict):
        raise ValueError(f"cell {number} sets {key} to a dict; name what is in it by dotted keys")
    try:
      changed.update_from_flattened_dict(changes)
    except (KeyError, TypeError) as error:
      raise ValueError(f"cell {number} of sweep(), {shown(changes)}: {error}") from error
    values = json.loads(workdir.canonical(changed.to_dict()))
    text = workdir.canonical({"program": program, "config": values})
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    if name in found:
      first = list(found).index(name) + 1
      raise ValueError(
        f"cells {first} and {number} of sweep() are the same run ({shown(changes)}); remove one"
      )
    found[name] = Cell(name, program, dict(changes), values)
  if not found:
    raise ValueError("sweep() yields no cell")
  return list(found.values())


def shown(changes):
  """Changes as a line of text."""
  return ", ".join(f"{key}={value}" for key, value in changes.items()) or "no change"


def command(cell, source, common, folder):
  """What runs a cell: the words behind `python`.

  Args:
    cell: `Cell`. source: the config file, with its argument. common: {dotted key: value}, what the
      command line of the sweep says about all cells. folder: of the cell.
  """
  return ["-m", f"diffucoder_jax.{cell.program}", *PROGRAMS[cell.program][0](
    cell, source, common, str(folder)
  )]  # fmt: skip


def _config_flags(cell, source, common, folder):
  if "steps" not in cell.config.get("optim", {}):
    raise ValueError(f"{source} has no optim.steps; it is no config of {cell.program}")
  words = [f"--config={source}", f"--workdir={folder}"]
  for key, value in {**common, **cell.changes}.items():
    if value is None:
      raise ValueError(f"{key}=None cannot be said on the command line of {cell.program}")
    words.append(f"--config.{key}={value}")
  return words


def _evaluate_flags(cell, source, common, folder):
  """A config of `evaluate` has the names of its flags as keys; None leaves a flag out."""
  words = [f"--output={folder}"]
  for key, value in cell.config.items():
    if isinstance(value, dict):
      raise ValueError(
        f"{source} has a section {key!r}; a config for evaluate holds its flags alone"
      )
    if key in SWITCHES:
      words += [f"--{key}"] if value else []
    elif value is not None:
      words.append(f"--{key}={value}")
  return words


# --- How far a cell is.


def state_of(cell, folder):
  """`State` of a cell, from what its program left in `folder`, wherever it ran."""
  folder = epath.Path(folder)
  done, step = PROGRAMS[cell.program][1](cell, folder)
  record = read_record(folder)
  if done:
    other = _other_config(cell, folder)
    if other:
      return State("failed", f"ran with another config ({'; '.join(other[:3])}); the file changed "
                   f"while the sweep ran. Remove {folder} and start the sweep again")  # fmt: skip
    return State("finished")
  if record.get("failed"):
    return State("failed", record["failed"])
  if folder.exists():
    return State("unfinished", step)
  return State("waiting")


def _training_progress(cell, folder):
  total = cell.config["optim"]["steps"]
  saved = ocp.utils.checkpoint_steps(folder / "checkpoints") if (
    folder / "checkpoints").is_dir() else []  # fmt: skip
  # The last checkpoint is the last thing that is written.
  return total in saved, f"step {max(saved)} of {total} is saved" if saved else ""


def _evaluation_progress(cell, folder):
  samples = folder / "samples.jsonl"
  drawn = samples.read_text().count("\n") if samples.exists() else 0
  return (folder / "results.json").exists(), f"{drawn} samples are there" if drawn else ""


def _other_config(cell, folder):
  """What a finished run's config.json says differently; a program may fill in what is None."""
  path = folder / "config.json"
  if not path.exists():
    return []
  saved = json.loads(path.read_text())
  changes = workdir.config_changes(cell.config, saved)
  # The network's pattern follows from the objective, and defaults of the network are written out.
  return [
    line for line in changes
    if not line.startswith("model.attention:") and ": null ->" not in line and ": absent ->" not in line
  ]  # fmt: skip


# Program -> (flags of a cell, (whether it is done, how far it is)).
PROGRAMS = {
  "train": (_config_flags, _training_progress),
  "train_grpo": (_config_flags, _training_progress),
  "evaluate": (_evaluate_flags, _evaluation_progress),
}


def read_record(folder):
  """What `write_record` wrote; {} where there is none."""
  path = epath.Path(folder) / RECORD
  return json.loads(path.read_text()) if path.exists() else {}


def write_record(cell, folder, failed=""):
  """Says in a cell's folder which cell it is, and why its last run failed if it did."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  workdir.write_text(
    folder / RECORD, json.dumps({**cell._asdict(), "failed": failed}, indent=1) + "\n"
  )


def others(output, cells):
  """Cells in the folder `output` that belong to no cell of `cells`: {name: changes as text}."""
  output, names = epath.Path(output), {cell.name for cell in cells}
  if not output.is_dir():
    return {}
  found = sorted(p for p in output.iterdir() if re.fullmatch("[0-9a-f]{12}", p.name))
  return {p.name: shown(read_record(p).get("changes", {})) for p in found if p.name not in names}


# --- What cells found.


def last_evaluation(folder):
  """The last evaluation in a run's metrics.jsonl: {"step", "eval/...": number}."""
  rows = [
    {k: v for k, v in row.items() if k == "step" or k.startswith("eval/")}
    for row in metrics.read(folder)
  ]
  rows = [row for row in rows if len(row) > 1]
  return rows[-1] if rows else {}


def rows_of(cells, output, final):
  """One dict a cell: {"cell", "state", "detail", "changes", "metrics", "folder"}.

  Args:
    output: folder of the sweep. final: function from a finished cell's folder to its metrics, a flat
      dict. Cells that are not finished have no metrics: numbers of another step do not compare.
  """
  rows = []
  for cell in cells:
    folder = epath.Path(output) / cell.name
    state = state_of(cell, folder)
    found = {}
    if state.kind == "finished":
      try:
        found = final(folder)
      except ValueError as error:
        state = State("failed", f"{error}; remove what is broken and start the sweep again")
    rows.append({"cell": cell.name, "state": state.kind, "detail": state.detail,
                 "changes": cell.changes, "metrics": found, "folder": str(folder)})  # fmt: skip
  return rows


def table(rows):
  """The rows as lists of str, heads first: the cell, a column for each change, state and metrics."""
  keys = list(dict.fromkeys(key for row in rows for key in row["changes"]))
  names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
  names = [x for x in names if not re.search("_(se|low|high)$", x) and x != "eval/seconds"]
  lines = [["cell", *keys, "state", *names]]
  for row in rows:
    changes = [str(row["changes"].get(key, "")) for key in keys]
    values = [_value(row["metrics"], name) for name in names]
    state = str(State(row["state"], row["detail"])).replace("|", "/").replace("\n", " ")
    lines.append([row["cell"], *changes, state, *values])
  return lines


def _value(found, name):
  """A metric with its error or interval; shares of problems solved in percent."""
  if found.get(name) is None:
    return ""
  percent = "pass@" in name

  def number(value):
    if isinstance(value, int | str):
      return str(value)
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"

  text = number(found[name])
  if found.get(f"{name}_se") is not None:
    text += f" ± {number(found[f'{name}_se'])}"
  if found.get(f"{name}_low") is not None:
    text += f" ({number(found[f'{name}_low'])} to {number(found[f'{name}_high'])})"
  return text + (" %" if percent else "")


def markdown(lines):
  """Lines of `table` as a Markdown table that also reads as text."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  padded = [[x.ljust(w) for x, w in zip(line, widths, strict=True)] for line in lines]
  padded.insert(1, ["-" * width for width in widths])
  return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def write_table(output, title, rows, notes=()):
  """Writes table.md and cells.jsonl, one row a cell, into the folder of the sweep."""
  output = epath.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  text = f"# {title}\n\n{markdown(table(rows))}" + "".join(f"\n{note}\n" for note in notes)
  workdir.write_text(output / "table.md", text)
  workdir.write_text(output / "cells.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
