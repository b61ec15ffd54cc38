"""Scores with all that they depend on: results.json, the table, and two runs compared."""

import collections
import json
import pathlib

import numpy as np

from diffucoder_jax.evals import passk

VERSION = 1
# What a score depends on. Without one of them it is none.
PINS = (
  "benchmark", "data", "published_data", "tasks", "asked", "post_processing", "source", "samples",
  "limits", "sandbox", "packages", "python", "commit",
)  # fmt: skip
SAMPLED = ("checkpoint", "sampler", "seed", "prompt")  # where the samples were drawn here
KS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50, 100, 200)


def check_pins(pins) -> None:
  """Raises a ValueError that names every pin without a value: no score is given then."""
  needed = PINS + (SAMPLED if pins.get("source") == "sampled" else ())
  empty = lambda name: pins.get(name) in (None, "", {}) or (name != "packages" and pins[name] == [])  # noqa: E731
  missing = [name for name in needed if empty(name)]
  if missing:
    raise ValueError(f"no score without its pins; missing: {', '.join(missing)}")


def summarise(pins, verdicts, costs) -> dict:
  """The results of an evaluation.

  Args:
    pins: see `PINS`. verdicts: list of `Verdict`, of the same number of samples for each task.
    costs: {"nfe": mean network evaluations of a sample, "tokens_per_second", ...}; {} for given samples.
  Returns:
    what results.json holds: {"version", "pins", "scores": {part: {"pass@k": {"value", "low", "high",
    "method"}}}, "costs", "statuses", "not_run", "shared", "problems"}. Parts are "base" and, where
    EvalPlus added tests, "plus": those that pass both.
  Raises:
    ValueError: a pin is missing; the sandbox failed on a sample, whose worth nobody knows; or not one
      task could be judged.
  """
  check_pins(pins)
  infra = sorted({v.task_id for v in verdicts if "infra" in (v.base, v.plus)})
  if infra:
    raise ValueError(
      f"the sandbox failed on samples of {', '.join(infra[:5])} ({len(infra)} task(s)): no score, since "
      "nobody knows what they are worth. Start the same command again; samples are kept"
    )
  not_run = sorted({v.task_id for v in verdicts if v.base == "not run"})
  judged = [v for v in verdicts if v.base != "not run"]
  if not judged:
    raise ValueError("no task could be judged: the packages that the tests need are not installed")
  counts = collections.defaultdict(lambda: [0, 0, 0])
  for v in judged:
    count = counts[v.task_id]
    count[0] += 1
    count[1] += v.base == "pass"
    count[2] += v.solved
  samples_P, base_P, solved_P = (list(x) for x in zip(*counts.values(), strict=True))
  parts = {"base": base_P}
  if any(v.plus for v in judged):
    parts["plus"] = solved_P
  scores = {}
  for part, passed_P in parts.items():
    scores[part] = {}
    for k in (k for k in KS if k <= min(samples_P)):
      values_P = passk.rates(samples_P, passed_P, k)
      low, high, method = passk.interval(values_P)
      score = {"value": float(values_P.mean()), "low": low, "high": high, "method": method}
      scores[part][f"pass@{k}"] = score
  statuses = {part: dict(collections.Counter(getattr(v, part) for v in verdicts)) for part in parts}
  return {
    "version": VERSION,
    "pins": pins,
    "scores": scores,
    "costs": costs,
    "statuses": statuses,
    "not_run": not_run,
    "shared": sum(v.integrity == "shared" for v in judged),
    "problems": {
      task_id: dict(zip(("samples", "base", "solved"), count, strict=True))
      for task_id, count in counts.items()
    },
  }


def table(results) -> str:
  """The scores as text, each pin on a line of its own."""
  pins, costs = results["pins"], results["costs"]
  judged = len(results["problems"])
  lines = [f"{pins['benchmark']}: {judged} tasks, {pins['samples']} sample(s) of each", ""]
  lines.append(f"{'':8}{'':6}{'score':>8}   95 % interval")
  for part, scores in results["scores"].items():
    for name, s in scores.items():
      span = f"{100 * s['low']:.1f} to {100 * s['high']:.1f} ({s['method']})"
      lines.append(f"{name:8}{part:6}{100 * s['value']:7.1f} %   {span}")
  lines.append("")
  if costs:
    lines.append(
      f"network evaluations per sample {costs['nfe']:.1f}; {costs['tokens_per_second']:.1f} tokens/s "
      f"(with compilation); {100 * costs['ended']:.0f} % end by themselves, {costs['length']:.0f} tokens"
    )
  for part, found in results["statuses"].items():
    listed = ", ".join(f"{count} {name}" for name, count in sorted(found.items()) if name)
    lines.append(f"{part} tests: {listed}")
  if results["not_run"]:
    lines.append(
      f"A SUBSET: {len(results['not_run'])} tasks were not run, since packages that their tests need "
      "are not installed; this is no score of the benchmark"
    )
  if results["shared"]:
    lines.append(f"{results['shared']} verdicts were given in the answer's own process")
  if not pins["published_data"]:
    lines.append("THE DATA IS NOT the published file; compare this score with none")
  lines += ["", "pins"]
  lines += [f"  {name}: {_short(value)}" for name, value in pins.items()]
  return "\n".join(lines) + "\n"


def _short(value):
  return value if isinstance(value, str) else json.dumps(value)


def read_results(folder) -> dict:
  """results.json of an evaluation's folder.

  Raises:
    ValueError: it is not there, damaged, of another version, or lacks a pin.
  """
  path = pathlib.Path(folder)
  path = path / "results.json" if path.is_dir() else path
  try:
    results = json.loads(path.read_text())
    version = results["version"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} holds no results: {error}") from error
  if version != VERSION:
    raise ValueError(f"{path} is of version {version}; this code reads {VERSION}")
  check_pins(results["pins"])
  return results


def compare(first, second) -> dict:
  """Paired differences between two runs, first minus second: {part: {"pass@k": as
  `passk.paired_difference`}}.

  Args:
    first, second: as of `read_results`.
  Raises:
    ValueError: they are of other benchmarks, data or tasks; names what differs.
  """
  for name in ("benchmark", "data"):
    a, b = first["pins"][name], second["pins"][name]
    if a != b:
      raise ValueError(f"the runs differ in {name}, so their scores cannot be paired: {a} and {b}")
  tasks = list(first["problems"])
  others = set(tasks) ^ set(second["problems"])
  if others:
    listed = ", ".join(sorted(others)[:5])
    raise ValueError(f"{len(others)} tasks were judged in one of the runs alone: {listed}")
  found = {}
  for part in first["scores"]:
    key = "base" if part == "base" else "solved"
    found[part] = {}
    for name in first["scores"][part]:
      if name not in second["scores"].get(part, ()):
        continue
      k = int(name.removeprefix("pass@"))
      pair = [
        passk.rates(
          *(np.asarray([run["problems"][t][x] for t in tasks]) for x in ("samples", key)), k
        )
        for run in (first, second)
      ]
      found[part][name] = passk.paired_difference(*pair)
  return found


def comparison_table(first, second, found) -> str:
  """What `compare` found, as text, and the pins in which the runs differ."""
  lines = [f"{first['pins']['benchmark']}: first minus second, {len(first['problems'])} tasks", ""]
  lines.append(f"{'':8}{'':6}{'first':>8}{'second':>9}{'difference':>12}   95 % interval")
  for part, scores in found.items():
    for name, d in scores.items():
      a, b = (100 * run["scores"][part][name]["value"] for run in (first, second))
      p = f", p {d['p']:.3f}" if "p" in d else ""
      lines.append(
        f"{name:8}{part:6}{a:6.1f} %{b:7.1f} %{100 * d['difference']:+10.1f} %   "
        f"{100 * d['low']:+.1f} to {100 * d['high']:+.1f} ({d['method']}{p}); better on "
        f"{d['only_first']} tasks, worse on {d['only_second']}"
      )
  differ = [
    f"  {name}: {_short(first['pins'].get(name))} | {_short(second['pins'].get(name))}"
    for name in dict.fromkeys([*first["pins"], *second["pins"]])
    if first["pins"].get(name) != second["pins"].get(name)
  ]
  lines += ["", "pins that differ" if differ else "all pins are the same", *differ]
  return "\n".join(lines) + "\n"
