"""One static web page about a set of runs: numbers, curves, samples, and a drawing of a denoising.

  python -m diffucoder_jax.evals.report --workdir W --runs ar=W/ar adapt=W/adapt scratch=W/scratch \
    --samples W/samples/held_out.jsonl --trace W/samples/trace.npz

Writes W/report/index.html, which needs nothing else (no scripts, no network), and the drawing once
more as denoising.svg and denoising.png. Sentences about the outcome are computed from the numbers.
Input that is missing is named on the page.
"""

import argparse
import datetime
import html
import io
import json
import math
import os
import re
import textwrap
import warnings
from importlib import metadata
from types import SimpleNamespace

import matplotlib
import numpy as np
from absl import logging
from etils import epath
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.diffusion.sampler import load_trace
from diffucoder_jax.evals import trace as trace_lib

# Run names with a meaning: how the page calls them, and the run they continue (their curves start
# where that one ends, so that total training steps compare).
LABELS = {
  "ar": "autoregressive",
  "adapt": "diffusion adapted from AR",
  "scratch": "diffusion from scratch",
}
CONTINUES = {"adapt": "ar"}
# Okabe-Ito colours (blue a little lighter) that read on white and near-black; the line style tells
# them apart in grey.
COLOURS = ("#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "-", "--", "-.", ":", "-")
# Drawn in this colour, replaced by the page's text colour, so that charts follow light and dark.
_INK = "#010203"
_CHART_STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "diffucoder_jax",
  "font.family": "sans-serif",
  "font.size": 9,
  "text.color": _INK,
  "axes.edgecolor": _INK,
  "axes.labelcolor": _INK,
  "axes.linewidth": 0.6,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "xtick.color": _INK,
  "ytick.color": _INK,
}

# What the runs left behind.


def read_metrics(workdir):
  """Reads `workdir`/metrics.jsonl into a list of dicts in order of step.

  A run that was stopped logs the steps since its last checkpoint twice: the later row wins, key by
  key. A last line that the stop cut off is left out.

  Raises:
    ValueError: another line is no JSON object with a "step".
  """
  path = epath.Path(workdir) / "metrics.jsonl"
  lines = path.read_text().splitlines()
  rows = {}
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      rows.setdefault(int(row["step"]), {}).update(row)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
      if number == len(lines):
        logging.warning("%s: left out its last line, which is cut off", path)
        continue
      raise ValueError(f'{path} line {number} is no JSON object with a "step": {line!r}') from e
  return [rows[step] for step in sorted(rows)]


def _series(rows, name):
  """The (steps, values) at which a metric was logged, as float arrays [N]."""
  pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
  return np.array(pairs, float).reshape(-1, 2).T


def load_runs(runs):
  """Summarises each run for the page.

  Args:
    runs: mapping from run name to workdir.
  Returns:
    (runs, notes): namespaces in the same order, and sentences on what is missing. A namespace has
    name, label, colour, dash, rows, config (dict), before (the run it continues, or None), steps,
    tokens (steps x global batch x sequence length, or None), seconds (wall clock between the first
    and last row, pauses included, or None), final (bits per byte, its standard error, unigram bits
    per byte; None without evaluation rows).
  """
  found, notes = {}, []
  for i, (name, workdir) in enumerate(runs.items()):
    run = SimpleNamespace(name=name, label=LABELS.get(name, name), rows=[], config={}, before=None)
    run.colour, run.dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
    workdir = epath.Path(workdir)
    if (workdir / "metrics.jsonl").exists():
      run.rows = read_metrics(workdir)
    if not run.rows:
      notes.append(f"Run “{name}” is left out: {workdir} holds no metrics.jsonl with rows.")
      continue
    if (workdir / "config.json").exists():
      run.config = json.loads((workdir / "config.json").read_text())
    run.steps = int(run.rows[-1]["step"])
    data = run.config.get("data", {})
    known = "global_batch" in data and "seq_len" in data
    run.tokens = run.steps * data["global_batch"] * data["seq_len"] if known else None
    times = [row["time"] for row in run.rows if "time" in row]
    run.seconds = max(times) - min(times) if times else None
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


# Charts: matplotlib figures as SVG text for the page.


def _chart(draw, height=3.0):
  """Runs `draw(axes)` on a new figure and returns it as an SVG element without ids or metadata."""
  with matplotlib.rc_context(_CHART_STYLE):
    figure = Figure(figsize=(5, height), layout="constrained")
    draw(figure.add_subplot())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
  text = buffer.getvalue()
  text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
  text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same names in every chart of the page
  return _inline(text.replace(_INK, "currentColor"))


def _inline(svg):
  """An SVG inside HTML needs no namespace declarations."""
  return re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)


def bar_chart(runs):
  """Final held-out bits per byte of every run beside the unigram baseline, with error bars."""
  ranked = [run for run in runs if run.final]
  bars = [(run.label, run.final[0], run.final[1] or 0.0, run.colour) for run in ranked]
  if _unigram(runs) is not None:
    bars.insert(0, ("unigram baseline", _unigram(runs), 0.0, "#8a9099"))

  def draw(axes):
    axes.barh(
      range(len(bars)),
      [bar[1] for bar in bars],
      height=0.62,
      xerr=[bar[2] for bar in bars],
      color=[bar[3] for bar in bars],
      error_kw={"ecolor": _INK, "elinewidth": 1.4, "capsize": 5},
    )
    right = max(value + error for _, value, error, _ in bars)
    for i, (_, value, error, _) in enumerate(bars):
      number = f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"
      axes.text(value + error + 0.015 * right, i, number, va="center")
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.set_xlim(0, right * 1.25)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("held-out bits per byte (lower is better)")

  return _chart(draw, height=0.75 + 0.42 * len(bars))


def _smooth(values):
  """A running mean over a fiftieth of the curve, shorter at its ends."""
  half = len(values) // 100
  sums = np.concatenate([[0.0], np.cumsum(values)])
  i = np.arange(len(values))
  low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def curve_chart(runs, name, ylabel, error=None, baseline=None):
  """One metric against total training steps, each run labelled at the end of its line."""
  drawn = [run for run in runs if _series(run.rows, name).size]

  def draw(axes):
    ends, low, high = [], [], []
    for run in drawn:
      steps, values = _series(run.rows, name)
      steps = steps + (run.before.steps if run.before else 0)
      keep = np.isfinite(values)
      steps, values = steps[keep], values[keep]
      if not len(steps):
        continue
      smooth = _smooth(values)
      if len(values) >= 100:
        axes.plot(steps, values, color=run.colour, alpha=0.25, linewidth=0.6)
      marker = "o" if len(values) <= 30 else ""
      axes.plot(steps, smooth, run.dash, color=run.colour, marker=marker, markersize=3)
      if error:
        errors = [row.get(error) or 0.0 for row in run.rows if row.get(name) is not None]
        errors = np.array(errors)[keep]
        axes.fill_between(
          steps, values - errors, values + errors, color=run.colour, alpha=0.2, linewidth=0
        )
      ends.append([smooth[-1], run, steps[-1]])
      # The first tenth falls so fast that showing all of it would flatten the rest.
      later = smooth[len(smooth) // 10 :]
      low, high = [*low, later.min()], [*high, later.max()]
    if baseline is not None:
      axes.axhline(baseline, color="#8a9099", linewidth=1, linestyle=":")
      low, high = [*low, baseline], [*high, baseline]
    if low:
      pad = 0.06 * (max(high) - min(low)) or 0.1
      axes.set_ylim(min(low) - pad, max(high) + pad)
    if baseline is not None:
      axes.annotate(
        "unigram baseline", (1, baseline), (0, -3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="top", color="#8a9099",
      )  # fmt: skip
    _label_ends(axes, ends)
    axes.set_xlabel("total training steps")
    axes.set_ylabel(ylabel)

  return _chart(draw) if drawn else ""


def _label_ends(axes, ends):
  """Writes each run's name right of the plot at its last value, moved apart where they collide."""
  bottom, top = axes.get_ylim()
  gap = 0.15 * (top - bottom)  # two lines of text
  place = -math.inf
  for value, run, _ in sorted(ends, key=lambda end: end[0]):
    place = max(min(max(value, bottom), top), place + gap)
    axes.text(
      1.02, place, textwrap.fill(run.label, 16), color=run.colour, va="center",
      transform=axes.get_yaxis_transform(),
    )  # fmt: skip


def png(shapes, width, height, path):
  """Saves a drawing of trace.draw as a PNG of twice its size in pixels, in the light colours."""
  figure = Figure(figsize=(width / 100, height / 100), dpi=200)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(0, width), ylim=(height, 0))
  axes.axis("off")
  for shape in shapes:
    colour = trace_lib.THEME.get(shape.colour, (shape.colour,))[0]
    if isinstance(shape, trace_lib.Box):
      box = Rectangle((shape.x, shape.y), shape.width, shape.height, color=colour, linewidth=0)
      axes.add_patch(box)
      continue
    # DejaVu Sans Mono is 0.602 em wide: this size fills the cells. A point is 1/72 inch.
    size = (trace_lib.CELL / 0.602 if shape.width else trace_lib.SIZE) * 0.72
    anchor = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
    family = "DejaVu Sans Mono" if shape.width else "sans-serif"
    axes.text(
      shape.x, shape.y, shape.text, color=colour, fontsize=size, family=family, ha=anchor,
      va="baseline", parse_math=False,
    )  # fmt: skip
  with epath.Path(path).open("wb") as file, warnings.catch_warnings():
    # A model may write any character; one the font lacks is a small box in the picture.
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    figure.savefig(file, format="png", metadata={"Software": None})


# The page.

_CSS = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1e22;--faint:#656a73;--line:#dfe2e6;
--soft:#f3f4f6;--mark:#cfe8d5}
@media (prefers-color-scheme:dark){:root{--page:#16181d;--ink:#e4e6ea;--faint:#9aa0aa;
--line:#3a3f48;--soft:#1e2127;--mark:#1f4a33}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:1.2rem 1rem 3rem;background:var(--page);
color:var(--ink);font:16px/1.5 system-ui,Helvetica,Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0 1rem}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
h3{font-size:.95rem;margin:1.4rem 0 .4rem;color:var(--faint);font-weight:600}
p{max-width:46rem;margin:.5rem 0}
.note{border-left:3px solid #d55e00;padding-left:.7rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .9rem .35rem 0;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--faint);font-size:.85rem;vertical-align:bottom}
figure{margin:1rem 0}
figure>svg{display:block;width:100%;height:auto;max-width:560px}
figure svg text{font-family:system-ui,Helvetica,Arial,sans-serif!important}
figcaption{color:var(--faint);font-size:.87rem;max-width:40rem;margin-top:.3rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.pair>*{min-width:0}
@media (max-width:760px){.pair{grid-template-columns:1fr}}
pre{background:var(--soft);padding:.7rem;margin:0;overflow-x:auto;border-radius:4px;
font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;tab-size:4}
pre span{color:var(--faint)}
mark{background:var(--mark);color:inherit}
.what{font-size:.8rem;color:var(--faint);margin-bottom:.2rem}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.6rem;color:var(--faint);
font-size:.85rem}
footer p{max-width:none}
"""


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
    rows.append((
      html.escape(run.label),
      spent(run, "steps"),
      spent(run, "tokens"),
      _number(value, "{:.3f}") + ("" if error is None else f" ± {error:.3f}"),
      _number(unigram, "{:.3f}"),
      spent(run, "seconds"),
    ))
  head = "".join(f"<th>{text}</th>" for text in heads)
  body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
  return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _figure(drawing, caption):
  return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>" if drawing else ""


def read_samples(path):
  """Reads sample rows from a jsonl file.

  Each holds "kind" ("complete" or "infill"), "prompt", "completion", "reference" (the original
  text where the completion stands), for infill "suffix", and "nfe" (int).

  Raises:
    ValueError: a line is no JSON object with these keys.
  """
  rows = []
  for number, line in enumerate(epath.Path(path).read_text().split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      missing = {"kind", "prompt", "completion", "reference"} - set(row)
    except (json.JSONDecodeError, TypeError) as e:
      raise ValueError(f"{path} line {number} is not a JSON object: {line[:80]!r}") from e
    if missing:
      raise ValueError(f"{path} line {number} lacks {', '.join(sorted(missing))}")
    rows.append(row)
  return rows


def _sample(number, row):
  """One sample beside the original, what stands in for the mask marked in both."""
  before, after = html.escape(row["prompt"]), html.escape(row.get("suffix") or "")
  panes = []
  for name, text in (("model", row["completion"]), ("original", row["reference"])):
    code = f"<span>{before}</span><mark>{html.escape(text)}</mark><span>{after}</span>"
    panes.append(f'<div><div class="what">{name}</div><pre>{code}</pre></div>')
  kind = {"complete": "completion", "infill": "infilling"}.get(row["kind"], str(row["kind"]))
  nfe = "" if row.get("nfe") is None else f", {row['nfe']} network evaluations"
  head = f"<h3>{number}. {html.escape(kind + nfe)}</h3>"
  return f'{head}<div class="pair">{"".join(panes)}</div>'


def write_report(path, title, runs, samples=None, drawing=None, footer=None, notes=()):
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
  """
  found, missing = load_runs(runs)
  notes = [*notes, *missing]
  parts = [f"<h1>{html.escape(title)}</h1>"]
  parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
  if found:
    parts += [f"<p>{html.escape(verdict(found))}</p>", _table(found)]
  if any(run.final for run in found):
    parts.append(_figure(bar_chart(found), "Held-out bits per byte at the end of each run, ± one "
      "standard error. For autoregressive runs this is the exact likelihood; for diffusion it is "
      "an upper bound (NELBO), so the two kinds do not compare on equal terms."))
  bits = curve_chart(
    found, "eval/bits_per_byte", "held-out bits per byte", "eval/bits_per_byte_se", _unigram(found)
  )
  loss = curve_chart(found, "loss", "training loss (nats per token)")
  if bits or loss:
    parts.append('<h2>Curves</h2><div class="pair">')
    parts.append(_figure(bits, "Held-out bits per byte, band ± one standard error. A run that "
      "continues another is drawn from where that one ended. Diffusion values are upper bounds."))
    parts.append(_figure(loss, "Training loss. The autoregressive loss and the diffusion NELBO are "
      "different objectives: compare shapes, not heights, across the two. The diffusion number is "
      "an upper bound on its negative log-likelihood, estimated with random masks, hence noisier."))
    parts.append("</div>")
  if drawing:
    parts.append("<h2>One denoising</h2>")
    parts.append(f'<div class="wide">{_inline(drawing)}</div>')
    parts.append('<p class="what">Above: each column is a position, grey until the step that '
      "committed its token. Below: the text, each token on the colour of its step; the prompt is "
      "plain. Hover over a token for its step and confidence.</p>")
  if samples:
    parts.append("<h2>Samples</h2><p>Held-out code; what the model wrote, and the original in its "
      "place, are marked.</p>")
    parts += [_sample(i, row) for i, row in enumerate(samples, 1)]
  made = " · ".join(f"{html.escape(k)} {html.escape(str(v))}" for k, v in (footer or {}).items())
  page = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>\n"
    + "\n".join(parts)
    + f"\n<footer><p>{made}</p></footer></body></html>\n"
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
  parser.add_argument("--trace", help=".npz of one sampler call")
  parser.add_argument("--row", type=int, default=0, help="which row of the trace to draw")
  parser.add_argument("--tokenizer", help="the trace's tokenizer; the last run's when absent")
  parser.add_argument("--config", default="", help="name of the config, for the footer")
  parser.add_argument("--title", default="Diffusion and autoregressive training compared")
  args = parser.parse_args(argv)
  if not all(name and workdir for name, _, workdir in (run.partition("=") for run in args.runs)):
    parser.error(f"--runs wants NAME=DIR pairs, such as ar=work/ar; got {' '.join(args.runs)}")
  runs = dict(run.split("=", 1) for run in args.runs)
  folder = epath.Path(args.workdir) / "report"
  folder.mkdir(parents=True, exist_ok=True)

  notes, samples, drawing = [], None, None
  if _given(args.samples, "samples", notes):
    samples = read_samples(args.samples)
  if _given(args.trace, "trace", notes):
    try:
      tokenizer = load_tokenizer(args.tokenizer or list(runs.values())[-1])
      trace = load_trace(args.trace)
      drawing = trace_lib.svg(trace, args.row, tokenizer)
      (folder / "denoising.svg").write_text(drawing)
      png(*trace_lib.draw(trace, args.row, tokenizer), folder / "denoising.png")
    except (FileNotFoundError, ValueError) as error:
      notes.append(f"No drawing of {args.trace}: {error}.")
  footer = {"config": args.config or "unnamed"}
  for name, workdir in runs.items():
    config = epath.Path(workdir) / "config.json"
    if config.exists():
      footer[f"seed of {name}"] = json.loads(config.read_text()).get("seed", "unknown")
  footer |= machine() | {"made on": datetime.date.today().isoformat()}
  write_report(folder / "index.html", args.title, runs, samples, drawing, footer, notes)
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
