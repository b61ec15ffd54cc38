"""What coupled-GRPO changed, for the page: held-out pass@1, rewards, and answers before and after."""

import html
import json
from types import SimpleNamespace

from etils import epath

from diffucoder_jax.evals import charts
from diffucoder_jax.runtime import metrics

SHOWN = 3  # answers before and after


def read_answers(workdir):
  """The answers that `train_grpo` logs at each evaluation, of all processes.

  Returns:
    {step: {(task_id, sample, temperature): row}}, steps in order.
  Raises:
    ValueError: a line is no JSON object.
  """
  found = {}
  for path in sorted((epath.Path(workdir) / "answers").glob("*.jsonl")):
    rows = found.setdefault(int(path.name.split(".")[0]), {})
    for number, line in enumerate(path.read_text().removesuffix("\n").split("\n"), 1):
      try:
        row = json.loads(line)
        rows[row["task_id"], row["sample"], row["temperature"]] = row
      except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} line {number} is not an answer: {error!r}") from error
  return found


def examples(before, after, count=SHOWN):
  """Pairs of greedy answers to the same problem: mended ones first, spoilt ones next, then others.

  At least one spoilt answer is among three if there is one: a gain is a sum of both.
  """
  pairs = [(before[key], after[key]) for key in before if key in after and key[2] == 0]
  kinds = {name: [] for name in ("mended", "spoilt", "same")}
  for old, new in pairs:
    if old["passed"] == new["passed"]:
      kinds["same"].append((old, new))
    else:
      kinds["mended" if new["passed"] else "spoilt"].append((old, new))
  spoilt = kinds["spoilt"][:1]
  chosen = kinds["mended"][: count - len(spoilt)] + spoilt
  rest = [pair for pair in kinds["spoilt"][1:] + kinds["same"] if pair not in chosen]
  return (chosen + rest)[:count], {name: len(found) for name, found in kinds.items()}


def improvement_of(workdir):
  """Pieces of HTML about a run of `train_grpo`.

  Args:
    workdir: its folder.
  Raises:
    FileNotFoundError: there are no metrics. ValueError: a log is broken.
  """
  rows = list(metrics.read(epath.Path(workdir)))
  scored = [row for row in rows if "eval/pass@1" in row]
  rewarded = [row for row in rows if "reward" in row]
  pieces = ["<h2>Coupled-GRPO on the rewards of running code</h2>"]
  config = json.loads((epath.Path(workdir) / "config.json").read_text())
  if scored:
    pieces.append(_table(scored[0], scored[-1], config["sampler"]["temperature"]))
  figures = [
    (_curves(scored, {"eval/pass@1": "sampled", "eval/pass@1_greedy": "greedy"}, "pass@1"),
     "Held-out problems solved with one answer each, band ± one standard error over problems."),
    (_curves(rewarded, {"reward": "all rewards, weighted"}, "mean reward"),
     "Mean reward of each round's answers. Other problems are asked each round, so it swings; what "
     "was learnt is read off the held-out problems."),
  ]  # fmt: skip
  pieces.append('<div class="pair">')
  pieces += [
    f"<figure>{chart}<figcaption>{text}</figcaption></figure>" for chart, text in figures if chart
  ]
  pieces.append("</div>")
  answers = read_answers(workdir)
  if len(answers) > 1:
    first, last = min(answers), max(answers)
    pairs, counts = examples(answers[first], answers[last])
    pieces.append(
      f"<p>Greedy answers to the held-out problems at step {first} and at step {last}: "
      f"{counts['mended']} wrong ones became right, {counts['spoilt']} right ones wrong, "
      f"{counts['same']} stayed as they were.</p>"
    )
    pieces += [_beside(i, *pair, first, last) for i, pair in enumerate(pairs, 1)]
  return pieces


def _table(first, last, temperature):
  def cell(row, name):
    return f"{100 * row[name]:.1f} ± {100 * row[f'{name}_se']:.1f}"

  kinds = (("eval/pass@1", f"temperature {temperature:g}"), ("eval/pass@1_greedy", "greedy"))
  body = "".join(
    f"<tr><td>{kind}</td><td>{cell(first, name)}</td><td>{cell(last, name)}</td>"
    f"<td>{100 * (last[name] - first[name]):+.1f}</td></tr>"
    for name, kind in kinds
  )
  return (
    '<div class="wide" tabindex="0" role="region" aria-label="Held-out pass@1"><table><tr>'
    f"<th>held-out pass@1, %</th><th>step {first['step']}</th><th>step {last['step']}</th>"
    f"<th>change</th></tr>{body}</table></div>"
  )


def _curves(rows, names, ylabel):
  """A chart with one line for each of several metrics of the same rows."""
  runs = []
  for i, (name, label) in enumerate(names.items()):
    mine = [
      {"step": row["step"], "value": row[name], "se": row.get(f"{name}_se")}
      for row in rows
      if row.get(name) is not None
    ]
    run = SimpleNamespace(name=name, label=label, rows=mine, before=None)
    run.colour, run.dash = charts.COLOURS[i], charts.DASHES[i]
    runs.append(run)
  return charts.curve_chart(runs, "value", ylabel, "se")


def _beside(number, before, after, first, last):
  """HTML of a problem with its answers at the first and at the last evaluation."""
  verdict = {True: "right", False: "wrong", None: "not judged"}
  panes = "".join(
    f'<div><div class="what">step {step}: {verdict[row["passed"]]}</div>'
    f"<pre>{html.escape(row['completion'])}</pre></div>"
    for step, row in ((first, before), (last, after))
  )
  head = f"<h3>{number}. {html.escape(before['task_id'])}</h3>"
  return f'{head}<pre>{html.escape(before["prompt"])}</pre><div class="pair">{panes}</div>'
