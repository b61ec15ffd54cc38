"""Opens weights of any kind we know and asks them for logits: what a notebook starts with."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from diffucoder_jax.data.tokenizer import Tokenizer, load_tokenizer
from diffucoder_jax.hf import load, mapping
from diffucoder_jax.model import lora
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, unembed
from diffucoder_jax.runtime import checkpoint, sharding

# What a network must share with the one that its weights were made for.
WEIGHTS_DEPEND_ON = (
  "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
  "qkv_bias", "tied_head", "rope_theta", "norm_eps",
)  # fmt: skip
MERGE_FIRST = (
  "; or make a Hugging Face folder of it first (python -m diffucoder_jax.convert), which merges "
  "adapters into the weights"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """Weights with all that is needed to use them. An id of -1 means that there is none."""

  config: ModelConfig
  params: Any = dataclasses.field(repr=False)
  tokenizer: Tokenizer | None = dataclasses.field(repr=False)
  mask_id: int
  eos_id: int
  pad_id: int
  mesh: jax.sharding.Mesh | None  # None: the params live wherever the caller put them


def from_pretrained(path, mesh=None, param_dtype=None):
  """Loads a model.

  Args:
    path: a Hugging Face folder (config.json of model_type Dream, qwen2 or llama, and safetensors),
      a workdir of ours (its newest checkpoint), its checkpoints/ folder, or checkpoints/<step>.
    mesh: where the parameters go; None: this process's first device.
    param_dtype: "float32" or "bfloat16"; None: as the checkpoint's config says (float32 for a
      Hugging Face folder, whatever is on disk).
  Returns:
    `Pretrained`. Special ids are config.json's for a Hugging Face folder and for what was converted
    from one, the tokenizer's where that has none and for our other checkpoints.
  Raises:
    FileNotFoundError: nothing there that can be loaded; says what was looked for.
    ValueError: the config or a tensor is not what it should be; names it.
  """
  mesh = load.one_device_mesh() if mesh is None else mesh
  config, hf_config, _, folder = describe(path)
  if param_dtype is not None:
    config = dataclasses.replace(config, param_dtype=str(jnp.dtype(param_dtype)))
  tokenizer = _tokenizer(folder)
  special = special_ids(config, hf_config, tokenizer)
  params = load_params(path, config, load.abstract_params(config, mesh))
  return Pretrained(config=config, params=params, tokenizer=tokenizer, mesh=mesh, **special)


def load_params(path, model_config, abstract_params, key=None):
  """Loads the parameters alone, for a network that is already there: what training starts from.

  Args:
    path: as for `from_pretrained`.
    model_config: the network's `ModelConfig`. Its shape and its numerics must be the checkpoint's;
      the attention pattern, the frozen id and the dtypes are the caller's choice.
    abstract_params: its parameters as `jax.ShapeDtypeStruct` with their shardings.
    key: PRNG key of the adapters that are made when the config has some and `path` has none.
  Returns:
    the tree of arrays, placed as asked, in `model_config.param_dtype` (adapters in float32).
  Raises:
    FileNotFoundError, ValueError: as `from_pretrained`; names every field that differs.
  """
  saved, _, is_hf, _ = describe(path)
  fields = WEIGHTS_DEPEND_ON + (("lora_rank", "lora_alpha") if saved.lora_rank else ())
  differ = [
    f"{field} is {getattr(saved, field)} there and {getattr(model_config, field)} in the config"
    for field in fields
    # Some files carry 1e-5 as 9.9999997e-06.
    if not math.isclose(getattr(saved, field), getattr(model_config, field), rel_tol=1e-6)
  ]
  if differ:
    raise ValueError(
      f"{path} holds another network than the config's: model.{'; model.'.join(differ)}. Set these "
      "to the checkpoint's values" + MERGE_FIRST * bool(saved.lora_rank)
    )
  mesh = jax.tree.leaves(abstract_params)[0].sharding.mesh
  fresh = model_config.lora_rank > 0 and not saved.lora_rank
  with jax.set_mesh(mesh):  # the caller may be on another one
    if is_hf:
      params = load.load_params(path, model_config, mesh)
    else:
      wanted = lora.without_adapters(abstract_params) if fresh else abstract_params
      params = checkpoint.restore_params(path, wanted)
    return lora.with_adapters(params, model_config, abstract_params, key) if fresh else params


def load_tokenizer_of(path):
  """The tokenizer that lies with the weights at `path` (as for `from_pretrained`), or None."""
  path = epath.Path(path)
  return _tokenizer(path if _hf_config(path) is not None else _workdir(path))


class Described(NamedTuple):
  """What lies at a path.

  Attributes:
    config: `ModelConfig`.
    hf_config: config.json of the Hugging Face folder, or of the one that a checkpoint was converted
      from; {} if there is none.
    is_hf: a Hugging Face folder, rather than a checkpoint of ours.
    folder: where its tokenizer is.
  """

  config: ModelConfig
  hf_config: dict
  is_hf: bool
  folder: epath.Path


def describe(path):
  """Tells what lies at `path` (as for `from_pretrained`) without loading it: `Described`."""
  path = epath.Path(path)
  hf_config = _hf_config(path)
  if hf_config is not None:
    return Described(ModelConfig(**mapping.config_from_hf(hf_config)), hf_config, True, path)
  workdir, config = _workdir(path), checkpoint.load_config(path)
  return Described(ModelConfig(**config["model"]), config.get("hf_config", {}), False, workdir)


def _hf_config(path):
  """config.json as a dict if this is a Hugging Face folder, else None."""
  if not (path / "config.json").exists():
    return None
  hf_config = load.read_config(path)
  is_workdir = (path / "checkpoints").exists() or isinstance(hf_config.get("model"), dict)
  if "model_type" not in hf_config and not is_workdir:
    raise ValueError(
      f"{path / 'config.json'} has neither `model_type` (a Hugging Face folder) nor `model` (a "
      "workdir of ours)"
    )
  return hf_config if "model_type" in hf_config else None


def _workdir(path):
  """The workdir of a checkpoint path, by the layout <workdir>/checkpoints/<step>."""
  for folder in (path / "checkpoints", path, path.parent):
    if folder.name == "checkpoints" and folder.exists() and path.exists():
      return folder.parent
  raise FileNotFoundError(
    f"{path} is nothing that can be loaded. Looked for: config.json with model_type, and "
    "safetensors (a Hugging Face folder); checkpoints/ (a workdir of ours); or a path that ends in "
    "/checkpoints or /checkpoints/<step>"
  )


def _tokenizer(folder):
  try:
    return load_tokenizer(folder)
  except (FileNotFoundError, ValueError) as error:
    # Weights are of use without one: token ids in, logits out.
    logging.warning("no tokenizer for %s, only token ids can be used: %s", folder, error)
    return None


def special_ids(config, hf_config, tokenizer):
  """{"mask_id", "eos_id", "pad_id"} of config.json, or else of the tokenizer; -1: there is none."""
  ids = {}
  for name in ("mask", "eos", "pad"):
    value, source = mapping.token_id(hf_config, f"{name}_token_id"), "config.json"
    if value < 0 and tokenizer is not None:
      value, source = getattr(tokenizer, f"{name}_id"), "the tokenizer"
    if value >= config.vocab_size:
      raise ValueError(
        f"{name}_token_id {value} of {source} is outside vocab_size {config.vocab_size}; set "
        f"{name}_token_id in config.json to an id of the vocabulary, or use this model's tokenizer"
      )
    ids[f"{name}_id"] = value
  return ids


def logits(ckpt, tokens, valid=None, attention=None):
  """Scores of every token of the vocabulary at every position, aligned with their targets.

  Compiled once per shape; the parameters are an argument of the compiled function.

  Args:
    ckpt: `Pretrained`.
    tokens: int [B, L], lists or array; the same on all processes.
    valid: bool [B, L], False on padding, which must be left or right of the text; None: no padding.
    attention: "full" or "causal"; None: the one the weights are trained for.
  Returns:
    float32 [B, L, V], laid out over `ckpt.mesh`; [:, i] scores token i given what the attention
    pattern shows (for "causal": the tokens before i). The first token of a row is scored by its own
    position, which tells little. Rows of padding are finite and meaningless.
  Raises:
    ValueError: a token id outside the vocabulary, with its position; shapes that do not fit.
  """
  tokens_BL = _check_tokens(tokens, ckpt.config)
  valid_BL = None if valid is None else _check_valid(valid, tokens_BL.shape)
  config = ckpt.config
  if attention is not None:
    config = dataclasses.replace(config, attention=attention)
  num_rows = len(tokens_BL)
  if ckpt.mesh is None:
    return _logits(config, ckpt.params, tokens_BL, valid_BL)
  shards = ckpt.mesh.shape["data"] * ckpt.mesh.shape["fsdp"]
  fill = ((0, -num_rows % shards), (0, 0))  # rows that the mesh needs and nobody sees
  place = lambda x: jax.device_put(np.pad(x, fill), sharding.batch_sharding(ckpt.mesh))  # noqa: E731
  with jax.set_mesh(ckpt.mesh):
    valid_BL = None if valid_BL is None else place(valid_BL)
    logits_BLV = _logits(config, ckpt.params, place(tokens_BL), valid_BL)
    return logits_BLV if len(logits_BLV) == num_rows else logits_BLV[:num_rows]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens_BL, valid_BL):
  segment_ids_BL = positions_BL = None
  if valid_BL is not None:
    segment_ids_BL = valid_BL.astype(jnp.int32)
    positions_BL = jnp.maximum(jnp.cumsum(segment_ids_BL, axis=1) - 1, 0)
  model = Transformer(config)
  return unembed(params, model.apply({"params": params}, tokens_BL, segment_ids_BL, positions_BL))


def _check_tokens(tokens, config):
  try:
    tokens_BL = np.asarray(tokens)
  except ValueError as error:
    raise ValueError("tokens must be [B, L]: pad rows to one length and pass `valid`") from error
  if tokens_BL.ndim != 2 or 0 in tokens_BL.shape or not np.issubdtype(tokens_BL.dtype, np.integer):
    raise ValueError(
      f"tokens must be non-empty integers [B, L], got {tokens_BL.dtype} {list(tokens_BL.shape)}"
    )
  if tokens_BL.shape[1] > config.max_seq_len:
    raise ValueError(
      f"rows of {tokens_BL.shape[1]} tokens are longer than the model's context, "
      f"{config.max_seq_len}; cut them"
    )
  wrong = np.argwhere((tokens_BL < 0) | (tokens_BL >= config.vocab_size))
  if len(wrong):
    row, column = wrong[0]
    raise ValueError(
      f"token id {tokens_BL[row, column]} at row {row}, position {column} is outside the "
      f"vocabulary 0..{config.vocab_size - 1} ({len(wrong)} such ids)"
    )
  return tokens_BL.astype(np.int32)


def _check_valid(valid, shape):
  valid_BL = np.asarray(valid)
  if valid_BL.shape != shape:
    raise ValueError(f"valid has shape {list(valid_BL.shape)}, tokens have {list(shape)}")
  valid_BL = valid_BL.astype(bool)
  padded_BL = np.pad(valid_BL.astype(np.int8), ((0, 0), (1, 1)))
  runs_B = np.sum(np.diff(padded_BL, axis=1) == 1, axis=1)
  if (runs_B > 1).any():
    raise ValueError(
      f"valid of row {int(np.argmax(runs_B > 1))} has padding between tokens; padding must be left "
      "or right of them"
    )
  return valid_BL
