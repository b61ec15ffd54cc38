"""Many rows of any length through the sampler: little padding, few programs, a device that seldom waits.

Rows of like length go together, left-padded to one of few lengths. A batch whose rows end early goes on
with those that are left (`sampler.generate`'s `batch_sizes`), and while the host reads one batch the
device writes the next; a CPU writes two at a time. No row's tokens depend on any of this but through
rounding.
"""

import collections
import concurrent.futures
import functools
import itertools
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from diffucoder_jax.diffusion import autoregressive, cache, sampler
from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.diffusion.pace import pace_of
from diffucoder_jax.runtime import sharding

# Batches that a CPU writes at a time. The choice of tokens, which takes as long as a small network does,
# is made of work too small for threads to share; another batch's network fills the other cores. On two
# cores the quickstart's rollouts take 0.7 of the time so, and more again with three at a time.
AT_ONCE = 2


class Batch(NamedTuple):
  """Rows that were written together: `indices`, which these are; their `sampler.Trace`, numpy, [B, L],
  L the same for all and padding on the left; the `seconds` to their arrival from their start, or from the
  arrival of the batch before if that was later: all batches' together are the time that writing took."""

  indices: list[int]
  trace: Any
  seconds: float


class Fixed(NamedTuple):
  """What a program is compiled for, beside shapes and `SamplerConfig`."""

  mask_id: int
  end_ids: tuple[int, ...]
  slots: int
  batch_sizes: tuple[int, ...] = ()


def bucket(size, step=32):
  """`size` rounded up to one of few numbers: multiples of `step`, and from 8 of them on four to each
  doubling, so that at most a fifth is padding and any lengths up to 4,096 make 24 programs."""
  step = max(step, 2 ** max(0, (size - 1).bit_length() - 3))
  return size + -size % step


def write(
  network, params, rows, keys, config, *, mask_id, end_ids=(), mesh=None, batch_size=8, limit=None,
  constraints=None,
):  # fmt: skip
  """Writes the masks of rows, and new tokens behind them.

  Args:
    network: (any_order, in_order). any_order: (params, width, window) -> (logits_fn, unembed)
      of `sampler.generate`; in_order: (params, valid_BL) -> that of `autoregressive.generate`, or None
      where the network sees both ways. Programs are kept by these two functions.
    params: the network's, laid out over `mesh`.
    rows: lists of token ids, none empty, in which `mask_id` is a place to write; on every host all.
    keys: uint32 [rows, 2], `jax.random.key_data` of each row's key.
    config: `SamplerConfig`; steps of 0 are one for each mask of a row.
    mask_id: int. end_ids: those that end a text, read by `stop_at_eos`.
    mesh: of all hosts; None: the default device.
    batch_size: rows written together, rounded up to what the mesh divides.
    limit: no canvas is padded beyond so many places; None: there is none.
    constraints: `constraints.Constraints` of every row, which `in_order` does not know: with them all
      rows are written by `any_order`.

  On a CPU programs are traced in threads of their own, where JAX's context managers around the call, as
  `jax.default_matmul_precision`, are not in force; `jax.config.update` is.
  Yields:
    `Batch`, all rows of it on every host.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}; write at least one row at a time")
  if not rows:
    return
  masks = [row.count(mask_id) + config.max_new_tokens for row in rows]
  longest = max(map(len, rows)) + config.max_new_tokens
  if limit is not None and longest > limit:
    raise ValueError(
      f"row {max(range(len(rows)), key=lambda i: len(rows[i]))} takes {longest} places with its new "
      f"tokens, and the limit is {limit}; shorten it or ask for fewer new tokens"
    )
  if not min(masks):
    raise ValueError(
      f"row {masks.index(0)} has no masks and max_new_tokens is 0: there is nothing to write"
    )
  cache.check(config, max(masks))
  order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), masks[i]))
  shards = 1 if mesh is None else sharding.batch_shards(mesh)
  # So that few rows do not take a whole batch, nor each number of them a program.
  size = min(batch_size, 1 << (len(rows) - 1).bit_length())
  size += -size % shards
  exact = config.cache != "none"  # which is for blocks at the rows' ends
  fixed = Fixed(
    mask_id, tuple(end_ids), max(masks) if exact else bucket(max(masks), 8),
    batch_sizes_of(config, size, shards),
  )  # fmt: skip

  def launch(chosen):
    in_order = network[1] if constraints is None else None
    if in_order and all(autoregressive.can_write(config, masks[i]) for i in chosen):
      program = functools.partial(write_in_order, in_order, config, fixed)
    else:
      program = functools.partial(write_any_order, network[0], config, fixed)
      program = functools.partial(program, constraints=constraints)
    arrays = _lay_out([rows[i] for i in chosen], size, config, fixed, limit)
    chosen = chosen + chosen[-1:] * (size - len(chosen))
    return time.monotonic(), _run(program, params, (*arrays, keys[chosen]), mesh)

  batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
  fetch = functools.partial(_fetch, mesh=mesh)
  cpu, alone = sharding.platform() == "cpu", jax.process_count() == 1
  # On CPU, programs that run at a time and exchange something can wait for each other for ever.
  if cpu and alone and (mesh is None or mesh.size == 1):
    yield from _side_by_side(batches, launch, fetch)
  else:
    yield from _one_by_one(batches, launch, fetch, ahead=alone or not cpu)


def _one_by_one(batches, launch, fetch, ahead):
  """Yields `Batch`; with `ahead` the next is launched before one is handed over."""
  running = None
  for chosen, following in zip(batches, [*batches[1:], None], strict=True):
    began, trace = running or launch(chosen)
    trace = fetch(trace, len(chosen))
    seconds = time.monotonic() - began
    running = launch(following) if following and ahead else None
    yield Batch(chosen, trace, seconds)


def _side_by_side(batches, launch, fetch):
  """Yields `Batch`, in order, `AT_ONCE` of which are written at a time, each launched by a thread of its
  own: what one thread launches XLA runs one after the other."""
  launching = threading.Lock()  # the second finds the program that the first compiles

  def write_one(chosen):
    with launching:
      began, trace = launch(chosen)
    return chosen, began, fetch(trace, len(chosen)), time.monotonic()

  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    left = iter(batches)
    running = collections.deque(pool.submit(write_one, one) for one in itertools.islice(left, AT_ONCE))
    before = 0.0
    while running:
      chosen, began, trace, arrived = running.popleft().result()
      running.extend(pool.submit(write_one, one) for one in itertools.islice(left, 1))
      yield Batch(chosen, trace, max(0.0, arrived - max(began, before)))
      before = max(before, arrived)


def batch_sizes_of(config, size, shards=1):
  """`batch_sizes` of `sampler.generate` for batches of `size`: half and a quarter, if rows end early."""
  early = config.stop_at_eos or config.in_parallel
  if not early or config.cache != "none":
    return ()
  return tuple(n for n in (size // 4, size // 2) if n and n % shards == 0)


def unpadded(trace, b):
  """Row b of a `Batch.trace`, B = 1, without its padding."""
  valid_L = trace.valid[b]
  return jax.tree.map(lambda x: x[b : b + 1, valid_L] if x.ndim > 1 else x[b : b + 1], trace)


def _lay_out(rows, size, config, fixed, limit):
  """(canvas, valid, pace) of `size` rows, the last of which may be fillers with nothing to write."""
  length = bucket(max(map(len, rows)) + config.max_new_tokens)
  length = length if limit is None else min(length, limit)
  filled = rows + rows[-1:] * (size - len(rows))
  canvas_BL, valid_BL = canvases.lay_out(filled, length, config.max_new_tokens, fixed.mask_id)
  masks_B = np.sum((canvas_BL == fixed.mask_id) & valid_BL, axis=1)
  fillers_BL = canvas_BL[len(rows) :]
  fillers_BL[fillers_BL == fixed.mask_id] = 0
  return canvas_BL, valid_BL, pace_of(config, masks_B.tolist(), min(fixed.slots, length))


def _run(program, params, arrays, mesh):
  """Starts a program on this process's rows of `arrays`."""
  if mesh is None:
    return program(params, *arrays)
  index, count = sharding.batch_shard(mesh)

  def block(x):
    return x[index * len(x) // count : (index + 1) * len(x) // count]

  with jax.set_mesh(mesh):
    return program(params, *sharding.put_batch(jax.tree.map(block, arrays), mesh))


def _fetch(trace, number, mesh):
  """The first `number` rows on every host, numpy."""
  if mesh is None:
    trace = jax.device_get(trace)
  else:
    trace = jax.tree.map(lambda x: sharding.all_rows(sharding.local_rows(x), mesh), trace)
  return jax.tree.map(lambda x: x[:number], trace)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def write_any_order(
  network, config, fixed, params, canvas_BL, valid_BL, pace, keys_B2, constraints=None
):
  """The program of batches that `sampler.generate` writes; see `write`."""
  features_fn, unembed = network(params, config.block_size, cache.WINDOWS.get(config.cache))
  keys_B = jax.random.wrap_key_data(keys_B2)
  slots = min(fixed.slots, canvas_BL.shape[1])
  return sampler.generate(
    features_fn, canvas_BL, valid_BL, keys_B, config, mask_id=fixed.mask_id, end_ids=fixed.end_ids,
    slots=slots, pace=pace, batch_sizes=fixed.batch_sizes, constraints=constraints, unembed=unembed,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def write_in_order(network, config, fixed, params, canvas_BL, valid_BL, pace, keys_B2):
  """The same of those that `autoregressive.generate` writes, one token a step."""
  del pace
  keys_B = jax.random.wrap_key_data(keys_B2)
  return autoregressive.generate(
    network(params, valid_BL), canvas_BL, valid_BL, keys_B, config,
    mask_id=fixed.mask_id, end_ids=fixed.end_ids,
  )  # fmt: skip
