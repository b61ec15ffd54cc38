"""Converting weights: Hugging Face folder to Orbax checkpoint and back, random ones on a local disk."""

import json
import multiprocessing
import pathlib
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp

from diffucoder_jax import convert
from diffucoder_jax.benchmarking import networks, table, timing
from diffucoder_jax.hf import export, mapping, shards
from diffucoder_jax.model.config import ModelConfig

IN, OUT, COPY = "Hugging Face to Orbax", "Orbax to Hugging Face", "plain copy of the files"


def add_arguments(parser):
  """Flags of `bench convert`."""
  flag = parser.add_argument
  flag(
    "--megabytes", type=timing.at_least(1), default=500, help="about so many, in layers of 1,024"
  )
  flag("--dtype", choices=convert.DTYPES, default="bfloat16", help="as stored")
  flag(
    "--folder",
    help="where to work, with room for four copies; None: the folder for temporary files",
  )
  flag("--seed", type=int, default=0, help="of the weights")


def network(megabytes, dtype):
  """`ModelConfig` of about a size, 1,024 wide."""
  sizes = dict(vocab_size=4096, embed_dim=1024, num_heads=16, num_kv_heads=4, head_dim=64)

  def config(layers):
    return ModelConfig(**sizes, num_layers=layers, mlp_dim=2816, param_dtype=dtype)

  one, two = (num_bytes(config(layers)) for layers in (1, 2))
  return config(max(1, 1 + round((megabytes * 1e6 - one) / (two - one))))


def num_bytes(config):
  """Of a network's weights as they are stored."""
  dtype = jnp.dtype(config.param_dtype)
  return sum(shards.num_bytes(shape, dtype) for shape in mapping.hf_shapes(config).values())


def run(args):
  """Converts there and back `--repeats` times; returns a `table.Table`."""
  config = network(args.megabytes, args.dtype)
  rows = {what: {"what": what, "seconds": [], "peak_mb": []} for what in (IN, OUT, COPY)}
  with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
    root = pathlib.Path(temporary)
    source, orbax, back, copy = (root / name for name in ("source", "orbax", "back", "copy"))
    source.mkdir()
    networks.write_random(source, config, args.dtype, args.seed)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    same = []
    for _ in range(args.repeats):
      for what, a, b in ((IN, source, orbax), (OUT, orbax, back)):
        seconds, before, peak = apart(a, b)
        rows[what]["seconds"].append(seconds)
        rows[what]["peak_mb"].append(peak)
        rows[what].setdefault("before_mb", []).append(before)
      same.append(hashes(source) == hashes(back))
      start = time.perf_counter()
      shutil.copytree(source, copy)
      rows[COPY]["seconds"].append(time.perf_counter() - start)
      for folder in (orbax, back, copy):
        shutil.rmtree(folder)
  del rows[COPY]["peak_mb"]
  rows[OUT]["same_bytes"] = all(same)
  for row in rows.values():
    row["gb_per_second"] = timing.rates(total / 1e9, row["seconds"])
  notes = [
    table.repeated(args.repeats),
    "Each conversion runs in a process of its own, whose start is not counted; files may be in the "
    "system's page cache.",
    "`peak mb`: resident memory at most; `before mb`: before it began. `same bytes`: the hashes of all "
    "tensors that were written are those of the source.",
  ]
  title = (
    f"convert: {networks.size_of(config)} random parameters in {args.dtype}, {total / 1e9:.2f} GB"
  )
  return table.Table(title, list(rows.values()), notes)


def hashes(folder):
  """{tensor: SHA-256} of an exported folder's manifest, which is made of what was written."""
  manifest = json.loads((folder / export.MANIFEST).read_text())
  return {name: entry["sha256"] for name, entry in manifest["tensors"].items()}


def apart(source, target):
  """Converts in a fresh process; returns (seconds, MB resident before, MB at most)."""
  spawn = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(_convert, source, target).result()


def _convert(source, target):
  jax.config.update("jax_platforms", "cpu")  # as `convert` does
  before, start = _megabytes("VmRSS"), time.perf_counter()
  with networks.quietly():  # random weights have no tokenizer
    convert.convert(source, target)
  return time.perf_counter() - start, before, _megabytes("VmHWM")


def _megabytes(field):
  """Of resident memory. Not getrusage: a process inherits there what its parent's peak was."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) * 1024 / 1e6
  raise OSError(f"/proc/self/status does not tell {field}; this benchmark needs Linux")
