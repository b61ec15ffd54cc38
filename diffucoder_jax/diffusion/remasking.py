"""What to write at each masked position, how sure that is, and which positions to commit.

The strategies are Dream's; reference.md section 3 is matched exactly where Dream behaves. All maths
is float32 whatever the network's dtype (Dream's own runs it in the logits' dtype).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def filtered_probs(logits_BLV, temperature=0.0, top_p=1.0, top_k=0):
  """What is left after temperature, then nucleus, then top-k, in Dream's order; float32 [B, L, V].

  Args:
    logits_BLV: float32.
    temperature: divides the logits when > 0; 0 leaves them, but does not skip the other two.
    top_p: keeps the most likely tokens up to the one whose cumulative probability crosses it.
    top_k: keeps every logit >= the k-th largest (ties all stay); 0: off.
  """
  if temperature > 0:
    logits_BLV = logits_BLV / temperature
  top_BL1 = jnp.max(logits_BLV, axis=-1, keepdims=True)
  odds_BLV = jnp.exp(logits_BLV - top_BL1)  # to the most likely token
  probs_BLV = odds_BLV / jnp.sum(odds_BLV, axis=-1, keepdims=True)
  kept = []
  if top_p < 1.0:
    kept.append(probs_BLV >= _nucleus_edge(probs_BLV, top_p)[..., None])
  if 0 < top_k < logits_BLV.shape[-1]:
    # Of all logits: those that the nucleus removes are below those it keeps, so they change nothing
    # where it keeps k, and where it keeps fewer, all of these stay.
    kept.append(logits_BLV >= _kth_largest(logits_BLV, top_k)[..., None])
  if not kept:
    return probs_BLV
  odds_BLV = jnp.where(functools.reduce(jnp.logical_and, kept), odds_BLV, 0.0)
  return odds_BLV / jnp.sum(odds_BLV, axis=-1, keepdims=True)


def _nucleus_edge(probs_BLV, top_p):
  """Smallest probability that the nucleus keeps, float32 [B, L].

  A token stays when the tokens that are more likely than it do not yet exceed top_p together; so
  the one that crosses stays, and tied tokens stay or go together (a sort would split them).
  """
  # What is below so small a probability has not a half of 1 - top_p together.
  low_BL = jnp.full(probs_BLV.shape[:-1], (1 - top_p) / (2 * probs_BLV.shape[-1]), jnp.float32)
  # Each token between the bounds weighs more than the lower one: when they weigh less than two
  # such together, it is one token. The rest is for the rounding of sums over a whole vocabulary.
  alone = lambda low_BL, weight_BL: weight_BL + 1e-4 < 2 * low_BL  # noqa: E731
  return _edge(probs_BLV, probs_BLV, top_p, low_BL, jnp.max(probs_BLV, axis=-1), alone)


def _kth_largest(logits_BLV, k):
  """float32 [B, L], for `k` in 1..V - 1."""
  low_BL = jnp.nextafter(jnp.min(logits_BLV, axis=-1), -jnp.inf)
  alone = lambda low_BL, weight_BL: weight_BL < 2  # noqa: E731
  return _edge(logits_BLV, 1.0, k - 1, low_BL, jnp.max(logits_BLV, axis=-1), alone)


def _edge(values_BLV, weights_BLV, limit, low_BL, high_BL, alone):
  """The smallest of the values that has no more than `limit` of weight above it, float32 [B, L].

  Args:
    low_BL, high_BL: it is above the one, and not above the other.
    alone: (low_BL, weight_BL between the bounds) -> whether that can be one value only.

  By bisection over the bits of floats, which can be ordered like their values: up to 32 sums, often
  ten, instead of a sort, which takes longer on CPU and is worse on TPU; of a vocabulary that is
  sharded only sums cross devices.
  """

  def halve(bounds):
    low_BL, high_BL, above_low_BL, above_high_BL = bounds
    middle_BL = (low_BL & high_BL) + ((low_BL ^ high_BL) >> 1)  # rounded down; no overflow
    is_above_BLV = values_BLV > _value_of(middle_BL)[..., None]
    above_BL = jnp.sum(jnp.where(is_above_BLV, weights_BLV, 0.0), axis=-1)
    enough_BL = above_BL <= limit
    return (
      jnp.where(enough_BL, low_BL, middle_BL), jnp.where(enough_BL, middle_BL, high_BL),
      jnp.where(enough_BL, above_low_BL, above_BL), jnp.where(enough_BL, above_BL, above_high_BL),
    )  # fmt: skip

  def unfinished(bounds):
    low_BL, high_BL, above_low_BL, above_high_BL = bounds
    one_BL = alone(_value_of(low_BL), above_low_BL - above_high_BL)
    return jnp.any((low_BL + 1 < high_BL) & ~one_BL)

  start = (
    _order_of(low_BL), _order_of(high_BL), jnp.full_like(low_BL, jnp.inf), jnp.zeros_like(high_BL)
  )  # fmt: skip
  edge_BL = _value_of(jax.lax.while_loop(unfinished, halve, start)[1])
  return jnp.max(jnp.where(values_BLV <= edge_BL[..., None], values_BLV, -jnp.inf), axis=-1)


def _order_of(x):
  """int32 that are ordered like the float32; `_value_of` is the inverse."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # more bits make a negative float smaller


def _value_of(order):
  return jax.lax.bitcast_convert_type(order ^ ((order >> 31) & 0x7FFFFFFF), jnp.float32)


def _first_largest(x_BLV):
  """`jnp.argmax` over the vocabulary, which XLA on CPU takes token by token."""
  place_V = jnp.arange(x_BLV.shape[-1], dtype=jnp.int32)
  is_top_BLV = x_BLV == jnp.max(x_BLV, axis=-1, keepdims=True)
  return jnp.min(jnp.where(is_top_BLV, place_V[None, None, :], x_BLV.shape[-1] - 1), axis=-1)


def _inverse_cdf(probs_BLV, uniform_BL, width=32):
  """The token whose share of the cumulative probability `uniform_BL` falls into, int32 [B, L].

  One random number for each position instead of one for each token: on CPU the latter cost as much
  as the network. In two levels, blocks and then tokens, which keeps the sums short and exact, and
  lets a vocabulary that is sharded exchange one block instead of everything.
  """
  pad = -probs_BLV.shape[-1] % width
  padded_BLV = jnp.pad(probs_BLV, ((0, 0), (0, 0), (0, pad))) if pad else probs_BLV
  blocks_BLNW = padded_BLV.reshape(*probs_BLV.shape[:-1], -1, width)
  upto_BLN = jnp.cumsum(jnp.sum(blocks_BLNW, axis=-1), axis=-1)
  target_BL1 = uniform_BL[..., None] * upto_BLN[..., -1:]
  # The first block that reaches beyond the target; rounding may leave none.
  last = upto_BLN.shape[-1] - 1
  block_BL1 = jnp.minimum(jnp.sum(upto_BLN <= target_BL1, axis=-1, keepdims=True), last)
  before_BL1 = jnp.take_along_axis(upto_BLN, jnp.maximum(block_BL1 - 1, 0), axis=-1)
  rest_BL1 = target_BL1 - jnp.where(block_BL1 > 0, before_BL1, 0.0)
  chosen_BLW = jnp.take_along_axis(blocks_BLNW, block_BL1[..., None], axis=-2)[..., 0, :]
  inside_BL = jnp.sum(jnp.cumsum(chosen_BLW, axis=-1) <= rest_BL1, axis=-1)
  possible_BL = width - 1 - jnp.argmax(chosen_BLW[..., ::-1] > 0, axis=-1)  # its last one
  return block_BL1[..., 0] * width + jnp.minimum(inside_BL, possible_BL)


def draw_tokens(logits_BLV, probs_BLV, mask_id, uniform_BL=None):
  """The reference's token at each position, and the one to write, which is never `mask_id`.

  Args:
    logits_BLV: float32, as the network gave them.
    probs_BLV: `filtered_probs` of them.
    mask_id: int.
    uniform_BL: uniform numbers in [0, 1) for a draw; None: the most likely token (first on ties).
  Returns:
    (drawn_BL, tokens_BL), int32: `drawn` is what confidence is measured on. Where it is MASK
    the reference writes it, so that the position silently stays masked, perhaps to the end; here
    the best other token is written. Order and confidence stay the reference's.
  """
  if uniform_BL is None:
    drawn_BL = _first_largest(probs_BLV)
  else:
    drawn_BL = _inverse_cdf(probs_BLV, uniform_BL).astype(jnp.int32)

  def best_other():
    is_mask_11V = (jnp.arange(logits_BLV.shape[-1]) == mask_id)[None, None, :]
    return _first_largest(jnp.where(is_mask_11V, -jnp.inf, logits_BLV))

  # Hardly ever wanted, and one more pass over all logits.
  other_BL = jax.lax.cond(jnp.any(drawn_BL == mask_id), best_other, lambda: drawn_BL)
  return drawn_BL, jnp.where(drawn_BL == mask_id, other_BL, drawn_BL)


def negative_entropy(probs_BLV):
  """Sum of p log(p + 1e-10), nats: higher is surer. Of the filtered, tempered distribution."""
  terms_BLV = probs_BLV * jnp.log(probs_BLV + 1e-10)
  # The `where` changes no term. XLA on CPU hands sums over to a library that takes four times as long for
  # a logarithm as XLA's own loops, and takes what is summed along with them, but not through a choice.
  return jnp.sum(jnp.where(probs_BLV > 0, terms_BLV, 0.0), axis=-1)


def probability(probs_BLV, drawn_BL, index_BL=None):
  """Of what was drawn, float32 [B, L]."""
  return jnp.take_along_axis(probs_BLV, drawn_BL[..., None], axis=-1)[..., 0]


def _margin(probs_BLV, drawn_BL, index_BL):
  first_BL1 = _first_largest(probs_BLV)[..., None]
  place_V = jnp.arange(probs_BLV.shape[-1], dtype=jnp.int32)
  others_BLV = jnp.where(place_V[None, None, :] == first_BL1, -jnp.inf, probs_BLV)
  return jnp.max(probs_BLV, axis=-1) - jnp.max(others_BLV, axis=-1)


# How sure a position is: (probs_BLV, drawn_BL, index_BL: its place in the row) -> float32 [B, L],
# higher commits first.
CONFIDENCE = {
  "origin": probability,  # recorded only: origin picks positions at random
  "maskgit_plus": probability,
  "topk_margin": _margin,  # of the two best, whatever was drawn
  "entropy": lambda probs_BLV, drawn_BL, index_BL: negative_entropy(probs_BLV),
  "left_to_right": lambda probs_BLV, drawn_BL, index_BL: -index_BL.astype(jnp.float32),
}

BLIND = ("origin", "left_to_right")  # which positions are committed says nothing of their tokens


def commit_count(alg, masked_B, step, steps_B, ratio_B):
  """How many masked positions each row commits at this step, int32 [B].

  Args:
    alg: strategy name.
    masked_B: int32, masks left in each row.
    step: this step's index (traced); steps_B: the number of each row's steps.
    ratio_B: float32, of this step; see `commit_ratios`.

  Dream truncates masked * (1 - s / t) and commits the rest at the last step, which makes the first
  step of N commit nothing and the last one two. It uses the batch's mean number of masks for every
  row, so a row with fewer masks overwrites its prompt; here each row counts its own.
  `left_to_right` spreads the masks evenly instead, one a step when there are enough steps.
  """
  if alg == "left_to_right":
    left_B = jnp.maximum(steps_B - step, 1)
    return (masked_B + left_B - 1) // left_B
  truncated_B = (masked_B.astype(jnp.float32) * ratio_B).astype(jnp.int32)
  return jnp.where(step >= steps_B - 1, masked_B, truncated_B)


@functools.cache
def commit_ratios(steps, eps, schedule="dream"):
  """Share of the remaining masks to commit at each step, float32 [steps], numpy.

  Args:
    steps: int. eps: the last noise level of "dream".
    schedule: "dream": 1 - s / t with t falling evenly from 1 to `eps`. "uniform": as many at each
      step. "cosine": few at first, when little is known (MaskGIT, Chang et al. 2022): cos(pi i / 2
      steps) of the masks are left after step i.
  """
  return SCHEDULES[schedule](steps, eps)


def _evenly(first, last, number):
  """`torch.linspace` in float32, bit for bit: from both ends, and rounded once.

  Others round otherwise, and then a step commits one position more or less now and then: of 3,000
  schedules those of `jnp.linspace` did so in 16.
  """
  first, last = np.float32(first), np.float32(last)
  apart, i = float((last - first) / np.float32(number - 1)), np.arange(number)
  return np.where(
    i < number // 2, float(first) + apart * i, float(last) - apart * (number - 1 - i)
  ).astype(np.float32)


def _shares(left_T1):
  """From the masks that are left before the first step and after each, to the shares committed."""
  return np.float32(1) - left_T1[1:] / left_T1[:-1]


SCHEDULES = {
  "dream": lambda steps, eps: _shares(_evenly(1.0, eps, steps + 1)),
  # A little more than 1: n times the rounded 1 / n may be less than 1, and would then commit nothing.
  "uniform": lambda steps, eps: np.float32(1 + 2**-22) / np.arange(steps, 0, -1, dtype=np.float32),
  "cosine": lambda steps, eps: _shares(np.cos(_evenly(0.0, np.pi / 2, steps + 1))),
}


def choose_positions(confidence_BL, masked_BL, count_B, gumbel_BL=None):
  """The `count_B` surest masked positions of each row, bool [B, L]; lowest index first on ties.

  With `gumbel_BL` (confidence already divided by alg_temp) the positions are drawn without
  replacement from softmax(confidence), which is what the largest perturbed scores are.
  """
  scores_BL = confidence_BL if gumbel_BL is None else confidence_BL + gumbel_BL
  scores_BL = jnp.where(masked_BL, scores_BL, -jnp.inf)
  order_BL = jnp.argsort(-scores_BL, axis=1, stable=True)
  rank_BL = jnp.argsort(order_BL, axis=1)
  return (rank_BL < count_B[:, None]) & masked_BL


# Decoding in parallel: what is committed beside the schedule's own positions, bool [B, L].


def within_entropy_bound(bound, confidence_BL, masked_BL, entropy_BL):
  """The surest positions that together leave out at most `bound` nats of dependence.

  As many, in the order of confidence, as keep the sum of their entropies without the largest one
  within the bound: that is the most that tokens drawn apart can lose against tokens drawn together
  (EB-Sampler, Ben-Hamu et al. 2025, arXiv 2505.24857). The first one always stays within it.
  """
  order_BL = jnp.argsort(jnp.where(masked_BL, -confidence_BL, jnp.inf), axis=1, stable=True)
  sorted_BL = jnp.take_along_axis(jnp.maximum(entropy_BL, 0.0), order_BL, axis=1)
  lost_BL = jnp.cumsum(sorted_BL, axis=1) - jax.lax.cummax(sorted_BL, axis=1)
  rank_BL = jnp.argsort(order_BL, axis=1)
  return jnp.take_along_axis(lost_BL <= bound, rank_BL, axis=1) & masked_BL


def divergence(probs_BLV, before_BLV):
  """KL(now || at the evaluation before), nats, float32 [B, L]: how much a position still changes
  (KLASS, Kim et al. 2025, arXiv 2511.05664)."""
  ratio_BLV = jnp.log(probs_BLV + 1e-10) - jnp.log(before_BLV + 1e-10)
  return jnp.sum(probs_BLV * ratio_BLV, axis=-1)
