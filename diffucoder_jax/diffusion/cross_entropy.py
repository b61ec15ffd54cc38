"""Cross-entropy without [B, L, V].

Logits never exist for a whole batch: they are made chunk by chunk, only for the positions that carry
loss. `token_nll` makes them once more backward; `weighted_nll`, whose weights are known before, finds its
gradient while it has them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from diffucoder_jax.runtime.sharding import BATCH_AXES, platform


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

    def body(i, carry):
      nll_N, lse_N = carry
      index = order[i]
      logits_CV = _logits(flat, matrix, index)
      nll_C, lse_C = _nll(logits_CV, targets.reshape(-1), index, collectives)
      return (
        nll_N.at[index].set(nll_C, mode="drop"),
        lse_N.at[index].set(lse_C, mode="drop"),
      )

    zeros_N = jnp.zeros(flat.shape[0], jnp.float32)
    nll_N, lse_N = jax.lax.fori_loop(0, chunks, body, (zeros_N, zeros_N))
    return nll_N.reshape(needed.shape), lse_N.reshape(needed.shape)

  rows = P(BATCH_AXES)
  run = _on_mesh(local, (rows, P("fsdp", "tensor"), rows, rows), (rows, rows))
  nll_BL, lse_BL = run(features_BLD, matrix_DV, targets_BL, needed_BL)
  nll_BL = jnp.where(needed_BL, nll_BL, 0.0)  # the last chunk's filling
  return nll_BL, (features_BLD, matrix_DV, targets_BL, needed_BL, lse_BL)


def _backward(chunk, saved, d_nll_BL):
  def local(features, matrix, targets, needed, lse, d_nll, collectives):
    param_dtype = matrix.dtype
    matrix = collectives.gather_matrix(matrix.astype(features.dtype))
    flat, order, chunks = _needed_first(features, needed, chunk)
    targets_N, lse_N = targets.reshape(-1), lse.reshape(-1)
    d_nll_N = jnp.where(needed, d_nll, 0.0).reshape(-1)

    def body(i, gradients):
      index = order[i]
      logits_CV = _logits(flat, matrix, index)
      lse_C = lse_N.at[index].get(mode="clip")
      return _add_gradients(
        gradients, flat, matrix, index, logits_CV, lse_C, targets_N, d_nll_N, collectives
      )

    start = (jnp.zeros_like(flat), jnp.zeros(matrix.shape, jnp.float32))
    d_flat, d_matrix = jax.lax.fori_loop(0, chunks, body, start)
    return d_flat.reshape(features.shape), collectives.scatter_matrix(d_matrix).astype(param_dtype)

  features_BLD, matrix_DV, targets_BL, needed_BL, lse_BL = saved
  rows, matrix_spec = P(BATCH_AXES), P("fsdp", "tensor")
  run = _on_mesh(local, (rows, matrix_spec, rows, rows, rows, rows), (rows, matrix_spec))
  d_features, d_matrix = run(features_BLD, matrix_DV, targets_BL, needed_BL, lse_BL, d_nll_BL)
  return d_features, d_matrix, None, None


_token_nll.defvjp(_forward, _backward)


def weighted_nll(features_BLD, matrix_DV, targets_BL, needed_BL, weights_BL, chunk=None):
  """`token_nll` and its sum with weights, of which alone there is a gradient.

  Training makes three products with the matrix instead of four: the gradient is found in the forward
  pass, with the logits that are there, and the backward pass only scales it. Until then the matrix's
  gradient waits, in float32 and cut as the matrix is.

  Args:
    features_BLD, matrix_DV, targets_BL, needed_BL, chunk: as for `token_nll`.
    weights_BL: float32, constants.
  Returns:
    (float32 scalar, sum(weights * nll), in weighted nats; nll_BL float32 [B, L], nats, a constant to
    gradients).
  Source: the fused linear cross-entropy of Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).
  """
  chunk = chunk_size() if chunk is None else chunk
  targets_BL, needed_BL = jnp.asarray(targets_BL), jnp.asarray(needed_BL)
  total, nll_BL = _weighted_nll(
    features_BLD, matrix_DV, targets_BL, needed_BL, jax.lax.stop_gradient(weights_BL), chunk
  )
  return total, jax.lax.stop_gradient(nll_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted_nll(features_BLD, matrix_DV, targets_BL, needed_BL, weights_BL, chunk):
  nll_BL = _token_nll(features_BLD, matrix_DV, targets_BL, needed_BL, chunk)
  return jnp.sum(weights_BL * nll_BL), nll_BL


def _weighted_forward(features_BLD, matrix_DV, targets_BL, needed_BL, weights_BL, chunk):
  def local(features, matrix, targets, needed, weights, collectives):
    matrix = collectives.gather_matrix(matrix.astype(features.dtype))
    flat, order, chunks = _needed_first(features, needed, chunk)
    targets_N = targets.reshape(-1)
    weights_N = jnp.where(needed, weights, 0.0).reshape(-1)

    def body(i, carry):
      nll_N, gradients = carry
      index = order[i]
      logits_CV = _logits(flat, matrix, index)
      nll_C, lse_C = _nll(logits_CV, targets_N, index, collectives)
      gradients = _add_gradients(
        gradients, flat, matrix, index, logits_CV, lse_C, targets_N, weights_N, collectives
      )
      return nll_N.at[index].set(nll_C, mode="drop"), gradients

    zeros = (jnp.zeros_like(flat), jnp.zeros(matrix.shape, jnp.float32))
    start = (jnp.zeros(flat.shape[0], jnp.float32), zeros)
    nll_N, (d_flat, d_matrix) = jax.lax.fori_loop(0, chunks, body, start)
    d_matrix = collectives.scatter_matrix(d_matrix)
    return nll_N.reshape(needed.shape), d_flat.reshape(features.shape), d_matrix

  rows, matrix_spec = P(BATCH_AXES), P("fsdp", "tensor")
  run = _on_mesh(local, (rows, matrix_spec, rows, rows, rows), (rows, rows, matrix_spec))
  nll_BL, *gradients = run(features_BLD, matrix_DV, targets_BL, needed_BL, weights_BL)
  nll_BL = jnp.where(needed_BL, nll_BL, 0.0)
  like = jnp.zeros((), matrix_DV.dtype)
  return (jnp.sum(weights_BL * nll_BL), nll_BL), (*gradients, like)


def _weighted_backward(chunk, saved, cotangents):
  d_features_BLD, d_matrix_DV, like = saved
  d_total, _ = cotangents
  d_features_BLD = (d_features_BLD * d_total).astype(d_features_BLD.dtype)
  return d_features_BLD, (d_matrix_DV * d_total).astype(like.dtype), None, None, None


_weighted_nll.defvjp(_weighted_forward, _weighted_backward)


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


def _nll(logits_CV, targets_N, index_C, collectives):
  """(nll_C, logsumexp_C) of a chunk."""
  lse_C = collectives.logsumexp(logits_CV)
  return lse_C - collectives.pick(logits_CV, targets_N.at[index_C].get(mode="clip")), lse_C


def _add_gradients(
  gradients, flat_ND, matrix_DV, index_C, logits_CV, lse_C, targets_N, d_nll_N, collectives
):
  """(d_flat_ND, d_matrix_DV) with what a chunk adds to them, given what its nll count for."""
  d_flat_ND, d_matrix_DV = gradients
  # Indices past the end (the last chunk's filling) must contribute nothing.
  inside_C = index_C < flat_ND.shape[0]
  scale_C = jnp.where(inside_C, d_nll_N.at[index_C].get(mode="clip"), 0.0)
  target_CV = collectives.one_hot(targets_N.at[index_C].get(mode="clip"), logits_CV.shape[1])
  p_CV = jnp.exp(logits_CV - lse_C[:, None])
  d_logits_CV = ((p_CV - target_CV) * scale_C[:, None]).astype(flat_ND.dtype)
  d_x_CD = jnp.einsum("CV,DV->CD", d_logits_CV, matrix_DV, preferred_element_type=jnp.float32)
  d_x_CD = collectives.sum_over_vocab(d_x_CD).astype(flat_ND.dtype)
  x_CD = flat_ND.at[index_C].get(mode="clip")
  # float32: many chunks add up here, and bfloat16 would lose the small ones.
  d_matrix_DV += jnp.einsum("CD,CV->DV", x_CD, d_logits_CV, preferred_element_type=jnp.float32)
  return d_flat_ND.at[index_C].set(d_x_CD, mode="drop"), d_matrix_DV


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
