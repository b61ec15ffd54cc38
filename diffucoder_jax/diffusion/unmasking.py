"""One step of denoising: from logits to the tokens that are written, and where.

Everything is per row and float32, whatever the network's dtype.
"""

import flax
import jax
import jax.numpy as jnp

from diffucoder_jax.diffusion import proposal, remasking

TOKEN, POSITION = 0, 1  # what a number is drawn for
STABLE_EVALUATIONS = 2  # as in KLASS: so many changes in a row have to be small


def noise_keys(row_keys_B, step_B, logical_BL):
  """One key per position, from (row key, step, position among the row's real tokens).

  Padding and neighbours are not in it, so they cannot change what a row draws.
  """

  def row(key, step, logical_L):
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(logical_L)

  return jax.vmap(row)(row_keys_B, step_B, logical_BL)


def draw(distribution, keys_BL, purpose):
  """One random number for each position, float32 [B, L]."""
  one = lambda key: distribution(jax.random.fold_in(key, purpose))  # noqa: E731
  return jax.vmap(jax.vmap(one))(keys_BL)


@flax.struct.dataclass
class Memory:
  """What `SamplerConfig.kl_bound` compares with. Costs as much as the logits."""

  probs: jax.Array  # float32 [B, S, V], of the last evaluation
  stable: jax.Array  # int32 [B, S], evaluations in a row that hardly changed it; -1: before any


def forgetting(shape):
  """The `Memory` before the first evaluation; shape: [B, S, V]."""
  return Memory(jnp.zeros(shape), jnp.full(shape[:2], -1, jnp.int32))


@flax.struct.dataclass
class Choice:
  """What a step would write at each position, and `chosen`, where it does; all [B, S].

  Where nothing is masked, the other fields say nothing."""

  tokens: jax.Array  # int32
  chosen: jax.Array  # bool
  confidence: jax.Array  # float32, the strategy's
  entropy: jax.Array  # float32, nats, of the filtered distribution
  # Of `SamplerConfig.alternatives`, K: the likeliest tokens, int32 [B, S, K], and their probabilities.
  alternatives: jax.Array | None
  alternative_probs: jax.Array | None
  standing: jax.Array | None  # float32, the probability of what stands there, where it was judged


def choose(
  x_BSX, unembed, masked_BS, count_B, chance_B, keys_BS, index_BS, config, mask_id, memory=None,
  rules=None, standing_BS=None, judged_BS=None,
):  # fmt: skip
  """Chooses tokens and positions.

  Args:
    x_BSX, unembed: what makes the logits of positions, as for `proposal.propose_where`.
    masked_BS: bool, positions that may be written.
    count_B: int32, positions that the schedule commits.
    chance_B: float32; "origin" commits each position with it instead.
    keys_BS: `noise_keys`; None when nothing is drawn (`draws`).
    index_BS: int32, places among the row's real tokens.
    config: `SamplerConfig`. mask_id: int, never written. memory: `Memory`, with `kl_bound`.
    rules: `constraints.Rules` or None. Where these allow no token nothing is chosen.
    standing_BS, judged_BS: what stands on the canvas, int32, and of which positions `Choice.standing`
      is wanted, bool; None: of none.
  Returns:
    (`Choice`, memory).
  """
  c = config
  needed_BS, chosen_BS = masked_BS, None
  # Where the logits say nothing of the positions, those of the others are not wanted.
  if c.alg in remasking.BLIND and not c.in_parallel and rules is None:
    confidence_BS = remasking.CONFIDENCE["left_to_right"](None, None, index_BS)
    chosen_BS = needed_BS = _positions(confidence_BS, masked_BS, count_B, chance_B, keys_BS, c)
  if judged_BS is not None:
    needed_BS |= judged_BS
  found = proposal.propose_where(
    needed_BS, x_BSX, unembed,
    draw(jax.random.uniform, keys_BS, TOKEN) if c.temperature > 0 else None,
    index_BS, c, mask_id, before_BSV=memory.probs if memory else None, rules=rules,
    standing_BS=None if judged_BS is None else standing_BS,
  )  # fmt: skip
  if rules is not None:
    masked_BS &= found["possible"]
  if chosen_BS is None:
    chosen_BS = _positions(found["confidence"], masked_BS, count_B, chance_B, keys_BS, c)
  if c.entropy_bound:
    chosen_BS |= remasking.within_entropy_bound(
      c.entropy_bound, found["confidence"], masked_BS, found["entropy"]
    )
  if c.threshold < 1:  # Fast-dLLM, Wu et al. 2025, arXiv 2505.22618
    sure_BS = masked_BS & (found["probability"] > c.threshold)
    if c.kl_bound:
      small_BS = found["divergence"] < c.kl_bound
      memory = Memory(found["probs"], jnp.where(small_BS, memory.stable + 1, 0))
      sure_BS &= memory.stable >= STABLE_EVALUATIONS
    chosen_BS |= sure_BS
  return Choice(
    found["tokens"], chosen_BS, found["confidence"], found["entropy"], found.get("alternatives"),
    found.get("alternative_probs"), found.get("standing"),
  ), memory  # fmt: skip


def _positions(confidence_BS, masked_BS, count_B, chance_B, keys_BS, c):
  """Those that the schedule commits, bool [B, S]."""
  with jax.named_scope("choose_positions"):
    if c.alg == "origin":  # each position on its own, so the number committed varies
      return masked_BS & (draw(jax.random.uniform, keys_BS, POSITION) < chance_B[:, None])
    if c.alg_temp > 0:
      gumbel_BS = draw(jax.random.gumbel, keys_BS, POSITION)
      return remasking.choose_positions(confidence_BS / c.alg_temp, masked_BS, count_B, gumbel_BS)
    return remasking.choose_positions(confidence_BS, masked_BS, count_B)


def draws(config):
  """Whether anything is random under this `SamplerConfig`."""
  return config.temperature > 0 or config.alg_temp > 0 or config.alg == "origin"
