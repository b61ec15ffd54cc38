"""Loading Hugging Face folders: every way in which one can be wrong, shards, and meshes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffucoder_jax.hf import load, mapping, shards
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.runtime import sharding

CONFIG = ModelConfig(
  vocab_size=32, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
)
TIED = dataclasses.replace(CONFIG, tied_head=True)
DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"


def state_dict(config=CONFIG, dtype=np.float32):
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in mapping.hf_shapes(config).items()
  }


def write(folder, state, num_shards=1):
  names = sorted(state)
  if num_shards == 1:
    save_file(state, folder / shards.SINGLE, metadata={"format": "pt"})
    return
  where = {}
  for shard in range(num_shards):
    file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
    save_file({name: state[name] for name in names[shard::num_shards]}, folder / file)
    where |= {name: file for name in names[shard::num_shards]}
  (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def check(params, state, config=CONFIG):
  """Every tensor of the file is at its place, no leaf is left over."""
  assert len(jax.tree.leaves(params)) == len(mapping.rows(config))
  for row in mapping.rows(config):
    leaf = np.asarray(mapping.get(params, row))
    for i, name in enumerate(row.names(config)):
      theirs = mapping.to_theirs(row, leaf[i] if row.stacked else leaf)
      np.testing.assert_array_equal(theirs, state[name].astype(leaf.dtype), err_msg=name)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_files(tmp_path, num_shards):
  state = state_dict()
  write(tmp_path, state, num_shards)
  params = load.load_params(tmp_path, CONFIG)
  check(params, state)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_a_mesh_gets_the_same_values_in_its_layout(tmp_path, shape):
  state = state_dict()
  write(tmp_path, state, 2)
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
  params = load.load_params(tmp_path, CONFIG, mesh)
  check(params, state)
  wanted = load.abstract_params(CONFIG, mesh)
  as_wanted = jax.tree.map(
    lambda leaf, like: leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), params, wanted
  )
  assert all(jax.tree.leaves(as_wanted))
  kernel = params["layers"]["attn"]["q"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // (shape[1] * shape[2])


def test_only_the_slices_of_local_devices_are_read(tmp_path, monkeypatch):
  state, read = state_dict(), []
  write(tmp_path, state)
  reader = load._reader

  def recorded(tensor):
    def rows(first, last):
      read.append(tensor.read(first, last).nbytes)
      return tensor.read(first, last)

    return reader(dataclasses.replace(tensor, read=rows))

  monkeypatch.setattr(load, "_reader", recorded)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  load.load_params(tmp_path, CONFIG, mesh)
  # All devices are local here: each byte once, although several devices want it, in the runs of
  # rows that they hold.
  assert sum(read) == sum(tensor.nbytes for tensor in state.values())
  assert max(read) == max(tensor.nbytes for tensor in state.values()) // 2


@pytest.mark.parametrize("disk", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("memory", ["float32", "bfloat16"])
def test_dtypes(tmp_path, disk, memory):
  state = state_dict(dtype=disk)
  write(tmp_path, state)
  by_config = load.load_params(tmp_path, dataclasses.replace(CONFIG, param_dtype=memory))
  by_argument = load.load_params(tmp_path, CONFIG, dtype=memory)
  for params in (by_config, by_argument):
    assert all(leaf.dtype == memory for leaf in jax.tree.leaves(params))
    check(params, state)


@pytest.mark.parametrize("chunk", [8192, 30])
def test_tied_head_may_be_stored_twice_if_it_is_the_same(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(load._check_tied, "__defaults__", (chunk,))
  state = state_dict(TIED)
  write(tmp_path, state)
  check(load.load_params(tmp_path, TIED), state, TIED)
  state[HEAD] = state["model.embed_tokens.weight"].copy()
  write(tmp_path, state)
  params = load.load_params(tmp_path, TIED)
  assert "head" not in params
  state[HEAD][31, 15] += 1
  write(tmp_path, state)
  message = f"{HEAD} in {shards.SINGLE} differs.*tie_word_embeddings to false"
  with pytest.raises(ValueError, match=message):
    load.load_params(tmp_path, TIED)


def test_rotary_buffers_are_ignored(tmp_path):
  state = state_dict()
  name = "model.layers.1.self_attn.rotary_emb.inv_freq"
  write(tmp_path, state | {name: np.ones(4, np.float32)})
  check(load.load_params(tmp_path, CONFIG), state)


def test_llama_layout_has_no_biases(tmp_path):
  config = dataclasses.replace(CONFIG, qkv_bias=False)
  state = state_dict(config)
  write(tmp_path, state)
  check(load.load_params(tmp_path, config), state, config)
  with pytest.raises(ValueError, match="q_proj.bias.* are missing"):
    load.load_params(tmp_path, CONFIG)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s: s.pop(DOWN), f"{DOWN} is missing.*num_hidden_layers"),
    (lambda s: s.pop(HEAD), f"{HEAD} is missing.*tie_word_embeddings"),
    (lambda s: [s.pop(n) for n in list(s) if "norm" in n], "and 2 more are missing"),
    (lambda s: s.update({"model.layers.2.x": s[DOWN]}), "model.layers.2.x is in .* not part of"),
    (lambda s: s.update({DOWN: s[DOWN].T.copy()}), rf"{DOWN} in .* shape \(24, 16\).* \(16, 24\)"),
    (lambda s: s.update({DOWN: s[DOWN].astype(np.float64)}), f"{DOWN} in .* stored as F64"),
    (lambda s: s[DOWN].__setitem__((3, 3), np.nan), f"{DOWN} in {shards.SINGLE} has NaN"),
    (lambda s: s[HEAD].__setitem__((0, 0), -np.inf), f"{HEAD} in {shards.SINGLE} has .* infinite"),
  ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
  state = state_dict()
  change(state)
  write(tmp_path, state)
  with pytest.raises(ValueError, match=message):
    load.load_params(tmp_path, CONFIG)


def test_nothing_is_allocated_before_all_is_checked(tmp_path, monkeypatch):
  state = state_dict()
  del state["model.norm.weight"]  # one of the last
  write(tmp_path, state)
  monkeypatch.setattr(load, "_load_row", lambda *args: pytest.fail("allocated"))
  with pytest.raises(ValueError, match="model.norm.weight is missing"):
    load.load_params(tmp_path, CONFIG)


def test_a_truncated_file_is_named(tmp_path):
  write(tmp_path, state_dict(), 2)
  file = sorted(tmp_path.glob("*.safetensors"))[1]
  whole = file.read_bytes()
  message = f"{file.name} is not a whole safetensors file.*fetch it again"
  for keep in (0, 5, 1000, len(whole) - 1):
    file.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=message):
      load.load_params(tmp_path, CONFIG)


def test_a_wrong_index_is_named(tmp_path):
  write(tmp_path, state_dict(), 2)
  first, second = sorted(tmp_path.glob("*.safetensors"))
  index = json.loads((tmp_path / shards.INDEX).read_text())
  name = next(name for name, file in index["weight_map"].items() if file == first.name)
  index["weight_map"][name] = second.name
  (tmp_path / shards.INDEX).write_text(json.dumps(index))
  message = f"says that {second.name} holds {re.escape(name)}, but it does not"
  with pytest.raises(ValueError, match=message):
    load.load_params(tmp_path, CONFIG)
  second.unlink()
  with pytest.raises(FileNotFoundError, match=f"names {second.name}, which is not there"):
    load.load_params(tmp_path, CONFIG)
  (tmp_path / shards.INDEX).write_text("{}")
  with pytest.raises(ValueError, match="is not a safetensors index"):
    load.load_params(tmp_path, CONFIG)


def test_a_folder_without_safetensors_says_what_it_has(tmp_path):
  (tmp_path / "pytorch_model.bin").touch()
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*pytorch_model.bin"):
    load.load_params(tmp_path, CONFIG)


def test_broken_configs(tmp_path):
  with pytest.raises(FileNotFoundError, match="config.json does not exist"):
    load.read_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not JSON"):
    load.read_config(tmp_path)


def test_a_mesh_that_does_not_fit_is_named(tmp_path):
  write(tmp_path, state_dict())
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=8))
  with pytest.raises(ValueError, match="parameter layers/attn/.* cannot divide"):
    load.load_params(tmp_path, CONFIG, mesh)
