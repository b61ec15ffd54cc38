"""A run's folder and the config it belongs to: one run per workdir, compared key by key."""

import json
import zlib

import jax
from absl import logging
from etils import epath

# A change in these sections, or of these keys, cannot change what is learnt.
HARMLESS = ("mesh", "log", "checkpoint", "eval", "hosts", "data.fill_batch")
# Keys that are younger than some workdirs, and the value that does what was done before them.
YOUNGER = {"optim.rounding": "nearest", "optim.moment_dtype": "float32"}
ACCEPT = "--config.checkpoint.accept_changes=True"


def canonical(value):
  """One text per JSON value, whatever the order of keys; a tuple equals a list."""
  return json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))


def crc(value):
  """Checksum (int) of a JSON value's canonical text."""
  return zlib.crc32(canonical(value).encode())


def write_text(path, text):
  """Writes a file so that a reader sees all of it or nothing."""
  part = path.parent / (path.name + ".part")
  part.write_text(text)
  part.replace(path)


def flat(tree, prefix=""):
  """{dotted key: value} of nested dicts; `prefix` goes before each key."""
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  items = {}
  for key, value in tree.items():
    items.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
  return items


def config_changes(saved, current):
  """What differs between two configs (nested dicts of JSON values).

  Returns:
    list of "dotted.key: saved -> current", sorted; "absent" stands for a key that is not there.
  """
  saved, current = (flat(json.loads(canonical(config))) for config in (saved, current))
  show = lambda config, key: json.dumps(config[key]) if key in config else "absent"  # noqa: E731
  return [
    f"{key}: {show(saved, key)} -> {show(current, key)}"
    for key in sorted(saved.keys() | current.keys())
    # 1 and 1.0 are the same value; NaN is the same as NaN only as text.
    if key not in saved
    or key not in current
    or (saved[key] != current[key] and show(saved, key) != show(current, key))
  ]


def check_config(saved, current, where):
  """Lets harmless and accepted changes pass with a line each; raises for all others."""
  as_before = [f"{key}: absent -> {json.dumps(value)}" for key, value in YOUNGER.items()]
  changes = [line for line in config_changes(saved, current) if line not in as_before]
  harmful = [
    line
    for line in changes
    if not {line.split(":")[0], line.split(":")[0].split(".")[0]} & {*HARMLESS}
  ]
  if harmful and not current.get("checkpoint", {}).get("accept_changes", False):
    lines = "\n  ".join(harmful)
    raise ValueError(
      f"{where} was made with another config (saved -> current):\n  {lines}\n"
      f"Use a new workdir, or set the old values, or say {ACCEPT} to go on with the new ones."
    )
  for line in changes:
    level = logging.WARNING if line in harmful else logging.INFO
    logging.log(level, "config differs from %s: %s", where, line)
  return changes


def absolute(path):
  """The path from the root, which Orbax insists on; gs:// and the like stay as they are."""
  path = epath.Path(path)
  return path if "://" in str(path) else path.absolute()


def claim_workdir(workdir, config):
  """Makes `workdir` this run's: writes config.json, or checks that the one there is of this run.

  Call before anything else is written. Differences in what `HARMLESS` names are fine; config.json
  then follows the new config.

  Args:
    workdir: path, also gs://.
    config: the whole config as nested dict of JSON values.
  Raises:
    ValueError: another run lives there; names every changed key with both values.
  """
  path = epath.Path(workdir) / "config.json"
  changes = None
  # A run that failed before its first step left nothing to protect: its config may be put right.
  checkpoints = path.parent / "checkpoints"
  begun = (path.parent / "metrics.jsonl").exists() or (
    checkpoints.exists() and any(checkpoints.iterdir())
  )
  if path.exists() and begun:
    try:
      saved = json.loads(path.read_text())
    except ValueError as error:
      raise ValueError(
        f"{path} is not valid JSON ({error}); move it away to let this run write it again, after "
        "making sure that the workdir is this run's"
      ) from error
    changes = check_config(saved, config, f"the run in {workdir}")
  if jax.process_index() == 0 and changes != []:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(json.loads(canonical(config)), indent=2) + "\n")
