"""The house's arrows point down: who may import whom, read from the source."""

import ast
import pathlib
import subprocess
import sys

import diffucoder_jax

ROOT = pathlib.Path(diffucoder_jax.__file__).parent
PACKAGES = {"runtime", "execution", "model", "data", "diffusion", "grpo", "evals", "hf"}
PROGRAMS = {
  "train", "train_grpo", "generate", "evaluate", "analyze", "prepare", "convert", "aot", "bench",
}  # fmt: skip
# The parts of the program `bench`, which times other programs' functions; nobody else looks in.
PARTS = "benchmarking"
LOWER = {"diffusion", "data", "model", "execution", "runtime"}
MAY_IMPORT = {
  "runtime": set(),
  "execution": set(),
  "model": {"runtime"},
  "data": {"runtime"},
  "diffusion": {"runtime"},
  "grpo": LOWER,
  "evals": LOWER,
  "hf": LOWER,
}


def modules():
  return [(path, path.relative_to(ROOT).parts) for path in sorted(ROOT.rglob("*.py"))]


def imports_of_ours(path):
  """Names under diffucoder_jax that a file imports, wherever the statement stands."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      parts = name.split(".")
      if parts[0] == "diffucoder_jax" and len(parts) > 1:
        yield parts[1]


def test_arrows_point_down():
  wrong = []
  for path, parts in modules():
    package = parts[0] if len(parts) > 1 and parts[0] != PARTS else None
    for target in imports_of_ours(path):
      allowed = True
      if package is not None:
        allowed = target == package or target in MAY_IMPORT[package]
      # `programs` has the functions that programs run, for `aot` to compile; nobody else looks in.
      compiled = (parts, target) == (("aot.py",), "programs") or parts == ("programs.py",)
      if target in {*PROGRAMS, "programs"} and not compiled and parts[0] != PARTS:
        allowed = target == "evaluate" and package is None
      if target == PARTS:
        allowed = parts[0] in (PARTS, "bench.py")
      if not allowed:
        wrong.append(f"{'/'.join(parts)} imports {target}")
  assert not wrong, "\n".join(wrong)


def test_every_package_is_known():
  found = {parts[0] for _, parts in modules() if len(parts) > 1}
  unknown = found - PACKAGES - {PARTS}
  assert not unknown, f"packages that the layout does not name: {unknown}"


def test_configs_hold_values_only():
  configs = ROOT.parent / "configs"
  for path in configs.glob("*.py"):
    text = path.read_text()
    assert "import jax" not in text and "lambda" not in text, path
  code = "import sys, configs.quickstart_adapt as q; q.get_config(); sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=configs.parent).returncode == 0


def test_importing_the_package_is_light():
  code = "import sys, diffucoder_jax; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0


def test_torch_is_never_imported():
  """But by the two that make the file of an export; they are data of ours: nobody else imports them.

  The benchmarks, which run that file, import torch inside functions: they do without it as well.
  """
  travel = [ROOT / "hf" / f"{name}_diffucoder.py" for name in ("modeling", "denoising")]
  for path, parts in modules():
    imported = set()
    tree = ast.parse(path.read_text())
    if parts[0] == PARTS:
      functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
      inside = {node for function in functions for node in ast.walk(function)}
      nodes = [node for node in ast.walk(tree) if node not in inside]
    else:
      nodes = ast.walk(tree)
    for node in nodes:
      if isinstance(node, ast.Import):
        imported |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    roots = {name.split(".")[0] for name in imported}
    if path in travel:
      # `export.model_file` puts the one in the place where the other imports it.
      joined = "diffucoder_jax.hf.denoising_diffucoder."
      roots = {name.split(".")[0] for name in imported if not name.startswith(joined)}
      assert roots <= {"torch", "transformers"} | sys.stdlib_module_names, roots
    else:
      assert not roots & {"torch", "transformers"}, parts
      assert not any(one.stem in name for one in travel for name in imported), parts
  assert all(path.exists() for path in travel)


def test_the_public_names_resolve():
  for name in diffucoder_jax.__all__:
    assert callable(getattr(diffucoder_jax, name)), name


def test_no_module_is_named_for_nothing():
  for _, parts in modules():
    assert parts[-1] not in ("utils.py", "util.py", "helpers.py", "misc.py", "common.py"), parts
