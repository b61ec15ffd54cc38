"""What to write at each masked position, how sure that is, and which positions to commit.

The strategies are Dream's; reference.md section 3 is matched exactly where Dream behaves. All maths
is float32 whatever the network's dtype (Dream's own runs it in the logits' dtype).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

REMOVED = jnp.finfo(jnp.float32).min  # as in the reference: finite, so that nothing becomes NaN


def filter_logits(logits_BLV, temperature=0.0, top_p=1.0, top_k=0):
  """Temperature, then nucleus, then top-k, in Dream's order; removed logits become `REMOVED`.

  Args:
    logits_BLV: float32.
    temperature: divides the logits when > 0; 0 leaves them, but does not skip the other two.
    top_p: keeps the most likely tokens up to the one whose cumulative probability crosses it.
    top_k: keeps every logit >= the k-th largest (ties all stay); 0: off.
  """
  if temperature > 0:
    logits_BLV = logits_BLV / temperature
  if top_p < 1.0:
    probs_BLV = jax.nn.softmax(logits_BLV, axis=-1)
    smallest_BL = _nucleus_edge(probs_BLV, top_p)
    logits_BLV = jnp.where(probs_BLV < smallest_BL[..., None], REMOVED, logits_BLV)
  if 0 < top_k < logits_BLV.shape[-1]:
    kth_BL = jax.lax.top_k(logits_BLV, top_k)[0][..., -1]
    logits_BLV = jnp.where(logits_BLV < kth_BL[..., None], REMOVED, logits_BLV)
  return logits_BLV


def _nucleus_edge(probs_BLV, top_p):
  """Smallest probability that the nucleus keeps, float32 [B, L].

  A token stays when the tokens that are more likely than it do not yet exceed top_p together; so
  the one that crosses stays, and tied tokens stay or go together (a sort would split them). Found
  by bisection over the bits of a non-negative float, which are ordered like its value: 31 sums
  instead of a sort, which takes 10 times as long on CPU and is worse on TPU.
  """
  return jax.lax.platform_dependent(
    probs_BLV,
    cpu=functools.partial(_edge_by_position, top_p=top_p),
    default=functools.partial(_edge_at_once, top_p=top_p),
  )


def _edge_by_position(probs_BLV, top_p):
  """`_edge_at_once`, a position of all rows at a time: that much stays in a CPU's caches through the
  31 sums, which makes them four times as fast."""

  def one(i, edge_BL):
    probs_B1V = jax.lax.dynamic_slice_in_dim(probs_BLV, i, 1, axis=1)
    edge_B1 = _edge_at_once(probs_B1V, top_p)
    return jax.lax.dynamic_update_slice_in_dim(edge_BL, edge_B1, i, axis=1)

  return jax.lax.fori_loop(0, probs_BLV.shape[1], one, jnp.zeros_like(probs_BLV[..., 0]))


def _edge_at_once(probs_BLV, top_p):
  """The bisection of `_nucleus_edge`, of all positions together."""

  def halve(_, bounds):
    low_BL, high_BL = bounds  # the edge lies in (low, high]
    middle_BL = low_BL + (high_BL - low_BL) // 2
    edge_BL = jax.lax.bitcast_convert_type(middle_BL, jnp.float32)
    above_BL = jnp.sum(jnp.where(probs_BLV > edge_BL[..., None], probs_BLV, 0.0), axis=-1)
    enough_BL = above_BL <= top_p
    return jnp.where(enough_BL, low_BL, middle_BL), jnp.where(enough_BL, middle_BL, high_BL)

  # -1 and 1.0: no token is more likely than 1, and bit pattern -1 is below every edge tried.
  low_BL = jnp.full(probs_BLV.shape[:-1], -1, jnp.int32)
  high_BL = jax.lax.bitcast_convert_type(jnp.ones(probs_BLV.shape[:-1], jnp.float32), jnp.int32)
  _, edge_BL = jax.lax.fori_loop(0, 31, halve, (low_BL, high_BL))
  return jax.lax.bitcast_convert_type(edge_BL, jnp.float32)


def _inverse_cdf(probs_BLV, uniform_BL, width=128):
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


def draw_tokens(logits_BLV, filtered_BLV, mask_id, uniform_BL=None):
  """The reference's token at each position, and the one to write, which is never `mask_id`.

  Args:
    logits_BLV: float32, as the network gave them.
    filtered_BLV: `filter_logits` of them.
    mask_id: int.
    uniform_BL: uniform numbers in [0, 1) for a draw; None: the most likely token (first on ties).
  Returns:
    (drawn_BL, tokens_BL, probs_BLV): `drawn` is what confidence is measured on. Where it is MASK
    the reference writes it, so that the position silently stays masked, perhaps to the end; here
    the best other token is written. Order and confidence stay the reference's.
  """
  probs_BLV = jax.nn.softmax(filtered_BLV, axis=-1)
  if uniform_BL is None:
    drawn_BL = jnp.argmax(probs_BLV, axis=-1)
  else:
    drawn_BL = _inverse_cdf(probs_BLV, uniform_BL)
  drawn_BL = drawn_BL.astype(jnp.int32)

  def best_other():
    is_mask_11V = (jnp.arange(logits_BLV.shape[-1]) == mask_id)[None, None, :]
    return jnp.argmax(jnp.where(is_mask_11V, -jnp.inf, logits_BLV), axis=-1).astype(jnp.int32)

  # Hardly ever wanted, and one more pass over all logits.
  other_BL = jax.lax.cond(jnp.any(drawn_BL == mask_id), best_other, lambda: drawn_BL)
  return drawn_BL, jnp.where(drawn_BL == mask_id, other_BL, drawn_BL), probs_BLV


def negative_entropy(probs_BLV):
  """Sum of p log(p + 1e-10), nats: higher is surer. Of the filtered, tempered distribution."""
  return jnp.sum(probs_BLV * jnp.log(probs_BLV + 1e-10), axis=-1)


def probability(probs_BLV, tokens_BL):
  """That of one token at each position, float32 [B, L]."""
  return jnp.take_along_axis(probs_BLV, tokens_BL[..., None], axis=-1)[..., 0]


def _probability(probs_BLV, drawn_BL, index_BL):
  return probability(probs_BLV, drawn_BL)


def _margin(probs_BLV, drawn_BL, index_BL):
  top_BL2 = jax.lax.top_k(probs_BLV, 2)[0]
  return top_BL2[..., 0] - top_BL2[..., 1]


# How sure a position is: (probs_BLV, drawn_BL, index_BL: its place on the canvas) -> float32 [B, L],
# higher commits first.
CONFIDENCE = {
  "origin": _probability,  # recorded only: origin picks positions at random
  "maskgit_plus": _probability,
  "topk_margin": _margin,  # of the two best, whatever was drawn
  "entropy": lambda probs_BLV, drawn_BL, index_BL: negative_entropy(probs_BLV),
  "left_to_right": lambda probs_BLV, drawn_BL, index_BL: -index_BL.astype(jnp.float32),
}


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
  "uniform": lambda steps, eps: np.float32(1) / np.arange(steps, 0, -1, dtype=np.float32),
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


def surer_than(threshold, probs_BLV, drawn_BL):
  """Positions whose token has a probability above the threshold (Fast-dLLM, Wu et al. 2025,
  arXiv 2505.22618); none at 1."""
  return probability(probs_BLV, drawn_BL) > threshold


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
