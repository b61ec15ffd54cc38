"""Coupled-GRPO's scores of completions, and their gradient, against dense logits in PyTorch."""

import functools
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffucoder_jax.benchmarking import networks, table, timing, twins
from diffucoder_jax.grpo import logps, masks
from diffucoder_jax.model import cost
from diffucoder_jax.model.transformer import Transformer

OURS, TWIN, FLOOR = "ours, jitted", "PyTorch, dense", "matmul floor"
SCORES, GRADIENT = "scores", "scores and gradient"


def add_arguments(parser):
  """Flags of `bench logps`."""
  some = timing.at_least(1)
  networks.add_arguments(parser)
  timing.add_arguments(parser)
  flag = parser.add_argument
  flag("--batch_size", type=some, default=4, help="completions")
  flag("--prompt_tokens", type=timing.at_least(0), default=64, help="before each completion")
  flag("--new_tokens", type=some, default=128, help="of each completion, all of them scored")
  flag(
    "--pairs", type=some, default=1, help="of complementary masks; passes are twice as many and one"
  )


def run(args):
  """Times the scores of one batch of random completions; returns a `table.Table`."""
  shape = args.batch_size, args.prompt_tokens + args.new_tokens
  with tempfile.TemporaryDirectory() as temporary:
    folder, words = networks.write(pathlib.Path(temporary), args)
    ckpt, why = networks.open_ours(folder), twins.absent()
    twin = None if why else twins.open_twin(folder)
    rng = np.random.default_rng(args.seed)
    tokens_BL = rng.integers(0, ckpt.config.vocab_size - 1, shape).astype(np.int32)
    tokens_BL += tokens_BL >= ckpt.mask_id
    completion_BL = np.broadcast_to(np.arange(shape[1]) >= args.prompt_tokens, shape)
    passes = masks.draw_masks(
      jax.random.key(args.seed), np.arange(shape[0]), completion_BL,
      masks.Estimator(pairs=args.pairs),
    )  # fmt: skip
    rows = compare(ckpt, twin, tokens_BL, passes, args.repeats, args.matmul_size)
  notes = [
    table.compared(args.repeats),
    "Tokens: of prompts and completions, once, not once per pass.",
    "Ours: logits of scored positions only, 256 at a time, and passes run again in the backward pass. "
    "PyTorch: all logits of a pass at once, all passes kept for the backward pass.",
    "`temporary mb`: what XLA's program needs beside its arguments and results; PyTorch does not say. "
    "`largest difference`: of a token's score from ours, nats.",
    f"{FLOOR}: the FLOPs of the network's matrix products, logits of scored positions only, at the rate "
    f"of one float32 product of {args.matmul_size} x {args.matmul_size} matrices in JAX.",
    *([why] if why else []),
  ]
  title = (
    f"logps: {words}, float32; {shape[0]} completions of {args.new_tokens} tokens behind prompts of "
    f"{args.prompt_tokens}, coupled, {len(passes.masked)} passes"
  )
  return table.Table(title, rows, notes, {} if why else twins.versions())


def compare(ckpt, twin, tokens_BL, passes, repeats, matmul_size):
  """Times scores and gradient on both sides.

  Args:
    ckpt: `Pretrained`. twin: the same weights as a PyTorch model, or None. tokens_BL: int32.
    passes: `masks.Passes`. repeats: int. matmul_size: of the floor.
  Returns:
    rows of a `table.Table`.
  """
  ours, compile_seconds, megabytes = our_tasks(ckpt, tokens_BL, passes)
  theirs = {} if twin is None else torch_tasks(twin, tokens_BL, passes)
  multiply, flops = timing.matmul(matmul_size)
  tasks = timing.side_by_side({OURS: ours, TWIN: theirs})
  seconds, results = timing.interleave({**tasks, FLOOR: multiply}, repeats)

  batch, length = tokens_BL.shape
  count = len(passes.masked)
  scored = int(np.sum(np.asarray(passes.weights) != 0)) / count
  needed = cost.scoring(ckpt.config, batch * length, length, count, scored).useful
  rows = []
  for part in ours:
    work = needed * (1 if part == SCORES else 3)
    floor = [work / flops * s for s in seconds[FLOOR]]
    for who in (OURS, *([TWIN] if theirs else []), FLOOR):
      took = floor if who == FLOOR else seconds[part, who]
      row = {
        "what": part, "who": who, "seconds": took,
        "tokens_per_second": timing.rates(batch * length, took),
        "x_ours": None if who == OURS else timing.ratios(took, seconds[part, OURS]),
        "compile_seconds": compile_seconds[part] if who == OURS else None,
        "temporary_mb": megabytes[part] if who == OURS else None,
        "gflop_per_second": timing.rates(work / 1e9, took),
      }  # fmt: skip
      if who == TWIN and part == SCORES:
        difference = np.abs(results[part, TWIN] - np.asarray(results[part, OURS]))
        row["largest_difference"] = float(difference.max())
      elif part == GRADIENT and who == OURS:
        row["gradient_norm"] = float(optax.tree.norm(results[part, OURS]))
      elif part == GRADIENT and who == TWIN:
        row["gradient_norm"] = results[part, TWIN]
      rows.append(row)
  return rows


def our_tasks(ckpt, tokens_BL, passes):
  """Our side: ({part: task}, compile seconds, MB of temporaries); tasks return scores or gradients."""
  score = functools.partial(logps.token_logps, Transformer(ckpt.config), mask_id=ckpt.mask_id)

  def scores(params, tokens_BL, passes):
    return score(params, tokens_BL, None, None, passes)

  def gradient(params, tokens_BL, passes):
    return jax.grad(lambda params: jnp.sum(scores(params, tokens_BL, passes)))(params)

  programs, seconds, megabytes = {}, {}, {}
  with jax.set_mesh(ckpt.mesh):
    for part, fn in {SCORES: scores, GRADIENT: gradient}.items():
      programs[part], seconds[part] = timing.compiled(jax.jit(fn), ckpt.params, tokens_BL, passes)
      memory = programs[part].memory_analysis()
      megabytes[part] = None if memory is None else round(memory.temp_size_in_bytes / 1e6)

  def task(part):
    return jax.block_until_ready(programs[part](ckpt.params, tokens_BL, passes))

  return {part: functools.partial(task, part) for part in programs}, seconds, megabytes


def torch_tasks(model, tokens_BL, passes):
  """Their side: {part: task}; one returns scores, float32 [B, L], the other the gradient's norm."""
  import torch

  tokens_BL = torch.tensor(tokens_BL).long()
  masked_PBL, weights_PBL = (torch.tensor(np.asarray(x)) for x in (passes.masked, passes.weights))

  def scores():
    total_BL = torch.zeros(tokens_BL.shape)
    for masked_BL, weights_BL in zip(masked_PBL, weights_PBL, strict=True):
      noisy_BL = torch.where(masked_BL, model.config.mask_token_id, tokens_BL)
      logits_BLV = model(noisy_BL).logits
      logits_BLV = torch.cat([logits_BLV[:, :1], logits_BLV[:, :-1]], 1)  # aligned with targets
      logps_BLV = logits_BLV.log_softmax(-1)
      total_BL = total_BL + weights_BL * logps_BLV.gather(-1, tokens_BL[..., None])[..., 0]
    return total_BL

  def gradient():
    model.zero_grad()
    scores().sum().backward()
    return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))

  def no_gradient():
    with torch.no_grad():
      return scores().numpy()

  return {SCORES: no_gradient, GRADIENT: gradient}
