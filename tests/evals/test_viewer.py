"""The viewer's data says what the trace says; in a real browser, hands, keys and ears find it."""

import base64
import contextlib
import html.parser
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest

from diffucoder_jax.diffusion import sampler
from diffucoder_jax.evals import report, viewer

# A vocabulary of whole strings: what a model may write that a page must survive.
WORDS = [
  "<pad>", "<bos>", "<eos>", "<mask>", "def", " f", "(x", "):", "\n  ", "return", " x", "</script>",
  "<!--", "<script>alert(1)</script>", "\x1b[31m\u202e", "&amp;", "é", "\n", "'\"", "    ",
]  # fmt: skip
PAD, BOS, EOS, MASK = range(4)
HALF = len(WORDS)  # the first byte of a character whose rest is the next id


class WordTokenizer:
  special_ids = {word: i for i, word in enumerate(WORDS[:4])}
  mask_id, pad_id, bos_id, eos_id, end_of_turn_id, adds_bos = MASK, PAD, BOS, EOS, -1, True

  def decode(self, ids, skip_special=True):
    kept = [i for i in ids if not (skip_special and i < 4)]
    found = b"".join(
      b"\xc3\xa9"[i - HALF : i - HALF + 1] if i >= HALF else WORDS[i].encode() for i in kept
    )
    return found.decode(errors="replace")


TOKENIZER = WordTokenizer()


def make_trace(made, given=(BOS, 4, 5), step=None, masks=0, padding=1, k=0):
  """One row: padding, what was given, then `made`, written from the right unless `step` says."""
  before = padding + len(given)
  ids = [PAD] * padding + [*given] + [*made] + [MASK] * masks
  tokens = np.array([ids], np.int32)
  steps = np.full_like(tokens, -1)
  steps[0, before : before + len(made)] = np.arange(len(made))[::-1] if step is None else step
  written = steps >= 0
  trace = SimpleNamespace(
    tokens=tokens, step=steps, valid=tokens != PAD, nfe=np.array([steps.max() + 1], np.int32),
    confidence=np.where(written, np.linspace(0.1, 1, len(ids)), 0).astype(np.float32),
    entropy=np.where(written, np.linspace(2, 0, len(ids)), 0).astype(np.float32),
  )  # fmt: skip
  if k:
    others = (tokens[..., None] + np.arange(k)) % len(WORDS)
    trace.alternatives = np.where(np.arange(k) == 2, -1, others).astype(np.int32)
    trace.alternative_probs = np.full(others.shape, 0.125, np.float32)
  return trace


HOSTILE = [11, 12, 13, 14, 15, 16, 8, 9, 10, EOS, EOS]


class Outline(html.parser.HTMLParser):
  """What an HTML parser makes of a page: whether tags nest, and what scripts hold."""

  def __init__(self):
    super().__init__()
    self.open, self.scripts, self.ids = [], [], []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.ids += [attrs["id"]] if "id" in attrs else []
    if tag not in ("input", "meta"):
      self.open.append(tag)
    if tag == "script":
      self.scripts.append((attrs, ""))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "script":
      attrs, text = self.scripts.pop()
      self.scripts.append((attrs, text + data))


def outline(text):
  parser = Outline()
  parser.feed(text)
  parser.close()
  assert not parser.open, f"left open: {parser.open}"
  assert len(set(parser.ids)) == len(parser.ids)
  return parser


def test_the_data_is_the_trace():
  trace = make_trace([6, 7, EOS], masks=2, k=3)
  trace.entropy[0, 5] = np.inf
  found = viewer.record(trace, 0, TOKENIZER, "one")
  assert found["position"] == [2, 3, 4, 5, 6, 7, 8]  # neither padding nor <bos>
  assert found["token"] == [4, 5, 6, 7, EOS, MASK, MASK]
  assert found["step"] == [-1, -1, 2, 1, 0, -2, -2]
  assert found["text"] == ["def", " f", "(x", "):", "■", " ", " "]
  assert found["name"] == ["", "", "", "", "<eos>", "<mask>", "<mask>"]
  assert found["steps"] == 3 and found["nfe"] == 3 and found["label"] == "one"
  assert found["confidence"][:2] == [None, None] and found["confidence"][5:] == [None, None]
  np.testing.assert_allclose(found["confidence"][2:5], trace.confidence[0, 4:7], atol=1e-5)
  assert found["entropy"][3] is None  # JSON has no infinity
  # An id of -1 is no alternative; the one that was written is marked.
  assert found["alternatives"][4] == [["<eos>", 0.125, 1], ["<mask>", 0.125, 0]]
  assert found["alternatives"][0] == []


def test_a_token_that_is_half_a_character_can_be_pointed_at():
  found = viewer.record(make_trace([HALF, HALF + 1]), 0, TOKENIZER, "")
  assert found["text"] == ["def", " f", "…", "é"]
  assert found["name"] == ["", "", "part of a character", ""]


def test_hostile_text_stays_data():
  records = [
    viewer.record(make_trace(HOSTILE, given=[13, 17], k=3), 0, TOKENIZER, "<i>a</i></script>"),
    viewer.record(make_trace([*reversed(HOSTILE)]), 0, TOKENIZER, "b\ud800"),
  ]
  text = viewer.fragment(records)
  parser = outline(text)
  (attrs, data), (_, code) = parser.scripts
  assert attrs["type"] == "application/json" and "<" not in data
  assert json.loads(data)["traces"] == records
  assert code == viewer._SCRIPT and "</" not in code and "<!--" not in code
  shown = "".join(records[0]["text"])
  assert "</script>" in shown and "\x1b" not in shown and "\u202e" not in shown
  assert "<i>a" not in text and "&lt;i&gt;a" in text


def test_the_page_stays_one_file_without_addresses(tmp_path):
  trace = make_trace(HOSTILE)
  path = tmp_path / "index.html"
  report.write_report(path, "t", {}, records=[viewer.record(trace, 0, TOKENIZER, "a")])
  page = path.read_text()
  outline(page)
  # No address, no file: in neither the page nor its script nor its style.
  assert not re.search(r"https?:|\bsrc=|<link|@import|url\(|\bfetch\(|import\(|\bXMLHttp", page)
  assert "One denoising" in page and viewer.STYLE in page
  report.write_report(path, "t", {})
  assert "viewer" not in path.read_text() and "<script" not in path.read_text()


def test_what_cannot_be_shown_is_named(tmp_path):
  trace = make_trace([4])
  with pytest.raises(ValueError, match="has 1 rows, so there is no row 1"):
    viewer.record(trace, 1, TOKENIZER, "")
  with pytest.raises(ValueError, match="one trace or two side by side, not 3"):
    viewer.fragment([{}] * 3)
  trace.alternatives = trace.tokens[..., None]
  with pytest.raises(ValueError, match="without alternative_probs"):
    viewer.record(trace, 0, TOKENIZER, "")
  trace.step[:] = -1
  with pytest.raises(ValueError, match="row 0 of the trace has no token that was denoised"):
    viewer.record(trace, 0, TOKENIZER, "")


def save(path, trace):
  path.parent.mkdir(exist_ok=True)
  sampler.save_trace(path, sampler.Trace(**vars(trace)))
  return path


def test_files_are_named_by_the_ends_of_their_paths(tmp_path):
  a = save(tmp_path / "a" / "0.npz", make_trace([6, 7]))
  b = save(tmp_path / "b" / "0.npz", make_trace([9, 10]))
  records, notes = viewer.read([a, b], 0, TOKENIZER)
  assert [record["label"] for record in records] == ["a/0.npz", "b/0.npz"] and not notes
  assert viewer.read([a, None], 0, TOKENIZER)[0][0]["label"] == "0.npz"
  records, notes = viewer.read([a, tmp_path / "absent.npz"], 0, TOKENIZER)
  assert len(records) == 1 and "absent.npz is not in the viewer: " in notes[0]


# A real browser, spoken to in the W3C's WebDriver protocol.

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
  "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
  "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
  "--window-size=1200,900"
).split()
KEYS = {"Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015", "Home": "\ue011",
        "End": "\ue010", "Tab": "\ue004"}  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference


class Browser:
  """One headless Chromium."""

  def __init__(self, port, profile):
    self.base = f"http://127.0.0.1:{port}/session"
    options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    found = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
    self.base += f"/{found['sessionId']}"

  def ask(self, method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(self.base + path, data, method=method)
    request.add_header("Content-Type", "application/json")
    try:
      with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
      raise RuntimeError(json.load(error)["value"]["message"]) from error

  def open(self, path):
    self.ask("POST", "/url", {"url": path.as_uri()})

  def js(self, code, *values):
    return self.ask("POST", "/execute/sync", {"script": code, "args": list(values)})

  def find(self, selector):
    found = self.ask("POST", "/element", {"using": "css selector", "value": selector})
    return found[ELEMENT]

  def click(self, selector):
    self.ask("POST", f"/element/{self.find(selector)}/click", {})

  def move(self, *moves):
    """Pointer actions: ("down",), ("up",) or (selector, x, y) from the element's middle."""
    actions = []
    for move in moves:
      if len(move) == 1:
        actions.append({"type": f"pointer{move[0].title()}", "button": 0})
      else:
        origin = {ELEMENT: self.find(move[0])}
        actions.append({"type": "pointerMove", "origin": origin, "x": move[1], "y": move[2]})
    pointer = {"type": "pointer", "id": "mouse", "actions": actions}
    self.ask("POST", "/actions", {"actions": [pointer]})

  def press(self, *keys):
    typed = [KEYS.get(key, key) for key in keys]
    actions = [{"type": f"key{way}", "value": key} for key in typed for way in ("Down", "Up")]
    self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

  def devtools(self, command, **params):
    return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

  def emulate(self, width=0, **features):
    """A screen of another width (0: as it was), and what the reader prefers."""
    self.devtools("Emulation.clearDeviceMetricsOverride")
    if width:
      size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
      self.devtools("Emulation.setDeviceMetricsOverride", **size)
    named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    self.devtools("Emulation.setEmulatedMedia", features=named)

  def screenshot(self):
    return base64.b64decode(self.ask("GET", "/screenshot"))

  def complaints(self):
    return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

  # What a reader sees.

  def text(self, selector):
    return self.js("return document.querySelector(arguments[0]).textContent", selector)

  def count(self, selector):
    return self.js("return document.querySelectorAll(arguments[0]).length", selector)

  def value_text(self):
    return self.js("return document.querySelector('.viewer-slider').ariaValueText")

  def set_step(self, step):
    self.js(
      "const s = document.querySelector('.viewer-slider'); s.value = arguments[0];"
      "s.dispatchEvent(new Event('input', {bubbles: true}))",
      step,
    )

  def wait(self, condition):
    end = time.monotonic() + 60
    while not condition():
      assert time.monotonic() < end, "waited in vain"
      time.sleep(0.05)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  if not (CHROMIUM and CHROMEDRIVER):
    pytest.skip("needs a browser: apt-get install chromium chromium-driver")
  profile = tmp_path_factory.mktemp("profile")
  command = [CHROMEDRIVER, "--port=0"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
    try:
      port = None
      for line in driver.stdout:
        if found := re.search(r"started successfully on port (\d+)", line):
          port = int(found[1])
          break
      assert port, "chromedriver did not start"
      found = Browser(port, profile)
      yield found
      with contextlib.suppress(RuntimeError):
        found.ask("DELETE", "")
    finally:
      driver.terminate()


def page(folder, *traces):
  """A report about nothing but these traces."""
  names = ("first", "second")
  records = [
    viewer.record(trace, 0, TOKENIZER, name) for trace, name in zip(traces, names, strict=False)
  ]
  report.write_report(folder / "index.html", "Viewer", {}, records=records)
  return folder / "index.html"


MASKED = ".viewer-token.masked"
PROGRAM = [6, 7, 8, 9, 10, 17, 16, EOS]  # eight tokens, the last one first


@pytest.fixture
def one(browser, tmp_path):
  """The browser at one trace with alternatives, after the last step."""
  browser.open(page(tmp_path, make_trace(PROGRAM, k=3)))
  yield browser
  assert not browser.complaints()


@pytest.mark.slow
def test_slider_follows_hand_and_keys(one):
  assert one.value_text() == "step 8 of 8, 8 of 8 tokens written"
  one.click(".viewer-slider")  # its middle
  assert one.value_text() == "step 4 of 8, 4 of 8 tokens written"
  assert one.count(MASKED) == 4 and one.count(".viewer-token.new") == 1
  one.press("Home")
  assert one.value_text() == "step 0 of 8, 0 of 8 tokens written" and one.count(MASKED) == 8
  one.press("Right", "Right", "Left")
  assert one.text(".viewer-token:not(.masked)") == "■"  # <eos>, which was written first
  one.press("End")
  assert one.count(MASKED) == 0
  width = one.js("return document.querySelector('.viewer-slider').clientWidth")
  one.move(
    (".viewer-slider", width // 2 - 9, 0), ("down",), (".viewer-slider", 0, 0),
    (".viewer-slider", 9 - width // 2, 0), ("up",),
  )  # fmt: skip
  assert one.count(MASKED) == 8 and one.text(".viewer-now") == "0 / 8"


@pytest.mark.slow
def test_play_runs_to_the_end_and_pauses(one):
  one.js("document.querySelector('.viewer-speed select').value = 5")
  one.click(".viewer-play")
  assert one.text(".viewer-play") == "Pause"
  one.wait(lambda: one.count(MASKED) < 8)
  one.press(" ")  # the button has the focus
  assert one.text(".viewer-play") == "Play" and one.count(MASKED) > 0
  assert one.text(".viewer-said") == one.value_text()
  left = one.count(MASKED)
  one.press(",")
  assert one.count(MASKED) == left + 1
  one.press(".")
  one.click(".viewer-slider")
  one.press(" ")  # on the slider too
  one.wait(lambda: one.text(".viewer-play") == "Play")
  assert one.count(MASKED) == 0
  assert one.text(".viewer-said") == "step 8 of 8, 8 of 8 tokens written"


@pytest.mark.slow
def test_playing_says_nothing_until_it_stops(one):
  one.js(
    "window.said = 0; new MutationObserver(l => said += l.length).observe("
    "document.querySelector('.viewer-said'), {childList: true, characterData: true, subtree: true})"
  )
  one.js("document.querySelector('.viewer-speed select').value = 30")
  one.click(".viewer-play")
  one.wait(lambda: one.text(".viewer-play") == "Play")
  assert one.js("return said") == 1


@pytest.mark.slow
def test_pointer_and_focus_show_the_numbers(one):
  one.move((".viewer-token:nth-child(5)", 0, 0))
  details = one.text(".viewer-details")
  assert "Tokenreturn (id 9)" in details and "Commit step5 of 8" in details
  trace = make_trace(PROGRAM)
  assert f"Confidence{trace.confidence[0, 7]:.3f}" in details
  assert f"Entropy{trace.entropy[0, 7]:.3f} nats" in details
  assert one.text(".viewer-details li.chosen") == "return 0.125"
  one.set_step(4)
  assert "masked until step 5" in one.text(".viewer-details")  # it does not tell what comes
  assert "return" not in one.text(".viewer-details")
  one.press(".")  # the page's focus is nowhere: nothing
  one.set_step(8)
  one.js("document.querySelector('.viewer-speed select').focus()")
  one.press("Tab")
  focused = "return document.activeElement.ariaLabel"
  assert one.js(focused) == "“(x”, position 4, step 8"
  one.press("Right", "Right")
  assert one.js(focused) == "newline and 2 spaces, position 6, step 6"
  assert one.text(".viewer-details code") == "↵␣␣"
  one.press("Right", "Up")  # from the second line; above it stands what was given
  assert one.js(focused) == "given: def f"
  one.press("End")
  assert one.js(focused) == "<eos>, position 11, step 1"
  one.press(",")
  assert one.value_text() == "step 7 of 8, 7 of 8 tokens written"
  # One stop for Tab in the whole text.
  assert one.count(".viewer-text [tabindex='0']") == 1
  one.press("Tab")
  assert not one.js("return document.activeElement.closest('.viewer-text')")


@pytest.mark.slow
def test_colours_follow_the_switch(one):
  colours = (
    "return [...document.querySelectorAll('.viewer-token')].map(n => getComputedStyle(n)"
    ".backgroundColor)"
  )
  first, last = "rgb(157, 134, 221)", "rgb(253, 231, 60)"
  found = one.js(colours)
  assert (found[0], found[-1]) == (last, first)  # written from the right
  one.click("input[value=confidence]")
  found = one.js(colours)
  assert found[-1] == last and len(set(found)) == 8
  assert one.text(".viewer-legend").split() == ["0.00", "1.00"]
  one.click("input[value=entropy]")
  assert one.js(colours)[-1] == first
  one.set_step(0)
  assert set(one.js(colours)) == {"rgb(223, 226, 230)"}


@pytest.mark.slow
def test_two_traces_share_a_slider(browser, tmp_path):
  second = make_trace([4, 5, 6, 7], masks=2)
  browser.open(page(tmp_path, make_trace(PROGRAM), second))
  left, right = (f".viewer-pane:nth-child({i}) {MASKED}" for i in (1, 2))
  assert (browser.count(left), browser.count(right)) == (0, 2)
  assert "; 2 left masked" in browser.text(".viewer-pane:nth-child(2) .viewer-count")
  browser.set_step(4)
  assert (browser.count(left), browser.count(right)) == (4, 2)
  assert browser.value_text() == (
    "first: step 4 of 8, 4 of 8 tokens written; second: step 4 of 4, 4 of 4 tokens written"
  )
  browser.click("input[value=share]")
  assert (browser.count(left), browser.count(right)) == (4, 4)
  tops = browser.js("return [...document.querySelectorAll('.viewer-text')].map(n => n.offsetTop)")
  assert tops[0] == tops[1]
  assert not browser.complaints()


@pytest.mark.slow
def test_ears_get_names_values_and_states(one):
  one.set_step(3)
  nodes = one.devtools("Accessibility.getFullAXTree")["nodes"]
  said = {}
  for node in nodes:
    role, name = (node.get(key, {}).get("value", "") for key in ("role", "name"))
    said.setdefault(role, []).append((name, node.get("value", {}).get("value")))
  assert said["slider"][0][0] == "Denoising step"
  names = [name for name, _ in said["option"] if not name.isdigit()]  # but for the speeds
  assert names[0] == "given: def f" and names[1] == "masked, position 4"
  assert names[-1] == "<eos>, position 11, step 1"
  assert "first" in [name for name, _ in said["listbox"]]
  assert ("Play", None) in said["button"]
  assert len(said["radio"]) == 3 and "Colour by" in [name for name, _ in said["group"]]
  assert not any("return" in name for name, _ in said.get("StaticText", []))


@pytest.mark.slow
def test_a_narrow_dark_page_fits_and_screenshots_differ(browser, tmp_path):
  path = page(tmp_path, make_trace([*PROGRAM * 4]), make_trace([*PROGRAM]))
  try:
    browser.emulate(400, prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    browser.open(path)
    wide = "return document.documentElement.scrollWidth"
    assert browser.js(wide) <= 400
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 29)"
    pictures = []
    for step in (0, 16, 32):
      browser.set_step(step)
      pictures.append(browser.screenshot())
      (tmp_path / f"{step}.png").write_bytes(pictures[-1])
    assert len(set(pictures)) == 3 and pictures[0].startswith(b"\x89PNG")
    # With less motion it still plays, in fewer and larger steps.
    browser.js(
      "window.moves = 0; new MutationObserver(() => moves++).observe("
      "document.querySelector('.viewer-now'), {characterData: true, subtree: true})"
    )
    browser.js("document.querySelector('.viewer-speed select').value = 60")
    browser.click(".viewer-play")
    browser.wait(lambda: browser.text(".viewer-play") == "Play")
    assert browser.count(MASKED) == 0 and browser.js("return moves") < 10
  finally:
    browser.emulate()


@pytest.mark.slow
def test_without_scripts_and_on_paper_there_is_no_dead_viewer(browser, tmp_path):
  page(tmp_path, make_trace(PROGRAM))
  frame = tmp_path / "frame.html"
  frame.write_text('<iframe sandbox src="index.html"></iframe>')  # a sandbox runs no scripts
  browser.open(frame)
  browser.ask("POST", "/frame", {"id": {ELEMENT: browser.find("iframe")}})
  seen = {
    name: browser.ask("GET", f"/element/{browser.find(name)}/displayed")
    for name in (".viewer", "h2")
  }
  assert seen == {".viewer": False, "h2": True}
  browser.open(tmp_path / "index.html")
  shown = f"/element/{browser.find('.viewer')}/displayed"
  assert browser.ask("GET", shown)
  browser.devtools("Emulation.setEmulatedMedia", media="print")
  assert not browser.ask("GET", shown)
  browser.devtools("Emulation.setEmulatedMedia", media="")


@pytest.mark.slow
def test_a_step_touches_only_what_it_changes(browser, tmp_path):
  """512 tokens by 512 steps: what a step costs must not grow with the text."""
  rng = np.random.default_rng(0)
  made = rng.choice([4, 5, 6, 7, 9, 10, 16, 17], 512)
  browser.open(page(tmp_path, make_trace(made, step=rng.permutation(512), k=5)))
  counted = browser.js("""
    const text = document.querySelector('.viewer-text');
    const slider = document.querySelector('.viewer-slider');
    const observer = new MutationObserver(() => {});
    observer.observe(text, {attributes: true, childList: true, characterData: true, subtree: true});
    const go = (step) => {
      slider.value = step;
      slider.dispatchEvent(new Event('input', {bubbles: true}));
      const found = observer.takeRecords();
      const attributes = found.every(r => r.type === 'attributes');
      return [new Set(found.map(r => r.target)).size, found.length, attributes];
    };
    const height = text.offsetHeight;
    const out = [];
    for (const step of [0, 1, 2, 3, 2, 300, 301, 511, 512]) out.push(go(step));
    out.push(text.offsetHeight === height);
    return out;
  """)
  *steps, same_height = counted
  # From the finished text to the first canvas all change; then the new one and the one before it.
  assert [touched for touched, _, _ in steps] == [512, 1, 2, 2, 2, 299, 2, 211, 2]
  # A name and a class where a mask comes or goes; a class where a token is new no more.
  assert [changes for _, changes, _ in steps] == [1024, 2, 3, 3, 3, 597, 3, 421, 3]
  assert all(attributes for _, _, attributes in steps) and same_height
  milliseconds = browser.ask("POST", "/execute/async", {"args": [], "script": """
    const done = arguments[0], slider = document.querySelector('.viewer-slider');
    const text = document.querySelector('.viewer-text'), work = [], frames = [];
    let step = 0, before = null;
    function frame(time) {
      if (before !== null) frames.push(time - before);
      before = time;
      const began = performance.now();
      slider.value = step;
      slider.dispatchEvent(new Event('input', {bubbles: true}));
      text.getBoundingClientRect();  // style and layout now
      work.push(performance.now() - began);
      if (++step <= 512) requestAnimationFrame(frame);
      else done([work, frames]);
    }
    requestAnimationFrame(frame);
  """})  # fmt: skip
  work, frames = (np.array(values) for values in milliseconds)
  print(
    f"512 x 512: a step takes {np.median(work):.2f} ms at the median, {work.max():.1f} at most; "
    f"a frame {np.median(frames):.1f} ms, {np.percentile(frames, 95):.1f} at the 95th percentile"
  )
