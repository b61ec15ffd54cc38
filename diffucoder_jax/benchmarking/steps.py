"""What one step of denoising costs, against the length of the canvas and the number of rows.

Beside it stands the roofline: the step's FLOPs at the rate of one large matrix product, or the bytes of
its weights at the rate of one large copy, whichever takes longer; and where the seconds go, each part
timed alone.
"""

import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.benchmarking import networks, table, timing
from diffucoder_jax.diffusion import unmasking
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.model import attention, cost, layout
from diffucoder_jax.model.projection import INPUTS_LAST
from diffucoder_jax.model.transformer import Transformer, positions_of, unembed

COPIED = 1 << 26  # float32 elements, more than any cache holds


def add_arguments(parser):
  """Flags of `bench steps`."""
  some = timing.at_least(1)
  networks.add_arguments(parser)
  timing.add_arguments(parser)
  flag = parser.add_argument
  flag("--lengths", type=timing.at_least(2), nargs="+", metavar="L",
       default=(128, 256, 512, 1024, 2048, 4096),
       help="of the canvas, with --batch rows; half of it is masks")  # fmt: skip
  flag("--batches", type=some, nargs="+", default=(1, 2, 4, 8, 16, 32, 64), metavar="B",
       help="rows, of --length")  # fmt: skip
  flag("--length", type=timing.at_least(2), default=128)
  flag("--batch", type=some, default=1)
  flag("--budget", type=float, default=300.0, metavar="SECONDS",
       help="larger steps are left out, and named, when so much time has gone")  # fmt: skip


def run(args):
  """Times the grid; returns a `table.Table` with a picture."""
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "weights"
    folder.mkdir()
    folder, words = networks.write(folder, args)
    ckpt = networks.open_ours(folder)
  laid = networks.laid_out(ckpt)
  shapes = [(args.batch, n) for n in args.lengths] + [(b, args.length) for b in args.batches]
  shapes = sorted(dict.fromkeys(shapes), key=lambda shape: shape[0] * shape[1])
  fits = [shape for shape in shapes if shape[1] <= ckpt.config.max_seq_len]
  rows, late = [], []
  for shape in fits:
    if time.monotonic() - began > args.budget:
      late.append(shape)
    else:
      rows.append(measure(laid, shape, args.repeats, args.matmul_size))
  long = [shape for shape in shapes if shape not in fits]
  notes = [
    table.repeated(args.repeats),
    "`step`: the network on B x L tokens, logits of half of them, and the choice.",
    "`roofline`: the FLOPs of projections, attention and logits at the rate of one float32 product of "
    f"{args.matmul_size} x {args.matmul_size} matrices, or the bytes of all weights at the rate of a "
    "large copy; `bound`: which takes longer. `x roofline`: step over it, turn by turn.",
    "`projections`, `attention`, `unembed`, `choose`: the part alone, as share of the step. "
    "`x projections`, `x unembed`: over the time of its own FLOPs; where that is large, the step leaves "
    "the roofline.",
    *(f"left out: {b} x {n}, longer than these weights' context" for b, n in long),
    *(f"left out: {b} x {n}, --budget was spent" for b, n in late),
  ]  # fmt: skip
  title = f"steps: one step of denoising, {words}, float32"
  return table.Table(title, rows, notes, picture=picture(rows, args))


def measure(ckpt, shape, repeats, matmul_size):
  """One row of the table. Args: ckpt: `Pretrained`, laid out. shape: (B, L)."""
  batch, length = shape
  tasks = {name: _ready(fn, args) for name, (fn, args) in parts(ckpt, shape).items()}
  multiply, flops = timing.matmul(matmul_size)
  big = jnp.ones(COPIED, jnp.float32)
  tasks |= {"matmul": multiply, "copy": _ready(lambda x: x + 1, (big,))}
  seconds, _ = timing.interleave(tasks, repeats)
  forward, tokens = cost.forward_flops(ckpt.config, length), batch * length
  needed = dict(
    projections=tokens * forward.layers, attention=tokens * forward.attention,
    unembed=batch * (length // 2) * forward.head,
  )  # fmt: skip
  weights = 4 * (
    ckpt.config.num_layers * cost.layer_weights(ckpt.config) + cost.head_weights(ckpt.config)
  )
  rate = [flops / s for s in seconds["matmul"]]
  compute = [sum(needed.values()) / r for r in rate]
  memory = [weights / (8 * COPIED / s) for s in seconds["copy"]]
  roofline = list(map(max, compute, memory))
  row = {
    "batch": batch, "length": length, "step": seconds["step"], "roofline": roofline,
    "bound": "FLOPs" if np.median(compute) > np.median(memory) else "bytes",
    "x_roofline": timing.ratios(seconds["step"], roofline),
  }  # fmt: skip
  for name in ("projections", "attention", "unembed", "choose"):
    row[name] = timing.ratios(seconds[name], seconds["step"])
  for name in ("projections", "unembed"):
    row[f"x_{name}"] = [s * r / needed[name] for s, r in zip(seconds[name], rate, strict=True)]
  return row


def _ready(fn, args):
  program = jax.jit(fn).lower(*args).compile()
  return lambda: jax.block_until_ready(program(*args))


def parts(ckpt, shape):
  """{part: (function, arguments)} of a step: all of it, and each kind of work by itself."""
  (batch, length), c = shape, ckpt.config
  rng = np.random.default_rng(0)
  canvas_BL = jnp.asarray(rng.integers(0, c.vocab_size - 1, shape), jnp.int32)
  valid_BL = jnp.ones(shape, bool)
  segment_ids_BL = valid_BL.astype(jnp.int32)
  slots = length // 2
  index_BS = jnp.broadcast_to(jnp.arange(length - slots, length), (batch, slots))
  masked_BS, count_B = jnp.ones((batch, slots), bool), jnp.ones(batch, jnp.int32)
  greedy = SamplerConfig(temperature=0.0, top_p=1.0)

  def features(params, canvas_BL, config=c):
    model = Transformer(config)
    x_BLD = model.apply({"params": params}, canvas_BL, segment_ids_BL, positions_of(valid_BL))
    return x_BLD[:, length - slots :]

  def choose(logits_BSV):
    choice, _ = unmasking.choose(
      logits_BSV, lambda logits: logits, masked_BS, count_B, jnp.ones(batch), None, index_BS, greedy,
      ckpt.mask_id,
    )  # fmt: skip
    return choice.tokens, choice.chosen

  def attend(q_BLHK, k_BLJK):
    def layer(_, q_BLHK):
      return attention.attend(
        q_BLHK, k_BLJK, k_BLJK, segment_ids_BL, attention.FULL, c.attention_impl
      )

    return jax.lax.fori_loop(0, c.num_layers, layer, q_BLHK)

  def project(matrices, x_XD):
    """All products of all layers with their weights, each on inputs of its width."""
    wide = {x_XD.shape[1]: x_XD}
    total = 0.0
    for matrix in matrices:
      width = matrix.shape[1]
      wide.setdefault(width, jnp.resize(x_XD, (x_XD.shape[0], width)))
      y_XO = jnp.einsum("XI,OI->XO", wide[width] + total * 1e-30, matrix)
      total += jax.lax.optimization_barrier(y_XO)[0, 0]  # all of it, not what is read alone
    return total

  laid = ckpt.params if "layer_0" in ckpt.params else jax.jit(layout.unrolled)(ckpt.params)
  matrices = [
    x for path, x in jax.tree.leaves_with_path(laid) if path[-1].key.endswith(INPUTS_LAST)
  ]
  x_XD = jnp.ones((batch * length, c.embed_dim))
  x_BSD = jnp.ones((batch, slots, c.embed_dim))
  q_BLHK = jnp.ones((*shape, c.num_heads, c.head_dim))
  logits_BSV = jnp.asarray(rng.standard_normal((batch, slots, c.vocab_size), np.float32))
  step = lambda params, canvas_BL: choose(unembed(params, features(params, canvas_BL)))  # noqa: E731
  return {
    "step": (step, (ckpt.params, canvas_BL)), "projections": (project, (matrices, x_XD)),
    "attention": (attend, (q_BLHK, q_BLHK[:, :, : c.num_kv_heads])),
    "unembed": (unembed, (ckpt.params, x_BSD)), "choose": (choose, (logits_BSV,)),
  }  # fmt: skip


def picture(rows, args):
  """(path) -> None: seconds of a step and its roofline against length and rows."""

  def draw(path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, fixed in (
      (left, "length", ("batch", args.batch)),
      (right, "batch", ("length", args.length)),
    ):
      mine = sorted((row for row in rows if row[fixed[0]] == fixed[1]), key=lambda row: row[key])
      for name, mark in (("step", "o-"), ("roofline", "--")):
        axes.loglog(
          [row[key] for row in mine],
          [timing.middle(row[name])[0] for row in mine],
          mark,
          label=name,
        )
      axes.set_xticks([row[key] for row in mine], [f"{row[key]:,}" for row in mine])
      axes.minorticks_off()
      axes.set_xlabel(f"{key}, with {fixed[0]} {fixed[1]}")
      axes.legend(frameon=False)
    left.set_ylabel("seconds")
    figure.savefig(path, dpi=150)

  return draw
