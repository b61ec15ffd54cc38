"""Iterative unmasking: from a canvas with masks to tokens, and the trace of how they came.

`generate` is one pure function to call under `jax.jit`; it compiles once per shape and config. It
matches Dream's `diffusion_generate` token for token at temperature 0 (reference.md, section 3),
except that each row follows its own number of masks, MASK is never drawn, and steps that commit
nothing cost no network evaluation. Blocks, caches and what is committed beside the schedule are
approximations, and off unless they are asked for.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffucoder_jax.diffusion import cache, process, remasking, unmasking
from diffucoder_jax.diffusion import canvas as canvases

TRACE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How to denoise. Defaults are DiffuCoder's README for the base model.

  Attributes:
    alg: remasking strategy, a key of `remasking.CONFIDENCE`.
    steps: denoising steps; 0 means one per mask of the row (holes and new tokens).
    max_new_tokens: masks appended to a prompt.
    temperature: 0 takes the most likely token; > 0 draws, and changes the order of unmasking too.
    top_p: nucleus; 1 is off.
    top_k: 0 is off. Dream under transformers 4.46-4.57 runs with 50 unless told otherwise; pass 50
      to match it.
    alg_temp: 0 commits the surest positions; > 0 draws them from softmax(confidence / alg_temp).
    eps: the last noise level of the schedule.
    stop_at_eos: a row stops when all before its first end token is committed; the masks after it
      stay masks.
    alternatives: how many of the likeliest tokens the trace keeps for each position, as they stood
      when its token was committed; for the viewer. Changes no token.
    schedule: how many positions each step commits, a key of `remasking.SCHEDULES`.
    block_size: 0 writes anywhere; > 0 writes blocks of so many positions, from left to right, each
      with its share of the steps (semi-autoregressive: LLaDA, Nie et al. 2025).
    threshold: < 1 also commits, at each step, all tokens with a probability above it.
    entropy_bound: > 0 also commits as many positions, the surest first, as depend on each other by
      at most so many nats (`remasking.within_entropy_bound`).
    kl_bound: > 0: what `threshold` commits must also have changed by less than so many nats at each
      of the last two evaluations (KLASS). Costs memory for another [B, S, V].
    cache: "none", or with blocks a key of `cache.WINDOWS`: which places are computed anew at each
      step; the others keep the keys and values of the last refresh.
    refresh: of a cache: the whole canvas is read again at every so many evaluations of a block; 0:
      once a block; 1: always, which writes what "none" does.
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

  @property
  def in_parallel(self):
    """Whether each step commits as much as it may, so that rows end before their last step."""
    return self.threshold < 1 or self.entropy_bound > 0

  def __post_init__(self):
    def check(name, good, remedy):
      if not good:
        raise ValueError(f"sampler.{name} is {getattr(self, name)!r}; {remedy}")

    check("alg", self.alg in remasking.CONFIDENCE, f"choose one of {sorted(remasking.CONFIDENCE)}")
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


@flax.struct.dataclass
class Trace:
  """A finished canvas and how it came to be; the arrays are [B, L] unless said otherwise.

  Tokens never change once committed, so this is the whole history: the canvas after step s shows
  `tokens` where `step <= s` and masks elsewhere.
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


def history(trace, mask_id):
  """Canvases after each step, int32 [steps, B, L], up to the last step that committed something."""
  tokens, step = np.asarray(trace.tokens), np.asarray(trace.step)
  return np.stack([np.where(step <= s, tokens, mask_id) for s in range(step.max(initial=0) + 1)])


def save_trace(path, trace):
  """Writes a trace as .npz, with a version field."""
  arrays = {name: np.asarray(x) for name, x in vars(trace).items() if x is not None}
  with epath.Path(path).open("wb") as f:
    np.savez_compressed(f, version=TRACE_VERSION, **arrays)


def load_trace(path):
  """Reads what `save_trace` wrote."""
  with epath.Path(path).open("rb") as f, np.load(f) as data:
    arrays = dict(data)
  version = int(arrays.pop("version"))
  if version != TRACE_VERSION:
    raise ValueError(f"{path} holds a trace of version {version}; this code reads {TRACE_VERSION}")
  return Trace(**arrays)


def generate(
  logits_fn, canvas, valid, keys, config, *, mask_id, eos_id=-1, slots=None, batch_sizes=(),
  unembed=lambda logits: logits,
):  # fmt: skip
  """Denoises a canvas.

  Args:
    logits_fn: (canvas_BL int32, valid_BL bool) -> logits_BLV float32, target-aligned: logits[:, i]
      scores token i. With `slots` it gets a third argument, index_BS int32, and gives the logits of
      these positions alone, [B, S, V]. With `config.cache` it is a pair, as for `cache.look`.
    canvas: int32 [B, L]; `mask_id` marks what is to be written, wherever it stands.
    valid: bool [B, L], False on padding (either side).
    keys: typed PRNG keys [B], one per row: same row and key, same tokens, whatever the batch. Read
      only when something is drawn.
    config: `SamplerConfig`.
    mask_id, eos_id: ids; `eos_id` is read by `stop_at_eos`.
    slots: S, no row may have more masks to be written; the others' logits are not wanted, which is
      most of the work and of the memory where the vocabulary is large. None: L. Blocks share the
      steps by it, so there it should be what the rows have.
    batch_sizes: numbers of rows, less than B: when so few rows are left to be written, only those
      go through the network. Changes no token but through rounding; each size is another copy of
      the network to compile. Every one must be a multiple of the mesh's batch shards.
    unembed: makes logits of features, [B, S, D] to [B, S, V] for any B and S. It is asked for those
      of positions that are still to be written, and of so many at a time that [B, S, V] never exists.
  Returns:
    `Trace`.
  """
  if config.stop_at_eos and eos_id < 0:
    raise ValueError("stop_at_eos needs an end token, and this vocabulary names none")
  cached = config.cache != "none"
  if cached and batch_sizes:
    raise ValueError("a cache is of all rows: leave out batch_sizes, or set sampler.cache to none")
  length = canvas.shape[1]
  some = config.block_size > 0 or (slots is not None and slots < length)
  slots = config.max_new_tokens if cached else min(length, length if slots is None else slots)
  plan = _make_plan(config, slots, mask_id, eos_id)
  rows = canvases.rows_of(jnp.asarray(canvas), jnp.asarray(valid), keys, mask_id, plan.slots)

  def look(rows, canvas_BL, block, step, kept):
    """(logits of a block, or its features; what is kept for the next step)."""
    if not cached:
      where = [plan.of_block(rows.index, block)] if some else []
      return logits_fn(canvas_BL, rows.valid, *where), None
    start = length - slots + block * plan.width
    return cache.look(logits_fn, canvas_BL, rows.valid, start, plan.refreshes[step], kept)

  kept = None
  if cached:
    shapes = jax.eval_shape(lambda: logits_fn[0](rows.canvas, rows.valid, 1)[1])
    kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  evaluate = functools.partial(_evaluate, plan, look, unembed)
  sizes = [*sorted(size for size in batch_sizes if size < len(canvas)), len(canvas)]
  memory = lambda: None  # noqa: E731
  if config.kl_bound:
    logits_BWV = jax.eval_shape(lambda: unembed(look(rows, rows.canvas, 0, 0, kept)[0]))
    memory = functools.partial(unmasking.forgetting, logits_BWV.shape)
  denoise = functools.partial(_denoise, plan, evaluate, memory, sizes, rows)
  state = _empty_trace(rows, config), None, kept
  if plan.blocks == 1:
    trace = denoise(0, state)[0]
  else:
    trace = jax.lax.fori_loop(0, plan.blocks, denoise, state)[0]
  unwritten = {"tokens": canvas, "step": -1, "confidence": 0.0, "entropy": 0.0,
               "alternatives": -1, "alternative_probs": 0.0}  # fmt: skip
  written = {
    name: canvases.put(rows, getattr(trace, name), others)
    for name, others in unwritten.items()
    if getattr(trace, name) is not None
  }
  return trace.replace(**written, valid=valid)


class _Plan(NamedTuple):
  """How rows are gone through: `blocks` of `width` positions, `steps` each."""

  config: SamplerConfig
  mask_id: int
  eos_id: int
  width: int
  blocks: int
  steps: int
  ratios: jax.Array  # float32 [steps], `remasking.commit_ratios`
  refreshes: jax.Array | None  # bool [steps], `cache.refreshes`

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
      masked_BS &= jnp.cumsum((trace.tokens == self.eos_id) & rows.generated, axis=1) == 0
    return jnp.any(self.of_block(masked_BS, block), axis=1)


def _make_plan(config, slots, mask_id, eos_id):
  steps = config.steps or config.max_new_tokens
  if steps < 1:
    raise ValueError("sampler.steps and max_new_tokens are both 0; say how many steps to take")
  width = config.block_size or slots
  blocks = -(-slots // width)
  steps = -(-steps // blocks)
  ratios_T = remasking.commit_ratios(steps, config.eps, config.schedule)
  refreshes_T = None if config.cache == "none" else jnp.asarray(cache.refreshes(config, steps))
  return _Plan(config, mask_id, eos_id, width, blocks, steps, ratios_T, refreshes_T)


def _denoise(plan, evaluate, memory, sizes, rows, block, state):
  """Writes a block, or the whole canvas.

  Args:
    evaluate: `_evaluate` of this generation. memory: makes what the first evaluation compares with.
    sizes: numbers of rows that may go through the network together.
    state: (`Trace` [B, S], `unmasking.Memory` or None, what a cache keeps or None).
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
    count_B = remasking.commit_count(c.alg, left_B, step, plan.steps, plan.ratios)
    if c.in_parallel:
      count_B = jnp.maximum(count_B, 1)
    active_B = plan.wanted(rows, state[0], block) & ((count_B > 0) | (c.alg == "origin"))
    number = jnp.sum(active_B)
    kind = jnp.where(number > 0, 1 + jnp.sum(number > jnp.asarray(sizes)), 0)
    return step + 1, jax.lax.switch(kind, kinds, step, state, count_B, active_B)

  def unfinished(carry):
    step, (trace, _, _) = carry
    return (step < plan.steps) & jnp.any(plan.wanted(rows, trace, block))

  trace, _, kept = state
  start = jnp.zeros((), jnp.int32), (trace, memory(), kept)
  trace, _, kept = jax.lax.while_loop(unfinished, body, start)[1]
  return trace, None, kept


def _evaluate(plan, look, unembed, rows, block, step, state, count_B, active_B):
  """One step of a block: reads the canvases of all `rows` and writes into those that are active."""
  c = plan.config
  trace, memory, kept = state
  x_BWX, kept = look(rows, canvases.put(rows, trace.tokens, rows.canvas), block, step, kept)
  index_BW, generated_BW = plan.of_block(rows.index, block), plan.of_block(rows.generated, block)
  masked_BW = (plan.of_block(trace.tokens, block) == plan.mask_id) & generated_BW
  number = block * plan.steps + step  # of all blocks
  keys_BW = None
  if unmasking.draws(c):
    keys_BW = unmasking.noise_keys(rows.keys, number, plan.of_block(rows.logical, block))
  chance = jnp.where(step == plan.steps - 1, 1.0, plan.ratios[step])
  choice, memory = unmasking.choose(
    x_BWX, unembed, masked_BW & active_B[:, None], count_B, chance, keys_BW, index_BW, c,
    plan.mask_id, memory,
  )  # fmt: skip
  found = {"tokens": choice.tokens, "step": number, "confidence": choice.confidence,
           "entropy": choice.entropy}  # fmt: skip
  if c.alternatives:
    found["alternatives"] = choice.alternatives
    found["alternative_probs"] = choice.alternative_probs

  def note(name, new_BW):
    old_BS = getattr(trace, name)
    chosen_BW = choice.chosen.reshape(*choice.chosen.shape, *(1,) * (old_BS.ndim - 2))
    new_BW = jnp.where(chosen_BW, new_BW, plan.of_block(old_BS, block))
    return plan.with_block(old_BS, new_BW, block)

  written = {name: note(name, new_BW) for name, new_BW in found.items()}
  trace = trace.replace(**written, nfe=trace.nfe + active_B.astype(jnp.int32))
  return trace, memory, kept


def _empty_trace(rows, config):
  """Nothing is written yet; [B, S]."""
  zeros_BS = jnp.zeros(rows.index.shape, jnp.float32)
  trace = Trace(
    tokens=jnp.take_along_axis(rows.canvas, rows.index, axis=1),
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
  return trace


def row_keys(seed, rows):
  """The keys of rows 0..rows-1 of a seed, for `generate`."""
  return process.row_keys(jax.random.key(seed), rows)
