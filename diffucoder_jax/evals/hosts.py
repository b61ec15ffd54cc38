"""What the hosts of a pod tell each other in an evaluation: small JSON values."""

import json

import jax
import numpy as np


def gather(value) -> list:
  """The JSON values of all processes, on all of them, in the order of the processes.

  All must call it. With one process it is [value].
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.asarray(len(raw), np.int32))).ravel()
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(raw)] = raw
  everywhere = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
  return [
    json.loads(bytes(row[:size]).decode()) for row, size in zip(everywhere, sizes, strict=True)
  ]


def from_main(function):
  """What `function()` gives on the main process, on all of them; its ValueError is raised on all."""
  found = error = None
  if jax.process_index() == 0:
    try:
      found = function()
    except (ValueError, FileNotFoundError) as e:
      error = str(e)
      if jax.process_count() == 1:
        raise
  found, error = gather([found, error])[0]
  if error:
    raise ValueError(error)
  return found
