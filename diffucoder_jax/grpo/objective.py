"""The objective of coupled-GRPO: group advantages, the clipped ratio, and a KL to a reference.

Dimension key: P prompts, G completions of each, B = P * G rows, L positions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Objective:
  """The objective's switches. Unknown keys are a TypeError, unknown names a ValueError.

  Paper versus code: advantages are "group_mean" in the paper's headline result and "leave_one_out"
  in the released code, which is G / (G - 1) times that. The code averages over the tokens of each
  micro-batch of each GPU and then over these ("micro_batch"), so that tokens in short micro-batches
  count for more; "token_mean" is global. The paper's Eq. 3 sums over tokens ("row_sum").

  Attributes:
    advantage: key of `ADVANTAGES`.
    scale_std: divide by the group's standard deviation, as GRPO does and neither of the two here.
    zero_variance: key of `ZERO_VARIANCE`.
    epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high].
    beta: weight of the KL to the reference; 0 needs no reference.
    aggregation: key of `AGGREGATIONS`.
  """

  advantage: str = "group_mean"
  scale_std: bool = False
  zero_variance: str = "keep"
  epsilon_low: float = 0.5
  epsilon_high: float = 0.5
  beta: float = 0.01
  aggregation: str = "token_mean"

  def __post_init__(self):
    _choice("advantage", self.advantage, ADVANTAGES)
    _choice("zero_variance", self.zero_variance, ZERO_VARIANCE)
    _choice("aggregation", self.aggregation, AGGREGATIONS)
    if not (0 <= self.epsilon_low <= 1 and self.epsilon_high >= 0):
      raise ValueError(
        f"objective.epsilon_low and epsilon_high are {self.epsilon_low} and {self.epsilon_high}; "
        "the first must lie in [0, 1], the second must not be negative"
      )
    if self.beta < 0:
      raise ValueError(f"objective.beta is {self.beta}; it must not be negative")


def _choice(what, name, table):
  if name not in table:
    raise ValueError(f"objective.{what} is {name!r}; choose one of {sorted(table)}")
  return table[name]


# ---------------------------------------------------------------------------------------------
# Rewards to advantages, on the host, where the rewards come from


def _group_mean(rewards_PG, total_P1, count_P1):
  return rewards_PG - total_P1 / np.maximum(count_P1, 1)


def _leave_one_out(rewards_PG, total_P1, count_P1):
  return rewards_PG - (total_P1 - rewards_PG) / np.maximum(count_P1 - 1, 1)


# Every function: (rewards, their sum, their number) -> rewards minus the baseline; invalid ones are 0.
ADVANTAGES = {"group_mean": _group_mean, "leave_one_out": _leave_one_out}


def _valid(rewards_PG, valid_PG):
  """(rewards, valid, number): rewards that take part, float32, and zeros for the others."""
  rewards_PG = np.asarray(rewards_PG, np.float32)
  valid_PG = np.ones(rewards_PG.shape, bool) if valid_PG is None else np.asarray(valid_PG, bool)
  rewards_PG = np.where(valid_PG, rewards_PG, np.float32(0))
  if not np.isfinite(rewards_PG).all():
    raise ValueError("a reward that counts is not finite; mark it as not valid")
  return rewards_PG, valid_PG, np.sum(valid_PG, axis=1, keepdims=True, dtype=np.float32)


def advantages(rewards_PG, kind="group_mean", scale_std=False, valid_PG=None):
  """How much better each completion is than the others for the same prompt.

  Args:
    rewards_PG: float, one row for each prompt; numpy.
    kind: "group_mean", r - mean(r), or "leave_one_out", r - mean of the others.
    scale_std: divide by (unbiased standard deviation + 1e-4), as the released code may.
    valid_PG: bool; rewards that could not be had (infrastructure) take no part, whatever number
      stands there. None: all did.
  Returns:
    numpy float32 [P, G]; 0 for invalid rewards and where a group has less than two valid ones.
  Raises:
    ValueError: a valid reward is not finite.
  """
  baseline = _choice("advantage", kind, ADVANTAGES)
  rewards_PG, valid_PG, count_P1 = _valid(rewards_PG, valid_PG)
  total_P1 = np.cumsum(rewards_PG, axis=1)[:, -1:]  # one by one: the same sum on every machine
  result_PG = baseline(rewards_PG, total_P1, count_P1)
  if scale_std:
    exact_PG = rewards_PG.astype(np.float64)
    mean_P1 = np.sum(exact_PG, axis=1, keepdims=True) / np.maximum(count_P1, 1)
    square_PG = np.where(valid_PG, np.square(exact_PG - mean_P1), 0.0)
    std_P1 = np.sqrt(np.sum(square_PG, axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1))
    result_PG = result_PG / (std_P1.astype(np.float32) + np.float32(1e-4))
  return np.where(valid_PG & (count_P1 > 1), result_PG, np.float32(0))


class Selection(NamedTuple):
  """Which groups an update learns from; numpy.

  Attributes:
    index: int32 [P], the group that stands in place p; gather rows with it.
    used: bool [P], False where place p takes no part in the loss.
    zero_variance: bool [P], the groups whose valid rewards are all equal: they teach nothing.
  """

  index: np.ndarray
  used: np.ndarray
  zero_variance: np.ndarray


def _substitute(zero_P):
  """Dream-Coder's `dynamic_filtering`: other groups of the batch stand in for those without signal.

  They draw the substitutes at random; here they are taken in turn, which needs no key and repeats
  none twice before all were. With no group to take, all stay as they are.
  """
  index_P, informative = np.arange(len(zero_P)), np.flatnonzero(~zero_P)
  if len(informative):
    index_P[zero_P] = informative[np.arange(zero_P.sum()) % len(informative)]
  return index_P, np.ones_like(zero_P)


# Every function: (zero_variance_P) -> (index_P, used_P). As released: kept, where only the KL acts.
ZERO_VARIANCE = {
  "keep": lambda zero_P: (np.arange(len(zero_P)), np.ones_like(zero_P)),
  "drop": lambda zero_P: (np.arange(len(zero_P)), ~zero_P),
  "substitute": _substitute,
}


def select_groups(rewards_PG, kind="keep", valid_PG=None):
  """Finds groups without variance in their rewards and keeps, drops or substitutes them.

  Args:
    rewards_PG, valid_PG: as in `advantages`.
    kind: key of `ZERO_VARIANCE`.
  Returns:
    `Selection`; count `zero_variance` whatever the kind is.
  """
  choose = _choice("zero_variance", kind, ZERO_VARIANCE)
  rewards_PG, valid_PG, _ = _valid(rewards_PG, valid_PG)
  top_P = np.max(np.where(valid_PG, rewards_PG, -np.inf), axis=1)
  low_P = np.min(np.where(valid_PG, rewards_PG, np.inf), axis=1)
  zero_P = ~(top_P - low_P > 1e-6)  # also without any valid reward, where the difference is -inf
  index_P, used_P = choose(zero_P)
  return Selection(index_P.astype(np.int32), used_P, zero_P)


# ---------------------------------------------------------------------------------------------
# The loss


def completion_mask(tokens_BL, completion_BL, end_id):
  """The completion up to and including its first end token; all of it if it has none. bool [B, L].

  As in the released code, where the end token is <|im_end|>: what follows gets no loss.
  """
  completion_BL = jnp.asarray(completion_BL, bool)
  end_BL = completion_BL & (jnp.asarray(tokens_BL) == end_id)
  ended_before_BL = jnp.cumsum(end_BL, axis=1) - end_BL > 0
  return completion_BL & ~ended_before_BL


def _row_lengths(mask_BL):
  length_B1 = jnp.sum(mask_BL, axis=1, keepdims=True).astype(jnp.float32)
  return length_B1, jnp.sum(length_B1 > 0).astype(jnp.float32)


def _token_mean(terms_BL, mask_BL):
  return jnp.sum(terms_BL), jnp.sum(mask_BL).astype(jnp.float32)


def _micro_batch(terms_BL, mask_BL):
  """As released: this micro-batch's own mean, each micro-batch counting the same.

  There it is the micro-batch of one GPU; here that of all devices, so that no mesh changes it.
  """
  total, count = _token_mean(terms_BL, mask_BL)
  return total / jnp.maximum(count, 1.0), jnp.ones((), jnp.float32)


def _row_mean(terms_BL, mask_BL):
  length_B1, rows = _row_lengths(mask_BL)
  return jnp.sum(terms_BL / jnp.maximum(length_B1, 1.0)), rows


def _row_sum(terms_BL, mask_BL):
  return jnp.sum(terms_BL), _row_lengths(mask_BL)[1]


# Every function: (terms_BL, 0 outside the mask; mask_BL) -> (sum, weight), divided once, globally.
AGGREGATIONS = {
  "token_mean": _token_mean,
  "micro_batch": _micro_batch,
  "row_mean": _row_mean,  # GRPO's own: each completion counts the same
  "row_sum": _row_sum,
}

MAX_LOG_RATIO = 20.0  # exp of more is no use to anybody, and one overflow would end the run


def log_ratio(new_BL, old_BL, mask_BL):
  """log(new / old) where the mask is True, 0 elsewhere, kept within +-`MAX_LOG_RATIO`."""
  difference_BL = jnp.where(mask_BL, new_BL - old_BL, 0.0)
  return jnp.clip(difference_BL, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(
  new_BL,
  old_BL,
  ref_BL,
  advantages_B,
  completion_mask_BL,
  config,
  valid_B=None,
  loss_weights_BL=None,
):
  """The clipped policy-gradient loss plus beta times the KL to the reference.

  -min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) + beta (exp(d) - d - 1), with
  rho = exp(new - old) and d = ref - new, per token, aggregated by `config.aggregation`. The last
  term is Schulman's k3 estimator; on weighted pseudo log-probabilities it is no KL of anything
  normalised, but is 0 where they agree and positive elsewhere.

  Args:
    new_BL: float32 scores (`logps.token_logps`); differentiable.
    old_BL: float32 scores of the policy that sampled; None: `new_BL` itself, without gradient, which
      is right for a single inner iteration.
    ref_BL: float32 scores of the reference; None if `config.beta` is 0.
    advantages_B: float32.
    completion_mask_BL: bool, see `completion_mask`.
    config: `Objective`.
    valid_B: bool; the other rows (no reward, or dropped) take no part. None: all do.
    loss_weights_BL: float32, what the policy's term counts for (`Passes.loss_weights`). None: 1.
  Returns:
    ((sum, weight), metrics): float32 scalars, as `optim.accumulated_value_and_grad` takes them;
    metrics is a dict of (sum, weight) pairs, means over the tokens that take part: `kl`, `ratio`,
    `ratio_squared` (see `diagnostics.effective_share`), `logp` (the new one), `logp_change` (new -
    old), and the shares where clipping stops the gradient: `clip_low` (advantage < 0, ratio below),
    `clip_high` (advantage > 0, ratio above) and `clip`, both.
  Source: Gong et al. 2025, Eq. 3; Apple's coupled_grpo.py, whose logged metrics mix up rows.
  """
  c = config
  if c.beta and ref_BL is None:
    raise ValueError(f"objective.beta is {c.beta}: policy_loss needs ref_BL; or set beta to 0")
  mask_BL = jnp.asarray(completion_mask_BL, bool)
  if valid_B is not None:
    mask_BL &= jnp.asarray(valid_B, bool)[:, None]
  old_BL = jax.lax.stop_gradient(new_BL if old_BL is None else old_BL)
  log_ratio_BL = log_ratio(new_BL, old_BL, mask_BL)
  ratio_BL = jnp.exp(log_ratio_BL)
  # A row that takes no part may have no finite advantage.
  advantage_BL = jnp.where(mask_BL, jnp.asarray(advantages_B, jnp.float32)[:, None], 0.0)
  clipped_BL = jnp.clip(ratio_BL, 1.0 - c.epsilon_low, 1.0 + c.epsilon_high)
  terms_BL = -jnp.minimum(ratio_BL * advantage_BL, clipped_BL * advantage_BL)
  if loss_weights_BL is not None:
    terms_BL *= loss_weights_BL
  count = jnp.sum(mask_BL).astype(jnp.float32)
  metrics = {}
  if c.beta:
    d_BL = log_ratio(jax.lax.stop_gradient(ref_BL), new_BL, mask_BL)
    kl_BL = jnp.exp(d_BL) - d_BL - 1.0
    terms_BL += c.beta * kl_BL
    metrics["kl"] = (jnp.sum(kl_BL), count)
  low_BL = mask_BL & (advantage_BL < 0) & (ratio_BL < 1.0 - c.epsilon_low)
  high_BL = mask_BL & (advantage_BL > 0) & (ratio_BL > 1.0 + c.epsilon_high)
  over_tokens = {
    "clip": low_BL | high_BL, "clip_low": low_BL, "clip_high": high_BL, "ratio": ratio_BL,
    "ratio_squared": jnp.square(ratio_BL), "logp": new_BL, "logp_change": log_ratio_BL,
  }  # fmt: skip
  for name, x_BL in over_tokens.items():
    metrics[name] = (jnp.sum(jnp.where(mask_BL, x_BL, 0.0)), count)
  terms_BL = jnp.where(mask_BL, terms_BL, 0.0)
  return AGGREGATIONS[c.aggregation](terms_BL, mask_BL), jax.lax.stop_gradient(metrics)


def ref_update(ref, params, alpha):
  """The reference policy moved towards the current one: (1 - alpha) ref + alpha params.

  Paper versus code: the paper's Algorithm 1 copies (alpha = 1); the recipe, through TRL, moves by
  0.6 every 64 optimiser steps. The sum is float32 and the result has the reference's dtype. alpha
  is a Python number, and 1 copies exactly, into new buffers: `params` may be donated afterwards.
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f"the reference's alpha is {alpha}; it must lie in [0, 1]")

  def one(old, new):
    if alpha == 1:
      return jnp.copy(new).astype(old.dtype)
    mixed = (1.0 - alpha) * old.astype(jnp.float32) + alpha * new.astype(jnp.float32)
    return mixed.astype(old.dtype)

  return jax.tree.map(one, ref, params)
