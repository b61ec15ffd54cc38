"""Reads what was recorded of decodings, ours and Hugging Face's, into arrays of one form.

A folder holds .npz files of either kind, a file for each problem; folders that hold the same file
names hold the same problems.

- *Traces* as `generate --traces` writes them (`diffusion.sampler.save_trace`). Which id is the mask and
  which ids end an answer is not in them: it is in the folder's about.json ({"mask_id": int,
  "end_ids": [int]}), which `analyze` writes, or the caller says it.
- *Histories* of Dream's and DiffuCoder's `diffusion_generate(..., return_dict_in_generate=True,
  output_history=True)`, written where transformers is by

    np.savez("0.npz", history=np.stack([x.cpu().numpy() for x in output.history]), mask_id=151666,
             prompt_length=inputs.shape[1])

  `history` is int [steps, B, L], the canvas after each step (the first canvas is not in it). Instead of
  `prompt_length` there may be `canvas`, int [B, L], the first canvas itself, which prompts with masks in
  them need. Optional: `valid`, bool [B, L], False on padding; `confidence`, float [steps, B, L], the
  confidence of every position before each step commits, from a logits hook.
"""

import json
import re
import zipfile
from typing import NamedTuple

import numpy as np
from etils import epath

from diffucoder_jax.diffusion import trace as trace_lib
from diffucoder_jax.diffusion.trace import load_trace
from diffucoder_jax.evals import arness

ABOUT = "about.json"


class Ids(NamedTuple):
  """What tokens mean: the mask, and those that end an answer. -1 and (): nobody said."""

  mask_id: int = -1
  end_ids: tuple = ()


class Row(NamedTuple):
  """One decoding as it was recorded, without padding; arrays are [L].

  Attributes:
    name: the problem's.
    tokens, step: the finished canvas, and the step that committed each token (-1: given, or never).
    written: bool, the positions that were masks at first.
    region: bool, those of them up to and including the first end token.
    confidence: float [steps, L], of every masked position before each step; None when not recorded.
    ended: whether an end token was written.
    revised: tokens that changed after they were committed; their last step counts.
    revoked: int [L, R, 3] as in `sampler.Trace`, what stood there before that; None: nothing, or it is
      not known, which is so of histories.
  """

  name: str
  tokens: np.ndarray
  step: np.ndarray
  written: np.ndarray
  region: np.ndarray
  confidence: np.ndarray | None
  ended: bool
  revised: int
  revoked: np.ndarray | None = None

  def prompt(self):
    """What was given, as bytes: the same for samples of one problem."""
    return np.where(self.written, -1, self.tokens).astype(np.int64).tobytes()


class Decodings(NamedTuple):
  """Rows put together; L counts the positions to be written, shorter rows are filled up.

  Attributes:
    rows: list of `Row`.
    step: int32 [B, L], -1 also where filled up. written, region: bool [B, L].
  """

  rows: list
  step: np.ndarray
  written: np.ndarray
  region: np.ndarray


def read_ids(folder):
  """`Ids` of a folder's about.json, or of nobody."""
  path = epath.Path(folder) / ABOUT
  if not path.exists():
    return Ids()
  try:
    about = json.loads(path.read_text())
    return Ids(int(about["mask_id"]), tuple(int(i) for i in about["end_ids"]))
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} must hold {{"mask_id": int, "end_ids": [int]}} ({error!r}); put it right, or remove it '
      "and give --tokenizer"
    ) from error


def read_folder(folder, ids, tail="trim"):
  """Reads all .npz files of a folder, in the order of their numbers.

  Args:
    folder: path.
    ids: `Ids`; what nobody said is read from about.json.
    tail: "trim": regions end with the first end token; "keep": they are all that was written.
  Returns:
    `Decodings`.
  Raises:
    FileNotFoundError: no folder, or no .npz in it.
    ValueError: a file cannot be used; names it and says what to do.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder} is not a folder; give one of .npz traces or histories")
  paths = sorted(folder.glob("*.npz"), key=lambda path: _natural(path.name))
  if not paths:
    raise FileNotFoundError(
      f"{folder} holds no .npz file; write some with generate --traces {folder}, or give the folders "
      "below it one by one"
    )
  about = read_ids(folder)
  ids = Ids(
    *(given if given not in (-1, ()) else there for given, there in zip(ids, about, strict=True))
  )
  if tail == "trim" and not ids.end_ids:
    raise ValueError(
      f"nobody says which tokens end an answer in {folder}: give --tokenizer (the checkpoint) or "
      "--end_ids, or keep the tail with --tail keep"
    )
  return together([row for path in paths for row in read_file(path, ids, tail)])


def _natural(name):
  return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def read_file(path, ids, tail="trim"):
  """The `Row`s of one file; see `read_folder`."""
  path = epath.Path(path)
  try:
    with path.open("rb") as f, np.load(f, allow_pickle=False) as data:
      names = set(data.files)
      arrays = dict(data) if "history" in names else {}
    if "version" in names:
      arrays = _from_trace(path, load_trace(path), ids.mask_id)
    elif "history" in names:
      arrays = _from_history(path, arrays, ids.mask_id)
    else:
      raise ValueError(
        f"{path} is neither a trace (it has no 'version') nor a history (no 'history'), but holds "
        f"{', '.join(sorted(names)) or 'nothing'}"
      )
  except (zipfile.BadZipFile, EOFError, OSError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not a whole trace or history ({error}); write it again") from error
  tokens_BL, step_BL, written_BL, valid_BL, confidence_SBL, revised_BL, revoked_BLR3 = arrays
  if tail == "keep":
    region_BL = written_BL
  else:
    region_BL = arness.answer_region(tokens_BL, written_BL, ids.end_ids)
  ended_B = np.any(np.isin(tokens_BL, ids.end_ids) & written_BL, axis=1)
  rows, stem = [], path.name.removesuffix(".npz")
  for b, valid in enumerate(valid_BL):
    name = stem if len(valid_BL) == 1 else f"{stem}/{b}"
    cut = (x[b, valid] for x in (tokens_BL, step_BL, written_BL, region_BL))
    confidence = None if confidence_SBL is None else confidence_SBL[:, b, valid]
    revoked = None if revoked_BLR3 is None else revoked_BLR3[b, valid]
    revised = int(revised_BL[b, valid].sum())
    rows.append(Row(name, *cut, confidence, bool(ended_B[b]), revised, revoked))
  return rows


def _from_trace(path, trace, mask_id):
  if mask_id < 0:
    raise ValueError(
      f"{path} does not say which token is the mask, so that places left open cannot be told from given "
      "ones: give --tokenizer (the checkpoint) or --mask_id"
    )
  tokens_BL, step_BL, valid_BL = (np.asarray(x) for x in (trace.tokens, trace.step, trace.valid))
  written_BL = valid_BL & ((step_BL >= 0) | (tokens_BL == mask_id))
  revised_BL = np.zeros(tokens_BL.shape, bool)
  if trace.revoked is not None:
    was_BLR = trace.revoked[..., trace_lib.TOKEN]
    revised_BL = np.any((was_BLR >= 0) & (was_BLR != tokens_BL[..., None]), axis=-1)
  return tokens_BL, step_BL, written_BL, valid_BL, None, revised_BL, trace.revoked


def _from_history(path, arrays, mask_id):
  history_SBL = arrays["history"]
  if history_SBL.ndim != 3 or 0 in history_SBL.shape or history_SBL.dtype.kind not in "iu":
    raise ValueError(
      f"{path}: 'history' must be whole numbers [steps, B, L], got {history_SBL.dtype} "
      f"{list(history_SBL.shape)}; np.stack the list of canvases"
    )
  mask_id = int(arrays.get("mask_id", mask_id))
  if mask_id < 0:
    raise ValueError(f"{path} lacks 'mask_id'; save it with the history, or give --mask_id")
  shape = history_SBL.shape[1:]
  if "canvas" in arrays:
    canvas_BL = arrays["canvas"]
  elif "prompt_length" in arrays:
    canvas_BL = history_SBL[0].copy()
    canvas_BL[:, int(arrays["prompt_length"]) :] = mask_id
  else:
    raise ValueError(
      f"{path} has neither 'prompt_length' nor 'canvas', so that what the first step wrote cannot be "
      "told from the prompt; save one of them with the history"
    )
  valid_BL = np.asarray(arrays.get("valid", np.ones(shape)), bool)
  confidence_SBL = arrays.get("confidence")
  for name, array, wanted in (
    ("canvas", canvas_BL, shape),
    ("valid", valid_BL, shape),
    ("confidence", confidence_SBL, history_SBL.shape),
  ):
    if array is not None and array.shape != wanted:
      raise ValueError(
        f"{path}: {name!r} is {list(array.shape)}; the history asks for {list(wanted)}"
      )
  tokens_BL = history_SBL[-1]
  # A token's step is the first one from which on nothing changes any more.
  settled_BL = np.logical_and.accumulate(history_SBL[::-1] == tokens_BL[None], axis=0).sum(axis=0)
  written_BL = (canvas_BL == mask_id) & valid_BL
  committed_BL = written_BL & (tokens_BL != mask_id)
  step_BL = np.where(committed_BL, len(history_SBL) - settled_BL, -1)
  before_SBL = np.concatenate([canvas_BL[None], history_SBL[:-1]])
  revised_BL = np.any((before_SBL != mask_id) & (before_SBL != tokens_BL[None]), axis=0) & valid_BL
  if confidence_SBL is not None:
    confidence_SBL = np.where(before_SBL == mask_id, confidence_SBL, np.nan)
  return tokens_BL, step_BL, written_BL, valid_BL, confidence_SBL, revised_BL, None


def together(rows):
  """`Decodings` of rows: what was given is left out, so that place 0 is the first one written."""
  width = max(int(row.written.sum()) for row in rows)
  arrays = {name: np.zeros((len(rows), width), bool) for name in ("written", "region")}
  arrays["step"] = np.full((len(rows), width), -1, np.int32)
  for i, row in enumerate(rows):
    for name, array in arrays.items():
      array[i, : row.written.sum()] = getattr(row, name)[row.written]
  return Decodings(rows, **arrays)


def read_pass_at_k(given, labels):
  """pass@k by benchmark and label, from JSON files given as LABEL=FILE.

  Wherever in a file an object holds "pass@1", "pass@10", ..., or "pass@k": {"1": ..., ...}, it is
  taken; a value is a number, [mean, low, high], or {"mean" or "value", "low", "high"}.

  Returns:
    {"pass_at_k" or "pass_at_k_PLACE": {label: {"k", "mean", and "low", "high" if all have them}}}.
  """
  found = {}
  for pair in given:
    label, _, path = pair.partition("=")
    if label not in labels or not path:
      raise ValueError(f"--results {pair!r} is no LABEL=FILE; the labels are {', '.join(labels)}")
    try:
      tree = json.loads(epath.Path(path).read_text())
    except ValueError as error:
      raise ValueError(f"{path} is not JSON ({error}); give evaluate's results.json") from error
    series = dict(_series(tree, ()))
    if not series:
      raise ValueError(
        f'{path} says nothing of pass@k; it needs "pass@1": ... or "pass@k": {{...}}'
      )
    for place, one in series.items():
      name = re.sub(r"[^\w.+-]+", "_", "_".join(("pass_at_k", *place)))
      found.setdefault(name, {})[label] = one
  return found


def _series(tree, place):
  if not isinstance(tree, dict):
    return
  cells = {int(name[5:]): x for name, x in tree.items() if re.fullmatch(r"pass@\d+", name)}
  if isinstance(tree.get("pass@k"), dict):
    cells |= {int(k): x for k, x in tree["pass@k"].items()}
  if cells:
    parts = [_parts(cells[k]) for k in sorted(cells)]
    names = [name for name in ("mean", "low", "high") if all(name in part for part in parts)]
    yield place, {"k": sorted(cells), **{name: [part[name] for part in parts] for name in names}}
  for name, below in tree.items():
    if name != "pass@k":
      yield from _series(below, (*place, name))


def _parts(cell):
  if isinstance(cell, dict):
    return {"mean": cell["mean"] if "mean" in cell else cell["value"],
            **{name: cell[name] for name in ("low", "high") if name in cell}}  # fmt: skip
  return dict(
    zip(("mean", "low", "high"), cell if isinstance(cell, list) else [cell], strict=False)
  )
