"""A benchmark's result: rows for people as one table, and the same rows, with every repeat, as JSON."""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffucoder_jax.benchmarking import timing


class Table(NamedTuple):
  """What a benchmark found.

  Attributes:
    title: a line that says what was run.
    rows: dicts of column_name -> value, a list being one number for each repeat; absent or None: does not
      apply.
    notes: lines that say how to read it, and what was left out.
    versions: {library: version} of what was compared with.
    picture: (path of a .png to write) -> None, or None. Needs matplotlib.
  """

  title: str
  rows: list[dict[str, Any]]
  notes: list[str]
  versions: dict[str, str] = {}
  picture: Callable[[Any], None] | None = None


def repeated(repeats):
  """A note on the numbers of all benchmarks."""
  return f"Median (smallest..largest) of {repeats} repeats, taken in turns."


def compared(repeats):
  """A note on those that compare."""
  more = "Compilation is not in the seconds. `x ours`: seconds over ours, turn by turn."
  return f"{repeated(repeats)} {more}"


def number(value):
  """A number in three or four digits."""
  size = abs(value)
  if isinstance(value, int) or size >= 1000:
    return f"{value:,.0f}"
  return f"{value:.0f}" if size >= 100 else f"{value:.3g}"


def cell(value):
  """A value as text: of repeats the median, and in brackets the smallest and the largest."""
  if isinstance(value, list):
    median, least, most = map(number, timing.middle(value))
    return median if len(value) == 1 else f"{median} ({least}..{most})"
  if isinstance(value, bool):
    return "yes" if value else "NO"
  if isinstance(value, float):
    return f"{value:.5g}"  # losses, to compare
  return number(value) if isinstance(value, int) else str(value)


def lines(table, around):
  """The table as lines of text. `around`: `timing.surroundings()`."""
  columns = list(dict.fromkeys(key for row in table.rows for key in row))
  texts = [[key.replace("_", " ") for key in columns]] + [
    [cell(row[key]) if row.get(key) is not None else "" for key in columns] for row in table.rows
  ]
  widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
  wordy = [any(isinstance(row.get(key), str) for row in table.rows) for key in columns]
  out = [table.title, ""]
  for text in texts:
    aligned = [
      part.ljust(width) if left else part.rjust(width)
      for part, width, left in zip(text, widths, wordy, strict=True)
    ]
    out.append("  ".join(aligned).rstrip())
  versions = {**around["versions"], **table.versions}
  named = ", ".join(f"{name} {version}" for name, version in versions.items())
  load = f"load {around['load']:.1f} before it began"
  busy = (
    f"THE MACHINE WAS BUSY ({load}): seconds are too long, and with several threads PyTorch's more so "
    "than ours, because OpenMP's threads wait for each other."
  )
  return [
    *out, "", *table.notes, *([busy] if around["busy"] else []),
    f"{around['machine']}; JAX on {around['devices']}; {named}; {around['date']}, {load}",
  ]  # fmt: skip


def as_json(table, name, arguments, around):
  """The same as JSON values: the rows with every repeat in the order they were measured."""
  versions = {**around["versions"], **table.versions}
  return {
    "bench": name, "arguments": arguments, **around, "versions": versions, "title": table.title,
    "rows": table.rows, "notes": table.notes,
  }  # fmt: skip
