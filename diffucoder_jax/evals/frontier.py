"""Quality against network evaluations: the cells of a sweep over `evaluate` as one picture and page.

A line joins cells that differ in one setting alone (the steps, unless told otherwise); every other
setting that the sweep changes names the line. Costs are what the sampler counted, not what was asked
for: the mean network evaluations of a sample. A cell is on the Pareto front when no other scores
as high with as few.
"""

import html
import json
import math
from typing import NamedTuple

from etils import epath

from diffucoder_jax.evals import charts, order_charts, report, scores, style

# What may differ between cells that are compared: the sampler is what is swept, and so what is said of it
# in words; another commit or Python is said on the page.
MAY_DIFFER = ("sampler", "decoding", "commit", "python")
PICTURE, PAGE = "frontier.svg", "index.html"


class Point(NamedTuple):
  """A cell in the picture. `line` names its line; `value`, `low` and `high` are shares of problems."""

  cell: str
  line: str
  setting: object
  nfe: float
  value: float
  low: float
  high: float
  results: dict


def metrics_of(folder) -> dict:
  """The numbers of an evaluation's results.json, flat: "plus/pass@1" with "_low" and "_high", "nfe", ...

  Raises:
    ValueError: there are no results, or a pin of them is missing.
  """
  results = scores.read_results(folder)
  found = {}
  for part in reversed(results["scores"]):  # the strictest first
    for name, score in results["scores"][part].items():
      found |= {f"{part}/{name}": score["value"]}
      found |= {f"{part}/{name}_{end}": score[end] for end in ("low", "high")}
  costs = results["costs"]
  return found | {name: costs[name] for name in ("nfe", "tokens_per_second", "length") if costs}


def read(rows, along="steps"):
  """The points of a sweep's finished cells.

  Args:
    rows: of `cells.rows_of`. along: the key that changes along a line.
  Returns:
    list of `Point`, lines in the order of the sweep, each by cost.
  Raises:
    ValueError: results are unreadable, or of cells that differ in more than the sweep says, such as
      in the data or the weights; names both and the pin.
  """
  keys = list(dict.fromkeys(key for row in rows for key in row["changes"]))
  points, first = [], {}
  for row in rows:
    if row["state"] != "finished":
      continue
    results = scores.read_results(row["folder"])
    _check_same_pins(row, results, keys, first)
    if not results["costs"]:
      raise ValueError(
        f"cell {row['cell']} has no costs: given samples have no network evaluations"
      )
    strictest = list(results["scores"])[-1]
    score = results["scores"][strictest]["pass@1"]
    points.append(Point(
      row["cell"], _line(row["changes"], along), row["changes"].get(along, ""),
      results["costs"]["nfe"], score["value"], score["low"], score["high"], results,
    ))  # fmt: skip
  lines = list(dict.fromkeys(point.line for point in points))
  return sorted(points, key=lambda point: (lines.index(point.line), point.nfe))


def _line(changes, along):
  """alg alone needs no name; others do."""
  parts = [
    str(value) if key == "alg" else f"{key} {value}" for key, value in changes.items() if key != along
  ]  # fmt: skip
  return ", ".join(parts) or "all"


def _check_same_pins(row, results, keys, first):
  """Cells alike in all that is swept but the sampler must have been asked the same."""
  pins = results["pins"]
  group = tuple(
    (key, str(row["changes"].get(key))) for key in keys if key not in pins.get("sampler", {})
  )
  other, theirs = first.setdefault(group, (row["cell"], pins))
  for name in sorted({*pins, *theirs} - set(MAY_DIFFER)):
    a, b = (_comparable(name, found) for found in (theirs, pins))
    if a != b:
      raise ValueError(
        f"cells {other} and {row['cell']} differ in {name}, which the sweep does not change: {a} and "
        f"{b}. Remove the older folder and start the sweep again"
      )


def _comparable(name, pins):
  """Weights are known by their fingerprint, wherever they lie."""
  value = pins.get(name)
  return value["fingerprint"] if name == "checkpoint" and value else value


def pareto(points):
  """Those that no other point beats: with as few evaluations as high a score, and better in one.

  Returns:
    list of `Point`, by cost.
  """

  def beaten(one):
    return any(
      other.nfe <= one.nfe and other.value >= one.value
      and (other.nfe < one.nfe or other.value > one.value)
      for other in points
    )  # fmt: skip

  return sorted((one for one in points if not beaten(one)), key=lambda one: one.nfe)


def said(points):
  """Sentences, from the numbers alone: the best cell, and the cheapest that cannot be told from it."""
  if not points:
    return []
  best = min(points, key=lambda point: (-point.value, point.nfe))
  found = [
    f"Best: {_name(best)} solves {100 * best.value:.1f} % [{100 * best.low:.1f}, {100 * best.high:.1f}] "
    f"with {best.nfe:.1f} network evaluations a sample."
  ]
  for point in pareto(points):
    if point.nfe >= best.nfe:
      break
    difference = list(scores.compare(point.results, best.results).values())[-1]["pass@1"]
    if difference["high"] >= 0:
      found.append(
        f"The cheapest on the front that cannot be told from it on these problems: {_name(point)} with "
        f"{point.nfe:.1f} evaluations, {100 * difference['difference']:+.1f} points "
        f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}], paired by problem. The best "
        "of many cells is also the luckiest, so the true difference is likely smaller."
      )
      break
  return found


def _name(point):
  return f"{point.line} at {point.setting}" if point.setting != "" else point.line


def chart(points, along="steps"):
  """Score against network evaluations (logarithmic), with intervals; str, an SVG element.

  Args:
    points: of `read`, at least one.
  """
  lines = list(dict.fromkeys(point.line for point in points))
  front = pareto(points)

  def draw(axes):
    place = {}
    for i, line in enumerate(lines):
      mine = [point for point in points if point.line == line]
      # A little apart, so that bars at one cost do not hide each other.
      apart = 1.012 ** (i - (len(lines) - 1) / 2)
      nfe = [point.nfe * apart for point in mine]
      place |= {point.cell: x for point, x in zip(mine, nfe, strict=True)}
      value = [100 * point.value for point in mine]
      bars = [[100 * max(0, point.value - point.low) for point in mine],
              [100 * max(0, point.high - point.value) for point in mine]]  # fmt: skip
      colour, dash = order_charts.STYLES[i % len(order_charts.STYLES)]
      axes.errorbar(nfe, value, bars, color=colour, linestyle=dash, marker="os^Dv<>p"[i % 8],
                    markersize=4, capsize=2, linewidth=1.3, elinewidth=0.8, label=line)  # fmt: skip
    x, y = [place[point.cell] for point in front], [100 * point.value for point in front]
    axes.plot(x, y, drawstyle="steps-post", color="#8a9099", linewidth=0.8, linestyle=":", zorder=0)
    axes.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="#8a9099",
              label="Pareto front")  # fmt: skip
    axes.set_xscale("log")
    ticks = _ticks([point.nfe for point in points])
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("network evaluations per sample")
    axes.set_ylabel("problems solved with one sample, %")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))

  return charts._chart(draw, height=3.2 + 0.17 * math.ceil((len(lines) + 1) / 2))


def _ticks(values):
  """Those of the values that leave room for their numbers on a logarithmic axis."""
  ticks = []
  for value in sorted(values):
    if not ticks or value / ticks[-1] > 1.15:
      ticks.append(value)
  return ticks


def write(folder, title, points, table, along="steps", notes=()):
  """Writes frontier.svg and index.html, one page that needs nothing else, into a sweep's folder.

  Args:
    points: of `read`, at least one. table: lines of `cells.table`. notes: sentences to show on top.
  """
  folder, text = epath.Path(folder), html.escape
  svg = chart(points, along)
  pins = [point.results["pins"] for point in points]
  notes = [*notes, *(
    f"Cells were run with more than one {name}: {', '.join(found)}."
    for name in ("commit", "python") if len(found := sorted({p[name] for p in pins})) > 1
  )]  # fmt: skip
  caption = (
    f"{pins[0]['benchmark']}, {len(points[0].results['problems'])} problems, {pins[0]['samples']} "
    f"sample(s) of each. Bars: 95 % intervals over problems. A line joins cells that differ in {along} "
    "alone; lines are drawn a little apart. Ringed: the Pareto front of the scores as they are, which "
    "other problems could change where bars overlap."
  )
  head = "".join(f"<th>{text(cell)}</th>" for cell in table[0])
  body = "".join(
    "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in line) + "</tr>" for line in table[1:]
  )
  labelled = svg.replace("<svg", f'<svg role="img" aria-label="{text(caption)}"', 1)
  pin = {name: value for name, value in pins[0].items() if name != "sampler"}
  parts = [
    f"<h1>{text(title)}</h1>",
    *(f'<p class="note">{text(note)}</p>' for note in notes),
    *(f"<p>{text(sentence)}</p>" for sentence in said(points)),
    f"<figure>{labelled}<figcaption>{text(caption)}</figcaption></figure>",
    '<div class="wide" tabindex="0" role="region" aria-label="Cells">'
    f"<table><tr>{head}</tr>{body}</table></div>",
    f"<h2>What the scores depend on</h2><p>Of cell {points[0].cell}; the others differ in what the table "
    f"says.</p><pre>{text(json.dumps(pin, indent=1))}</pre>",
  ]
  made = " · ".join(f"{text(str(k))} {text(str(v))}" for k, v in report.machine().items())
  page = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{text(title)}</title><style>{style.CSS}</style></head><body>\n<main>\n"
    + "\n".join(parts)
    + f"\n</main>\n<footer><p>{made}</p></footer></body></html>\n"
  )
  (folder / PICTURE).write_text(order_charts.standalone(svg))
  (folder / PAGE).write_bytes(page.encode("utf-8", "replace"))


def remove(folder):
  """Takes away what `write` wrote, if it did."""
  for name in (PICTURE, PAGE):
    (epath.Path(folder) / name).unlink(missing_ok=True)
