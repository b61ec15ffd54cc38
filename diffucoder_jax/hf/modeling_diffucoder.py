"""DiffuCoder for PyTorch: the network; its denoising loop is `denoising_diffucoder.py`.

Lies beside `config.json` and the safetensors of an exported model, so that

  AutoModel.from_pretrained(folder, trust_remote_code=True)

works with torch and transformers alone (4.46 to 5.x). There the two are one file (`export.model_file`):
transformers 4.46 finds no second one in a folder whose name has a dot, as "7B-v1.0" has. They are data of
the JAX project that wrote it: nothing there imports them. Same architecture, parameter names and
arguments as Dream 7B and Apple's DiffuCoder, same tokens at temperature 0; where it differs on purpose,
`diffusion_generate` says so.

Dimension key: B batch, L sequence, M key length, D embed, H query heads, J kv heads, K head_dim,
V vocab.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from diffucoder_jax.hf.denoising_diffucoder import diffusion_generate, first_id

# config.json names every value. For an absent one: what Dream's class takes, and the 7B's sizes.
CONFIG = dict(
  vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
  num_attention_heads=28, num_key_value_heads=4, head_dim=None, attention_bias=True,
  hidden_act="silu", max_position_embeddings=32768, initializer_range=0.02, rms_norm_eps=1e-6,
  rope_theta=1e4, use_cache=False, tie_word_embeddings=False, mask_token_id=151666,
  pad_token_id=151643, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


class DiffuCoderConfig(PretrainedConfig):
  """Dream's keys, and ours: `head_dim` (absent: hidden_size / heads) and `attention_bias`."""

  model_type = "Dream"

  def __init__(self, **kwargs):
    # transformers 5 writes theta into `rope_parameters`. It would rewrite these two if they stayed.
    rope = [kwargs.pop(key, None) or {} for key in ("rope_scaling", "rope_parameters")]
    rope = rope[0] | rope[1]
    values = {key: kwargs.pop(key, default) for key, default in CONFIG.items()}
    values["head_dim"] = values["head_dim"] or (
      values["hidden_size"] // values["num_attention_heads"]
    )
    values["rope_theta"] = float(rope.get("rope_theta", values["rope_theta"]))
    must_be = {
      "rope_scaling": ("default", rope.get("rope_type", rope.get("type", "default"))),
      "hidden_act": ("silu", values["hidden_act"]),
      "use_sliding_window": (False, bool(kwargs.get("use_sliding_window"))),
      "attention_dropout": (0.0, kwargs.get("attention_dropout") or 0.0),
    }
    for key, (wanted, found) in must_be.items():
      if found != wanted:
        raise ValueError(f"config.json has {key} {found!r}; this model only computes {wanted!r}")
    # The base class has other defaults for some, and does not take all of them in all versions.
    super().__init__(tie_word_embeddings=values["tie_word_embeddings"], **kwargs)
    for key, value in values.items():
      setattr(self, key, value)


class DiffuCoderRMSNorm(nn.Module):
  """Root-mean-square norm; the mean is float32, the weight multiplies in the input's dtype."""

  def __init__(self, width, eps):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(width))
    self.eps = eps

  def forward(self, x_BLD):
    x32_BLD = x_BLD.float()
    x32_BLD = x32_BLD * torch.rsqrt(x32_BLD.square().mean(-1, keepdim=True) + self.eps)
    return self.weight * x32_BLD.to(x_BLD.dtype)


def rotary(positions_BL, config, dtype):
  """Cosines and sines [B, 1, L, K / 2] of the rotary angles; float32 until the cast at the end.

  Made anew from the config in every call: a buffer would be left unset by transformers 5, which
  builds models without memory, and lose precision in `model.to(torch.bfloat16)`.
  """
  even_k = torch.arange(0, config.head_dim, 2, device=positions_BL.device, dtype=torch.float32)
  frequency_k = 1.0 / config.rope_theta ** (even_k / config.head_dim)
  angles_B1Lk = positions_BL[:, None, :, None].float() * frequency_k
  return angles_B1Lk.cos().to(dtype), angles_B1Lk.sin().to(dtype)


def rotate(x_BHLK, cos_B1Lk, sin_B1Lk):
  """Rotates the two halves of each head (not interleaved pairs)."""
  first, second = x_BHLK.chunk(2, -1)
  return torch.cat([first * cos_B1Lk - second * sin_B1Lk, second * cos_B1Lk + first * sin_B1Lk], -1)


class DiffuCoderAttention(nn.Module):
  """Grouped-query attention: kv head j serves the query heads j*H/J .. (j+1)*H/J - 1."""

  def __init__(self, config):
    super().__init__()
    c = config
    self.head_dim, self.group = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    self.q_proj = nn.Linear(c.hidden_size, heads, bias=c.attention_bias)
    self.k_proj = nn.Linear(c.hidden_size, kv_heads, bias=c.attention_bias)
    self.v_proj = nn.Linear(c.hidden_size, kv_heads, bias=c.attention_bias)
    self.o_proj = nn.Linear(heads, c.hidden_size, bias=False)

  def forward(self, x_BLD, cos_B1Lk, sin_B1Lk, seen_B1LM):
    q_BHLK, k_BJLK, v_BJLK = (
      project(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q_BHLK, k_BJLK = rotate(q_BHLK, cos_B1Lk, sin_B1Lk), rotate(k_BJLK, cos_B1Lk, sin_B1Lk)
    # Not `enable_gqa`: it excludes some of the fast kernels.
    k_BHLK, v_BHLK = (x.repeat_interleave(self.group, 1) for x in (k_BJLK, v_BJLK))
    o_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=seen_B1LM)
    return self.o_proj(o_BHLK.transpose(1, 2).flatten(2))


class DiffuCoderMLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

  def __init__(self, config):
    super().__init__()
    embed, hidden = config.hidden_size, config.intermediate_size
    self.gate_proj = nn.Linear(embed, hidden, bias=False)
    self.up_proj = nn.Linear(embed, hidden, bias=False)
    self.down_proj = nn.Linear(hidden, embed, bias=False)

  def forward(self, x_BLD):
    return self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class DiffuCoderLayer(nn.Module):
  """Attention and MLP, each behind a norm and a residual."""

  def __init__(self, config):
    super().__init__()
    self.input_layernorm = DiffuCoderRMSNorm(config.hidden_size, config.rms_norm_eps)
    self.self_attn = DiffuCoderAttention(config)
    self.post_attention_layernorm = DiffuCoderRMSNorm(config.hidden_size, config.rms_norm_eps)
    self.mlp = DiffuCoderMLP(config)

  def forward(self, x_BLD, cos_B1Lk, sin_B1Lk, seen_B1LM):
    x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_B1Lk, sin_B1Lk, seen_B1LM)
    return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class DiffuCoderBackbone(nn.Module):
  """Everything below the output matrix."""

  def __init__(self, config):
    super().__init__()
    self.config = config
    pad_id = first_id(config.pad_token_id)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=pad_id)
    self.layers = nn.ModuleList(DiffuCoderLayer(config) for _ in range(config.num_hidden_layers))
    self.norm = DiffuCoderRMSNorm(config.hidden_size, config.rms_norm_eps)
    self.gradient_checkpointing = False  # `gradient_checkpointing_enable` sets it, and the function

  def forward(
    self, input_ids, attention_mask=None, position_ids=None, inputs_embeds=None, keep=False
  ):  # fmt: skip
    """As `DiffuCoderModel.forward`; returns (x_BLD after the final norm, states if to `keep`)."""
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("give either input_ids or inputs_embeds")
    x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    B, L = x_BLD.shape[:2]
    if position_ids is None and torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
      position_ids = ((attention_mask != 0).cumsum(1) - 1).clamp(min=0)
    elif position_ids is None:
      position_ids = torch.arange(L, device=x_BLD.device)[None]
    cos_B1Lk, sin_B1Lk = rotary(position_ids, self.config, x_BLD.dtype)
    seen_B1LM = visible(attention_mask, B, L)
    kept = [x_BLD]
    for layer in self.layers:
      if self.gradient_checkpointing and self.training:
        run = self._gradient_checkpointing_func
        x_BLD = run(layer.__call__, x_BLD, cos_B1Lk, sin_B1Lk, seen_B1LM)
      else:
        x_BLD = layer(x_BLD, cos_B1Lk, sin_B1Lk, seen_B1LM)
      if keep:
        kept.append(x_BLD)
    x_BLD = self.norm(x_BLD)
    return x_BLD, (*kept[:-1], x_BLD) if keep else None


def visible(attention_mask, B, L):
  """Which keys a query sees: bool that broadcasts to [B, H, L, M], or None where all are seen."""
  if attention_mask is None or isinstance(attention_mask, str) and attention_mask == "full":
    return None
  shape = list(attention_mask.shape) if torch.is_tensor(attention_mask) else attention_mask
  if shape == [B, L]:
    seen_B1LM = (attention_mask != 0)[:, None, None, :]
  elif len(shape) == 4 and shape[-1] == L and not attention_mask.is_floating_point():
    seen_B1LM = attention_mask != 0
  else:
    raise ValueError(
      f"attention_mask is {shape}; give None, 'full', {[B, L]}, or a bool {[B, 1, L, L]}"
    )
  # A query that may see nothing sees everything: its numbers mean nothing, but they are finite.
  return seen_B1LM | ~seen_B1LM.any(-1, keepdim=True)


class DiffuCoderModel(PreTrainedModel):
  """Masked diffusion language model: bidirectional Qwen2 with a language-model head."""

  config_class = DiffuCoderConfig
  base_model_prefix = "model"
  supports_gradient_checkpointing = True
  _supports_sdpa = True
  _no_split_modules = ["DiffuCoderLayer"]
  # A tied model has no head of its own (so there is nothing for transformers to tie), but a file
  # may hold the embedding twice; and old ones hold the rotary frequencies.
  _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$", r"rotary_emb\.inv_freq$"]

  def __init__(self, config):
    super().__init__(config)
    self.model = DiffuCoderBackbone(config)
    if not config.tie_word_embeddings:
      self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  def _init_weights(self, module):
    # Through nn.init, where transformers 5 skips what a checkpoint has already filled.
    if isinstance(module, DiffuCoderRMSNorm):
      nn.init.ones_(module.weight)
    elif isinstance(module, nn.Linear):
      nn.init.normal_(module.weight, std=self.config.initializer_range)
      if module.bias is not None:
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
      nn.init.normal_(module.weight, std=self.config.initializer_range)
      if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
        nn.init.zeros_(module.weight[module.padding_idx])

  def get_input_embeddings(self):
    return self.model.embed_tokens

  def set_input_embeddings(self, value):
    self.model.embed_tokens = value

  def get_output_embeddings(self):
    return getattr(self, "lm_head", None)

  def set_output_embeddings(self, value):
    self.lm_head = value

  def unembed(self, x):
    """Logits of hidden states: [..., D] to [..., V], in the model's dtype."""
    if not self.config.tie_word_embeddings:
      return self.lm_head(x)
    weight_VD = self.model.embed_tokens.weight
    return F.linear(x.to(weight_VD.device), weight_VD)

  def forward(
    self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None,
    output_hidden_states=None, return_dict=None, use_cache=None,
  ):  # fmt: skip
    """Scores every token of the vocabulary at every position.

    Args:
      input_ids: int64 [B, L]; or inputs_embeds, [B, L, D].
      attention_mask: None or "full": every position sees every other; [B, L], 0 on padding (left or
        right), which nobody sees; or bool [B, 1, L, L], True where the query (third) sees the key.
      position_ids: int64 [B, L]; 0..L-1 without it, counted from the first real token under a
        [B, L] mask.
      output_hidden_states: adds the embeddings, the residual stream after each layer but the last,
        and the state after the final norm.
      return_dict: False gives a tuple.
      use_cache: accepted for callers that pass False; there is no cache.
    Returns:
      MaskedLMOutput. `logits` [B, L, V] are in the model's dtype and RAW, as Dream's: logits[:, i]
      predicts token i + 1. The ones that predict the tokens at hand are
      torch.cat([logits[:, :1], logits[:, :-1]], 1). Those of padding are finite and meaningless.
    """
    c = self.config
    keep = c.output_hidden_states if output_hidden_states is None else output_hidden_states
    x_BLD, kept = self.model(input_ids, attention_mask, position_ids, inputs_embeds, keep)
    output = MaskedLMOutput(logits=self.unembed(x_BLD), hidden_states=kept)
    as_dict = getattr(c, "return_dict", True) if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()

  diffusion_generate = diffusion_generate


# So that `save_pretrained` puts the file beside the weights it saves.
DiffuCoderConfig.register_for_auto_class()
DiffuCoderModel.register_for_auto_class("AutoModel")
