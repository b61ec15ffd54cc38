"""Our logits and gradients against an independent PyTorch network, on shapes golden data lacks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from diffucoder_jax import pretrained  # noqa: E402
from diffucoder_jax.hf import load, mapping  # noqa: E402
from diffucoder_jax.model.transformer import Transformer, unembed  # noqa: E402
from tests import torch_reference as reference  # noqa: E402

pytestmark = pytest.mark.torch
TOLERANCE = 1e-4


def hf_config(model_type, vocab, hidden, mlp, layers, heads, kv, theta, eps, tied, **more):
  return dict(
    model_type=model_type, vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp,
    num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, rope_theta=theta,
    rms_norm_eps=eps, tie_word_embeddings=tied, hidden_act="silu", **more,
  )  # fmt: skip


CASES = {
  "gqa_low_mask_pad_is_eos": hf_config(
    "Dream", 97, 48, 80, 3, 6, 2, 1e4, 1e-5, False, mask_token_id=2, pad_token_id=3, eos_token_id=3
  ),
  "tied_mha_no_pad": hf_config(
    "Dream", 211, 36, 52, 2, 3, 3, 500.0, 1e-3, True, mask_token_id=7, pad_token_id=None
  ),
  "tied_gqa_pad_is_eos_one_layer": hf_config(
    "Dream", 130, 40, 100, 1, 10, 5, 1e6, 1e-6, True, mask_token_id=0, pad_token_id=129,
    eos_token_id=129,
  ),
  "tied_mqa_causal": hf_config("qwen2", 60, 56, 24, 2, 4, 1, 1e5, 1e-6, True, pad_token_id=1),
  "llama_wide_heads": hf_config("llama", 75, 32, 44, 2, 4, 2, 1e4, 1e-5, False, head_dim=10),
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request, tmp_path_factory):
  config = CASES[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  state = reference.make_folder(folder, config, seed=len(request.param))
  rng = np.random.default_rng(0)
  tokens_BL = rng.integers(0, config["vocab_size"], (3, 13))
  tokens_BL[:, [4, 9]] = config.get("pad_token_id") or 1  # padding's id as an ordinary token
  return config, state, pretrained.from_pretrained(folder), tokens_BL


def test_the_reference_meets_the_golden_numbers(shared):
  """Of what the other tests rest on: logits, padding, positions, loss and every gradient."""
  folder = shared / "golden"
  config = load.read_config(folder / "checkpoint")
  state = load_file(folder / "checkpoint" / "model.safetensors")
  golden = load_file(folder / "forward.safetensors")
  close = lambda x, name: (x - golden[name]).abs().max() < 3e-5  # noqa: E731
  assert close(reference.forward(state, config, golden["input_ids"].long()), "logits")
  positions = golden["positions.position_ids"].long()
  logits = reference.forward(state, config, golden["input_ids"].long(), positions=positions)
  assert close(logits, "positions.logits")
  valid = golden["leftpad.attention_mask"] == 1
  logits = reference.forward(state, config, golden["leftpad.input_ids"].long(), valid)
  assert (logits - golden["leftpad.logits"])[valid].abs().max() < 3e-5

  mdm = load_file(folder / "mdm_loss.safetensors")
  state = {name: tensor.requires_grad_() for name, tensor in state.items()}
  masked, t = mdm["mask"].float(), mdm["t"]
  loss = reference.masked_loss(state, config, mdm["xt"].long(), mdm["x0"].long(), masked, t)
  assert abs(loss.item() / mdm["loss"].item() - 1) < 1e-6
  loss.backward()
  wanted = {name[5:]: tensor for name, tensor in mdm.items() if name.startswith("grad.")}
  assert wanted
  for name, tensor in wanted.items():
    assert (state[name].grad - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


def test_logits(case):
  config, state, ckpt, tokens_BL = case
  wanted_BLV = reference.shift(reference.forward(state, config, torch.from_numpy(tokens_BL)))
  ours_BLV = pretrained.logits(ckpt, tokens_BL)
  np.testing.assert_allclose(ours_BLV, wanted_BLV, rtol=0, atol=TOLERANCE)


def test_logits_with_padding(case):
  config, state, ckpt, tokens_BL = case
  valid_BL = np.ones(tokens_BL.shape, bool)
  valid_BL[0, :4] = valid_BL[1, -5:] = False
  positions_BL = np.maximum(np.cumsum(valid_BL, 1) - 1, 0)
  raw_BLV = reference.forward(
    state, config, *(torch.from_numpy(x) for x in (tokens_BL, valid_BL, positions_BL))
  ).numpy()
  wanted_BLV = np.concatenate([raw_BLV[:, :1], raw_BLV[:, :-1]], 1)
  wanted_BLV[0, 4] = raw_BLV[0, 4]  # nothing before the first token
  ours_BLV = np.asarray(pretrained.logits(ckpt, tokens_BL, valid_BL))
  np.testing.assert_allclose(ours_BLV[valid_BL], wanted_BLV[valid_BL], rtol=0, atol=TOLERANCE)


def test_gradients_of_every_tensor(case):
  config, state, ckpt, tokens_BL = case
  rng = np.random.default_rng(1)
  t_B = rng.uniform(0.2, 0.9, 3).astype(np.float32)
  masked_BL = (rng.uniform(size=tokens_BL.shape) < t_B[:, None]).astype(np.float32)
  noisy_BL = np.where(masked_BL > 0, config.get("mask_token_id", 5), tokens_BL)
  state = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
  wanted = reference.masked_loss(
    state, config, *(torch.from_numpy(x) for x in (noisy_BL, tokens_BL, masked_BL, t_B))
  )
  wanted.backward()

  model = Transformer(dataclasses.replace(ckpt.config, remat="none"))

  @jax.jit
  @jax.value_and_grad
  def loss_fn(params):
    features_BLD = model.apply({"params": params}, noisy_BL)
    logps_BLV = jax.nn.log_softmax(unembed(params, features_BLD))
    nll_BL = -jnp.take_along_axis(logps_BLV, tokens_BL[..., None], -1)[..., 0]
    return jnp.sum(nll_BL * masked_BL / t_B[:, None]) / jnp.sum(masked_BL)

  loss, grads = loss_fn(ckpt.params)
  assert abs(float(loss) / wanted.item() - 1) < 1e-5
  compared = 0
  for row in mapping.rows(ckpt.config):
    leaf = np.asarray(mapping.get(grads, row))
    for i, name in enumerate(row.names(ckpt.config)):
      ours = mapping.to_theirs(row, leaf[i] if row.stacked else leaf)
      theirs = state[name].grad.numpy()
      atol = 1e-4 * np.abs(theirs).max()
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)
      compared += 1
  assert compared == len(state)
  pad_id = config.get("pad_token_id")
  if pad_id is not None and not config["tie_word_embeddings"]:
    assert not np.asarray(grads["embed"])[pad_id].any()
