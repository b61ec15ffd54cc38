"""Per-token scores of completions: one forward pass of the network for each pass of the estimator."""

import jax
import jax.numpy as jnp

from diffucoder_jax.diffusion import cross_entropy
from diffucoder_jax.model.transformer import output_matrix
from diffucoder_jax.runtime import sharding


def token_logps(
  model,
  params,
  tokens_BL,
  segment_ids_BL,
  positions_BL,
  passes,
  mask_id,
  chunk=256,
  remat=True,
):
  """Scores each token by the passes of an estimator: sum over passes of weight * log-probability.

  The new, the old and the reference policy's scores all come from here, with the same `passes`,
  segments and positions: the ones the sampler used. (The released code scores left-padded prompts
  with the padding attended; here padding is segment 0.) Passes run one after the other, so memory
  is that of one, and only scored positions get logits, `chunk` at a time.

  Args:
    model: `Transformer`.
    params: its parameters; differentiable.
    tokens_BL: int32, prompts and completions.
    segment_ids_BL: int32, 0 = padding; None: no padding.
    positions_BL: int32; None: 0..L-1.
    passes: `masks.Passes`.
    mask_id: int.
    chunk: positions whose logits exist at one time on a device.
    remat: keep nothing of a pass for the backward pass but its masks, and run it again there.
      Without it every pass keeps what the model's own `remat` keeps, until the last one is done.
  Returns:
    float32 [B, L], in nats, 0 where nothing is scored. Log-softmax is float32 whatever the network
    computes in.
  Raises:
    ValueError: the passes are for a causal network and this one is not.
  """
  if passes.causal and model.config.attention != "causal":
    raise ValueError(
      f"estimator.causal is set but the network's attention is {model.config.attention!r}: unmasked "
      "tokens would see their own answer; unset estimator.causal"
    )
  tokens_BL = jnp.asarray(tokens_BL)

  def score(params, masked_BL, weights_BL):
    noisy_BL = sharding.constrain(jnp.where(masked_BL, mask_id, tokens_BL), "batch", None)
    features_BLD = model.apply({"params": params}, noisy_BL, segment_ids_BL, positions_BL)
    with jax.named_scope("score"):
      nll_BL = cross_entropy.token_nll(
        features_BLD, output_matrix(params), tokens_BL, weights_BL != 0, chunk
      )
    return -weights_BL * nll_BL

  if remat:
    score = jax.checkpoint(score, prevent_cse=False)

  def add(logps_BL, one):
    return logps_BL + score(params, *one), None

  zeros_BL = sharding.constrain(jnp.zeros(tokens_BL.shape, jnp.float32), "batch", None)
  return jax.lax.scan(add, zeros_BL, (passes.masked, passes.weights))[0]
