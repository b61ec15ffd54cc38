"""The network's shape: one strict dataclass, the presets people ask for, and its FLOPs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and choices of a Qwen2-shaped Transformer. Unknown keys are a TypeError.

  Defaults are those that all Qwen2.5-Coder sizes and DiffuCoder share.
  """

  vocab_size: int  # rows of the embedding; may exceed the tokenizer's vocabulary
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  qkv_bias: bool = True  # False: the Llama layout (SmolLM2)
  tied_head: bool = False  # True: the output matrix is the embedding
  max_seq_len: int = 32768  # longest context the weights are for; longer input is refused
  rope_theta: float = 1e6
  norm_eps: float = 1e-6
  init_std: float = 0.02
  # The pattern the weights are trained for: "full" (diffusion) or "causal" (autoregressive).
  attention: str = "full"
  attention_impl: str = "xla"
  remat: str = "full"  # see transformer.REMAT
  # "auto": bfloat16 on accelerators, float32 on CPU.
  dtype: str = "auto"
  param_dtype: str = "float32"
  # The embedding row of this id gets no gradient through the input, as torch's `padding_idx` does
  # (Dream freezes its pad = end-of-text row so). -1: every row learns.
  frozen_input_id: int = -1
  # Low-rank adapters on the projections of every layer, with all else frozen; see model/lora.py.
  lora_rank: int = 0  # 0: none
  lora_alpha: float = 32.0  # adapters are multiplied by lora_alpha / lora_rank

  def __post_init__(self):
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "mlp_dim"):
      if getattr(self, name) < 1:
        raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"model.head_dim {self.head_dim} is odd; rotary embedding needs it even")
    if self.attention not in ("full", "causal"):
      raise ValueError(f"model.attention is {self.attention!r}; choose 'full' or 'causal'")
    if self.dtype not in ("auto", "float32", "bfloat16"):
      raise ValueError(f"model.dtype is {self.dtype!r}; choose 'auto', 'float32' or 'bfloat16'")
    if self.param_dtype not in ("float32", "bfloat16"):
      raise ValueError(f"model.param_dtype is {self.param_dtype!r}; choose 'float32' or 'bfloat16'")
    if self.lora_rank < 0:
      raise ValueError(f"model.lora_rank is {self.lora_rank}; give a rank, or 0 for no adapters")
    if not self.lora_alpha > 0:
      raise ValueError(f"model.lora_alpha is {self.lora_alpha}; it must be positive")

  @property
  def compute_dtype(self):
    """The activations' dtype, with "auto" resolved for what is compiled for."""
    if self.dtype != "auto":
      return self.dtype
    # Here, because configs read the presets and stay free of JAX.
    from diffucoder_jax.runtime import sharding

    return "float32" if sharding.platform() == "cpu" else "bfloat16"


def _qwen(vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, mlp_dim, tied_head, eps=1e-6):
  head_dim = embed_dim // num_heads
  return dict(
    vocab_size=vocab_size, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads,
    num_kv_heads=num_kv_heads, head_dim=head_dim, mlp_dim=mlp_dim, tied_head=tied_head, norm_eps=eps,
    rope_theta=1e6, qkv_bias=True,
  )  # fmt: skip


# Sizes of Qwen2.5-Coder: paper.md section 1.3 (0.5B and 7B read from the published config, the
# others from secondary sources; loading a folder always follows the folder's own config.json).
# Qwen2.5-Coder starts autoregressive, so its presets are causal; a diffusion config sets "full".
PRESETS = {
  "tiny": dict(
    vocab_size=512, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128,
    rope_theta=1e4, remat="none",
  ),
  "small": dict(
    vocab_size=4096, embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=344,
    rope_theta=1e4, remat="none", tied_head=True,
  ),
  "smollm2_135m": dict(
    vocab_size=49152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    mlp_dim=1536, rope_theta=1e5, norm_eps=1e-5, qkv_bias=False, tied_head=True, max_seq_len=8192,
  ),
  "qwen2_5_coder_0_5b": dict(_qwen(151936, 896, 24, 14, 2, 4864, True), attention="causal"),
  "qwen2_5_coder_1_5b": dict(_qwen(151936, 1536, 28, 12, 2, 8960, True), attention="causal"),
  "qwen2_5_coder_3b": dict(_qwen(151936, 2048, 36, 16, 2, 11008, True), attention="causal"),
  "qwen2_5_coder_7b": dict(_qwen(152064, 3584, 28, 28, 4, 18944, False), attention="causal"),
  "qwen2_5_coder_14b": dict(_qwen(152064, 5120, 48, 40, 8, 13824, False), attention="causal"),
  "qwen2_5_coder_32b": dict(_qwen(152064, 5120, 64, 40, 8, 27648, False), attention="causal"),
  "diffucoder_7b": dict(
    _qwen(152064, 3584, 28, 28, 4, 18944, False), attention="full", frozen_input_id=151643
  ),
}  # fmt: skip


def preset(name):
  """The keyword arguments of a named size, to edit and pass to `ModelConfig(**kwargs)`."""
  if name not in PRESETS:
    raise ValueError(f"unknown model preset {name!r}; choose one of {sorted(PRESETS)}")
  # What no size sets but a command line may: a locked config has no room for keys it lacks.
  common = ("remat", "attention_impl", "dtype", "param_dtype", "lora_rank", "lora_alpha")
  defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
  return {**{key: defaults[key] for key in common}, **PRESETS[name]}


def train_flops_per_token(config, seq_len):
  """FLOPs of one training step per token: 6 per weight that multiplies, plus attention.

  With adapters it is 4 per frozen weight, which gets no gradient, and 6 per weight of an adapter.
  The embedding lookup multiplies nothing and is left out, the output matrix is counted. Attention
  costs 12 * layers * heads * head_dim * seq_len (scores and values, forward and backward), half of
  it when causal. Recomputation under remat is not counted: this is model FLOPs, as MFU wants.
  Counted by hand because XLA's cost analysis counts the body of a scan over layers once.
  """
  c = config
  attention_weights = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  layer_weights = attention_weights + 3 * c.embed_dim * c.mlp_dim
  weights = c.num_layers * layer_weights + c.embed_dim * c.vocab_size
  widths = 4 * c.embed_dim + c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  widths += 3 * (c.embed_dim + c.mlp_dim)  # inputs and outputs of the seven projections
  adapter_weights = c.num_layers * c.lora_rank * widths
  attention = 12 * c.num_layers * c.num_heads * c.head_dim * seq_len
  attention *= 0.5 if c.attention == "causal" else 1.0
  return (4 if c.lora_rank else 6) * weights + 6 * adapter_weights + attention
