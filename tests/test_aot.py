"""Ahead-of-time compilation for TPU slices: the search on paper, and the command itself."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import types

import jax
import pytest

from diffucoder_jax import meshes, programs
from diffucoder_jax.model import cost, transformer
from diffucoder_jax.model.config import ModelConfig, preset
from diffucoder_jax.runtime import sharding, topology
from launch import aot_table
from tests import tiny

SEVEN = ModelConfig(**preset("diffucoder_7b"))
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
  not HAS_LIBTPU, reason="libtpu is not installed (pip install -e '.[tpu]')"
)


def aot(*arguments):
  """Runs the command as a user would, without what this process has set for JAX."""
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "XLA_"))}
  return subprocess.run(
    [sys.executable, "-m", "diffucoder_jax.aot", *map(str, arguments)],
    cwd=tiny.ROOT, env=env, capture_output=True, text=True,
  )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The search, without compiling


def test_candidates_divide_everything():
  """32 chips, 160 rows: `tensor` up to the 4 kv heads, data x fsdp a divisor of 160."""
  found = meshes.candidates(SEVEN, 32, 1, 160, True, ["full", "dots"])
  shapes = {tuple(one.mesh.values()) for one in found}
  assert (1, 32, 1) in shapes and (2, 8, 2) in shapes and (8, 1, 4) in shapes
  for data, fsdp, tensor in shapes:
    assert data * fsdp * tensor == 32 and 160 % (data * fsdp) == 0 and tensor <= 4
  mine = [
    (one.accumulate, one.remat) for one in found if one.mesh == dict(data=1, fsdp=32, tensor=1)
  ]
  assert sorted(mine) == [(1, "dots"), (1, "full"), (5, "dots"), (5, "full")]
  assert mine and found[0].changes.keys() == {
    "mesh.data", "mesh.fsdp", "mesh.tensor", "optim.accumulate", "model.remat"
  }  # fmt: skip


def test_256_chips_need_filled_batches():
  """160 = 32 x 5 rows; 256 chips make at least 64 parts of a batch with 4 kv heads."""
  assert meshes.candidates(SEVEN, 256, 1, 160, True, ["full"]) == []
  found = meshes.candidates(SEVEN, 256, 1, 160, True, ["full"], fill=True)
  assert {one.mesh["tensor"] for one in found} == {1, 2, 4}
  # Two slices share `data`; without training there is nothing to choose but the mesh.
  found = meshes.candidates(SEVEN, 64, 2, 128, False, ["full", "dots"])
  assert all(one.mesh["data"] % 2 == 0 and one.accumulate == 1 for one in found)
  assert len(found) == len({str(one) for one in found})


def test_paper_is_below_what_was_compiled():
  """v5p-64, 1 x 32 x 1: the compiler's peak was 13.8 GiB, its bound 3.7 s."""
  found = meshes.candidates(SEVEN, 32, 1, 160, True, list(transformer.REMAT))
  chip = topology.CHIPS["v5p"]
  paper = {}
  for one in found:
    config = ModelConfig(**{**preset("diffucoder_7b"), "remat": one.remat})
    work = cost.training(config, 160 * 4096, 4096, 0.5)
    paper[str(one)] = meshes.on_paper(one, config, work, 4096, 160, True, chip, 32)
  full = paper["1x32x1 accumulate 1 remat full"]
  assert 5 * 2**30 < full.bytes < 13.8 * 2**30 and 2 < full.seconds < 3.7
  assert paper["1x32x1 accumulate 1 remat dots"].bytes > 2 * full.bytes
  assert paper["1x32x1 accumulate 1 remat dots"].seconds < full.seconds
  assert paper["1x32x1 accumulate 5 remat full"].bytes < full.bytes
  assert (
    paper["8x1x4 accumulate 1 remat full"].bytes > full.bytes
  )  # the state is not sharded as far


def test_search_prunes_and_says_so():
  """Of seven, f is too large on paper, a does not fit and b needs as much; d and e cannot beat c."""
  names = "abcdefg"
  needs = dict(zip(names, (1.5, 1.5, 1.0, 1.0, 1.0, 3.0, 1.5), strict=True))
  seconds = dict(zip(names, (1.0, 1.1, 1.25, 2.5, 5.0, 1.0, 1.3), strict=True))
  remats = dict.fromkeys(names, "full") | {"g": "dots"}
  found = [
    meshes.Candidate(dict(data=i, fsdp=1, tensor=1), 1, remats[name])
    for i, name in enumerate(names)
  ]  # fmt: skip
  name_of = lambda one: names[one.mesh["data"]]  # noqa: E731
  compiled, said = [], []

  def try_one(one):
    compiled.append(name_of(one))
    if name_of(one) == "a":  # the fastest on paper
      return {"fits": False, "verdict": "does not fit, because a | b"}
    roof = {"mfu": 0.5, "serial_mfu": 0.25, "limit": "hbm"}
    memory = {"peak": 2.0**30, "spare": 0.5}
    return {
      "fits": True,
      "verdict": "fits",
      "rows_per_device": 1,
      "memory": memory,
      "roofline": roof,
    }

  paper = lambda one: meshes.Paper(needs[name_of(one)], seconds[name_of(one)])  # noqa: E731
  done, left_out = meshes.search(try_one, found, paper, 2.0, 1.0, 9, said.append)
  assert compiled == ["a", "c", "g"] and len(said) == 3
  assert [name_of(one) for one, _ in done] == ["c", "g", "a"], "the best first"
  assert [line.split(" ")[0] for line in left_out] == ["1", "1", "2"]
  assert "more than" in left_out[0] and "no less" in left_out[1] and "cannot reach" in left_out[2]
  assert meshes.table(done)[2].split(" | ")[5:8] == ["50%", "50.0%", "25.0%"]
  assert "a / b" in meshes.table(done)[4]
  compiled.clear()
  _, left_out = meshes.search(try_one, found, paper, 2.0, 1.0, 1, said.append)
  assert compiled == ["a", "c"] and "up to 3 were not compiled: the limit is 1" in left_out[1]


# ---------------------------------------------------------------------------------------------
# The programs' functions, on devices that are here


def options(**changes):
  return types.SimpleNamespace(**{"model": "tiny", "batch": 3, "prompt_tokens": 32, **changes})


@pytest.mark.parametrize(
  "program",
  [
    pytest.param(name, marks=() if name in ("train", "logps") else pytest.mark.slow)
    for name in programs.PROGRAMS
  ],
)
def test_programs_lower_from_abstract_arguments(program):
  """What `aot` compiles is what the programs would call, with the shapes that they would pass."""
  name = "tiny" if program == "train" else "quickstart_grpo"
  config = importlib.import_module(f"configs.{name}").get_config()
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    prepared = programs.PROGRAMS[program](config, mesh, options())
    lowered = prepared.fn.lower(*prepared.args)
  assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(prepared.args))
  out, rows, length = lowered.out_info, prepared.rows, prepared.length
  assert rows % 4 == 0 and prepared.work.executed > 0 and prepared.work.useful > 0
  if program in ("train", "update"):
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(out[0]) == shapes(prepared.args[0]), "the state comes back in place"
  elif program == "logps":
    assert out.shape == (rows, length)
  else:
    assert out.tokens.shape == (rows, length)


def test_filled_batches_are_not_useful_work():
  config = importlib.import_module("configs.tiny").get_config()
  config.data.global_batch = 5
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
  with jax.set_mesh(mesh):
    plain = programs.prepare_train(config, mesh, options())
    config.data.fill_batch = True
    filled = programs.prepare_train(config, mesh, options())
  assert (plain.rows, filled.rows) == (5, 8)
  assert filled.work.useful == pytest.approx(plain.work.useful)
  assert filled.work.executed == pytest.approx(plain.work.executed * 8 / 5)


def test_networks_and_loops():
  """RL configs change a preset; what is compiled for a TPU computes in bfloat16 whatever runs here."""
  adapt = importlib.import_module("configs.adapt_7b").get_config()
  assert programs.network(adapt, "tiny").embed_dim == 3584
  assert programs.network(adapt, "").compute_dtype == "bfloat16"
  grpo = importlib.import_module("configs.grpo_7b").get_config()
  grpo.model.remat = "dots"
  found = programs.network(grpo, "tiny")
  assert (found.embed_dim, found.remat, found.attention) == (64, "dots", "full")
  assert programs.network(grpo, "qwen2_5_coder_7b").attention == "full"  # as diffusion weights are
  by_blocks, logits = programs._hints(2048, 3000, 1024)
  assert (by_blocks.trips, logits.trips) == (2.5, 3)


def test_compilers_complaints_are_seen(capfd):
  """C++ writes past Python's sys.stderr; lines are kept for the warnings and still shown."""
  from diffucoder_jax import aot as program

  found = []
  with program.compiler_messages(found):
    os.write(
      2, b"W0 spmd.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot ...\n"
    )
  os.write(2, b"afterwards\n")
  assert len(found) == 1 and capfd.readouterr().err.count("\n") == 2
  mesh = sharding.make_mesh(dict(data=1, fsdp=8, tensor=1))
  lines = program.warnings_of(SEVEN, mesh, found)
  assert len(lines) == 1 and lines[0].startswith("1 involuntary full rematerialisation(s)")
  assert program.warnings_of(SEVEN, mesh, []) == [], "3584 / 8 is a multiple of 16"


def test_the_table_knows_its_cells(tmp_path, capsys):
  """25 cells, of which some can be chosen; only what is missing or was made otherwise is run again."""
  assert len(list(aot_table.cells([], []))) == 25
  assert aot_table.main([f"--output={tmp_path}", "--only=sft", "--only=v5e-256", "--print"]) == 0
  words = shlex.split(capsys.readouterr().out)
  assert words[:3] == ["python", "-m", "diffucoder_jax.aot"] and "--config.mesh.fsdp=32" in words
  ((name, _, _, arguments),) = aot_table.cells(["sft", "v5e-256"], ["--xla=a=1"])
  assert arguments[-1] == "--xla=a=1"
  path = tmp_path / f"{name}.json"
  assert not aot_table.is_done(path, arguments)
  path.write_text(json.dumps({"arguments": [*arguments, f"--output={path}"]}))
  assert aot_table.is_done(path, arguments) and not aot_table.is_done(path, arguments[:-1])


def test_the_tables_meshes_divide_their_batches():
  """And leave fsdp shards whose gradients scatter: 3584 / fsdp a multiple of 16."""
  for name, _, tpu, arguments in aot_table.cells([], []):
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in arguments)
    config = flags.pop("config").removesuffix(".py").replace("/", ".")
    c = importlib.import_module(config).get_config()
    changes = {key.removeprefix("config."): value for key, value in flags.items()}
    data, fsdp, tensor = (int(changes[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor"))
    assert data * fsdp * tensor == topology.parse(tpu).num_devices, name
    assert 3584 // fsdp % 16 == 0 and 4 % tensor == 0, name
    if "grpo" in c:
      rows = int(changes.get("grpo.prompts", c.grpo.prompts)) * c.grpo.num_generations
    else:
      rows = c.data.global_batch
    assert "data.fill_batch" in changes or rows % (data * fsdp) == 0, name


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_it_names_the_remedy():
  done = aot("--config=configs/tiny.py", "--topology=v5e-16")
  assert done.returncode != 0 and "pip install -e '.[tpu]'" in done.stderr


@pytest.mark.slow
@needs_libtpu
def test_the_command_compiles_and_compares(tmp_path):
  """A small step for 16 chips and for two slices of them, end to end."""
  small = ("--config=configs/tiny.py", "--config.data.global_batch=64", "--config.model.remat=full")
  one, two = tmp_path / "one.json", tmp_path / "two.json"
  done = aot(*small, "--topology=v5e-16", f"--output={one}", f"--hlo={tmp_path / 'hlo.txt'}")
  assert done.returncode == 0, done.stderr[-2000:]
  assert "fits: " in done.stdout and "MFU at most" in done.stdout
  result = json.loads(one.read_text())
  assert result["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1} and result["fits"]
  assert "fsdp=16 leaves 4 rows of the width 64" in result["warnings"][0]
  assert len(result["warnings"]) == 1, "nothing is rematerialised unasked"
  assert result["compute"] == "bfloat16", "the CPU that compiles has no say"
  assert 0 < result["memory"]["peak"] < result["memory"]["usable"] == 15.75 * 2**30
  # Donated: the state is updated in place.
  assert result["memory"]["aliased"] > 0.99 * result["memory"]["outputs"]
  kinds = result["collectives"]
  # Two layers: their matrices are gathered for the forward and the backward pass.
  assert kinds["all-gather"]["count"] >= 2 * 2 and kinds["all-gather"]["ici_bytes"] > 0
  assert all(kind["dcn_bytes"] == 0 for kind in kinds.values())
  assert result["roofline"]["limit"] in ("compute", "hbm", "ici")
  assert "HloModule" in (tmp_path / "hlo.txt").read_text()

  done = aot(
    *small, "--topology=2xv5e-16", "--config.mesh.data=2", "--config.mesh.fsdp=16",
    f"--output={two}", f"--compare={one}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  kinds = json.loads(two.read_text())["collectives"]
  # Each device's sixteenth of the gradients, at least, goes to the other slice once.
  weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 2 * 512 * 64
  assert kinds["all-reduce"]["dcn_bytes"] >= 2 * weights / 16
  line = next(line for line in done.stdout.splitlines() if line.startswith("devices"))
  assert line.split()[1:] == ["16", "32", "2.000"]
  both = aot(f"--compare={one}", f"--compare={two}")
  assert both.returncode == 0 and "collectives.all-reduce.dcn_bytes" in both.stdout


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("program", ["logps", "update", "rollout", "generate"])
def test_the_other_programs_compile(program, tmp_path):
  done = aot(
    "--config=configs/quickstart_grpo.py", "--topology=v5e-16", f"--program={program}",
    "--model=tiny", "--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
    "--config.optim.accumulate=1", f"--output={tmp_path / 'r.json'}", "--batch=3",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
  result = json.loads((tmp_path / "r.json").read_text())
  assert result["program"] == program and result["rows"] % 8 == 0
  assert result["flops"]["executed"] >= result["flops"]["useful"] > 0


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_a_verdict(tmp_path):
  """The 7B's state on 16 small chips leaves no room for ten rows; three rows no mesh divides."""
  for rows, reason in (
    (160, "RESOURCE_EXHAUSTED: Ran out of memory on HBM"),
    (3, "has a dimension of 3"),
  ):
    done = aot(
      "--config=configs/adapt_7b.py", "--topology=v5e-16", f"--config.data.global_batch={rows}",
      f"--output={tmp_path / 'r.json'}",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert not result["fits"] and reason in result["verdict"]
    assert result["verdict"].startswith("does not fit, because ")
