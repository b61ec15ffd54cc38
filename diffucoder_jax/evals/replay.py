"""Asks the network again how sure it was of each masked position, at steps of a recorded decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.diffusion import proposal, queue
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.diffusion.trace import canvas_after
from diffucoder_jax.evals import arness
from diffucoder_jax.model.transformer import Transformer, canvas_logits_fn
from diffucoder_jax.runtime import sharding


def canvas_before(row, step, mask_id):
  """The canvas, int32 [L], before a step of a `dumps.Row`."""
  return canvas_after(row.tokens, row.step, row.revoked, step - 1, mask_id)


# Apart, so that the network is compiled once for all temperatures.
@functools.partial(jax.jit, static_argnums=0)
def _logits(model_config, params, canvas_BL, valid_BL, index_BS):
  return canvas_logits_fn(Transformer(model_config), params)(canvas_BL, valid_BL, index_BS)


@functools.partial(jax.jit, static_argnums=0)
def _confidence(config, logits_BSV):
  c = SamplerConfig(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
  index_BS = jnp.zeros(logits_BSV.shape[:2], jnp.int32)  # the places are all the same to it
  return proposal.propose(logits_BSV, None, index_BS, c, -1)["confidence"]


def confidences(ckpt, config, asked, width, batch_size):
  """Negative entropy, as the sampler sees it, of the masked positions of canvases.

  Args:
    ckpt: `Pretrained`. config: `SamplerConfig`, whose temperature, top_p and top_k shape the
      distribution. asked: list of (`dumps.Row`, step). width: places of the longest row.
    batch_size: canvases asked at once.
  Returns:
    float [len(asked), width], nats; NaN where nothing was masked.
  """
  length = queue.bucket(max(len(row.tokens) for row, _ in asked))
  found = np.full((len(asked), width), np.nan)
  for begin in range(0, len(asked), batch_size):
    batch = asked[begin : begin + batch_size]
    canvas_BL = np.zeros((batch_size, length), np.int32)
    valid_BL = np.zeros((batch_size, length), bool)
    index_BS = np.zeros((batch_size, width), np.int32)
    # The last batch is filled up, so that it needs no program of its own.
    for b in range(batch_size):
      row, step = batch[min(b, len(batch) - 1)]
      first, places = length - len(row.tokens), np.flatnonzero(row.written)
      canvas_BL[b, first:], valid_BL[b, first:] = canvas_before(row, step, ckpt.mask_id), True
      index_BS[b, : len(places)] = first + places
    with jax.set_mesh(ckpt.mesh):
      place = functools.partial(jax.device_put, device=sharding.batch_sharding(ckpt.mesh))
      inputs = (place(x) for x in (canvas_BL, valid_BL, index_BS))
      logits_BSV = _logits(ckpt.config, ckpt.params, *inputs)
      answers_BS = np.asarray(_confidence(config, logits_BSV))
    for b, (row, _) in enumerate(batch):
      count = int(row.written.sum())
      open_S = np.take_along_axis(canvas_BL[b], index_BS[b, :count], 0) == ckpt.mask_id
      found[begin + b, :count] = np.where(open_S, answers_BS[b, :count], np.nan)
  return found


def confidence_maps(decodings, ckpt, config, problems, map_steps, batch_size):
  """Confidence by position at the first step, of all rows, and step by step, of the first few.

  Args:
    decodings: `dumps.Decodings`. ckpt: `Pretrained` to ask; None: what the dumps hold is taken.
    config: `SamplerConfig` of the decodings. problems: how many rows the map is the mean of.
    map_steps: its rows, which divide the steps that were taken evenly. batch_size: canvases at once.
  Returns:
    (float [B, L], float [map_steps, L] or None); (None, None) where nothing is known.
  Raises:
    ValueError: a token that the network does not know.
  """
  rows, few = decodings.rows, decodings.rows[:problems]
  width = decodings.step.shape[1]
  edges = np.arange(map_steps) / map_steps
  steps = [(edges * (int(row.step.max(initial=0)) + 1)).astype(int) for row in few]
  if ckpt is not None:
    for row in rows:
      if row.tokens.max(initial=0) >= ckpt.config.vocab_size:
        raise ValueError(
          f"problem {row.name} holds token {row.tokens.max()}, and this checkpoint knows only "
          f"{ckpt.config.vocab_size}: give the --checkpoint that the traces were sampled from"
        )
    ask = functools.partial(confidences, ckpt, config, width=width, batch_size=batch_size)
    first = ask([(row, 0) for row in rows])
    asked = [(row, int(s)) for row, at in zip(few, steps, strict=True) for s in at]
    grid = ask(asked).reshape(len(few), map_steps, width) if few else None
  elif all(row.confidence is not None for row in rows):
    first = np.full((len(rows), width), np.nan)
    grid = np.full((len(few), map_steps, width), np.nan)
    for i, row in enumerate(rows):
      first[i, : row.written.sum()] = row.confidence[0][row.written]
      if i < len(few):
        grid[i, :, : row.written.sum()] = row.confidence[steps[i]][:, row.written]
  else:
    return None, None
  return first, arness.column_means(grid) if few else None
