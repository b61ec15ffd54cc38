"""Batches of rows: the same for any mesh and any number of processes, and where they go on.

The rows of global batch `s` are a pure function of (rows, seed, s). Processes cut the same batch into
blocks, so neither their number nor a restart changes what the model sees.
"""

import grain
import numpy as np
from absl import logging

from diffucoder_jax.data.mixture import Mixture


def placed_rows(data_config, batch_shards: int) -> int:
  """Rows of a batch on the devices: `global_batch`, or more with `fill_batch`.

  160 rows, which the paper's 80 GPUs share, are no multiple of the 64 batch shards of (2, 32, 4) on 256
  chips. With `data.fill_batch` 32 rows of padding make up the 192: they carry no loss and change no
  number, but their share of the compute is lost. Without it such a batch is refused later on.

  Args:
    data_config: the `data` section; `global_batch` and `fill_batch` are read.
    batch_shards: `sharding.batch_shards` of the mesh.
  """
  rows = data_config.global_batch
  extra = -rows % batch_shards if data_config.fill_batch else 0
  if extra:
    logging.warning(
      "data.fill_batch: %d empty rows fill up %d to %d, a multiple of the mesh's %d batch shards; "
      "%.0f %% of the compute is spent on them",
      extra, rows, rows + extra, batch_shards, 100 * extra / (rows + extra),
    )  # fmt: skip
  return rows + extra


def train_batches(rows, data_config, seed: int, shard=(0, 1), placed=None):
  """Endless training batches, shuffled anew each epoch.

  Args:
    rows: the training rows: `pipeline.PackedRows`, another source of rows, or a `Mixture` of them.
    data_config: the `data` section; `global_batch` is read here.
    seed: order of the rows.
    shard: (index, count) of `sharding.batch_shard`: block `index` of `count` of each global batch.
    placed: `placed_rows`; what it has beyond `global_batch` are rows of padding at the batch's end.
  Returns:
    a `TrainBatches` iterator over dicts of [placed // count, seq_len] arrays.
  Raises:
    ValueError: too few rows for one batch, or a batch that does not divide.
  """
  global_batch = data_config.global_batch
  placed = global_batch if placed is None else placed
  local = _local_rows(placed, shard, "data.global_batch")
  if len(rows) < global_batch:
    raise ValueError(
      f"the training text fills {len(rows)} row(s) of {rows.seq_len} tokens, fewer "
      f"than data.global_batch={global_batch}; give more text, or a smaller "
      "data.global_batch or data.seq_len"
    )
  index, count = shard
  if isinstance(rows, Mixture):
    dataset = rows.shuffled(seed)
  else:
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
  # Batched before it is cut by process: the other way round, rows would move with `count`.
  if placed == global_batch:
    dataset = dataset.batch(local, drop_remainder=True)[index::count]
  else:  # blocks differ in how many rows they have, so each process reads all and keeps its own
    padding = padding_row(next(iter(rows.parts.values())) if isinstance(rows, Mixture) else rows)
    block = slice(index * local, (index + 1) * local)
    dataset = dataset.batch(global_batch, drop_remainder=True).map(
      lambda batch: _filled(batch, padding, block)
    )
  # Rows are made in microseconds; a deep buffer would only hold memory.
  return TrainBatches(
    iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
  )


class TrainBatches:
  """Iterator over training batches with a state that is plain JSON and fits any process count."""

  def __init__(self, iterator):
    self._iterator = iterator

  def __iter__(self):
    return self

  def __next__(self):
    return next(self._iterator)

  def get_state(self) -> dict:
    """{"next_index": number of batches given so far}, the same on every process."""
    return {"next_index": int(self._iterator.get_state()["next_index"])}

  def set_state(self, state: dict) -> None:
    """Goes on from a state of `get_state`."""
    self._iterator.set_state({"next_index": int(state["next_index"])})


def held_out_batches(rows, count_rows: int, rows_per_batch: int, shard=(0, 1), placed=None):
  """Yields a fixed sample of the held-out rows, the same in every run.

  Args:
    rows: the held-out rows.
    count_rows: how many to take; all when there are fewer.
    rows_per_batch: rows of the global batch. The last batch is filled up with padding rows
      (`segment_ids` 0, nothing maskable), so that shapes never change.
    shard: (index, count): which block of each global batch to yield.
    placed: `placed_rows`; every batch is filled up to so many.
  Raises:
    ValueError: no held-out rows, or a batch that does not divide.
  """
  placed = rows_per_batch if placed is None else placed
  local = _local_rows(placed, shard, "the evaluation batch")
  if not len(rows) or count_rows < 1:
    raise ValueError(
      f"asked for {count_rows} of {len(rows)} held-out rows; raise data.held_out or "
      "give more documents (whole documents are held out)"
    )
  # Neighbouring rows come from the same document, so a sample of few rows is spread out.
  chosen = np.random.default_rng(0).permutation(len(rows))[:count_rows]
  return _held_out_batches(rows, chosen, rows_per_batch, shard[0] * local, local)


def padding_row(rows):
  """A row of `rows` in which there is nothing: padding, no segment, nothing maskable."""
  padding = {key: np.zeros_like(value) for key, value in rows[0].items()}
  return {**padding, "tokens": np.full_like(padding["tokens"], rows.pad_id)}


def _filled(batch, padding, block):
  """The rows `block` of a batch that goes on with padding beyond its end."""
  own = {key: x[block] for key, x in batch.items()}
  lacking = block.stop - block.start - len(own["tokens"])
  return {key: np.concatenate([x, *[padding[key][None]] * lacking]) for key, x in own.items()}


def _held_out_batches(rows, chosen, rows_per_batch, begin, local):
  padding = padding_row(rows)
  for i in range(0, len(chosen), rows_per_batch):
    block = chosen[i : i + rows_per_batch][begin : begin + local]
    batch = [rows[row] for row in block] + [padding] * (local - len(block))
    yield {key: np.stack([row[key] for row in batch]) for key in padding}


def _local_rows(rows, shard, name):
  index, count = shard
  if rows < 1 or rows % count:
    raise ValueError(
      f"{name}={rows} cannot be cut into {count} equal blocks, one for each group "
      f"of processes; make it a multiple of {count}, or set data.fill_batch"
    )
  if not 0 <= index < count:
    raise ValueError(f"shard {index} of {count} does not exist")
  return rows // count
