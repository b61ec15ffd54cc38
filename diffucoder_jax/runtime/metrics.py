"""What a run reports: metrics.jsonl, TensorBoard and W&B on request, a progress line, and MFU."""

import importlib.util
import json
import math
import sys
import time
import zlib

import jax
import numpy as np
from absl import logging
from etils import epath

# A run that has lost these is over; other metrics may be undefined, e.g. a mean over no rows.
MUST_BE_FINITE = ("loss", "grad_norm")

# Peak bfloat16 FLOP/s of one device as JAX counts them (dense, from the vendors' data sheets). A
# name fits when the device kind starts with it or contains it; the first that fits counts.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,  # v5p, which calls itself "TPU v5"
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12 / 2,  # JAX sees the two cores of a chip as two devices
  "H200": 989e12,
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "A100": 312e12,
}


def peak_flops(device_kind):
  """Peak bfloat16 FLOP/s of a device by `jax.Device.device_kind`, or None when not known (CPU)."""
  return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def mfu(flops_per_step, seconds, devices):
  """Model FLOPs utilisation: the share of the hardware's peak that the model's arithmetic used.

  Args:
    flops_per_step: float, FLOPs the model needs for one step of the whole batch (no recomputation).
    seconds: float, wall time of one step.
    devices: the devices (of one kind) that share the step.
  Returns:
    float in [0, 1], or None when the peak is unknown.
  Source: Chowdhery et al. 2022 (PaLM), appendix B.
  """
  peak = peak_flops(devices[0].device_kind)
  return None if peak is None else flops_per_step / (seconds * peak * len(devices))


# --- metrics.jsonl


def _file(path):
  path = epath.Path(path)
  return path / "metrics.jsonl" if path.is_dir() else path


def _rows(path):
  """Yields (line number, line, row); row is None where the line is not a JSON object."""
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    yield number, line, row if isinstance(row, dict) and "step" in row else None


def read(path):
  """Reads metrics.jsonl (or the one in a workdir) as a list of dicts.

  The last line may be torn, as a killed program leaves it; it is then left out.

  Raises:
    ValueError: names the line that is not JSON.
  """
  path = _file(path)
  rows = list(_rows(path))
  if rows and rows[-1][2] is None:
    logging.warning("%s ends in a torn line, which is left out", path)
    rows.pop()
  for number, line, row in rows:
    if row is None:
      raise ValueError(f"{path} line {number} is not a metrics row: {line[:80]!r}; remove it")
  return [row for _, _, row in rows]


def _text(lines):
  return "".join(line + "\n" for line in lines)


def _number(name, value):
  array = np.asarray(value)
  if array.ndim or array.dtype == object:
    raise ValueError(f"metric {name} is {value!r}; it must be one number")
  return array.item()


def _need(module, key):
  if importlib.util.find_spec(module) is None:
    raise ImportError(f"{key}=True needs {module}: pip install {module}, or set it to False")
  return importlib.import_module(module)


def _can_append(workdir):
  """Objects in a bucket cannot be appended to: there the whole file is written, now and then."""
  return "://" not in str(workdir)


class Writer:
  """Writes metrics: always to <workdir>/metrics.jsonl, on request to TensorBoard and W&B.

  Only process 0 writes; all processes may (and should) call `write`, so that all of them stop at a
  loss that is not finite. After a restart the file reads like that of a run that never stopped.
  """

  def __init__(self, workdir, start_step=0, log_config=None):
    """Opens the files, dropping what an earlier run wrote at `start_step` or later.

    Args:
      workdir: path, also gs://.
      start_step: int, the step this run continues from: it will write that step (again).
      log_config: may have the bools `tensorboard` and `wandb`.
    Raises:
      ImportError: a wanted library is not installed.
    """
    log_config = log_config or {}
    self._sinks = []
    self._path = epath.Path(workdir) / "metrics.jsonl"
    self._appends = _can_append(workdir)
    self._kept, self._file, self._written = [], None, time.monotonic()
    if jax.process_index() != 0:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._cut(start_step)
    if self._appends:
      self._file = self._path.open("a")
    if log_config.get("tensorboard", False):
      board = _need("tensorboardX", "log.tensorboard").SummaryWriter(
        str(self._path.parent / "tensorboard"), purge_step=start_step
      )
      self._sinks.append((lambda step, row: _to_board(board, step, row), board.close))
    if log_config.get("wandb", False):
      # The id comes from the workdir, so that a run started again goes on in the same plot.
      name = str(workdir)
      run = _need("wandb", "log.wandb").init(
        id=f"{zlib.crc32(name.encode()):08x}", name=name, resume="allow"
      )
      self._sinks.append((lambda step, row: run.log(row, step=step), run.finish))

  def _cut(self, start_step):
    if not self._path.exists():
      return
    rows = list(_rows(self._path))
    keep = [line for _, line, row in rows if row is not None and row["step"] < start_step]
    torn = sum(row is None for _, _, row in rows)
    if torn:
      logging.warning("%s: %d torn line(s) dropped", self._path, torn)
    if not self._appends:
      self._kept = keep
    if len(keep) < len(rows):
      counts = len(keep), len(rows), start_step
      logging.info("%s: %d of %d rows kept (before step %d)", self._path, *counts)
    # Also when the last line only lacks its end, or the next row would be glued to it.
    if self._path.read_text() != _text(keep):
      self._rewrite(keep)

  def _rewrite(self, lines):
    part = self._path.parent / (self._path.name + ".part")
    part.write_text(_text(lines))
    part.replace(self._path)
    self._written = time.monotonic()

  def write(self, step, metrics):
    """Writes one row.

    Args:
      step: int.
      metrics: dict name -> number or 0-d array; None values are left out. Fetched in one go, which
        waits for the step that makes them: hand in the metrics of the step before.
    Returns:
      dict name -> Python number.
    Raises:
      FloatingPointError: loss or grad_norm is not finite; raised after the row is written.
    """
    values = jax.device_get({name: x for name, x in metrics.items() if x is not None})
    row = {name: _number(name, value) for name, value in values.items()}
    finite = {name: x if math.isfinite(x) else None for name, x in row.items()}
    if jax.process_index() == 0:
      # NaN is not JSON; null is.
      self._line(json.dumps({"step": int(step), "time": time.time(), **finite}))
      for send, _ in self._sinks:
        send(int(step), row)
    for name in MUST_BE_FINITE:
      if name in row and finite[name] is None:
        self.close()
        raise FloatingPointError(
          f"{name} is {row[name]} at step {int(step)}; start again from the last checkpoint with a "
          "lower learning rate, or look at the data of that step"
        )
    return row

  def _line(self, line):
    if self._appends:
      self._file.write(line + "\n")
      self._file.flush()
      return
    self._kept.append(line)
    if time.monotonic() - self._written > 60:
      self._rewrite(self._kept)

  def flush(self):
    """Puts every row on file, also where the file is only written now and then."""
    if self._kept:
      self._rewrite(self._kept)

  def close(self):
    """Writes what is still to be written and closes everything."""
    if self._file is not None:
      self._file.close()
    self.flush()
    for _, close in self._sinks:
      close()
    self._sinks = []

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def _to_board(board, step, row):
  for name, value in row.items():
    board.add_scalar(name, value, step)


# --- The progress line


def _short(number):
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"


class Progress:
  """One line on stderr: step, loss, time left, tokens/s, MFU. Redrawn in place on a terminal.

  Elsewhere (a log file) it is a plain line at most every `every_seconds`, and one at the end.
  """

  def __init__(self, total, start=0, stream=None, every_seconds=15.0, clock=time.monotonic):
    """Args: total, start: ints, last and first step; stream: file, stderr by default."""
    self._total, self._start = total, start
    self._stream = sys.stderr if stream is None else stream
    self._terminal = self._stream.isatty()
    self._every, self._clock = every_seconds, clock
    self._first = None  # (step, time) after the first step, whose compilation is not typical
    self._shown = -math.inf

  def update(self, step, metrics):
    """Shows finished step `step`; of `metrics` (numbers) it uses loss, tokens_per_second, mfu."""
    if jax.process_index() != 0:
      return
    now = self._clock()
    if self._first is None:
      self._first = (step, now)
    done = step >= self._total
    if not done and now - self._shown < (0.1 if self._terminal else self._every):
      return
    self._shown = now
    parts = [f"step {step}/{self._total}"]
    if metrics.get("loss") is not None:
      parts.append(f"loss {metrics['loss']:.4f}")
    if done:
      parts.append("done")
    elif step > self._first[0]:
      left = (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
      parts.append(f"{self._total - step} left, ETA {_clock(left)}")
    if metrics.get("tokens_per_second") is not None:
      parts.append(f"{_short(metrics['tokens_per_second'])} tokens/s")
    if metrics.get("mfu") is not None:
      parts.append(f"MFU {metrics['mfu']:.1%}")
    line = "  ".join(parts)
    end = "\n" if done or not self._terminal else ""
    self._stream.write(f"\r{line}\x1b[K{end}" if self._terminal else line + end)
    self._stream.flush()
