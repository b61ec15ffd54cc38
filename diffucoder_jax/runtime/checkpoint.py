"""Checkpoints: asynchronous saves, and restores that are checked.

A checkpoint directory `<workdir>/checkpoints/<step>/`, named by the number of finished optimiser
steps, holds four items: `state` (arrays), `data` (position in the data), `config`, and `integrity`
(a fingerprint of everything else, because the storage layer does not notice every flipped bit).
"""

import json
import signal
import threading
from logging import WARNING

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from diffucoder_jax.runtime import fingerprint
from diffucoder_jax.runtime import workdir as workdirs

CHUNK_BYTES = 64 << 20
_sigterm = threading.Event()


class DamagedCheckpoint(ValueError):
  """A checkpoint that cannot be read or is not what was saved."""


# --- Reading one checkpoint.


def _check_shapes(saved, abstract, where, whole):
  """Raises a ValueError that names every leaf in which model and checkpoint differ."""
  asked = fingerprint.named_leaves(abstract)
  lines = []
  for name in sorted(asked.keys() | (saved.keys() if whole else set())):
    if name not in saved:
      lines.append(f"{name}: not in the checkpoint, the model has {list(asked[name].shape)}")
    elif name not in asked:
      lines.append(f"{name}: {saved[name]['shape']} in the checkpoint, not in the model")
    elif saved[name]["shape"] != list(asked[name].shape):
      lines.append(f"{name}: saved {saved[name]['shape']}, model {list(asked[name].shape)}")
    elif saved[name]["dtype"].startswith("key<") != fingerprint.is_key(asked[name]):
      lines.append(f"{name}: saved {saved[name]['dtype']}, model {asked[name].dtype}")
  if lines:
    text = "\n  ".join(lines)
    raise ValueError(
      f"{where} does not fit this model or optimiser:\n  {text}\n"
      "Set the config it was made with, or use a new workdir."
    )


def _together(error):
  """Raises `DamagedCheckpoint` on all processes when any of them has an error (str or None)."""
  if jax.process_count() > 1:
    fine = np.asarray(multihost_utils.process_allgather(np.asarray(error is None))).ravel()
    if error is None and not fine.all():
      error = f"processes {np.flatnonzero(~fine).tolist()} could not read it"
  if error is not None:
    raise DamagedCheckpoint(error)


def _attempt(read):
  """Calls `read()` on every process; an error of any kind, on any process, means damage."""
  # Twice, because a network that was down for a moment is not damage. Whether a damaged file shows
  # as ValueError, KeyError or a C++ status is up to the storage layer, so all count; wrong
  # verdicts do no harm as `resume` only acts on them when an older checkpoint reads well.
  for _ in range(2):
    try:
      value, error = read(), None
      break
    except Exception as caught:
      text = " ".join(str(caught).split())
      value, error = None, f"{type(caught).__name__}: {text[:300]}"
  _together(error)
  return value


def read_text_items(step_dir):
  """(integrity, data, config) of a checkpoint, checked against each other.

  `integrity["leaves"]` says shape, dtype and fingerprint of each array.
  """

  def read():
    handler = ocp.JsonCheckpointHandler()
    integrity, data, config = (
      handler.restore(step_dir / name) for name in ("integrity", "data", "config")
    )
    if integrity["crc32"] != workdirs.crc(integrity["of"]):
      raise ValueError("the integrity item is not what was saved")
    for name, value in (("data", data), ("config", config)):
      if integrity["of"][name] != workdirs.crc(value):
        raise ValueError(f"the {name} item is not what was saved")
    return integrity["of"], data, config

  return _attempt(read)


def _read_arrays(step_dir, abstract, saved):
  """Restores the leaves of `abstract`, all checked, in its dtypes and shardings.

  `saved` describes the leaves as they were saved; a leaf is read and checked in its saved dtype and
  only then converted.
  """
  one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def target(path, x):
    dtype = x.dtype
    if not fingerprint.is_key(x):
      dtype = jnp.dtype(saved[jax.tree_util.keystr(path, simple=True, separator="/")]["dtype"])
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding or one_device)

  item = jax.tree_util.tree_map_with_path(target, abstract)

  def read():
    # The bare handler, because a Checkpointer ends in a barrier, at which other processes would
    # wait for one that failed.
    args = ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    )
    tree = ocp.PyTreeCheckpointHandler().restore(step_dir / "state", args=args)
    # A name damaged in Orbax's own metadata is "not in the checkpoint", and hence not read at all.
    for name, x in fingerprint.named_leaves(tree).items():
      if not isinstance(x, jax.Array):
        raise ValueError(f"leaf {name} could not be found")
    return jax.block_until_ready(tree)

  restored = _attempt(read)
  wrong = [name for name, leaf in fingerprint.describe(restored).items() if leaf != saved[name]]
  _together(f"values changed since they were saved: {', '.join(wrong)}" if wrong else None)
  return jax.tree.map(
    lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), restored, abstract
  )


def find_step(path):
  """The directory of one checkpoint: `path` itself, or the newest one in a workdir."""
  path = workdirs.absolute(path)
  if (path / "checkpoints").is_dir():
    path = path / "checkpoints"
  if (path / "state").exists() or (path / "integrity").exists():
    return path
  steps = ocp.utils.checkpoint_steps(path) if path.is_dir() else []
  if not steps:
    raise FileNotFoundError(
      f"no checkpoint in {path}; give a workdir, its checkpoints folder, or one folder in there"
    )
  return path / str(max(steps))


def _named_damage(step_dir, read):
  try:
    return read()
  except DamagedCheckpoint as error:
    raise DamagedCheckpoint(
      f"checkpoint {step_dir} is damaged ({error}); give the path of another one beside it"
    ) from error


def load_config(path):
  """The config dict of a checkpoint; call on all processes.

  Args:
    path: workdir (newest checkpoint), its checkpoints/, or the folder of one step.
  Raises:
    FileNotFoundError: no checkpoint there. DamagedCheckpoint: not what was saved.
  """
  step_dir = find_step(path)
  return _named_damage(step_dir, lambda: read_text_items(step_dir)[2])


def restore_params(path, abstract_params):
  """Reads only the parameters, leaving the optimiser's state on disk; call on all processes.

  Args:
    path: workdir (newest checkpoint), its checkpoints/, or the folder of one step.
    abstract_params: tree of `jax.ShapeDtypeStruct`; dtypes may differ from the saved ones, a
      missing sharding means the first device.
  Returns:
    the tree of arrays.
  Raises:
    FileNotFoundError: no checkpoint there.
    ValueError: names the leaves whose shapes differ. DamagedCheckpoint: not what was saved. There
      is no silent falling back here: an evaluation of other weights would be a wrong result.
  """
  step_dir = find_step(path)
  abstract = {"params": abstract_params}

  def read():
    leaves = read_text_items(step_dir)[0]["leaves"]
    _check_shapes(leaves, abstract, f"checkpoint {step_dir}", whole=False)
    return _read_arrays(step_dir, abstract, leaves)["params"]

  return _named_damage(step_dir, read)


# --- Saving and resuming.


def _not_orbax_chatter(record):
  return record.levelno >= WARNING or "orbax" not in record.pathname


def open_manager(workdir, checkpoint_config):
  """Opens `<workdir>/checkpoints` for `save` and `resume`. Close it with `manager.close()`.

  Args:
    workdir: path, also gs://.
    checkpoint_config: every (steps between saves), keep (how many of the newest stay), keep_every
      (multiples of it stay for good; 0 = none). Keep at least 2 to be able to fall back.
  Returns:
    `orbax.checkpoint.CheckpointManager`.
  """
  c = checkpoint_config
  if c.every < 1 or c.keep < 1 or c.keep_every < 0:
    raise ValueError(
      f"checkpoint.every={c.every} and checkpoint.keep={c.keep} must be at least 1 and "
      f"checkpoint.keep_every={c.keep_every} at least 0 (= keep none for good)"
    )
  logging.get_absl_logger().addFilter(_not_orbax_chatter)
  policies = ocp.checkpoint_managers
  preserve = [policies.LatestN(c.keep)]
  if c.keep_every:
    preserve.append(policies.EveryNSteps(c.keep_every))
  options = ocp.CheckpointManagerOptions(
    # Without a policy Orbax also saves at the first step it is asked about.
    save_decision_policy=policies.AnySavePolicy(
      [policies.FixedIntervalPolicy(c.every), policies.PreemptionCheckpointingPolicy()]
    ),
    preservation_policy=policies.AnyPreservationPolicy(preserve),
    cleanup_tmp_directories=True,  # what a killed save left
    lightweight_initialize=True,  # or damaged metadata stops us from opening the folder at all
  )
  return ocp.CheckpointManager(workdirs.absolute(workdir) / "checkpoints", options=options)


def save(manager, step, state, data_state, config, force=False):
  """Starts saving when `step` is due; training may go on, and donate `state`, at once.

  Args:
    manager: from `open_manager`.
    step: int, finished optimiser steps.
    state: tree of jax arrays; call on all processes.
    data_state: dict of JSON values, where the data continues; the same on all processes.
    config: the whole config as nested dict of JSON values.
    force: save also when `step` is not due.
  Returns:
    bool, whether a save was started. False when `step` is already saved.
  """
  step = int(step)
  if step in manager.all_steps() or not (force or manager.should_save(step)):
    return False
  texts = text_items(fingerprint.describe(state), data_state, config)
  items = ocp.args.Composite(
    state=ocp.args.StandardSave(state, save_args=jax.tree.map(_save_args, state)),
    **{name: ocp.args.JsonSave(value) for name, value in texts.items()},
  )
  return manager.save(step, args=items, force=force)


def text_items(leaves, data_state, config):
  """The items of a checkpoint beside its arrays: {name: JSON value}; see `read_text_items`."""
  data_state, config = (json.loads(workdirs.canonical(value)) for value in (data_state, config))
  content = {"leaves": leaves, "data": workdirs.crc(data_state), "config": workdirs.crc(config)}
  integrity = {"of": content, "crc32": workdirs.crc(content)}
  return {"data": data_state, "config": config, "integrity": integrity}


def _save_args(x):
  # Chunks that a conversion can read one by one; what is stacked is cut between its layers.
  return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if x.ndim > 2 else ())


def _move_aside(manager, step, workdir):
  """Moves a checkpoint to <workdir>/checkpoints_damaged/, so that nothing is lost."""
  if jax.process_index() == 0:
    folder = workdirs.absolute(workdir) / "checkpoints_damaged"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / str(step)
    number = 1
    while target.exists():
      number += 1
      target = folder / f"{step}-{number}"
    (manager.directory / str(step)).rename(target)
    logging.error("checkpoint %d was moved to %s", step, target)
  multihost_utils.sync_global_devices(f"checkpoint {step} moved aside")
  # Nothing is left to delete; this is how the manager is made to forget the step. Its reload()
  # would read metadata, which may be damaged.
  manager.delete(step)


def _same_steps(steps):
  """The newest first, as process 0 sees them: a slow file system may show others something else."""
  steps = sorted(steps, reverse=True)
  if jax.process_count() > 1:
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.asarray((steps + [0] * count)[:count], np.int32)
    steps = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tolist() if count else []
  return steps


def resume(manager, workdir, abstract_state, config):
  """Restores the newest good checkpoint of this run; call on all processes.

  A damaged one is named in an error line and moved to <workdir>/checkpoints_damaged/, and the one
  before is taken. If all are damaged nothing is moved.

  Args:
    manager: from `open_manager`.
    workdir: path, also gs://.
    abstract_state: tree of `jax.ShapeDtypeStruct` with the shardings to restore to; mesh and number
      of processes may differ from those that saved.
    config: the whole config, to compare with the saved one.
  Returns:
    (state, data_state, step), or None when there is no checkpoint.
  Raises:
    ValueError: the config changed (every key is listed), or shapes do not fit the model (every leaf
      is listed). DamagedCheckpoint: there are checkpoints but none can be read.
  """
  damaged = []
  for step in _same_steps(manager.all_steps()):
    step_dir = manager.directory / str(step)
    try:
      content, data_state, saved_config = read_text_items(step_dir)
      workdirs.check_config(saved_config, config, f"checkpoint {step_dir}")
      _check_shapes(content["leaves"], abstract_state, f"checkpoint {step_dir}", whole=True)
      state = _read_arrays(step_dir, abstract_state, content["leaves"])
    except DamagedCheckpoint as error:
      logging.error("checkpoint %s is DAMAGED: %s; trying the one before", step_dir, error)
      damaged.append((step, error))
      continue
    for bad, _ in damaged:
      _move_aside(manager, bad, workdir)
    logging.info("continuing from checkpoint %s", step_dir)
    return state, data_state, step
  if damaged:
    lines = "\n  ".join(f"{step}: {error}" for step, error in damaged)
    raise DamagedCheckpoint(
      f"no checkpoint in {manager.directory} can be read:\n  {lines}\n"
      "Nothing was moved. If the storage is fine, move that folder away to start afresh."
    )
  return None


def catch_sigterm(all_processes=False):
  """Lets `reached_preemption` see a SIGTERM where JAX's own service does not run (one process).

  The first SIGTERM is only noted; a second one ends the program.

  Args: all_processes: also where there are several, for programs that ask `sigterm_came` instead.
  """

  def note(signum, frame):
    _sigterm.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  if all_processes or jax.process_count() == 1:
    signal.signal(signal.SIGTERM, note)


def sigterm_came():
  """Whether this process has been told to end; see `catch_sigterm`."""
  return _sigterm.is_set()


def reached_preemption(manager, step):
  """True when this machine is about to be taken away: save now and exit with code 42.

  Call at each step on all processes.
  """
  return _sigterm.is_set() or manager.reached_preemption(step)
