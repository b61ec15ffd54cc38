"""libtpu's settings: what the user says wins, and libtpu knows every name."""

import os
import shlex
import subprocess
import sys

import pytest

from diffucoder_jax.runtime import flags

COMPILE = """
import jax
from jax.experimental import topologies
from diffucoder_jax.runtime import sharding
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = sharding.make_mesh(dict(data=1, fsdp=-1, tensor=1), devices)
x = jax.ShapeDtypeStruct((512, 512), "float32", sharding=sharding.batch_sharding(mesh))
jax.jit(lambda x: x @ x).lower(x).compile()
print("compiled")
"""


def run(code, **env):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
  return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True)


def test_what_is_set_already_wins():
  name, ours, _ = flags.FLAGS[0]
  got = flags.arguments(f"--{name}=other --xla_something=1")
  assert got.count(f"--{name}=other") == 1 and f"--{name}={ours}" not in got
  assert got[-1] == "--xla_something=1" and len(got) == len(flags.FLAGS) + 1
  assert flags.arguments(" ".join(got)) == got
  assert all(reason for _, _, reason in flags.FLAGS)


def test_the_shell_gets_what_programs_set(monkeypatch):
  monkeypatch.setenv(flags.VARIABLE, "--xla_something=1")
  printed = run(["-m", "diffucoder_jax.runtime.flags"]).stdout
  (export, assignment) = shlex.split(printed)
  assert (export, assignment) == ("export", f"{flags.VARIABLE}={flags.value()}")
  flags.set_flags()
  assert os.environ[flags.VARIABLE] == assignment.removeprefix(f"{flags.VARIABLE}=")


@pytest.mark.slow
def test_libtpu_knows_every_name(topology):
  """It reads them once, when it is loaded, so this takes processes of its own."""
  done = run(["-c", COMPILE], LIBTPU_INIT_ARGS=flags.value())
  assert "compiled" in done.stdout, done.stderr[-2000:]
  assert "compiled" not in run(["-c", COMPILE], LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=1").stdout
