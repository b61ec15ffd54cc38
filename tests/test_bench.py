"""The benchmarks say what they measured: tables, JSON, and whether both sides computed the same."""

import dataclasses
import json
import time
import types

import numpy as np
import pytest
from absl import logging

from diffucoder_jax import bench
from diffucoder_jax.benchmarking import (
  conversion,
  quality,
  rivals,
  sampling,
  scoring,
  steps,
  table,
  timing,
  training,
  twins,
)
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.execution.sandbox import SandboxUnavailable
from diffucoder_jax.hf import export

pytestmark = pytest.mark.usefixtures("quick_compile")
SIZES = {
  "sample": "--preset tiny --batch_sizes 2 --prompt_tokens 5 --new_tokens 6 --matmul_size 32",
  "steps": "--preset tiny --lengths 16 9000000 --batches 1 2 --length 8 --matmul_size 32",
  "train": "--preset tiny --batch_size 4 --seq_len 16 --matmul_size 32",
  "logps": "--preset tiny --batch_size 2 --prompt_tokens 5 --new_tokens 6 --matmul_size 32",
  "sandbox": "--jobs 4 --workers 1",
  "convert": "--megabytes 1",
}
AROUND = {
  "machine": "M", "devices": "D", "date": "today", "load": 0.5, "busy": False, "versions": {"jax": "1"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
  monkeypatch.setattr(timing, "PAUSE", 0.0)


@pytest.fixture
def alone(monkeypatch):
  """As on a machine without PyTorch."""
  monkeypatch.setattr(twins, "absent", lambda: "left out: the PyTorch twin")


def run(name, folder, *more):
  """Runs a small benchmark once; returns (its JSON file's value, its text file's)."""
  arguments = [name, "--repeats", "1", "--output", str(folder), *SIZES[name].split(), *more]
  level = logging.get_absl_logger().level
  returned = bench.main(arguments)
  assert logging.get_absl_logger().level == level  # it leaves everything as it was
  found = json.loads((folder / f"{name}.json").read_text())
  assert found == json.loads(json.dumps(returned))
  assert found["bench"] == name and found["arguments"]["repeats"] == 1
  return found, (folder / f"{name}.txt").read_text()


def by(found, *columns):
  """The rows, by their values in some columns."""
  return {tuple(row[column] for column in columns): row for row in found["rows"]}


# --- Without PyTorch.


def test_a_table_has_medians_and_ranges():
  rows = [
    {"who": "a", "seconds": [3.0, 1.0, 2000.0], "same_bytes": True},
    {"who": "bcd", "count": 7},
  ]
  text = table.lines(table.Table("T", rows, ["note"], {"torch": "2"}), AROUND)
  assert text[0] == "T"
  assert text[2].split() == ["who", "seconds", "same", "bytes", "count"]
  assert text[3].split() == ["a", "3", "(1..2,000)", "yes"]
  assert text[4].split() == ["bcd", "7"]
  assert text[-2] == "note" and "M; JAX on D; jax 1, torch 2; today, load 0.5" in text[-1]
  assert (
    table.cell(False) == "NO" and table.cell([0.5]) == "0.5" and table.cell(12.34567) == "12.346"
  )


def test_repeats_are_taken_in_turns():
  calls = []
  tasks = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
  seconds, results = timing.interleave(tasks, 2)
  assert "".join(calls) == "ababab" and results == {"a": 1, "b": 2}
  assert [len(x) for x in seconds.values()] == [2, 2]
  seconds, _ = timing.interleave({"slow": lambda: time.sleep(0.01), "quick": lambda: None}, 1)
  assert seconds["slow"][0] >= 0.01
  assert timing.ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


def test_sampling_alone(tmp_path, alone):
  found, text = run("sample", tmp_path)
  rows = by(found, "who")
  ours, floor = rows[sampling.OURS,], rows[sampling.FLOOR,]
  assert found["notes"][-1] == "left out: the PyTorch twin" in text
  assert len(rows) == 2 and ours["tokens"] == 12 and 0 < ours["evaluations"] <= 6
  assert ours["tokens_per_second"] == [pytest.approx(12 / ours["seconds"][0])]
  assert floor["x_ours"] == [pytest.approx(floor["seconds"][0] / ours["seconds"][0])]
  # What both columns say of the network's FLOPs: 2 rows of 11 tokens. Of six steps the first writes
  # nothing and is not evaluated, the last writes two: 6, 5, 4, 3 and 2 masks are read.
  flops = [row["seconds"][0] * row["gflop_per_second"][0] * 1e9 for row in (ours, floor)]
  layers = 2 * 2 * (64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128)
  attended = 4 * 2 * 4 * 16 * 11
  assert ours["evaluations"] == 5
  wanted = 2 * (5 * 11 * (layers + attended) + (6 + 5 + 4 + 3 + 2) * 2 * 64 * 512)
  np.testing.assert_allclose(flops, wanted, rtol=1e-6)
  assert found["versions"].keys() == {"python", "jax"}


@pytest.mark.slow
def test_what_is_asked_for_beside_the_exact_sampler(tmp_path, alone):
  more = "--new_tokens 8 --block_size 4 --cache dual --threshold 0.5".split()
  found, text = run("sample", tmp_path, *more)
  rows = by(found, "who")
  ours, asked = rows[sampling.OURS,], rows[sampling.ASKED,]
  assert asked["equal"] <= asked["tokens"] == 16 and ours["equal_asked"] == asked["equal"]
  assert ours["x_asked"] == [pytest.approx(ours["seconds"][0] / asked["seconds"][0])]
  assert "block_size 4, cache dual, threshold 0.5." in text
  # Always refreshed: nothing but blocks, and one block is the exact sampler.
  same = "--block_size 6 --cache prefix --refresh 1".split()
  asked = by(run("sample", tmp_path, *same)[0], "who")[sampling.ASKED,]
  assert asked["equal"] == asked["tokens"] == 12


@pytest.mark.slow
def test_rows_stop_at_their_end(tmp_path, alone):
  """In blocks of one: from left to right, so that a row is done when its end token is written."""
  size = "--new_tokens 8 --block_size 1 --batch_sizes 1".split()
  whole = by(run("sample", tmp_path, *size, "--stop_at_eos", "--end_id", "510")[0], "who")
  assert whole[sampling.ASKED,]["evaluations"] == whole[sampling.ASKED,]["tokens"] == 8  # no end
  written = answers_of(size)[0]
  place = next(i for i, token in enumerate(written) if i and token not in written[:i])
  ended = by(
    run("sample", tmp_path, *size, "--stop_at_eos", "--end_id", str(written[place]))[0], "who"
  )
  assert ended[sampling.ASKED,]["evaluations"] == place + 1
  assert ended[sampling.OURS,]["tokens_asked"] == place + 1
  with pytest.raises(ValueError, match="end token"):
    run("sample", tmp_path, "--stop_at_eos")


def answers_of(more):
  """The tokens that `bench sample` writes as asked."""
  seen, real = [], sampling.our_sampler

  def spy(*args):
    task, seconds = real(*args)
    return lambda: seen.append(task()) or seen[-1], seconds

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, "our_sampler", spy)
    bench.main(["sample", "--repeats", "1", *SIZES["sample"].split(), *more])
  return seen[1].tokens_RN.tolist()


def test_tokens_behind_an_end_do_not_count():
  tokens_RN = np.asarray([[5, 1, 7, 1], [5, 6, 7, 8]])
  found = sampling.upto_end(tokens_RN, 1, True)
  np.testing.assert_array_equal(found, [[1, 1, 0, 0], [1, 1, 1, 1]])
  assert sampling.upto_end(tokens_RN, 1, False).all()


def test_fewer_rows_go_on():
  config = SamplerConfig(max_new_tokens=8, block_size=4, stop_at_eos=True)
  assert sampling.fewer(config, 16) == (8, 4, 2)
  assert sampling.fewer(config, 1) == ()
  assert sampling.fewer(dataclasses.replace(config, stop_at_eos=False), 16) == ()
  assert sampling.fewer(dataclasses.replace(config, cache="dual"), 16) == ()


def test_prompts_of_a_file(tmp_path, monkeypatch):
  (tmp_path / "prompts.jsonl").write_text(
    "".join(json.dumps({"prompt": "ab" * n}) + "\n" for n in (1, 2, 3, 4, 5))
  )
  args = bench.parse_arguments(
    ["sample", "--prompts", str(tmp_path / "prompts.jsonl"), "--first", "4"]
  )
  ckpt = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(adds_bos=False, encode=lambda text: [*text.encode()]),
    mask_id=0, config=types.SimpleNamespace(vocab_size=256, max_seq_len=32, attention="full"),
  )  # fmt: skip
  config = SamplerConfig(max_new_tokens=8)
  batches = sampling.batches_of(args, ckpt, 2, config)
  assert [[len(row) for row in rows] for rows in batches] == [[2, 4], [6, 8]]
  with pytest.raises(ValueError, match="batches of 3"):
    sampling.batches_of(args, ckpt, 3, config)
  with pytest.raises(ValueError, match="line 3 is too long"):
    sampling.batches_of(args, ckpt, 2, SamplerConfig(max_new_tokens=27))
  with pytest.raises(ValueError, match="no tokenizer"):
    sampling.batches_of(args, types.SimpleNamespace(tokenizer=None), 2, config)
  (tmp_path / "prompts.jsonl").write_text('{"infill": "ab<|fill:3|>"}\n' * 4)
  with pytest.raises(ValueError, match="line 1 has holes, which are not timed here"):
    sampling.batches_of(args, ckpt, 2, config)


@pytest.mark.parametrize(
  "flags",
  [
    "sample --batch_sizes 0", "sample --new_tokens -3", "sample --matmul_size 0",
    "sample --repeats 0", "train --seq_len 0", "logps --batch_size 0", "steps --lengths 1",
    "steps --batches 0", "quality --first 0", "sandbox --jobs -3", "convert --megabytes 0",
  ],
)  # fmt: skip
def test_sizes_that_mean_nothing_are_named(flags, capsys):
  with pytest.raises(SystemExit):
    bench.parse_arguments(flags.split())
  name, value = flags.split()[1:]
  assert name in (said := capsys.readouterr().err) and f"{value} is less than" in said


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["sample", "--chat"], "--chat and --first are of --prompts"),
    (["sample", "--preset", "tiny", "--prompt_tokens", "40000"], "is too long: 40000 tokens"),
    (["sample", "--preset", "tiny", "--end_id", "512"], r"outside the vocabulary 0\.\.511"),
    (["train", "--preset", "tiny", "--seq_len", "99999999"], "longer than these weights' context"),
    (["quality", "--ckpt", "W", "--data_path", "P", "--new_tokens", "40"], "blocks of 16"),
  ],
)  # fmt: skip
def test_what_cannot_be_timed_is_named(alone, flags, words):
  with pytest.raises(ValueError, match=words):
    bench.main(flags)


def test_an_output_that_cannot_be_written_is_told_before(tmp_path, monkeypatch):
  monkeypatch.setitem(bench.BENCHES, "sandbox", None)  # nothing is measured
  monkeypatch.setattr(bench, "parse_arguments", lambda _: types.SimpleNamespace(
    bench="sandbox", output=str(tmp_path / "file")))  # fmt: skip
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="--output .*file cannot be written to"):
    bench.main([])


def test_a_picture_needs_matplotlib_and_a_table_does_not(tmp_path, monkeypatch, capsys):
  def absent(path):
    raise ModuleNotFoundError("No module named 'matplotlib'")

  found = table.Table("T", [{"who": "a"}], [], picture=absent)
  monkeypatch.setitem(
    bench.BENCHES, "sandbox", types.SimpleNamespace(
      add_arguments=lambda parser: None, run=lambda args: found, __doc__="",
    ),
  )  # fmt: skip
  bench.main(["sandbox", "--output", str(tmp_path)])
  assert "no picture (No module named 'matplotlib')" in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == ["sandbox.json", "sandbox.txt"]


@pytest.mark.slow
def test_steps(tmp_path):
  pytest.importorskip("matplotlib")
  found, text = run("steps", tmp_path)
  rows = by(found, "batch", "length")
  assert rows.keys() == {(1, 8), (1, 16), (2, 8)} and "left out: 1 x 9000000" in text
  for row in rows.values():
    assert row["x_roofline"] == [pytest.approx(row["step"][0] / row["roofline"][0])]
    assert row["bound"] in ("FLOPs", "bytes") and row["unembed"][0] > 0
  assert (tmp_path / "steps.png").stat().st_size > 1000
  found, text = run("steps", tmp_path, "--budget", "0")
  assert found["rows"] == [] and "left out: 2 x 8, --budget was spent" in text


def test_a_roofline_is_of_what_takes_longer(monkeypatch):
  """FLOPs and bytes by hand: 2 rows of 8 tokens, logits of 8; and parts that take known times."""
  took = dict(
    step=8.0, projections=2.0, attention=1.0, unembed=4.0, choose=1.0, matmul=1.0, copy=1e-6
  )
  monkeypatch.setattr(
    timing, "interleave", lambda tasks, _: ({name: [took[name]] for name in tasks}, {})
  )
  monkeypatch.setattr(steps, "_ready", lambda *_: None)
  from diffucoder_jax.benchmarking import networks

  config = networks.config_of("tiny")
  params = {"layer_0": {"attn": {"o_inputs_last": np.ones((64, 64))}}}
  row = steps.measure(
    types.SimpleNamespace(config=config, params=params, mask_id=511), (2, 8), 1, 100
  )
  layers = 2 * 2 * (64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128)
  flops = 16 * (layers + 4 * 2 * 4 * 16 * 8) + 8 * 2 * 64 * 512
  assert row["roofline"] == [pytest.approx(flops / 2e6)] and row["bound"] == "FLOPs"
  assert row["unembed"] == [0.5] and row["x_unembed"] == [
    pytest.approx(4 / (8 * 2 * 64 * 512 / 2e6))
  ]
  took["copy"] = 1e9
  assert steps.measure(
    types.SimpleNamespace(config=config, params=params, mask_id=511), (2, 8), 1, 100
  )["bound"] == "bytes"  # fmt: skip


def test_ways_are_named():
  assert quality.named({"block_size": 8, "stop_at_eos": True, "cache": "dual"}) == (
    "block_size 8, stop at eos, cache dual"
  )
  for way in quality.WAYS:
    SamplerConfig(**{**vars(SamplerConfig(max_new_tokens=48, steps=48)), **way})


def test_answers_are_judged(tmp_path):
  """Text behind an end token does not count, and a wrong answer does not pass."""
  problem = {
    "task_id": "t/0", "prompt": "Add one.", "entry_point": "f", "tests": ["assert f(1) == 2"],
    "plus_tests": [], "reference": "def f(x):\n    return x + 1\n", "source": "toy",
  }  # fmt: skip
  (tmp_path / "p.jsonl").write_text(json.dumps(problem) + "\n")
  opened = quality.benchmarks.open_benchmark("problems", str(tmp_path / "p.jsonl"))
  primer = opened.benchmark.primer
  tokenizer = types.SimpleNamespace(
    end_of_turn_id=0, special_ids={}, decode=lambda ids: bytes(ids).decode()
  )
  ckpt = types.SimpleNamespace(eos_id=-1, pad_id=-1, mask_id=1, tokenizer=tokenizer)
  begin = "" if "```" in primer else "```python\n"
  write = lambda body: [*(begin + body + "\n```").encode()]  # noqa: E731
  good, bad = write("def f(x):\n    return x + 1"), write("def f(x):\n    return x + 2")
  try:
    solved = quality.judge(
      ckpt, opened, {"a": np.asarray([[*good, 0, 255]]), "b": np.asarray([[*bad, 0, 255]])}
    )
  except SandboxUnavailable as error:
    pytest.skip(f"no isolation on this machine: {error}")
  assert solved["a"].tolist() == [True] and solved["b"].tolist() == [False]


@pytest.mark.slow
def test_training_alone(tmp_path, alone):
  rows = by(run("train", tmp_path)[0], "what", "who")
  assert len(rows) == 6
  losses = [rows[part, training.OURS]["loss"] for part in (training.FORWARD, training.GRADIENT)]
  # Random weights guess: about log(512) = 6.2 and what their certainty costs, over t.
  assert losses[0] == pytest.approx(losses[1], rel=1e-5) and 6 < losses[0] < 100
  assert rows[training.STEP, training.OURS]["loss"] != losses[0]


@pytest.mark.slow
def test_scores_alone(tmp_path, alone):
  found, _ = run("logps", tmp_path)
  rows = by(found, "what", "who")
  assert "3 passes" in found["title"] and len(rows) == 4
  assert rows[scoring.GRADIENT, scoring.OURS]["gradient_norm"] > 0
  assert rows[scoring.SCORES, scoring.OURS]["temporary_mb"] is not None


def test_conversion(tmp_path, monkeypatch):
  monkeypatch.setattr(conversion, "apart", conversion._convert)  # without a process for each
  found, text = run("convert", tmp_path, "--folder", str(tmp_path))
  rows = by(found, "what")
  assert rows[conversion.OUT,]["same_bytes"] is True and text.count("yes") == 1
  assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
  for row in rows.values():
    assert row["gb_per_second"][0] * row["seconds"][0] == pytest.approx(0.041, rel=0.5)


def test_conversion_tells_damage(tmp_path, monkeypatch):
  def damaging(source, target):
    outcome = conversion._convert(source, target)
    if target.name == "back":
      path = target / export.MANIFEST
      manifest = json.loads(path.read_text())
      manifest["tensors"]["model.norm.weight"]["sha256"] = "0"
      path.write_text(json.dumps(manifest))
    return outcome

  monkeypatch.setattr(conversion, "apart", damaging)
  found, text = run("convert", tmp_path)
  assert by(found, "what")[conversion.OUT,]["same_bytes"] is False and " NO" in text


def test_the_sandbox(tmp_path):
  try:
    (row,) = run("sandbox", tmp_path)[0]["rows"]
  except SandboxUnavailable as error:
    pytest.skip(f"no isolation on this machine: {error}")
  assert row["programs"] == 4 and row["level"] in ("full", "no-userns")
  assert row["per_second"][0] * row["seconds"][0] == pytest.approx(4)


def test_refusals(capsys):
  with pytest.raises(FileNotFoundError, match="nothing that can be loaded"):
    bench.main(["sample", "--ckpt", "/nowhere"])
  with pytest.raises(SystemExit):
    bench.main(["sample", "--help"])
  assert "/sample.json" in capsys.readouterr().out


# --- With PyTorch.


@pytest.fixture
def perturbed(monkeypatch):
  """A twin with another head: another token is the best one at many places."""
  real = twins.open_twin

  def open_other(folder):
    import torch

    model = real(folder)
    with torch.no_grad():
      model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    return model

  monkeypatch.setattr(twins, "open_twin", open_other)


@pytest.fixture
def torch_is_there():
  for name in ("torch", "transformers"):
    pytest.importorskip(name)


def with_torch(test):
  """Marks a test that runs PyTorch."""
  for mark in (pytest.mark.torch, pytest.mark.slow, pytest.mark.usefixtures("torch_is_there")):
    test = mark(test)
  return test


@with_torch
def test_the_twin_samples_the_same(tmp_path):
  found, text = run("sample", tmp_path)
  rows = by(found, "who")
  ours, twin = rows[sampling.OURS,], rows[rivals.TWIN,]
  assert twin["equal"] == twin["tokens"] == 12
  assert twin["evaluations"] == ours["evaluations"]
  assert twin["x_ours"] == [pytest.approx(twin["seconds"][0] / ours["seconds"][0])]
  assert found["versions"].keys() == {"python", "jax", "torch", "transformers"}
  assert "left out" not in text


@with_torch
def test_the_twin_samples_the_same_in_blocks(tmp_path):
  """Of prompts of other lengths, and to the end; all its steps are run."""
  more = "--new_tokens 8 --block_size 4 --stop_at_eos --end_id 9".split()
  found, _ = run("sample", tmp_path, *more)
  rows = by(found, "who")
  twin = rows[rivals.BLOCKS,]
  assert twin["equal_asked"] == twin["tokens_asked"] and twin["equal"] < 16
  assert 6 <= twin["evaluations"] <= 8


@with_torch
def test_left_padding_is_the_same_in_pytorch(tmp_path):
  from diffucoder_jax.benchmarking import networks

  networks.write_random(tmp_path, networks.config_of("tiny"), seed=1)
  ckpt = networks.laid_out(networks.open_ours(tmp_path))
  twin = twins.open_twin(tmp_path)
  config = SamplerConfig(steps=6, max_new_tokens=6, temperature=0.0, top_p=1.0)
  batches = [[[3, 4, 5, 6], [7, 8]]]
  ours, _ = sampling.our_sampler(ckpt, batches, 10, config, -1)
  theirs = rivals.answer(twin, rivals.whole, batches, config)
  np.testing.assert_array_equal(ours().tokens_RN, theirs.tokens_RN)
  blocks = dataclasses.replace(config, block_size=3)
  ours, _ = sampling.our_sampler(ckpt, batches, 10, blocks, -1)
  theirs = rivals.answer(twin, rivals.in_blocks, batches, blocks)
  np.testing.assert_array_equal(ours().tokens_RN, theirs.tokens_RN)


@with_torch
def test_fast_dllm_is_left_out_with_a_reason(tmp_path):
  more = "--alg maskgit_plus --block_size 3 --cache dual --threshold 0.5 --fast_dllm".split()
  found, text = run("sample", tmp_path, *more, str(tmp_path))
  assert "left out: Fast-dLLM's code" in text and "lacks" in text and len(found["rows"]) == 5
  with pytest.raises(ValueError, match="--fast_dllm is compared at"):
    run("sample", tmp_path, "--fast_dllm", str(tmp_path))


@with_torch
def test_another_twin_samples_otherwise(tmp_path, perturbed):
  twin = by(run("sample", tmp_path)[0], "who")[rivals.TWIN,]
  assert twin["equal"] < twin["tokens"]


@with_torch
def test_the_twin_trains_the_same(tmp_path):
  rows = by(run("train", tmp_path)[0], "what", "who")
  for part in (training.FORWARD, training.GRADIENT, training.STEP):
    losses = [rows[part, who]["loss"] for who in (training.OURS, training.TWIN)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), part


@with_torch
def test_another_twin_trains_otherwise(tmp_path, perturbed):
  rows = by(run("train", tmp_path)[0], "what", "who")
  losses = [rows[training.FORWARD, who]["loss"] for who in (training.OURS, training.TWIN)]
  assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@with_torch
def test_the_twin_scores_the_same(tmp_path):
  rows = by(run("logps", tmp_path)[0], "what", "who")
  assert rows[scoring.SCORES, scoring.TWIN]["largest_difference"] < 1e-4
  norms = [rows[scoring.GRADIENT, w]["gradient_norm"] for w in (scoring.OURS, scoring.TWIN)]
  assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@with_torch
def test_another_twin_scores_otherwise(tmp_path, perturbed):
  rows = by(run("logps", tmp_path)[0], "what", "who")
  assert rows[scoring.SCORES, scoring.TWIN]["largest_difference"] > 0.1


@with_torch
def test_weights_of_a_folder(tmp_path):
  from diffucoder_jax.benchmarking import networks

  (tmp_path / "weights").mkdir()
  networks.write_random(tmp_path / "weights", networks.config_of("tiny"), "bfloat16", seed=3)
  found, _ = run("sample", tmp_path, "--ckpt", str(tmp_path / "weights"))
  assert str(tmp_path / "weights") in found["title"]
  assert by(found, "who")[rivals.TWIN,]["equal"] == 12


@with_torch
def test_dreams_code(tmp_path):
  """A stand-in for it: our model file under Dream's names, in Dream's three files."""
  code = tmp_path / "code"
  code.mkdir()
  found, text = run("sample", tmp_path, "--dream", str(code))
  assert "left out: Dream's own code" in text and "lacks configuration_dream.py" in text
  assert len(found["rows"]) == 3

  ours = export.model_file().decode().replace("DiffuCoderModel", "DreamModel")
  (code / "configuration_dream.py").write_text(ours.replace("DiffuCoderConfig", "DreamConfig"))
  (code / "modeling_dream.py").write_text("from .configuration_dream import DreamModel\n")
  (code / "generation_utils.py").write_text("")
  found, text = run("sample", tmp_path, "--dream", str(code))
  dream = by(found, "who")[rivals.DREAM,]
  assert dream["equal"] == dream["tokens"] and "left out" not in text


@pytest.mark.slow
def test_conversion_in_processes_of_their_own(tmp_path):
  found, _ = run("convert", tmp_path)
  there = by(found, "what")[conversion.IN,]
  assert 0 < there["before_mb"][0] < there["peak_mb"][0]


def test_the_front_is_what_no_cheaper_way_reaches():
  assert quality.front([(1, 50), (2, 40), (3, 60), (3, 70), (4, 70), (5, 71)]) == [0, 3, 5]
