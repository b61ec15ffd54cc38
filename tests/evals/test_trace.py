"""Replay, drawing and terminal playback of a trace, with a tokenizer whose tokens are bytes."""

import io
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest

from diffucoder_jax.evals import terminal
from diffucoder_jax.evals import trace as trace_lib

PAD, BOS, EOS, MASK = range(256, 260)
SVG = "{http://www.w3.org/2000/svg}"


class ByteTokenizer:
  """One token a byte and four special ones."""

  vocab_size = 260
  special_ids = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<mask>": MASK}
  mask_id, pad_id, bos_id, eos_id, end_of_turn_id, adds_bos = MASK, PAD, BOS, EOS, -1, True

  def encode(self, text):
    return list(text.encode())

  def decode(self, ids, skip_special=True):
    spelled = {i: b"" if skip_special else text.encode() for text, i in self.special_ids.items()}
    return b"".join(spelled.get(i, bytes([i % 256])) for i in ids).decode(errors="replace")


TOKENIZER = ByteTokenizer()


def make_trace(prompt="a = ", completion="é<b>\n  x", ends=3, masks=0, padding=2):
  """A left-padded row whose completion was committed two tokens a step from the right."""
  given = [PAD] * padding + [BOS, *TOKENIZER.encode(prompt)]
  made = [*TOKENIZER.encode(completion), *[EOS] * ends]
  tokens = np.array([given + made + [MASK] * masks], np.int32)
  step = np.full_like(tokens, -1)
  step[0, len(given) : len(given) + len(made)] = np.arange(len(made))[::-1] // 2
  return SimpleNamespace(
    tokens=tokens, step=step, confidence=np.full(tokens.shape, 0.25, np.float32),
    entropy=np.full(tokens.shape, 0.5, np.float32), nfe=np.array([6]), valid=tokens != PAD,
  )  # fmt: skip


def test_states_replay_to_the_tokens():
  trace = make_trace()
  first = trace_lib.first_state(trace, 0, MASK)
  states = list(trace_lib.states(trace, 0, MASK))
  np.testing.assert_array_equal(first == MASK, trace.step[0] >= 0)
  assert len(states) == trace.step.max() + 1
  counts = [(state == MASK).sum() for state in (first, *states)]
  assert counts == [12, 10, 8, 6, 4, 2, 0]
  np.testing.assert_array_equal(states[-1], trace.tokens[0])


def test_states_skip_steps_that_committed_nothing():
  trace = make_trace()
  trace.step[trace.step >= 2] += 5
  assert len(list(trace_lib.states(trace, 0, MASK))) == 6
  trace.step[:] = -1
  assert not list(trace_lib.states(trace, 0, MASK))


def test_pieces_join_to_the_text_and_keep_characters_whole():
  ids = [BOS, *TOKENIZER.encode("x é"), MASK, *TOKENIZER.encode("😀"), EOS, 0xFF]
  pieces = trace_lib.pieces(ids, TOKENIZER)
  assert pieces == [None, "x", " ", "", "é", None, "", "", "", "😀", None, "\ufffd"]


def luminance(colour):
  channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_dark_text_is_readable_on_every_step_colour_and_lightness_rises():
  ink = luminance(trace_lib.THEME["token"][0])
  lights = [luminance(trace_lib.step_colour(f)) for f in np.linspace(0, 1, 21)]
  assert min((light + 0.05) / (ink + 0.05) for light in lights) > 4.5  # WCAG AA
  assert np.all(np.diff(lights) > 0)
  assert trace_lib.step_colour(0.0) == "#9d86dd" and trace_lib.step_colour(1.0) == "#fde73c"


def test_svg_parses_and_colours_each_token_by_its_step():
  trace = make_trace(prompt="a=")
  root = ET.fromstring(trace_lib.svg(trace, 0, TOKENIZER))
  rects = {}
  for rect in root.iter(f"{SVG}rect"):
    if (title := rect.find(f"{SVG}title")) is not None:
      rects[title.text] = rect.get("fill")
  # "é" is two bytes: the character stands on its second one. Steps: the last byte pair first.
  assert rects["'é', step 6 of 6, confidence 0.250, entropy 0.500 nats"] == trace_lib.step_colour(1)
  assert rects["'<eos>', step 2 of 6, confidence 0.250, entropy 0.500 nats"] == (
    trace_lib.step_colour(0.2)
  )
  texts = [text.text for text in root.iter(f"{SVG}text")]
  assert {"a", "=", "é", "<", "b", "\u21b5", "x", "3 end tokens"} <= set(texts)
  assert not re.search(r"\b(href|src)=|url\(", trace_lib.svg(trace, 0, TOKENIZER))


def test_svg_shows_columns_grey_until_their_step():
  trace = make_trace(completion="ab", ends=0, padding=0)  # one step: both tokens
  trace.step[0, -2:] = (3, 1)
  shapes, _, _ = trace_lib.draw(trace, 0, TOKENIZER)
  grey = {s.title: s.height for s in shapes if getattr(s, "colour", "") == "masked"}
  height = trace_lib.PLOT_HEIGHT / 5  # four steps and the empty canvas
  assert grey == pytest.approx({"position 5: masked": 4 * height, "position 6: masked": 2 * height})


def test_svg_says_what_stayed_masked_behind_the_end():
  texts = [s.text for s in trace_lib.draw(make_trace(ends=1, masks=7), 0, TOKENIZER)[0]
           if isinstance(s, trace_lib.Text)]  # fmt: skip
  assert "7 left masked" in texts
  shapes, _, _ = trace_lib.draw(make_trace(ends=0, masks=2), 0, TOKENIZER)
  assert sum(getattr(s, "title", "") == "never committed" for s in shapes) == 2


def test_svg_survives_control_characters_and_long_lines():
  trace = make_trace(completion="\x1b[31m\x00" + "y" * 300 + "\t\r\n")
  shapes, width, _ = trace_lib.draw(trace, 0, TOKENIZER, columns=60)
  assert max(s.x + s.width for s in shapes if isinstance(s, trace_lib.Box)) <= width
  ET.fromstring(trace_lib.svg(trace, 0, TOKENIZER, columns=60))


def test_a_row_without_denoising_cannot_be_drawn():
  trace = make_trace()
  trace.step[:] = -1
  with pytest.raises(ValueError, match="row 0 of the trace has no token that was denoised"):
    trace_lib.svg(trace, 0, TOKENIZER)
  with pytest.raises(ValueError, match="has 1 rows, so there is no row 1"):
    trace_lib.svg(trace, 1, TOKENIZER)


def test_ansi_tells_masked_new_old_and_given_apart():
  first = np.array([97, MASK, MASK, MASK])
  previous = np.array([97, 98, MASK, MASK])
  now = np.array([97, 98, 99, MASK])
  [line] = terminal.ansi(now, previous, first, TOKENIZER)
  assert line == "a\x1b[32mb\x1b[0m\x1b[30;42mc\x1b[0m\x1b[2m\u2592\x1b[0m"


def test_ansi_wraps_and_disarms_escape_codes():
  now = np.array(TOKENIZER.encode("\x1b[2J" + "z" * 25))
  lines = terminal.ansi(now, now, now, TOKENIZER, columns=11)
  assert lines == ["\ufffd[2Jzzzzzz", "z" * 10, "z" * 9]


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_terminal_playback_ends_in_the_text(monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")
  monkeypatch.setenv("LINES", "10")
  trace, out = make_trace(ends=1, masks=5), Terminal()
  terminal.render(trace, 0, TOKENIZER, delay=0, out=out)
  frames = out.getvalue().split("\x1b[J")
  # Nothing, the masked canvas, five steps, the finished row.
  assert len(frames) == 8
  assert frames[1].count("\u2592") == 15 and frames[1].startswith("a = ")
  last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frames[-1])
  assert last == "a = é<b>\n  x\n"
  assert out.getvalue().startswith("\x1b[?25l") and out.getvalue().endswith("\x1b[?25h")


def test_a_pipe_gets_plain_text_once():
  out = io.StringIO()
  terminal.render(make_trace(), 0, TOKENIZER, out=out)
  assert out.getvalue() == "a = é<b>\n  x\n"
