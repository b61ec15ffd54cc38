"""The network that is timed: real weights, or random ones in a folder that both sides load."""

import contextlib
import dataclasses

import jax
import numpy as np
from absl import logging

from diffucoder_jax import convert, pretrained
from diffucoder_jax.benchmarking import twins
from diffucoder_jax.hf import export, mapping, shards, weights
from diffucoder_jax.model import layout
from diffucoder_jax.model.config import PRESETS, ModelConfig, preset

# What a laptop's CPU trains: the quickstart's order of size.
SMALL = dict(
  vocab_size=8192,
  embed_dim=512,
  num_layers=8,
  num_heads=8,
  num_kv_heads=2,
  head_dim=64,
  mlp_dim=1408,
)
NAMES = ("31m", *PRESETS)


def add_arguments(parser, random=True):
  """--ckpt and --seed; and --preset, unless random weights say nothing."""
  if random:
    parser.add_argument(
      "--preset", choices=NAMES, default="31m",
      help="random weights of this size, float32 (31m: 8 layers of 512, 8 heads of which 2 kv, mlp "
      "1408, vocabulary 8192)",
    )  # fmt: skip
  parser.add_argument(
    "--ckpt", metavar="FOLDER", required=not random, help="these weights, as float32"
  )
  parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts")


def config_of(name):
  """`ModelConfig` of a name in `NAMES`: full attention, everything in float32, no remat."""
  fields = SMALL if name == "31m" else preset(name)
  same = dict(attention="full", dtype="float32", param_dtype="float32", remat="none")
  return ModelConfig(**{**fields, **same, "frozen_input_id": -1})


def random_tensors(config, dtype, seed):
  """Weights that make every choice of a sampler clear: {Hugging Face name: `shards.Tensor`}.

  The initial weights of training would make all logits, and so all confidences, nearly equal, and the
  order of decoding a matter of rounding. Each tensor is made when it is read.
  """

  def one(index, name, shape):
    def read(first, last):
      # All of it, whatever rows are asked for, so that these do not depend on the pieces.
      rng = np.random.default_rng((seed, index))
      if "norm" in name:
        whole = np.ones(shape, np.float32)
      else:
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        whole = rng.standard_normal(shape, np.float32) * np.float32(scale)
      return whole[first:last].astype(dtype)

    return shards.Tensor(shape, np.dtype(dtype), read, "random weights")

  shapes = mapping.hf_shapes(config)
  return {name: one(i, name, shape) for i, (name, shape) in enumerate(shapes.items())}


def write_random(folder, config, dtype="float32", seed=0, remote_code="own", code_from=""):
  """Writes a Hugging Face folder of random weights; the mask is the last id of the vocabulary.

  Args:
    folder: an empty folder. config: `ModelConfig`. dtype: of the file. seed: int.
    remote_code, code_from: as `export.model_code` takes them.
  """
  code = export.model_code(config, remote_code, code_from)
  opened = weights.Weights(config, random_tensors(config, dtype, seed), lambda: None)
  ids = {"mask_token_id": config.vocab_size - 1, "pad_token_id": None, "eos_token_id": None}
  export.write_folder(
    folder, opened, np.dtype(dtype), export.parse_size("5GB"), {}, ids, code, {}, lambda _: None
  )


def write(folder, args):
  """The weights that `args` asks for, as a folder for both sides to load.

  Args: folder: an empty `pathlib.Path`. args: with `add_arguments`.
  Returns: (path: `folder`, or that of `--ckpt` itself where PyTorch is absent; what it holds, in words).
  Raises: FileNotFoundError, ValueError: of `--ckpt`.
  """
  if not args.ckpt:
    config = config_of(args.preset)
    write_random(folder, config, seed=args.seed)
    return folder, f"{size_of(config)} random parameters"
  config = pretrained.describe(args.ckpt).config
  if config.attention != "full":
    raise ValueError(f"{args.ckpt} is autoregressive; these benchmarks are of diffusion networks")
  words = f"{args.ckpt}, {size_of(config)} parameters"
  if twins.absent():
    return args.ckpt, words
  convert.convert(args.ckpt, folder, to="hf", dtype="float32")
  return folder, words


def open_ours(folder):
  """`Pretrained` of a folder, float32 all through."""
  with quietly():  # there is no tokenizer, and nothing here asks for one
    ckpt = pretrained.from_pretrained(folder, param_dtype="float32")
  if ckpt.mask_id < 0:
    raise ValueError(f"{folder} names no mask token (mask_token_id in config.json)")
  config = dataclasses.replace(ckpt.config, dtype="float32", remat="none")
  return dataclasses.replace(ckpt, config=config)


def laid_out(ckpt):
  """`Pretrained` with its parameters as a CPU reads them best (`model/layout.py`); elsewhere as it is."""
  if jax.default_backend() != "cpu" or ckpt.config.lora_rank:
    return ckpt
  return dataclasses.replace(ckpt, params=jax.jit(layout.unrolled)(ckpt.params))


@contextlib.contextmanager
def quietly():
  """Without warnings of ours."""
  logger = logging.get_absl_logger()
  before = logger.level  # setting absl's verbosity back would leave another one than there was
  logger.setLevel("ERROR")
  try:
    yield
  finally:
    logger.setLevel(before)


def size_of(config):
  """Number of parameters, in words."""
  count = sum(int(np.prod(shape)) for shape in mapping.hf_shapes(config).values())
  return f"{count / 1e6:.3g} M"
