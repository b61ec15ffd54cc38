"""Dream, Qwen2 and Llama in plain functional PyTorch, to compare our network with on any shape.

Written from statements about those models (their formulas, names and shapes), not from their code,
and itself checked against golden numbers of the real thing (`tests/model/test_torch_forward.py`).
"""

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional as F


def shapes(config):
  """Names and shapes of a state dict, for a config.json as dict."""
  c = config
  D, hidden = c["hidden_size"], c["intermediate_size"]
  K = c.get("head_dim") or D // c["num_attention_heads"]
  sizes = {"q": c["num_attention_heads"] * K, "k": c["num_key_value_heads"] * K}
  sizes["v"] = sizes["k"]
  out = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
  if not c["tie_word_embeddings"]:
    out["lm_head.weight"] = (c["vocab_size"], D)
  for i in range(c["num_hidden_layers"]):
    layer = f"model.layers.{i}."
    out[layer + "input_layernorm.weight"] = out[layer + "post_attention_layernorm.weight"] = (D,)
    for x, size in sizes.items():
      out[f"{layer}self_attn.{x}_proj.weight"] = (size, D)
      if c["model_type"] != "llama":
        out[f"{layer}self_attn.{x}_proj.bias"] = (size,)
    out[layer + "self_attn.o_proj.weight"] = (D, sizes["q"])
    out[layer + "mlp.gate_proj.weight"] = out[layer + "mlp.up_proj.weight"] = (hidden, D)
    out[layer + "mlp.down_proj.weight"] = (D, hidden)
  return out


def make_folder(folder, config, seed, dtype=torch.float32):
  """Writes a random checkpoint in which every tensor matters; returns its state dict, float32."""
  generator = torch.Generator().manual_seed(seed)
  state = {}
  for name, shape in shapes(config).items():
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
      state[name] = 1 + 0.3 * noise
    elif name.endswith("bias"):
      state[name] = 0.4 * noise
    else:
      state[name] = noise * (1.0 if "embed" in name else shape[-1] ** -0.5)
  state = {name: tensor.to(dtype) for name, tensor in state.items()}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
  return {name: tensor.float() for name, tensor in state.items()}


def norm(x, weight, eps):
  return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotary_tables(positions, head_dim, theta):
  """cos and sin [B, L, head_dim], the second half of the width repeating the first."""
  frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
  angles = positions[..., None].float() * frequency
  angles = torch.cat([angles, angles], -1)
  return angles.cos(), angles.sin()


def rotate(x, cos, sin):
  half = x.shape[-1] // 2
  swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
  return x * cos[:, None] + swapped * sin[:, None]


def forward(state, config, ids, valid=None, positions=None):
  """Raw logits [B, L, V]: those at position i predict token i + 1.

  Args:
    state: state dict, float32.
    config: config.json as dict. Dream attends in both directions, the others to the left.
    ids: int64 [B, L].
    valid: bool [B, L]; a token sees another only if both are valid. A padding token sees itself,
      to stay finite.
    positions: int64 [B, L]; 0..L-1 without it.
  """
  c = config
  batch, length = ids.shape
  heads, kv_heads, eps = c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
  head_dim = c.get("head_dim") or c["hidden_size"] // heads
  if positions is None:
    positions = torch.arange(length).expand(batch, length)
  seen = torch.ones(batch, length, length, dtype=torch.bool)
  if c["model_type"] != "Dream":
    seen = seen.tril()
  if valid is not None:
    seen = (seen & valid[:, :, None] & valid[:, None, :]) | torch.eye(length, dtype=torch.bool)
  cos, sin = rotary_tables(positions, head_dim, c["rope_theta"])

  def linear(x, name):
    return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))

  embedding = state["model.embed_tokens.weight"]
  x = F.embedding(ids, embedding, padding_idx=c.get("pad_token_id"))
  for i in range(c["num_hidden_layers"]):
    layer = f"model.layers.{i}."
    h = norm(x, state[layer + "input_layernorm.weight"], eps)
    q, k, v = (
      linear(h, f"{layer}self_attn.{name}_proj").view(batch, length, -1, head_dim).transpose(1, 2)
      for name in "qkv"
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
    scores = (q @ k.transpose(2, 3)) * head_dim**-0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    o = (weights @ v).transpose(1, 2).reshape(batch, length, -1)
    x = x + linear(o, layer + "self_attn.o_proj")
    h = norm(x, state[layer + "post_attention_layernorm.weight"], eps)
    gated = F.silu(linear(h, layer + "mlp.gate_proj")) * linear(h, layer + "mlp.up_proj")
    x = x + linear(gated, layer + "mlp.down_proj")
  x = norm(x, state["model.norm.weight"], eps)
  return x @ (embedding if c["tie_word_embeddings"] else state["lm_head.weight"]).T


def shift(logits):
  """Aligns raw logits with the tokens they predict; position 0 keeps its own."""
  return torch.cat([logits[:, :1], logits[:, :-1]], 1)


def masked_loss(state, config, noisy_ids, ids, masked, t):
  """sum(nll / t) over masked positions / their number, on shifted logits. t: float [B]."""
  logits = shift(forward(state, config, noisy_ids))
  nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
  return (nll * masked / t[:, None]).sum() / masked.sum()
