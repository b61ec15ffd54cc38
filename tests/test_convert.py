"""Conversions: bit for bit there and back, from any mesh, refused by name, never half there."""

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffucoder_jax import convert as program
from diffucoder_jax import pretrained
from diffucoder_jax.completion import generate
from diffucoder_jax.data.tokenizer import HFTokenizer
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.hf import load, mapping, shards, weights
from diffucoder_jax.model import lora
from diffucoder_jax.model.config import ModelConfig, preset
from diffucoder_jax.runtime import checkpoint, optim, sharding
from tests import test_processes as cluster
from tests import tiny
from tests.hf import folders
from tests.hf.test_tokenizer_files import QWEN_ADDED, qwen_like

BF16 = ml_dtypes.bfloat16
CONFIG = folders.CONFIG


def there_and_back(tmp_path, source, **options):
  program.convert(source, tmp_path / "orbax")
  program.convert(tmp_path / "orbax", tmp_path / "hf", **options)
  return tmp_path / "hf"


def check_same(folder, wanted):
  """The safetensors library reads exactly these tensors, bit for bit."""
  found = {}
  for file in sorted(folder.glob("*.safetensors")):
    with safe_open(file, "np") as opened:
      assert opened.metadata() == {"format": "pt"}
    found |= load_file(file)
  assert found.keys() == wanted.keys()
  for name, tensor in wanted.items():
    assert found[name].dtype == tensor.dtype, name
    assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
  "kind, dtype, num_shards",
  [
    ("Dream", BF16, 3), ("Dream", np.float32, 1), ("qwen2", BF16, 1), ("qwen2-tied", np.float32, 3),
    ("qwen2-tied", BF16, 1), ("llama", BF16, 3),
  ],
)  # fmt: skip
def test_there_and_back_is_bitwise(tmp_path, kind, dtype, num_shards):
  state = folders.make(tmp_path / "source", kind, dtype, num_shards)
  hf = there_and_back(tmp_path, tmp_path / "source", shard_size="4KB" if num_shards > 1 else "5GB")
  check_same(hf, state)
  assert (hf / shards.INDEX).exists() == (num_shards > 1)
  before, after = load.read_config(tmp_path / "source"), load.read_config(hf)
  assert mapping.config_from_hf(before) == mapping.config_from_hf(after)
  assert after["torch_dtype"] == np.dtype(dtype).name
  program.verify(hf)


def test_the_checkpoint_is_one_to_use(tmp_path):
  state = folders.make(tmp_path / "source", "Dream", np.float32)
  program.convert(tmp_path / "source", tmp_path / "orbax")
  one, two = (pretrained.from_pretrained(tmp_path / name) for name in ("source", "orbax"))
  assert one.config == two.config
  assert (
    (one.mask_id, one.eos_id, one.pad_id) == (two.mask_id, two.eos_id, two.pad_id) == (30, 28, 29)
  )
  assert len(state) == len(mapping.hf_shapes(one.config))
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_array_equal(pretrained.logits(one, tokens), pretrained.logits(two, tokens))


@pytest.mark.slow
def test_a_checkpoint_of_a_mesh_is_exported(tmp_path):
  """Written by eight devices on (2, 2, 2), with an optimiser's state beside the parameters."""
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    abstract = load.abstract_params(CONFIG, mesh)
    rng = np.random.default_rng(0)
    make = lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding)  # noqa: E731
    params = jax.tree.map(make, abstract)
    settings = ConfigDict(dict(every=1, keep=1, keep_every=0))
    config = {"model": dataclasses.asdict(CONFIG), "seed": 3}
    with checkpoint.open_manager(tmp_path / "run", settings) as manager:
      state = {"params": params, "opt_state": {"mu": params}, "step": jnp.int32(5)}
      checkpoint.save(manager, 5, state, {}, config)
  program.convert(tmp_path / "run", tmp_path / "hf", shard_size="6KB")
  wanted = {}
  for row in mapping.rows(CONFIG):
    leaf = np.asarray(mapping.get(params, row))
    for i, name in enumerate(row.names(CONFIG)):
      wanted[name] = np.ascontiguousarray(mapping.to_theirs(row, leaf[i] if row.stacked else leaf))
  check_same(tmp_path / "hf", wanted)
  manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
  assert manifest["step"] == 5 and manifest["config"]["seed"] == 3
  for name, entry in manifest["tensors"].items():
    assert entry["sha256"] == hashlib.sha256(wanted[name].tobytes()).hexdigest()


def with_adapters(folder):
  """A checkpoint with adapters of (2, 2, 2) devices. Returns its (config, params)."""
  config = dataclasses.replace(CONFIG, lora_rank=3, lora_alpha=2.0)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  rng = np.random.default_rng(0)
  with jax.set_mesh(mesh):
    params = jax.tree.map(
      lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding),
      load.abstract_params(config, mesh),
    )
    settings = ConfigDict(dict(every=1, keep=1, keep_every=0))
    with checkpoint.open_manager(folder, settings) as manager:
      state = {"params": params, "opt_state": optim.trained(params), "step": jnp.int32(5)}
      checkpoint.save(manager, 5, state, {}, {"model": dataclasses.asdict(config)})
  return config, params


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_adapters_are_merged_on_export_and_kept_in_checkpoints(tmp_path, dtype, monkeypatch):
  monkeypatch.setattr(shards, "PIECE_BYTES", 512)  # tensors are read in several pieces
  config, params = with_adapters(tmp_path / "run")
  name = np.dtype(dtype).name
  program.convert(tmp_path / "run", tmp_path / "hf", dtype=name, shard_size="6KB")
  merged, plain = lora.merge(jax.device_get(params), config)
  wanted = {}
  for row in mapping.rows(plain):
    leaf = np.asarray(mapping.get(merged, row))
    for i, key in enumerate(row.names(plain)):
      theirs = mapping.to_theirs(row, leaf[i] if row.stacked else leaf)
      wanted[key] = np.ascontiguousarray(theirs).astype(dtype)
  check_same(tmp_path / "hf", wanted)
  program.verify(tmp_path / "hf")
  assert pretrained.describe(tmp_path / "hf").config.lora_rank == 0

  program.convert(tmp_path / "run", tmp_path / "orbax", to="orbax", dtype=name)
  kept = pretrained.from_pretrained(tmp_path / "orbax")
  assert kept.config == dataclasses.replace(config, param_dtype=name)
  for part, kind in ((optim.trained, np.float32), (lora.without_adapters, dtype)):
    jax.tree.map(
      lambda got, want, kind=kind: np.testing.assert_array_equal(got, np.asarray(want).astype(kind)),
      part(kept.params), part(params),
    )  # fmt: skip


@pytest.mark.slow
def test_adapters_that_are_not_there_are_named(tmp_path):
  folders.make(tmp_path / "source", "Dream", np.float32)
  program.convert(tmp_path / "source", tmp_path / "orbax")
  config = dataclasses.replace(CONFIG, lora_rank=3)
  with pytest.raises(ValueError, match="params/layers/mlp/up_lora/b is missing"):
    weights.from_checkpoint(tmp_path / "orbax", config)
  with_adapters(tmp_path / "run")
  with pytest.raises(ValueError, match="params/layers/attn/o_lora/a is not part of the network"):
    weights.from_checkpoint(tmp_path / "run", CONFIG)
  config = dataclasses.replace(CONFIG, lora_rank=2)
  words = r"params/layers/attn/q/kernel_lora/b has shape \[2, 3, 4, 4\], the network \[2, 2, 4, 4\]"
  with pytest.raises(ValueError, match=words):
    weights.from_checkpoint(tmp_path / "run", config)


def test_dtypes(tmp_path):
  state = folders.make(tmp_path / "source", "Dream", np.float32)
  program.convert(tmp_path / "source", tmp_path / "bf16", dtype="bfloat16")
  program.convert(tmp_path / "bf16", tmp_path / "hf", dtype="float32")
  check_same(tmp_path / "hf", {k: v.astype(BF16).astype(np.float32) for k, v in state.items()})
  program.convert(tmp_path / "source", tmp_path / "direct", to="hf", dtype="bfloat16")
  check_same(tmp_path / "direct", {k: v.astype(BF16) for k, v in state.items()})
  mixed = folders.make(tmp_path / "mixed", "Dream", np.float32)
  mixed["model.norm.weight"] = mixed["model.norm.weight"].astype(BF16)
  save_file(mixed, tmp_path / "mixed" / shards.SINGLE)
  with pytest.raises(ValueError, match="model.norm.weight .* is bfloat16, but .* float32.*--dtype"):
    program.convert(tmp_path / "mixed", tmp_path / "no")
  program.convert(tmp_path / "mixed", tmp_path / "yes", dtype="float32")
  half = folders.make(tmp_path / "half", "Dream", np.float16)
  with pytest.raises(ValueError, match="the weights are float16; say --dtype"):
    program.convert(tmp_path / "half", tmp_path / "no")
  program.convert(tmp_path / "half", tmp_path / "whole", to="hf", dtype="float32")
  check_same(tmp_path / "whole", {k: v.astype(np.float32) for k, v in half.items()})


def break_nan(folder, state):
  state["model.layers.1.mlp.down_proj.weight"][3, 3] = np.nan
  save_file(state, folder / shards.SINGLE)


def break_missing(folder, state):
  del state["model.layers.1.mlp.down_proj.weight"]
  save_file(state, folder / shards.SINGLE)


def break_extra(folder, state):
  save_file(state | {"model.layers.9.mlp.down_proj.weight": np.ones(3)}, folder / shards.SINGLE)


def break_shape(folder, state):
  name = "model.layers.0.self_attn.q_proj.weight"
  save_file(state | {name: state[name].T.copy()[:8]}, folder / shards.SINGLE)


def break_dtype(folder, state):
  name = "model.layers.0.self_attn.q_proj.weight"
  save_file(state | {name: state[name].astype(np.int8)}, folder / shards.SINGLE)


def break_overflow(folder, state):
  state["model.norm.weight"][0] = 3.4e38  # finite, and infinite as bfloat16
  save_file(state, folder / shards.SINGLE)


def break_length(folder, state):
  data = (folder / shards.SINGLE).read_bytes()
  (folder / shards.SINGLE).write_bytes(data[:-8])


def break_index(folder, state):
  where = {name: "model-00002-of-00002.safetensors" for name in state}
  (folder / shards.INDEX).write_text(json.dumps({"weight_map": where}))


def edit_config(**changes):
  def change(folder, state):
    config = load.read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | changes))

  return change


@pytest.mark.parametrize(
  "spoil, message",
  [
    (break_nan, "layers.1.mlp.down_proj.weight in model.safetensors has NaN or infinite"),
    (
      break_overflow,
      "model.norm.weight in model.safetensors has NaN or infinite values .as bfloat16",
    ),
    (break_missing, "layers.1.mlp.down_proj.weight is missing .* check num_hidden_layers"),
    (break_extra, "layers.9.mlp.down_proj.weight is in the safetensors files, but not part"),
    (break_shape, "layers.0.self_attn.q_proj.weight .* has shape .* config.json asks for"),
    (break_dtype, "layers.0.self_attn.q_proj.weight .* stored as I8; only F32, F16, BF16"),
    (break_length, "not a whole safetensors file .* fetch it again"),
    (break_index, "names model-00002-of-00002.safetensors, which is not there; fetch that shard"),
    (edit_config(model_type="gpt2"), "model_type 'gpt2'; only .* are supported"),
    (edit_config(num_hidden_layers=3), "layers.2.* and 9 more are missing"),
    (edit_config(hidden_act="gelu"), "hidden_act = 'gelu'"),
  ],
)
def test_refused_by_name(tmp_path, spoil, message):
  state = folders.make(tmp_path / "source", "Dream", np.float32)
  spoil(tmp_path / "source", state)
  for way in ("orbax", "hf"):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      program.convert(tmp_path / "source", tmp_path / "target", to=way, dtype="bfloat16")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_tokenizer_and_config_must_agree(tmp_path):
  home = tiny.make_home(tmp_path)
  folders.make(tmp_path / "source", "Dream", np.float32, vocab_size=512)
  tokenizer = pretrained.load_tokenizer(home.tokenizer)
  tokenizer.save(tmp_path / "source")
  with pytest.raises(ValueError, match=f"mask_token_id .* is 30, .* {tokenizer.mask_id}"):
    program.convert(tmp_path / "source", tmp_path / "orbax")
  edit_config(mask_token_id=tokenizer.mask_id, eos_token_id=2, pad_token_id=0)(
    tmp_path / "source", 0
  )
  hf = there_and_back(tmp_path, tmp_path / "source")
  ckpt = pretrained.from_pretrained(hf)
  text = "def f(x):\n\treturn '\u2581'\r\n"
  assert ckpt.tokenizer.encode(text) == tokenizer.encode(text)
  assert ckpt.mask_id == tokenizer.mask_id
  edit_config(vocab_size=300)(tmp_path / "source", 0)
  with pytest.raises(ValueError, match="vocab_size"):
    program.convert(tmp_path / "source", tmp_path / "again")


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
  state = folders.make(tmp_path / "source", "Dream", np.float32)
  program.convert(tmp_path / "source", tmp_path / "orbax")
  files = [p for p in (tmp_path / "orbax/checkpoints/0/state").rglob("*") if p.parent.name == "d"]
  refused = 0
  for i, file in enumerate(sorted(files, key=lambda path: -path.stat().st_size)[:6]):
    data = file.read_bytes()
    file.write_bytes(
      data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    )
    try:
      program.convert(tmp_path / "orbax", tmp_path / f"hf{i}")
    except ValueError:  # damaged, or values that no training leaves
      refused += 1
      assert not (tmp_path / f"hf{i}").exists()
    else:  # the bit was in a part that nothing reads any more
      check_same(tmp_path / f"hf{i}", state)
    file.write_bytes(data)
  assert refused > 0


def test_targets_are_not_overwritten_unasked(tmp_path):
  folders.make(tmp_path / "source", "Dream", np.float32)
  (tmp_path / "target").mkdir()
  (tmp_path / "target" / "thesis.tex").write_text("years of work")
  with pytest.raises(FileExistsError, match="exists; name another --target, or .* --overwrite"):
    program.convert(tmp_path / "source", tmp_path / "target")
  assert (tmp_path / "target" / "thesis.tex").exists()
  program.convert(tmp_path / "source", tmp_path / "target", overwrite=True)
  assert [p.name for p in (tmp_path / "target").iterdir()] != ["thesis.tex"]
  pretrained.from_pretrained(tmp_path / "target")


def test_verify_names_what_changed(tmp_path):
  folders.make(tmp_path / "source", "Dream", np.float32)
  program.convert(tmp_path / "source", tmp_path / "hf", to="hf")
  file = tmp_path / "hf" / shards.SINGLE
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  edit_config(rope_theta=1.0)(tmp_path / "hf", None)
  with pytest.raises(ValueError, match="lm_head.weight in .* was changed; config.json was changed"):
    program.verify(tmp_path / "hf")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["mean", "normal", "keep"])
def test_new_rows(tmp_path, init, tied):
  state = folders.make(tmp_path, "qwen2-tied" if tied else "qwen2", np.float32)
  config = ModelConfig(**mapping.config_from_hf(load.read_config(tmp_path)))
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    patch.setattr(shards, "PIECE_BYTES", 512)  # several pieces, one of them cut by the new ids
    opened = weights.from_folder(tmp_path, config, stack)
    new = weights.with_new_rows(opened, [25, 26, 27], init)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
      assert (name in new.tensors) == (name in state)
      if name in state:
        pieces = [new.tensors[name].read(*part) for part in new.tensors[name].row_ranges()]
        assert len(pieces) > 2
        found, old = np.concatenate(pieces), state[name]
        others = np.r_[0:25, 28:32]
        np.testing.assert_array_equal(found[others], old[others])
        mean, std = old[:25].mean(0), old[:25].std(0)
        if init == "keep":
          np.testing.assert_array_equal(found, old)
        elif init == "mean":
          np.testing.assert_allclose(found[25:28], np.tile(mean, (3, 1)), atol=1e-6)
        else:
          z = (found[25:28] - mean) / std
          assert 0.5 < z.std() < 1.5 and abs(z.mean()) < 0.5
          assert not np.array_equal(found[25], found[26])


def test_a_qwen_folder_gets_a_mask(tmp_path):
  """What begins every run: autoregressive weights, whose tied head then never says MASK."""
  file = qwen_like(QWEN_ADDED)
  known = HFTokenizer(file).vocab_size
  sizes = dict(vocab_size=known + 5, eos_token_id=None)
  state = folders.make(tmp_path / "source", "qwen2-tied", np.float32, **sizes)
  (tmp_path / "source" / "tokenizer.json").write_bytes(file)
  program.convert(tmp_path / "source", tmp_path / "start", new_tokens="mean")
  ckpt = pretrained.from_pretrained(tmp_path / "start")
  assert ckpt.mask_id == ckpt.tokenizer.mask_id == known + 1
  assert ckpt.tokenizer.pad_id == known + 2
  embed = np.asarray(ckpt.params["embed"])
  old = state["model.embed_tokens.weight"]
  np.testing.assert_array_equal(np.delete(embed, [known, known + 1, known + 2], 0),
                                np.delete(old, [known, known + 1, known + 2], 0))  # fmt: skip
  np.testing.assert_allclose(embed[known + 1], old[:known].mean(0), atol=1e-6)
  # Tied: make MASK the likeliest word everywhere.
  loud = ckpt.params | {"embed": ckpt.params["embed"].at[ckpt.mask_id].mul(1e3)}
  ckpt = dataclasses.replace(ckpt, params=loud)
  sampler = SamplerConfig(max_new_tokens=8, temperature=0.0)
  for completion in generate(ckpt, [[1, 2, 3], [4]], sampler):
    assert len(completion.tokens) == 8 and ckpt.mask_id not in completion.tokens

  with pytest.raises(ValueError, match="a checkpoint has|was trained on masks has its tokens"):
    program.convert(tmp_path / "start", tmp_path / "no", new_tokens="mean")
  sizes = dict(vocab_size=known + 2, eos_token_id=None)
  folders.make(tmp_path / "source", "qwen2-tied", np.float32, **sizes)
  with pytest.raises(ValueError, match=f"<.dlm_pad.> would be token {known + 2}, .* no spare row"):
    program.convert(tmp_path / "source", tmp_path / "no", new_tokens="mean")
  assert not (tmp_path / "no").exists()


def test_tokens_that_are_not_needed_become_the_diffusion_tokens(tmp_path):
  """SmolLM2's way: no spare row, so three rows that are there begin anew as the mean of the others."""
  file = qwen_like(QWEN_ADDED)
  special = HFTokenizer(file).special_ids
  sizes = dict(vocab_size=HFTokenizer(file).vocab_size, eos_token_id=None)
  state = folders.make(tmp_path / "source", "qwen2-tied", np.float32, **sizes)
  (tmp_path / "source" / "tokenizer.json").write_bytes(file)
  reuse = list(special)[-3:]
  program.convert(tmp_path / "source", tmp_path / "start", new_tokens="mean", reuse=reuse)
  ckpt = pretrained.from_pretrained(tmp_path / "start")
  assert ckpt.mask_id == special[reuse[1]] and ckpt.tokenizer.pad_id == special[reuse[2]]
  taken = [special[token] for token in reuse]
  old, new = state["model.embed_tokens.weight"], np.asarray(ckpt.params["embed"])
  np.testing.assert_array_equal(np.delete(new, taken, 0), np.delete(old, taken, 0))
  np.testing.assert_allclose(new[taken], np.tile(np.delete(old, taken, 0).mean(0), (3, 1)), atol=1e-6)


# --- Real processes, killed.


def start(source, target, *flags):
  command = [sys.executable, "-m", "diffucoder_jax.convert", "--source", source, "--target", target]
  return subprocess.Popen(
    [str(part) for part in (*command, *flags)], stderr=subprocess.PIPE, text=True, cwd=tiny.ROOT
  )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_killed_ten_times(tmp_path, to):
  config = folders.make_large(tmp_path / "source", megabytes=300)
  source = tmp_path / "source"
  if to == "hf":
    program.convert(source, tmp_path / "checkpoint")
    source = tmp_path / "checkpoint"
  flags = ["--shard-size", "40MB"] if to == "hf" else []
  target, part = tmp_path / "target", tmp_path / "target.partial"
  chance, seconds = random.Random(0), 1.0  # that a conversion writes for; measured as we go
  for _ in range(10):
    killed = False
    while not killed:
      shutil.rmtree(part, ignore_errors=True)  # of the kill before; the last one's stays
      process = start(source, target, *flags)
      while not part.exists() and process.poll() is None:
        time.sleep(0.01)
      began = time.monotonic()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0, seconds))
      process.send_signal(signal.SIGKILL)
      killed = process.wait() != 0
      if not killed:  # It was faster: learn from that, and try again.
        seconds = 0.8 * (time.monotonic() - began)
        shutil.rmtree(target)
    assert not target.exists() and part.exists()
    with pytest.raises((ValueError, FileNotFoundError)):
      pretrained.from_pretrained(part)
  done = start(source, target, *flags)
  assert done.wait() == 0, done.stderr.read()
  assert not part.exists()
  one, two = (pretrained.from_pretrained(tmp_path / name) for name in ("source", "target"))
  assert one.config.embed_dim == two.config.embed_dim == config.embed_dim
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
  """The 7B's matrices, one layer of them: the largest are the embedding and the head, 1.1 GB each."""
  if shutil.disk_usage(tmp_path).free < 12e9:
    pytest.skip("needs 12 GB of disk")
  sizes = preset("diffucoder_7b")
  hf_config = folders.config_json(
    "Dream", vocab_size=sizes["vocab_size"], hidden_size=sizes["embed_dim"], num_hidden_layers=1,
    num_attention_heads=sizes["num_heads"], num_key_value_heads=sizes["num_kv_heads"],
    intermediate_size=sizes["mlp_dim"],
  )  # fmt: skip
  folders.make_large(tmp_path / "source", hf_config=hf_config)
  # The process's own high-water mark: the kernel's `ru_maxrss` would count this one's memory too.
  code = (
    "import sys; from diffucoder_jax import convert; convert.main(sys.argv[1:]);"
    "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
  )
  for source, target in [("source", "orbax"), ("orbax", "hf")]:
    flags = ["--source", str(tmp_path / source), "--target", str(tmp_path / target)]
    done = subprocess.run(
      [sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=tiny.ROOT
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    assert 100e6 < peak < 3 * 2**30
  check_same_files(tmp_path / "source", tmp_path / "hf")


def check_same_files(one, two):
  """Tensor by tensor, without holding a model."""
  with contextlib.ExitStack() as stack:
    ours, theirs = (shards.open_folder(folder, stack) for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
      assert tensor.dtype == theirs[name].dtype
      for part in tensor.row_ranges():
        assert tensor.read(*part).tobytes() == theirs[name].read(*part).tobytes(), name


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_exported(tmp_path_factory, tmp_path):
  home = tiny.make_home(tmp_path_factory.getbasetemp())
  settings = cluster.changes((2, 2, 2), **{"optim.steps": 4})
  ended = cluster.wait_for_both(cluster.start_two(home, tmp_path / "run", tmp_path, settings))
  assert [code for code, _ in ended] == [0, 0], ended[0][1][-3000:]
  program.convert(tmp_path / "run", tmp_path / "hf", shard_size="100KB")
  program.convert(tmp_path / "hf", tmp_path / "again")
  ours = pretrained.from_pretrained(tmp_path / "run")
  exported = pretrained.from_pretrained(tmp_path / "hf")
  back = pretrained.from_pretrained(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, ours.params, exported.params)
  jax.tree.map(np.testing.assert_array_equal, ours.params, back.params)
  tokens = np.arange(40).reshape(2, 20)
  np.testing.assert_array_equal(
    pretrained.logits(ours, tokens), pretrained.logits(exported, tokens)
  )
