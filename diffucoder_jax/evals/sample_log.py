"""The file of an evaluation's samples: appended to while sampling, and read by the official evalplus.

One JSON object a line: "task_id" and "solution" are what EvalPlus reads; "sample" numbers the samples
of a task, "text" is what the model wrote. (task_id, sample) is the key: a kill loses the line that was
being written and no other.
"""

import collections
import json
import os
import pathlib

FIELDS = ("task_id", "sample", "solution", "text", "length", "ended", "nfe", "seconds")


def read_log(path, tasks, samples: int) -> tuple[dict, int]:
  """Reads what an evaluation has sampled so far.

  Args:
    path: the file; it need not be there.
    tasks: the task_ids of the benchmark. samples: how many of each are wanted.
  Returns:
    ({(task_id, sample): row}, bytes of the file up to its last whole line).
  Raises:
    ValueError: names the line that is no sample, or is one of another benchmark, or is there twice.
  """
  path = pathlib.Path(path)
  raw = path.read_bytes() if path.exists() else b""
  whole = raw[: raw.rfind(b"\n") + 1]
  rows = {}
  for number, row in _lines(path, whole):
    name = f"{path} line {number}"
    missing = [field for field in FIELDS if field not in row]
    if missing:
      raise ValueError(
        f"{name} has no {missing[0]!r}; --samples_file reads samples of other programs"
      )
    key = row["task_id"], row["sample"]
    if row["task_id"] not in tasks:
      raise ValueError(f"{name} is of {row['task_id']!r}, which this benchmark does not have")
    if key in rows:
      raise ValueError(f"{name} is sample {key[1]} of {key[0]} once more; remove one of the two")
    if not isinstance(key[1], int) or key[1] < 0:
      raise ValueError(f"{name} has the sample number {key[1]!r}; it must be 0 or more")
    rows[key] = row
  return {key: row for key, row in rows.items() if key[1] < samples}, len(whole)


def read_given(path, problems, samples: int = 0) -> dict:
  """Reads samples that came from elsewhere, in EvalPlus's format.

  Args:
    path: jsonl; each line has "task_id" and "solution", or "completion", which continues the
      problem's text. problems: of the benchmark. samples: of each task; 0 for as many as most have.
  Returns:
    {(task_id, sample): row}, numbered in the order of the file.
  Raises:
    ValueError: names the line that is no sample, and the tasks that have too many or too few.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there")
  stubs = {problem.task_id: problem.stub for problem in problems}
  counts, rows = collections.Counter(), {}
  for number, row in _lines(path, path.read_bytes()):
    name = f"{path} line {number}"
    task_id = row.get("task_id")
    if task_id not in stubs:
      raise ValueError(f"{name} is of {task_id!r}, which this benchmark does not have")
    solution = row.get("solution")
    if "solution" not in row and isinstance(row.get("completion"), str):
      solution = stubs[task_id] + row["completion"]
    if not isinstance(solution, str):
      raise ValueError(f'{name} has neither a text "solution" nor "completion"')
    rows[task_id, counts[task_id]] = {**row, "sample": counts[task_id], "solution": solution}
    counts[task_id] += 1
  if not rows:
    raise ValueError(f"{path} holds no samples")
  check_complete(
    rows, stubs, samples or collections.Counter(counts.values()).most_common(1)[0][0], path
  )
  return rows


def check_complete(rows, tasks, samples: int, where) -> None:
  """Raises a ValueError that names the tasks with more or fewer than `samples` samples."""
  counts = collections.Counter(task_id for task_id, _ in rows)
  wrong = [task_id for task_id in tasks if counts[task_id] != samples]
  if wrong:
    listed = ", ".join(f"{task_id} has {counts[task_id]}" for task_id in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise ValueError(
      f"{where} must have {samples} sample(s) of each of {len(tasks)} tasks: {listed}{more}. Remove what "
      "is duplicated, add what is missing"
    )


class Writer:
  """Appends samples; each batch is on the disk before the next one begins."""

  def __init__(self, path, size: int):
    """Opens the file after its `size` bytes of whole lines, and cuts off what follows."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = path.open("r+b" if path.exists() else "w+b")
    self._file.truncate(size)
    self._file.seek(size)

  def write(self, rows) -> None:
    self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def _lines(path, raw):
  """(number, object) of each line."""
  for number, line in enumerate(raw.split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"{path} line {number} is not JSON: {error}. Remove the line to have it sampled again"
      ) from error
    if not isinstance(row, dict):
      raise ValueError(f"{path} line {number} is a {type(row).__name__}, not an object")
    yield number, row
