"""One step of denoising: from logits to the tokens that are written, and where.

Everything is per row and float32, whatever the network's dtype.
"""

import flax
import jax
import jax.numpy as jnp

from diffucoder_jax.diffusion import remasking

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
  """What a step would write at each position, and `chosen`, where it does; all [B, S]."""

  tokens: jax.Array  # int32
  chosen: jax.Array  # bool
  confidence: jax.Array  # float32, the strategy's
  entropy: jax.Array  # float32, nats, of the filtered distribution
  probs: jax.Array  # float32 [B, S, V], the filtered distribution


def choose(
  logits_BSV, masked_BS, count_B, chance_B, keys_BS, index_BS, config, mask_id, memory=None, rules=None,
):  # fmt: skip
  """Chooses tokens and positions.

  Args:
    logits_BSV: target-aligned, any float dtype.
    masked_BS: bool, positions that may be written.
    count_B: int32, positions that the schedule commits.
    chance_B: float32; "origin" commits each position with it instead.
    keys_BS: `noise_keys`; None when nothing is drawn (`draws`).
    index_BS: int32, places on the canvas.
    config: `SamplerConfig`. mask_id: int, never written. memory: `Memory`, with `kl_bound`.
    rules: `constraints.Rules` or None. Where these allow no token nothing is chosen.
  Returns:
    (`Choice`, memory).
  """
  c = config
  logits_BSV = logits_BSV.astype(jnp.float32)
  with jax.named_scope("choose_tokens"):
    if rules is not None:
      logits_BSV, possible_BS = rules.on_logits(logits_BSV)
      masked_BS &= possible_BS
    filtered_BSV = remasking.filter_logits(logits_BSV, c.temperature, c.top_p, c.top_k)
    uniform_BS = draw(jax.random.uniform, keys_BS, TOKEN) if c.temperature > 0 else None
    drawn_BS, tokens_BS, probs_BSV = remasking.draw_tokens(
      logits_BSV, filtered_BSV, mask_id, uniform_BS
    )
    if rules is not None:
      ruled_BS = rules.on_tokens(tokens_BS)
      drawn_BS = jnp.where(ruled_BS == tokens_BS, drawn_BS, ruled_BS)
      tokens_BS = ruled_BS
    confidence_BS = remasking.CONFIDENCE[c.alg](probs_BSV, drawn_BS, index_BS)
    entropy_BS = -remasking.negative_entropy(probs_BSV)
  with jax.named_scope("choose_positions"):
    if c.alg == "origin":  # each position on its own, so the number committed varies
      chosen_BS = masked_BS & (draw(jax.random.uniform, keys_BS, POSITION) < chance_B[:, None])
    elif c.alg_temp > 0:
      gumbel_BS = draw(jax.random.gumbel, keys_BS, POSITION)
      scores_BS = confidence_BS / c.alg_temp
      chosen_BS = remasking.choose_positions(scores_BS, masked_BS, count_B, gumbel_BS)
    else:
      chosen_BS = remasking.choose_positions(confidence_BS, masked_BS, count_B)
    if c.entropy_bound:
      chosen_BS |= remasking.within_entropy_bound(
        c.entropy_bound, confidence_BS, masked_BS, entropy_BS
      )
    if c.threshold < 1:
      sure_BS = masked_BS & remasking.surer_than(c.threshold, probs_BSV, drawn_BS)
      if c.kl_bound:
        small_BS = remasking.divergence(probs_BSV, memory.probs) < c.kl_bound
        memory = Memory(probs_BSV, jnp.where(small_BS, memory.stable + 1, 0))
        sure_BS &= memory.stable >= STABLE_EVALUATIONS
      chosen_BS |= sure_BS
  return Choice(tokens_BS, chosen_BS, confidence_BS, entropy_BS, probs_BSV), memory


def draws(config):
  """Whether anything is random under this `SamplerConfig`."""
  return config.temperature > 0 or config.alg_temp > 0 or config.alg == "origin"
