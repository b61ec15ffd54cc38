"""Losses of masked diffusion and of the autoregressive baseline, as (sum, weight) pairs.

A loss is divided once, globally: sum(sums) / sum(weights) over micro-batches and devices.
Logits are made by `cross_entropy`, never for a whole batch.
"""

import jax
import jax.numpy as jnp

from diffucoder_jax.diffusion.cross_entropy import weighted_nll


def cart_weights(masked_BL, segment_ids_BL, p=0.3):
  """Context-adaptive weights: a masked token counts by how much clean context is near it.

  w_i = 1/2 sum over clean j != i of p (1 - p)^(|i - j| - 1), within the segment.
  Source: CART of Dream (Ye et al. 2025); p = 0.3 as in dllm. Two linear recurrences, no [L, L].
  """
  clean_BL = (~masked_BL).astype(jnp.float32)

  def from_left(clean_BL, segment_BL):
    def step(carry, x):
      near_B, clean_B, segment_B = carry
      next_clean_B, next_segment_B = x
      inside_B = next_segment_B == segment_B
      near_B = jnp.where(inside_B, (1 - p) * near_B + p * clean_B, 0.0)
      return (near_B, next_clean_B, next_segment_B), near_B

    start = (jnp.zeros_like(clean_BL[:, 0]), jnp.zeros_like(clean_BL[:, 0]), segment_BL[:, 0])
    return jax.lax.scan(step, start, (clean_BL.T, segment_BL.T))[1].T

  left_BL = from_left(clean_BL, segment_ids_BL)
  right_BL = from_left(clean_BL[:, ::-1], segment_ids_BL[:, ::-1])[:, ::-1]
  return 0.5 * (left_BL + right_BL)


# Every function: (noised, segment_ids_BL) -> float32, broadcastable to [B, L].
WEIGHTS = {
  "1/t": lambda noised, _: 1.0 / noised.t[:, None],  # the NELBO's weight
  "1-t": lambda noised, _: 1.0 - noised.t[:, None],
  "cart": lambda noised, segment_ids_BL: cart_weights(noised.masked, segment_ids_BL),
  "none": lambda noised, _: jnp.ones_like(noised.t)[:, None],
}


def _per_token(counted_BL):
  return jnp.ones_like(counted_BL[:, :1], jnp.float32), jnp.sum(counted_BL).astype(jnp.float32)


def _per_sequence(maskable_BL):
  length_B1 = jnp.sum(maskable_BL, axis=1, keepdims=True).astype(jnp.float32)
  return 1.0 / jnp.maximum(length_B1, 1.0), jnp.sum(length_B1 > 0).astype(jnp.float32)


# Every function: (masked_BL, maskable_BL, segment_ids_BL) -> (factor per row [B, 1], weight).
# Paper versus code: the paper does not say. DiffuLLaMA, which it follows, divides by the *masked*
# tokens, which is not the NELBO (few masked tokens count as much as many); "maskable" is the NELBO
# per token. Both are here; configs choose and say so.
NORMALISERS = {
  "masked": lambda masked_BL, maskable_BL, _: _per_token(masked_BL),
  "maskable": lambda masked_BL, maskable_BL, _: _per_token(maskable_BL),
  "sequence": lambda masked_BL, maskable_BL, _: _per_sequence(maskable_BL),
  # Not the rows that `data.fill_batch` adds, in which there is nothing.
  "batch": lambda masked_BL, maskable_BL, segment_ids_BL: _per_token(
    jnp.any(segment_ids_BL > 0, axis=1, keepdims=True)
  ),
}


def diffusion_weights(noised, maskable_BL, segment_ids_BL, weight="1/t", normaliser="masked"):
  """What each position's negative log-likelihood counts for, and the divisor.

  Returns:
    (weights_BL float32, zero where not masked; weight: float32 scalar). The loss is
    sum(weights * nll) / weight.
  """
  for name, table in ((weight, WEIGHTS), (normaliser, NORMALISERS)):
    if name not in table:
      raise ValueError(f"unknown loss weight or normaliser {name!r}; choose one of {sorted(table)}")
  factor_B1, total = NORMALISERS[normaliser](noised.masked, maskable_BL, segment_ids_BL)
  weights_BL = WEIGHTS[weight](noised, segment_ids_BL) * factor_B1
  return jnp.where(noised.masked, weights_BL, 0.0), total


def masked_diffusion_loss(
  features_BLD,
  matrix_DV,
  tokens_BL,
  noised,
  maskable_BL,
  segment_ids_BL,
  weight="1/t",
  normaliser="masked",
):
  """The masked-diffusion training loss: weighted cross-entropy at the masked positions.

  Args:
    features_BLD: target-aligned features of `noised.tokens`.
    matrix_DV: output matrix.
    tokens_BL: int32, the clean tokens.
    noised: `process.Noised`.
    maskable_BL: bool.
    segment_ids_BL: int32.
    weight, normaliser: keys of `WEIGHTS`, `NORMALISERS`.
  Returns:
    ((loss_sum, weight), nll_BL): float32 scalars to be divided once, globally, and the unweighted
    nats per masked position, constants to gradients.
  Source: Gong et al. 2025, Eq. 1; DiffuLLaMA's train.py for the form with "1/t" and "masked".
  """
  weights_BL, total = diffusion_weights(noised, maskable_BL, segment_ids_BL, weight, normaliser)
  loss_sum, nll_BL = weighted_nll(features_BLD, matrix_DV, tokens_BL, noised.masked, weights_BL)
  return (loss_sum, total), nll_BL


def autoregressive_loss(features_BLD, matrix_DV, tokens_BL, maskable_BL):
  """Next-token cross-entropy: the same network with causal attention and every target.

  Returns: ((loss_sum, weight), nll_BL) as in `masked_diffusion_loss`; weight = number of targets.
  """
  ones_BL = maskable_BL.astype(jnp.float32)
  loss_sum, nll_BL = weighted_nll(features_BLD, matrix_DV, tokens_BL, maskable_BL, ones_BL)
  return (loss_sum, jnp.sum(ones_BL)), nll_BL
