"""One denoising played in a terminal, each state over the one before it."""

import shutil
import sys
import time

import numpy as np

from diffucoder_jax.evals import trace as trace_lib

_ANSI = {"given": "", "masked": "\x1b[2m", "committed": "\x1b[32m", "new": "\x1b[30;42m"}


def ansi(tokens, previous, first, tokenizer, columns=88):
  """One state as text with ANSI colours, one string per line, no line wider than `columns`.

  Args:
    tokens, previous, first: int [L], this state, the one before it and the first one, without
      padding.
  Returns:
    A list of str. Masked positions are a dim `\u2592`, tokens committed since `previous` dark on
    green, earlier ones green, given ones plain. End tokens are not drawn.
  """
  styled = []
  for i, text in enumerate(trace_lib.pieces(tokens, tokenizer)):
    if tokens[i] == tokenizer.mask_id:
      styled.append(("\u2592", "masked"))
    elif text is not None:
      new = "new" if previous[i] == tokenizer.mask_id else "committed"
      style = new if first[i] == tokenizer.mask_id else "given"
      styled.append((trace_lib.printable(text), style))
  lines = [""]
  for line, _, text, style in trace_lib.wrapped(styled, columns - 1):
    lines += [""] * (line + 1 - len(lines))
    if text == "\n":
      text = "\u21b5" if style == "new" else ""
    if text:
      lines[line] += f"{_ANSI[style]}{text}\x1b[0m" if _ANSI[style] else text
  return lines


def render(trace, row, tokenizer, delay=0.08, out=None):
  """Plays one row's denoising in the terminal, each state over the one before it.

  Where `out` is not a terminal (a pipe, a log file) only the last state is written, without colours
  or cursor movements.

  Args:
    delay: seconds each state stays. out: a text stream; standard output when None.
  """
  out = sys.stdout if out is None else out
  valid_L = np.asarray(trace.valid[row], bool)
  first_L = trace_lib.first_state(trace, row, tokenizer.mask_id)[valid_L]
  if not out.isatty():
    texts = trace_lib.pieces(np.asarray(trace.tokens[row])[valid_L], tokenizer)
    out.write(trace_lib.printable("".join(text or "" for text in texts)) + "\n")
    return
  size = shutil.get_terminal_size()
  height, previous_L, shown = 0, first_L, None
  out.write("\x1b[?25l")  # hide the cursor
  try:
    for state in (first_L, *(s[valid_L] for s in trace_lib.states(trace, row, tokenizer.mask_id)), None):
      # The last frame is the finished row: nothing new in it, no masks behind its end token.
      now_L = previous_L if state is None else state
      keep_L = (now_L != tokenizer.mask_id) | (state is not None)
      kept = (x[keep_L] for x in (now_L, previous_L, first_L))
      shown = ansi(*kept, tokenizer, size.columns)
      if state is not None:  # while it moves, only what fits on the screen
        shown = shown[-(size.lines - 1) :]
      out.write((f"\x1b[{height}A" if height else "") + "\r\x1b[J" + "\n".join(shown) + "\n")
      out.flush()
      height, previous_L = len(shown), now_L
      time.sleep(delay if state is not None else 0)
  finally:
    out.write("\x1b[?25h")
    out.flush()
