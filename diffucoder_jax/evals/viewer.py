"""The denoising viewer: one or two traces to step through in a browser, as a piece of HTML.

`record` turns a row of a trace into plain data, `fragment` puts one or two records on a page with
the script beside this file (viewer.js); `STYLE` (viewer.css) goes into the page's head and takes
its colours from style.py. Nothing is fetched: the page works from file://.

Traces are those of diffusion/sampler.py (fields in trace.py's header). One that also has
`alternatives` [B, L, k] int32 and `alternative_probs` [B, L, k] float32, the likeliest tokens when
the position was committed and their probabilities (an id of -1: none), shows them too.
"""

import html
import itertools
import json
import pathlib
import unicodedata

import numpy as np
from etils import epath

from diffucoder_jax.diffusion.sampler import load_trace
from diffucoder_jax.evals import trace as trace_lib

_HERE = pathlib.Path(__file__).parent
STYLE = (_HERE / "viewer.css").read_text()
_SCRIPT = (_HERE / "viewer.js").read_text()
_RAMP = [trace_lib.step_colour(i / 64) for i in range(65)]
_PART = "\u2026"  # stands for a token that is only a part of a character
_SPECIAL = "\u25a0"  # stands for an end token and its like


def record(trace, row, tokenizer, label):
  """What the viewer needs to know of one row of a trace.

  Args:
    trace: see the module's header. row: int. tokenizer: a data.tokenizer.Tokenizer.
    label: str, how the page calls this trace.
  Returns:
    A dict to be written as JSON: label, nfe, steps (the last step that committed something counts,
    from one), and lists over the row's tokens without padding and without the special tokens of the
    prompt: position (in the canvas), token (id), text (what it adds to the row, no control
    characters), name (of a token that has no text of its own, else ""), step (0-based, -1 = given,
    -2 = left masked), confidence and entropy (5 decimals; None where there is none), and
    alternatives (None, or for each token a list of [text, probability, 1 if chosen else 0]).
  Raises:
    ValueError: there is no such row, nothing was denoised in it, tokens were masked again, or
      alternatives lack their probabilities.
  """
  if not 0 <= row < len(trace.tokens):
    raise ValueError(f"the trace has {len(trace.tokens)} rows, so there is no row {row} to show")
  valid_L = np.asarray(trace.valid[row], bool)
  ids_L, step_L = np.asarray(trace.tokens[row]), np.asarray(trace.step[row])
  if not (step_L >= 0).any():
    raise ValueError(f"row {row} of the trace has no token that was denoised: show another row")
  if trace_lib.events(trace, row):
    raise ValueError(
      f"row {row} of the trace has tokens that were masked again (sampler.revoke), which the viewer does "
      "not show: see the drawing of report --trace, or generate --show"
    )
  step_L = np.where((step_L < 0) & (ids_L == tokenizer.mask_id), -2, step_L)
  texts = np.full(len(ids_L), None)
  texts[valid_L] = trace_lib.pieces(ids_L[valid_L], tokenizer)
  special_L = np.array([text is None for text in texts])
  # As in the static drawing, the prompt's own special tokens are no part of its text.
  shown = np.flatnonzero(valid_L & ((step_L != -1) | ~special_L))
  positions = shown.tolist()
  found = {
    "label": label,
    "nfe": int(trace.nfe[row]),
    "steps": int(step_L.max()) + 1,
    "position": positions,
    "token": ids_L[shown].tolist(),
    "text": [_text(texts[i], step_L[i]) for i in positions],
    "name": [_name(ids_L[i], texts[i], tokenizer) for i in positions],
    "step": step_L[shown].tolist(),
    "alternatives": None,
  }
  for name in ("confidence", "entropy"):
    values = np.asarray(getattr(trace, name)[row], float)
    found[name] = [_decimal(values[i]) if step_L[i] >= 0 else None for i in positions]
  if getattr(trace, "alternatives", None) is not None:
    if getattr(trace, "alternative_probs", None) is None:
      raise ValueError("the trace has alternatives without alternative_probs; save both or neither")
    likely = np.asarray(trace.alternatives[row]), np.asarray(trace.alternative_probs[row], float)
    found["alternatives"] = [
      _alternatives(likely[0][i], likely[1][i], ids_L[i], tokenizer) if step_L[i] >= 0 else []
      for i in positions
    ]
  return found


def read(paths, row, tokenizer):
  """Records of trace files, to be shown side by side.

  Args:
    paths: .npz files of `sampler.save_trace`, named on the page by as much of the ends of their
      paths as tells them apart; None: nothing was asked for.
    row, tokenizer: see `record`.
  Returns:
    (records, notes): a dict for each file that can be shown, a sentence for each that cannot.
  """
  wanted = [epath.Path(path) for path in paths if path]
  parts = [path.parts[::-1] for path in wanted]
  alike = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))
  length = 1 + sum(1 for _ in alike) if len(wanted) > 1 else 1
  records, notes = [], []
  for path, ends in zip(wanted, parts, strict=True):
    try:
      records.append(record(load_trace(path), row, tokenizer, "/".join(ends[:length][::-1])))
    except (FileNotFoundError, ValueError) as error:
      notes.append(f"{path} is not in the viewer: {error}.")
  return records, notes


def _alternatives(ids, probs, chosen, tokenizer):
  """[[text, probability, 1 if this one was written else 0], ...] of one position."""
  special = set(tokenizer.special_ids.values())
  rows = []
  for token, prob in zip(ids.tolist(), probs, strict=True):
    if token >= 0:
      text = None if token in special else tokenizer.decode([token])
      rows.append(
        [_name(token, text, tokenizer) or _plain(text), _decimal(prob), int(token == chosen)]
      )
  return rows


def _name(token, text, tokenizer):
  """How a token that adds no text is called: "<eos>", say; "" for one with a text."""
  if text is None:
    return _plain(tokenizer.decode([int(token)], skip_special=False))
  return "" if text else "part of a character"


def _decimal(value):
  return round(float(value), 5) if np.isfinite(value) else None


def _text(text, step):
  """What stands in the token's place on the page."""
  if step == -2:
    return " "
  if text is None:
    return _SPECIAL
  # A given token is read as text; one that was written needs something to point at.
  return _plain(text) or ("" if step == -1 else _PART)


def _plain(text):
  """No control, format or private characters: a model may write any, such as one that turns text."""
  text = text.replace("\r\n", "\n")
  return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def fragment(records, name="viewer"):
  """The viewer as HTML for the body of a page, with its data and its script.

  Args:
    records: one or two dicts of `record`.
    name: str, prefix of the ids; one for each viewer of a page.
  Returns:
    str. Without JavaScript nothing of it is seen.
  Raises:
    ValueError: not one or two records.
  """
  if len(records) not in (1, 2):
    raise ValueError(f"the viewer shows one trace or two side by side, not {len(records)}")
  data = json.dumps({"ramp": _RAMP, "traces": records}, allow_nan=False, separators=(",", ":"))
  # Within <script> only "</script" and "<!--" mean something; without "<" neither can occur.
  data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
  several = len(records) == 2
  align = (
    _choice(name, "align", "Line up by", (("step", "step"), ("share", "share of steps")))
    if several
    else ""
  )
  colour = _choice(
    name,
    "colour",
    "Colour by",
    (("step", "commit step"), ("confidence", "confidence"), ("entropy", "entropy")),
  )
  speeds = "".join(f'<option value="{n}">{n}</option>' for n in (1, 2, 5, 10, 30, 60, 120))
  panes = "".join(_pane(name, i, record) for i, record in enumerate(records))
  more = " viewer-more" if any(record["alternatives"] for record in records) else ""
  stops = ", ".join(_RAMP[::8])
  return f"""
<section class="viewer" id="{name}" aria-label="Denoising viewer" hidden>
<div class="viewer-bar">
<button type="button" class="viewer-play">Play</button>
<input type="range" class="viewer-slider" min="0" max="1" step="1" value="0"
 aria-label="Denoising step">
<span class="viewer-now" aria-hidden="true"></span>
</div>
<div class="viewer-options">
{colour}
{align}
<label class="viewer-speed">Steps a second <select>{speeds}</select></label>
<span class="viewer-legend" role="img"><span class="viewer-low"></span>
<span class="viewer-scale" style="background:linear-gradient(90deg, {stops})"></span>
<span class="viewer-high"></span></span>
</div>
<div class="viewer-panes{" viewer-two" if several else ""}">{panes}</div>
<div class="viewer-details{more}" id="{name}-details"></div>
<p class="viewer-keys">Space plays and pauses; comma and full stop go one step back and on. In the
text, arrow keys go from token to token, Home and End to the first and last.</p>
<p class="viewer-said" role="status"></p>
<script type="application/json" class="viewer-data">{data}</script>
<script>{_SCRIPT}</script>
</section>
"""


def _choice(name, what, legend, options):
  """A group of radio buttons, the first one chosen."""
  buttons = "".join(
    f'<label><input type="radio" name="{name}-{what}" value="{value}"'
    f"{'' if i else ' checked'}> {text}</label>"
    for i, (value, text) in enumerate(options)
  )
  return f'<fieldset class="viewer-{what}"><legend>{legend}</legend>{buttons}</fieldset>'


def _pane(name, i, record):
  """Where the script puts the tokens of one trace."""
  label = html.escape(record["label"])
  return (
    f'<div class="viewer-pane"><h3 id="{name}-label-{i}">{label}</h3>'
    f'<p class="viewer-count"></p><div class="viewer-text" role="listbox" '
    f'aria-labelledby="{name}-label-{i}"></div></div>'
  )
