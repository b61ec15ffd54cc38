"""The metrics file of a run that was killed reads like that of one that was not."""

import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.runtime import metrics


def steps(workdir):
  return [row["step"] for row in metrics.read(workdir)]


def test_values_of_all_kinds_are_written_as_numbers(tmp_path):
  with metrics.Writer(tmp_path / "run") as writer:
    values = {"loss": jnp.float32(2.5), "n": 3, "rate": np.float64(0.25), "mfu": None}
    assert writer.write(0, values) == {"loss": 2.5, "n": 3, "rate": 0.25}
    with pytest.raises(ValueError, match="metric rows is"):
      writer.write(1, {"rows": jnp.ones(2)})
  (row,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
  assert row.pop("time") > 1.7e9
  assert row == {"step": 0, "loss": 2.5, "n": 3, "rate": 0.25}


def test_one_transfer_per_row(tmp_path, monkeypatch):
  calls = []
  fetch = jax.device_get
  monkeypatch.setattr(metrics.jax, "device_get", lambda x: calls.append(1) or fetch(x))
  with metrics.Writer(tmp_path) as writer:
    writer.write(0, {"a": jnp.ones(()), "b": jnp.ones(())})
  assert len(calls) == 1


@pytest.mark.parametrize("appends", [True, False])
def test_resuming_drops_what_will_be_written_again(tmp_path, monkeypatch, appends):
  # A bucket cannot be appended to; the local disk plays one.
  monkeypatch.setattr(metrics, "_can_append", lambda workdir: appends)
  with metrics.Writer(tmp_path) as writer:
    for step in range(5):
      writer.write(step, {"loss": float(step)})
  path = tmp_path / "metrics.jsonl"
  assert steps(tmp_path) == [0, 1, 2, 3, 4]
  path.write_text(path.read_text() + '{"step": 5, "lo')
  assert steps(tmp_path) == [0, 1, 2, 3, 4]
  with metrics.Writer(tmp_path, 3) as writer:
    for step in range(3, 6):
      writer.write(step, {"loss": 10.0 + step})
  assert [row["loss"] for row in metrics.read(path)] == [0, 1, 2, 13, 14, 15]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 1}\n{"step": 2')
  with metrics.Writer(tmp_path, 3) as writer:
    writer.write(3, {"loss": 1.0})
  assert steps(tmp_path) == [0, 1, 3]


def test_a_last_line_without_its_newline(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}')
  with metrics.Writer(tmp_path, 1) as writer:
    writer.write(1, {"loss": 1.0})
  assert steps(tmp_path) == [0, 1]


def test_read_names_a_broken_line(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
  with pytest.raises(ValueError, match="line 2 .*nonsense"):
    metrics.read(tmp_path)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_not_finite_stops_the_run_after_its_row(tmp_path, name):
  writer = metrics.Writer(tmp_path)
  writer.write(6, {name: 1.0, "eval/arness": float("nan")})
  with pytest.raises(FloatingPointError, match=f"{name} is nan at step 7"):
    writer.write(7, {name: jnp.float32(jnp.nan)})
  rows = metrics.read(tmp_path)
  assert rows[1]["step"] == 7 and rows[1][name] is None and rows[0]["eval/arness"] is None
  strict = lambda word: pytest.fail(f"{word} is not JSON")  # noqa: E731
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=strict)


def fake_module(monkeypatch, name, **attributes):
  module = types.ModuleType(name)
  module.__spec__ = types.SimpleNamespace(name=name)
  vars(module).update(attributes)
  monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_and_wandb_get_the_same_rows(tmp_path, monkeypatch):
  seen = []

  class Board:
    def __init__(self, folder, purge_step):
      seen.append((folder, purge_step))

    def add_scalar(self, *args):
      seen.append(args)

    def close(self):
      seen.append("closed")

  class Run:
    def log(self, row, step):
      seen.append((row, step))

    def finish(self):
      seen.append("finished")

  options = {}
  fake_module(monkeypatch, "tensorboardX", SummaryWriter=Board)
  fake_module(monkeypatch, "wandb", init=lambda **kw: options.update(kw) or Run())
  with metrics.Writer(tmp_path, 4, {"tensorboard": True, "wandb": True}) as writer:
    writer.write(4, {"loss": 1.5})
  assert seen == [
    (str(tmp_path / "tensorboard"), 4), ("loss", 1.5, 4), ({"loss": 1.5}, 4), "closed", "finished"
  ]
  assert options["resume"] == "allow" and len(options["id"]) == 8


def test_a_missing_library_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  metrics.Writer(tmp_path, 0, {"tensorboard": False, "wandb": False}).close()
  with pytest.raises(ImportError, match="log.wandb=True needs wandb"):
    metrics.Writer(tmp_path, 0, {"wandb": True})


def device(kind):
  return types.SimpleNamespace(device_kind=kind)


def test_mfu():
  assert metrics.mfu(197e12, 2.0, [device("TPU v5 lite")] * 4) == pytest.approx(1 / 8)
  assert metrics.mfu(1e12, 1.0, jax.devices()) is None
  kinds = {
    "TPU v4": 275e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v5e": 197e12,
    "TPU v6 lite": 918e12, "TPU7x": 1153.5e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "cpu": None, "NVIDIA GeForce RTX 3090": None,
  }
  assert {kind: metrics.peak_flops(kind) for kind in kinds} == kinds


class Terminal(io.StringIO):
  def isatty(self):
    return True


def run_progress(stream):
  now = iter([100.0, 104.0, 106.0, 124.0, 125.0]).__next__
  progress = metrics.Progress(10, stream=stream, every_seconds=15, clock=now)
  values = {"loss": 2.0, "tokens_per_second": 12345.0, "mfu": 0.412}
  for step in (1, 2, 3, 9, 10):
    progress.update(step, values)
  return stream.getvalue()


def test_progress_in_a_log_file_is_a_few_plain_lines():
  assert run_progress(io.StringIO()).splitlines() == [
    "step 1/10  loss 2.0000  12.3k tokens/s  MFU 41.2%",
    "step 9/10  loss 2.0000  1 left, ETA 0:00:03  12.3k tokens/s  MFU 41.2%",
    "step 10/10  loss 2.0000  done  12.3k tokens/s  MFU 41.2%",
  ]


def test_progress_on_a_terminal_is_one_line():
  text = run_progress(Terminal())
  assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") == 5
  assert "8 left, ETA 0:00:32" in text
