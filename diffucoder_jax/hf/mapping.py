"""Our parameters and Hugging Face's, one table for both directions; and the two kinds of config.

Letters of the table are the dimensions of `model/transformer.py`: V vocab, D embed, F mlp, H query
heads, J kv heads, K head_dim. Our tensors of one kind are stacked over the layers, [N, ...];
Hugging Face stores one per layer, and merges heads with head_dim ("HK D" is [H * K, D]).
Source of the names: the state dict that Qwen2, Llama and Dream share in `transformers`.
"""

import math
from typing import NamedTuple

from diffucoder_jax.runtime.optim import ADAPTER

MODEL_TYPES = {"Dream": "full", "qwen2": "causal", "llama": "causal"}  # and how they attend

# The file may hold these; they are made of the config and are not weights.
IGNORED_SUFFIX = ".rotary_emb.inv_freq"


class Row(NamedTuple):
  """One kind of tensor: where it is in our tree, what Hugging Face calls it, and both shapes."""

  path: tuple[str, ...]
  name: str  # with {i} for the layer, if it has one
  ours: str  # a letter per dimension, without the stacking over layers
  theirs: str  # a group of letters per dimension, separated by spaces

  @property
  def stacked(self):
    """True for tensors of the layers, which our tree holds as one array [N, ...]."""
    return self.path[0] == "layers"

  def names(self, config):
    """Hugging Face's names for this row, in the order of our first dimension."""
    return [self.name.format(i=i) for i in range(config.num_layers if self.stacked else 1)]


def _row(path, name, ours, theirs):
  return Row(tuple(path.split("/")), name, ours, theirs)


_LAYER = "model.layers.{i}."
TABLE = (
  _row("embed", "model.embed_tokens.weight", "VD", "V D"),
  _row("layers/attn_norm/scale", _LAYER + "input_layernorm.weight", "D", "D"),
  _row("layers/attn/q/kernel", _LAYER + "self_attn.q_proj.weight", "DHK", "HK D"),
  _row("layers/attn/q/bias", _LAYER + "self_attn.q_proj.bias", "HK", "HK"),
  _row("layers/attn/k/kernel", _LAYER + "self_attn.k_proj.weight", "DJK", "JK D"),
  _row("layers/attn/k/bias", _LAYER + "self_attn.k_proj.bias", "JK", "JK"),
  _row("layers/attn/v/kernel", _LAYER + "self_attn.v_proj.weight", "DJK", "JK D"),
  _row("layers/attn/v/bias", _LAYER + "self_attn.v_proj.bias", "JK", "JK"),
  _row("layers/attn/o", _LAYER + "self_attn.o_proj.weight", "HKD", "D HK"),
  _row("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D", "D"),
  _row("layers/mlp/gate", _LAYER + "mlp.gate_proj.weight", "DF", "F D"),
  _row("layers/mlp/up", _LAYER + "mlp.up_proj.weight", "DF", "F D"),
  _row("layers/mlp/down", _LAYER + "mlp.down_proj.weight", "FD", "D F"),
  _row("final_norm/scale", "model.norm.weight", "D", "D"),
  _row("head", "lm_head.weight", "DV", "V D"),
)
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def rows(config):
  """The rows of `TABLE` that a network of this `ModelConfig` has."""
  absent = {("head",)} if config.tied_head else set()
  if not config.qkv_bias:
    absent |= {row.path for row in TABLE if row.path[-1] == "bias"}
  return [row for row in TABLE if row.path not in absent]


def _sizes(config):
  return {
    "V": config.vocab_size, "D": config.embed_dim, "F": config.mlp_dim,
    "H": config.num_heads, "J": config.num_kv_heads, "K": config.head_dim,
  }  # fmt: skip


def get(tree, row):
  """The leaf of `tree` (nested dicts, ours) that a row is about."""
  for key in row.path:
    tree = tree[key]
  return tree


def put(tree, row, leaf):
  """Sets the leaf that a row is about, making the dicts on the way."""
  for key in row.path[:-1]:
    tree = tree.setdefault(key, {})
  tree[row.path[-1]] = leaf


def their_shape(row, config):
  """The shape of one tensor of this row in a Hugging Face file."""
  sizes = _sizes(config)
  return tuple(math.prod(sizes[letter] for letter in group) for group in row.theirs.split())


def their_axes(row, our_axes):
  """Mesh axes of a Hugging Face tensor, so that turning it into ours moves nothing between devices.

  Args:
    row: the row.
    our_axes: mesh axes of our tensor without the layers' dimension, one per letter of `row.ours`.
  """
  axes = dict(zip(row.ours, our_axes, strict=True))
  # K is never cut, so a merged "HK" is cut as H is: into the same runs of whole heads.
  if axes.get("K") is not None:
    raise ValueError(f"head_dim of {'/'.join(row.path)} must not be cut; it is, over {axes['K']}")
  return tuple(axes[group[0]] for group in row.theirs.split())


def to_ours(row, tensor, config):
  """One Hugging Face tensor as ours, e.g. [H * K, D] to [D, H, K]; numpy or JAX, any dtype.

  Runs of whole heads, or of rows that hold no heads, are converted as a whole tensor is.
  """
  sizes = []
  for group, size in zip(row.theirs.split(), tensor.shape, strict=True):
    sizes += [size] if len(group) == 1 else [size // config.head_dim, config.head_dim]
  letters = row.theirs.replace(" ", "")
  return tensor.reshape(sizes).transpose([letters.index(letter) for letter in row.ours])


def to_theirs(row, tensor):
  """The inverse of `to_ours`, for one layer's tensor or a part of it."""
  groups, letters = row.theirs.split(), row.theirs.replace(" ", "")
  tensor = tensor.transpose([row.ours.index(letter) for letter in letters])
  sizes = dict(zip(letters, tensor.shape, strict=True))
  return tensor.reshape([math.prod(sizes[letter] for letter in group) for group in groups])


def our_shape(row, config):
  """The shape of this row's leaf in our tree."""
  sizes = _sizes(config)
  return (config.num_layers,) * row.stacked + tuple(sizes[letter] for letter in row.ours)


def adapter_shapes(row, config):
  """{"path/of/leaf": shape} of the adapter beside this row's leaf; empty where there is none.

  All projections of the layers have one, and these are what Hugging Face stores as "outputs inputs".
  """
  outputs, *inputs = row.theirs.split()
  if not (config.lora_rank and row.stacked and inputs):
    return {}
  sizes, path = _sizes(config), "/".join(row.path) + ADAPTER + "/"
  one, other = (tuple(sizes[letter] for letter in group) for group in (*inputs, outputs))
  layers, rank = config.num_layers, config.lora_rank
  return {path + "a": (layers, *one, rank), path + "b": (layers, rank, *other)}


def hf_shapes(config):
  """Every tensor of a Hugging Face folder for this `ModelConfig`: {name: shape}."""
  return {name: their_shape(row, config) for row in rows(config) for name in row.names(config)}


# The keys of config.json that hold one of our fields as it is.
CONFIG_KEYS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "mlp_dim": "intermediate_size",
  "tied_head": "tie_word_embeddings",
  "max_seq_len": "max_position_embeddings",
  "rope_theta": "rope_theta",
  "norm_eps": "rms_norm_eps",
  "init_std": "initializer_range",
}
# What the three config classes of `transformers` take for an absent key. A size has no default
# here: the classes' own are those of some 7B model, which is never what a file without them means.
# An absent `tie_word_embeddings` is False in all three (only their base class says True).
_DEFAULTS = {
  "tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
  "max_position_embeddings": 32768,
}  # fmt: skip
# Dream's class supplies these ids when config.json does not.
DREAM_IDS = {"mask_token_id": 151666, "pad_token_id": 151643}


def config_to_hf(config, hf_config, ids):
  """config.json for a `ModelConfig`: the inverse of `config_from_hf`.

  Args:
    config: `ModelConfig`. "full" attention becomes model_type Dream; "causal" becomes qwen2, or
      llama without biases, which `transformers` runs by itself.
    hf_config: config.json of the folder that these weights once came from, {} if none; what it says
      beyond our fields is kept.
    ids: {"mask_token_id": int or None, ...}, which win over `hf_config`.
  Returns:
    dict, without auto_map and torch_dtype.
  Raises:
    ValueError: a causal network whose heads those classes cannot express.
  """
  full, whole = config.attention == "full", config.num_heads * config.head_dim == config.embed_dim
  model_type = "Dream" if full else "qwen2" if config.qkv_bias else "llama"
  if model_type == "qwen2" and not whole:
    raise ValueError(
      f"a causal network with num_heads {config.num_heads} of head_dim {config.head_dim} at width "
      f"{config.embed_dim} is no Qwen2 model: only num_heads * head_dim = embed_dim can be exported"
    )
  names = {"Dream": "DiffuCoderModel", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
  kept = {key: value for key, value in hf_config.items() if key not in _NOT_KEPT}
  return {
    "attention_dropout": 0.0, "max_window_layers": config.num_layers, "rope_scaling": None,
    **kept,
    **{key: getattr(config, field) for field, key in CONFIG_KEYS.items()},
    "model_type": model_type,
    "architectures": [names[model_type]],
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "attention_bias": config.qkv_bias,
    "use_sliding_window": False,
    "sliding_window": None,
    "use_cache": not full,
    # The oldest that this is written for. Without a version transformers 4.57 takes every tokenizer
    # of over 100k tokens for an old Mistral's, and warns about it.
    "transformers_version": "4.46.2",
    **ids,
  }  # fmt: skip


# Keys of another config.json that say how it was stored and by whom.
_NOT_KEPT = (
  "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "rope_parameters",
  "layer_types",
)  # fmt: skip


def raw_id(hf_config, key):
  """What config.json says of a special token: int, list or None; Dream's class fills in two."""
  default = DREAM_IDS.get(key) if hf_config.get("model_type") == "Dream" else None
  return hf_config.get(key, default)


def token_id(hf_config, key):
  """A special token id of config.json, the first of them if it is a list; -1 if there is none."""
  value = raw_id(hf_config, key)
  if isinstance(value, list):
    value = value[0] if value else None
  return -1 if value is None else int(value)


def _refuse(hf_config):
  """Raises for what our network does not compute; ignoring it would give silently wrong numbers."""
  model_type = hf_config.get("model_type")
  if model_type not in MODEL_TYPES:
    raise ValueError(
      f"config.json has model_type {model_type!r}; only {sorted(MODEL_TYPES)} are supported"
    )
  has_bias = model_type != "llama"
  if model_type == "Dream":  # Ours may say either; the published one has biases and no such key.
    has_bias = bool(hf_config.get("attention_bias", True))
  rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
  must_be = {
    "hidden_act": ("silu", hf_config.get("hidden_act", "silu")),
    "use_sliding_window": (False, bool(hf_config.get("use_sliding_window"))),
    "mlp_bias": (False, bool(hf_config.get("mlp_bias"))),
    "attention_bias": (has_bias, bool(hf_config.get("attention_bias", has_bias))),
    "rope_scaling": ("default", rope.get("rope_type", rope.get("type", "default"))),
    "partial_rotary_factor": (1.0, float(hf_config.get("partial_rotary_factor") or 1.0)),
    "layer_types": ({"full_attention"}, set(hf_config.get("layer_types") or {"full_attention"})),
    "quantization_config": (None, hf_config.get("quantization_config")),
  }
  for key, (wanted, found) in must_be.items():
    if found != wanted:
      raise ValueError(
        f"config.json of a {model_type} model has {key} = {hf_config.get(key, found)!r}; "
        f"this network only computes {wanted!r}, so its numbers would be wrong"
      )


def config_from_hf(hf_config):
  """Keyword arguments of `ModelConfig` for a Hugging Face config.

  Args:
    hf_config: config.json as a dict; model_type qwen2, llama or Dream.
  Returns:
    kwargs; `attention` is "full" for Dream and "causal" for the others, `dtype` is left "auto".
    `frozen_input_id` is the pad id, as torch's `padding_idx` (which counts a negative id from the
    end); -1 without one.
  Raises:
    ValueError: names the key whose value this network cannot honour, or that is absent.
  """
  _refuse(hf_config)
  model_type = hf_config["model_type"]
  given = {**_DEFAULTS, **{key: value for key, value in hf_config.items() if value is not None}}
  if model_type == "llama":  # Its class groups no heads unless told to, and has a short context.
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    given["max_position_embeddings"] = hf_config.get("max_position_embeddings") or 2048
  if rope := hf_config.get("rope_parameters"):  # transformers 5 moved rope_theta in there
    given["rope_theta"] = rope.get("rope_theta", hf_config.get("rope_theta"))
  for key in CONFIG_KEYS.values():
    if given.get(key) is None:
      raise ValueError(f"config.json of a {model_type} model has no {key}; add it")
  kwargs = {field: given[key] for field, key in CONFIG_KEYS.items()}
  kwargs |= {field: float(kwargs[field]) for field in ("rope_theta", "norm_eps", "init_std")}
  kwargs["head_dim"] = given.get("head_dim", kwargs["embed_dim"] // kwargs["num_heads"])
  if "head_dim" not in given and kwargs["embed_dim"] % kwargs["num_heads"]:
    raise ValueError(
      f"config.json has hidden_size {kwargs['embed_dim']}, not a multiple of num_attention_heads "
      f"{kwargs['num_heads']}, and no head_dim"
    )
  return dict(
    kwargs,
    qkv_bias=model_type != "llama" and bool(hf_config.get("attention_bias", True)),
    attention=MODEL_TYPES[model_type],
    frozen_input_id=_frozen_input_id(hf_config, kwargs["vocab_size"]),
  )


def _frozen_input_id(hf_config, vocab_size):
  pad_id = raw_id(hf_config, "pad_token_id")
  if pad_id is None:
    return -1
  if not -vocab_size <= pad_id < vocab_size:
    raise ValueError(
      f"config.json has pad_token_id {pad_id} (Dream's, where the key is absent: "
      f"{DREAM_IDS['pad_token_id']}), outside vocab_size {vocab_size}; set it to an id of the "
      "vocabulary, or to null"
    )
  return pad_id % vocab_size
