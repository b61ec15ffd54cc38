"""How well a model predicts held-out text, in bits per byte with an error bar."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.diffusion import process


def stratified_t(key, rows, draw, draws):
  """Noise level of one of `draws` evaluations of each row: each row sees all levels evenly.

  t = T_MIN + (1 - T_MIN) ((u_row + draw / draws) mod 1), float32 [rows]; `key` must be the same for
  all draws. Spreading a row's own draws takes most of the Monte-Carlo variance away.
  """
  u_B = jax.vmap(lambda k: jax.random.uniform(k))(process.row_keys(key, rows))
  return process.T_MIN + (1.0 - process.T_MIN) * ((u_B + draw / draws) % 1.0)


def nelbo_rows(nll_fn, key, tokens_BL, maskable_BL, mask_id, draw, draws):
  """One Monte-Carlo draw of each row's negative evidence lower bound.

  Args:
    nll_fn: (noisy_tokens_BL, targets_BL, needed_BL) -> nats per position, float32 [B, L].
    key: PRNG key, the same for every draw.
    tokens_BL, maskable_BL, mask_id: as in `process.mask_tokens`.
    draw, draws: this draw's index (may be traced) and how many there are.
  Returns:
    float32 [B], nats: sum over masked positions of nll / t. Its mean over draws estimates an upper
    bound of the row's negative log-likelihood (of its maskable tokens given the others).
  Source: Gong et al. 2025, Eq. 1 (Sahoo et al. 2024, Shi et al. 2024 for the bound).
  """
  t_key, mask_key = jax.random.split(key)
  t_B = stratified_t(t_key, tokens_BL.shape[0], draw, draws)
  noised = process.mask_tokens(
    jax.random.fold_in(mask_key, draw), tokens_BL, maskable_BL, mask_id, t_B
  )
  nll_BL = nll_fn(noised.tokens, tokens_BL, noised.masked)
  return jnp.sum(nll_BL, axis=1) / t_B


def bits_per_byte(nats, num_bytes):
  """Bits per byte of a set of rows, and its standard error.

  Args:
    nats: float [rows], negative log-likelihood (or its bound) of each row.
    num_bytes: [rows], UTF-8 bytes of the scored tokens of each row; rows without any are left out.
  Returns:
    (bits_per_byte, standard_error): ratio of totals; the error is the usual one of a ratio
    estimator over rows, so it holds both the choice of held-out rows and the Monte-Carlo noise.
  """
  nats, num_bytes = np.asarray(nats, np.float64), np.asarray(num_bytes, np.float64)
  nats, num_bytes = nats[num_bytes > 0], num_bytes[num_bytes > 0]
  if len(nats) < 2:
    raise ValueError(f"bits per byte needs at least 2 rows with text, got {len(nats)}")
  bits = nats / math.log(2)
  ratio = bits.sum() / num_bytes.sum()
  spread = np.sum((bits - ratio * num_bytes) ** 2) * len(bits) / (len(bits) - 1)
  return float(ratio), float(math.sqrt(spread) / num_bytes.sum())
