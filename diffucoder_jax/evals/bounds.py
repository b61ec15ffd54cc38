"""How likely a model finds the published solutions: bits per byte, given what it is asked.

For diffusion weights an upper bound (NELBO), by two estimators; for autoregressive ones the exact
value. A model can be compared here where it does not solve a single task yet.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.diffusion import cross_entropy, likelihood, process
from diffucoder_jax.evals import sampling
from diffucoder_jax.model import attention
from diffucoder_jax.model.transformer import Transformer, output_matrix
from diffucoder_jax.runtime import sharding


def nats_rows(nll_fn, keys_B, tokens_BL, maskable_BL, mask_id, draw, draws, complementary):
  """One draw of each row's negative evidence lower bound.

  Args:
    nll_fn: (noisy_tokens_BL, targets_BL, needed_BL) -> nats per position, float32 [B, L].
    keys_B: PRNG keys, one per row, the same for every draw.
    tokens_BL, maskable_BL, mask_id: as in `process.mask_tokens`.
    draw, draws: this draw's index and how many there are: a row's noise levels are spread evenly.
    complementary: False for one mask (Monte Carlo); True for the mean over a mask and its complement,
      t and 1 - t: each token is scored once a draw, for two network evaluations.
  Returns:
    float32 [B], nats. Both have the same expectation, but for t within T_MIN of 1.
  Source: Gong et al. 2025, Eq. 1 for the bound and section 5 for complementary masks.
  """
  length = tokens_BL.shape[1]
  split_B2 = jax.vmap(jax.random.split)(keys_B)
  u_B = jax.vmap(jax.random.uniform)(split_B2[:, 0])
  u_BL = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, draw), (length,)))(
    split_B2[:, 1]
  )
  low = process.T_MIN
  high = 1.0 - low if complementary else 1.0
  t_B = low + (high - low) * ((u_B + draw / draws) % 1.0)

  def part(masked_BL, t_B):
    noisy_BL = jnp.where(masked_BL, mask_id, tokens_BL)
    return jnp.sum(nll_fn(noisy_BL, tokens_BL, masked_BL), axis=1) / t_B

  masked_BL = (u_BL < t_B[:, None]) & maskable_BL
  if not complementary:
    return part(masked_BL, t_B)
  return (part(masked_BL, t_B) + part(maskable_BL & ~masked_BL, 1.0 - t_B)) / 2


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _nats(config, mask_id, draws, estimator, params, tokens_BL, valid_BL, scored_BL, keys_B2, draw):
  model = Transformer(config)
  causal = config.attention == "causal"
  pattern = attention.CAUSAL if causal else attention.FULL
  positions_BL = jnp.maximum(jnp.cumsum(valid_BL, axis=1) - 1, 0)

  def nll_fn(inputs_BL, targets_BL, needed_BL):
    features_BLD = model.apply(
      {"params": params}, inputs_BL, valid_BL.astype(jnp.int32), positions_BL, pattern
    )
    return cross_entropy.token_nll(features_BLD, output_matrix(params), targets_BL, needed_BL)

  if causal:
    return jnp.sum(nll_fn(tokens_BL, tokens_BL, scored_BL), axis=1)
  keys_B = jax.random.wrap_key_data(keys_B2)
  complementary = estimator == "complementary"
  return nats_rows(nll_fn, keys_B, tokens_BL, scored_BL, mask_id, draw, draws, complementary)


def bits_per_byte(ckpt, problems, asked, system, primer, draws=8, seed=0, batch_size=8) -> dict:
  """Bits per byte of the references.

  Args:
    ckpt: `Pretrained` with a tokenizer, laid out over `ckpt.mesh` or on one device.
    problems: list of `Problem` with references. asked, system, primer: as of `sampling.prompt_of`,
      "chat" or "complete". draws: of the noise, for each row. seed: int. batch_size: rows at a time.
  Returns:
    {estimator: {"bits_per_byte", "standard_error"}, "draws", "tasks"}. Estimators are "monte_carlo"
    and "complementary", which evaluates the network twice a draw, or "exact" for autoregressive
    weights. The error is over tasks, and holds the noise of the draws.
  Raises:
    ValueError: a reference that does not fit into the model's context; names the task.
  """
  rows = []
  for problem in problems:
    prompt = sampling.prompt_of(ckpt, problem, asked, system, primer)
    text = problem.reference
    if asked == "complete":
      text = text.removeprefix(problem.stub)
    answer = ckpt.tokenizer.encode(text)
    if len(prompt) + len(answer) > ckpt.config.max_seq_len:
      raise ValueError(
        f"{problem.task_id} needs {len(prompt) + len(answer)} tokens with its reference; the model's "
        f"context is {ckpt.config.max_seq_len}"
      )
    rows.append((prompt, answer))
  length = max(len(prompt) + len(answer) for prompt, answer in rows)  # one for all: so is the noise
  shards = 1 if ckpt.mesh is None else sharding.batch_shards(ckpt.mesh)
  batch_size += -batch_size % shards
  count = len(rows) + -len(rows) % batch_size
  tokens_BL = np.zeros((count, length), np.int32)
  valid_BL, scored_BL = np.zeros((2, count, length), bool)
  for b, (prompt, answer) in enumerate(rows):
    end = len(prompt) + len(answer)
    tokens_BL[b, :end] = prompt + answer
    valid_BL[b, :end] = scored_BL[b, len(prompt) : end] = True
  keys = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), i)))
  arrays = tokens_BL, valid_BL, scored_BL, np.asarray(keys(np.arange(count)))
  sizes = np.sum(np.where(scored_BL, ckpt.tokenizer.token_bytes()[tokens_BL], 0), axis=1)[
    : len(rows)
  ]
  causal = ckpt.config.attention == "causal"
  report = {"draws": 1 if causal else draws, "tasks": len(rows)}
  for estimator in ("exact",) if causal else ("monte_carlo", "complementary"):
    nats = [
      _batch(ckpt, [x[i : i + batch_size] for x in arrays], report["draws"], estimator)
      for i in range(0, count, batch_size)
    ]
    bits, error = likelihood.bits_per_byte(np.concatenate(nats)[: len(rows)], sizes)
    report[estimator] = {"bits_per_byte": bits, "standard_error": error}
  return report


def _batch(ckpt, arrays, draws, estimator):
  """Nats of each row of a batch, on every host: the mean over the draws."""
  run = functools.partial(_nats, ckpt.config, ckpt.mask_id, draws, estimator, ckpt.params)
  if ckpt.mesh is None:
    return np.mean([jax.device_get(run(*arrays, draw)) for draw in range(draws)], axis=0)
  index, count = sharding.batch_shard(ckpt.mesh)
  size = len(arrays[0])
  block = slice(index * size // count, (index + 1) * size // count)
  with jax.set_mesh(ckpt.mesh):
    placed = sharding.put_batch(tuple(x[block] for x in arrays), ckpt.mesh)
    local = [sharding.local_rows(run(*placed, draw)) for draw in range(draws)]
  return sharding.all_rows(np.mean(local, axis=0), ckpt.mesh)
