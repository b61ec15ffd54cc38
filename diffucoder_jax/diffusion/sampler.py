"""Iterative unmasking: from a canvas with masks to tokens, and the trace of how they came.

`generate` is one pure function to call under `jax.jit`; it compiles once per shape and config. It
matches Dream's `diffusion_generate` token for token at temperature 0 (reference.md, section 3),
except that each row follows its own number of masks, MASK is never drawn, and steps that commit
nothing cost no network evaluation.
"""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffucoder_jax.diffusion import process, remasking

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


def noise_keys(row_keys_B, step, logical_BL):
  """One key per position, from (row key, step, position among the row's real tokens).

  Padding and neighbours are not in it, so they cannot change what a row draws.
  """

  def row(key, logical_L):
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(logical_L)

  return jax.vmap(row)(row_keys_B, logical_BL)


TOKEN, POSITION = 0, 1  # what a number is drawn for


def draw(distribution, keys_BL, purpose):
  """One random number for each position, float32 [B, L]."""
  one = lambda key: distribution(jax.random.fold_in(key, purpose))  # noqa: E731
  return jax.vmap(jax.vmap(one))(keys_BL)


def _finished(canvas_BL, generated_BL, mask_id, eos_id, stop_at_eos):
  """Rows that need no further step."""
  masked_BL = (canvas_BL == mask_id) & generated_BL
  if stop_at_eos:
    ended_BL = jnp.cumsum((canvas_BL == eos_id) & generated_BL, axis=1) > 0
    masked_BL &= ~ended_BL
  return ~jnp.any(masked_BL, axis=1)


def generate(logits_fn, canvas, valid, keys, config, *, mask_id, eos_id=-1, slots=None):
  """Denoises a canvas.

  Args:
    logits_fn: (canvas_BL int32, valid_BL bool) -> logits_BLV float32, target-aligned: logits[:, i]
      scores token i. With `slots` it gets a third argument, index_BS int32, and gives the logits of
      these positions alone, [B, S, V].
    canvas: int32 [B, L]; `mask_id` marks what is to be written, wherever it stands.
    valid: bool [B, L], False on padding (either side).
    keys: typed PRNG keys [B], one per row: same row and key, same tokens, whatever the batch. Read
      only when something is drawn.
    config: `SamplerConfig`.
    mask_id, eos_id: ids; `eos_id` is read by `stop_at_eos`.
    slots: S, no row may have more masks to be written; the others' logits are not wanted, which is
      most of the work and of the memory where the vocabulary is large. None: L.
  Returns:
    `Trace`.
  """
  c = config
  if c.stop_at_eos and eos_id < 0:
    raise ValueError("stop_at_eos needs an end token, and this vocabulary names none")
  steps = c.steps or c.max_new_tokens
  if steps < 1:
    raise ValueError("sampler.steps and max_new_tokens are both 0; say how many steps to take")
  ratios_T = remasking.commit_ratios(steps, c.eps)
  generated_BL = (canvas == mask_id) & valid
  # The loop knows only the positions that may be written: S of each row, in their order (where a
  # row has fewer, others that are never chosen).
  some = slots is not None and slots < canvas.shape[1]
  if some:
    index_BS = jnp.argsort(~generated_BL, axis=1, stable=True)[:, :slots]
    rank_BL = jnp.clip(jnp.cumsum(generated_BL, axis=1) - 1, 0, slots - 1)
  else:
    index_BS = rank_BL = jnp.broadcast_to(jnp.arange(canvas.shape[1]), canvas.shape)
  taken = lambda x_BL: jnp.take_along_axis(x_BL, index_BS, axis=1)  # noqa: E731
  generated_BS = taken(generated_BL)
  logical_BS = taken(jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0))

  def put(x_BS, others_BL):
    """Also for arrays with more dimensions behind S, and a number for `others_BL`."""
    more = (1,) * (x_BS.ndim - 2)
    found_BL = jnp.take_along_axis(x_BS, rank_BL.reshape(*rank_BL.shape, *more), axis=1)
    return jnp.where(generated_BL.reshape(*generated_BL.shape, *more), found_BL, others_BL)

  def evaluate(step, trace, count_B, active_B):
    masked_BS = (trace.tokens == mask_id) & generated_BS & active_B[:, None]
    inputs = (put(trace.tokens, canvas), valid, *([index_BS] if some else []))
    logits_BSV = logits_fn(*inputs).astype(jnp.float32)
    draws = c.temperature > 0 or c.alg_temp > 0 or c.alg == "origin"
    keys_BS = noise_keys(keys, step, logical_BS) if draws else None
    with jax.named_scope("choose_tokens"):
      filtered_BSV = remasking.filter_logits(logits_BSV, c.temperature, c.top_p, c.top_k)
      uniform_BS = draw(jax.random.uniform, keys_BS, TOKEN) if c.temperature > 0 else None
      drawn_BS, tokens_BS, probs_BSV = remasking.draw_tokens(
        logits_BSV, filtered_BSV, mask_id, uniform_BS
      )
      confidence_BS = remasking.CONFIDENCE[c.alg](probs_BSV, drawn_BS, index_BS)
      entropy_BS = -remasking.negative_entropy(probs_BSV)
    with jax.named_scope("choose_positions"):
      if c.alg == "origin":  # each position on its own, so the number committed varies
        u_BS = draw(jax.random.uniform, keys_BS, POSITION)
        chance = jnp.where(step == steps - 1, 1.0, ratios_T[step])
        chosen_BS = masked_BS & (u_BS < chance)
      elif c.alg_temp > 0:
        scores_BS = confidence_BS / c.alg_temp
        gumbel_BS = draw(jax.random.gumbel, keys_BS, POSITION)
        chosen_BS = remasking.choose_positions(scores_BS, masked_BS, count_B, gumbel_BS)
      else:
        chosen_BS = remasking.choose_positions(confidence_BS, masked_BS, count_B)
    if c.alternatives:
      probs_BSK, ids_BSK = jax.lax.top_k(probs_BSV, c.alternatives)
      chosen_BS1 = chosen_BS[..., None]
      trace = trace.replace(
        alternatives=jnp.where(chosen_BS1, ids_BSK, trace.alternatives),
        alternative_probs=jnp.where(chosen_BS1, probs_BSK, trace.alternative_probs),
      )
    return trace.replace(
      tokens=jnp.where(chosen_BS, tokens_BS, trace.tokens),
      step=jnp.where(chosen_BS, step, trace.step),
      confidence=jnp.where(chosen_BS, confidence_BS, trace.confidence),
      entropy=jnp.where(chosen_BS, entropy_BS, trace.entropy),
      nfe=trace.nfe + active_B.astype(jnp.int32),
    )

  def body(carry):
    step, trace = carry
    alive_B = ~_finished(trace.tokens, generated_BS, mask_id, eos_id, c.stop_at_eos)
    left_B = jnp.sum((trace.tokens == mask_id) & generated_BS, axis=1)
    count_B = remasking.commit_count(c.alg, left_B, step, steps, ratios_T)
    active_B = alive_B & ((count_B > 0) | (c.alg == "origin"))
    skip = lambda step, trace, *_: trace  # noqa: E731
    trace = jax.lax.cond(jnp.any(active_B), evaluate, skip, step, trace, count_B, active_B)
    return step + 1, trace

  def unfinished(carry):
    step, trace = carry
    finished_B = _finished(trace.tokens, generated_BS, mask_id, eos_id, c.stop_at_eos)
    return (step < steps) & ~jnp.all(finished_B)

  zeros_BS = jnp.zeros(index_BS.shape, jnp.float32)
  start = Trace(
    tokens=taken(canvas),
    step=jnp.full(index_BS.shape, -1, jnp.int32),
    confidence=zeros_BS,
    entropy=zeros_BS,
    nfe=jnp.zeros(canvas.shape[0], jnp.int32),
    valid=generated_BS,
  )
  if c.alternatives:
    shape = (*index_BS.shape, c.alternatives)
    start = start.replace(
      alternatives=jnp.full(shape, -1, jnp.int32), alternative_probs=jnp.zeros(shape, jnp.float32)
    )
  trace = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), start))[1]
  if c.alternatives:
    trace = trace.replace(
      alternatives=put(trace.alternatives, -1), alternative_probs=put(trace.alternative_probs, 0.0)
    )
  return trace.replace(
    tokens=put(trace.tokens, canvas),
    step=put(trace.step, -1),
    confidence=put(trace.confidence, 0.0),
    entropy=put(trace.entropy, 0.0),
    valid=valid,
  )


def lay_out(rows, length, new, mask_id):
  """Canvases for `generate`: rows, left-padded to one length, with `new` masks behind each.

  Args:
    rows: lists of token ids. length: int, at least the longest row and `new`. mask_id: int.
  Returns:
    (canvas int32, valid bool), numpy [B, length].
  """
  canvas_BL = np.zeros((len(rows), length), np.int32)
  valid_BL = np.zeros((len(rows), length), bool)
  for b, row in enumerate(rows):
    canvas_BL[b, length - new :] = mask_id
    canvas_BL[b, length - new - len(row) : length - new] = row
    valid_BL[b, length - new - len(row) :] = True
  return canvas_BL, valid_BL


def row_keys(seed, rows):
  """The keys of rows 0..rows-1 of a seed, for `generate`."""
  return process.row_keys(jax.random.key(seed), rows)
