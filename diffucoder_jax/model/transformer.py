"""The Qwen2 / Dream Transformer in Linen: tokens in, target-aligned features out.

Dimension key: B batch, L sequence, D embed, H query heads, J kv heads, K head_dim, F mlp, V vocab,
N layers.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffucoder_jax.model import attention, blockwise, embedding, kv_cache
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.projection import projected, weight
from diffucoder_jax.model.swiglu import swiglu
from diffucoder_jax.runtime.sharding import batch_shards, constrain, platform

# What the backward pass keeps of each layer, besides the layer's input; it makes the rest again.
LAYER_INPUT = "layer_input"
_policies = jax.checkpoint_policies
REMAT = {
  "none": None,  # everything
  "full": _policies.nothing_saveable,
  # What the kernel's backward pass reads, so that attention itself is computed once; "xla" has no
  # such thing, and does as with "full".
  "attention": _policies.save_only_these_names(blockwise.SAVED),
  "dots": _policies.dots_with_no_batch_dims_saveable,  # the projections' outputs
  # Nothing on the device: the inputs wait in the host's memory.
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
    offload_src="device", offload_dst="pinned_host",
  ),
}  # fmt: skip


class RMSNorm(nn.Module):
  """Root-mean-square norm; the mean is float32, the scale multiplies in the input's dtype."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD):
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
    scale_D = self.param("scale", init, (x_BLD.shape[-1],), c.param_dtype)
    x32_BLD = x_BLD.astype(jnp.float32)
    inverse_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BLD), -1, keepdims=True) + c.norm_eps)
    return (x32_BLD * inverse_BL1).astype(x_BLD.dtype) * scale_D.astype(x_BLD.dtype)[None, None, :]


class Heads(nn.Module):
  """Projects [B, L, D] to heads [B, L, heads, K], with the bias Qwen2 has on q, k and v."""

  config: ModelConfig
  num_heads: int
  axis: str

  @nn.compact
  def __call__(self, x_BLD):
    c = self.config
    shape = (c.embed_dim, self.num_heads, c.head_dim)
    x_BLHK = projected(self, "kernel", x_BLD, shape, ("embed", self.axis, None))
    if c.qkv_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis, None))
      bias_HK = self.param("bias", init, shape[1:], c.param_dtype)
      x_BLHK += bias_HK.astype(x_BLD.dtype)[None, None]
    return constrain(x_BLHK, "batch", None, self.axis, None)


class Attention(nn.Module):
  """Self-attention of one layer; with `cached` places, also their keys and values and its own."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD, cos_BLk, sin_BLk, segment_ids_BL, pattern, seen_BLX, cached):
    c = self.config
    q_BLHK = Heads(c, c.num_heads, "heads", name="q")(x_BLD)
    k_BLJK = Heads(c, c.num_kv_heads, "kv_heads", name="k")(x_BLD)
    v_BLJK = Heads(c, c.num_kv_heads, "kv_heads", name="v")(x_BLD)
    q_BLHK = attention.rotate(q_BLHK, cos_BLk, sin_BLk)
    k_BLJK = attention.rotate(k_BLJK, cos_BLk, sin_BLk)
    with jax.named_scope("attend"):
      if seen_BLX is None:
        o_BLHK = attention.attend(q_BLHK, k_BLJK, v_BLJK, segment_ids_BL, pattern, c.attention_impl)
      else:
        o_BLHK = kv_cache.attend(q_BLHK, k_BLJK, v_BLJK, *cached, seen_BLX)
    shape = (c.num_heads, c.head_dim, c.embed_dim)
    o_BLD = projected(self, "o", o_BLHK, shape, ("heads", None, "embed"), contracted=2)
    return o_BLD, None if cached is None else (k_BLJK, v_BLJK)


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD):
    c = self.config
    wide, axes = (c.embed_dim, c.mlp_dim), ("embed", "mlp")
    gate_BLF = projected(self, "gate", x_BLD, wide, axes)
    up_BLF = projected(self, "up", x_BLD, wide, axes)
    h_BLF = constrain(swiglu(gate_BLF, up_BLF), "batch", None, "mlp")
    return projected(self, "down", h_BLF, wide[::-1], axes[::-1])


class Block(nn.Module):
  """One layer: attention and MLP, each behind a norm and a residual."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD, cos_BLk, sin_BLk, segment_ids_BL, pattern, seen_BLX, cached):
    c = self.config
    x_BLD = checkpoint_name(x_BLD, LAYER_INPUT)
    h_BLD = RMSNorm(c, name="attn_norm")(x_BLD)
    inputs = h_BLD, cos_BLk, sin_BLk, segment_ids_BL, pattern, seen_BLX, cached
    o_BLD, fresh = Attention(c, name="attn")(*inputs)
    x_BLD = constrain(x_BLD + o_BLD, "batch", None, None)
    with jax.named_scope("mlp"):
      x_BLD += Mlp(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x_BLD))
    x_BLD = constrain(x_BLD, "batch", None, None)
    self.sow("intermediates", "residual_BLD", x_BLD)
    return x_BLD, fresh


class Transformer(nn.Module):
  """Tokens to features that are aligned with their targets; `unembed` makes logits of them.

  Feature i of the result scores token i: it is the hidden state of position i - 1 (the logit shift
  of autoregressive weights, applied here and nowhere else). The first position of a segment has
  nothing before it and keeps its own hidden state, as in Dream's generation code.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self, tokens_BL, segment_ids_BL=None, positions_BL=None, pattern=None, cache=None, index_BL=None
  ):
    """Runs the network.

    Args:
      tokens_BL: int32 ids < vocab_size (not checked here: larger ids would read garbage).
      segment_ids_BL: int32, packed documents 1.., padding 0; None: all one document.
      positions_BL: int32 rotary positions; None: 0..L-1.
      pattern: `attention.Pattern`; None: the one the weights are trained for.
      cache: `kv_cache.Cache` of other places of the rows, which the tokens see as well; one of no
        places for the first tokens of rows. Needs `segment_ids_BL` and `positions_BL`.
      index_BL: int32, the tokens' places in the rows; needed with a cache that has places.
    Returns:
      features_BLD in the compute dtype, after the final norm; with a cache, instead, the pair of
      hidden states_BLD, which are *not* aligned (state i is what predicts the token after i: that of
      the token before the first is the caller's), and the tokens' own keys and values, a `Cache`.
    """
    c = self.config
    pattern = attention.PATTERNS[c.attention] if pattern is None else pattern
    if positions_BL is None:
      positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    embed_VD = weight(self, "embed", c.init_std, (c.vocab_size, c.embed_dim), ("vocab", "embed"))
    if not c.tied_head:  # Declared here so that `init` makes it; only `unembed` reads it.
      weight(self, "head", c.init_std, (c.embed_dim, c.vocab_size), ("embed", "vocab"))
    with jax.named_scope("embed"):
      x_BLD = self._lookup(embed_VD, tokens_BL)
    self.sow("intermediates", "embedding_BLD", x_BLD)
    cos_BLk, sin_BLk = attention.rotary(positions_BL, c.head_dim, c.rope_theta)
    cached = None if cache is None else (cache.keys, cache.values)
    seen_BLX = None
    if cache is not None and cache.segment_ids.shape[1]:
      seen_BLX = kv_cache.seen(cache, pattern, segment_ids_BL, index_BL)

    block = Block
    if c.remat not in REMAT:
      raise ValueError(f"model.remat is {c.remat!r}; choose one of {sorted(REMAT)}")
    if REMAT[c.remat] is not None:
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
    # Positional arguments only: nn.scan drops keyword arguments.
    rest = cos_BLk, sin_BLk, segment_ids_BL, pattern, seen_BLX
    if self.has_variable("params", "layer_0"):  # `layout.unrolled` made them
      fresh = []
      for i in range(c.num_layers):
        mine = jax.tree.map(lambda x, i=i: x[i], cached)
        x_BLD, new = block(c, name=f"layer_{i}")(x_BLD, *rest, mine)
        fresh.append(new)
      fresh = None if cache is None else jax.tree.map(lambda *x: jnp.stack(x), *fresh)
    else:
      layers = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * 5 + (0,),
        length=c.num_layers,
        # Layers that are computed again would, side by side, be found to be the same, and be kept.
        unroll=c.num_layers if written_out(c) and REMAT[c.remat] is None else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      x_BLD, fresh = layers(c, name="layers")(x_BLD, *rest, cached)
    x_BLD = RMSNorm(c, name="final_norm")(x_BLD)
    self.sow("intermediates", "hidden_BLD", x_BLD)
    if cache is not None:
      return x_BLD, kv_cache.Cache(*fresh, segment_ids_BL)
    return align_with_targets(x_BLD, segment_ids_BL)

  def _lookup(self, embed_VD, tokens_BL):
    c = self.config
    x_BLD = embedding.lookup(embed_VD, tokens_BL, c.compute_dtype)
    if c.frozen_input_id >= 0:
      frozen_BL1 = (tokens_BL == c.frozen_input_id)[:, :, None]
      x_BLD = jnp.where(frozen_BL1, jax.lax.stop_gradient(x_BLD), x_BLD)
    return constrain(x_BLD, "batch", None, None)


def written_out(config):
  """Whether a loop over layers is written out: where XLA is for CPU, and the layers are few.

  There every turn of a loop copies its layer's parameters and what the backward pass will read, which
  took a fifth of a training step of 31M parameters; many layers would take too long to compile.
  """
  return platform() == "cpu" and config.num_layers <= 12


def init_params(model, key):
  """Fresh parameters, boxed with their logical axes; `flax.linen.unbox` makes plain arrays."""
  dummy_BL = jnp.zeros((batch_shards(), 1), jnp.int32)
  return model.init(key, dummy_BL)["params"]


def align_with_targets(x_BLD, segment_ids_BL=None):
  """Shifts hidden states one to the right, so that position i holds what predicts token i.

  The first position of the row and of every segment keeps its own state: the one before it belongs
  to another document, or to padding.
  """
  shifted_BLD = jnp.concatenate([x_BLD[:, :1], x_BLD[:, :-1]], axis=1)
  if segment_ids_BL is None:
    return shifted_BLD
  before_BL = jnp.concatenate([segment_ids_BL[:, :1] * 0 - 1, segment_ids_BL[:, :-1]], axis=1)
  starts_BL = segment_ids_BL != before_BL
  return jnp.where(starts_BL[:, :, None], x_BLD, shifted_BLD)


def output_matrix(params):
  """The matrix from features to logits, [D, V]: the head, or the embedding when they are tied."""
  return params["head"] if "head" in params else params["embed"].T


def unembed(params, features):
  """Logits of features: [..., D] to float32 [..., V]. Pick positions before calling it."""
  with jax.named_scope("unembed"):
    matrix_DV = output_matrix(params).astype(features.dtype)
    logits = jnp.einsum("...D,DV->...V", features, matrix_DV, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", *([None] * (logits.ndim - 2)), "vocab")


def unembed_fn(model, params):
  """`unembed` of these parameters, for loops: the matrix has its dtype, and is whole on each device or
  cut over the vocabulary, before they begin."""
  name, axes = ("head", (None, "vocab")) if "head" in params else ("embed", ("vocab", None))
  matrix = constrain(params[name].astype(model.config.compute_dtype), *axes)
  return functools.partial(unembed, {name: matrix})


def canvas_logits_fn(model, params):
  """`canvas_features_fn`, and the features' logits: float32 [B, L, V] or [B, S, V]."""
  features_fn = canvas_features_fn(model, params)
  return lambda *canvas: unembed(params, features_fn(*canvas))


def canvas_features_fn(model, params):
  """What `diffusion.sampler.generate` asks for features, which `unembed_fn` makes logits of.

  Returns:
    (canvas_BL int32, valid_BL bool, index_BS int32 or None) -> target-aligned [B, L, D], or [B, S, D]
    at the positions of `index_BS`. Positions count the real tokens of each row.
  """

  def features_fn(canvas_BL, valid_BL, index_BS=None):
    segment_ids_BL = valid_BL.astype(jnp.int32)
    features_BLD = model.apply(
      {"params": params}, canvas_BL, segment_ids_BL, positions_of(valid_BL)
    )
    if index_BS is None:
      return features_BLD
    return jnp.take_along_axis(features_BLD, index_BS[..., None], axis=1)

  return features_fn


def next_logits_fn(model, params, valid_BL):
  """The function that `diffusion.autoregressive.generate` wants: what follows some tokens of rows.

  Args:
    model, params: of a network with causal attention.
    valid_BL: bool, the real places of the whole rows.
  Returns:
    (tokens_BS int32, start, cache) -> (float32 [B, V], cache): the logits of place `start` + S, given
    the tokens of the S places before it and a cache of those before these (None: there are none).
  """
  if model.config.attention != "causal":  # what was computed for a token would change with the next
    raise ValueError(
      f"model.attention is {model.config.attention!r}; only causal networks can be read token by token"
    )
  segment_ids_BL, positions_BL = valid_BL.astype(jnp.int32), positions_of(valid_BL)
  batch, length = valid_BL.shape

  def logits_fn(tokens_BS, start, cache):
    first = cache is None
    index_BS = jnp.broadcast_to(start + jnp.arange(tokens_BS.shape[1])[None, :], tokens_BS.shape)
    segment_ids_BS, positions_BS = (
      jnp.take_along_axis(x_BL, index_BS, axis=1) for x_BL in (segment_ids_BL, positions_BL)
    )
    hidden_BSD, fresh = model.apply(
      {"params": params}, tokens_BS, segment_ids_BS, positions_BS, None,
      kv_cache.nothing(model.config, batch) if first else cache, index_BS,
    )  # fmt: skip
    cache = kv_cache.extend(fresh, length) if first else kv_cache.write(cache, fresh, start)
    return unembed(params, hidden_BSD[:, -1]), cache

  return logits_fn


def positions_of(valid_BL):
  """int32 [B, L]: each real token's place among the row's real tokens; padding may be anywhere."""
  return jnp.maximum(jnp.cumsum(valid_BL, axis=1) - 1, 0)
