"""Cells' results become points with their intervals, and results that do not compare are refused."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from diffucoder_jax.evals import frontier, scores
from diffucoder_jax.evals.verdicts import Verdict
from diffucoder_jax.runtime import cells

PINS = {
  "benchmark": "own", "data": {"own.jsonl": "0" * 64}, "published_data": "own file", "tasks": "all",
  "asked": "chat", "post_processing": "fenced_program", "source": "sampled", "samples": 1,
  "limits": {"cpu_seconds": 1.0}, "sandbox": "full", "packages": [], "python": "3.11",
  "commit": "abc", "checkpoint": {"path": "W", "fingerprint": "00ff"}, "seed": 0,
  "prompt": {"system": "", "primer": ""},
}  # fmt: skip


def write_cell(folder, changes, nfe, solved, **pins):
  """A cell's row, and the results.json of 20 problems of which the first `solved` are solved."""
  sampler = {"alg": "entropy", "temperature": 0.0, "steps": 0, "threshold": 0.0, **changes}
  verdicts = [
    Verdict(f"own/{i}", 0, "pass", "pass" if i < solved else "fail", "", "isolated")
    for i in range(20)
  ]
  costs = {"nfe": nfe, "tokens_per_second": 10.0, "length": 9.0, "ended": 1.0, "seconds": 0.9}
  said = {"sampler": sampler, "decoding": f"diffusion network, {sampler['alg']}"}
  results = scores.summarise({**PINS, **said, **pins}, verdicts, costs)
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(json.dumps(results))
  return {"cell": folder.name, "state": "finished", "detail": "", "changes": changes,
          "metrics": frontier.metrics_of(folder), "folder": str(folder)}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
  """Two lines of two cells each, and a cell that is not finished."""
  made = []
  for alg, solved in (("entropy", (10, 16)), ("origin", (4, 16))):
    for steps, count in zip((6, 48), solved, strict=True):
      nfe = steps - 0.5 * (alg == "entropy")
      changes = {"alg": alg, "temperature": 0.5, "steps": steps}
      made.append(write_cell(tmp_path / f"{alg}{steps}", changes, nfe, count))
  waiting = {"cell": "w", "state": "waiting", "detail": "", "metrics": {}, "folder": str(tmp_path)}
  return [*made, {**waiting, "changes": {"alg": "origin", "temperature": 0.5, "steps": 12}}]


def test_points_have_what_the_results_say(rows):
  points = frontier.read(rows)
  assert [(p.line, p.setting, p.nfe, p.value) for p in points] == [
    ("entropy, temperature 0.5", 6, 5.5, 0.5), ("entropy, temperature 0.5", 48, 47.5, 0.8),
    ("origin, temperature 0.5", 6, 6.0, 0.2), ("origin, temperature 0.5", 48, 48.0, 0.8),
  ]  # fmt: skip
  wanted = scores.read_results(rows[0]["folder"])["scores"]["plus"]["pass@1"]
  assert (points[0].low, points[0].high) == (wanted["low"], wanted["high"])
  assert 0.25 < points[0].low < 0.5 < points[0].high < 0.75  # Wilson's, of 10 in 20
  assert [p.cell for p in frontier.pareto(points)] == ["entropy6", "entropy48"]
  assert {p.line for p in frontier.read(rows, along="alg")} == {
    "temperature 0.5, steps 6", "temperature 0.5, steps 48",
  }  # fmt: skip


def test_any_field_of_the_sampler_runs_along(tmp_path):
  rows = [
    write_cell(tmp_path / str(x), {"alg": "entropy", "threshold": x}, 48 * x, 10)
    for x in (1.0, 0.5)
  ]
  points = frontier.read(rows, along="threshold")
  assert [(p.line, p.setting, p.nfe) for p in points] == [
    ("entropy", 0.5, 24.0), ("entropy", 1.0, 48.0),
  ]  # fmt: skip


def test_the_cheapest_that_cannot_be_told_from_the_best(rows, tmp_path):
  said = frontier.said(frontier.read(rows))
  # The cheaper one on the front loses 6 of 20 problems: told apart, so that only the best remains.
  assert len(said) == 1 and "entropy, temperature 0.5 at 48 solves 80.0 % [" in said[0]
  near = write_cell(tmp_path / "n", {"alg": "entropy", "temperature": 0.5, "steps": 24}, 24, 15)
  said = frontier.said(frontier.read([*rows, near]))
  assert "temperature 0.5 at 24 with 24.0 evaluations, -5.0 points [" in said[1]


@pytest.mark.parametrize(
  ("pins", "message"),
  [
    ({"data": {"own.jsonl": "1" * 64}}, "differ in data"),
    ({"checkpoint": {"path": "W", "fingerprint": "ff00"}}, "differ in checkpoint"),
    ({"limits": {"cpu_seconds": 9.0}}, "entropy6 and other differ in limits"),
  ],
)
def test_cells_that_were_asked_otherwise_are_refused(rows, tmp_path, pins, message):
  changes = {"alg": "origin", "temperature": 0.5, "steps": 24}
  rows.append(write_cell(tmp_path / "other", changes, 24, 9, **pins))
  with pytest.raises(ValueError, match=message):
    frontier.read(rows)


def test_what_is_swept_may_differ(rows, tmp_path):
  moved = {"path": "elsewhere", "fingerprint": "00ff"}
  changes = {"alg": "origin", "temperature": 0.5, "steps": 24}
  rows.append(write_cell(tmp_path / "a", changes, 24, 9, checkpoint=moved, commit="def"))
  changes = {"alg": "origin", "temperature": 0.5, "steps": 24, "seed": 1}
  rows.append(write_cell(tmp_path / "b", changes, 24, 9, seed=1))
  assert "origin, temperature 0.5, seed 1" in {p.line for p in frontier.read(rows)}


def test_the_page_stands_alone(rows, tmp_path):
  points = frontier.read(rows)
  table = cells.table(rows)
  frontier.write(tmp_path, "A <sweep>", points, table, notes=["One <b> is old."])
  page = (tmp_path / "index.html").read_text()
  assert "A &lt;sweep&gt;" in page and "One &lt;b&gt; is old." in page
  assert not re.search(r"https?://|\bsrc=|<link|<script|@import|url\((?!#)", page)
  wanted = frontier.metrics_of(rows[0]["folder"])
  low, high = (100 * wanted[f"plus/pass@1_{end}"] for end in ("low", "high"))
  assert f"<td>50.0 ({low:.1f} to {high:.1f}) %</td>" in page
  assert page.count("<td>waiting</td>") == 1
  svg = ET.parse(tmp_path / "frontier.svg").getroot()
  texts = {element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")}
  assert {"entropy, temperature 0.5", "origin, temperature 0.5", "Pareto front", "5.5"} <= texts
  assert page.count("<svg") == 1 and "xmlns" not in page
  without_bars = [point._replace(low=point.value, high=point.value) for point in points]
  assert frontier.chart(without_bars) != frontier.chart(points) == frontier.chart(points)


def test_a_page_can_be_taken_away(rows, tmp_path):
  frontier.write(tmp_path, "T", frontier.read(rows), [["cell"], ["entropy6"]])
  assert (tmp_path / "index.html").exists() and (tmp_path / "frontier.svg").exists()
  (tmp_path / "table.md").write_text("")
  frontier.remove(tmp_path)
  frontier.remove(tmp_path)  # none is there any more
  assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["table.md"]
