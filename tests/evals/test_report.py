"""The page says what the files say, needs nothing but itself, and names what is missing."""

import html
import json
import re
import xml.etree.ElementTree as ET

import jax.numpy as jnp
import pytest

from diffucoder_jax.data.tokenizer import train_sentencepiece
from diffucoder_jax.diffusion import sampler
from diffucoder_jax.evals import report, samples

CODE = "def merge(a, b):\n  return sorted(a + b)\n"


def write_run(workdir, final, error=0.01, steps=100, evals=True):
  workdir.mkdir()
  rows = []
  for step in range(10, steps + 1, 10):
    rows.append({"step": step, "time": 1000.0 + 2 * step, "loss": final * 2 + 10 / step})
    if evals:
      rows.append({
        "step": step, "time": 1000.0 + 2 * step, "eval/bits_per_byte": final + 5 * (steps - step),
        "eval/bits_per_byte_se": error, "eval/unigram_bits_per_byte": 4.567, "eval/seconds": 5.0,
      })  # fmt: skip
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = {"seed": 7, "data": {"global_batch": 4, "seq_len": 32}}
  (workdir / "config.json").write_text(json.dumps(config))
  return workdir


@pytest.fixture
def runs(tmp_path):
  finals = {"ar": (1.5, 100), "adapt": (1.75, 100), "scratch": (2.0, 200)}
  return {
    name: write_run(tmp_path / name, final, steps=steps) for name, (final, steps) in finals.items()
  }


def page_of(tmp_path, runs, **arguments):
  path = tmp_path / "report" / "index.html"
  report.write_report(path, "A <title>", runs, **arguments)
  return path.read_text()


def plain(page):
  """The page's text, without tags."""
  return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_page_holds_the_numbers(tmp_path, runs):
  page = page_of(tmp_path, runs, footer={"config": "tiny"})
  assert "A &lt;title&gt;" in page
  rows = re.findall(r"<tr>(.*?)</tr>", page)
  cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows]
  assert cells[1] == ["autoregressive", "100", "12,800", "1.500 ± 0.010", "4.567", "135"]
  assert cells[2][:3] == ["diffusion adapted from AR", "100 + 100", "12,800 + 12,800"]
  assert cells[3][:3] == ["diffusion from scratch", "200", "25,600"]
  assert "upper bound" in page and "config tiny" in page
  assert page.count("<svg") == 3


def test_page_is_self_contained_and_deterministic(tmp_path, runs):
  page = page_of(tmp_path, runs)
  assert not re.search(r"https?://|\bsrc=|<link|<script|@import|url\((?!#)", page)
  assert not re.search(r'href="(?!#)', page)
  assert page == page_of(tmp_path, runs)


def test_verdict_follows_the_numbers(tmp_path):
  runs = {
    "adapt": write_run(tmp_path / "adapt", 2.0, error=0.05),
    "scratch": write_run(tmp_path / "scratch", 1.94, error=0.05),
    "worse": write_run(tmp_path / "worse", 5.0, error=0.05),
  }
  said = report.verdict(report.load_runs(runs)[0])
  assert said == (
    "Diffusion from scratch (1.940) is lower than diffusion adapted from AR (2.000) by 0.060 bits "
    "per byte, 0.8 standard errors of the difference; their error bars overlap. Diffusion adapted "
    "from AR (2.000) is lower than worse (5.000) by 3.000 bits per byte, 42.4 standard errors of "
    "the difference; their error bars do not overlap. Not below the unigram baseline (4.567): "
    "worse."
  )


def test_samples_are_escaped_and_marked(tmp_path, runs):
  rows = [
    {"kind": "infill", "prompt": "a<b", "completion": "<script>alert(1)</script>\ud800",
     "suffix": "&z", "reference": "<i>r</i>", "nfe": 12},
  ]  # fmt: skip
  page = page_of(tmp_path, runs, samples=rows)
  assert "<script>alert" not in page and "<i>r" not in page
  assert (
    "<span>a&lt;b</span><mark>&lt;script&gt;alert(1)&lt;/script&gt;?</mark><span>&amp;z</span>"
    in page
  )
  assert "<mark>&lt;i&gt;r&lt;/i&gt;</mark>" in page and "12 network evaluations" in page


def test_what_is_missing_is_named(tmp_path, runs):
  (tmp_path / "empty").mkdir()
  runs = {"adapt": runs["adapt"], "empty": tmp_path / "empty"}
  runs["blind"] = write_run(tmp_path / "blind", 1.0, evals=False)
  runs["burst"] = write_run(tmp_path / "burst", float("nan"))
  text = plain(page_of(tmp_path, runs, notes=["No <b> trace."]))
  assert "No <b> trace." in text
  assert "Run “empty” is left out" in text
  assert "Run “blind” has no evaluation rows" in text
  assert "Run “burst” ended at nan bits per byte" in text
  assert "Run “adapt” continues “ar”, which is not here" in text
  nothing = plain(page_of(tmp_path, {"empty": tmp_path / "empty"}))
  assert "Run “empty” is left out" in nothing


def test_bad_sample_lines_are_named(tmp_path):
  path = tmp_path / "samples.jsonl"
  path.write_text('\n{"kind": "complete", "prompt": ""}\n')
  with pytest.raises(ValueError, match="line 2 lacks completion, reference"):
    samples.read_samples(path)


def test_answers_that_end_are_counted(tmp_path, runs):
  tokenizer = train_sentencepiece([CODE * 50], tmp_path / "tokenizer.model", 300)
  row = {"prompt": "add <a>", "completion": CODE, "length": 7, "ended": True, "output": CODE * 2}
  path = tmp_path / "answers.jsonl"
  path.write_text(
    "".join(json.dumps(row | {"ended": i < 3, "length": 7 + i}) + "\n" for i in range(4))
  )
  pieces = samples.answers_of(path, tokenizer)
  page = page_of(tmp_path, runs, sections=pieces, later={"sft": runs["adapt"]})
  wanted = len(tokenizer.encode(CODE * 2))
  text = plain(page)
  assert "3 of 4 answers to held-out problems end by themselves" in text
  assert "at most 8 tokens long and nine in ten at most 9; of the wanted answers " in text
  assert f"wanted answers {wanted} and {wanted}." in text
  assert "Later stages" in text and "instruction-tuned: bits per byte of its own" in text
  assert "add &lt;a&gt;" in page and page.count("<svg") == 5
  path.write_text('{"prompt": "a", "completion": "b"}\n')
  with pytest.raises(ValueError, match="line 1 lacks ended, length, output"):
    samples.answers_of(path, tokenizer)


def test_main_writes_page_and_pictures(tmp_path, runs, capsys):
  tokenizer = train_sentencepiece([CODE * 50], runs["scratch"] / "tokenizer.model", 300)
  ids = [tokenizer.bos_id, *tokenizer.encode(CODE), tokenizer.eos_id]
  tokens_BL = jnp.array([ids])
  step_BL = jnp.where(jnp.arange(len(ids)) > 4, jnp.arange(len(ids)) - 5, -1)[None]
  ones_BL = jnp.ones_like(tokens_BL, jnp.float32)
  trace = sampler.Trace(
    tokens=tokens_BL, step=step_BL, confidence=ones_BL, entropy=ones_BL,
    nfe=jnp.array([9]), valid=ones_BL > 0,
  )  # fmt: skip
  sampler.save_trace(tmp_path / "trace.npz", trace)
  sampler.save_trace(tmp_path / "other.npz", trace)
  report.main([
    "--workdir", str(tmp_path), "--runs", *(f"{name}={path}" for name, path in runs.items()),
    "--samples", str(tmp_path / "absent.jsonl"), "--trace", str(tmp_path / "trace.npz"),
    "--compare_trace", str(tmp_path / "other.npz"),
  ])  # fmt: skip
  folder = tmp_path / "report"
  page = (folder / "index.html").read_text()
  assert f"wrote {folder / 'index.html'}" in capsys.readouterr().out
  assert "absent.jsonl does not exist" in page and 'class="denoising"' in page
  assert "seed of scratch 7" in page and "xmlns" not in page
  assert "Two denoisings" in page and ">trace.npz</h3>" in page and ">other.npz</h3>" in page
  assert page.count('<script type="application/json"') == 1
  ET.parse(folder / "denoising.svg")
  assert (folder / "denoising.png").read_bytes().startswith(b"\x89PNG")


def test_main_names_a_trace_it_cannot_draw(tmp_path, runs):
  (tmp_path / "trace.npz").touch()
  pairs = [f"{name}={path}" for name, path in runs.items()]
  trace = str(tmp_path / "trace.npz")
  report.main(["--workdir", str(tmp_path), "--trace", trace, "--runs", *pairs])
  page = plain((tmp_path / "report" / "index.html").read_text())
  assert f"No drawing of {tmp_path / 'trace.npz'}: " in page and "holds no tokenizer" in page


def test_main_refuses_runs_without_a_folder(tmp_path, capsys):
  with pytest.raises(SystemExit):
    report.main(["--workdir", str(tmp_path), "--runs", "ar"])
  assert "NAME=DIR" in capsys.readouterr().err
