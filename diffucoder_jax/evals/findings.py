"""What is said of the numbers: the table, plain sentences, and what a reader must know before."""

import math

from diffucoder_jax.evals import decoding

# The table: what a row is called, and how its cells are read from a label's summary.
ROWS = {
  "problems": lambda x: str(x["problems"]),
  "seeds": lambda x: str(x["seeds"]),
  "tokens of an answer": lambda x: _number(x["tokens"]["mean"], "{:.1f}"),
  "answers that end": lambda x: _number(x["ended"]["mean"], "{:.0%}"),
  "local AR-ness@1": lambda x: _cell(x["local@1"]),
  "local AR-ness@4": lambda x: _cell(x["local@4"]),
  "global AR-ness@1": lambda x: _cell(x["global@1"]),
  "the same, over chance (0 to 1)": lambda x: _cell(x["global@1 over chance"]),
  "sd over problems, global@1": lambda x: _cell(x["global@1"]["spread"]),
  "global AR-ness@4": lambda x: _cell(x["global@4"]),
  "distance of repeated orders": lambda x: _cell(x["distance"]),
  "order entropy (bits)": lambda x: _cell(x["order_entropy"]),
  "first end token at (0 to 1)": lambda x: _cell(x["end"]),
  "tail before answer (0.5: not)": lambda x: _cell(x["tail_first"]),
  "entropy sink (0.5: none)": lambda x: _cell(x["sink"]) if "sink" in x else "–",
}


def _number(value, form="{:.3f}"):
  return "–" if math.isnan(value) else form.format(value)


def _cell(found):
  value, low, high = found.get("mean", found.get("value")), found["low"], found["high"]
  return _number(value) if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def table(summaries):
  """Rows of str of {label: summary}: the first holds the labels."""
  rows = [[name, *(read(x) for x in summaries.values())] for name, read in ROWS.items()]
  return [["", *summaries], *rows]


def aligned(rows):
  """A table as lines of text."""
  first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
  return [
    "  ".join([row[0].ljust(first), *(x.rjust(n) for x, n in zip(row[1:], others, strict=True))])
    for row in rows
  ]


def sentences(groups, found, temperatures):
  """Says plainly what changes from the first label to the last; list of str.

  Args:
    groups: list of `Group`. found: from `changes`. temperatures: whether labels are temperatures.
  """
  said = []
  seeds = min(len(group.seeds) for group in groups)
  for one in found:
    if (one["from"], one["to"]) != (groups[0].label, groups[-1].label):
      continue
    what = decoding.COMPARED[one["measure"]]
    parts = [
      f"{one['before']:.3f} → {one['after']:.3f}, {one['difference']:+.3f} "
      f"[{one['low']:+.3f}, {one['high']:+.3f}]"
    ]
    if not math.isnan(one["seed_low"]):
      parts.append(f"over {seeds} seeds alone [{one['seed_low']:+.3f}, {one['seed_high']:+.3f}]")
    if not one["paired"]:
      parts.append("other problems, so not compared one by one")
    as_ = "as temperature rises from {} to {}" if temperatures else "from {} to {}"
    as_ = as_.format(one["from"], one["to"])
    how = {"not told": "does not plainly change"}.get(one["change"], one["change"])
    steps = [x for x in found if x["measure"] == one["measure"] and x is not one]
    along = ""
    if steps:
      along = f" From label to label: {', '.join(format(x['difference'], '+.3f') for x in steps)}."
    said.append(f"{what[0].upper()}{what[1:]} {how} {as_}: {'; '.join(parts)}.{along}")
  return said


def order_sentence(groups, found):
  """What `decoding.order_matrix` says of the first and the last label: a list of one str, or none.

  Args:
    groups: list of `Group`. found: `bootstrap.Interval` of its differences.
  """
  if math.isnan(found.value):
    return []
  sure = (
    "the order itself changes." if found.low > 0 else "no change of the order itself can be told."
  )
  return [
    f"Orders at {groups[0].label} and {groups[-1].label} are {found.value:+.3f} [{found.low:+.3f}, "
    f"{found.high:+.3f}] farther apart than orders within one of them are on average: {sure}"
  ]


def notes_of(groups, summaries, has_confidence):
  """Sentences on what a reader must know before believing the numbers."""
  notes = []
  for group in groups:
    found = summaries[group.label]
    if found["tied"]["mean"] > 0.1:
      notes.append(
        f"{group.label}: {found['tied']['mean']:.0%} of the tokens share their step with others; among "
        "them there is no order, and --ties decides how they are read."
      )
    if found["revised"]["mean"] > 0:
      notes.append(
        f"{group.label}: tokens changed after they were committed ({found['revised']['mean']:.1f} in a "
        "row on average); their last step counts."
      )
    empty = len(group.names) * len(group.seeds) - found["global@1"]["values"]
    if empty:
      notes.append(f"{group.label}: {empty} samples are missing or empty and have no AR-ness.")
    if len(group.names) < 2:
      notes.append(f"{group.label}: one problem alone gives no interval.")
  for group in groups[1:]:
    if not decoding.same_problems(groups[0], group):
      notes.append(
        f"{groups[0].label} and {group.label} were asked different problems, so they are compared as two "
        "samples and not problem by problem."
      )
  if not has_confidence:
    notes.append(
      "These files do not hold the confidence of masked positions: no entropy sink and no confidence "
      "map. Give --checkpoint to ask the network again."
    )
  return notes
