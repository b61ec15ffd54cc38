"""Denoising: our sampler against `diffusion_generate` in PyTorch, on the same weights and prompts.

With blocks, a cache, a threshold or another bound, or with an end, ours is timed twice: exactly, and as
asked.
"""

import dataclasses
import functools
import pathlib
import tempfile
from types import SimpleNamespace

import jax
import numpy as np

from diffucoder_jax import completion
from diffucoder_jax.benchmarking import networks, rivals, table, timing
from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import cache, canvas, sampler
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.model import cost, windows
from diffucoder_jax.model.transformer import Transformer, unembed_fn
from diffucoder_jax.requests import names_of, read_requests, to_prompt

ALGS = "entropy", "maskgit_plus", "topk_margin"  # in which both sides have the same order
OURS, ASKED, FLOOR = "ours, jitted", "ours, as asked", "matmul floor"
# Fields of `SamplerConfig` that are flags here: what makes it quicker, most of it at a cost in quality.
QUICKER = {
  "block_size": "positions written together, from left to right; 0: anywhere",
  "cache": "with blocks, which places are computed anew at each step: " + ", ".join(cache.WINDOWS),
  "refresh": "with a cache, evaluations from one reading of the whole canvas to the next; 0: a block's",
  "threshold": "also commit all tokens with a probability above it",
  "kl_bound": "of these only the ones that hardly change, in nats",
  "entropy_bound": "also commit as many as depend on each other by at most so many nats",
  "stop_at_eos": "a row stops when all before its first end token is written",
}


def add_arguments(parser):
  """Flags of `bench sample`; the defaults take some ten minutes on two cores."""
  some = timing.at_least(1)
  networks.add_arguments(parser)
  timing.add_arguments(parser)
  flag = parser.add_argument
  flag(
    "--batch_sizes", type=some, nargs="+", default=(1, 4), metavar="B",
    help="one after the other",
  )  # fmt: skip
  flag("--prompt_tokens", type=some, default=64, help="of each prompt, random ids")
  flag("--prompts", metavar="FILE", help='jsonl of {"prompt": text} instead, as for generate')
  flag("--first", type=timing.at_least(0), default=0, metavar="N",
       help="so many of the prompts, in batches; 0: one batch")  # fmt: skip
  flag("--chat", action="store_true", help="they are what a user says")
  flag("--system", default=chat.SYSTEM, help="with --chat, the system message; '' for none")
  flag("--new_tokens", type=some, default=128, help="for each prompt")
  flag(
    "--steps", type=timing.at_least(0), default=0, help="of denoising; 0: one for each new token"
  )
  flag("--alg", choices=ALGS, default="entropy",
       help="which positions are written first")  # fmt: skip
  flag("--top_p", type=float, default=1.0, help="1: off")
  for field in dataclasses.fields(SamplerConfig):
    if field.name in QUICKER:
      kind = dict(action="store_true") if field.type is bool else dict(type=field.type)
      flag(f"--{field.name}", default=field.default, help=QUICKER[field.name], **kind)
  flag("--end_id", type=int, default=-1, metavar="ID", help="the token that ends an answer; -1: what "
       "ends a turn with --chat, or the tokenizer's")  # fmt: skip
  flag("--dream", metavar="FOLDER", help="one with the model files of a Dream checkpoint at Hugging "
       "Face; they are run on the weights that all others run on")  # fmt: skip
  flag("--fast_dllm", metavar="FOLDER", help="as --dream, with those of Fast-dLLM (dream/model in "
       "github.com/NVlabs/Fast-dLLM), which need a cache, a threshold and one row")  # fmt: skip


def configs_of(args):
  """(exact, asked): `SamplerConfig`s at temperature 0; asked is None where nothing quicker is.

  Raises: ValueError: of the sampler, of flags that need others, or of what --fast_dllm needs.
  """
  if (args.chat or args.first) and not args.prompts:
    raise ValueError("--chat and --first are of --prompts; give a file of them")
  exact = SamplerConfig(
    alg=args.alg, steps=args.steps or args.new_tokens, max_new_tokens=args.new_tokens,
    temperature=0.0, top_p=args.top_p,
  )  # fmt: skip
  asked = dataclasses.replace(exact, **{name: getattr(args, name) for name in QUICKER})
  if args.fast_dllm and (asked.cache == "none" or asked.threshold == 1 or args.alg != rivals.ALG):
    raise ValueError(
      f"--fast_dllm is compared at --alg {rivals.ALG}, which its code ranks by, with --block_size, "
      "--cache and --threshold below 1"
    )
  return exact, asked if asked != exact else None


def run(args):
  """Times sampling at temperature 0; returns a `table.Table`."""
  exact, asked = configs_of(args)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "weights"
    folder.mkdir()
    folder, words = networks.write(folder, args)
    ckpt = networks.laid_out(networks.open_ours(folder))
    end_id = end_of(args, ckpt)
    batches = {batch: batches_of(args, ckpt, batch, exact) for batch in args.batch_sizes}
    opened = rivals.open_all(folder, ckpt, asked or exact, args.dream, args.fast_dllm)
    models, notes, versions = opened
    rows = []
    for some in batches.values():
      rows += compare(ckpt, models, some, (exact, asked), args.repeats, args.matmul_size, end_id)
  prompts = f"{args.prompts}" if args.prompts else f"random ones of {args.prompt_tokens} tokens"
  title = (
    f"sample: {words}, float32; prompts: {prompts}; {args.new_tokens} new tokens in {exact.steps} "
    f"steps, {exact.alg}, temperature 0"
  )
  return table.Table(title, rows, [*_notes(args, asked, end_id), *notes], versions)


def _notes(args, asked, end_id):
  """How to read the table."""
  notes = [
    table.compared(args.repeats),
    "Our weights are laid out before (`model/layout.py`), as `generate` does once a batch; that is not "
    "in the seconds either.",
    "`equal`: tokens that are ours, at the same place. `gflop per second`: what the network's "
    "projections and attention, and the logits of what is still masked, need in every evaluation.",
    f"{FLOOR}: these FLOPs at the rate of one float32 product of {args.matmul_size} x "
    f"{args.matmul_size} matrices in JAX.",
  ]
  if asked is None:
    return notes
  changes = {name: getattr(asked, name) for name in QUICKER}
  default = SamplerConfig()
  named = [f"{k} {v}" for k, v in changes.items() if v != getattr(default, k)]
  notes.append(
    f"{ASKED}: {', '.join(named)}. `x asked`: seconds over its; `equal asked`: of its `tokens asked` "
    "those that are the same. Evaluations of a cache are of a part of the canvas, but for the refreshes."
  )
  if asked.block_size:
    notes.append(
      f"{rivals.BLOCKS}: the exact sampler block by block; no cache, threshold or end is in it."
    )
  if args.fast_dllm and max(args.batch_sizes) > 1:
    notes.append(f"{rivals.FAST_DLLM} takes one row at a time: it is in batches of 1 alone.")
  if asked.stop_at_eos:
    notes.append(
      f"Tokens: up to the first end token ({end_id}) of each row, that one included; without an end, all."
    )
  return notes


def end_of(args, ckpt):
  """The id that ends an answer, or -1. Raises ValueError where --stop_at_eos needs one."""
  tokenizer = ckpt.tokenizer
  found = ckpt.eos_id if tokenizer is None or not args.chat else tokenizer.end_of_turn_id
  found = found if args.end_id < 0 else args.end_id
  if args.stop_at_eos and found < 0:
    raise ValueError("--stop_at_eos needs an end token, and these weights name none; give --end_id")
  if found >= ckpt.config.vocab_size:
    raise ValueError(f"--end_id {found} is outside the vocabulary 0..{ckpt.config.vocab_size - 1}")
  return found


def batches_of(args, ckpt, batch, config):
  """Prompts in batches: lists of lists of token ids. Raises ValueError for those that cannot be had."""
  if not args.prompts:
    rng = np.random.default_rng(args.seed)
    # The mask is in no prompt: it would be a hole to fill.
    ids_BL = rng.integers(0, ckpt.config.vocab_size - 1, (batch, args.prompt_tokens))
    return [completion.check(ckpt, (ids_BL + (ids_BL >= ckpt.mask_id)).tolist(), config)]
  if ckpt.tokenizer is None:
    raise ValueError(f"{args.ckpt or args.preset} has no tokenizer to read --prompts with")
  asked = SimpleNamespace(**{**vars(args), "prompt": None, "infill": None})
  number = args.first or batch
  requests = read_requests(asked)[:number]
  if len(requests) < number or number % batch:
    raise ValueError(f"{number} prompts of {args.prompts} do not make batches of {batch}")
  prompts = [to_prompt(asked, ckpt, request) for request in requests]
  rows = completion.check(ckpt, prompts, config, names=names_of(asked, requests))
  holes = [
    name for name, row in zip(names_of(asked, requests), rows, strict=True) if ckpt.mask_id in row
  ]
  if holes:
    raise ValueError(f"{holes[0]} has holes, which are not timed here; give prompts")
  return [rows[i : i + batch] for i in range(0, number, batch)]


def compare(ckpt, models, batches, configs, repeats, matmul_size, end_id=-1):
  """Times some batches of one size on all sides.

  Args:
    ckpt: `Pretrained`. models: of `rivals.open_all`, of the same weights.
    batches: lists of prompts, which are ids without masks. configs: (exact, asked), `configs_of`.
    repeats: int. matmul_size: of the floor. end_id: of `stop_at_eos`.
  Returns:
    rows of a `table.Table`, ours first, the floor last.
  """
  exact, asked = configs
  batch = len(batches[0])
  length = max(len(row) for rows in batches for row in rows) + exact.max_new_tokens
  sides = {OURS: exact} if asked is None else {OURS: exact, ASKED: asked}
  tasks, compile_seconds = {}, {}
  for name, config in sides.items():
    tasks[name], compile_seconds[name] = our_sampler(ckpt, batches, length, config, end_id)
  for name, (model, sample) in models.items():
    if name == rivals.FAST_DLLM and batch > 1:
      continue
    config = asked if name in (rivals.BLOCKS, rivals.FAST_DLLM) else exact
    tasks[name] = functools.partial(rivals.answer, model, sample, batches, config)
  multiply, flops = timing.matmul(matmul_size)
  seconds, found = timing.interleave({**tasks, FLOOR: multiply}, repeats)

  stops = asked is not None and asked.stop_at_eos
  answers = {name: found[name].tokens_RN for name in tasks}
  tokens_RN, meant_RN = answers[OURS], upto_end(answers[OURS], end_id, stops)
  rows = []
  for name in tasks:
    rows.append({
      "batch": batch, "who": name, "seconds": seconds[name],
      "tokens_per_second": timing.rates(int(meant_RN.sum()), seconds[name]),
      "x_ours": None if name == OURS else timing.ratios(seconds[name], seconds[OURS]),
      "evaluations": found[name].evaluations, "compile_seconds": compile_seconds.get(name),
      "tokens": int(meant_RN.sum()),
      "equal": None if name == OURS else int((answers[name] == tokens_RN)[meant_RN].sum()),
    })  # fmt: skip
    if asked is not None and name != ASKED:
      asked_RN = upto_end(answers[ASKED], end_id, stops)
      rows[-1] |= {
        "x_asked": timing.ratios(seconds[name], seconds[ASKED]), "tokens_asked": int(asked_RN.sum()),
        "equal_asked": int((answers[name] == answers[ASKED])[asked_RN].sum()),
      }  # fmt: skip
  # What is needed by all that go through the whole canvas for the whole buffer.
  passes, number = found[OURS].evaluations, len(batches) * batch
  scored = sum(map(masks_read, found[OURS].step_RN)) / passes
  needed = cost.scoring(ckpt.config, number * length, length, passes, scored).useful
  floor = [needed / flops * s for s in seconds[FLOOR]]
  rows.append({
    "batch": batch, "who": FLOOR, "seconds": floor,
    "tokens_per_second": timing.rates(int(meant_RN.sum()), floor),
    "x_ours": timing.ratios(floor, seconds[OURS]),
  })  # fmt: skip
  if asked is not None:
    rows[-1]["x_asked"] = timing.ratios(floor, seconds[ASKED])
  for row in rows:
    if row["who"] in (OURS, rivals.TWIN, rivals.DREAM, FLOOR):
      row["gflop_per_second"] = timing.rates(needed / 1e9, row["seconds"])
  return rows


def upto_end(tokens_RN, end_id, stops):
  """Which tokens are meant: all, or with an end those up to the first one; bool [R, N]."""
  ends_RN = tokens_RN == end_id
  return (np.cumsum(ends_RN, axis=1) - ends_RN == 0) | (not stops)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(model_config, config, ids, batch_sizes, params, canvas_BL, valid_BL, keys_B):
  mask_id, end_id = ids
  model, window = Transformer(model_config), cache.WINDOWS.get(config.cache)
  features_fn = windows.features_fn(model, params, config.block_size, window)
  return sampler.generate(
    features_fn, canvas_BL, valid_BL, keys_B, config, mask_id=mask_id,
    end_ids=(end_id,) if end_id >= 0 else (), slots=config.max_new_tokens,
    batch_sizes=batch_sizes, unembed=unembed_fn(model, params),
  )  # fmt: skip


def fewer(config, batch):
  """Numbers of rows that go on alone when the others are done: halves of the batch."""
  if config.cache != "none" or not (config.stop_at_eos or config.in_parallel):
    return ()
  return tuple(size for i in range(1, 4) if (size := batch >> i))


def our_sampler(ckpt, batches, length, config, end_id):
  """Our side of it: (task that returns `rivals.Answers`, seconds of compilation)."""
  batch = len(batches[0])
  with jax.set_mesh(ckpt.mesh):
    keys = sampler.row_keys(0, batch)
    inputs = [
      jax.device_put((*canvas.lay_out(rows, length, config.max_new_tokens, ckpt.mask_id), keys))
      for rows in batches
    ]
    fixed = ckpt.config, config, (ckpt.mask_id, end_id), fewer(config, batch)
    program, seconds = timing.compiled(_generate, *fixed, ckpt.params, *inputs[0])

  def task():
    traces = [jax.block_until_ready(program(ckpt.params, *arrays)) for arrays in inputs]
    tokens_RL = np.concatenate([trace.tokens for trace in traces])
    evaluations = float(np.mean([np.max(trace.nfe) for trace in traces]))
    of_a_row = float(np.mean([np.mean(trace.nfe) for trace in traces]))
    new = np.s_[:, length - config.max_new_tokens :]
    step_RN = np.concatenate([trace.step for trace in traces])[new]
    return rivals.Answers(tokens_RL[new], evaluations, of_a_row, step_RN)

  return task, seconds


def masks_read(step_N):
  """Masks that a row's evaluations had before them, in all, if each wrote something; of `Trace.step`."""
  _, evaluation_N = np.unique(step_N[step_N >= 0], return_inverse=True)
  return int(np.sum(evaluation_N + 1))
