"""The table read both ways, and configs of other people's models."""

import numpy as np
import pytest

from diffucoder_jax.hf import mapping
from diffucoder_jax.model.config import ModelConfig

CONFIG = ModelConfig(
  vocab_size=11, embed_dim=6, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=5
)  # every size differs
HF = dict(
  model_type="Dream", vocab_size=100, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
  num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000,
  tie_word_embeddings=False, hidden_act="silu", pad_token_id=9, mask_token_id=8,
  max_position_embeddings=40,
)  # fmt: skip


def without(*keys):
  return {key: value for key, value in HF.items() if key not in keys}


def test_the_table_is_one_to_one():
  assert len({row.path for row in mapping.TABLE}) == len(mapping.TABLE)
  assert len(mapping.hf_shapes(CONFIG)) == 12 * CONFIG.num_layers + 3


@pytest.mark.parametrize("row", mapping.TABLE, ids=lambda row: "/".join(row.path))
def test_there_and_back(row):
  shape = mapping.their_shape(row, CONFIG)
  theirs = np.random.default_rng(0).normal(size=shape)
  ours = mapping.to_ours(row, theirs, CONFIG)
  assert ours.ndim == len(row.ours)
  np.testing.assert_array_equal(mapping.to_theirs(row, ours), theirs)


def test_projections_are_the_linear_maps_of_the_file():
  rng = np.random.default_rng(0)
  rows = {row.path[-2:]: row for row in mapping.TABLE}
  kernel = rng.normal(size=(32, 6))  # torch computes x @ kernel.T, heads outermost
  x = rng.normal(size=6)
  ours = mapping.to_ours(rows["q", "kernel"], kernel, CONFIG)
  np.testing.assert_allclose(np.einsum("D,DHK->HK", x, ours), (kernel @ x).reshape(4, 8))
  kernel, heads = rng.normal(size=(6, 32)), rng.normal(size=(4, 8))
  ours = mapping.to_ours(rows["attn", "o"], kernel, CONFIG)
  np.testing.assert_allclose(np.einsum("HK,HKD->D", heads, ours), kernel @ heads.reshape(-1))


def test_configs():
  kwargs = mapping.config_from_hf(HF)
  assert kwargs == dict(
    vocab_size=100, embed_dim=48, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=80,
    tied_head=False, rope_theta=1e4, norm_eps=1e-5, init_std=0.02, qkv_bias=True, attention="full",
    frozen_input_id=9, max_seq_len=40,
  )  # fmt: skip
  assert ModelConfig(**kwargs).dtype == "auto"
  qwen = mapping.config_from_hf({**HF, "model_type": "qwen2", "tie_word_embeddings": True})
  assert qwen["attention"] == "causal" and qwen["tied_head"] and qwen["qkv_bias"]
  llama = without("num_key_value_heads", "pad_token_id")
  llama = mapping.config_from_hf({**llama, "model_type": "llama", "head_dim": 10})
  assert not llama["qkv_bias"] and llama["num_kv_heads"] == 6 and llama["head_dim"] == 10
  assert llama["frozen_input_id"] == -1


def test_absent_keys_mean_what_transformers_takes_them_for():
  few = without("tie_word_embeddings", "rope_theta", "rms_norm_eps", "max_position_embeddings")
  kwargs = mapping.config_from_hf(few)
  assert (kwargs["tied_head"], kwargs["rope_theta"], kwargs["norm_eps"]) == (False, 1e4, 1e-6)
  assert kwargs["max_seq_len"] == 32768
  assert mapping.config_from_hf({**few, "model_type": "llama"})["max_seq_len"] == 2048
  rope = {"rope_theta": 5e5, "rope_type": "default"}
  assert mapping.config_from_hf({**few, "rope_parameters": rope})["rope_theta"] == 5e5


@pytest.mark.parametrize("pad_id, frozen", [(None, -1), (0, 0), (99, 99), (-1, 99)])
def test_pad_id_is_torchs_padding_idx(pad_id, frozen):
  assert mapping.config_from_hf({**HF, "pad_token_id": pad_id})["frozen_input_id"] == frozen


def test_special_ids():
  assert mapping.token_id(HF, "mask_token_id") == 8
  assert mapping.token_id({"eos_token_id": [4, 5]}, "eos_token_id") == 4
  assert mapping.token_id({"eos_token_id": None}, "eos_token_id") == -1
  assert mapping.token_id({"eos_token_id": []}, "eos_token_id") == -1
  assert mapping.token_id({"model_type": "Dream"}, "mask_token_id") == 151666
  assert mapping.token_id({"model_type": "qwen2"}, "mask_token_id") == -1


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.*yarn"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.*llama3"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "linear"),
    ({"rope_parameters": {"full_attention": {}}, "rope_theta": None}, "no rope_theta"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias = True"),
    ({"model_type": "qwen2", "attention_bias": False}, "attention_bias = False"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"hidden_size": None}, "no hidden_size"),
    ({"num_key_value_heads": None}, "no num_key_value_heads"),
    ({"hidden_size": 50}, "hidden_size 50"),
    ({"pad_token_id": 100}, "pad_token_id 100"),
    ({"pad_token_id": -101}, "pad_token_id -101"),
  ],
)
def test_what_the_network_does_not_compute_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    mapping.config_from_hf({**HF, **changes})


def test_a_dream_config_without_pad_id_on_a_small_vocabulary_is_named():
  with pytest.raises(ValueError, match="pad_token_id 151643"):
    mapping.config_from_hf(without("pad_token_id"))


def test_default_rope_scaling_is_fine():
  for scaling in (None, {}, {"rope_type": "default"}, {"type": "default"}):
    mapping.config_from_hf({**HF, "rope_scaling": scaling})
