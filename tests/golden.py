"""The golden checkpoint and its numbers, for the parity tests."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from diffucoder_jax.hf import load, mapping
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, unembed


def tensors(path):
  """All tensors of a safetensors file as numpy arrays."""
  with safe_open(path, "np") as f:
    return {name: f.get_tensor(name) for name in f.keys()}


def cases(path):
  return json.loads(path.read_text())


def checkpoint(folder):
  """(config.json as dict, ModelConfig, params) of a Hugging Face folder."""
  hf_config = load.read_config(folder)
  config = ModelConfig(**mapping.config_from_hf(hf_config))
  return hf_config, config, load.load_params(folder, config)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens_BL, valid_BL):
  """Target-aligned logits of a padded canvas."""
  segment_ids_BL = valid_BL.astype(jnp.int32)
  positions_BL = jnp.maximum(jnp.cumsum(segment_ids_BL, axis=1) - 1, 0)
  features = Transformer(config).apply({"params": params}, tokens_BL, segment_ids_BL, positions_BL)
  return unembed(params, features)


def canvas(ids_BL, attention_mask_BL, new_tokens, mask_id):
  """(canvas, valid): prompts with masks appended, as diffusion_generate lays them out."""
  rows = ids_BL.shape[0]
  masks = np.full((rows, new_tokens), mask_id, np.int32)
  seen = np.ones((rows, new_tokens), bool)
  return np.concatenate([ids_BL, masks], 1), np.concatenate(
    [attention_mask_BL.astype(bool), seen], 1
  )


def hf_tensor(params, config, name):
  """One tensor of our tree as the Hugging Face tensor of that name, numpy."""
  for row in mapping.rows(config):
    if name in row.names(config):
      leaf = np.asarray(mapping.get(params, row))
      return mapping.to_theirs(row, leaf[row.names(config).index(name)] if row.stacked else leaf)
  raise KeyError(name)
