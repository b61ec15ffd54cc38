"""Iterative unmasking: from a canvas with masks to tokens, and the trace of how they came.

`generate` is one pure function to call under `jax.jit`; it compiles once per shape and config. It
matches Dream's `diffusion_generate` token for token at temperature 0 (reference.md, section 3),
except that each row follows its own number of masks, MASK is never drawn, and steps that commit
nothing cost no network evaluation. Blocks, caches and what is committed beside the schedule are
approximations, and off unless they are asked for.
"""

import dataclasses
import functools
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffucoder_jax.diffusion import cache, process, remasking, revocation, unmasking
from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.diffusion.constraints import Constraints, Rules, with_forced
from diffucoder_jax.diffusion.pace import even_pace
from diffucoder_jax.diffusion.trace import Trace, history, load_trace, save_trace

__all__ = ["SamplerConfig", "Trace", "generate", "history", "load_trace", "row_keys", "save_trace"]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How to denoise. Defaults are DiffuCoder's README for the base model.

  Attributes:
    alg: remasking strategy, a key of `remasking.CONFIDENCE`.
    steps: denoising steps; 0 means one per mask of the row (holes and new tokens). Blocks share them
      evenly, rounded up, so that there may be more.
    max_new_tokens: masks appended to a prompt.
    temperature: 0 takes the most likely token; > 0 draws, and changes the order of unmasking too.
    top_p: nucleus; 1 is off.
    top_k: 0 is off. Dream under transformers 4.46-4.57 runs with 50 unless told otherwise; pass 50
      to match it.
    alg_temp: 0 commits the surest positions; > 0 draws them from softmax(confidence / alg_temp).
    eps: the last noise level of the schedule.
    stop_at_eos: a row stops when all before its first end token is committed; the masks after it
      stay masks. With `revoke` it may stop with tokens that would yet have been revoked.
    alternatives: how many of the likeliest tokens the trace keeps for each position, as they stood
      when its token was committed; for the viewer. Changes no token.
    schedule: how many positions each step commits, a key of `remasking.SCHEDULES`.
    block_size: 0 writes anywhere; > 0 writes blocks of so many positions, from left to right, each
      with its share of the steps (semi-autoregressive: LLaDA, Nie et al. 2025).
    threshold: < 1 also commits, at each step, all tokens (never MASK) with a probability above it.
    entropy_bound: > 0 also commits as many positions, the surest first, as depend on each other by
      at most so many nats (`remasking.within_entropy_bound`).
    kl_bound: > 0: what `threshold` commits must also have changed by less than so many nats at each
      of the last two evaluations (KLASS). Costs memory for another [B, S, V].
    cache: "none", or with blocks a key of `cache.WINDOWS`: which places are computed anew at each
      step; the others keep the keys and values of the last refresh. Hooks that leave places masked may
      let a row's neighbours say when that is.
    refresh: of a cache: the whole canvas is read again at every so many evaluations of a block; 0:
      once a block; 1: always, which writes what "none" does.
    revoke: > 0: a committed token with a probability below it is masked again (`revocation`). At best
      with a `threshold`, or more steps than masks: what is revoked must be written again in time.
      Constraints count: a hook that would ban a token because it stands there has it revoked.
    revoke_limit: how often at most, for each position.
  """

  alg: str = "entropy"
  steps: int = 0
  max_new_tokens: int = 256
  temperature: float = 0.2
  top_p: float = 0.95
  top_k: int = 0
  alg_temp: float = 0.0
  eps: float = 1e-3
  stop_at_eos: bool = False
  alternatives: int = 0
  schedule: str = "dream"
  block_size: int = 0
  threshold: float = 1.0
  entropy_bound: float = 0.0
  kl_bound: float = 0.0
  cache: str = "none"
  refresh: int = 0
  revoke: float = 0.0
  revoke_limit: int = 1

  @property
  def in_parallel(self):
    """Whether each step commits as much as it may, so that rows end before their last step."""
    return self.threshold < 1 or self.entropy_bound > 0

  def __post_init__(self):
    def check(name, good, remedy):
      if not good:
        raise ValueError(f"sampler.{name} is {getattr(self, name)!r}; {remedy}")

    check("alg", self.alg in remasking.CONFIDENCE, f"choose one of {sorted(remasking.CONFIDENCE)}")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
      check(field.name, whole or field.type is not int, "use a whole number")
    check("steps", self.steps >= 0, "use 0 for one step per new token, or a positive number")
    check("max_new_tokens", self.max_new_tokens >= 0, "use 0 (infill only) or more")
    check("temperature", self.temperature >= 0, "use 0 or more")
    check("top_p", 0 < self.top_p <= 1, "use a number in (0, 1]")
    check("top_k", self.top_k >= 0, "use 0 (off) or more")
    check("alg_temp", self.alg_temp >= 0, "use 0 or more")
    check("eps", 0 < self.eps < 1, "use a number in (0, 1)")
    check("alternatives", self.alternatives >= 0, "use 0 (none) or more")
    schedules = sorted(remasking.SCHEDULES)
    check("schedule", self.schedule in schedules, f"choose one of {schedules}")
    check("block_size", self.block_size >= 0, "use 0 (one block) or more")
    check("threshold", 0 < self.threshold <= 1, "use a number in (0, 1]; 1 is off")
    check("entropy_bound", self.entropy_bound >= 0, "use 0 (off) or more")
    check("kl_bound", self.kl_bound >= 0, "use 0 (off) or more")
    check("kl_bound", not self.kl_bound or self.threshold < 1, "it needs a threshold below 1")
    kinds = ["none", *cache.WINDOWS]
    check("cache", self.cache in kinds, f"choose one of {kinds}")
    whole = self.block_size and self.max_new_tokens % self.block_size == 0
    check(
      "cache", self.cache == "none" or whole, "it needs a block_size that divides max_new_tokens"
    )
    check("refresh", self.refresh >= 0, "use 0 (once a block) or more")
    check("refresh", not self.refresh or self.cache != "none", "it needs a cache; set one, or use 0")
    check("revoke", 0 <= self.revoke <= 1, "use a number in [0, 1]; 0 is off")
    sure = not self.revoke or self.alg not in ("origin", "left_to_right")
    check("revoke", sure, f"alg {self.alg!r} does not commit by confidence; choose another, or 0")
    anew = not self.revoke or self.cache == "none"
    check(
      "revoke", anew, "a token is judged by all that stands now; set sampler.cache to none, or 0"
    )
    check("revoke_limit", self.revoke_limit >= 1, "use 1 or more; switch off with sampler.revoke 0")


def generate(
  logits_fn, canvas, valid, keys, config, *, mask_id, end_ids=(), slots=None, pace=None,
  batch_sizes=(), constraints=None, unembed=lambda logits: logits,
):  # fmt: skip
  """Denoises a canvas.

  Args:
    logits_fn: (canvas_BL int32, valid_BL bool) -> logits_BLV float32, target-aligned: logits[:, i]
      scores token i. With `slots` it gets a third argument, index_BS int32, and gives the logits of
      these positions alone, [B, S, V]. With `config.cache` it is a pair, as for `cache.look`. Or it
      gives features, which `unembed` makes logits of.
    canvas: int32 [B, L]; `mask_id` marks what is to be written, wherever it stands.
    valid: bool [B, L], False on padding (either side).
    keys: typed PRNG keys [B], one per row: same row and key, same tokens, whatever the batch. Read
      only when something is drawn.
    config: `SamplerConfig`.
    mask_id: int. end_ids: those that end a row, with `stop_at_eos`.
    slots: S, no row may have more masks to be written; the others' logits are not wanted, which is
      most of the work and of the memory where the vocabulary is large. None: L.
    pace: `pace.Pace` of the rows. None: all take `config.steps`, 0: as many as new tokens, which
      blocks share as if all had `slots` masks.
    batch_sizes: numbers of rows, less than B: when so few rows are left to be written, only those
      go through the network. Changes no token but through rounding; each size is another copy of
      the network to compile. Every one must be a multiple of the mesh's batch shards.
    constraints: `constraints.Constraints`, which no token breaks (`constraints.check` says whether it
      can be so). A place where nothing is left to write stays masked.
    unembed: makes logits of features, [B, S, D] to [B, S, V] for any B and S. It is asked for those
      of positions that are still to be written, and of so many at a time that [B, S, V] never exists.
  Returns:
    `Trace`.
  """
  if config.stop_at_eos and not end_ids:
    raise ValueError(
      "stop_at_eos needs an end token, and this vocabulary names none; give end_ids, or switch it off"
    )
  cached = config.cache != "none"
  if cached and batch_sizes:
    raise ValueError("a cache is of all rows: leave out batch_sizes, or set sampler.cache to none")
  length = canvas.shape[1]
  if cached and length <= config.max_new_tokens:
    raise ValueError(
      f"a canvas of {length} places has none before its {config.max_new_tokens} new tokens, whose state "
      "scores the first of them; put a place of padding there, or set sampler.cache to none"
    )
  some = config.block_size > 0 or (slots is not None and slots < length)
  slots = config.max_new_tokens if cached else min(length, length if slots is None else slots)
  plan = _make_plan(config, slots, mask_id, tuple(end_ids), constraints)
  pace = even_pace(config, slots, len(canvas)) if pace is None else pace
  pace = jax.tree.map(jnp.asarray, pace)
  rows = canvases.rows_of(
    jnp.asarray(canvas), jnp.asarray(valid), keys, pace, mask_id, plan.slots if some else None
  )

  def look(rows, canvas_BL, block, kept):
    """(logits of a block, or its features; what is kept for the next step)."""
    if not cached:
      where = [plan.of_block(rows.index, block)] if some else []
      return logits_fn(canvas_BL, rows.valid, *where), None
    start = length - slots + block * plan.width
    return cache.look(logits_fn, canvas_BL, rows.valid, start, config.refresh, kept)

  kept = cache.nothing_kept(logits_fn, rows.canvas, rows.valid) if cached else None
  evaluate = functools.partial(_evaluate, plan, look, unembed)
  sizes = [*sorted(size for size in batch_sizes if size < len(canvas)), len(canvas)]
  memory = lambda: None  # noqa: E731
  if config.kl_bound:
    logits_BWV = jax.eval_shape(lambda: unembed(look(rows, rows.canvas, 0, kept)[0]))
    memory = functools.partial(unmasking.forgetting, logits_BWV.shape)
  denoise = functools.partial(_denoise, plan, evaluate, memory, sizes, rows)
  state = _empty_trace(rows, plan), None, kept
  if plan.blocks == 1:
    trace = denoise(0, state)[0]
  else:
    trace = jax.lax.fori_loop(0, plan.blocks, denoise, state)[0]
  unwritten = {"tokens": canvas, **revocation.NOTHING}
  written = {
    name: canvases.put(rows, getattr(trace, name), others)
    for name, others in unwritten.items()
    if getattr(trace, name) is not None
  }
  return trace.replace(**written, valid=valid)


class _Plan(NamedTuple):
  """How rows are gone through: `blocks` of `width` positions."""

  config: SamplerConfig
  mask_id: int
  end_ids: tuple[int, ...]
  width: int
  blocks: int
  constraints: Constraints | None

  @property
  def slots(self):
    return self.blocks * self.width

  def of_block(self, x_BS, block):
    """The block's part of [B, S, ...]."""
    if self.blocks == 1:
      return x_BS
    return jax.lax.dynamic_slice_in_dim(x_BS, block * self.width, self.width, axis=1)

  def with_block(self, x_BS, new_BW, block):
    """[B, S, ...] with the block's part replaced."""
    if self.blocks == 1:
      return new_BW
    return jax.lax.dynamic_update_slice_in_dim(x_BS, new_BW, block * self.width, axis=1)

  def wanted(self, rows, trace, block):
    """Rows that still have to write something in a block, bool [B]; with `stop_at_eos`, before an end."""
    masked_BS = (trace.tokens == self.mask_id) & rows.generated
    if self.config.stop_at_eos:
      is_end_BS = jnp.isin(trace.tokens, jnp.asarray(self.end_ids)) & rows.generated
      masked_BS &= jnp.cumsum(is_end_BS, axis=1) == 0
    return jnp.any(self.of_block(masked_BS, block), axis=1)


def _make_plan(config, slots, mask_id, end_ids, constraints):
  width = config.block_size or slots
  blocks = -(-slots // width)
  return _Plan(config, mask_id, end_ids, width, blocks, constraints)


def _denoise(plan, evaluate, memory, sizes, rows, block, state):
  """Writes a block, or the whole canvas.

  Args:
    evaluate: `_evaluate` of this generation. memory: makes what the first evaluation compares with.
    sizes: numbers of rows that may go through the network together.
    state: (`Trace` [B, S], `unmasking.Memory` or None, `cache.Kept` or None).
  """
  c = plan.config

  def some_rows(size, step, state, count_B, active_B):
    """`evaluate` for the first `size` active rows, and for others to which nothing happens."""
    order_R = jnp.argsort(~active_B, stable=True)[:size]
    few = lambda tree: jax.tree.map(lambda x: x[order_R], tree)  # noqa: E731
    part = evaluate(few(rows), block, step, few(state), count_B[order_R], active_B[order_R])
    return jax.tree.map(lambda whole, new: whole.at[order_R].set(new), state, part)

  # Where nothing can be committed, nothing is computed.
  kinds = [lambda step, state, *_: state]
  kinds += [functools.partial(some_rows, size) for size in sizes[:-1]]
  kinds += [functools.partial(evaluate, rows, block)]

  def body(carry):
    step, state = carry
    tokens_BW = plan.of_block(state[0].tokens, block)
    masked_BW = (tokens_BW == plan.mask_id) & plan.of_block(rows.generated, block)
    left_B = jnp.sum(masked_BW, axis=1)
    pace = rows.pace
    count_B = remasking.commit_count(c.alg, left_B, step, pace.steps, pace.ratio(step))
    if c.in_parallel:
      count_B = jnp.maximum(count_B, 1)
    due_B = ((count_B > 0) | (c.alg == "origin")) & (step < pace.steps)
    active_B = plan.wanted(rows, state[0], block) & due_B
    number = jnp.sum(active_B)
    kind = jnp.where(number > 0, 1 + jnp.sum(number > jnp.asarray(sizes)), 0)
    return step + 1, jax.lax.switch(kind, kinds, step, state, count_B, active_B)

  def unfinished(carry):
    step, (trace, _, _) = carry
    return (step < rows.pace.ratios.shape[1]) & jnp.any(plan.wanted(rows, trace, block))

  trace, _, kept = state
  kept = None if kept is None else cache.at_block(kept)
  start = jnp.zeros((), jnp.int32), (trace, memory(), kept)
  trace, _, kept = jax.lax.while_loop(unfinished, body, start)[1]
  return trace, None, kept


def _evaluate(plan, look, unembed, rows, block, step, state, count_B, active_B):
  """One step of a block: reads the canvases of all `rows` and writes into those that are active."""
  c = plan.config
  trace, memory, kept = state
  x_BWX, kept = look(rows, canvases.put(rows, trace.tokens, rows.canvas), block, kept)
  logical_BW = plan.of_block(rows.logical, block)
  generated_BW = plan.of_block(rows.generated, block)
  masked_BW = (plan.of_block(trace.tokens, block) == plan.mask_id) & generated_BW
  pace = rows.pace
  number_B = block * pace.steps + step  # of all blocks
  keys_BW = None
  if unmasking.draws(c):
    keys_BW = unmasking.noise_keys(rows.keys, number_B, logical_BW)
  chance_B = jnp.where(step >= pace.steps - 1, 1.0, pace.ratio(step))
  rules = None
  if plan.constraints is not None:
    place_BW = plan.of_block(canvases.places(rows), block)
    written_BS = canvases.by_place(rows, trace.tokens, plan.mask_id)
    rules = Rules(plan.constraints, place_BW, written_BS, number_B, plan.mask_id)
  old = {name: plan.of_block(x_BS, block) for name, x_BS in revocation.fields(trace).items()}
  judged_BW = None
  if c.revoke:
    may_B = active_B & (step < pace.steps - 1)  # the last step leaves nothing open
    judged_BW = revocation.may_be(may_B, old)
  choice, memory = unmasking.choose(
    x_BWX, unembed, masked_BW & active_B[:, None], count_B, chance_B, keys_BW, logical_BW, c,
    plan.mask_id, memory, rules, old["tokens"], judged_BW,
  )  # fmt: skip
  found = {"tokens": choice.tokens, "step": number_B[:, None], "confidence": choice.confidence,
           "entropy": choice.entropy}  # fmt: skip
  if c.alternatives:
    found["alternatives"] = choice.alternatives
    found["alternative_probs"] = choice.alternative_probs
  new = {name: canvases.choose(choice.chosen, x_BW, old[name]) for name, x_BW in found.items()}
  if c.revoke:
    doubted_BW = judged_BW & (choice.standing < c.revoke)
    new = revocation.revoke(doubted_BW, old, new, number_B, plan.mask_id)
  new = {name: plan.with_block(getattr(trace, name), x_BW, block) for name, x_BW in new.items()}
  return trace.replace(**new, nfe=trace.nfe + active_B.astype(jnp.int32)), memory, kept


def _empty_trace(rows, plan):
  """Nothing is written yet but what is forced; [B, S]."""
  config = plan.config
  zeros_BS = jnp.zeros(rows.index.shape, jnp.float32)
  tokens_BS = jnp.take_along_axis(rows.canvas, rows.index, axis=1)
  if plan.constraints is not None and plan.constraints.forced is not None:
    count_B = jnp.sum(rows.generated, axis=1)
    place_BS = canvases.places(rows)
    tokens_BS = with_forced(plan.constraints.forced, place_BS, count_B, tokens_BS)
  trace = Trace(
    tokens=tokens_BS,
    step=jnp.full(rows.index.shape, -1, jnp.int32),
    confidence=zeros_BS,
    entropy=zeros_BS,
    nfe=jnp.zeros(len(rows.canvas), jnp.int32),
    valid=rows.generated,
  )
  if config.alternatives:
    shape = (*rows.index.shape, config.alternatives)
    trace = trace.replace(
      alternatives=jnp.full(shape, -1, jnp.int32), alternative_probs=jnp.zeros(shape, jnp.float32)
    )
  if config.revoke:
    shape = (*rows.index.shape, config.revoke_limit, 3)
    trace = trace.replace(revoked=jnp.full(shape, -1, jnp.int32))
  return trace


def row_keys(seed, rows):
  """The keys of rows 0..rows-1 of a seed, for `generate`."""
  return process.row_keys(jax.random.key(seed), rows)
