"""Hugging Face folders of random weights, small and large."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from diffucoder_jax.hf import mapping, shards
from diffucoder_jax.model.config import ModelConfig

CONFIG = ModelConfig(
  vocab_size=32, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24
)
SIZES = {
  "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
  "rope_theta": 1e4, "rms_norm_eps": 1e-5,
}  # fmt: skip
IDS = {"mask_token_id": 30, "pad_token_id": 29, "eos_token_id": 28}


def config_json(kind, **changes):
  """config.json of a small model; kind: Dream, qwen2, qwen2-tied or llama."""
  ids = IDS if kind == "Dream" else {"eos_token_id": [28, 27]}
  tied = {"tie_word_embeddings": kind.endswith("-tied")}
  return {"model_type": kind.removesuffix("-tied"), **SIZES, **ids, **tied, **changes}


def make(folder, kind, dtype, num_shards=1, scale=0.2, **changes):
  """Writes a folder with the safetensors library. Returns its tensors, of standard deviation `scale`."""
  folder.mkdir(parents=True, exist_ok=True)
  hf_config = config_json(kind, **changes)
  (folder / "config.json").write_text(json.dumps(hf_config))
  rng = np.random.default_rng(0)
  wanted = mapping.hf_shapes(ModelConfig(**mapping.config_from_hf(hf_config)))
  state = {name: (scale * rng.normal(size=shape)).astype(dtype) for name, shape in wanted.items()}
  if num_shards == 1:
    save_file(state, folder / shards.SINGLE, metadata={"format": "pt"})
    return state
  where = {}
  for i in range(num_shards):
    file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
    part = {name: state[name] for name in sorted(state)[i::num_shards]}
    save_file(part, folder / file, metadata={"format": "pt"})
    where |= dict.fromkeys(part, file)
  (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
  return state


def make_large(folder, megabytes=0, hf_config=None):
  """Writes a bfloat16 Dream folder of random weights, one file per layer, holding one at a time.

  Args:
    folder: to make.
    megabytes: about its size, with layers of 1,024; or
    hf_config: config.json to follow.
  Returns:
    `ModelConfig`.
  """
  folder.mkdir(parents=True)
  if hf_config is None:
    layers = max(1, megabytes // 19)
    sizes = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers)
    hf_config = config_json("Dream", vocab_size=4096, **sizes)
  config = ModelConfig(**mapping.config_from_hf(hf_config))
  files, where = {}, {}
  for name, shape in mapping.hf_shapes(config).items():
    layer = name.split(".")[2] if ".layers." in name else name
    files.setdefault(layer, {})[name] = shape
  rng = np.random.default_rng(0)
  for i, tensors in enumerate(files.values(), 1):
    file = f"model-{i:05}-of-{len(files):05}.safetensors"
    # Any bits with the highest one of the exponent off: numbers between -2 and 2.
    state = {
      name: (rng.integers(0, 1 << 16, shape, np.uint16) & 0xBFFF).view(ml_dtypes.bfloat16)
      for name, shape in tensors.items()
    }
    save_file(state, folder / file, metadata={"format": "pt"})
    where |= dict.fromkeys(state, file)
  (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
  (folder / "config.json").write_text(json.dumps(hf_config))
  return config
