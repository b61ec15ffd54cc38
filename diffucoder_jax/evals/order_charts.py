"""Pictures of the order of decoding, in the paper's form, and the static page that holds them."""

import html
import json
import textwrap

import numpy as np
from etils import epath

from diffucoder_jax.evals import arness, charts, style

STYLES = [(colour, dash) for dash in ("-", "--", ":") for colour in charts.COLOURS]


def standalone(svg):
  """An SVG element of the page as a file of its own."""
  names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
  return svg.replace("<svg", f"<svg {names}", 1)


def _finish(axes, xlabel, ylabel, limits=None):
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)
  if limits:
    axes.set_ylim(*limits)
  axes.legend(frameon=False, fontsize=8)


def arness_chart(summaries, kind, most):
  """AR-ness@k against k, a line for each label, with bars of its interval.

  Args:
    summaries: {label: {"local@1": {"mean", "low", "high", ...}, ..., "random": {"local@1": mean}}}.
    kind: "local" or "global". most: the largest k.
  """
  k = np.arange(1, most + 1)

  def draw(axes):
    for i, (label, found) in enumerate(summaries.items()):
      mean, low, high = (
        np.array([found[f"{kind}@{j}"][name] for j in k], float) for name in ("mean", "low", "high")
      )
      colour, dash = STYLES[i % len(STYLES)]
      bars = np.nan_to_num(np.maximum([mean - low, high - mean], 0))
      # A little apart, so that bars of one k do not hide each other.
      axes.errorbar(
        k + 0.06 * (i - (len(summaries) - 1) / 2), mean, bars, color=colour, linestyle=dash,
        marker="o", markersize=3, capsize=2, linewidth=1.3, label=label,
      )  # fmt: skip
    chance = np.mean(
      [[found["random"][f"{kind}@{j}"] for j in k] for found in summaries.values()], 0
    )
    axes.plot(k, chance, ":", color="#8a9099", linewidth=1, label="random order")
    axes.set_xticks(k)
    _finish(axes, "k", f"{kind} AR-ness@k", (-0.03, 1.03))

  return charts._chart(draw)


def lines_chart(series, xlabel, ylabel, limits=None):
  """Curves by label: {label: (x, y)} or, with a band, {label: (x, y, low, high)}."""

  def draw(axes):
    for i, (label, (x, y, *band)) in enumerate(series.items()):
      colour, dash = STYLES[i % len(STYLES)]
      axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.3, label=label)
      if band:
        axes.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)
    _finish(axes, xlabel, ylabel, limits)

  return charts._chart(draw)


def points_chart(series, labels, ylabel):
  """Means with intervals against the labels: {name: list of {"mean", "low", "high"}}."""

  def draw(axes):
    for i, (name, found) in enumerate(series.items()):
      mean, low, high = (
        np.array([x[part] for x in found], float) for part in ("mean", "low", "high")
      )
      bars = np.nan_to_num(np.maximum([mean - low, high - mean], 0))
      colour, dash = STYLES[i % len(STYLES)]
      axes.errorbar(
        np.arange(len(labels)) + 0.05 * (i - (len(series) - 1) / 2), mean, bars, color=colour,
        linestyle=dash, marker="o", markersize=4, capsize=3, linewidth=1.2, label=name,
      )  # fmt: skip
    axes.set_xticks(range(len(labels)), labels)
    _finish(axes, "", ylabel)

  return charts._chart(draw, height=2.6)


def maps_chart(maps, bar, name, low=None, high=None):
  """Step × position heat maps beside each other, decoding downwards, one colour scale.

  Args:
    maps: {label: float [steps, L]}, NaN where there is nothing. bar: what colour means.
    name: what the rows are, such as "share of steps". low, high: ends of the scale; None: of the data.
  """
  low = min(np.nanmin(x) for x in maps.values()) if low is None else low
  high = max(np.nanmax(x) for x in maps.values()) if high is None else high

  def draw(axes):
    figure = axes.get_figure()
    axes.remove()
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for panel, (label, grid) in zip(panels, maps.items(), strict=True):
      image = panel.imshow(
        grid, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest",
        extent=(0, grid.shape[1], 1, 0),
      )  # fmt: skip
      panel.set_title(label, fontsize=9)
      panel.set_xlabel("position")
    panels[0].set_ylabel(name)
    figure.colorbar(image, ax=list(panels), label=bar)

  return charts._chart(draw, height=2.6)


def matrix_chart(grid, labels, bar):
  """A square of numbers between labels, each written in its cell."""

  def draw(axes):
    image = axes.imshow(grid, cmap="viridis")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for a, b in np.ndindex(grid.shape):
      colour = "#000000" if grid[a, b] > middle else "#ffffff"
      axes.text(b, a, f"{grid[a, b]:.3f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(labels)), labels)
    axes.get_figure().colorbar(image, ax=axes, label=bar)

  return charts._chart(draw, height=3.2)


def figures(results, maps):
  """All pictures for which there are numbers.

  Args:
    results: what goes into results.json.
    maps: {"committed", "confidence": {label: float [steps, L]}}, either may be absent.
  Returns:
    {name: (SVG element, caption)}.
  """
  found = results["labels"]
  labels, options = list(found), results["options"]
  counting = (
    f"“{options['definition']}” definition, denominator “{options['denominator']}”, tail "
    f"“{options['tail']}”, tokens of one step {options['ties'].replace('_', ' ')}; bars: 95 % intervals, "
    "problems and seeds resampled; dotted: random orders of the same lengths."
  )
  drawn = {}
  for kind, most, what in (
    ("local", arness.LOCAL_K, "tokens that continue the k tokens committed before them"),
    ("global", arness.GLOBAL_K, "tokens that were among the k leftmost masked ones"),
  ):
    picture = arness_chart(found, kind, most)
    drawn[f"arness_{kind}"] = (
      picture,
      f"{kind.capitalize()} AR-ness@k: share of {what}. {counting}",
    )
  for by, xlabel in (("by_step", "share of decoding"), ("by_position", "position")):
    series = {}
    for label in labels:
      y = np.array(found[label]["profiles"]["global@1"][by], float)
      x = (np.arange(len(y)) + 0.5) / len(y) if by == "by_step" else np.arange(len(y))
      series[label] = (x, y)
    drawn[f"arness_{by}"] = (
      lines_chart(series, xlabel, "global AR-ness@1", (-0.03, 1.03)),
      f"Global AR-ness@1 along {'decoding' if by == 'by_step' else 'the answer'}: where the leftmost "
      "masked position was the one that was written.",
    )
  first = {label: x["first_step"] for label, x in found.items() if "first_step" in x}
  if first:
    series = {}
    for label, x in first.items():
      mean, low, high = (np.array(x[name], float) for name in ("mean", "low", "high"))
      series[label] = (np.arange(len(mean)), mean, low, high)
    drawn["first_step"] = (
      lines_chart(series, "position after the prefix", "confidence (negative entropy, nats)"),
      "Confidence at the first step, when all is masked, by position; band: 95 % interval over problems. "
      "High right of the prefix and flat after it is the entropy sink.",
    )
  for name, bar, rows, ends, caption in (
    ("committed", "share committed", "share of steps", (0.0, 1.0),
     "Which positions were committed after which share of the steps, in what share of the answers (with "
     "their tails). A sharp diagonal is left to right."),
    ("confidence", "negative entropy, nats", "share of steps", (None, None),
     "Mean confidence of the positions still masked, step by position; blank where none was masked."),
  ):  # fmt: skip
    if maps.get(name):
      drawn[f"map_{name}"] = (maps_chart(maps[name], bar, rows, *ends), caption)
  if any(x["distance"]["values"] for x in found.values()):
    points = {"distance": [found[label]["distance"] for label in labels],
              "order entropy (bits)": [found[label]["order_entropy"] for label in labels]}  # fmt: skip
    drawn["diversity"] = (
      points_chart(points, labels, "per pair of positions"),
      "How much the order differs between samples of the same prompt: normalised Kendall distance (two "
      "random orders are 0.5 apart) and the entropy of which of two positions comes first (even coins "
      f"would show {max(x['coin_entropy'] or 0 for x in found.values()):.3f} with as many samples).",
    )
  if "order_matrix" in results and len(labels) > 1:
    drawn["order_matrix"] = (
      matrix_chart(np.array(results["order_matrix"]["means"], float), labels, "Kendall distance"),
      "Mean distance between orders within labels (diagonal) and between them, same prompts. Larger off "
      "the diagonal than on it: the label changes the order, not only its spread.",
    )
  if any(x["end"]["values"] for x in found.values()):
    times = {name: [found[label][name] for label in labels] for name in ("end", "tail", "answer")}
    drawn["length"] = (
      points_chart(times, labels, "mean time of commitment"),
      "When the first end token, the tail behind it and the answer before it are committed: 0 is the "
      "first token, 1 the last. A tail earlier than the answer means that length is decided first.",
    )
  for name, series in results.get("pass_at_k", {}).items():
    curves = {label: (x["k"], x["mean"], *([x["low"], x["high"]] if "low" in x else []))
              for label, x in series.items()}  # fmt: skip
    drawn[name] = (lines_chart(curves, "k", "pass@k"), "pass@k, as the results given say it.")
  return drawn


def excerpt(folder, link):
  """Pieces of HTML for another page: both AR-ness figures of an analysis and what it says.

  Args:
    folder: where `write` wrote, beside results.json. link: its address from the other page.
  Raises:
    FileNotFoundError: there are no results.
  """
  results = json.loads((epath.Path(folder) / "results.json").read_text())
  found = results["labels"]
  said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in results["said"])
  pieces = [f"<h2>The order of decoding</h2><ul>{said}</ul>", '<div class="pair">']
  for kind, most in (("local", arness.LOCAL_K), ("global", arness.GLOBAL_K)):
    caption = f"{kind.capitalize()} AR-ness@k at each temperature; bars: 95 % intervals; dotted: chance."
    chart = charts.inline(arness_chart(found, kind, most))
    pieces.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
  link = html.escape(link, quote=True)
  return [*pieces, "</div>", f'<p>All of it: <a href="{link}">the analysis</a>.</p>']


def page(title, results, rows, drawn):
  """The page as a str: sentences, table, figures, how it was counted.

  Args:
    title: str. results: what goes into results.json. rows: the table, lists of str, heads first.
    drawn: from `figures`.
  """
  text = html.escape
  parts = [f"<h1>{text(title)}</h1>"]
  parts += [f'<p class="note">{text(note)}</p>' for note in results["notes"]]
  parts += [f"<p>{text(said)}</p>" for said in results["said"]]
  head = "".join(f"<th>{text(cell)}</th>" for cell in rows[0])
  body = "".join(
    "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
  )
  parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')
  parts.append('<div class="pair">')
  for svg, caption in drawn.values():
    labelled = svg.replace("<svg", f'<svg role="img" aria-label="{text(caption)}"', 1)
    parts.append(f"<figure>{labelled}<figcaption>{text(caption)}</figcaption></figure>")
  parts.append("</div><h2>How it was counted</h2>")
  explained = textwrap.dedent(arness.__doc__.split("\n", 2)[2])
  parts.append(f"<pre>{text(explained.strip())}</pre>")
  made = " · ".join(f"{text(str(k))} {text(str(v))}" for k, v in results["made"].items())
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{text(title)}</title><style>{style.CSS}</style></head><body>\n"
    + "\n".join(parts)
    + f"\n<footer><p>{made}</p></footer></body></html>\n"
  )


def write(folder, title, results, rows, maps):
  """Writes index.html and every picture once more as .svg into a folder."""
  folder = epath.Path(folder)
  drawn = figures(results, maps)
  for name, (svg, _) in drawn.items():
    (folder / f"{name}.svg").write_text(standalone(svg))
  # Names of problems and labels come from outside, where half a surrogate pair may be.
  (folder / "index.html").write_bytes(page(title, results, rows, drawn).encode("utf-8", "replace"))
