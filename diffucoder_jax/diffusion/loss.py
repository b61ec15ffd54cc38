"""Losses of masked diffusion and of the autoregressive baseline, as (sum, weight) pairs.

A loss is divided once, globally: sum(sums) / sum(weights) over micro-batches and devices.
Logits never exist for a whole batch: `token_nll` makes them chunk by chunk, only for the positions
that carry loss, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from diffucoder_jax.runtime.sharding import BATCH_AXES, platform

# ---------------------------------------------------------------------------------------------
# Cross-entropy without [B, L, V]


def token_nll(features_BLD, matrix_DV, targets_BL, needed_BL, chunk=None):
  """Negative log-likelihood of each target, computed only where it is needed.

  Args:
    features_BLD: target-aligned features, float32 or bfloat16.
    matrix_DV: output matrix (`transformer.output_matrix`).
    targets_BL: int32 ids.
    needed_BL: bool; the rest costs nothing and gets 0.
    chunk: positions whose logits exist at one time on a device; None: `chunk_size`.
  Returns:
    float32 [B, L], in nats; differentiable in features and matrix.

  Each device gathers its needed positions to the front and loops over as many chunks as they fill;
  the backward pass makes the logits again. On a mesh, rows are sharded over (data, fsdp) and the
  vocabulary over `tensor`; the matrix is gathered over fsdp once, its gradient leaves by one
  reduce-scatter. Log-softmax is float32 whatever the features are.
  """
  targets_BL, needed_BL = jnp.asarray(targets_BL), jnp.asarray(needed_BL)
  chunk = chunk_size() if chunk is None else chunk
  return _token_nll(features_BLD, matrix_DV, targets_BL, needed_BL, chunk)


def chunk_size():
  """1024 positions; on a CPU 256: what fills the last chunk up is computed too, and there it shows."""
  return 256 if platform() == "cpu" else 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_nll(features_BLD, matrix_DV, targets_BL, needed_BL, chunk):
  return _forward(features_BLD, matrix_DV, targets_BL, needed_BL, chunk)[0]


def _forward(features_BLD, matrix_DV, targets_BL, needed_BL, chunk):
  def local(features, matrix, targets, needed, collectives):
    matrix = collectives.gather_matrix(matrix.astype(features.dtype))
    flat, order, chunks = _needed_first(features, needed, chunk)
    targets_N = targets.reshape(-1)

    def body(i, carry):
      nll_N, lse_N = carry
      index = order[i]
      logits_CV = _logits(flat, matrix, index)
      lse_C = collectives.logsumexp(logits_CV)
      nll_C = lse_C - collectives.pick(logits_CV, targets_N.at[index].get(mode="clip"))
      return (
        nll_N.at[index].set(nll_C, mode="drop"),
        lse_N.at[index].set(lse_C, mode="drop"),
      )

    zeros_N = jnp.zeros(flat.shape[0], jnp.float32)
    nll_N, lse_N = jax.lax.fori_loop(0, chunks, body, (zeros_N, zeros_N))
    nll = jnp.where(needed, nll_N.reshape(needed.shape), 0.0)
    return nll, lse_N.reshape(needed.shape)

  rows = P(BATCH_AXES)
  run = _on_mesh(local, (rows, P("fsdp", "tensor"), rows, rows), (rows, rows))
  nll_BL, lse_BL = run(features_BLD, matrix_DV, targets_BL, needed_BL)
  return nll_BL, (features_BLD, matrix_DV, targets_BL, needed_BL, lse_BL)


def _backward(chunk, saved, d_nll_BL):
  def local(features, matrix, targets, needed, lse, d_nll, collectives):
    param_dtype = matrix.dtype
    matrix = collectives.gather_matrix(matrix.astype(features.dtype))
    flat, order, chunks = _needed_first(features, needed, chunk)
    targets_N, lse_N = targets.reshape(-1), lse.reshape(-1)
    d_nll_N = jnp.where(needed, d_nll, 0.0).reshape(-1)

    def body(i, carry):
      d_flat, d_matrix = carry
      index = order[i]
      logits_CV = _logits(flat, matrix, index)
      # Indices past the end (the last chunk's filling) must contribute nothing.
      inside_C = index < flat.shape[0]
      scale_C = jnp.where(inside_C, d_nll_N.at[index].get(mode="clip"), 0.0)
      p_CV = jnp.exp(logits_CV - lse_N.at[index].get(mode="clip")[:, None])
      target_CV = collectives.one_hot(targets_N.at[index].get(mode="clip"), logits_CV.shape[1])
      d_logits_CV = ((p_CV - target_CV) * scale_C[:, None]).astype(flat.dtype)
      d_x_CD = jnp.einsum("CV,DV->CD", d_logits_CV, matrix, preferred_element_type=jnp.float32)
      d_flat = d_flat.at[index].set(
        collectives.sum_over_vocab(d_x_CD).astype(flat.dtype), mode="drop"
      )
      x_CD = flat.at[index].get(mode="clip")
      # float32: many chunks add up here, and bfloat16 would lose the small ones.
      d_matrix += jnp.einsum("CD,CV->DV", x_CD, d_logits_CV, preferred_element_type=jnp.float32)
      return d_flat, d_matrix

    start = (jnp.zeros_like(flat), jnp.zeros(matrix.shape, jnp.float32))
    d_flat, d_matrix = jax.lax.fori_loop(0, chunks, body, start)
    return d_flat.reshape(features.shape), collectives.scatter_matrix(d_matrix).astype(param_dtype)

  features_BLD, matrix_DV, targets_BL, needed_BL, lse_BL = saved
  rows, matrix_spec = P(BATCH_AXES), P("fsdp", "tensor")
  run = _on_mesh(local, (rows, matrix_spec, rows, rows, rows, rows), (rows, matrix_spec))
  d_features, d_matrix = run(features_BLD, matrix_DV, targets_BL, needed_BL, lse_BL, d_nll_BL)
  return d_features, d_matrix, None, None


_token_nll.defvjp(_forward, _backward)


def _needed_first(features, needed, chunk):
  """Flat features, chunks of indices with the needed positions first, and how many chunks matter.

  The last chunk is filled up with an index past the end, which scatters drop.
  """
  flat_ND = features.reshape(-1, features.shape[-1])
  needed_N = needed.reshape(-1)
  width = min(chunk, needed_N.shape[0])
  order = jnp.argsort(~needed_N, stable=True).astype(jnp.int32)
  order = jnp.pad(order, (0, -order.shape[0] % width), constant_values=needed_N.shape[0])
  return flat_ND, order.reshape(-1, width), (jnp.sum(needed_N) + width - 1) // width


def _logits(flat_ND, matrix_DV, index_C):
  x_CD = flat_ND.at[index_C].get(mode="clip")
  return jnp.einsum("CD,DV->CV", x_CD, matrix_DV, preferred_element_type=jnp.float32)


class _OneDevice:
  """What crosses devices, when there is one: nothing."""

  gather_matrix = scatter_matrix = sum_over_vocab = staticmethod(lambda x: x)
  logsumexp = staticmethod(lambda logits_CV: jax.nn.logsumexp(logits_CV, axis=-1))

  @staticmethod
  def pick(logits_CV, targets_C):
    return jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]

  @staticmethod
  def one_hot(targets_C, width):
    return (targets_C[:, None] == jnp.arange(width)[None, :]).astype(jnp.float32)


class _Mesh:
  """The same steps on a mesh: the vocabulary is cut over `tensor`, rows over (data, fsdp)."""

  @staticmethod
  def gather_matrix(matrix):
    return jax.lax.all_gather(matrix, "fsdp", axis=0, tiled=True)

  @staticmethod
  def scatter_matrix(d_matrix):
    d_matrix = jax.lax.psum_scatter(d_matrix, "fsdp", scatter_dimension=0, tiled=True)
    return jax.lax.psum(d_matrix, "data")

  @staticmethod
  def sum_over_vocab(x):
    return jax.lax.psum(x, "tensor")

  @staticmethod
  def logsumexp(logits_CV):
    top_C = jax.lax.pmax(jnp.max(logits_CV, axis=-1), "tensor")
    total_C = jax.lax.psum(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1), "tensor")
    return jnp.log(total_C) + top_C

  @staticmethod
  def _local_targets(targets_C, width):
    return targets_C - jax.lax.axis_index("tensor") * width

  @staticmethod
  def pick(logits_CV, targets_C):
    width = logits_CV.shape[1]
    local_C = _Mesh._local_targets(targets_C, width)
    here_C = (local_C >= 0) & (local_C < width)
    picked_C = _OneDevice.pick(logits_CV, jnp.clip(local_C, 0, width - 1))
    return jax.lax.psum(jnp.where(here_C, picked_C, 0.0), "tensor")

  @staticmethod
  def one_hot(targets_C, width):
    return _OneDevice.one_hot(_Mesh._local_targets(targets_C, width), width)


def _on_mesh(local, in_specs, out_specs):
  """`local` on every device of the mesh in force, or plainly when there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return functools.partial(local, collectives=_OneDevice)
  return jax.shard_map(
    functools.partial(local, collectives=_Mesh),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )


# ---------------------------------------------------------------------------------------------
# What each token's loss counts for


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
    nats per masked position.
  Source: Gong et al. 2025, Eq. 1; DiffuLLaMA's train.py for the form with "1/t" and "masked".
  """
  weights_BL, total = diffusion_weights(noised, maskable_BL, segment_ids_BL, weight, normaliser)
  nll_BL = token_nll(features_BLD, matrix_DV, tokens_BL, noised.masked)
  return (jnp.sum(weights_BL * nll_BL), total), nll_BL


def autoregressive_loss(features_BLD, matrix_DV, tokens_BL, maskable_BL):
  """Next-token cross-entropy: the same network with causal attention and every target.

  Returns: ((loss_sum, weight), nll_BL) as in `masked_diffusion_loss`; weight = number of targets.
  """
  nll_BL = token_nll(features_BLD, matrix_DV, tokens_BL, maskable_BL)
  return (jnp.sum(nll_BL), jnp.sum(maskable_BL).astype(jnp.float32)), nll_BL
