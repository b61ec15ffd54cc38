"""Checkpoints in pieces: the same files, whichever side writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffucoder_jax.runtime import checkpoint, fingerprint, sharding, streaming

CONFIG = {"model": {"width": 8}, "checkpoint": {}}


def arrays():
  rng = np.random.default_rng(0)
  return {
    "params/layers/w": rng.normal(size=(3, 8, 6)).astype(jnp.bfloat16),
    "params/embed": rng.normal(size=(10, 4)).astype(np.float32),
    "params/scale": rng.normal(size=(5,)).astype(np.float16),
  }


def incoming(array, chunk, step):
  def pieces():
    for start in range(0, len(array), step):
      yield (start, *[0] * (array.ndim - 1)), array[start : start + step]

  return streaming.Incoming(array.shape, array.dtype, chunk, pieces)


def save(folder):
  a = arrays()
  out = {
    "params/layers/w": incoming(a["params/layers/w"], (1, 4, 6), 1),
    "params/embed": incoming(a["params/embed"], (2, 4), 4),
    "params/scale": incoming(a["params/scale"], (5,), 5),
  }
  streaming.save(folder, out, {}, CONFIG)
  return a


def test_a_piecewise_checkpoint_restores_onto_a_mesh(tmp_path):
  saved = save(tmp_path / "checkpoints" / "7")
  mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=1), jax.devices()[:2])

  def leaf(name, *axes):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(saved[name].shape, saved[name].dtype, sharding=place)

  abstract = {
    "layers": {"w": leaf("params/layers/w", None, "fsdp")},
    "embed": leaf("params/embed", "fsdp"),
    "scale": leaf("params/scale"),
  }
  params = checkpoint.restore_params(tmp_path, abstract)
  for name, array in fingerprint.named_leaves({"params": params}).items():
    assert array.dtype == saved[name].dtype
    np.testing.assert_array_equal(array, saved[name])
  assert checkpoint.load_config(tmp_path) == CONFIG


def test_an_ordinary_checkpoint_is_read_in_pieces(tmp_path):
  a = arrays()
  state = {"params": {"layers": {"w": a["params/layers/w"]}, "embed": a["params/embed"]}}
  state = jax.tree.map(jnp.asarray, state | {"key": jax.random.key(0)})
  settings = ConfigDict(dict(every=1, keep=1, keep_every=0))
  with checkpoint.open_manager(tmp_path, settings) as manager:
    checkpoint.save(manager, 1, state, {}, CONFIG)
  opened, config, step_dir = streaming.open_arrays(tmp_path)
  assert sorted(opened) == ["params/embed", "params/layers/w"]
  assert config == CONFIG and step_dir.name == "1"
  layers = opened["params/layers/w"]
  for i in range(3):
    piece = layers.read((i, 0, 0), (1, 8, 6))
    np.testing.assert_array_equal(piece[0], a["params/layers/w"][i])
  layers.check()
  columns = opened["params/embed"]
  for first, last in [(0, 3), (3, 4)]:
    piece = columns.read((0, first), (10, last - first))
    np.testing.assert_array_equal(piece, a["params/embed"][:, first:last])
  columns.check()


def test_what_changed_or_was_not_read_is_noticed(tmp_path):
  save(tmp_path / "checkpoints" / "7")
  opened, *_ = streaming.open_arrays(tmp_path)
  embed = opened["params/embed"]
  embed.read((0, 0), (4, 4))
  with pytest.raises(checkpoint.DamagedCheckpoint, match="values of params/embed changed"):
    embed.check()
  for file in (tmp_path / "checkpoints/7/state").rglob("*"):
    if file.is_file() and file.parent.name == "d":
      file.write_bytes(b"")
  opened, *_ = streaming.open_arrays(tmp_path)
  with pytest.raises(checkpoint.DamagedCheckpoint, match="params/embed"):
    opened["params/embed"].read((0, 0), (10, 4))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_fingerprints_of_pieces_add_up(dtype):
  array = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(dtype)
  whole = fingerprint.describe({"x": jnp.asarray(array)})["x"]["fingerprint"]
  cuts = [((a, b, 0), array[a : a + 2, b : b + 1]) for a in (0, 2, 4) for b in range(5)]
  parts = [fingerprint.of_piece(np.ascontiguousarray(x), s, array.shape) for s, x in cuts]
  assert sum(parts) % (1 << 32) == whole
  moved = fingerprint.of_piece(np.ascontiguousarray(cuts[0][1]), (2, 0, 0), array.shape)
  assert moved != parts[0]
