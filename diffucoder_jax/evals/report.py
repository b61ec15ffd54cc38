"""One static web page about a set of runs: numbers, curves, samples, and a denoising to step through.

  python -m diffucoder_jax.evals.report --workdir W --runs ar=W/ar adapt=W/adapt scratch=W/scratch \
    --samples W/samples/held_out.jsonl --trace W/samples/trace.npz --compare_trace W/other.npz

Writes W/report/index.html, which needs nothing else (no network; no scripts but for the viewer of
viewer.py, which the drawing stands in for on paper), and the drawing once more as denoising.svg and
denoising.png. Sentences about the outcome are computed from the numbers. Input that is missing is
named on the page.
"""

import argparse
import datetime
import html
import json
import math
import os
from importlib import metadata
from types import SimpleNamespace

from etils import epath

from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.diffusion.sampler import load_trace
from diffucoder_jax.evals import charts, order_charts, reinforced, stages, style, viewer
from diffucoder_jax.evals import samples as samples_lib
from diffucoder_jax.evals import trace as trace_lib
from diffucoder_jax.runtime import metrics

# Run names with a meaning: how the page calls them, and the run they continue (their curves start
# where that one ends, so that total training steps compare).
LABELS = {
  "ar": "autoregressive",
  "adapt": "diffusion adapted from AR",
  "scratch": "diffusion from scratch",
  "mid": "mid-trained on functions",
  "sft": "instruction-tuned",
}
CONTINUES = {"adapt": "ar"}
# What the runs left behind.


def _rows_by_step(workdir):
  """The rows of metrics.jsonl, those of one step (training, evaluation) put together."""
  rows = {}
  for row in metrics.read(workdir):
    rows.setdefault(int(row["step"]), {}).update(row)
  return [rows[step] for step in sorted(rows)]


def _training_seconds(rows):
  times = [row["time"] for row in rows if "time" in row]
  if not times:
    return None
  first, last = min(times), max(times)
  # A row is written when its evaluation is over, so that of the first row is not in the span.
  timed = [row for row in rows if row.get("time", first) > first]
  return last - first - sum(row.get("eval/seconds") or 0.0 for row in timed)


def load_runs(runs):
  """Summarises each run for the page.

  Args:
    runs: mapping from run name to workdir.
  Returns:
    (runs, notes): namespaces in the same order, and sentences on what is missing. A namespace has
    name, label, colour, dash, rows, config (dict), before (the run it continues, or None), steps,
    tokens (steps x global batch x sequence length, or None), seconds (wall clock between the first
    and last row, pauses included, evaluations not, or None), final (bits per byte, its
    standard error, unigram bits per byte; None without evaluation rows).
  """
  found, notes = {}, []
  for i, (name, workdir) in enumerate(runs.items()):
    run = SimpleNamespace(name=name, label=LABELS.get(name, name), rows=[], config={}, before=None)
    run.colour = charts.COLOURS[i % len(charts.COLOURS)]
    run.dash = charts.DASHES[i % len(charts.DASHES)]
    workdir = epath.Path(workdir)
    if (workdir / "metrics.jsonl").exists():
      run.rows = _rows_by_step(workdir)
    if not run.rows:
      notes.append(f"Run “{name}” is left out: {workdir} holds no metrics.jsonl with rows.")
      continue
    if (workdir / "config.json").exists():
      run.config = json.loads((workdir / "config.json").read_text())
    run.steps = int(run.rows[-1]["step"])
    data = run.config.get("data", {})
    known = "global_batch" in data and "seq_len" in data
    run.tokens = run.steps * data["global_batch"] * data["seq_len"] if known else None
    run.seconds = _training_seconds(run.rows)
    run.final = None
    for row in run.rows:
      if row.get("eval/bits_per_byte") is not None:
        names = ("bits_per_byte", "bits_per_byte_se", "unigram_bits_per_byte")
        run.final = tuple(row.get(f"eval/{key}") for key in names)
    if run.final is None:
      notes.append(f"Run “{name}” has no evaluation rows, so it has no held-out bits per byte.")
    elif not math.isfinite(run.final[0]):
      notes.append(f"Run “{name}” ended at {run.final[0]} bits per byte: it diverged.")
      run.final = None
    found[name] = run
  for run in found.values():
    run.before = found.get(CONTINUES.get(run.name))
    if run.before is None and run.name in CONTINUES:
      notes.append(
        f"Run “{run.name}” continues “{CONTINUES[run.name]}”, which is not here: its steps count "
        "from its own start."
      )
  return list(found.values()), notes


def verdict(runs):
  """Says in neutral sentences, from the numbers alone, which run is lower and by how much."""
  ranked = sorted((run for run in runs if run.final), key=lambda run: run.final[0])
  said = []
  for a, b in zip(ranked, ranked[1:], strict=False):
    gap = b.final[0] - a.final[0]
    text = f"{a.label} ({a.final[0]:.3f}) is lower than {b.label} ({b.final[0]:.3f}) by {gap:.3f}"
    if a.final[1] is None or b.final[1] is None:
      said.append(f"{text}; without standard errors it cannot be told from chance.")
      continue
    apart = gap > a.final[1] + b.final[1]
    error = math.hypot(a.final[1], b.final[1])
    size = f", {gap / error:.1f} standard errors of the difference" if error else ""
    bars = "do not overlap" if apart else "overlap"
    said.append(f"{text} bits per byte{size}; their error bars {bars}.")
  unigram = _unigram(runs)
  if ranked and unigram is not None:
    above = [run.label for run in ranked if run.final[0] >= unigram]
    said.append(
      f"Not below the unigram baseline ({unigram:.3f}): {', '.join(above)}."
      if above
      else f"Every run is below the unigram baseline ({unigram:.3f})."
    )
  return " ".join(text[0].upper() + text[1:] for text in said)


def _unigram(runs):
  return next((run.final[2] for run in runs if run.final and run.final[2] is not None), None)


# The page.


def _number(value, form="{:,.0f}"):
  return "–" if value is None else form.format(value)


def _table(runs):
  """The headline table: one row a run; what the run it continues had spent is added in front."""
  heads = (
    "run", "steps", "tokens seen", "held-out bits per byte", "unigram baseline", "training seconds",
  )  # fmt: skip

  def spent(run, name):
    before = [_number(getattr(run.before, name))] if run.before else []
    return " + ".join([*before, _number(getattr(run, name))])

  rows = []
  for run in runs:
    value, error, unigram = run.final or (None, None, None)
    rows.append(
      (
        html.escape(run.label),
        spent(run, "steps"),
        spent(run, "tokens"),
        _number(value, "{:.3f}") + ("" if error is None else f" ± {error:.3f}"),
        _number(unigram, "{:.3f}"),
        spent(run, "seconds"),
      )
    )
  head = "".join(f"<th>{text}</th>" for text in heads)
  body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
  return _wide("Runs", f"<table><tr>{head}</tr>{body}</table>")


def _wide(label, content):
  """A box that scrolls sideways by itself; with a name and a tab stop, so that keys can do it."""
  return f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def _figure(drawing, caption):
  return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>" if drawing else ""


def _later_stages(found):
  """A curve of each run by itself: what each of them is scored on is another text."""
  curves = [
    _figure(
      charts.curve_chart([run], "eval/bits_per_byte", "bits per byte", "eval/bits_per_byte_se"),
      f"{html.escape(run.label)}: bits per byte of its own held-out text, band ± one standard error"
      f"{'' if run.final is None else f'; at the end {run.final[0]:.3f} ± {run.final[1]:.3f}'}.",
    )
    for run in found
  ]
  return ["<h2>Later stages</h2>", '<div class="pair">', *curves, "</div>"] if found else []


def write_report(
  path, title, runs, samples=None, drawing=None, footer=None, notes=(), later=(), records=(),
  sections=(),
):  # fmt: skip
  """Writes the page.

  Args:
    path: the index.html to write; its folder is made.
    title: str, the heading.
    runs: mapping from run name to workdir, in the order to show them; "ar", "adapt" and "scratch"
      have longer names on the page.
    samples: rows of `read_samples`, or None.
    drawing: an SVG string of `trace.svg`, or None.
    footer: mapping of str to value: what made the page.
    notes: sentences to show at the top, about input that is missing.
    later: mapping like `runs`, of later runs, each with held-out text of its own.
    records: one or two of `viewer.record`, of traces to step through; or none.
    sections: more pieces of HTML, for the end of the page.
  """
  found, missing = load_runs(runs)
  later, missing_later = load_runs(dict(later))
  notes = [*notes, *missing, *missing_later]
  parts = [f"<h1>{html.escape(title)}</h1>"]
  parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
  if found:
    parts += [f"<p>{html.escape(verdict(found))}</p>", _table(found)]
  if any(run.final for run in found):
    bars = charts.bar_chart(found, _unigram(found))
    parts.append(
      _figure(
        bars,
        "Held-out bits per byte at the end of each run, ± one "
        "standard error. For autoregressive runs this is the exact likelihood; for diffusion it is "
        "an upper bound (NELBO), so the two kinds do not compare on equal terms.",
      )
    )
  bits = charts.curve_chart(
    found, "eval/bits_per_byte", "held-out bits per byte", "eval/bits_per_byte_se", _unigram(found)
  )
  loss = charts.curve_chart(found, "loss", "training loss")
  if bits or loss:
    parts.append('<h2>Curves</h2><div class="pair">')
    parts.append(
      _figure(
        bits,
        "Held-out bits per byte, band ± one standard error. A run that "
        "continues another is drawn from where that one ended. Diffusion values are upper bounds.",
      )
    )
    parts.append(
      _figure(
        loss,
        "Training loss, as it is optimised. Autoregressive: nats per token. Diffusion: nats of the "
        "masked tokens, weighted and divided as config.json says (1/t and the number of masked "
        "tokens by default), which makes it larger and noisier: compare shapes, not heights.",
      )
    )
    parts.append("</div>")
  if drawing or records:
    parts.append(f"<h2>{'Two denoisings' if len(records) == 2 else 'One denoising'}</h2>")
  if records:
    parts.append(viewer.fragment(records))
  if drawing:
    if len(records) == 2:
      parts.append(f"<h3>{html.escape(records[0]['label'])}, drawn</h3>")
    parts.append(_wide("Drawing of the denoising", charts.inline(drawing)))
    parts.append(
      '<p class="what">Above: each column is a position, grey until the step that '
      "committed its token. Below: the text, each token on the colour of its step; the prompt is "
      "plain. Hover over a token for its step and confidence.</p>"
    )
  if samples:
    parts.append(
      "<h2>Samples</h2><p>Held-out code; what the model wrote, and the original in its "
      "place, are marked.</p>"
    )
    parts += [samples_lib.beside(i, row) for i, row in enumerate(samples, 1)]
  parts += _later_stages(later)
  parts += sections
  made = " · ".join(f"{html.escape(k)} {html.escape(str(v))}" for k, v in (footer or {}).items())
  css = style.CSS + (viewer.STYLE if records else "")
  page = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{html.escape(title)}</title><style>{css}</style></head><body>\n<main>\n"
    + "\n".join(parts)
    + f"\n</main>\n<footer><p>{made}</p></footer></body></html>\n"
  )
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Text sampled from a model may hold half a surrogate pair, which UTF-8 cannot.
  path.write_bytes(page.encode("utf-8", "replace"))


def machine():
  """Package versions and CPU count, for the footer."""
  found = {"CPUs": os.cpu_count()}
  for package in ("diffucoder_jax", "jax"):
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = "not installed (run from a checkout)"
  return found


def main(argv=None):
  """Reads the command line, loads what is there, writes `workdir`/report/."""
  parser = argparse.ArgumentParser(prog="python -m diffucoder_jax.evals.report")
  parser.add_argument("--workdir", required=True, help="the report goes to WORKDIR/report/")
  parser.add_argument("--runs", required=True, nargs="+", metavar="NAME=DIR", help="in page order")
  parser.add_argument("--samples", help="jsonl of completions beside the original")
  parser.add_argument("--stages", nargs="+", default=[], metavar="NAME=DIR",
                      help="later runs, each scored on held-out text of its own")  # fmt: skip
  parser.add_argument("--answers", help="jsonl of a tuned model's answers, as generate writes it")
  parser.add_argument("--reinforced", help="workdir of train_grpo")
  parser.add_argument("--scores", nargs="+", default=[], metavar="LABEL=DIR",
                      help="folders of evaluate, of the same problems, stage by stage")  # fmt: skip
  parser.add_argument("--analysis", help="folder of analyze")
  parser.add_argument("--trace", help=".npz of one sampler call")
  parser.add_argument("--compare_trace", help=".npz to show beside --trace in the viewer")
  parser.add_argument("--row", type=int, default=0, help="which row of the traces to draw")
  parser.add_argument("--tokenizer", help="the trace's tokenizer; the last run's when absent")
  parser.add_argument("--config", default="", help="name of the config, for the footer")
  parser.add_argument("--title", default="Diffusion and autoregressive training compared")
  args = parser.parse_args(argv)
  for flag, given in (("--runs", args.runs), ("--stages", args.stages), ("--scores", args.scores)):
    if not all(name and workdir for name, _, workdir in (run.partition("=") for run in given)):
      parser.error(f"{flag} wants NAME=DIR pairs, such as ar=work/ar; got {' '.join(given)}")
  runs, later = (dict(run.split("=", 1) for run in given) for given in (args.runs, args.stages))
  folder = epath.Path(args.workdir) / "report"
  folder.mkdir(parents=True, exist_ok=True)

  notes, samples, drawing, records, sections = [], None, None, [], []
  if _given(args.samples, "samples", notes):
    samples = samples_lib.read_samples(args.samples)
  if args.answers and _given(args.answers, "answers", notes):
    tokenizer = load_tokenizer([*later.values(), *runs.values()][-1])
    sections += samples_lib.answers_of(args.answers, tokenizer)
  if args.reinforced and _given(args.reinforced, "reinforced", notes):
    sections += reinforced.improvement_of(args.reinforced)
  if args.scores:
    sections += stages.scores_of([score.split("=", 1) for score in args.scores])
  if args.analysis and _given(args.analysis, "analysis", notes):
    link = os.path.relpath(epath.Path(args.analysis) / "index.html", folder)
    sections += order_charts.excerpt(args.analysis, link)
  if _given(args.trace, "trace", notes):
    try:
      tokenizer = load_tokenizer(args.tokenizer or list(runs.values())[-1])
      trace = load_trace(args.trace)
      drawing = trace_lib.svg(trace, args.row, tokenizer)
      (folder / "denoising.svg").write_text(drawing)
      charts.png(*trace_lib.draw(trace, args.row, tokenizer), folder / "denoising.png")
      records, unread = viewer.read([args.trace, args.compare_trace], args.row, tokenizer)
      notes += unread
    except (FileNotFoundError, ValueError) as error:
      notes.append(f"No drawing of {args.trace}: {error}.")
  footer = {"config": args.config or "unnamed"}
  for name, workdir in (runs | later).items():
    config = epath.Path(workdir) / "config.json"
    if config.exists():
      footer[f"seed of {name}"] = json.loads(config.read_text()).get("seed", "unknown")
  footer |= machine() | {"made on": datetime.date.today().isoformat()}
  write_report(
    folder / "index.html", args.title, runs, samples, drawing, footer, notes, later, records, sections,
  )  # fmt: skip
  print(f"wrote {folder / 'index.html'}")


def _given(path, what, notes):
  """Whether an optional file is there; if not, `notes` gets a sentence that says so."""
  if path and epath.Path(path).exists():
    return True
  why = f"{path} does not exist" if path else f"--{what} was not given"
  notes.append(f"No {what}: {why}.")
  return False


if __name__ == "__main__":
  main()
