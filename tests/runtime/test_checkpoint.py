"""Checkpoints survive another mesh, damage, and a careless user."""

import functools
import gc
import json
import logging as std_logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffucoder_jax.runtime import checkpoint, fingerprint, sharding
from diffucoder_jax.runtime.optim import TrainState

pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

CONFIG = {
  "seed": 0,
  "model": {"width": 16, "layers": 2},
  "mesh": {"data": 2},
  "checkpoint": {"every": 1, "accept_changes": False},
}


def mesh_of(data, fsdp, tensor):
  devices = jax.devices()[: data * fsdp * tensor]
  return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


def spec_of(x):
  return PartitionSpec("fsdp", "tensor") if x.ndim == 2 else PartitionSpec()


def build(seed, width):
  """A small state with every kind of leaf that training has, and some more."""
  k = jax.random.split(jax.random.key(seed), 4)
  params = {
    "embed": jax.random.normal(k[0], (width, 8), jnp.bfloat16),
    "layer": {"kernel": jax.random.normal(k[1], (width, 8)), "bias": jax.random.normal(k[2], (8,))},
  }
  extra = {"flags": jnp.arange(5) % 2 == 0, "counts": jnp.arange(6, dtype=jnp.int8), "key": k[3]}
  # Large enough to be stored apart, where the storage layer has no checksum of its own.
  extra["big"] = jax.random.normal(k[3], (16, 512))
  opt_state = (optax.adam(1e-3).init(params), extra)
  return TrainState(step=jnp.asarray(seed, jnp.int32), params=params, opt_state=opt_state)


@functools.cache
def builder(mesh, width):
  shapes = jax.eval_shape(functools.partial(build, width=width), 0)
  out = jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x)), shapes)
  return jax.jit(functools.partial(build, width=width), out_shardings=out)


def make_state(mesh, seed=0, width=16):
  return builder(mesh, width)(seed)


def abstract(state, mesh):
  def one(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(x)))

  return jax.tree.map(one, state)


def raw(x):
  x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return np.asarray(x).tobytes()


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(x.dtype == y.dtype and raw(x) == raw(y) for x, y in pairs)


def open_manager(workdir, every=1, keep=3, keep_every=0):
  c = ml_collections.ConfigDict({"every": every, "keep": keep, "keep_every": keep_every})
  return checkpoint.open_manager(workdir, c)


def save_steps(workdir, mesh, steps, config=CONFIG, **options):
  with open_manager(workdir, **options) as manager:
    for step in steps:
      checkpoint.save(manager, step, make_state(mesh, step), {"next": step * 10}, config)


def resume(workdir, like, config=CONFIG):
  with open_manager(workdir) as manager:
    return checkpoint.resume(manager, workdir, like, config), list(manager.all_steps())


def test_restores_bitwise_onto_other_meshes(tmp_path):
  mesh = mesh_of(2, 2, 2)
  save_steps(tmp_path, mesh, [1, 2])
  want = make_state(mesh, 2)
  for shape in ((2, 2, 2), (1, 8, 1), (1, 2, 2), (1, 1, 1)):
    target = mesh_of(*shape)
    (state, data, step), _ = resume(tmp_path, abstract(want, target))
    assert same(state, want) and data == {"next": 20} and step == 2
    assert state.params["embed"].sharding == NamedSharding(target, spec_of(want.params["embed"]))


def test_nothing_to_resume(tmp_path):
  mesh = mesh_of(1, 1, 1)
  assert resume(tmp_path, abstract(make_state(mesh), mesh))[0] is None


def test_keeps_the_newest_and_the_multiples(tmp_path):
  save_steps(tmp_path, mesh_of(1, 1, 1), range(1, 9), every=2, keep=2, keep_every=4)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert kept == [4, 6, 8]


def test_saves_only_when_due_or_forced(tmp_path):
  state = make_state(mesh_of(1, 1, 1))
  with open_manager(tmp_path, every=5) as manager:
    assert not checkpoint.save(manager, 3, state, {}, CONFIG)
    assert checkpoint.save(manager, 5, state, {}, CONFIG)
    assert not checkpoint.save(manager, 5, state, {}, CONFIG, force=True)
    assert checkpoint.save(manager, 7, state, {}, CONFIG, force=True)


def test_state_may_be_donated_right_after_saving(tmp_path):
  mesh = mesh_of(2, 2, 2)
  state = make_state(mesh, 1)
  want = jax.tree.map(lambda x: x, make_state(mesh, 1))
  spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s.params), donate_argnums=0)
  with open_manager(tmp_path) as manager:
    checkpoint.save(manager, 1, state, {}, CONFIG)
    spoil(state)
  assert same(resume(tmp_path, abstract(want, mesh))[0][0], want)


def test_params_alone_in_another_dtype_and_on_one_device(tmp_path):
  mesh = mesh_of(2, 2, 2)
  save_steps(tmp_path, mesh, [1, 2])
  want = make_state(mesh, 2).params
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), want)
  for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
    got = checkpoint.restore_params(str(path), like)
    assert same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want))
    assert checkpoint.load_config(path) == CONFIG
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    checkpoint.load_config(tmp_path / "elsewhere")
  assert same(
    checkpoint.restore_params(tmp_path / "checkpoints" / "1", like),
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(mesh, 1).params),
  )


def flip(path, rng):
  content = bytearray(path.read_bytes())
  bit = int(rng.integers(8 * len(content)))
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def truncate(path, rng):
  os.truncate(path, int(rng.integers(path.stat().st_size)))


def files_of(step_dir):
  return sorted(p for p in step_dir.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.fixture
def forgotten_reads():
  """Orbax leaves reads un-awaited after a failed one; this is where Python may complain of them."""
  yield
  with warnings.catch_warnings(action="ignore"):
    time.sleep(0.2)
    gc.collect()


DAMAGES = {"flip": flip, "truncate": truncate, "delete": lambda path, rng: path.unlink()}


def damage_each(tmp_path, caplog, rounds):
  """Damages each file in turn. Returns how often the newest and the older state came back."""
  mesh = mesh_of(1, 2, 1)
  states = {step: make_state(mesh, step) for step in (1, 2)}
  like = abstract(states[1], mesh)
  workdir = tmp_path / "run"
  save_steps(workdir, mesh, [1, 2])
  newest = workdir / "checkpoints" / "2"
  originals = {path: path.read_bytes() for path in files_of(newest)}
  assert len(originals) > 8
  rng = np.random.default_rng(0)
  seen = {1: 0, 2: 0}
  for name in rounds:
    for path in originals:
      DAMAGES[name](path, rng)
      before = {p: p.read_bytes() for p in files_of(newest)}
      caplog.clear()
      (state, data, step), steps = resume(workdir, like)
      where = f"{name} {path.relative_to(newest)}"
      assert same(state, states[step]) and data == {"next": step * 10}, where
      seen[step] += 1
      loud = [r.getMessage() for r in caplog.records if r.levelno >= std_logging.ERROR]
      if step == 1:
        assert any("checkpoints/2 is DAMAGED" in line for line in loud), where
        assert steps == [1]
        aside = workdir / "checkpoints_damaged" / "2"
        after = {newest / p.relative_to(aside): p.read_bytes() for p in files_of(aside)}
        assert after == before, "damaged files are kept as they are"
        aside.rename(newest)
      else:
        assert steps == [1, 2]
      path.write_bytes(originals[path])
  return seen


@pytest.mark.usefixtures("forgotten_reads")
def test_damage_to_any_file_never_gives_wrong_values(tmp_path, caplog):
  seen = damage_each(tmp_path, caplog, ["flip", "truncate"])
  assert min(seen.values()) > 10


@pytest.mark.slow
@pytest.mark.usefixtures("forgotten_reads")
def test_much_damage_never_gives_wrong_values(tmp_path, caplog):
  damage_each(tmp_path, caplog, ["delete"] + ["truncate"] * 5 + ["flip"] * 25)


def test_a_leaf_renamed_by_damage_is_found(tmp_path):
  mesh = mesh_of(1, 1, 1)
  save_steps(tmp_path, mesh, [1, 2])
  metadata = tmp_path / "checkpoints" / "2" / "state" / "_METADATA"
  metadata.write_text(metadata.read_text().replace("flags", "fl`gs"))
  like = abstract(make_state(mesh), mesh)
  (state, _, step), _ = resume(tmp_path, like)
  assert step == 1 and same(state, make_state(mesh, 1))


def test_goes_on_saving_after_a_fall_back(tmp_path):
  mesh = mesh_of(1, 1, 1)
  save_steps(tmp_path, mesh, [1, 2])
  (tmp_path / "checkpoints" / "2" / "integrity" / "metadata").write_text("{")
  want = make_state(mesh, 2)
  with open_manager(tmp_path) as manager:
    _, _, step = checkpoint.resume(manager, tmp_path, abstract(want, mesh), CONFIG)
    assert step == 1
    assert checkpoint.save(manager, 2, want, {"next": 20}, CONFIG)
  assert same(resume(tmp_path, abstract(want, mesh))[0][0], want)
  # A second accident at the same step does not overwrite what was put aside.
  (tmp_path / "checkpoints" / "2" / "data" / "metadata").write_text('{"next": 21}')
  assert resume(tmp_path, abstract(want, mesh))[0][2] == 1
  assert sorted(p.name for p in (tmp_path / "checkpoints_damaged").iterdir()) == ["2", "2-2"]


def test_a_consistent_change_of_values_is_found(tmp_path):
  """Stored arrays that are well formed but not the ones that were saved."""
  mesh = mesh_of(1, 1, 1)
  save_steps(tmp_path, mesh, [1, 2])
  save_steps(tmp_path / "other", mesh, [1, 2, 3])
  state = tmp_path / "checkpoints" / "2" / "state"
  state.rename(tmp_path / "gone")
  (tmp_path / "other" / "checkpoints" / "3" / "state").rename(state)
  like = abstract(make_state(mesh), mesh)
  with pytest.raises(checkpoint.DamagedCheckpoint, match="params/layer/kernel.*another one beside"):
    checkpoint.restore_params(tmp_path, like.params)
  assert resume(tmp_path, like)[0][2] == 1


def test_leftovers_of_a_killed_save_and_odd_metadata_do_not_stop_a_run(tmp_path):
  mesh = mesh_of(1, 1, 1)
  save_steps(tmp_path, mesh, [1, 2])
  folder = tmp_path / "checkpoints"
  (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
  metadata = folder / "1" / "_CHECKPOINT_METADATA"
  content = json.loads(metadata.read_text())
  content["commit_timestamp_nsecs"] = 10**40
  metadata.write_text(json.dumps(content))
  # One manager for both, as a run has it: it deletes leftovers in the background until it saves.
  with open_manager(tmp_path) as manager:
    like = abstract(make_state(mesh), mesh)
    assert checkpoint.resume(manager, tmp_path, like, CONFIG)[2] == 1
    for step in (2, 3, 4):
      checkpoint.save(manager, step, make_state(mesh, step), {"next": step * 10}, CONFIG)
  assert sorted(p.name for p in folder.iterdir()) == ["2", "3", "4"]
  assert resume(tmp_path, abstract(make_state(mesh), mesh))[0][2] == 4


def test_when_all_are_damaged_nothing_is_moved(tmp_path):
  mesh = mesh_of(1, 1, 1)
  save_steps(tmp_path, mesh, [1, 2])
  for step in "12":
    (tmp_path / "checkpoints" / step / "config" / "metadata").write_text("{}")
  with pytest.raises(checkpoint.DamagedCheckpoint, match="Nothing was moved"):
    resume(tmp_path, abstract(make_state(mesh), mesh))
  assert not (tmp_path / "checkpoints_damaged").exists()


def test_another_width_names_the_leaves_and_moves_nothing(tmp_path):
  mesh = mesh_of(1, 1, 1)
  save_steps(tmp_path, mesh, [1, 2])
  wide = abstract(make_state(mesh, width=24), mesh)
  with pytest.raises(ValueError) as caught:
    resume(tmp_path, wide)
  assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)
  assert "params/layer/kernel: saved [16, 8], model [24, 8]" in str(caught.value)
  assert "params/embed: saved" in str(caught.value) and "bias" not in str(caught.value)
  with pytest.raises(ValueError, match=r"params/embed: saved \[16, 8\], model \[24, 8\]"):
    checkpoint.restore_params(tmp_path, wide.params)
  less = abstract(make_state(mesh), mesh)
  del less.params["layer"]["bias"]
  with pytest.raises(ValueError, match=r"params/layer/bias: \[8\] in the checkpoint, not in the m"):
    resume(tmp_path, less)
  assert resume(tmp_path, abstract(make_state(mesh), mesh))[0][2] == 2


def changed(**changes):
  config = json.loads(json.dumps(CONFIG))
  for key, value in changes.items():
    section, name = key.split("__")
    config[section][name] = value
  return config


def test_resume_refuses_a_changed_config_unless_told(tmp_path):
  mesh = mesh_of(1, 1, 1)
  save_steps(tmp_path, mesh, [1])
  like = abstract(make_state(mesh), mesh)
  with pytest.raises(ValueError) as caught:
    resume(tmp_path, like, changed(model__width=32, model__layers=3, mesh__data=8))
  text = str(caught.value)
  assert "model.width: 16 -> 32" in text and "model.layers: 2 -> 3" in text
  assert "mesh.data" not in text and "accept_changes=True" in text and "new workdir" in text
  accepted = changed(model__width=32, checkpoint__accept_changes=True)
  assert resume(tmp_path, like, accepted)[0][2] == 1
  assert resume(tmp_path, like, changed(mesh__data=8))[0][2] == 1


def test_fingerprint_sees_every_bit_and_no_sharding():
  x = jax.random.normal(jax.random.key(0), (4, 6))
  seen = set()
  for row, column, bit in ((0, 0, 0), (0, 0, 31), (3, 5, 7), (1, 2, 20)):
    words = np.array(x).view(np.uint32)
    words[row, column] ^= np.uint32(1 << bit)
    seen.add(fingerprint.describe({"x": jnp.asarray(words.view(np.float32))})["x"]["fingerprint"])
  seen.add(fingerprint.describe({"x": x})["x"]["fingerprint"])
  seen.add(fingerprint.describe({"x": x[::-1]})["x"]["fingerprint"])
  seen.add(fingerprint.describe({"x": x.reshape(6, 4).T})["x"]["fingerprint"])
  assert len(seen) == 7
  for kind in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint32, jnp.bool_, jnp.float8_e4m3fn):
    y = (x * 3).astype(kind)
    spread = jax.device_put(y, NamedSharding(mesh_of(2, 2, 2), PartitionSpec("data", "fsdp")))
    assert fingerprint.describe({"y": y}) == fingerprint.describe({"y": spread})
  # Zeros of -0.0 and 0.0 compare equal but are not the same bits.
  zeros = [fingerprint.describe({"x": jnp.full(3, z)})["x"]["fingerprint"] for z in (0.0, -0.0)]
  assert zeros[0] != zeros[1]


def test_leaves_that_cannot_be_saved_are_named():
  with pytest.raises(ValueError, match="leaf a/b is a ndarray"):
    fingerprint.describe({"a": {"b": np.ones(2)}})
  with pytest.raises(ValueError, match="leaf z is complex"):
    fingerprint.describe({"z": jnp.ones(2, jnp.complex64)})
  with pytest.raises(ValueError, match="leaf q is int4"):
    fingerprint.describe({"q": jnp.ones(2, jnp.int4)})


def test_orbax_does_not_flood_the_log(tmp_path, caplog):
  mesh = mesh_of(1, 1, 1)
  with caplog.at_level(std_logging.INFO):
    save_steps(tmp_path, mesh, [1, 2])
    resume(tmp_path, abstract(make_state(mesh), mesh))
  assert [r.getMessage().split(" /")[0] for r in caplog.records] == ["continuing from checkpoint"]


def test_bad_checkpoint_config_is_refused(tmp_path):
  with pytest.raises(ValueError, match="checkpoint.every=0"):
    open_manager(tmp_path, every=0)


def test_sigterm_is_noted(tmp_path):
  old = signal.getsignal(signal.SIGTERM)
  try:
    with open_manager(tmp_path) as manager:
      checkpoint.catch_sigterm()
      assert not checkpoint.reached_preemption(manager, 1)
      os.kill(os.getpid(), signal.SIGTERM)
      assert checkpoint.reached_preemption(manager, 2)
      assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, old)
    checkpoint._sigterm.clear()


# What each of two processes does: a save and a restore on eight devices of two processes, and a
# checkpoint that only the second process finds damaged.
PROGRAM = """
import sys
import jax
sys.path[:0] = [{repo!r}, {tests!r}]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize("127.0.0.1:{port}", 2, int(sys.argv[1]))
import test_checkpoint as t
from diffucoder_jax.runtime import checkpoint
mesh = t.mesh_of(2, 2, 2)
t.save_steps({workdir!r}, mesh, [1, 2])
state = t.make_state(mesh, 2)
like = t.abstract(state, mesh)
local = lambda tree: [x.addressable_data(0) for x in jax.tree.leaves(tree)]
(got, data, step), _ = t.resume({workdir!r}, like)
assert step == 2 and t.same(local(got), local(state))
if sys.argv[1] == "1":
  read = checkpoint.ocp.PyTreeCheckpointHandler.restore
  def fail(self, directory, args):
    if "/2/" in str(directory):
      raise OSError("torn")
    return read(self, directory, args=args)
  checkpoint.ocp.PyTreeCheckpointHandler.restore = fail
(got, data, step), steps = t.resume({workdir!r}, like)
assert step == 1 and steps == [1] and t.same(local(got), local(t.make_state(mesh, 1)))
"""


@pytest.mark.slow
def test_two_processes_save_restore_and_agree(tmp_path):
  import socket

  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  here = pathlib.Path(__file__).parent
  workdir = str(tmp_path / "run")
  program = PROGRAM.format(
    repo=str(here.parents[1]), tests=str(here), port=port, workdir=workdir
  )
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", program]
  workers = [
    subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  try:
    errors = [w.communicate(timeout=240)[1] for w in workers]
  finally:
    for w in workers:
      w.kill()
  assert [w.returncode for w in workers] == [0, 0], "\n".join(e[-3000:] for e in errors)
  assert "processes [1] could not read it" in errors[0]
  # What two processes saved is read by one, and the damaged one was kept.
  want = make_state(mesh_of(1, 1, 1), 1)
  assert same(resume(workdir, abstract(want, mesh_of(1, 1, 1)))[0][0], want)
  assert (pathlib.Path(workdir) / "checkpoints_damaged" / "2" / "state").is_dir()
