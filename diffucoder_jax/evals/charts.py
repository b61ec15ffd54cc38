"""The report's pictures: charts of runs as SVG text for the page, and a denoising as PNG."""

import io
import math
import re
import textwrap
import warnings

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diffucoder_jax.evals import trace as trace_lib

# Okabe-Ito colours (blue a little lighter) that read on white and near-black; the line style tells
# them apart in grey.
COLOURS = ("#1a80c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "-", "--", "-.", ":", "-")
# Drawn in this colour, replaced by the page's text colour, so that charts follow light and dark.
_INK = "#010203"
_GREY = "#8a9099"
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


def _series(rows, name):
  """The (steps, values) at which a metric was logged, as float arrays [N]."""
  pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
  return np.array(pairs, float).reshape(-1, 2).T


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
  return inline(text.replace(_INK, "currentColor"))


def inline(svg):
  """An SVG inside HTML needs no namespace declarations."""
  return re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)


def bar_chart(runs, baseline=None):
  """Final held-out bits per byte of every run beside the unigram baseline, with error bars.

  Args:
    runs: namespaces with label, colour and final (bits per byte, its standard error or None, ...),
      or final None for a run to leave out.
    baseline: bits per byte of the unigram model, or None.
  Returns:
    str, an SVG element.
  """
  ranked = [run for run in runs if run.final]
  bars = [(run.label, run.final[0], run.final[1] or 0.0, run.colour) for run in ranked]
  if baseline is not None:
    bars.insert(0, ("unigram baseline", baseline, 0.0, _GREY))

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
  """One metric against total training steps, each run labelled at the end of its line.

  Args:
    runs: namespaces with label, colour, dash, rows (dicts of metrics in order of step) and before
      (the run it continues, which has steps; or None).
    name, ylabel: str, the metric and what the axis calls it.
    error: name of the metric's standard error, drawn as a band, or None.
    baseline: height of a line for the unigram model, or None.
  Returns:
    str, an SVG element; empty when no run has the metric.
  """
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
      axes.axhline(baseline, color=_GREY, linewidth=1, linestyle=":")
      low, high = [*low, baseline], [*high, baseline]
    if low:
      pad = 0.06 * (max(high) - min(low)) or 0.1
      axes.set_ylim(min(low) - pad, max(high) + pad)
    if baseline is not None:
      axes.annotate(
        "unigram baseline", (1, baseline), (0, -3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="top", color=_GREY,
      )  # fmt: skip
    _label_ends(axes, ends)
    axes.set_xlabel("total training steps")
    axes.set_ylabel(ylabel)

  return _chart(draw) if drawn else ""


def histogram_chart(values, xlabel, ylabel):
  """How often whole numbers occur, one outline a series.

  Args:
    values: {label: list of int}, none empty.
    xlabel, ylabel: str.
  Returns:
    str, an SVG element.
  """
  last = max(max(series) for series in values.values())

  def draw(axes):
    for i, (label, series) in enumerate(values.items()):
      counts = np.bincount(series, minlength=last + 1)
      edges = np.arange(len(counts) + 1) - 0.5
      axes.stairs(counts, edges, color=COLOURS[i], linestyle=DASHES[i + 1], label=label, fill=not i,
                  alpha=0.5 if not i else 1.0)  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)

  return _chart(draw, height=2.4)


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
