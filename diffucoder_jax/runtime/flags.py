"""XLA's settings for TPU, in one place, each with its reason.

  eval "$(python -m diffucoder_jax.runtime.flags)"

sets them in a shell. Programs do so themselves before they use a device. What LIBTPU_INIT_ARGS already
says wins. Only libtpu reads them, so they mean nothing without a TPU. A name that libtpu does not know
ends the program, hence the test that compiles with them.
"""

import os
import shlex

VARIABLE = "LIBTPU_INIT_ARGS"

# (name, value, reason)
FLAGS = (
  # What FSDP lives on: while one layer computes, the weights of the next arrive.
  ("xla_tpu_enable_latency_hiding_scheduler", "true", "start transfers early, use results late"),
  ("xla_latency_hiding_scheduler_rerun", "1", "again, within memory, if the first order needs too much"),
  ("xla_enable_async_all_gather", "true", "weights arrive while something else computes"),
  ("xla_tpu_enable_async_collective_fusion", "true", "matrix products and transfers in one program"),
  ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "for the weights, too"),
  ("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "one behind several products"),
  ("xla_tpu_overlap_compute_collective_tc", "true", "and let the core do both at once"),
  # Products with gathered weights are cut into a window for each shard on v5p, and the whole result is
  # read and written for each: twice the HBM traffic of stage 1 on v5p-64, as compiled.
  ("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000", "gather whole weights, then multiply"),
  # The sum of gradients over `data`, where fsdp is not the whole mesh.
  ("xla_tpu_enable_data_parallel_all_reduce_opt", "true", "sum each layer's as soon as it is there"),
  ("xla_tpu_data_parallel_opt_different_sized_ops", "true", "also when layers differ in size"),
)  # fmt: skip


def arguments(already=""):
  """The arguments for libtpu: ours, without those that `already` sets, and then `already`."""
  given = {word.removeprefix("--").split("=")[0] for word in already.split()}
  ours = [f"--{name}={value}" for name, value, _ in FLAGS if name not in given]
  return ours + already.split()


def value():
  """What LIBTPU_INIT_ARGS should be."""
  return " ".join(arguments(os.environ.get(VARIABLE, "")))


def set_flags():
  """Puts the settings into the environment; call it before anything uses a device."""
  os.environ[VARIABLE] = value()


if __name__ == "__main__":
  print(f"export {VARIABLE}={shlex.quote(value())}")
