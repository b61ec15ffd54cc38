"""Training: the step that `train` runs against the same step in PyTorch, on the same masks."""

import functools
import pathlib
import statistics
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax import train
from diffucoder_jax.benchmarking import networks, table, timing, twins
from diffucoder_jax.model import attention, cost
from diffucoder_jax.model.transformer import Transformer
from diffucoder_jax.runtime import optim, sharding

OURS, TWIN, FLOOR = "ours, jitted", "PyTorch twin", "matmul floor"
FORWARD, GRADIENT, STEP = "forward", "forward and backward", "whole step"
# As torch.optim.AdamW over all parameters has it, so that both sides learn the same.
OPTIM = SimpleNamespace(
  steps=1000, lr=3e-4, warmup_steps=0, schedule="constant", lr_floor=1.0, b1=0.9, b2=0.95, eps=1e-8,
  weight_decay=0.1, decay="all", clip_norm=1.0, accumulate=1, rounding="nearest",
  moment_dtype="float32",
)  # fmt: skip


def add_arguments(parser):
  """Flags of `bench train`."""
  some = timing.at_least(1)
  networks.add_arguments(parser)
  timing.add_arguments(parser)
  parser.add_argument("--batch_size", type=some, default=8, help="rows")
  parser.add_argument("--seq_len", type=some, default=256, help="tokens of a row")


def run(args):
  """Times one batch of diffusion pre-training, the same in every step; returns a `table.Table`."""
  shape = args.batch_size, args.seq_len
  with tempfile.TemporaryDirectory() as temporary:
    folder, words = networks.write(pathlib.Path(temporary), args)
    why = twins.absent()
    twin = None if why else twins.open_twin(folder)
    rows = compare(folder, twin, shape, args.repeats, args.matmul_size, args.seed)
  notes = [
    table.compared(args.repeats),
    "Masked diffusion with weight 1/t, gradient clipping, AdamW; logits at masked positions only, on "
    "both sides. Our step draws its noise, PyTorch's is given the same.",
    f"`loss`: of the first batch; of the whole step, that of step {args.repeats + 1}, after "
    f"{args.repeats} updates.",
    f"{FLOOR}: the FLOPs of the network's matrix products, backward twice those of forward, at the rate "
    f"of one float32 product of {args.matmul_size} x {args.matmul_size} matrices in JAX.",
    *time_goes(rows),
    *([why] if why else []),
  ]
  title = f"train: {words}, float32; batches of {shape[0]} x {shape[1]} tokens"
  return table.Table(title, rows, notes, {} if why else twins.versions())


def compare(folder, twin, shape, repeats, matmul_size, seed=0):
  """Times forward pass, gradient and step on both sides.

  Args:
    folder: Hugging Face folder of the weights. twin: the same as a PyTorch model, or None; trained.
    shape: (B, L). repeats: int. matmul_size: of the floor. seed: of tokens and masks.
  Returns:
    rows of a `table.Table`.
  """
  ckpt = networks.open_ours(folder)
  if shape[1] > ckpt.config.max_seq_len:
    raise ValueError(
      f"rows of {shape[1]} tokens are longer than these weights' context, {ckpt.config.max_seq_len}"
    )
  tokens_BL = np.random.default_rng(seed).integers(0, ckpt.config.vocab_size - 1, shape)
  tokens_BL += tokens_BL >= ckpt.mask_id
  ours, noised, compile_seconds = our_tasks(folder, ckpt, tokens_BL, repeats + 1, seed)
  theirs = {} if twin is None else torch_tasks(twin, tokens_BL, noised)
  multiply, flops = timing.matmul(matmul_size)
  tasks = timing.side_by_side({OURS: ours, TWIN: theirs})
  losses = {key: [] for key in tasks}
  recorded = {key: functools.partial(_record, task, losses[key]) for key, task in tasks.items()}
  seconds, _ = timing.interleave({**recorded, FLOOR: multiply}, repeats)

  rows, tokens = [], tokens_BL.size
  forward = cost.forward_flops(ckpt.config, shape[1])
  for part in ours:
    masked = [int(one.masked.sum()) for one in (noised if part == STEP else noised[:1])]
    needed = tokens * (forward.layers + forward.attention) + np.mean(masked) * forward.head
    needed = float(needed) * (1 if part == FORWARD else 3)
    base = seconds[part, OURS]
    floor = [needed / flops * s for s in seconds[FLOOR]]
    for who in (OURS, *([TWIN] if theirs else []), FLOOR):
      took = floor if who == FLOOR else seconds[part, who]
      rows.append({
        "what": part, "who": who, "seconds": took, "tokens_per_second": timing.rates(tokens, took),
        "x_ours": None if who == OURS else timing.ratios(took, base),
        "compile_seconds": compile_seconds[part] if who == OURS else None,
        "loss": None if who == FLOOR else losses[part, who][-1 if part == STEP else 0],
        "gflop_per_second": timing.rates(needed / 1e9, took),
      })  # fmt: skip
  return rows


def time_goes(rows):
  """A line for each side on the shares of its whole step, of `compare`'s rows."""
  lines = []
  for who in dict.fromkeys(row["who"] for row in rows if row["who"] != FLOOR):
    took = {row["what"]: statistics.median(row["seconds"]) for row in rows if row["who"] == who}
    ends = [0.0, *(took[part] for part in (FORWARD, GRADIENT, STEP))]
    parts = zip(("forward", "backward", "noise, clipping and update"), ends, ends[1:], strict=False)
    shares = ", ".join(f"{name} {(b - a) / took[STEP]:.0%}" for name, a, b in parts)
    lines.append(f"of a whole step, {who}: {shares} (differences of medians)")
  return lines


def _record(task, losses):
  losses.append(task())


def whole_rows(tokens_BL):
  """A batch for `train.train_step`: rows of one document each, all of it maskable."""
  shape = tokens_BL.shape
  return {
    "tokens": tokens_BL.astype(np.int32), "segment_ids": np.ones(shape, np.int32),
    "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    "maskable": np.ones(shape, bool),
  }  # fmt: skip


def our_tasks(folder, ckpt, tokens_BL, steps, seed):
  """Our side: ({part: task that returns the loss}, `process.Noised` of each step, compile seconds).

  Args: folder, ckpt: the weights. tokens_BL: int. steps: how often the step will be called. seed: int.
  """
  mesh, model, objective = ckpt.mesh, Transformer(ckpt.config), train.Objective()
  key = jax.random.key(seed)
  tx, _ = optim.make_optimizer(OPTIM)
  with jax.set_mesh(mesh):
    abstract, make = train.initial_state(
      SimpleNamespace(init_from=str(folder)), mesh, model, tx, jax.random.key(0)
    )
    state = make()
    batch = sharding.put_batch(whole_rows(tokens_BL), mesh)

    # What `train.train_step` makes of the batch before it computes.
    @jax.jit
    def prepare(batch, step):
      return train.PREPARE[objective.kind](
        objective, ckpt.mask_id, batch, step, jax.random.fold_in(key, step)
      )

    prepared = [prepare(batch, jnp.asarray(step)) for step in range(steps)]
    loss_fn = functools.partial(train.loss_of, model, objective, attention.FULL)

    def forward(params, rows):
      (total, weight), _ = loss_fn(params, rows)
      return total / weight

    def gradient(params, rows):
      (loss, _), grads = optim.accumulated_value_and_grad(loss_fn, params, rows, 1)
      return loss, grads

    step_fn = train.make_step_fn(model, tx, objective, ckpt.mask_id, 1, abstract, mesh)
    fns = {FORWARD: jax.jit(forward), GRADIENT: jax.jit(gradient), STEP: step_fn}
    rest = (ckpt.params, prepared[0])
    arguments = {FORWARD: rest, GRADIENT: rest, STEP: (state, batch, key)}
    programs, seconds = {}, {}
    for part, fn in fns.items():
      programs[part], seconds[part] = timing.compiled(fn, *arguments[part])

  def step():
    nonlocal state
    state, metrics = jax.block_until_ready(programs[STEP](state, batch, key))
    return float(metrics["loss"])

  tasks = {
    FORWARD: lambda: float(programs[FORWARD](*rest)),
    GRADIENT: lambda: float(jax.block_until_ready(programs[GRADIENT](*rest))[0]),
    STEP: step,
  }
  return tasks, [jax.device_get(one["noised"]) for one in prepared], seconds


def torch_tasks(model, tokens_BL, noised):
  """Their side: {part: task that returns the loss}; the step goes through `noised` one by one."""
  import torch
  from torch.nn import functional as F

  adamw = torch.optim.AdamW(
    model.parameters(), lr=OPTIM.lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps,
    weight_decay=OPTIM.weight_decay, fused=True,
  )  # fmt: skip
  tokens_BL = torch.tensor(tokens_BL)
  inputs = [
    (torch.tensor(one.tokens).long(), torch.tensor(one.masked), torch.tensor(np.asarray(one.t)))
    for one in noised
  ]
  left = iter(inputs)
  model.train()

  def loss_of(noisy_BL, masked_BL, t_B):
    x_BLD = model.model(noisy_BL)[0]
    x_BLD = torch.cat([x_BLD[:, :1], x_BLD[:, :-1]], 1)  # aligned with their targets
    logits_PV = model.unembed(x_BLD[masked_BL])
    nll_P = F.cross_entropy(logits_PV, tokens_BL[masked_BL], reduction="none")
    t_P = t_B[:, None].expand(masked_BL.shape)[masked_BL]
    return (nll_P / t_P).sum() / masked_BL.sum()

  def forward():
    with torch.no_grad():
      return float(loss_of(*inputs[0]))

  def gradient():
    adamw.zero_grad()
    loss = loss_of(*inputs[0])
    loss.backward()
    return loss.item()

  def step():
    adamw.zero_grad()
    loss = loss_of(*next(left))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
    adamw.step()
    return loss.item()

  return {FORWARD: forward, GRADIENT: gradient, STEP: step}
