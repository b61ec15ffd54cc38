"""Traces: finished canvases and how they came to be; files of them, and the canvases on the way."""

import flax
import jax
import numpy as np
from etils import epath

TRACE_VERSION = 1
REVOKED_VERSION = 2  # of traces with `revoked`, which code that reads version 1 would misread
TOKEN, COMMITTED, REVOKED = 0, 1, 2  # of `Trace.revoked`, in its last dimension


@flax.struct.dataclass
class Trace:
  """A finished canvas and how it came to be; the arrays are [B, L] unless said otherwise.

  Without `revoked` tokens never changed once committed, so this is the whole history: the canvas
  after step s shows `tokens` where `step <= s` and masks elsewhere. With it, `step`, `confidence`,
  `entropy` and the alternatives are those of the last time that a position was written, and what
  stood there before is in `revoked`: `history` puts them together.
  """

  tokens: jax.Array  # int32
  step: jax.Array  # int32, step that committed the token; -1: given, or never committed
  confidence: jax.Array  # float32, the strategy's confidence at that step
  entropy: jax.Array  # float32, nats, of the filtered distribution at that step
  nfe: jax.Array  # int32 [B], network evaluations that could commit something in the row
  valid: jax.Array  # bool, False on padding
  # Of `SamplerConfig.alternatives`, K: the likeliest tokens of the filtered distribution at that
  # step, best first, int32 [B, L, K]; -1 where nothing was written. And their probabilities.
  alternatives: jax.Array | None = None
  alternative_probs: jax.Array | None = None
  # Of `SamplerConfig.revoke`, R = `revoke_limit`: int32 [B, L, R, 3], what was written and masked
  # again, in order: (token, step that committed it, step that masked it); -1: nothing.
  revoked: jax.Array | None = None


def last_step(trace):
  """The last step that wrote or revoked something in any row, int; -1: none did."""
  last = int(np.max(trace.step, initial=-1))
  return last if trace.revoked is None else max(last, int(np.max(trace.revoked[..., REVOKED])))


def canvas_after(tokens, step, revoked, now, mask_id):
  """The canvas as it was after a step, int32, numpy, of any leading dimensions.

  Args:
    tokens, step: [..., L], as in `Trace`. revoked: [..., L, R, 3] or None.
    now: int, the step; -1: before the first. mask_id: int.
  """
  canvas_L = np.where(np.asarray(step) <= now, tokens, mask_id)
  for event in () if revoked is None else np.moveaxis(np.asarray(revoked), -2, 0):
    stood = (event[..., COMMITTED] <= now) & (now < event[..., REVOKED])
    canvas_L = np.where(stood, event[..., TOKEN], canvas_L)
  return canvas_L.astype(np.int32)


def history(trace, mask_id):
  """Canvases after each step, int32 [steps, B, L], up to the last that wrote or revoked something."""
  one = lambda s: canvas_after(trace.tokens, trace.step, trace.revoked, s, mask_id)  # noqa: E731
  return np.stack([one(s) for s in range(max(last_step(trace), 0) + 1)])


def save_trace(path, trace):
  """Writes a trace as .npz, with a version field."""
  arrays = {name: np.asarray(x) for name, x in vars(trace).items() if x is not None}
  version = TRACE_VERSION if trace.revoked is None else REVOKED_VERSION
  with epath.Path(path).open("wb") as f:
    np.savez_compressed(f, version=version, **arrays)


def load_trace(path):
  """Reads what `save_trace` wrote, of either version."""
  with epath.Path(path).open("rb") as f, np.load(f) as data:
    arrays = dict(data)
  if "version" not in arrays:
    raise ValueError(f"{path} holds no trace: it has {sorted(arrays)} and no version")
  version = int(arrays.pop("version"))
  if version not in (TRACE_VERSION, REVOKED_VERSION):
    raise ValueError(
      f"{path} holds a trace of version {version}; this code reads {TRACE_VERSION} and "
      f"{REVOKED_VERSION}"
    )
  return Trace(**arrays)
