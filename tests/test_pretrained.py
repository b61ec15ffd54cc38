"""from_pretrained on every kind of path, and logits as a notebook asks for them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from ml_collections import config_dict
from safetensors.numpy import save_file

from diffucoder_jax import pretrained
from diffucoder_jax.data.tokenizer import HFTokenizer
from diffucoder_jax.hf import load, mapping
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.runtime import checkpoint, sharding
from diffucoder_jax.runtime import workdir as workdirs

pytestmark = pytest.mark.usefixtures("quick_compile")

HF = dict(
  model_type="Dream", vocab_size=304, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e4,
  tie_word_embeddings=False, hidden_act="silu", pad_token_id=3, mask_token_id=2,
  eos_token_id=[4, 5], max_position_embeddings=20,
)  # fmt: skip
CONFIG = ModelConfig(**mapping.config_from_hf(HF))


@pytest.fixture(scope="module")
def params():
  """Larger weights than a fresh network's, so that every part of it shows in the logits."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
  return jax.tree.map(draw, load.abstract_params(CONFIG, load.one_device_mesh()))


@pytest.fixture(scope="module")
def tokenizer_json():
  """A byte-level tokenizer of 256 bytes and the special tokens 256.. ."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  hf = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[])
  )
  hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  hf.decoder = tokenizers.decoders.ByteLevel()
  hf.add_special_tokens(["<|endoftext|>", "<|im_end|>", "<|mask|>", "<|dlm_pad|>"])
  return hf.to_str().encode()


def write_folder(folder, params, hf_config, tokenizer_json=None):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(hf_config))
  state = {}
  for row in mapping.rows(CONFIG):
    leaf = np.asarray(mapping.get(params, row))
    for i, name in enumerate(row.names(CONFIG)):
      theirs = mapping.to_theirs(row, leaf[i] if row.stacked else leaf)
      state[name] = np.ascontiguousarray(theirs)
  save_file(state, folder / "model.safetensors")
  if tokenizer_json:
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
  return write_folder(tmp_path_factory.mktemp("hf"), params, HF)


@pytest.fixture(scope="module")
def ckpt(folder):
  return pretrained.from_pretrained(folder)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, params, tokenizer_json):
  """A run of ours with two checkpoints, 3 and 7; the older one holds zeros."""
  path = tmp_path_factory.mktemp("workdir")
  config = {"seed": 1, "model": dataclasses.asdict(CONFIG)}
  workdirs.claim_workdir(path, config)
  settings = config_dict.create(every=1, keep=2, keep_every=0)
  manager = checkpoint.open_manager(path, settings)
  for step, scale in ((3, 0.0), (7, 1.0)):
    state = {"params": jax.tree.map(lambda x, s=scale: s * x, params), "step": jnp.int32(step)}
    checkpoint.save(manager, step, state, {}, config)
  manager.close()
  HFTokenizer(tokenizer_json).save(path)
  return path


def tokens(batch, length):
  return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, length))


def close(ours, wanted):
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


# --- from_pretrained


def test_hugging_face_folder(ckpt, params):
  assert ckpt.config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, ckpt.params, params)
  assert (ckpt.mask_id, ckpt.eos_id, ckpt.pad_id) == (2, 4, 3)
  assert ckpt.tokenizer is None
  assert len(repr(ckpt)) < 2000


def test_ids_fall_back_to_the_tokenizer(tmp_path, params, tokenizer_json):
  hf_config = {key: value for key, value in HF.items() if not key.endswith("_token_id")}
  ckpt = pretrained.from_pretrained(
    write_folder(tmp_path, params, {**hf_config, "model_type": "qwen2"}, tokenizer_json)
  )
  assert ckpt.config.attention == "causal"
  assert (ckpt.mask_id, ckpt.eos_id, ckpt.pad_id) == (258, 256, 259)
  assert ckpt.tokenizer.decode(ckpt.tokenizer.encode("x = 1")) == "x = 1"


def test_ids_outside_the_vocabulary_are_named(tmp_path, params):
  message = "mask_token_id 304 of config.json is outside vocab_size 304"
  with pytest.raises(ValueError, match=message):
    pretrained.from_pretrained(write_folder(tmp_path, params, {**HF, "mask_token_id": 304}))


@pytest.mark.parametrize(
  "tail, scale", [("", 1), ("checkpoints", 1), ("checkpoints/7", 1), ("checkpoints/3", 0)]
)
def test_runs_of_ours(workdir, params, tail, scale):
  ckpt = pretrained.from_pretrained(workdir / tail)
  assert ckpt.config == CONFIG
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, scale * b), ckpt.params, params)
  assert (ckpt.mask_id, ckpt.eos_id, ckpt.pad_id) == (258, 256, 259)
  assert ckpt.tokenizer.vocab_size == 260


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_mesh_and_dtype(request, kind, params):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  ckpt = pretrained.from_pretrained(request.getfixturevalue(kind), mesh, "bfloat16")
  assert ckpt.config.param_dtype == "bfloat16" and ckpt.mesh == mesh
  for leaf, wanted in zip(jax.tree.leaves(ckpt.params), jax.tree.leaves(params), strict=True):
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf, wanted.astype(jnp.bfloat16))
  embed = ckpt.params["embed"]
  assert embed.addressable_shards[0].data.size == embed.size // 4


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_a_program_on_its_own_mesh_may_load_and_score(request, kind, ckpt):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  wanted = pretrained.logits(ckpt, tokens(2, 5))
  with jax.set_mesh(mesh):
    for on in (mesh, None):
      loaded = pretrained.from_pretrained(request.getfixturevalue(kind), on)
      close(np.asarray(pretrained.logits(loaded, tokens(2, 5))), np.asarray(wanted))
    assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh


def test_paths_that_are_nothing(tmp_path, folder):
  for path in (tmp_path, tmp_path / "absent", tmp_path / "absent" / "checkpoints"):
    with pytest.raises(FileNotFoundError, match="Looked for: config.json with model_type"):
      pretrained.from_pretrained(path)
  (tmp_path / "config.json").write_text('{"seed": 1}')
  with pytest.raises(ValueError, match="neither `model_type`.*nor `model`"):
    pretrained.from_pretrained(tmp_path)
  (tmp_path / "config.json").write_text('{"model": {}}')
  with pytest.raises(FileNotFoundError, match="Looked for"):
    pretrained.from_pretrained(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    pretrained.from_pretrained(tmp_path)


# --- load_params


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_training_starts_from_the_parameters_alone(request, kind, params):
  """With another attention pattern and dtype than the checkpoint's, laid out as training asks."""
  config = dataclasses.replace(
    CONFIG, attention="causal", frozen_input_id=-1, param_dtype="bfloat16", norm_eps=1.0000001e-6
  )
  abstract = load.abstract_params(config, sharding.make_mesh(dict(data=1, fsdp=4, tensor=2)))
  loaded = pretrained.load_params(request.getfixturevalue(kind), config, abstract)

  def check(leaf, like, wanted):
    assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    np.testing.assert_array_equal(leaf, wanted.astype(jnp.bfloat16))

  jax.tree.map(check, loaded, abstract, params)


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_another_network_is_refused_by_field(request, kind):
  config = dataclasses.replace(CONFIG, rope_theta=1e6, num_layers=3, tied_head=True)
  abstract = load.abstract_params(config, load.one_device_mesh())
  message = "model.num_layers is 2 there and 3 in.*model.tied_head is False.*model.rope_theta"
  with pytest.raises(ValueError, match=message):
    pretrained.load_params(request.getfixturevalue(kind), config, abstract)


# --- logits


def test_logits_are_aligned_with_their_targets(ckpt):
  tokens_BL = tokens(2, 9)
  logits_BLV = pretrained.logits(ckpt, tokens_BL)
  assert logits_BLV.shape == (2, 9, CONFIG.vocab_size) and logits_BLV.dtype == jnp.float32
  # Causal logits at i score token i from what is before it.
  other_BL = tokens_BL.copy()
  other_BL[:, 5] = (other_BL[:, 5] + 1) % CONFIG.vocab_size
  same = [pretrained.logits(ckpt, x, attention="causal")[:, :6] for x in (tokens_BL, other_BL)]
  np.testing.assert_array_equal(*same)
  later = [pretrained.logits(ckpt, x, attention="causal")[:, 6] for x in (tokens_BL, other_BL)]
  assert np.abs(np.asarray(later[0] - later[1])).max() > 1e-2


def test_attention_defaults_to_what_the_weights_are_for(ckpt):
  tokens_BL = tokens(2, 9)
  full, causal = (pretrained.logits(ckpt, tokens_BL, attention=a) for a in ("full", "causal"))
  np.testing.assert_array_equal(pretrained.logits(ckpt, tokens_BL), full)
  assert np.abs(np.asarray(full - causal)).max() > 1e-2
  with pytest.raises(ValueError, match="model.attention is 'left'"):
    pretrained.logits(ckpt, tokens_BL, attention="left")


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_padding_changes_nothing(ckpt, attention):
  tokens_BL = tokens(2, 6)
  alone_BLV = pretrained.logits(ckpt, tokens_BL, attention=attention)
  close(pretrained.logits(ckpt, tokens_BL, np.ones((2, 6), bool), attention), alone_BLV)
  padded_BL, valid_BL = np.zeros((2, 10), int), np.zeros((2, 10), bool)
  padded_BL[0, 4:], valid_BL[0, 4:] = tokens_BL[0], True  # left
  padded_BL[1, :6], valid_BL[1, :6] = tokens_BL[1], True  # right
  padded_BLV = np.asarray(pretrained.logits(ckpt, padded_BL, valid_BL, attention))
  close(padded_BLV[0, 4:], alone_BLV[0])
  close(padded_BLV[1, :6], alone_BLV[1])
  assert np.isfinite(padded_BLV).all()


def test_lists_and_arrays_are_taken(ckpt):
  wanted = pretrained.logits(ckpt, tokens(2, 5))
  for given in (tokens(2, 5).tolist(), jnp.asarray(tokens(2, 5)), tokens(2, 5).astype(np.uint16)):
    np.testing.assert_array_equal(pretrained.logits(ckpt, given), wanted)


def test_one_compilation_per_shape(ckpt):
  pretrained.logits(ckpt, tokens(1, 7))
  before = pretrained._logits._cache_size()
  other = dataclasses.replace(ckpt, params=jax.tree.map(lambda x: x + 0.1, ckpt.params))
  first, second = pretrained.logits(ckpt, tokens(1, 7)), pretrained.logits(other, tokens(1, 7))
  assert pretrained._logits._cache_size() == before
  assert np.abs(np.asarray(first - second)).max() > 1e-2
  pretrained.logits(ckpt, tokens(1, 8))
  assert pretrained._logits._cache_size() == before + 1


def test_any_number_of_rows_on_a_mesh(folder, ckpt):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  spread = pretrained.from_pretrained(folder, mesh)
  valid_BL = np.arange(8)[None, :] >= np.arange(5)[:, None]
  for num_rows in (3, 4, 5):
    given = tokens(num_rows, 8), valid_BL[:num_rows]
    logits_BLV = pretrained.logits(spread, *given)
    assert logits_BLV.shape == (num_rows, 8, CONFIG.vocab_size)
    close(np.asarray(logits_BLV)[given[1]], np.asarray(pretrained.logits(ckpt, *given))[given[1]])


def test_a_hand_made_checkpoint_needs_no_mesh(params, ckpt):
  given = tokens(2, 5)
  made = pretrained.Pretrained(CONFIG, params, None, 2, 4, 3, None)
  close(pretrained.logits(made, given), pretrained.logits(ckpt, given))


@pytest.mark.parametrize(
  "given, valid, message",
  [
    ([[1, 2], [3, 304]], None, "token id 304 at row 1, position 1 is outside the .* 0..303"),
    ([[1, -1], [3, 4]], None, "token id -1 at row 0, position 1"),
    ([1, 2], None, r"\[B, L\], got int64 \[2\]"),
    ([[1.0, 2.0]], None, r"\[B, L\], got float64"),
    ([[]], None, "non-empty"),
    ([[1, 2], [3]], None, "pad rows to one length"),
    ([[1] * 21], None, "rows of 21 tokens are longer than the model's context, 20"),
    ([[1, 2]], [[True]], r"valid has shape \[1, 1\], tokens have \[1, 2\]"),
    ([[1, 2, 3]], [[True, False, True]], "valid of row 0 has padding between tokens"),
  ],
)
def test_wrong_arguments_are_named(ckpt, given, valid, message):
  with pytest.raises(ValueError, match=message):
    pretrained.logits(ckpt, given, valid)
