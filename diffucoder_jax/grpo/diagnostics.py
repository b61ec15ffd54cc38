"""What tells whether coupled-GRPO is healthy: how noisy the scores are, and how far ratios stray.

Dimension key: K independent draws of an estimator, B rows, L positions, P prompts, G completions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.grpo import objective


def _masked_mean(x_BL, mask_BL):
  count = jnp.sum(mask_BL)
  return jnp.sum(jnp.where(mask_BL, x_BL, 0.0)) / jnp.maximum(count, 1)


# ---------------------------------------------------------------------------------------------
# The estimator's noise


def score_variance(scores_KBL, mask_BL):
  """How much a token's score varies over draws of its masks: unbiased, averaged over the tokens.

  Args:
    scores_KBL: float32, the same completions scored with K >= 2 independent keys.
    mask_BL: bool, the tokens that count.
  Returns:
    float32 scalar, nats squared.
  """
  if len(scores_KBL) < 2:
    raise ValueError(f"a variance needs at least 2 draws of the scores, got {len(scores_KBL)}")
  return _masked_mean(jnp.var(scores_KBL, axis=0, ddof=1), mask_BL)


def estimator_variance(score_fn, estimator, key, draws, mask_BL):
  """The estimator's variance beside that of `decoupled`, on the same completions.

  Args:
    score_fn: (key, estimator) -> float32 [B, L], scores with masks drawn from that key.
    estimator: `masks.Estimator`.
    key: PRNG key.
    draws: at least 2; costs 2 * draws scorings.
    mask_BL: bool.
  Returns:
    dict of float32 scalars: `variance` and `variance_decoupled` in nats squared, and their quotient
    `variance_ratio`, below 1 where the estimator is the better one. The difference should be near
    v^2 / (2 lambda) times the square of the weight (Gong et al. 2025, A.4).
  """
  keys = jax.random.split(key, draws)

  def variance(e):
    return score_variance(jax.lax.map(lambda k: score_fn(k, e), keys), mask_BL)

  mine = variance(estimator)
  theirs = variance(dataclasses.replace(estimator, name="decoupled", causal=False))
  ratio = jnp.where(theirs > 0, mine / jnp.where(theirs > 0, theirs, 1.0), 0.0)
  return {"variance": mine, "variance_decoupled": theirs, "variance_ratio": ratio}


def coverage(passes, scored_BL):
  """(least, most) passes that score one of the tokens, int32; least 0: a token without a score."""
  times_BL = jnp.sum(passes.weights != 0, axis=0)
  most = jnp.iinfo(jnp.int32).max
  return jnp.min(jnp.where(scored_BL, times_BL, most)), jnp.max(jnp.where(scored_BL, times_BL, 0))


# ---------------------------------------------------------------------------------------------
# Ratios and rewards


def effective_share(ratio, ratio_squared):
  """Effective sample size as a share of the tokens, in (0, 1]: mean(rho)^2 / mean(rho^2).

  1 when all ratios are equal; 1 / n when one of n tokens carries everything. Takes the means of
  `policy_loss`'s metrics, whatever they were summed over.
  """
  return jnp.where(ratio_squared > 0, jnp.square(ratio) / jnp.maximum(ratio_squared, 1e-30), 1.0)


def ratio_extremes(new_BL, old_BL, mask_BL):
  """Dict of float32 scalars: `ratio_min`, `ratio_max` and `ratio_effective_share` of the tokens."""
  mask_BL = jnp.asarray(mask_BL, bool)
  ratio_BL = jnp.exp(objective.log_ratio(new_BL, old_BL, mask_BL))  # 1 outside the mask
  first, second = _masked_mean(ratio_BL, mask_BL), _masked_mean(jnp.square(ratio_BL), mask_BL)
  return {
    "ratio_min": jnp.min(jnp.where(mask_BL, ratio_BL, jnp.inf)),
    "ratio_max": jnp.max(jnp.where(mask_BL, ratio_BL, -jnp.inf)),
    "ratio_effective_share": effective_share(first, second),
  }


def reward_summary(rewards_PG, valid_PG=None):
  """Dict of floats about a round's rewards, on the host; invalid ones are counted and left out.

  `reward` and `reward_std` over all valid ones, `reward_masked` the share of invalid ones, and
  `zero_variance` the share of the groups whose valid rewards are all equal.
  """
  rewards_PG = np.asarray(rewards_PG, np.float64)
  valid_PG = np.ones(rewards_PG.shape, bool) if valid_PG is None else np.asarray(valid_PG, bool)
  valid_N = rewards_PG[valid_PG]
  selection = objective.select_groups(rewards_PG, "keep", valid_PG)
  return {
    "reward": float(valid_N.mean()) if len(valid_N) else 0.0,
    "reward_std": float(valid_N.std()) if len(valid_N) else 0.0,
    "reward_masked": 1.0 - float(valid_PG.mean()),
    "zero_variance": float(selection.zero_variance.mean()),
  }


def answer_summary(completion_mask_BL, completion_BL, entropy_BL=None):
  """Dict of float32 scalars about the answers themselves.

  Args:
    completion_mask_BL: bool, up to and including the first end token. completion_BL: bool, all of
      the completion. entropy_BL: float32 nats, as the sampler's trace has them: of the distribution
      each token was drawn from. None leaves `entropy` out.
  Returns:
    `length` in tokens; `unended`, the share of answers that fill the whole completion (one that
    ends on the last position counts as such); `entropy`, its mean over the answers' tokens.
  """
  length_B = jnp.sum(completion_mask_BL, axis=1)
  filled_B = length_B == jnp.sum(completion_BL, axis=1)
  result = {
    "length": jnp.mean(length_B.astype(jnp.float32)),
    "unended": jnp.mean(filled_B.astype(jnp.float32)),
  }
  if entropy_BL is not None:
    result["entropy"] = _masked_mean(entropy_BL, completion_mask_BL)
  return result


# ---------------------------------------------------------------------------------------------
# Collapse


@dataclasses.dataclass(frozen=True)
class Limits:
  """When to call it a collapse, against the run's own beginning. 0 turns a limit off.

  Attributes:
    logp_change: nats per token that the mean score may move either way.
    entropy_share: share of its first value below which the entropy may not fall.
    reward_share: share of its first value below which the mean reward may not fall.
  """

  logp_change: float = 0.0
  entropy_share: float = 0.0
  reward_share: float = 0.0


def collapse(first, now, limits):
  """What has gone wrong between two sets of metrics, as sentences; an empty list if nothing has.

  Args:
    first, now: dicts of floats with `logp`, `entropy`, `reward`, averaged over enough rounds to be
      compared; a metric that is missing in either is not judged. A number that is not finite always
      is a collapse.
    limits: `Limits`.
  """
  found = [f"{name} is {x}" for name, x in now.items() if not abs(float(x)) < float("inf")]
  both = first.keys() & now.keys()
  if limits.logp_change and "logp" in both:
    moved = now["logp"] - first["logp"]
    if abs(moved) > limits.logp_change:
      found.append(
        f"logp moved by {moved:+.3g} nats per token since the start, more than {limits.logp_change}"
      )
  for name, share in (("entropy", limits.entropy_share), ("reward", limits.reward_share)):
    if share and name in both and now[name] < share * first[name]:
      found.append(f"{name} fell from {first[name]:.3g} to {now[name]:.3g}, below {share} of it")
  return found
