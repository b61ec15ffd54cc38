"""A network for tests of the sampler, in which all hangs together."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB = 16


def network(canvas_BL, valid_BL, index_BS=None, seen=None):
  """Logits that hang on all real tokens of a row and on the place among them, and on nothing else.

  seen: a list that gets the canvas of each evaluation, or None.
  """
  if seen is not None:
    jax.debug.callback(lambda canvas: seen.append(np.asarray(canvas)), canvas_BL, ordered=True)
  place_BL = jnp.maximum(jnp.cumsum(valid_BL, axis=1) - 1, 0)
  table_LV = jax.random.normal(jax.random.key(0), (64, VOCAB)) * 2
  mixing_VV = jax.random.normal(jax.random.key(1), (VOCAB, VOCAB))
  seen_BV = jnp.sum(jax.nn.one_hot(canvas_BL, VOCAB) * valid_BL[..., None], axis=1) @ mixing_VV
  logits_BLV = table_LV[place_BL] + seen_BV[:, None]
  if index_BS is not None:
    logits_BLV = jnp.take_along_axis(logits_BLV, index_BS[..., None], axis=1)
  return logits_BLV
