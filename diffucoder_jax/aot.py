"""Compiles what a program would run on a TPU slice, without a TPU: does it fit, and how fast can it be.

  python -m diffucoder_jax.aot --config=configs/adapt_7b.py --topology=v5p-64
  python -m diffucoder_jax.aot --config=configs/grpo_7b.py --topology=v6e-64 --program=update \
    --config.mesh.fsdp=32 --config.mesh.tensor=2 --output=update.json
  python -m diffucoder_jax.aot --config=configs/adapt_7b.py --topology=v5p-64 --search
  python -m diffucoder_jax.aot --compare=A.json --compare=B.json

Programs: `train` (the step of `train`), `rollout`, `logps`, `update` (of `train_grpo`), `generate` (of
`generate`, a batch of `--batch` prompts). Nothing is allocated; libtpu compiles for the slice on the
CPU, for about two minutes and in 3 GB. Printed are memory against the chip's, FLOPs, bytes to HBM and
between chips, the best model FLOPs utilisation that these allow, and one line: fits, or does not fit,
because. Exit code: 0 it fits, 1 it does not or cannot be built.
"""

import os
import sys

# Before JAX is imported: the CPU runs this program, and libtpu asks no metadata server who it is.
if "jax" not in sys.modules:
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # any: --topology says which
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_WORKER_ID", "0")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a second one beside this is welcome

import contextlib
import datetime
import importlib.metadata
import json
import math
import tempfile
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from diffucoder_jax import meshes
from diffucoder_jax.model import cost, transformer
from diffucoder_jax.programs import PROGRAMS, network
from diffucoder_jax.runtime import collectives, hlo, roofline, sharding, topology, traffic

# ---------------------------------------------------------------------------------------------
# Compiling one


@contextlib.contextmanager
def compiler_messages(found):
  """Adds to the list `found` the lines that C++ code writes to stderr meanwhile, and passes them on."""
  sys.stderr.flush()
  before = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(before, 2)
      os.close(before)
      file.seek(0)
      text = file.read().decode(errors="replace")
      found += text.splitlines()
      sys.stderr.write(text)


def warnings_of(model_config, mesh, messages):
  """Lines about what will be slow though it compiles."""
  found = []
  width, parts = model_config.embed_dim, mesh.shape["fsdp"]
  if parts > 1 and width // parts % 16:
    good = [n for n in range(1, parts + 1) if width % n == 0 and width // n % 16 == 0]
    found.append(
      f"fsdp={parts} leaves {width // parts} rows of the width {width} on a device, no multiple of 16: "
      f"the compiler sums such gradients whole instead of scattering them; fsdp up to {max(good)} is "
      "fine, and data for the rest"
    )
  involuntary = [line for line in messages if "nvoluntary full rematerialization" in line]
  if involuntary:
    found.append(
      f"{len(involuntary)} involuntary full rematerialisation(s): XLA replicates a tensor to move it to "
      f"another sharding; the first: {involuntary[0].split('] ', 1)[-1][:300]}"
    )
  return found


def _state_bytes(args):
  """Bytes of the abstract arguments on one device."""
  total = 0
  for leaf in jax.tree.leaves(args):
    if isinstance(leaf, jax.ShapeDtypeStruct):
      shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
      size = 4 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
      total += math.prod(shape) * size
  return total


def analyse(config, target, program, options, hlo_path=""):
  """Compiles one program for a slice, and says what there is to say about it.

  Args:
    config: as the files in `configs/` make it. target: `topology.Topology`. program: key of
      `PROGRAMS`. options: `model`, `batch`, `prompt_tokens`, and `compiler`, dict of XLA's options.
    hlo_path: file for the compiled text.
  Returns:
    dict for JSON; "fits", "verdict", and the rest as far as compilation came.
  Raises:
    ValueError: the program cannot be built on this mesh; names the dimension.
  """
  mesh = sharding.make_mesh(config.mesh, topology.devices(target))
  chip, messages = target.spec, []
  usable = chip.usable_hbm / chip.devices
  with jax.set_mesh(mesh):
    prepared = PROGRAMS[program](config, mesh, options)
    began = time.monotonic()
    lowered = prepared.fn.lower(*prepared.args)
    lowering = time.monotonic() - began
    model_config = network(config, options.model)
    shards = sharding.batch_shards(mesh)
    result = {
      "program": program, "topology": target.name, "chip": target.chip,
      "shape": list(target.shape), "slices": target.slices, "devices": mesh.size,
      "mesh": dict(mesh.shape), "rows": prepared.rows, "length": prepared.length,
      "accumulate": prepared.micro_batches,
      "rows_per_device": prepared.rows / shards / prepared.micro_batches,
      "remat": model_config.remat, "attention": model_config.attention_impl,
      "params": model_config.param_dtype, "compute": model_config.compute_dtype,
      "xla": options.compiler,
      "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
      "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    began, reason = time.monotonic(), None
    try:
      with compiler_messages(messages):
        compiled = lowered.compile(options.compiler)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
        raise
      reason = " ".join(str(error).split())[:400]
  result["seconds"] = {"lower": lowering, "compile": time.monotonic() - began}
  result["warnings"] = warnings_of(model_config, mesh, messages)
  if reason is not None:
    result["fits"], result["verdict"] = roofline.verdict(usable, 0, reason)
    return result

  memory = compiled.memory_analysis()
  peak = memory.peak_memory_in_bytes
  result["memory"] = {
    "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
    "aliased": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
    "code": memory.generated_code_size_in_bytes, "peak": peak, "usable": usable,
    "spare": 1 - peak / usable,
  }  # fmt: skip
  result["fits"], result["verdict"] = roofline.verdict(usable, peak)

  text = compiled.as_text()
  if hlo_path:
    epath.Path(hlo_path).write_text(text)
  module = hlo.parse(text)
  runs = hlo.count_runs(module, prepared.hints)
  found = collectives.find(module, runs, mesh.size // target.slices)
  places = topology.places(mesh.devices.flat, target)
  by_kind, each = collectives.totals(found, places, target.torus, target.slices)
  total = collectives.Totals(*map(sum, zip(*by_kind.values(), strict=True))) if by_kind else (
    collectives.Totals()
  )  # fmt: skip
  work = prepared.work
  moved = traffic.hbm_bytes(module, runs)
  least = cost.least_hbm_bytes(
    model_config, work, shards, mesh.shape["tensor"], _state_bytes(prepared.args),
    prepared.micro_batches, prepared.trains,
  )  # fmt: skip
  roof = roofline.roofline(
    chip, mesh.size, work.useful, work.executed, moved, total.ici_seconds, total.dcn_bytes
  )
  return {
    **result,
    "flops": {"useful": work.useful, "executed": work.executed, "counting": work.what,
              "xla_per_device_loops_once": compiled.cost_analysis().get("flops")},
    "hbm_bytes": {"compiled": moved, "least": least},
    "collectives": {kind: totals._asdict() for kind, totals in by_kind.items()},
    "largest_collectives": [
      {"kind": one.kind, "bytes": one.bytes, "group": one.group_size, "times": one.times,
       "where": one.where, **whole._asdict()}
      for one, whole in each[:10]
    ],
    "assumed": list(runs.assumed),
    "roofline": {**roof._asdict(), "limit": roof.limit, "mfu": roof.mfu,
                 "serial_mfu": roof.serial_mfu},
  }  # fmt: skip


def attempt(config, target, program, options, hlo_path=""):
  """`analyse`, but a mesh that does not divide the program becomes a verdict too."""
  try:
    return analyse(config, target, program, options, hlo_path)
  except ValueError as error:
    reason = f"this mesh cannot hold it: {error}"
    return {
      "program": program, "topology": target.name, "chip": target.chip,
      "mesh": {axis: int(config.mesh[axis]) for axis in sharding.AXES}, "fits": False,
      "verdict": f"does not fit, because {reason}",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The program


def search(config, target, program, options, limit, output=""):
  """Compiles a program in several ways and prints them, the best bound first. Whether one fits."""
  devices = topology.devices(target)
  chip, usable = target.spec, target.spec.usable_hbm / target.spec.devices
  model_config = network(config, options.model)

  def changed(one):
    c = config.copy_and_resolve_references().unlock()
    c.update_from_flattened_dict(one.changes)
    return c.lock()

  # What the program does is the same on every mesh: it is asked on one device, for each policy.
  alone = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), devices[:1])
  prepared = {}
  with jax.set_mesh(alone):
    for remat in transformer.REMAT:
      one = meshes.Candidate(dict.fromkeys(sharding.AXES, 1), 1, remat)
      prepared[remat] = PROGRAMS[program](changed(one), alone, options)
  first = prepared[model_config.remat]
  found = meshes.candidates(
    model_config,
    len(devices),
    target.slices,
    first.rows,
    first.trains,
    list(prepared),
    program == "train" and config.data.fill_batch,
  )
  if not found:
    print(
      f"no mesh of {len(devices)} devices divides {first.rows} rows and {model_config.num_kv_heads} kv "
      "heads; choose another number of rows"
    )
    return False
  rows = []

  def try_one(one):
    result = attempt(changed(one), target, program, options)
    rows.append({"changes": one.changes, **result})
    if output:  # after each, for a search takes long
      epath.Path(output).write_text(json.dumps(rows, indent=1) + "\n")
    return result

  done, left_out = meshes.search(
    try_one,
    found,
    lambda one: meshes.on_paper(
      one, model_config, prepared[one.remat].work, first.length, first.rows, first.trains, chip,
      len(devices),
    ),
    usable, first.work.useful / len(devices) / (chip.flops / chip.devices), limit,
    lambda line: print(line, flush=True),
  )  # fmt: skip
  print("\n".join(["", *meshes.table(done), "", *left_out]))
  return any(result["fits"] for _, result in done)


def main(config, target, program, options, output="", hlo_path="", against=""):
  """Compiles one program, prints what `roofline.describe` says, and writes it as JSON.

  Args:
    config, target, program, options: as `analyse` takes them.
    output: file for the JSON. hlo_path: file for the compiled text. against: JSON to compare with.
  Returns:
    whether it fits.
  """
  result = {"arguments": sys.argv[1:], **attempt(config, target, program, options, hlo_path)}
  print("\n".join(roofline.describe(result)), flush=True)
  if output:
    epath.Path(output).write_text(json.dumps(result, indent=1) + "\n")
  if against:
    print("\n".join(["", *roofline.compare(json.loads(epath.Path(against).read_text()), result)]))
  return result["fits"]


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "what to compile", lock_config=True)
  _TOPOLOGY = flags.DEFINE_string("topology", None, "v5p-64, v5e-256, 2xv5e-256, ...")
  _PROGRAM = flags.DEFINE_enum("program", "train", list(PROGRAMS), "which of its programs")
  _MODEL = flags.DEFINE_string("model", "diffucoder_7b", "preset that an RL config starts from")
  _BATCH = flags.DEFINE_integer("batch", 8, "generate: prompts together")
  _PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "generate: of the longest prompt")
  _OUTPUT = flags.DEFINE_string("output", "", "JSON file for the result")
  _HLO = flags.DEFINE_string("hlo", "", "file for the compiled program's text")
  _XLA = flags.DEFINE_multi_string("xla", [], "option of the compiler, name=value; may be repeated")
  _COMPARE = flags.DEFINE_multi_string(
    "compare", [], "JSON to compare with; twice: compare these two"
  )
  _SEARCH = flags.DEFINE_bool("search", False, "try meshes, micro-batches and remat policies")
  _LIMIT = flags.DEFINE_integer("search_limit", 8, "how many that fit to compile")

  def _main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
    if len(_COMPARE.value) == 2:
      first, second = (json.loads(epath.Path(path).read_text()) for path in _COMPARE.value)
      print("\n".join(roofline.compare(first, second)))
      return
    if not (_CONFIG.value and _TOPOLOGY.value):
      raise app.UsageError("give --config and --topology, or --compare twice")
    target = topology.parse(_TOPOLOGY.value)
    options = SimpleNamespace(
      model=_MODEL.value, batch=_BATCH.value, prompt_tokens=_PROMPT.value,
      compiler=dict(one.split("=", 1) for one in _XLA.value),
    )  # fmt: skip
    if _SEARCH.value:
      fits = search(_CONFIG.value, target, _PROGRAM.value, options, _LIMIT.value, _OUTPUT.value)
      sys.exit(0 if fits else 1)
    against = _COMPARE.value[0] if _COMPARE.value else ""
    fits = main(_CONFIG.value, target, _PROGRAM.value, options, _OUTPUT.value, _HLO.value, against)
    sys.exit(0 if fits else 1)

  app.run(_main)
