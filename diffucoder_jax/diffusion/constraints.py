"""What may be written where: tokens that are banned or forced, and rules of one's own.

  both = constraints.together(constraints.ban([7, 9]), constraints.force(ending, at=-len(ending)))
  sampler.generate(..., constraints=both)

A place counts a row's own masks, from 0 for its first, so that it knows nothing of padding, batch and
prompt. `Constraints` are arguments of a compiled program and not a part of it: other ids of the same
number need no other program.

Forced tokens are on the canvas before the first step, so that everything is written in their presence,
and cost no evaluation; the trace holds them as given (step -1). Banned tokens have no probability:
confidence, entropy and alternatives are of the distribution that is left.
"""

import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

NEVER = -jnp.inf  # the logit of a token that may not be written
CHUNK = 64  # places that `check` looks at together


@flax.struct.dataclass
class Constraints:
  """All a pytree. Hooks are `jax.tree_util.Partial`, called in their order with

  - logits: (logits_BWV float32, place_BW, written_BP, step_B) -> logits_BWV, in which `NEVER` bans;
  - tokens: (tokens_BW int32, place_BW, written_BP, step_B) -> tokens_BW, what to write wherever a
    position is chosen. The mask is not taken, and confidence is that of what the hook returns.

  place_BW: int32, -1 where a row has no place. written_BP: int32, what stands at the row's places now,
  in their order: `mask_id` where nothing does, and behind the last. P is no less than the row's places.
  step_B: int32. Hooks see each row by itself, whatever rows they are called with. Other functions, and
  arrays of other shapes, are other programs.
  """

  forced: jax.Array | None = None  # int32 [N, 2], place (from the row's end if negative) and token
  logits: tuple = ()
  tokens: tuple = ()


def ban(ids, places=None):
  """`Constraints`: these token ids are not written, at these places or (None) anywhere.

  Raises:
    ValueError: an id or a place is negative.
  """
  return on_logits(_closed, _numbers("banned id", ids), _places(places), False)


def only(ids, places=None):
  """`Constraints`: no other token ids are written, at these places or (None) anywhere; as `ban`."""
  return on_logits(_closed, _numbers("allowed id", ids), _places(places), True)


def force(ids, at=0):
  """`Constraints`: these token ids stand at places `at`, `at` + 1, ...

  Args:
    ids: ints. at: int; negative: from the row's last place, which is -1.
  Raises:
    ValueError: an id is negative, or they go beyond the row's end.
  """
  ids = _numbers("forced id", ids)
  if at < 0 < at + len(ids):
    raise ValueError(f"{len(ids)} forced tokens from place {at} go beyond the row's end")
  if not len(ids):
    return Constraints()
  return Constraints(forced=np.stack([at + np.arange(len(ids), dtype=np.int32), ids], axis=1))


def on_logits(hook, *args):
  """`Constraints` of one hook: hook(*args, logits_BWV, place_BW, written_BP, step_B); pytrees as args."""
  return Constraints(logits=(jax.tree_util.Partial(hook, *args),))


def on_tokens(hook, *args):
  """`Constraints` of one hook: hook(*args, tokens_BW, place_BW, written_BP, step_B); pytrees as args."""
  return Constraints(tokens=(jax.tree_util.Partial(hook, *args),))


def together(*several):
  """All of several `Constraints`, in this order."""
  forced = [c.forced for c in several if c.forced is not None]
  return Constraints(
    np.concatenate(forced) if forced else None,
    sum((c.logits for c in several), ()),
    sum((c.tokens for c in several), ()),
  )


def check(constraints, places, vocab_size, mask_id):
  """Refuses what cannot be kept, by name; not under `jax.jit`, where no value can be looked at.

  Args:
    places: int, of a row. vocab_size, mask_id: ints; a `mask_id` of -1: there is none.
  Raises:
    ValueError: an id outside the vocabulary; a forced place that the row does not have, a forced mask,
      two tokens forced at one place, a forced token that is banned there; a place where nothing is left.
  """
  for hook in constraints.logits:
    if (
      hook.func is _closed and len(hook.args[0]) and (worst := int(max(hook.args[0]))) >= vocab_size
    ):
      raise ValueError(
        f"banned or allowed id {worst} is outside the vocabulary 0..{vocab_size - 1}"
      )
  forced = {}
  for at, token in [] if constraints.forced is None else np.asarray(constraints.forced).tolist():
    place = at if at >= 0 else places + at
    if not 0 <= place < places:
      raise ValueError(f"token {token} is forced at place {at}, and the row has {places} places")
    if token >= vocab_size:
      raise ValueError(f"forced id {token} is outside the vocabulary 0..{vocab_size - 1}")
    if token == mask_id:
      raise ValueError(
        f"the mask (id {token}) is forced at place {at}; force tokens, or leave it free"
      )
    if forced.setdefault(place, token) != token:
      raise ValueError(f"tokens {forced[place]} and {token} are both forced at place {place}")
  # As many places as chunks hold, or each number of them would be another program.
  chunks = -(-places // CHUNK) if constraints.logits else 0
  for begin in range(0, chunks * CHUNK, CHUNK):
    place_P = np.arange(begin, begin + CHUNK)
    place_P = np.where(place_P < places, place_P, -1)
    open_PV = np.asarray(_open(constraints, place_P, chunks * CHUNK, vocab_size, mask_id))
    for place, open_V in zip(place_P[place_P >= 0].tolist(), open_PV, strict=False):
      if place in forced and not open_V[forced[place]]:
        raise ValueError(f"token {forced[place]} is forced at place {place}, and banned there")
      if place not in forced and not open_V.any():
        raise ValueError(
          f"everything is banned at place {place}; leave a token that can be written"
        )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _open(constraints, place_P, places, vocab_size, mask_id):
  """Which tokens the first step may write, bool [P, V]."""
  logits_BPV = jnp.zeros((1, len(place_P), vocab_size))
  written_BP = jnp.full((1, places), mask_id)
  rules = Rules(constraints, place_P[None], written_BP, jnp.zeros(1, jnp.int32), mask_id)
  logits_BPV, possible_BP = rules.on_logits(logits_BPV)
  open_PV = (logits_BPV[0] > NEVER) & possible_BP[0, :, None]
  return open_PV & (jnp.arange(vocab_size) != mask_id)[None]


def with_forced(forced, place_BS, count_B, tokens_BS):
  """The tokens of the first canvas, int32 [B, S].

  Args:
    forced: of `Constraints`. place_BS: as hooks get. count_B: int32, places of each row. tokens_BS:
      what stands where nothing is forced.
  """
  forced = jnp.asarray(forced)
  place_BN = jnp.where(forced[None, :, 0] < 0, count_B[:, None], 0) + forced[None, :, 0]
  here_BSN = (place_BS[..., None] == place_BN[:, None]) & (place_BS[..., None] >= 0)
  token_BS = forced[:, 1][jnp.argmax(here_BSN, axis=-1)]
  return jnp.where(jnp.any(here_BSN, axis=-1), token_BS, tokens_BS)


class Rules(NamedTuple):
  """`Constraints`, and what their hooks look at, at one step."""

  constraints: Constraints
  place: jax.Array
  written: jax.Array
  step: jax.Array
  mask_id: int

  def by_position(self, width):
    """(place_BW, written_BWP, step_BW): what hooks look at of each position by itself."""
    written_BWP = jnp.repeat(self.written[:, None], width, axis=1)
    return self.place, written_BWP, jnp.repeat(self.step[:, None], width, axis=1)

  def on_logits(self, logits_BWV):
    """(constrained logits_BWV, bool [B, W]: whether any token may be written). Where none may the logits
    mean nothing."""
    for hook in self.constraints.logits:
      logits_BWV = hook(logits_BWV, self.place, self.written, self.step)
    is_mask_V = jnp.arange(logits_BWV.shape[-1]) == self.mask_id
    possible_BW = jnp.any((logits_BWV > NEVER) & ~is_mask_V[None, None], axis=-1)
    return jnp.where(possible_BW[..., None], logits_BWV, 0.0), possible_BW

  def on_tokens(self, tokens_BW):
    for hook in self.constraints.tokens:
      changed_BW = hook(tokens_BW, self.place, self.written, self.step)
      tokens_BW = jnp.where(changed_BW == self.mask_id, tokens_BW, changed_BW)
    return tokens_BW


def _closed(ids_N, places_M, others, logits_BWV, place_BW, written_BP, step_B):
  """Logits without some tokens, or (`others`) without all but these."""
  del written_BP, step_B
  listed_V = jnp.zeros(logits_BWV.shape[-1], bool).at[ids_N].set(True)
  closed_BWV = (listed_V ^ others)[None, None]
  if places_M is not None:
    closed_BWV &= jnp.isin(place_BW, places_M)[..., None]
  return jnp.where(closed_BWV, NEVER, logits_BWV)


def _numbers(what, values):
  values = np.asarray([*values], np.int32)
  if len(values) and values.min() < 0:
    raise ValueError(f"{what} {values.min()} is negative")
  return values


def _places(places):
  return None if places is None else _numbers("place", places)
