"""Scores a model on a benchmark, with everything that the score depends on.

  python -m diffucoder_jax.evaluate --checkpoint PATH --benchmark humanevalplus --chat --output DIR
  python -m diffucoder_jax.evaluate --benchmark mbppplus --samples_file FILE.jsonl --output DIR
  python -m diffucoder_jax.evaluate --compare DIR OTHER_DIR
  python -m diffucoder_jax.evaluate --checkpoint PATH --benchmark humaneval --likelihood 8 --output DIR

Writes DIR/samples.jsonl, which the official evalplus reads as well, verdicts.jsonl, results.json and
table.txt. Started again it goes on where it stopped; samples are never drawn twice. On a pod, start
it on all hosts: each samples and judges its share, and the first one writes.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

from absl import logging

from diffucoder_jax.data import chat
from diffucoder_jax.diffusion.sampler import SamplerConfig, save_trace
from diffucoder_jax.evals import benchmarks, bounds, sample_log, sampling, scores, verdicts
from diffucoder_jax.evals import pins as pins_lib
from diffucoder_jax.execution.sandbox import Limits, Sandbox
from diffucoder_jax.pretrained import from_pretrained
from diffucoder_jax.requests import add_fields, yes_or_no
from diffucoder_jax.runtime import checkpoint as checkpoints
from diffucoder_jax.runtime import hosts, sharding
from diffucoder_jax.runtime import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Asked:
  """How a model is asked.

  Attributes:
    how: "chat" for instruction-tuned models, "complete" for base models, "infill".
    system: the system message of a chat; "" for none.
    primer: how the answer to a chat begins; None for the benchmark's, which is the paper's.
    hole_tokens: masks in an infilling hole; 0 for as many as the missing part has tokens, or a
      maximum, which the model fills up with end or pad tokens.
    first: the first so many tasks alone; 0 for all.
  """

  how: str = "chat"
  system: str = chat.SYSTEM
  primer: str | None = None
  hole_tokens: int = 0
  first: int = 0


def run(
  ckpt, benchmark, output, asked=None, sampler=None, samples=1, seed=0, batch_size=8, *,
  checkpoint="", data="", accept_unknown=False, limits=None, allow_unsafe=False, traces=False,
):  # fmt: skip
  """Samples, judges and scores; goes on where an earlier call with the same `output` stopped.

  Args:
    ckpt: `pretrained.Pretrained`; a trainer gives its own params and mesh.
    benchmark: a name of `benchmarks.BENCHMARKS`. output: folder, local to the first host.
    asked: `Asked`. sampler: `SamplerConfig`; None for `sampler_defaults`. samples: of each task.
    seed: int. batch_size: rows sampled together.
    checkpoint: what the results call the weights, which are known by their fingerprint.
    data, accept_unknown: as of `benchmarks.open_benchmark`. limits: `Limits` of a test; None for
      `verdicts.LIMITS`. allow_unsafe: judge where programs cannot be isolated; the results say so.
    traces: keep each sample's trace, in output/traces.
  Returns:
    the results (see `scores.summarise`), on all hosts.
  Raises:
    ValueError: the data, the folder, a prompt or a pin is not what it should be; says which.
    SandboxUnavailable: programs cannot be isolated here.
  """
  opened = _opened(benchmark, data, accept_unknown, asked := asked or Asked())
  output = pathlib.Path(output)
  sampler = sampler or SamplerConfig(**sampler_defaults(ckpt))
  if asked.how == "infill":
    sampler = dataclasses.replace(sampler, max_new_tokens=0)
  primer = opened.benchmark.primer if asked.primer is None else asked.primer
  rows, number = [], {}
  for i, problem in enumerate(opened.problems):
    ids = sampling.prompt_of(ckpt, problem, asked.how, asked.system, primer, asked.hole_tokens)
    rows += [sampling.Row(i, j, ids) for j in range(samples)]
    number[problem.task_id] = i
  names = list(number)
  sampling.check_lengths(ckpt, rows, sampler, names)
  post = opened.benchmark.asked[asked.how]

  with _judge(opened, limits, allow_unsafe) as sandbox:
    pins = {
      **pins_lib.of(opened, asked, sandbox, samples),
      "source": "sampled",
      "checkpoint": {"path": str(checkpoint), "fingerprint": pins_lib.fingerprint_of(ckpt.params)},
      "sampler": dataclasses.asdict(sampler),
      "decoding": sampling.decoding_of(ckpt.config, sampler),
      "seed": seed,
      "prompt": {"system": asked.system, "primer": primer} if asked.how == "chat" else asked.how,
    }
    path = output / "samples.jsonl"
    done, size, pins = hosts.from_main(lambda: pins_lib.resume(path, pins, names, samples))
    found = {(row["task_id"], row["sample"]): row for row in done}
    left = [row for row in rows if (names[row.problem], row.sample) not in found]
    logging.info("%s: %d samples to draw, %d are there", opened.name, len(left), len(found))
    writer = sample_log.Writer(path, size) if sharding.is_main_process() else None
    began = time.monotonic()
    for batch in sampling.sample(ckpt, left, sampler, seed, batch_size) if left else ():
      fresh = []
      for i, one in batch:
        problem = opened.problems[left[i].problem]
        text = (primer if asked.how == "chat" else "") + one.text
        key = problem.task_id, left[i].sample
        found[key] = {
          "task_id": key[0], "sample": key[1], "solution": post(problem, text), "text": one.text,
          "length": one.length, "ended": one.ended, "nfe": one.nfe, "seconds": one.seconds,
        }  # fmt: skip
        fresh.append(found[key])
        if traces and writer:
          _save_trace(output / "traces", key, one.trace)
      if writer:
        writer.write(fresh)
        seconds = time.monotonic() - began
        print(
          f"{opened.name}: {len(found)} of {len(rows)} samples, {seconds:.0f} s", file=sys.stderr
        )
      if len(found) < len(rows) and hosts.largest_everywhere(checkpoints.sigterm_came()):
        logging.warning("preempted: %d samples are in %s; start the same command again", len(found), path)
        sys.exit(hosts.PREEMPTED)
    if writer:
      writer.close()
    ordered = {
      (names[row.problem], row.sample): found[names[row.problem], row.sample] for row in rows
    }
    return _score(opened, ordered, sandbox, pins, costs_of(ordered.values()), output)


def run_given(
  path, benchmark, output, asked=None, samples=0, *, data="", accept_unknown=False, limits=None,
  allow_unsafe=False,
):  # fmt: skip
  """Judges and scores samples of any program: jsonl in EvalPlus's format.

  Args:
    path: the file. samples: of each task; 0 for as many as most tasks have. Others as for `run`.
  Raises:
    ValueError: as `run`, and for tasks with too many or too few samples; names them.
  """
  opened = _opened(benchmark, data, accept_unknown, asked := asked or Asked())
  rows = hosts.from_main(
    lambda: list(sample_log.read_given(path, opened.problems, samples).values())
  )
  rows = {(row["task_id"], row["sample"]): row for row in rows}
  with _judge(opened, limits, allow_unsafe) as sandbox:
    each = max(sample for _, sample in rows) + 1
    pins = pins_lib.of(opened, asked, sandbox, each)
    pins |= {"asked": "given", "post_processing": "none"}
    given = pathlib.Path(path)
    pins["source"] = hosts.from_main(
      lambda: f"{given.name} sha256 {pins_lib.sha256(given.read_bytes())}"
    )
    return _score(opened, rows, sandbox, pins, {}, pathlib.Path(output))


def run_likelihood(
  ckpt, benchmark, output, asked=None, draws=8, seed=0, batch_size=8, *, checkpoint="", data="",
  accept_unknown=False,
):  # fmt: skip
  """Bits per byte of a benchmark's references; see `bounds.bits_per_byte`. Writes likelihood.json.

  Args: as of `run`; draws: of the noise, for each reference.
  Returns:
    {"pins", "likelihood"}, on all hosts.
  """
  opened = _opened(benchmark, data, accept_unknown, asked := asked or Asked())
  if asked.how == "infill":
    raise ValueError("the likelihood of references is known with --chat or for text, not for holes")
  primer = opened.benchmark.primer if asked.primer is None else asked.primer
  pins = pins_lib.of_data(opened, asked) | {
    "checkpoint": {"path": str(checkpoint), "fingerprint": pins_lib.fingerprint_of(ckpt.params)},
    "prompt": {"system": asked.system, "primer": primer} if asked.how == "chat" else asked.how,
    "seed": seed,
  }
  found = bounds.bits_per_byte(
    ckpt, opened.problems, asked.how, asked.system, primer, draws, seed, batch_size
  )
  results = {"pins": pins, "likelihood": found}
  if sharding.is_main_process():
    path = pathlib.Path(output) / "likelihood.json"
    pins_lib.write_text(path, json.dumps(results, indent=1) + "\n")
  return results


def costs_of(rows) -> dict:
  """What the samples cost: network evaluations, speed, length; from the fields of their lines."""
  rows = list(rows)
  mean = lambda name: sum(row[name] for row in rows) / len(rows)  # noqa: E731
  seconds = mean("seconds")
  costs = {name: mean(name) for name in ("nfe", "length", "ended", "seconds")}
  return {**costs, "tokens_per_second": costs["length"] / seconds if seconds else 0.0}


def sampler_defaults(ckpt) -> dict:
  """What a `SamplerConfig` has here unless asked otherwise: autoregressive weights write left to right
  and stop at the end of a text, as they are evaluated elsewhere."""
  if ckpt.config.attention != "causal":
    return {}
  return {"alg": "left_to_right", "stop_at_eos": ckpt.eos_id >= 0}


def _opened(name, data, accept_unknown, asked):
  """The benchmark, cut to the tasks that are asked."""
  opened = benchmarks.open_benchmark(name, data, accept_unknown)
  if asked.how not in opened.benchmark.asked:
    raise ValueError(
      f"{opened.name} cannot be asked as {asked.how!r}, only as {', '.join(opened.benchmark.asked)}"
    )
  chosen = opened.problems[: asked.first or None]
  return opened._replace(problems=chosen, needs={p.task_id: opened.needs[p.task_id] for p in chosen
                                                 if p.task_id in opened.needs})  # fmt: skip


class _NoSandbox:
  """For answers that are compared rather than run."""

  level, limits = "not needed", None

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass


def _judge(opened, limits, allow_unsafe):
  if opened.benchmark.judge == "number":
    return _NoSandbox()
  limits = limits or verdicts.LIMITS
  if opened.benchmark.memory_bytes:
    limits = dataclasses.replace(
      limits, memory_bytes=max(limits.memory_bytes, opened.benchmark.memory_bytes)
    )
  return Sandbox(limits=limits, allow_unsafe=allow_unsafe, packages=verdicts.packages_of(opened))


def _score(opened, rows, sandbox, pins, costs, output):
  """Judges, writes what was found, and returns the results."""
  names = [problem.task_id for problem in opened.problems]
  sample_log.check_complete(rows, names, pins["samples"], "an evaluation")
  scores.check_pins(pins)
  found = verdicts.judge(opened, rows, sandbox)
  results = scores.summarise(pins, found, costs)
  if sharding.is_main_process():
    lines = [json.dumps({**v._asdict(), "solved": v.solved}) + "\n" for v in found]
    pins_lib.write_text(output / "verdicts.jsonl", "".join(lines))
    pins_lib.write_text(output / "table.txt", scores.table(results))
    pins_lib.write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
  return results


def _save_trace(folder, key, trace):
  folder.mkdir(parents=True, exist_ok=True)
  save_trace(folder / f"{key[0].replace('/', '_')}-{key[1]}.npz", trace)


def parse_arguments(argv=None):
  """Command line; the fields of `SamplerConfig` and of `Limits` are flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add("--checkpoint", help="workdir, checkpoint or Hugging Face folder")
  add("--samples_file", help="judge these samples (evalplus's jsonl) rather than a model's")
  add("--compare", nargs=2, metavar="DIR", help="print the paired differences of two evaluations")
  add("--benchmark", help=", ".join(benchmarks.BENCHMARKS))
  add("--output", help="folder for samples and results")
  add("--data_path", default="", help="folder or file of the benchmark's data")
  add("--accept_unknown_data", type=yes_or_no, default=False, help="take files of unknown hash")
  add("--samples", type=int, default=0, help="of each task (default 1, or what the file has)")
  add("--first", type=int, default=0, help="the first so many tasks alone")
  add(
    "--chat", action="store_true", help="an instruction-tuned model; without it, text is continued"
  )
  add("--system", default=chat.SYSTEM, help="with --chat, the system message; '' for none")
  add("--primer", help="with --chat, how the answer begins (default: as in the paper)")
  add("--hole_tokens", type=int, default=0, help="masks of a hole; 0: as many as are missing")
  add("--seed", type=int, default=0)
  add("--batch_size", type=int, default=8)
  add("--likelihood", type=int, default=0, metavar="DRAWS",
      help="no samples: bits per byte of the references, from so many draws of the noise")  # fmt: skip
  add("--traces", action="store_true", help="keep the trace of every sample")
  add("--param_dtype", choices=("float32", "bfloat16"), help="default: the checkpoint's")
  add(
    "--allow_unsafe",
    type=yes_or_no,
    default=False,
    help="run programs even where they cannot be isolated",
  )
  for axis in sharding.AXES:
    add(f"--{axis}", type=int, default=1, help=f"mesh size along {axis}")
  add_fields(parser, SamplerConfig(), "sampler")
  add_fields(parser, verdicts.LIMITS, "sandbox")
  return parser.parse_args(argv)


def _given(args, kind):
  names = [field.name for field in dataclasses.fields(kind)]
  return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def main(args):
  """Evaluates or compares, and prints the table."""
  if args.compare:
    first, second = map(scores.read_results, args.compare)
    print(scores.comparison_table(first, second, scores.compare(first, second)), end="")
    return
  if not (args.benchmark and args.output) or bool(args.checkpoint) == bool(args.samples_file):
    raise ValueError("give --benchmark, --output, and either --checkpoint or --samples_file")
  hosts.check_same_everywhere({**hosts.versions(), **workdirs.flat(vars(args), "flag")})
  opened = benchmarks.open_benchmark(args.benchmark, args.data_path, args.accept_unknown_data)
  ways = opened.benchmark.asked
  how = "infill" if "infill" in ways else "chat" if args.chat or args.samples_file else "complete"
  asked = Asked(how, args.system, args.primer, args.hole_tokens, args.first)
  common = {
    "data": args.data_path, "accept_unknown": args.accept_unknown_data, "allow_unsafe": args.allow_unsafe,
    "limits": dataclasses.replace(verdicts.LIMITS, **_given(args, Limits)),
  }  # fmt: skip
  if args.samples_file:
    run_given(args.samples_file, args.benchmark, args.output, asked, args.samples, **common)
  else:
    sizes = {axis: getattr(args, axis) for axis in sharding.AXES}
    one = all(size == 1 for size in sizes.values())
    mesh = None if one else sharding.make_mesh(sizes)
    ckpt = from_pretrained(args.checkpoint, mesh=mesh, param_dtype=args.param_dtype)
    if ckpt.tokenizer is None:
      raise ValueError(f"{args.checkpoint} has no tokenizer file; an evaluation needs one")
    if args.likelihood:
      found = run_likelihood(
        ckpt, args.benchmark, args.output, asked, args.likelihood, args.seed, args.batch_size,
        checkpoint=args.checkpoint, data=args.data_path, accept_unknown=args.accept_unknown_data,
      )  # fmt: skip
      if sharding.is_main_process():
        print(json.dumps(found, indent=1))
      return
    sampler = SamplerConfig(**{**sampler_defaults(ckpt), **_given(args, SamplerConfig)})
    run(
      ckpt, args.benchmark, args.output, asked, sampler, args.samples or 1, args.seed,
      args.batch_size, checkpoint=args.checkpoint, traces=args.traces, **common,
    )  # fmt: skip
  if sharding.is_main_process():
    print((pathlib.Path(args.output) / "table.txt").read_text(), end="")


if __name__ == "__main__":
  arguments = parse_arguments()
  hosts.start_distributed()
  checkpoints.catch_sigterm(all_processes=True)
  try:
    hosts.together(main, arguments)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f"evaluate: {error}")
