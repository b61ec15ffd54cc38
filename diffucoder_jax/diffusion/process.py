"""The forward process: which tokens become masks, and how much of a row may.

Everything here runs on the device from an explicit key and draws per global row, so that nothing
depends on the mesh, the process or the loader.
"""

import flax
import jax
import jax.numpy as jnp

T_MIN = 1e-3  # t = T_MIN + (1 - T_MIN) u, as DiffuLLaMA and LLaDA do: 1/t stays finite


@flax.struct.dataclass
class Noised:
  """One draw of the forward process."""

  tokens: jax.Array  # int32 [B, L], x_t: mask_id where masked
  masked: jax.Array  # bool [B, L]
  t: jax.Array  # float32 [B], the probability with which each maskable token was masked


def row_keys(key, rows):
  """One key per global row: fold_in(key, row)."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def _uniform_t(key, rows):
  return jax.vmap(lambda k: jax.random.uniform(k))(row_keys(key, rows))


def _stratified_t(key, rows):
  # Low discrepancy (Kingma et al. 2021, VDM, appendix I.1): one draw shared by the global batch,
  # spread evenly, so every batch covers all noise levels and the loss varies less.
  offset = jax.random.uniform(key)
  return (offset + jnp.arange(rows, dtype=jnp.float32) / rows) % 1.0


T_SAMPLERS = {"uniform": _uniform_t, "stratified": _stratified_t}


def sample_t(key, rows, t_sampler="uniform"):
  """Mask probabilities in (0, 1], float32 [rows]; `t_sampler` is a key of `T_SAMPLERS`."""
  if t_sampler not in T_SAMPLERS:
    raise ValueError(f"unknown t sampler {t_sampler!r}; choose one of {sorted(T_SAMPLERS)}")
  return T_MIN + (1.0 - T_MIN) * T_SAMPLERS[t_sampler](key, rows)


def mask_tokens(key, tokens_BL, maskable_BL, mask_id, t_B):
  """Masks each maskable token independently with its row's probability t.

  Args:
    key: PRNG key.
    tokens_BL: int32, the clean tokens.
    maskable_BL: bool, tokens that may be masked (no prompt, no padding, no first token of a
      document: nothing before it predicts it).
    mask_id: int.
    t_B: float32 in (0, 1].
  Returns:
    `Noised`.
  Source: the absorbing forward process, Gong et al. 2025, section 2 (alpha_t = 1 - t).
  """
  length = tokens_BL.shape[1]
  u_BL = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(row_keys(key, tokens_BL.shape[0]))
  masked_BL = (u_BL < t_B[:, None]) & maskable_BL
  return Noised(jnp.where(masked_BL, mask_id, tokens_BL), masked_BL, t_B)


def forward_process(key, tokens_BL, maskable_BL, mask_id, t_sampler="uniform"):
  """Draws one t per row (DiffuLLaMA: one per sequence) and masks with it; see `mask_tokens`."""
  t_key, mask_key = jax.random.split(key)
  t_B = sample_t(t_key, tokens_BL.shape[0], t_sampler)
  return mask_tokens(mask_key, tokens_BL, maskable_BL, mask_id, t_B)


def unconditional(key, prompt_BL, share):
  """The prompt tokens that are noised like all others, in a random `share` of the rows; bool [B, L].

  DiffuCoder's instruction tuning starts from weights that never saw a clean prompt, and turns the
  conditional mask on progressively in its first epoch (paper, B.1). How is not said: here each row
  is drawn on its own, and the caller lowers `share` linearly.

  Args:
    key: PRNG key. prompt_BL: bool, the prompts but for each row's first token. share: in [0, 1].
  """
  u_B = jax.vmap(lambda k: jax.random.uniform(k))(row_keys(key, prompt_BL.shape[0]))
  return prompt_BL & (u_B < share)[:, None]


def vary_rows(key, segment_ids_BL, maskable_BL, truncate_prob, prefix_prob):
  """Shortens some rows to a random length and keeps a random prefix of some others clean.

  Stage 1 does each to 1 % of the data (paper, B.1), so that the model meets lengths other than the
  full context and learns to continue a clean prefix.

  Args:
    key: PRNG key.
    segment_ids_BL: int32, 0 = padding.
    maskable_BL: bool.
    truncate_prob, prefix_prob: floats, share of rows for each; a row gets at most one of the two.
  Returns:
    (segment_ids_BL, maskable_BL): padding beyond the new length, nothing maskable in the prefix.
  """
  rows, length = segment_ids_BL.shape

  def draw(k):
    choice_key, cut_key = jax.random.split(k)
    return jax.random.uniform(choice_key), jax.random.randint(cut_key, (), 1, length)

  choice_B, cut_B = jax.vmap(draw)(row_keys(key, rows))
  beyond_BL = jnp.arange(length)[None, :] >= cut_B[:, None]
  truncated_BL = (choice_B < truncate_prob)[:, None] & beyond_BL
  prefixed_B = (choice_B >= truncate_prob) & (choice_B < truncate_prob + prefix_prob)
  prefix_BL = prefixed_B[:, None] & ~beyond_BL
  return jnp.where(truncated_BL, 0, segment_ids_BL), maskable_BL & ~truncated_BL & ~prefix_BL
