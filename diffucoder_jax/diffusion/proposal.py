"""Proposals: what to write at positions of a canvas, and how sure that is.

The maths is that of `remasking`; here is over which positions it goes, and how many of them at a time.
Nothing sorts a vocabulary or puts one together that is sharded.
"""

import functools

import jax
import jax.numpy as jnp

from diffucoder_jax.diffusion import remasking
from diffucoder_jax.diffusion.constraints import Rules
from diffucoder_jax.runtime.sharding import batch_shards, constrain, platform

# Positions whose logits exist at one time on a device: enough to keep a matrix unit busy.
CHUNK = 256
# On a CPU the positions of so many logits, but 64 at least: it reads the output matrix anew for each
# chunk. So many of these logits are gone through together: they stay in its caches.
CPU_CHUNK, CPU_BLOCK = 2**18, 2**15


def propose(
  logits_BSV, uniform_BS, index_BS, config, mask_id, before_BSV=None, rules=None, standing_BS=None,
  number=None,
):  # fmt: skip
  """What to write at each position, and how sure that is.

  Args:
    logits_BSV: target-aligned, any float dtype.
    uniform_BS: a number in [0, 1) for each draw; None: the most likely tokens.
    index_BS: int32, places among the row's real tokens.
    config: `SamplerConfig`. mask_id: int, never proposed.
    before_BSV: with `kl_bound`, the probabilities at the evaluation before.
    rules: None, or the `constraints.Rules` that tokens keep to, of the positions, `Rules.by_position`.
    standing_BS: int32, tokens whose probability is wanted too; None: of none.
    number: int32 scalar: on a CPU only the first so many of S are answered, and as many more as are
      gone through together; None: all.
  Returns:
    {"tokens": int32 [B, S]; their "probability", "confidence" of the strategy, "entropy"
    of the filtered distribution in nats: float32 [B, S]}. With `alternatives` also these, int32
    [B, S, K], and "alternative_probs"; with `kl_bound` also "probs" [B, S, V] and "divergence" [B, S];
    with rules "possible", bool [B, S], whether any token may be written; with `standing_BS` "standing".
  """
  given = {
    "logits": logits_BSV, "uniform": uniform_BS, "index": index_BS, "before": before_BSV,
    "standing": standing_BS,
  }  # fmt: skip
  if rules is not None:
    given |= {"place": rules.place, "written": rules.written, "step": rules.step}
  number = jnp.asarray(logits_BSV.shape[1] if number is None else number)
  at_once = functools.partial(_propose, config, mask_id, rules and rules.constraints)
  with jax.named_scope("choose_tokens"):
    return jax.lax.platform_dependent(
      given, number,
      cpu=functools.partial(_in_blocks, at_once), default=lambda given, _: at_once(given),
    )  # fmt: skip


def propose_where(
  needed_BS, x_BSX, unembed, uniform_BS, index_BS, config, mask_id, before_BSV=None, rules=None,
  standing_BS=None,
):  # fmt: skip
  """`propose` where it is needed; what it says elsewhere means nothing.

  Args:
    needed_BS: bool. On a mesh B is a multiple of its batch shards.
    x_BSX: what `unembed` makes logits of, [B, C, X] to [B, C, V].
    uniform_BS, index_BS, config, mask_id, before_BSV, standing_BS: as for `propose`.
    rules: `constraints.Rules` of the B rows, or None.

  Each device gathers its needed positions to the front and loops over as many chunks as they fill, so
  that the other positions' logits never exist (as in `cross_entropy.token_nll`).
  """

  def flat(x_BSX):
    x_GNX = x_BSX.reshape(batch_shards(), -1, *x_BSX.shape[2:])
    return constrain(x_GNX, "batch", *[None] * (x_GNX.ndim - 1))

  needed_GN = flat(needed_BS)
  number = needed_GN.shape[1]
  given = {"x": x_BSX, "uniform": uniform_BS, "index": index_BS, "standing": standing_BS}
  if rules is not None:
    given["rules"] = rules.by_position(needed_BS.shape[1])
  given = jax.tree.map(flat, given)

  def answer(some, left):
    return propose(
      unembed(some["x"]), some["uniform"], some["index"], config, mask_id, some.get("probs"),
      rules and Rules(rules.constraints, *some["rules"], mask_id), some["standing"], left,
    )  # fmt: skip

  kept = {} if before_BSV is None else {"probs": flat(before_BSV)}
  shapes = jax.eval_shape(answer, given | kept, number)
  found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes) | kept
  chunk = CHUNK
  if platform() == "cpu":
    vocabulary = jax.eval_shape(unembed, given["x"]).shape[-1]
    chunk = max(64, CPU_CHUNK // vocabulary)
  chunk = min(chunk, number)
  # The last chunk is filled up with an index past the end, which is not written.
  order_GN = jnp.argsort(~needed_GN, axis=1, stable=True).astype(jnp.int32)
  order_GN = jnp.pad(order_GN, ((0, 0), (0, -number % chunk)), constant_values=number)
  wanted = jnp.max(jnp.sum(needed_GN, axis=1))  # on the device that has most

  def body(i, found):
    place_GC = jax.lax.dynamic_slice_in_dim(order_GN, i * chunk, chunk, axis=1)

    def take(x_GNX):
      index = place_GC.reshape(*place_GC.shape, *(1,) * (x_GNX.ndim - 2))
      return jnp.take_along_axis(x_GNX, index, axis=1, mode="clip")

    now = given | {name: found[name] for name in kept}
    new = answer(jax.tree.map(take, now), jnp.minimum(wanted - i * chunk, chunk))
    put = jax.vmap(lambda x_NX, place_C, new_CX: x_NX.at[place_C].set(new_CX, mode="drop"))
    return {name: put(x, place_GC, new[name]) for name, x in found.items()}

  found = jax.lax.fori_loop(0, -(-wanted // chunk), body, found)
  return jax.tree.map(lambda x: x.reshape(*needed_BS.shape, *x.shape[2:]), found)


def _propose(c, mask_id, constraints, given):
  logits_BSV = given["logits"].astype(jnp.float32)
  if constraints is not None:
    each = lambda x_BSX: x_BSX.reshape(-1, *x_BSX.shape[2:])  # noqa: E731
    whole = lambda x_R1X: x_R1X.reshape(*logits_BSV.shape[:2], *x_R1X.shape[2:])  # noqa: E731
    place_R1 = each(given["place"])[:, None]
    rules = Rules(constraints, place_R1, each(given["written"]), each(given["step"]), mask_id)
    logits_BSV, possible_BS = map(whole, rules.on_logits(each(logits_BSV)[:, None]))
  probs_BSV = remasking.filtered_probs(logits_BSV, c.temperature, c.top_p, c.top_k)
  drawn_BS, tokens_BS = remasking.draw_tokens(logits_BSV, probs_BSV, mask_id, given["uniform"])
  if constraints is not None:
    ruled_BS = whole(rules.on_tokens(each(tokens_BS)[:, None]))
    drawn_BS = jnp.where(ruled_BS == tokens_BS, drawn_BS, ruled_BS)
    tokens_BS = ruled_BS
  found = {
    "tokens": tokens_BS,
    "probability": remasking.probability(probs_BSV, tokens_BS),
    "confidence": remasking.CONFIDENCE[c.alg](probs_BSV, drawn_BS, given["index"]),
    "entropy": -remasking.negative_entropy(probs_BSV),
  }
  if constraints is not None:
    found["possible"] = possible_BS
  if given["standing"] is not None:
    found["standing"] = remasking.probability(probs_BSV, given["standing"])
  if c.alternatives:
    found["alternative_probs"], found["alternatives"] = jax.lax.top_k(probs_BSV, c.alternatives)
  if c.kl_bound:
    found["probs"] = probs_BSV
    found["divergence"] = remasking.divergence(probs_BSV, given["before"])
  return found


def _in_blocks(fn, given, number):
  """`fn` of the first `number` positions, a few at a time: it passes over their logits many times, which
  is up to four times as fast where they stay in a CPU's caches."""
  positions, vocabulary = given["logits"].shape[1:]
  # Not one: XLA's sums along a single row use no vector instructions.
  size = min(max(2, CPU_BLOCK // vocabulary), positions)

  def cut(first):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), given)

  def body(i, found):
    first = jnp.minimum(i * size, positions - size)
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=1)  # noqa: E731
    return jax.tree.map(put, found, fn(cut(first)))

  shapes = jax.eval_shape(lambda: fn(cut(0)))
  whole = lambda x: jnp.zeros((x.shape[0], positions, *x.shape[2:]), x.dtype)  # noqa: E731
  return jax.lax.fori_loop(0, -(-number // size), body, jax.tree.map(whole, shapes))
