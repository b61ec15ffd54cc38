"""Eight fake CPU devices, strict shapes, and the golden data when it lies beside the project."""

import gc
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("NPROC", "32")  # threads for eight fake devices; see hosts.enough_threads

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where transformers puts copies of models' code: one place for all tests, not the user's. It cannot be
# changed within a process, whose modules stay those of the first place.
HF_MODULES = tempfile.TemporaryDirectory(prefix="hf_modules_")
os.environ["HF_MODULES_CACHE"] = HF_MODULES.name
flags.FLAGS.mark_as_parsed()  # Grain's worker processes insist on parsed flags

SHARED = pathlib.Path(
  os.environ.get("DIFFUCODER_SHARED", pathlib.Path(__file__).parents[2] / "shared")
)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Compiled programs take memory maps, of which a process has 65,530; the whole set takes more."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def shared():
  """The folder of reference material; tests that need it are skipped where it is absent."""
  if not (SHARED / "golden").is_dir():
    pytest.skip(f"reference material not found at {SHARED} (set DIFFUCODER_SHARED)")
  return SHARED


@pytest.fixture(scope="module")
def quick_compile():
  """For tests whose time is compilation and whose numbers are compared with each other."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def topology():
  """A function from a topology's name to its TPUs, to compile for; they are not at hand."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install -e .[tpu]")
  from jax.experimental import topologies

  # Else a second process that compiles at the same time dies.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the network where we are
  return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices


# What tests of the programs share. `tests.tiny` is imported late: it imports every program.


@pytest.fixture(scope="session")
def home(tmp_path_factory):
  """`tiny.Home`: the corpus and the tokenizer that the programs read."""
  from tests import tiny

  return tiny.make_home(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  """For tests that run whole programs in this process; see `tiny.quick_compilation`."""
  from tests import tiny

  with tiny.quick_compilation(tmp_path_factory.getbasetemp()):
    yield


@pytest.fixture(scope="session")
def folder_of(shared, tmp_path_factory):
  """A function from a real model's name to its Hugging Face folder (`shared/tools/real_models.py`)."""
  given = os.environ.get("DIFFUCODER_REAL_MODELS")
  root = pathlib.Path(given) if given else tmp_path_factory.mktemp("real_models")

  def folder(name):
    if not (root / name / "tokenizer.json").exists():  # the last file that is written
      tool = shared / "tools" / "real_models.py"
      if not tool.exists():
        pytest.skip(f"{tool} is not there to make {name}")
      made = subprocess.run(
        [sys.executable, str(tool), name, str(root / name)], capture_output=True, text=True
      )
      if made.returncode:
        pytest.skip(f"{tool.name} could not make {name} (no network?): {made.stderr[-300:]}")
    return root / name

  return folder
