"""The analysis as a program: sampled here or recorded elsewhere, measured, written, and refused."""

import html
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from diffucoder_jax import completion, pretrained
from diffucoder_jax.completion import SamplerConfig
from diffucoder_jax.diffusion import sampler
from diffucoder_jax.evals import dumps, order_charts, replay
from tests import golden, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]
PROMPTS = ("def f1003(x):\n", "def f1044(x):\n  return", "def f1010(x):\n")
NEW = 12  # more than the places near the prefix


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tiny.overfitted(tmp_path_factory.getbasetemp(), None)[0]


@pytest.fixture(scope="module")
def ckpt(workdir):
  return pretrained.from_pretrained(workdir)


@pytest.fixture(scope="module")
def program():
  return tiny.program("analyze")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
  path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
  return path


@pytest.fixture(scope="module")
def sampled(program, workdir, prompts, tmp_path_factory):
  """(folder, results) of two temperatures and two seeds."""
  folder = tmp_path_factory.mktemp("sampled")
  return folder, run(program, arguments(workdir, prompts, folder))


def arguments(workdir, prompts, output, *more):
  return [
    "--checkpoint", workdir, "--prompts", prompts, "--temperatures", "1.5", "0.2", "--seeds", "2",
    "--max_new_tokens", NEW, "--output", output, "--maps", "2", "--map_steps", "4", *more,
  ]  # fmt: skip


def run(program, flags):
  return program.main(program.parse_arguments([str(flag) for flag in flags]))


def from_json(folder):
  refuse = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
  return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


# --- Sampled by the program.


def test_traces_are_those_of_generate(sampled, ckpt):
  config = SamplerConfig(max_new_tokens=NEW, temperature=1.5)
  wanted = completion.generate(ckpt, PROMPTS, config, seed=1)
  for i, one in enumerate(wanted):
    found = sampler.load_trace(sampled[0] / "traces" / "1.5" / "1" / f"{i}.npz")
    np.testing.assert_array_equal(found.tokens, one.trace.tokens)
    np.testing.assert_array_equal(found.step, one.trace.step)


def test_results_say_what_was_measured(sampled):
  folder, results = sampled
  saved = from_json(folder)
  assert list(saved["labels"]) == ["0.2", "1.5"]  # in the order of temperature
  for label in saved["labels"].values():
    assert (label["problems"], label["seeds"]) == (len(PROMPTS), 2)
    assert label["local@1"]["low"] <= label["local@1"]["mean"] <= label["local@1"]["high"]
    assert 0 <= label["sink_canvas"]["mean"] <= 1 and len(label["first_step"]["mean"]) == NEW
  # The drawn orders differ more between seeds than the nearly greedy ones.
  assert saved["labels"]["0.2"]["distance"]["mean"] < saved["labels"]["1.5"]["distance"]["mean"]
  measures = {x["measure"] for x in saved["changes"]}
  assert measures >= {"local@1", "global@1", "distance", "order_entropy"}
  assert any("as temperature rises from 0.2 to 1.5" in text for text in saved["said"])
  page = (folder / "index.html").read_text()
  assert all(text.split(":")[0] in page for text in saved["said"])
  assert "<script" not in page and "http" not in re.sub(r'xmlns="[^"]*"', "", page)
  pictures = {path.stem for path in folder.glob("*.svg")}
  assert pictures >= {
    "arness_local", "arness_global", "arness_by_step", "arness_by_position", "first_step",
    "map_committed", "map_confidence", "diversity", "order_matrix",
  }  # fmt: skip
  for path in folder.glob("*.svg"):
    xml.etree.ElementTree.parse(path)
  # What the report of a workdir shows of it.
  pieces = "".join(order_charts.excerpt(folder, "../analysis/index.html"))
  assert pieces.count("<svg") == 2 and '<a href="../analysis/index.html">' in pieces
  assert all(html.escape(text) in pieces for text in saved["said"])


def test_samples_are_used_again_and_not_mixed(sampled, program, workdir, prompts):
  folder, results = sampled
  before = {p: p.stat().st_mtime_ns for p in (folder / "traces").rglob("*.npz")}
  # As if it had been killed while it sampled: the folder is not whole without its about.json.
  lost = folder / "traces" / "0.2" / "1"
  (lost / dumps.ABOUT).unlink()
  (lost / "2.npz").unlink()
  again = run(program, arguments(workdir, prompts, folder))
  after = {p: p.stat().st_mtime_ns for p in (folder / "traces").rglob("*.npz")}
  assert {p for p in before if before[p] != after[p]} == set(lost.glob("*.npz"))
  assert json.dumps(again) == json.dumps(results)
  with pytest.raises(ValueError, match=r"sampler.steps: 0 -> 4.*another --output"):
    run(program, arguments(workdir, prompts, folder, "--steps", "4"))


def test_confidence_asked_again_is_what_the_sampler_saw(sampled, ckpt):
  """With the strategy "entropy" a trace holds the very same numbers where it committed."""
  folder = sampled[0] / "traces" / "1.5" / "0"
  rows = dumps.read_folder(folder, dumps.Ids()).rows
  config = SamplerConfig(max_new_tokens=NEW, temperature=1.5)
  for i, row in enumerate(rows):
    trace = sampler.load_trace(folder / f"{i}.npz")
    asked = [(row, int(step)) for step in np.unique(row.step[row.step >= 0])]
    found = replay.confidences(ckpt, config, asked, NEW, batch_size=3)
    for (_, step), found_S in zip(asked, found, strict=True):
      now_S = row.step[row.written] == step
      wanted_S = trace.confidence[0][row.written][now_S]
      np.testing.assert_allclose(found_S[now_S], wanted_S, atol=2e-4)
      # Committed before: nothing to ask.
      assert np.isnan(found_S[row.step[row.written] < step]).all()
      assert not np.isnan(found_S[row.step[row.written] >= step]).any()


# --- Recorded before.


def test_the_same_traces_give_the_same_numbers(sampled, program, tmp_path):
  folder, results = sampled
  folders = [folder / "traces" / label / seed for label in ("0.2", "1.5") for seed in "01"]
  flags = ["--traces", *folders, "--labels", "0.2", "0.2", "1.5", "1.5", "--output", tmp_path]
  again = run(program, flags)
  for label in results["labels"]:
    assert again["labels"][label]["local@1"] == results["labels"][label]["local@1"]
  assert "sink" not in again["labels"]["0.2"]
  assert any("Give --checkpoint" in note for note in again["notes"])
  # Counted in another way, and the way is on the page.
  other = run(program, [*flags, "--denominator", "all", "--tail", "keep"])
  assert other["labels"]["0.2"]["local@1"]["mean"] == pytest.approx(
    results["labels"]["0.2"]["variants"]["local"]["keep, set, all"][0]
  )
  assert "denominator “all”, tail “keep”" in (tmp_path / "index.html").read_text()


def test_autoregressive_order_scores_one(program, workdir, prompts, tmp_path):
  flags = arguments(
    workdir, prompts, tmp_path, "--alg", "left_to_right", "--definition", "sequence"
  )
  results = run(program, flags)
  for label in results["labels"].values():
    for k in (1, 2, 3):
      known = label[f"local@{k}"]
      assert known["values"] == 0 or known["mean"] == 1.0
    assert label["global@1"]["mean"] == 1.0
    assert label["distance"]["mean"] == 0.0


def test_histories_of_hugging_face(shared, program, tmp_path):
  """The reference's own canvases: as many tokens a step as it says it wrote."""
  data = golden.tensors(shared / "golden/sampler.safetensors")
  cases = golden.cases(shared / "golden/sampler_cases.json")["cases"]
  case = next(case for case in cases if case["inputs"] == "plain" and case["steps"] > 4)
  history, inputs = data[case["name"] + "/history"], data["plain.input_ids"]
  mask_id = golden.checkpoint(shared / "golden/checkpoint")[0]["mask_token_id"]
  np.savez(
    tmp_path / "0.npz", history=history, mask_id=mask_id, prompt_length=inputs.shape[1],
    confidence=np.random.default_rng(0).normal(size=history.shape),
  )  # fmt: skip
  rows = dumps.read_folder(tmp_path, dumps.Ids(), tail="keep").rows
  for b, row in enumerate(rows):
    counts = np.bincount(row.step[row.step >= 0], minlength=len(history))
    wanted = np.asarray(case["transfers_per_step_row"])[:, b]
    np.testing.assert_array_equal(counts, wanted)
    np.testing.assert_array_equal(row.tokens[: inputs.shape[1]], inputs[b])
    assert row.written.sum() == history.shape[2] - inputs.shape[1]
  results = run(program, ["--traces", tmp_path, "--tail", "keep", "--output", tmp_path / "out"])
  assert results["labels"][tmp_path.name]["sink"]["values"] == len(rows)
  assert (tmp_path / "out" / "map_confidence.svg").exists()


# --- Refusals, from the command line.


def test_refusals_name_the_remedy(program, tmp_path, capsys):
  found = tiny.run("analyze", ["--traces", "nowhere", "--output", str(tmp_path)])
  assert found.returncode == 1 and "analyze: nowhere is not a folder" in found.stderr
  assert "Traceback" not in found.stderr
  for flags, wanted in (
    (["--prompts", "x.jsonl"], "sampled from a --checkpoint; give one"),
    (["--traces", "a", "b", "--labels", "c"], "2 folders need as many --labels"),
    (["--traces", "a", "--temperatures", "1", "1"], "each of --temperatures another one"),
    ([], "one of the arguments --traces --prompts is required"),
  ):
    with pytest.raises(SystemExit):
      program.parse_arguments([*flags, "--output", str(tmp_path)])
    assert wanted in capsys.readouterr().err


def test_another_model_is_refused(sampled, program, ckpt, tmp_path):
  folder = sampled[0] / "traces" / "0.2" / "0"
  row = dumps.read_folder(folder, dumps.Ids()).rows[0]
  strange = row._replace(tokens=np.where(row.written, row.tokens, 10**6))
  with pytest.raises(ValueError, match="problem 0 holds token 1000000.*sampled from"):
    replay.confidence_maps(dumps.together([strange]), ckpt, SamplerConfig(), 1, 2, 1)
