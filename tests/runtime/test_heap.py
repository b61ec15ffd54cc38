"""Freed memory is used again: counted as page faults of a real process."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource
import sys
from diffucoder_jax.runtime import heap, hosts
if sys.argv[1] == "start":
  hosts.start_distributed()  # as train, train_grpo and evaluate begin
print("set" if sys.argv[1] == "keep" and heap.keep_freed_memory() else "not set")
import jax
import jax.numpy as jnp
# What lies between the two products, 64 MB, is allocated at each call.
x = jnp.ones((4096, 4096))
f = jax.jit(lambda x: (x[:256] @ jnp.sin(x @ x[:, :1] + x)).sum())
# Threads allocate in any order, so that now and then a block finds no hole and the heap grows once more:
# the least of several counts.
counts = []
for _ in range(6):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(3):
    jax.block_until_ready(f(x))
  counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))
"""


def run(how, **env):
  """(what `keep_freed_memory` said, the fewest page faults of three calls) of a fresh process."""
  names = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES" and "MALLOC_" not in n}
  env = {**names, "JAX_PLATFORMS": "cpu", **env}
  command = [sys.executable, "-c", CODE, how]
  lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split("\n")
  return lines[0], int(lines[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
def test_a_program_meets_the_memory_of_its_last_call():
  (said, faults), (_, started), (_, many) = run("keep"), run("start"), run("leave")
  assert said == "set"
  assert max(faults, started) < many / 2 and many > 3 * 64 * 2**20 / 4096 / 2


def test_what_the_environment_says_wins():
  assert run("keep", MALLOC_ARENA_MAX="2")[0] == "not set"


def test_not_where_arrays_may_live_elsewhere():
  code = "from diffucoder_jax.runtime import heap; print(heap.only_cpu(), heap.keep_freed_memory())"
  env = {**os.environ, "JAX_PLATFORMS": "tpu,cpu"}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert done.stdout.split() == ["False", "False"], done.stderr
