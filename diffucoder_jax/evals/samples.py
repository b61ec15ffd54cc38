"""What a model wrote, for the page: samples beside the original, and whether answers end in time."""

import html
import json

import numpy as np
from etils import epath

from diffucoder_jax.evals import charts

KINDS = {"complete": "completion", "infill": "infilling", "answer": "answer"}
SHOWN = 3  # answers


def read_samples(path, keys=("kind", "prompt", "completion", "reference")):
  """Reads sample rows from a jsonl file.

  Each holds "kind" ("complete" or "infill"), "prompt", "completion", "reference" (the original
  text where the completion stands), for infill "suffix", and "nfe" (int).

  Args:
    path: the file.
    keys: what each row must have.
  Raises:
    ValueError: a line is no JSON object with these keys.
  """
  rows = []
  for number, line in enumerate(epath.Path(path).read_text().split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      missing = set(keys) - set(row)
    except (json.JSONDecodeError, TypeError) as e:
      raise ValueError(f"{path} line {number} is not a JSON object: {line[:80]!r}") from e
    if missing:
      raise ValueError(f"{path} line {number} lacks {', '.join(sorted(missing))}")
    rows.append(row)
  return rows


def beside(number, row):
  """HTML of one sample beside the original, what stands in for the mask marked in both."""
  before, after = html.escape(row["prompt"]), html.escape(row.get("suffix") or "")
  panes = []
  for name, text in (("model", row["completion"]), ("original", row["reference"])):
    code = f"<span>{before}</span><mark>{html.escape(text)}</mark><span>{after}</span>"
    panes.append(f'<div><div class="what">{name}</div><pre>{code}</pre></div>')
  nfe = "" if row.get("nfe") is None else f", {row['nfe']} network evaluations"
  head = f"<h3>{number}. {html.escape(KINDS.get(row['kind'], str(row['kind'])) + nfe)}</h3>"
  return f'{head}<div class="pair">{"".join(panes)}</div>'


def answers_of(path, tokenizer):
  """Pieces of HTML on a tuned model's answers: how many end, how long they are, and the first few.

  Args:
    path: jsonl of `generate --chat --output`, of prompts that have the wanted answer in "output".
    tokenizer: a `Tokenizer`, to count the tokens of the wanted answers.
  Raises:
    ValueError: a line lacks a field.
  """
  rows = read_samples(path, ("prompt", "completion", "length", "ended", "output"))
  wanted = [len(tokenizer.encode(row["output"])) for row in rows]
  written = [row["length"] for row in rows]
  ended = sum(row["ended"] for row in rows)
  p50, p90 = np.percentile(written, (50, 90), method="lower")
  w50, w90 = np.percentile(wanted, (50, 90), method="lower")
  chart = charts.histogram_chart(
    {"model": written, "wanted": wanted}, "tokens before the end token", "answers"
  )
  shown = [
    beside(i, {**row, "kind": "answer", "prompt": row["prompt"] + "\n\n", "reference": row["output"]})
    for i, row in enumerate(rows[:SHOWN], 1)
  ]
  return [
    "<h2>Answers of the tuned model</h2>",
    f"<p>{ended} of {len(rows)} answers to held-out problems end by themselves. Half of them are at "
    f"most {p50} tokens long and nine in ten at most {p90}; of the wanted answers {w50} and {w90}.</p>",
    f"<figure>{chart}<figcaption>Lengths of the answers, and of those that were wanted.</figcaption>"
    "</figure>",
    *shown,
  ]
