"""Rollouts: which problems a round asks, what was answered, and the batch that updates learn from.

Everything random is a function of (key, round, row), so a round can be sampled again bit for bit
from the parameters it began with.
"""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import queue
from diffucoder_jax.grpo import objective
from diffucoder_jax.model import windows


@flax.struct.dataclass
class Batch:
  """What the inner iterations of a round learn from; B rows, I inner iterations.

  Attributes:
    tokens: int32 [B, L], left-padded prompts and completions.
    valid: bool [B, L], False on padding.
    completion: bool [B, L], what was sampled.
    scored: bool [B, L], the completion up to and including its first end token.
    advantages: float32 [B].
    used: bool [B], False where there is no reward, or the group was dropped.
    rows, groups: int32 [B], what the row's masks are drawn from: its number and its prompt's.
    old: float32 [B, I, L], scores under the policy that sampled, with each iteration's masks.
    ref: the same under the reference; [B, 1, L] zeros without one.
  """

  tokens: jax.Array
  valid: jax.Array
  completion: jax.Array
  scored: jax.Array
  advantages: jax.Array
  used: jax.Array
  rows: jax.Array
  groups: jax.Array
  old: jax.Array
  ref: jax.Array


class Prompts(NamedTuple):
  """Problems with the token ids of their prompts."""

  problems: list
  ids: list[list[int]]


def encode_prompts(problems, tokenizer, system, primer, max_tokens):
  """Renders the problems' prompts, and leaves out those that are too long.

  Paper versus code: the released trainer cuts prompts to their last 200 tokens, which drops the
  system message and the question's beginning; here they are left out and counted.

  Returns:
    (`Prompts`, number of problems left out).
  Raises:
    ValueError: none is left.
  """
  ids = [
    chat.render_prompt([{"role": "user", "content": p.prompt}], tokenizer, system, primer)
    for p in problems
  ]
  kept = [i for i, row in enumerate(ids) if len(row) <= max_tokens]
  if not kept:
    raise ValueError(
      f"none of {len(problems)} prompts fits into rollout.max_prompt_tokens={max_tokens}; the "
      f"shortest has {min(map(len, ids), default=0)} tokens"
    )
  return Prompts([problems[i] for i in kept], [ids[i] for i in kept]), len(problems) - len(kept)


def problems_of_round(round_, count, number, seed):
  """Indices of the `count` problems that a round asks, of `number`: each once an epoch.

  Arithmetic on the round, so that nothing but the round has to be remembered.
  """
  places = [divmod(round_ * count + i, number) for i in range(count)]
  orders = {epoch: np.random.default_rng([seed, epoch]).permutation(number) for epoch, _ in places}
  return [int(orders[epoch][i]) for epoch, i in places]


@jax.jit
def row_keys(key, rows_B):
  """Row r draws from fold_in(key, r): `jax.random.key_data`, uint32 [B, 2]."""
  return jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(rows_B)


def sample(
  model_config, params, rows, key, config, mask_id, end_id, mesh, limit, batch_size=0
):
  """Answers prompts on the training mesh.

  Args:
    model_config, params: the policy's. rows: token ids of all prompts; row r draws from fold_in(key, r).
    key: PRNG key of the round. config: `SamplerConfig`. mask_id, end_id: ids; `end_id` is read by
      `stop_at_eos`. mesh: the mesh. limit: places of the longest prompt with its answer.
    batch_size: rows sampled together; 0: all.
  Returns:
    `sampler.Trace` of all rows on every host, numpy [rows, limit], left-padded.
  """
  batches = list(queue.write(
    windows.network(model_config), params, rows, np.asarray(row_keys(key, np.arange(len(rows)))), config,
    mask_id=mask_id, end_ids=(end_id,) if end_id >= 0 else (), mesh=mesh,
    batch_size=batch_size or len(rows), limit=limit,
  ))  # fmt: skip
  order = np.argsort(np.concatenate([batch.indices for batch in batches]))

  def whole(*parts):
    if parts[0].ndim > 1:
      parts = [np.pad(x, ((0, 0), (limit - x.shape[1], 0), *((0, 0),) * (x.ndim - 2))) for x in parts]
    return np.concatenate(parts)[order]

  return jax.tree.map(whole, *(batch.trace for batch in batches))


def completions(trace, new):
  """Token ids of what was written, int32 [rows, new]: canvases end with it."""
  return np.asarray(trace.tokens)[:, -new:]


def answer_ids(ids, end_ids):
  """`ids` before the first of `end_ids`."""
  return ids[: next((i for i, token in enumerate(ids) if token in end_ids), len(ids))]


def make_batch(trace, new, end_id):
  """{name: numpy array}, what `Batch` holds of the answers themselves."""
  completion_BL = np.zeros(trace.tokens.shape, bool)
  completion_BL[:, -new:] = True
  scored_BL = np.asarray(objective.completion_mask(trace.tokens, completion_BL, end_id))
  return {
    "tokens": trace.tokens, "valid": trace.valid, "completion": completion_BL, "scored": scored_BL
  }  # fmt: skip


def empty_batch(rows, iterations, length, with_ref, shard):
  """A `Batch` of `jax.ShapeDtypeStruct`, rows sharded by `shard`: what a checkpoint holds."""

  def spec(dtype, *shape):
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=shard)

  return Batch(
    tokens=spec(jnp.int32, length), valid=spec(bool, length), completion=spec(bool, length),
    scored=spec(bool, length), advantages=spec(jnp.float32), used=spec(bool),
    rows=spec(jnp.int32), groups=spec(jnp.int32),
    old=spec(jnp.float32, iterations, length),
    ref=spec(jnp.float32, iterations if with_ref else 1, length),
  )  # fmt: skip
