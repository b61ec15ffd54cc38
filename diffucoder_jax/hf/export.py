"""Writes a Hugging Face folder that `transformers` loads: weights, configs, model file, manifest."""

import hashlib
import importlib.resources
import json
import re

from etils import epath

from diffucoder_jax.hf import mapping, shards

MANIFEST = "manifest.json"
MODEL_FILE = "modeling_diffucoder.py"
LOOP = "denoising_diffucoder"  # the module that becomes a part of that file
# Which code a folder asks `transformers` to run: ours, which travels with the weights, or Dream's
# own, from its page at Hugging Face (needs a network, and transformers 4.46 to 4.57).
DREAM_FILES = ("configuration_dream.py", "modeling_dream.py", "generation_utils.py")
DREAM_REPOSITORY = "Dream-org/Dream-v0-Instruct-7B"
REMOTE_CODE = ("own", "dream")
# What DiffuCoder's README samples with, for whoever reads generation_config.json.
SAMPLING = {
  "alg": "entropy", "alg_temp": 0.0, "eps": 1e-3, "steps": 256, "temperature": 0.3, "top_p": 0.95,
}  # fmt: skip
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text):
  """Bytes of a size such as 5GB, 500MB or 2GiB; ValueError for anything else."""
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
  if not match or match[2] not in _UNITS or float(match[1]) <= 0:
    raise ValueError(f"{text!r} is not a size; write for example 5GB or 500MB")
  return int(float(match[1]) * _UNITS[match[2]])


def plan(tensors, dtype, shard_bytes):
  """Deals tensors out to files in order, each of at most `shard_bytes` or of one tensor.

  Returns:
    {file name: {name: `shards.Tensor`}}.
  """
  files, sizes = [{}], [0]
  for name, tensor in tensors.items():
    size = shards.num_bytes(tensor.shape, dtype)
    if files[-1] and sizes[-1] + size > shard_bytes:
      files.append({})
      sizes.append(0)
    files[-1][name] = tensor
    sizes[-1] += size
  if len(files) == 1:
    return {shards.SINGLE: files[0]}
  n = len(files)
  return {f"model-{i:05d}-of-{n:05d}.safetensors": file for i, file in enumerate(files, 1)}


def check_remote_code(remote_code, config):
  """Raises ValueError for a network that Dream's published code would run wrongly."""
  whole = config.num_heads * config.head_dim == config.embed_dim
  if remote_code == "dream" and not (config.attention == "full" and config.qkv_bias and whole):
    raise ValueError(
      "--remote-code dream: Dream's code runs bidirectional networks with q/k/v biases and "
      "num_heads * head_dim = embed_dim only; use --remote-code own"
    )


def model_file():
  """The network for PyTorch with its denoising loop, as the one file that travels: bytes.

  The loop stands where the network's source imports it; why one file, the source says.
  """
  sources = importlib.resources.files("diffucoder_jax.hf")
  network, loop = (sources.joinpath(name).read_text("utf-8") for name in (MODEL_FILE, f"{LOOP}.py"))
  before, after = re.split(rf"^from \S+\.{LOOP} import .*\n", network, flags=re.MULTILINE)
  return f"{before}\n# --- {LOOP}.py\n\n{loop}\n\n# --- {MODEL_FILE}\n{after}".encode()


def model_code(config, remote_code, source):
  """The code that a folder needs: (keys of config.json, {file name: bytes} to lay beside it).

  Args:
    config: `ModelConfig`. A causal network needs none: `transformers` has those classes.
    remote_code: one of `REMOTE_CODE`.
    source: the folder that weights or tokenizer came from; Dream's files are copied if it has them.
  """
  if config.attention == "causal":
    return {}, {}
  if remote_code == "own":
    module = MODEL_FILE.removesuffix(".py")
    classes = {"AutoConfig": "DiffuCoderConfig", "AutoModel": "DiffuCoderModel"}
    auto_map = {auto: f"{module}.{name}" for auto, name in classes.items()}
    return {"auto_map": auto_map}, {MODEL_FILE: model_file()}
  files = {name: epath.Path(source) / name for name in DREAM_FILES}
  here = all(path.exists() for path in files.values())
  prefix = "" if here else f"{DREAM_REPOSITORY}--"
  auto_map = {
    "AutoConfig": f"{prefix}configuration_dream.DreamConfig",
    "AutoModel": f"{prefix}modeling_dream.DreamModel",
  }
  code = {name: path.read_bytes() for name, path in files.items()} if here else {}
  return {"architectures": ["DreamModel"], "auto_map": auto_map}, code


def write_folder(folder, weights, dtype, shard_bytes, hf_config, ids, code, provenance, advance):
  """Writes all of a folder but its tokenizer, which must be there already. config.json comes last.

  A folder without config.json is one that neither `transformers` nor we load.

  Args:
    folder: an existing folder.
    weights: `weights.Weights`.
    dtype: numpy dtype to store.
    shard_bytes: largest safetensors file.
    hf_config, ids: as for `mapping.config_to_hf`.
    code: from `model_code`.
    provenance: JSON values for the manifest: what these weights are made of.
    advance: called with the bytes of each piece.
  Raises:
    ValueError: a tensor has NaN or infinite values, or is not what was saved; names it.
  """
  folder = epath.Path(folder)
  tensors = _write_weights(folder, weights, dtype, shard_bytes, advance)
  keys, files = code
  for name, contents in files.items():
    (folder / name).write_bytes(contents)
  sampling = SAMPLING if weights.config.attention == "full" else {}
  (folder / "generation_config.json").write_text(_json({**sampling, **ids}))
  theirs = mapping.config_to_hf(weights.config, hf_config, ids)
  config = _json({**theirs, **keys, "torch_dtype": str(dtype)})
  small = {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("*"))
    if path.suffix != ".safetensors"
  }
  small["config.json"] = hashlib.sha256(config.encode()).hexdigest()
  (folder / MANIFEST).write_text(_json({**provenance, "tensors": tensors, "files": small}))
  (folder / "config.json").write_text(config)


def _write_weights(folder, weights, dtype, shard_bytes, advance):
  """The safetensors files and, when there are several, their index; returns the manifest's part."""
  entries, total = {}, 0
  for file, tensors in plan(weights.tensors, dtype, shard_bytes).items():
    # transformers 4 refuses files without this, or with any other value of it.
    hashes = shards.write_file(folder / file, tensors, dtype, {"format": "pt"}, advance)
    for name, tensor in tensors.items():
      total += shards.num_bytes(tensor.shape, dtype)
      entries[name] = {"file": file, "shape": list(tensor.shape), "sha256": hashes[name]}
  weights.check()
  where = {name: entry["file"] for name, entry in entries.items()}
  if set(where.values()) != {shards.SINGLE}:
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / shards.INDEX).write_text(_json(index))
  return entries


def _json(value):
  return json.dumps(value, indent=2) + "\n"


def verify(folder, stack, advance):
  """Compares a folder with its manifest, reading every tensor.

  Args: folder: the folder. stack: closes the files. advance: called with the bytes of each piece.
  Returns: number of tensors and files that are as they were written.
  Raises: ValueError: lists what is missing or was changed.
  """
  folder = epath.Path(folder)
  if not (folder / MANIFEST).exists():
    raise FileNotFoundError(f"{folder} has no {MANIFEST}; only folders that convert wrote have one")
  manifest = json.loads((folder / MANIFEST).read_text())
  problems, tensors = [], shards.open_folder(folder, stack)
  for name, wanted in manifest["tensors"].items():
    if name not in tensors:
      problems.append(f"{name} is missing")
      continue
    digest = hashlib.sha256()
    for first, last in tensors[name].row_ranges():
      piece = tensors[name].read(first, last)
      digest.update(piece.tobytes())
      advance(piece.nbytes)
    if digest.hexdigest() != wanted["sha256"]:
      problems.append(f"{name} in {tensors[name].where} was changed")
  for name, wanted in manifest["files"].items():
    path = folder / name
    if not path.exists():
      problems.append(f"{name} is missing")
    elif hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
      problems.append(f"{name} was changed")
  if problems:
    raise ValueError(f"{folder} is not what {MANIFEST} says: {'; '.join(problems)}")
  return len(manifest["tensors"]) + len(manifest["files"])
