"""Charts start where they should and smooth without moving the curve."""

from types import SimpleNamespace

import numpy as np
from matplotlib.axes import Axes

from diffucoder_jax.evals import charts


def a_run(steps, before=None):
  rows = [{"step": step, "eval/bits_per_byte": 9.0 / step} for step in range(10, steps + 1, 10)]
  return SimpleNamespace(
    label="a run", colour="#1a80c4", dash="-", rows=rows, before=before, steps=steps,
    final=(9.0 / steps, None, None),
  )  # fmt: skip


def test_adapted_curve_starts_where_its_parent_ended(monkeypatch):
  drawn, plot = [], Axes.plot

  def noting(self, x, y, *args, **kwargs):
    drawn.append((min(x), max(x)))
    return plot(self, x, y, *args, **kwargs)

  monkeypatch.setattr(Axes, "plot", noting)
  ar = a_run(100)
  runs = [ar, a_run(100, before=ar), a_run(200)]
  assert charts.curve_chart(runs, "eval/bits_per_byte", "bits").startswith("<svg")
  assert drawn == [(10, 100), (110, 200), (10, 200)]
  assert charts.curve_chart(runs, "absent", "nothing") == ""


def test_bars_hold_the_baseline_when_there_is_one():
  assert "unigram baseline" in charts.bar_chart([a_run(100)], 4.567)
  assert "unigram baseline" not in charts.bar_chart([a_run(100)])


def test_smoothing_keeps_length_and_constants():
  np.testing.assert_allclose(charts._smooth(np.full(500, 3.0)), 3.0)
  np.testing.assert_allclose(charts._smooth(np.array([1.0, 5.0])), [1.0, 5.0])
