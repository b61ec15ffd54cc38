"""What speed costs: problems solved by each way to denoise, beside its network evaluations and seconds.

All ways answer the same problems with the same weights, greedily. Seconds are of programs that are
compiled and have run before. `--ckpt` must be tuned to answer, such as the quickstart's sft or grpo.
"""

import pathlib
import tempfile

import numpy as np

from diffucoder_jax.benchmarking import networks, rivals, sampling, table, timing
from diffucoder_jax.data import chat
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.evals import benchmarks, passk, verdicts
from diffucoder_jax.evals import sampling as prompting
from diffucoder_jax.execution.sandbox import Limits, Sandbox

EXACT = "exact"
BLOCK = 16  # the largest of `WAYS`
# Changes of the exact sampler, which writes one token at a step.
WAYS = (
  *(dict(steps=n) for n in (24, 12, 6)),
  *(dict(threshold=p) for p in (0.95, 0.9, 0.8, 0.7)),
  *(dict(entropy_bound=nats) for nats in (0.05, 0.2, 0.5)),
  dict(threshold=0.7, kl_bound=0.01),
  dict(block_size=BLOCK, stop_at_eos=True),
  dict(block_size=BLOCK, threshold=0.9, stop_at_eos=True),
  dict(block_size=8, threshold=0.9, stop_at_eos=True),
  *(dict(block_size=BLOCK, threshold=0.9, stop_at_eos=True, cache=c) for c in ("prefix", "dual")),
  dict(block_size=8, threshold=0.9, stop_at_eos=True, cache="dual"),
)


def add_arguments(parser):
  """Flags of `bench quality`."""
  some = timing.at_least(1)
  networks.add_arguments(parser, random=False)
  flag = parser.add_argument
  flag("--data_path", required=True, metavar="FILE", help="problems, as for evaluate")
  flag("--first", type=some, default=200, metavar="N",
       help="so many of them, in whole batches")  # fmt: skip
  flag("--batch_size", type=some, default=50)
  flag("--new_tokens", type=some, default=48,
       help=f"for each problem, and steps of the exact sampler: a multiple of {BLOCK}")  # fmt: skip
  flag("--alg", choices=sampling.ALGS, default="entropy", help="which positions are written first")
  flag("--system", default="", help="the system message; '' for none")


def run(args):
  """Times and judges; returns a `table.Table`."""
  if args.new_tokens % BLOCK:
    raise ValueError(
      f"--new_tokens is {args.new_tokens}, which blocks of {BLOCK} do not divide; give a multiple"
    )
  opened = benchmarks.open_benchmark("problems", args.data_path)
  problems = opened.problems[: args.first]
  batch = min(args.batch_size, len(problems))
  opened = opened._replace(problems=problems[: len(problems) - len(problems) % batch])
  exact = SamplerConfig(
    alg=args.alg, steps=args.new_tokens, max_new_tokens=args.new_tokens, temperature=0.0, top_p=1.0
  )
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "weights"
    folder.mkdir()
    folder, words = networks.write(folder, args)
    ckpt = networks.laid_out(networks.open_ours(folder))
    if ckpt.tokenizer is None:
      raise ValueError(f"{args.ckpt} has no tokenizer file, so problems cannot be asked; add one")
    models, notes, versions = rivals.open_all(folder, ckpt, exact)
    rows = compare(ckpt, models, opened, batch, exact, WAYS, args)
  notes = [
    table.repeated(args.repeats),
    f"`solved`: share of {len(opened.problems)} problems by one greedy answer; `low`, `high`: its 95 % "
    f"interval. `points lost`: against {EXACT}; `lost low`, `lost high`: 95 % interval, paired.",
    f"`seconds`: of an answer, without compilation, in batches of {batch}. `x quicker`: than "
    f"{rivals.TWIN}, or than {EXACT} where it is absent, turn by turn. `evaluations`: of an answer.",
    *notes,
  ]  # fmt: skip
  title = f"quality: {words}, float32; {args.new_tokens} new tokens, {args.alg}, temperature 0"
  return table.Table(title, rows, notes, versions, picture(rows))


def compare(ckpt, models, opened, batch, exact, ways, args):
  """Rows of a `table.Table`: PyTorch first, where there is one, then exact, then `ways`."""
  rows = [
    prompting.prompt_of(ckpt, problem, "chat", args.system, opened.benchmark.primer)
    for problem in opened.problems
  ]
  batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
  length = max(map(len, rows)) + exact.max_new_tokens
  configs = {EXACT: exact} | {named(way): SamplerConfig(**{**vars(exact), **way}) for way in ways}
  tasks = {
    name: (lambda m=model, s=sample: rivals.answer(m, s, batches, exact))
    for name, (model, sample) in models.items()
  }
  end_id = ckpt.tokenizer.end_of_turn_id
  for name, config in configs.items():
    tasks[name], _ = sampling.our_sampler(ckpt, batches, length, config, end_id)
  seconds, found = timing.interleave(tasks, args.repeats)
  solved, base = judge(ckpt, opened, {n: a.tokens_RN for n, a in found.items()}), next(iter(tasks))
  rows = []
  for name, answers in found.items():
    share, (low, high) = solved[name].mean(), passk.wilson(solved[name].sum(), len(solved[name]))
    lost = passk.paired_difference(solved[EXACT], solved[name])
    rows.append({
      "way": name, "solved": float(share), "low": low, "high": high,
      "points_lost": 100 * float(solved[EXACT].mean() - share), "lost_low": 100 * lost["low"],
      "lost_high": 100 * lost["high"], "evaluations": answers.of_a_row,
      "seconds": [s / len(solved[name]) for s in seconds[name]],
      "x_quicker": timing.ratios(seconds[base], seconds[name]),
    })  # fmt: skip
  return rows


def named(way):
  """Its settings in words."""
  return ", ".join(k.replace("_", " ") if v is True else f"{k} {v}" for k, v in way.items())


def judge(ckpt, opened, tokens):
  """{way: which problems its answers solve, bool [R]} of {way: int [R, N]}."""
  stop = {ckpt.eos_id, ckpt.pad_id, ckpt.tokenizer.end_of_turn_id}
  stop |= {ckpt.tokenizer.special_ids.get(chat.PAD, -1)}
  post, solved = opened.benchmark.asked["chat"], {}
  limits = Limits(cpu_seconds=1.0, wall_seconds=5.0)
  with Sandbox(limits=limits, packages=verdicts.packages_of(opened)) as sandbox:
    for way, tokens_RN in tokens.items():
      rows = {}
      for problem, ids in zip(opened.problems, tokens_RN.tolist(), strict=True):
        cut = next((i for i, token in enumerate(ids) if token in stop), len(ids))
        text = ckpt.tokenizer.decode([token for token in ids[:cut] if token != ckpt.mask_id])
        rows[problem.task_id, 0] = {"solution": post(problem, opened.benchmark.primer + text)}
      found = verdicts.judge(opened, rows, sandbox)
      solved[way] = np.asarray([verdict.solved for verdict in found])
  return solved


def front(points):
  """Which of (cost, share) no other one beats: cheaper ones all solve less; indices, cheapest first."""
  kept = []
  for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
    if not kept or points[i][1] > points[kept[-1]][1]:
      kept.append(i)
  return kept


def picture(rows):
  """(path) -> None: share of problems solved against evaluations, and against seconds."""

  def draw(path):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    for axes, key, words in zip(
      figure.subplots(1, 2, sharey=True), ("evaluations", "seconds"),
      ("network evaluations of an answer", "seconds of an answer"), strict=True,
    ):  # fmt: skip
      cost = [timing.middle(row[key])[0] if key == "seconds" else row[key] for row in rows]
      share = [100 * row["solved"] for row in rows]
      best = front(list(zip(cost, share, strict=True)))
      axes.step([cost[i] for i in best], [share[i] for i in best], where="post", color="C0", lw=1)
      for i, row in enumerate(rows):
        bars = [[share[i] - 100 * row["low"]], [100 * row["high"] - share[i]]]
        color = "C0" if i in best else "0.6"
        axes.errorbar(cost[i], share[i], bars, marker="o", color=color, ms=5, elinewidth=0.4)
        axes.annotate(
          i + 1, (cost[i], share[i]), (3, 3 + 7 * (i % 2)), textcoords="offset points", fontsize=8
        )
      axes.set_xscale("log")
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
      axes.xaxis.set_minor_formatter(NullFormatter())
      axes.set_xlabel(words)
    figure.axes[0].set_ylabel("problems solved, %")
    lines = [f"{i + 1:>2}  {row['way']}" for i, row in enumerate(rows)]
    names = figure.legend(
      [axes.plot([], [], " ")[0] for _ in lines], lines, loc="outside right", fontsize=8,
      handlelength=0, frameon=False, title="bars: 95 %\nblue: no cheaper way solves as many\n",
    )  # fmt: skip
    names.get_title().set_fontsize(8)
    figure.savefig(path, dpi=130)

  return draw
