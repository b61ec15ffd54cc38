"""Left to right with a cache: each network evaluation reads one token and gives the next.

`generate` writes what `sampler.generate` writes with alg "left_to_right", one token a step and the same
keys, and returns the same `Trace`, so that all that is measured of denoised texts is measured of these.
It is for networks in which a token sees those before it and no others: what was computed for it once
holds for all later steps.
"""

import jax
import jax.numpy as jnp

from diffucoder_jax.diffusion import proposal, sampler, unmasking

ALG = "left_to_right"


def can_write(config, masks):
  """Whether `generate` writes what `sampler.generate` would with a causal network.

  Args:
    config: `SamplerConfig`.
    masks: int, of a row in all. Other than `config.max_new_tokens`: it has holes, too.
  """
  one_a_step = config.steps == 0 or config.steps >= masks
  in_order = config.alg == ALG and config.alg_temp == 0
  plain = not (config.in_parallel or config.block_size or config.alternatives)
  return in_order and one_a_step and plain and 0 < masks == config.max_new_tokens


def generate(logits_fn, canvas, valid, keys, config, *, mask_id, end_ids=()):
  """Continues rows.

  Args:
    logits_fn: (tokens_BS int32, start, cache) -> (logits_BV float32, cache), those of place
      `start` + S of each row, given the tokens of the S places before it and what it returned for
      the places before these; the first call has start 0 and the cache None.
    canvas: int32 [B, L], as of `canvas.lay_out`: rows that end at the same place, and then
      `config.max_new_tokens` places to write, whose content is not read.
    valid: bool [B, L], False on padding, which is left of the rows.
    keys: typed PRNG keys [B], one per row, as for `sampler.generate`. Read only when drawing.
    config: `SamplerConfig`, such that `can_write`.
    mask_id: int, never written; what places hold that a stopped row does not reach.
    end_ids: with `config.stop_at_eos`, a row stops at the first of these that it writes.
  Returns:
    `Trace`.
  """
  c = config
  new, first = c.max_new_tokens, canvas.shape[1] - c.max_new_tokens
  if not can_write(c, new):
    raise ValueError(
      f"one token after the other is alg {ALG!r} without alg_temp, with new tokens and as many steps "
      f"(0: as many as needed), not {c}"
    )
  if first < 1:
    raise ValueError("there is no token to start from; give each row at least one")
  if c.stop_at_eos and not end_ids:
    raise ValueError(
      "stop_at_eos needs an end token, and this vocabulary names none; give end_ids, or switch it off"
    )
  logical_BL = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)

  def write(step, logits_BV, trace, ended_B):
    """Chooses a token for the place of this step. Returns it as well: an ended row's is not kept."""
    index_B1 = jnp.broadcast_to(first + step, (len(canvas), 1))
    logical_B1 = jnp.take_along_axis(logical_BL, index_B1, axis=1)
    uniform_B1 = None
    if c.temperature > 0:
      keys_B1 = unmasking.noise_keys(keys, jnp.broadcast_to(step, len(canvas)), logical_B1)
      uniform_B1 = unmasking.draw(jax.random.uniform, keys_B1, unmasking.TOKEN)
    found = proposal.propose(logits_BV[:, None], uniform_B1, logical_B1, c, mask_id)
    tokens_B1 = found["tokens"]

    def put(x_BL, value_B1):
      old_B1 = jax.lax.dynamic_slice_in_dim(x_BL, step, 1, axis=1)
      value_B1 = jnp.where(ended_B[:, None], old_B1, value_B1)
      return jax.lax.dynamic_update_slice_in_dim(x_BL, value_B1, step, axis=1)

    trace = trace.replace(
      tokens=put(trace.tokens, tokens_B1),
      step=put(trace.step, jnp.broadcast_to(step, tokens_B1.shape)),
      confidence=put(trace.confidence, found["confidence"]),
      entropy=put(trace.entropy, found["entropy"]),
      nfe=trace.nfe + ~ended_B,
    )
    if c.stop_at_eos:
      ended_B |= jnp.any(tokens_B1 == jnp.asarray(end_ids)[None, :], axis=1)
    return trace, ended_B, tokens_B1

  def body(carry):
    step, cache, trace, ended_B, tokens_B1 = carry
    logits_BV, cache = logits_fn(tokens_B1, first + step - 1, cache)
    return step + 1, cache, *write(step, logits_BV, trace, ended_B)

  def unfinished(carry):
    step, _, _, ended_B, _ = carry
    return (step < new) & ~jnp.all(ended_B)

  zeros_BN = jnp.zeros((len(canvas), new), jnp.float32)
  start = sampler.Trace(
    tokens=jnp.full(zeros_BN.shape, mask_id, jnp.int32),
    step=jnp.full(zeros_BN.shape, -1, jnp.int32),
    confidence=zeros_BN,
    entropy=zeros_BN,
    nfe=jnp.zeros(len(canvas), jnp.int32),
    valid=valid,
  )
  logits_BV, cache = logits_fn(canvas[:, :first], 0, None)
  step = jnp.zeros((), jnp.int32)
  carry = step + 1, cache, *write(step, logits_BV, start, jnp.zeros(len(canvas), bool))
  _, _, trace, _, _ = jax.lax.while_loop(unfinished, body, carry)
  given = lambda value, dtype: jnp.full((len(canvas), first), value, dtype)  # noqa: E731
  return trace.replace(
    tokens=jnp.concatenate([canvas[:, :first], trace.tokens], axis=1),
    step=jnp.concatenate([given(-1, jnp.int32), trace.step], axis=1),
    confidence=jnp.concatenate([given(0, jnp.float32), trace.confidence], axis=1),
    entropy=jnp.concatenate([given(0, jnp.float32), trace.entropy], axis=1),
  )
