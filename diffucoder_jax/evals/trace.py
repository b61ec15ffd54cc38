"""Pictures of one denoising: replayed state by state, and as an SVG drawing.

Everything here reads a `Trace` of diffusion/sampler.py (or anything with its fields as numpy
arrays): tokens [B, L] int32, step [B, L] int32 (0-based step that committed the token, -1 = given
or never committed), confidence and entropy [B, L] float32, nfe [B] int32, valid [B, L] bool.
`step` is the whole history, but for tokens that were masked again (`revoked`, where there is one).
People count from one, so the pictures show `step + 1`.
"""

import html
import unicodedata
from typing import NamedTuple

import numpy as np

from diffucoder_jax.diffusion.trace import COMMITTED, canvas_after

# Viridis made light enough that dark text reads on every colour: lightness still rises from early
# (violet) to late (yellow), so the order survives colour blindness and grey print.
_ANCHORS = ((157, 134, 221), (127, 165, 232), (96, 190, 205), (125, 210, 140), (253, 231, 60))
# Named colours of the drawing: (light page, dark page).
THEME = {
  "page": ("#ffffff", "#16181d"),
  "ink": ("#1c1e22", "#e4e6ea"),
  "faint": ("#656a73", "#9aa0aa"),
  "masked": ("#dfe2e6", "#3a3f48"),
  "given": ("#f3f4f6", "#22262d"),
  "token": ("#16181d", "#16181d"),  # text on a step colour: dark on both pages
}
CELL, LINE, SIZE, MARGIN = 8.0, 21.0, 13.0, 16.0  # pixels: cell width, line height, font, border
PLOT_HEIGHT, LABELS = 170.0, 44.0  # pixels: the position-by-step plot, the room left of it
TAB = "    "


class Box(NamedTuple):
  """A filled rectangle in pixels; `colour` is a THEME name or "#rrggbb"; `title` shows on hover."""

  x: float
  y: float
  width: float
  height: float
  colour: str
  title: str = ""


class Text(NamedTuple):
  """One line of text whose baseline is at y; with a `width` it is monospace of that many pixels."""

  x: float
  y: float
  text: str
  colour: str
  anchor: str = "start"
  width: float = 0.0


def step_colour(fraction):
  """The "#rrggbb" of a share of the denoising: 0.0 = first step (violet), 1.0 = last (yellow)."""
  place = min(max(fraction, 0.0), 1.0) * (len(_ANCHORS) - 1)
  i = min(int(place), len(_ANCHORS) - 2)
  mixed = (a + (b - a) * (place - i) for a, b in zip(_ANCHORS[i], _ANCHORS[i + 1], strict=True))
  return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def events(trace, row):
  """What was masked again in a row: list of (position, token, step of it, step that revoked it)."""
  revoked = getattr(trace, "revoked", None)
  if revoked is None:
    return []
  revoked_LR3 = np.asarray(revoked[row])
  return [
    (int(i), *map(int, revoked_LR3[i, r]))
    for i, r in np.argwhere(revoked_LR3[:, :, COMMITTED] >= 0)
  ]


def state_after(trace, row, step, mask_id):
  """The canvas after a step, int32 [L]; step -1: before anything was denoised."""
  revoked = getattr(trace, "revoked", None)
  revoked_LR3 = None if revoked is None else revoked[row]
  return canvas_after(trace.tokens[row], trace.step[row], revoked_LR3, step, mask_id)


def first_state(trace, row, mask_id):
  """The canvas before anything was denoised, int32 [L]: `mask_id` where a step commits a token."""
  return state_after(trace, row, -1, mask_id)


def change_steps(trace, row):
  """The steps that committed or revoked something in a row, ascending, int."""
  step_L = np.asarray(trace.step[row])
  others = [step for event in events(trace, row) for step in event[1 + COMMITTED :]]
  return np.unique([*step_L[step_L >= 0], *others]).astype(int)


def states(trace, row, mask_id):
  """Yields the tokens, int32 [L], after each denoising step that changed something in this row.

  The last state is `trace.tokens[row]`; a row in which nothing was committed yields nothing.
  """
  for step in change_steps(trace, row):
    yield state_after(trace, row, step, mask_id)


def pieces(ids, tokenizer):
  """The text each token adds to its row, so that joining the pieces gives the row's text.

  A character whose bytes are spread over several tokens goes to the last of them.

  Args:
    ids: int sequence.
  Returns:
    A list as long as `ids`: str (may be empty), or None for special tokens (mask, padding, end).
  """
  special = set(tokenizer.special_ids.values())
  found, held = [], []
  for token in map(int, ids):
    if token in special:
      if held:
        found[-1] = tokenizer.decode(held)
      found.append(None)
      held = []
      continue
    held.append(token)
    text = tokenizer.decode(held)
    if text.endswith("\ufffd") and len(held) < 4:  # perhaps the first bytes of a longer character
      found.append("")
    else:
      found.append(text)
      held = []
  if held:
    found[-1] = tokenizer.decode(held)
  return found


def printable(text):
  """Neither XML nor a terminal may see control characters that a model made up."""
  text = text.replace("\r\n", "\n").replace("\t", TAB)
  return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def _cells(text):
  """How many monospace cells a text takes; wide East Asian characters take two, accents none."""
  wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
  return wide - sum(unicodedata.combining(c) != 0 for c in text)


def wrapped(tokens, columns):
  """Lays (text, tag) tokens out in lines: yields (line, column, text, tag), "\\n" by itself."""
  line, column = 0, 0
  for text, tag in tokens:
    for part in text.splitlines(keepends=True):
      body, newline = (part[:-1], True) if part.endswith("\n") else (part, False)
      while body:
        if column and column + _cells(body) > columns:
          line, column = line + 1, 0
        fits = body[:columns] if _cells(body) > columns else body
        yield line, column, fits, tag
        column, body = column + _cells(fits), body[len(fits) :]
      if newline:
        yield line, column, "\n", tag
        line, column = line + 1, 0


# The drawing: a list of boxes and texts, which `svg` here and `png` in report.py put on a page.


def _text_panel(shapes, trace, row, tokenizer, columns, colour_of, steps, top):
  """Adds the row as code, each committed token on the colour of its step; returns the bottom."""
  shown = np.flatnonzero(np.asarray(trace.valid[row]))
  ids_L = np.asarray(trace.tokens[row])[shown]
  step_L = np.asarray(trace.step[row])[shown]
  texts = pieces(ids_L, tokenizer)
  masked_L = ids_L == tokenizer.mask_id
  # A canvas is often longer than its program: a sentence stands for what follows the end token.
  written = np.flatnonzero([text is not None for text in texts])
  ends = [i for i in range(written[-1] + 1 if len(written) else 0, len(texts)) if not masked_L[i]]
  end = ends[0] if ends else len(texts)
  tokens = []
  for i, text in enumerate(texts[: end + 1]):
    committed = step_L[i] >= 0
    if masked_L[i]:
      tokens.append(("\u2592", ("masked", "never committed")))
    elif text is None and not committed:
      continue  # the beginning and end tokens of the prompt are no part of its text
    else:
      name = tokenizer.decode([int(ids_L[i])], skip_special=False) if text is None else text
      title = ""
      if committed:
        confidence, entropy = (float(x[row][shown[i]]) for x in (trace.confidence, trace.entropy))
        title = (
          f"{name!r}, step {step_L[i] + 1} of {steps}, confidence {confidence:.3f}, "
          f"entropy {entropy:.3f} nats"
        )
      colour = colour_of(step_L[i]) if committed else ""
      tokens.append(("\u25a0" if text is None else printable(text), (colour, title)))
  masks = int(masked_L[end + 1 :].sum())
  said = [f"{len(ends)} end tokens"] * (len(ends) > 1) + [f"{masks} left masked"] * (masks > 0)
  if said:
    tokens.append(("  " + ", ".join(said), ("", "")))
  bottom = top
  for line, column, text, (colour, title) in wrapped(tokens, columns):
    x, y = MARGIN + column * CELL, top + line * LINE
    bottom = max(bottom, y + LINE)
    width = CELL * (1 if text == "\n" else _cells(text))
    if colour:
      # Half a pixel of air on each side keeps neighbours of one step apart.
      shapes.append(Box(x + 0.5, y + 1, width - 1, LINE - 2, colour, printable(title)))
    if text == "\n":
      text = "\u21b5" if colour else ""
    body = text.strip(" ")
    if body and colour != "masked":
      x += CELL * _cells(text[: text.index(body)])
      ink = "token" if colour else "ink"
      shapes.append(Text(x, y + 15, body, ink, "start", CELL * _cells(body)))
  return bottom


def _plot_panel(shapes, trace, row, mask_id, colour_of, steps, width, top):
  """Adds position by step: a column is grey while there is no token; returns the bottom."""
  tokens_L, step_L = np.asarray(trace.tokens[row]), np.asarray(trace.step[row])
  open_L = (step_L >= 0) | (np.asarray(trace.valid[row]) & (tokens_L == mask_id))
  first, last = np.flatnonzero(open_L)[[0, -1]]
  left = MARGIN + LABELS
  across, down = (width - left - MARGIN) / (last - first + 1), PLOT_HEIGHT / (steps + 1)
  bottom = top + PLOT_HEIGHT
  for i in range(first, last + 1):
    x, w = left + (i - first) * across, across * (0.92 if across > 4 else 1.0)
    if not open_L[i]:
      shapes.append(Box(x, top, w, PLOT_HEIGHT, "given", f"position {i}: given"))
      continue
    # Row 0 of the plot is the canvas before the first step.
    y = top + down * (step_L[i] + 1) if step_L[i] >= 0 else bottom
    shapes.append(Box(x, top, w, y - top, "masked", f"position {i}: masked"))
    if y < bottom:
      title = f"position {i}: committed at step {step_L[i] + 1}"
      shapes.append(Box(x, y, w, bottom - y, colour_of(step_L[i]), title))
  for i, _, committed, revoked in events(trace, row):
    x, w = left + (i - first) * across, across * (0.92 if across > 4 else 1.0)
    title = f"position {i}: committed at step {committed + 1}, revoked at step {revoked + 1}"
    y, height = top + down * (committed + 1), down * (revoked - committed)
    shapes.append(Box(x, y, w, height, colour_of(committed), title))
  for step in sorted({0, steps // 2, steps}):
    shapes.append(Text(left - 6, top + down * (step + 0.5) + 4, str(step), "faint", "end"))
  shapes.append(Text(MARGIN, top - 8, "step \u2193", "faint"))
  for i, anchor in ((first, "start"), ((first + last) // 2, "middle"), (last, "end")):
    x = left + (i - first + {"start": 0, "middle": 0.5, "end": 1}[anchor]) * across
    label = f"position {i}" if i == first else str(i)
    shapes.append(Text(x, bottom + 15, label, "faint", anchor))
  return bottom + LINE


def draw(trace, row, tokenizer, columns=88):
  """Draws one row of a trace: position by step above, the code coloured by commit step below.

  Args:
    trace: see the module's header. row: int. tokenizer: a data.tokenizer.Tokenizer.
    columns: longest line of the code panel in characters; longer lines are wrapped.
  Returns:
    (shapes, width, height): a list of Box and Text, and the size of the page in pixels.
  Raises:
    ValueError: there is no such row, or nothing was denoised in it.
  """
  if not 0 <= row < len(trace.tokens):
    raise ValueError(f"the trace has {len(trace.tokens)} rows, so there is no row {row} to draw")
  step_L = np.asarray(trace.step[row])
  if not (step_L >= 0).any():
    raise ValueError(f"row {row} of the trace has no token that was denoised: draw another row")
  steps = int(change_steps(trace, row)[-1]) + 1
  width = 2 * MARGIN + columns * CELL

  def colour_of(step):
    return step_colour(step / max(steps - 1, 1))

  nfe, undone = int(trace.nfe[row]), len(events(trace, row))
  said = f"{(step_L >= 0).sum()} tokens, {nfe} network evaluations"
  said += f", {undone} tokens revoked on the way" if undone else ""
  shapes = [
    Text(MARGIN, 26, "One completion as it was denoised, step by position", "ink"),
    Text(MARGIN, 45, said, "faint"),
  ]
  # The colour bar, top right.
  bar, x, y = 120, width - MARGIN - 120, 34
  for i in range(steps if steps < bar else bar):
    piece = bar / min(steps, bar)
    colour = step_colour(i / max(min(steps, bar) - 1, 1))
    shapes.append(Box(x + i * piece, y, piece + 0.3, 11, colour))
  shapes += [
    Text(x + bar / 2, y - 8, "committed at step", "faint", "middle"),
    Text(x - 6, y + 10, "1", "faint", "end"),
    Text(x + bar, y + 25, str(steps), "faint", "end"),
  ]
  y = _plot_panel(shapes, trace, row, tokenizer.mask_id, colour_of, steps, width, 86.0)
  y = _text_panel(shapes, trace, row, tokenizer, columns, colour_of, steps, y + LINE)
  return shapes, width, y + MARGIN


def _svg_shape(shape):
  """One Box or Text as an SVG element."""
  fill = f'fill="{shape.colour}"' if shape.colour[0] == "#" else f'class="{shape.colour}"'
  if isinstance(shape, Box):
    title = f"<title>{html.escape(shape.title)}</title>" if shape.title else ""
    return (
      f'<rect x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" '
      f'height="{shape.height:.2f}" {fill}>{title}</rect>'
    )
  # A fixed length keeps text on its box whichever monospace font the reader has.
  mono = ' font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"'
  fixed = f'{mono} textLength="{shape.width:.2f}" lengthAdjust="spacingAndGlyphs"'
  anchor = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
  return (
    f'<text x="{shape.x:.2f}" y="{shape.y:.2f}" {fill}{anchor}{fixed if shape.width else ""}>'
    f"{html.escape(shape.text)}</text>"
  )


def svg(trace, row, tokenizer, columns=88):
  """Draws one row of a trace as a self-contained SVG string (light and dark); see `draw`."""
  shapes, width, height = draw(trace, row, tokenizer, columns)
  styles = [
    "".join(f".denoising .{name}{{fill:{colours[dark]}}}" for name, colours in THEME.items())
    for dark in (0, 1)
  ]
  return "\n".join(
    [
      f'<svg xmlns="http://www.w3.org/2000/svg" class="denoising" width="{width:g}" '
      f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" font-size="{SIZE:g}" role="img" '
      'font-family="system-ui, Helvetica, Arial, sans-serif" xml:space="preserve">',
      "<title>One completion drawn as it was denoised, step by position</title>",
      f"<style>.denoising text{{pointer-events:none}}{styles[0]}"
      f"@media (prefers-color-scheme: dark){{{styles[1]}}}</style>",
      f'<rect class="page" width="{width:g}" height="{height:g}"/>',
      *map(_svg_shape, shapes),
      "</svg>",
    ]
  )
