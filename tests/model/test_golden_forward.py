"""Our forward pass against numbers of Dream's own code (float32, CPU)."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffucoder_jax.hf import load, mapping
from diffucoder_jax.model import attention
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, unembed

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden(shared):
  return load_file(shared / "golden" / "forward.safetensors")


@pytest.fixture(scope="module")
def checkpoint(shared):
  folder = shared / "golden" / "checkpoint"
  config = ModelConfig(**mapping.config_from_hf(load.read_config(folder)))
  return config, load.load_params(folder, config)


def run(checkpoint, tokens_BL, segment_ids_BL=None, positions_BL=None, **changes):
  """(target-aligned logits, raw logits, everything sown)."""
  config, params = checkpoint
  config = dataclasses.replace(config, **changes)

  @jax.jit
  def apply(params):
    features_BLD, state = Transformer(config).apply(
      {"params": params}, tokens_BL, segment_ids_BL, positions_BL, mutable="intermediates"
    )
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    sown = jax.tree.map(lambda x: x[0], state["intermediates"], is_leaf=is_leaf)
    return unembed(params, features_BLD), unembed(params, sown["hidden_BLD"]), sown

  return jax.tree.map(np.asarray, apply(params))


def test_plain_logits_and_their_alignment(checkpoint, golden):
  aligned_BLV, raw_BLV, _ = run(checkpoint, golden["input_ids"])
  np.testing.assert_allclose(raw_BLV, golden["logits"], rtol=0, atol=TOLERANCE)
  np.testing.assert_array_equal(aligned_BLV[:, 1:], raw_BLV[:, :-1])
  np.testing.assert_array_equal(aligned_BLV[:, 0], raw_BLV[:, 0])
  assert aligned_BLV.dtype == np.float32


def test_every_hidden_state(checkpoint, golden):
  _, _, sown = run(checkpoint, golden["input_ids"])
  num_layers = checkpoint[0].num_layers
  residual_NBLD = sown["layers"]["residual_BLD"]
  ours = [sown["embedding_BLD"], *residual_NBLD[: num_layers - 1], sown["hidden_BLD"]]
  assert len(ours) == sum(name.startswith("hidden.") for name in golden)
  for i, hidden_BLD in enumerate(ours):
    name = f"hidden.{i}"
    np.testing.assert_allclose(hidden_BLD, golden[name], rtol=0, atol=TOLERANCE, err_msg=name)


def test_left_padding(checkpoint, golden):
  valid_BL = golden["leftpad.attention_mask"]
  tokens_BL, positions_BL = golden["leftpad.input_ids"], golden["leftpad.position_ids"]
  assert 0 < valid_BL.sum() < valid_BL.size
  _, raw_BLV, _ = run(checkpoint, tokens_BL, valid_BL, positions_BL)
  valid_BL = valid_BL == 1
  np.testing.assert_allclose(
    raw_BLV[valid_BL], golden["leftpad.logits"][valid_BL], rtol=0, atol=TOLERANCE
  )
  assert np.isfinite(raw_BLV).all()


def test_arbitrary_positions(checkpoint, golden):
  config, _ = checkpoint
  positions_BL = golden["positions.position_ids"]
  _, raw_BLV, _ = run(checkpoint, golden["input_ids"], None, positions_BL)
  np.testing.assert_allclose(raw_BLV, golden["positions.logits"], rtol=0, atol=TOLERANCE)
  cos_BLk, sin_BLk = attention.rotary(positions_BL, config.head_dim, config.rope_theta)
  for ours, name in ((cos_BLk, "positions.cos"), (sin_BLk, "positions.sin")):
    np.testing.assert_allclose(np.tile(ours, 2), golden[name], rtol=0, atol=TOLERANCE)


def test_the_first_token_sees_the_last(checkpoint, golden):
  config, _ = checkpoint
  tokens_BL = golden["input_ids"].copy()
  tokens_BL[:, -1] = (tokens_BL[:, -1] + 1) % config.vocab_size
  _, raw_BLV, _ = run(checkpoint, tokens_BL)
  wanted_BV = golden["lasttok_changed.logits_pos0"]
  np.testing.assert_allclose(raw_BLV[:, 0], wanted_BV, rtol=0, atol=TOLERANCE)
  assert np.abs(wanted_BV - golden["logits"][:, 0]).max() > 100 * TOLERANCE


def test_bfloat16_is_as_close_as_the_reference_in_bfloat16(checkpoint, golden):
  _, raw_BLV, _ = run(checkpoint, golden["input_ids"], dtype="bfloat16")
  theirs = np.abs(golden["bf16.logits"].astype(np.float32) - golden["logits"]).max()
  ours = np.abs(raw_BLV - golden["logits"]).max()
  assert TOLERANCE < ours < 1.5 * theirs
