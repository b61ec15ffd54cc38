"""Held-out likelihood while training: bits per byte of fixed rows, of each source and of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.data import batching
from diffucoder_jax.diffusion import cross_entropy, likelihood
from diffucoder_jax.model import attention
from diffucoder_jax.model.transformer import output_matrix
from diffucoder_jax.runtime import sharding


def _nats(model, autoregressive, mask_id, draws, params, batch, key, draw):
  """Nats (or their bound) of the scored tokens of each row, for `likelihood.bits_per_byte`."""
  pattern = attention.CAUSAL if autoregressive else attention.FULL

  def nll_fn(inputs_BL, targets_BL, needed_BL):
    features_BLD = model.apply(
      {"params": params}, inputs_BL, batch["segment_ids"], batch["positions"], pattern
    )
    return cross_entropy.token_nll(features_BLD, output_matrix(params), targets_BL, needed_BL)

  if autoregressive:
    return jnp.sum(nll_fn(batch["tokens"], batch["tokens"], batch["maskable"]), axis=1)
  return likelihood.nelbo_rows(
    nll_fn, key, batch["tokens"], batch["maskable"], mask_id, draw, draws
  )


def make_nats_fn(model, autoregressive, mask_id, draws, mesh):
  """Compiled (params, batch, key, draw) -> nats per row of the global batch, on every process."""
  return jax.jit(
    functools.partial(_nats, model, autoregressive, mask_id, draws),
    out_shardings=sharding.replicated(mesh),
  )


def load_sets(parts, eval_config, global_batch, token_bytes_V, mesh, placed=None):
  """The fixed held-out batches on the device, each with its rows' scored bytes on the host.

  Args:
    parts: {source: rows}.
    eval_config: `rows` is read: how many of each source.
    global_batch: rows in a batch. placed: those on the devices, `batching.placed_rows`.
    token_bytes_V: UTF-8 bytes of each token.
    mesh: where the batches go.
  Returns:
    {source: [(device batch, bytes of each row of the global batch)]}.
  """
  return {name: _load_set(rows, eval_config.rows, global_batch, token_bytes_V, mesh, placed)
          for name, rows in parts.items()}  # fmt: skip


def _load_set(rows, count_rows, global_batch, token_bytes_V, mesh, placed):
  take = functools.partial(
    batching.held_out_batches, rows, count_rows, global_batch, placed=placed
  )
  # Every process counts the bytes of all rows; only the tokens are cut by process.
  num_bytes = [
    np.sum(np.where(batch["maskable"], token_bytes_V[batch["tokens"]], 0), axis=1)
    for batch in take()
  ]
  local = take(shard=sharding.batch_shard(mesh))
  return [(sharding.put_batch(b, mesh), n) for b, n in zip(local, num_bytes, strict=True)]


def evaluate(nats_fn, draws, sets, params, key):
  """Bits per byte, with standard errors.

  Args:
    nats_fn: from `make_nats_fn`. draws: Monte-Carlo draws per row. sets: from `load_sets`.
    params: parameters. key: PRNG key; the same one gives the same noise each time.
  Returns:
    {"eval/bits_per_byte": of all rows, "eval/bits_per_byte_se": its standard error}, and both with
    "/source" behind them when there are several.
  """
  nats, num_bytes = {}, {}
  for name, batches in sets.items():
    nats[name] = [
      sum(nats_fn(params, batch, jax.random.fold_in(key, i), draw) for draw in range(draws)) / draws
      for i, (batch, _) in enumerate(batches)
    ]
    num_bytes[name] = np.concatenate([sizes for _, sizes in batches])
  nats = {name: np.concatenate(value) for name, value in jax.device_get(nats).items()}
  scored = {
    "": likelihood.bits_per_byte(*(np.concatenate([*x.values()]) for x in (nats, num_bytes)))
  }
  if len(sets) > 1:
    scored |= {f"/{name}": likelihood.bits_per_byte(nats[name], num_bytes[name]) for name in sets}
  row = {}
  for name, (value, error) in scored.items():
    row |= {f"eval/bits_per_byte{name}": value, f"eval/bits_per_byte_se{name}": error}
  return row
