"""A tiny corpus, tokenizer and config, and ways to run the programs: what their tests share."""

import contextlib
import functools
import importlib.util
import inspect
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from configs import tiny as tiny_config
from diffucoder_jax import pretrained, train
from diffucoder_jax.data import pipeline, sources
from diffucoder_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from diffucoder_jax.runtime import checkpoint, metrics, sharding

ROOT = pathlib.Path(__file__).parents[1]
# Must be in the environment before JAX looks for devices; see `hosts.enough_threads`.
os.environ.setdefault("NPROC", "32")

VOCABULARY = 400  # fewer than the tiny model's 512 rows, as with the published weights
CLOCKS = ("time", "tokens_per_second", "mfu", "eval/seconds")


# --- What there is to read.


class Home(NamedTuple):
  """Paths of a corpus folder and of a tokenizer file made from it."""

  corpus: str
  tokenizer: str


@functools.cache
def make_home(base):
  """A corpus of about 40 small files of real Python, and a tokenizer for it; one for all tests.

  `base` is `tmp_path_factory.getbasetemp()`, here and below: the folder of this test session.
  """
  folder = base / "home"
  corpus = folder / "corpus"
  corpus.mkdir(parents=True)
  lines = (inspect.getsource(textwrap) + inspect.getsource(json)).splitlines(keepends=True)
  for i in range(0, len(lines), 20):
    (corpus / f"{i:04}.py").write_text("".join(lines[i : i + 20]))
  texts = [path.read_text() for path in sorted(corpus.iterdir())]
  tokenizer = folder / "tokenizer.model"
  train_sentencepiece(texts, tokenizer, VOCABULARY)
  return Home(str(corpus), str(tokenizer))


def one_batch_corpus(folder, tokenizer, rows=8, seq_len=64):
  """Two easy files: a train side that fills exactly `rows` rows, and a held-out one like it.

  Use it with data.held_out = 0.5. Every training batch of `rows` rows is then the same batch.
  """
  encode = load_tokenizer(tokenizer).encode
  sides = {}
  for first in range(1000, 9000, 50):
    text = ""
    for i in range(first, first + 50):
      more = text + f"def f{i}(x):\n  return x + {i}\n"
      if len(encode(more)) + 2 > rows * seq_len:
        break
      text = more
    sides.setdefault(bool(sources.split([sources.Document("", text)], 0.5)[0]), text)
    if len(sides) == 2:
      break
  folder.mkdir(parents=True)
  for name, text in sides.items():
    (folder / f"{name}.py").write_text(text)
  return str(folder)


# --- Configs, and runs inside this process.


def settings(home, changes=()):
  """Flat config overrides that make configs/tiny.py read `home`."""
  common = {"data.source": "folder", "data.path": home.corpus, "data.held_out": 0.2}
  return {**common, "tokenizer": home.tokenizer, **dict(changes)}


def config(home, arg=None, changes=()):
  """The locked config of configs/tiny.py on `home`; `changes` maps dotted keys to values."""
  c = tiny_config.get_config(arg)
  c.lock()
  c.update_from_flattened_dict(settings(home, changes))
  return c


@contextlib.contextmanager
def quick_compilation(base):
  """Inside, XLA optimises little and keeps what it compiled for the other tests of this session.

  Compiling takes most of the time of a tiny run, and the same few programs come again and again.
  """
  settings_ = {
    "jax_compilation_cache_dir": str(base / "programs"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_disable_most_optimizations": True,
  }
  before = {name: jax.config.values[name] for name in settings_}
  try:
    for name, value in settings_.items():
      jax.config.update(name, value)
    jax_cache.reset_cache()
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    jax_cache.reset_cache()


@contextlib.contextmanager
def fresh_process(devices=1):
  """Inside, programs see the first `devices` devices; afterwards nothing of them is left."""
  make_mesh = sharding.make_mesh

  def make_small_mesh(mesh_config, chosen=None):
    return make_mesh(mesh_config, jax.devices()[:devices] if chosen is None else chosen)

  handler = signal.getsignal(signal.SIGTERM)
  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(None):
    patch.setattr(sharding, "make_mesh", make_small_mesh)
    try:
      yield
    finally:
      signal.signal(signal.SIGTERM, handler)
      checkpoint._sigterm.clear()


def run_training(c, workdir, devices=1):
  """`train.main` in this process. Returns the last held-out (bits per byte, standard error)."""
  with fresh_process(devices):
    return train.main(c, str(workdir))


# Nobody may change the workdirs of these two: they are made once for all tests.


@functools.cache
def finished(base):
  """The workdir of a whole run of configs/tiny.py (12 steps of diffusion), never interrupted.

  Compiled quickly whoever asks first: bits are compared only between runs that XLA optimised alike.
  """
  workdir = base / "finished"
  with quick_compilation(base):
    run_training(config(make_home(base)), workdir)
  return workdir


@functools.cache
def overfitted(base, arg, steps=80):
  """Trains many steps on one easy batch. Returns (workdir, bits per byte on the held-out side)."""
  home, folder = make_home(base), base / f"overfitted_{arg}_{steps}"
  corpus = one_batch_corpus(folder / "corpus", home.tokenizer)
  changes = {
    "data.path": corpus, "data.held_out": 0.5, "optim.steps": steps, "optim.lr": 1e-2,
    "checkpoint.every": steps // 2, "eval.every": steps, "eval.draws": 8,
  }  # fmt: skip
  c = config(home, arg, changes)
  rows = pipeline.load_corpus(c.data, load_tokenizer(home.tokenizer), c.seed).train
  assert len(rows) == c.data.global_batch, "not one batch"
  return folder / "run", run_training(c, folder / "run")[0]


def program(name):
  """The module of a program, without making it an attribute of the package.

  `diffucoder_jax.generate` is a function for users; importing the program of that name hides it.
  """
  path = ROOT / "diffucoder_jax" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"program_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# --- What a run left behind.


def rows(workdir):
  """The rows of metrics.jsonl without what the clock decides; floats are exact in there."""
  clock = lambda key: key in CLOCKS or key.startswith("hosts/")  # noqa: E731
  return [{k: v for k, v in row.items() if not clock(k)} for row in metrics.read(workdir)]


def losses(workdir):
  """dict step -> loss; fails when a step has two."""
  pairs = [(row["step"], row["loss"]) for row in rows(workdir) if "loss" in row]
  assert len(dict(pairs)) == len(pairs), "a step was written twice"
  return dict(pairs)


def steps_on_file(workdir):
  """The steps that have a finished checkpoint, ascending."""
  folder = pathlib.Path(workdir) / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def remove_checkpoint(workdir, step):
  """As if the run had not come that far."""
  shutil.rmtree(pathlib.Path(workdir) / "checkpoints" / str(step))


def params(workdir):
  """dict leaf name -> numpy array, of the newest checkpoint."""
  leaves = jax.tree_util.tree_leaves_with_path(pretrained.from_pretrained(workdir).params)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def final_state(workdir):
  """(step, every array of the newest checkpoint by its hash, its parameters' bytes), to compare."""
  step = steps_on_file(workdir)[-1]
  item = pathlib.Path(workdir) / "checkpoints" / str(step) / "integrity" / "metadata"
  leaves = json.loads(item.read_text())["of"]["leaves"]
  return step, leaves, {name: x.tobytes() for name, x in params(workdir).items()}


def assert_same_run(workdir, other):
  """Both runs reported the same numbers and ended in the same arrays, bit for bit."""
  assert rows(workdir) == rows(other)
  assert final_state(workdir) == final_state(other)


def contents(folder):
  """dict path -> bytes of all files below a folder."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- Programs in processes of their own.


def flags(home, workdir, arg=None, changes=()):
  """Command-line arguments of train.py that say what `config` says."""
  name = "configs/tiny.py" + (f":{arg}" if arg else "")
  values = [f"--config.{key}={value}" for key, value in settings(home, changes).items()]
  return [f"--config={name}", f"--workdir={workdir}", *values]


def environment(devices=1, **more):
  """The environment without anything that could reach JAX or the programs, on CPU."""
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "XLA_", "DIFFUCODER_", "TF_")) and name != "NPROC"
  }
  return {**kept, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **more}


def start(name, arguments, log, **options):
  """Starts `python -m diffucoder_jax.<name>`; all it prints is appended to the file `log`."""
  command = [sys.executable, "-m", f"diffucoder_jax.{name}", *arguments]
  with open(log, "ab") as out:
    return subprocess.Popen(
      command, cwd=ROOT, env=environment(**options), stdin=subprocess.DEVNULL, stdout=out,
      stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(name, arguments, stdin="", seconds=300, **options):
  """Runs a program to its end. Returns `subprocess.CompletedProcess` with text output."""
  command = [sys.executable, "-m", f"diffucoder_jax.{name}", *arguments]
  return subprocess.run(
    command, cwd=ROOT, env=environment(**options), input=stdin, capture_output=True, text=True,
    timeout=seconds,
  )  # fmt: skip


def wait(process, seconds=600):
  """The exit code of a process, which is killed when it takes too long."""
  try:
    return process.wait(timeout=seconds)
  finally:
    process.kill()


def wait_until(condition, process, seconds=240):
  """Waits until `condition()` holds. False when the process ended, or was killed, before that."""
  end = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > end:
      process.kill()
    if process.poll() is not None:
      return bool(condition())
    time.sleep(0.002)
  return True


def last_row(workdir):
  """The last whole row of a metrics.jsonl that may be growing; of step 0 when there is none."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  return json.loads(lines[-1]) if lines else {"step": 0, "time": 0.0}


def free_port():
  """A TCP port that nobody listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]
