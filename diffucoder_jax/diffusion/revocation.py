"""Tokens that are masked again: what was written and is doubted now, in the presence of what came after.

The rule is WINO's "narrow-out" (Hong et al. 2025, arXiv 2507.18578): at each evaluation, tokens of the
block that were committed before and now have a probability below a bound become masks again; together
with a low `threshold`, its "wide-in". `SamplerConfig.revoke` is its tau_2, `threshold` its tau_1.

Differences from WINO's code, which bounds what is revoked at once by what was accepted before: each
position is revoked at most `revoke_limit` times, and a row's last step of a block revokes nothing, so
that rows end within their steps with everything written. And WINO reads the probability of a token from
a second copy of the block that does not see it; here the network is a function of one canvas, and sees
the token that it judges. Networks trained on masks alone were never asked about such places, and may
approve of whatever stands there: try a `revoke` near 1, and look at traces before trusting it. The last
tokens of a row are never judged, for nothing is evaluated after them.
"""

import jax.numpy as jnp

from diffucoder_jax.diffusion import canvas
from diffucoder_jax.diffusion.trace import COMMITTED

# What `Trace` holds of a position where nothing stands, beside its mask.
NOTHING = {
  "step": -1, "confidence": 0.0, "entropy": 0.0, "alternatives": -1, "alternative_probs": 0.0,
  "revoked": -1,
}  # fmt: skip


def fields(trace):
  """{field of `Trace`: [B, S, ...]}, what a step may change."""
  return {
    name: x
    for name, x in vars(trace).items()
    if x is not None and name not in ("nfe", "valid")
  }


def may_be(may_B, old):
  """Which positions are judged, bool [B, W].

  Args:
    may_B: bool, rows in which something may be revoked. old: `fields` of a block before this step.
  """
  spent_BW = old["revoked"][:, :, -1, COMMITTED] >= 0
  return may_B[:, None] & (old["step"] >= 0) & ~spent_BW  # what was given or forced has no step


def revoke(doubted_BW, old, new, now_B, mask_id):
  """Masks again what is doubted.

  Args:
    doubted_BW: bool. old: `fields` of a block before this step. new: what this step made of them, but
      for `revoked`. now_B: int32, the step. mask_id: int.
  Returns:
    `new` with the doubted positions masked, and `revoked`.
  """
  empty = {"tokens": mask_id, **NOTHING}
  new = {name: _cleared(doubted_BW, x_BW, empty[name]) for name, x_BW in new.items()}
  noted_BWR3 = _noted(old["revoked"], doubted_BW, old["tokens"], old["step"], now_B)
  return {**new, "revoked": noted_BWR3}


def _cleared(doubted_BW, x_BW, empty):
  return canvas.choose(doubted_BW, jnp.full_like(x_BW, empty), x_BW)


def _noted(revoked_BWR3, doubted_BW, tokens_BW, step_BW, now_B):
  """`Trace.revoked` with one more event where `doubted`."""
  now_BW = jnp.broadcast_to(now_B[:, None], tokens_BW.shape)
  event_BW13 = jnp.stack([tokens_BW, step_BW, now_BW], axis=-1)[:, :, None]
  before_BW1 = jnp.sum(revoked_BWR3[..., COMMITTED] >= 0, axis=-1, keepdims=True)
  next_BWR = jnp.arange(revoked_BWR3.shape[2])[None, None] == before_BW1
  return jnp.where((next_BWR & doubted_BW[..., None])[..., None], event_BW13, revoked_BWR3)
