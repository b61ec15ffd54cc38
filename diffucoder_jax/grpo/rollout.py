"""Rollouts: which problems a round asks, what was answered, and the batch that updates learn from.

Everything random is a function of (key, round, row), so a round can be sampled again bit for bit
from the parameters it began with.
"""

import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import canvas, sampler
from diffucoder_jax.grpo import objective
from diffucoder_jax.model.transformer import canvas_features_fn, unembed_fn
from diffucoder_jax.runtime import hosts, sharding

LENGTH_STEP = 32  # prompts are padded to multiples of this, so that few programs are compiled
SLOTS_STEP = 8


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


def canvas_length(longest, most, new):
  """Length of a round's canvases: the longest prompt, rounded up but not above `most`, and `new`."""
  return min(longest + -longest % LENGTH_STEP, most) + new


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(model, config, mask_id, eos_id, params, canvas_BL, valid_BL, key, rows_B):
  keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
  slots = config.max_new_tokens + -config.max_new_tokens % SLOTS_STEP
  return sampler.generate(
    canvas_features_fn(model, params), canvas_BL, valid_BL, keys_B, config,
    mask_id=mask_id, eos_id=eos_id, slots=slots, unembed=unembed_fn(model, params),
  )  # fmt: skip


def sample(model, params, rows, row_ids, key, config, mask_id, eos_id, mesh, max_prompt):
  """Answers this process's prompts on the training mesh.

  Args:
    model, params: the policy. rows: token ids of this process's rows of the global batch.
    row_ids: int32, their global numbers; row r draws from fold_in(key, r).
    key: PRNG key of the round. config: `SamplerConfig`. mask_id, eos_id: ids; `eos_id` is read by
      `stop_at_eos`.
    mesh: the mesh. max_prompt: no prompt has more tokens.
  Returns:
    `sampler.Trace` of this process's rows on the host, [rows, L]; L is `canvas_length`.
  """
  longest = int(hosts.largest_everywhere(max(map(len, rows))))
  length = canvas_length(longest, max_prompt, config.max_new_tokens)
  canvas_BL, valid_BL = canvas.lay_out(rows, length, config.max_new_tokens, mask_id)
  placed = sharding.put_batch((canvas_BL, valid_BL, np.asarray(row_ids, np.int32)), mesh)
  trace = _sample(model, config, mask_id, eos_id, params, placed[0], placed[1], key, placed[2])
  return jax.tree.map(sharding.local_rows, trace)


def completions(trace, new):
  """Token ids of what was written, int32 [rows, new]: canvases end with it."""
  return np.asarray(trace.tokens)[:, -new:]


def answer_ids(ids, end_ids):
  """`ids` before the first of `end_ids`."""
  return ids[: next((i for i, token in enumerate(ids) if token in end_ids), len(ids))]


def make_batch(trace, length, new, end_id):
  """{name: numpy array}, what `Batch` holds of the answers themselves, left-padded to `length`."""
  tokens, valid = np.asarray(trace.tokens), np.asarray(trace.valid)
  grow = ((0, 0), (length - tokens.shape[1], 0))
  tokens_BL, valid_BL = np.pad(tokens, grow), np.pad(valid, grow)
  completion_BL = np.zeros(tokens_BL.shape, bool)
  completion_BL[:, -new:] = True
  scored_BL = np.asarray(objective.completion_mask(tokens_BL, completion_BL, end_id))
  return {
    "tokens": tokens_BL, "valid": valid_BL, "completion": completion_BL, "scored": scored_BL
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
