"""Autoregressive weights in the evaluator: with a cache, the same samples; and AR order of diffusion."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from diffucoder_jax import evaluate, pretrained
from diffucoder_jax.completion import generate
from diffucoder_jax.data.problems import Problem, write_problems
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.diffusion import queue
from diffucoder_jax.diffusion.sampler import SamplerConfig, load_trace
from diffucoder_jax.evals import sampling
from diffucoder_jax.runtime import sharding
from tests.hf import folders

pytestmark = pytest.mark.slow
NEW, NUMBERS = 12, range(4)
DRAWN = SamplerConfig(alg="left_to_right", max_new_tokens=NEW, temperature=1.0, top_p=0.95)


def problem(number):
  stub = f'"""Add {number}{" and again" * number}."""\ndef f(x):'
  code, tests = f"def f(x):\n  return x + {number}\n", (f"assert f(0) == {number}",)
  return Problem(f"own/{number}", f"Add {number}.", "f", tests, (), code, "own", stub=stub)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  path = tmp_path_factory.mktemp("own") / "own.jsonl"
  write_problems([problem(i) for i in NUMBERS], path)
  return str(path)


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory):
  """A function from a kind of network to a folder of random weights with a real tokenizer."""

  def made(kind):
    path = tmp_path_factory.mktemp("model") / kind
    ids = load_tokenizer(home.tokenizer)
    special = {"eos_token_id": ids.eos_id, "mask_token_id": ids.mask_id}
    folders.make(path, kind, np.float32, vocab_size=512, max_position_embeddings=256, **special)
    shutil.copy(home.tokenizer, path / "tokenizer.model")
    return path

  return made


def drawn(ckpt, config=DRAWN, batch_size=3):
  """What is sampled for rows of 1 to 9 tokens."""
  rows = [sampling.Row(i, 1, list(range(40, 41 + 2 * i))) for i in range(5)]
  found = {}
  for batch in sampling.sample(ckpt, rows, config, 7, batch_size):
    found |= dict(batch)
  return [found[i] for i in range(5)]


def assert_same(found, wanted):
  for one, other in zip(found, wanted, strict=True):
    assert (one.text, one.length, one.ended, one.nfe) == (
      other.text, other.length, other.ended, other.nfe,
    )  # fmt: skip
    for name in ("tokens", "step", "valid"):
      np.testing.assert_array_equal(getattr(one.trace, name), getattr(other.trace, name))
    np.testing.assert_allclose(one.trace.entropy, other.trace.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"stop_at_eos": True}])
def test_a_cache_changes_no_sample(folder, monkeypatch, changes):
  """Of the evaluator and of `generate`; on one device and on a mesh."""
  path, config = folder("qwen2"), dataclasses.replace(DRAWN, **changes)
  ckpt = pretrained.from_pretrained(path)
  assert sampling.is_cached(ckpt.config, config, NEW)
  with_cache = drawn(ckpt, config)
  assert len({one.text for one in with_cache}) > 2
  assert_same(drawn(ckpt, config, batch_size=5), with_cache)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  assert_same(drawn(pretrained.from_pretrained(path, mesh), config), with_cache)
  prompts = [list(range(40, 41 + 2 * i)) for i in range(5)]
  done = generate(ckpt, prompts, config, seed=2)

  monkeypatch.setattr(queue.autoregressive, "can_write", lambda *_: False)
  assert_same(drawn(ckpt, config), with_cache)
  for one, other in zip(done, generate(ckpt, prompts, config, seed=2), strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.trace.step, other.trace.step)
    assert one.trace.nfe == other.trace.nfe and one.text == other.text


def test_only_plain_continuations_have_a_cache(folder):
  ckpt = pretrained.from_pretrained(folder("qwen2"))
  diffusion = dataclasses.replace(ckpt.config, attention="full")
  assert sampling.is_cached(ckpt.config, DRAWN, NEW)
  for config, changes, masks in (
    (diffusion, {}, NEW), (ckpt.config, {"alg": "entropy"}, NEW), (ckpt.config, {}, NEW + 1),
    (ckpt.config, {"steps": NEW - 1}, NEW), (ckpt.config, {"max_new_tokens": 0}, 3),
    (ckpt.config, {"alg_temp": 0.1}, NEW), (ckpt.config, {"threshold": 0.9}, NEW),
    (ckpt.config, {"entropy_bound": 0.1}, NEW), (ckpt.config, {"block_size": 4}, NEW),
  ):  # fmt: skip
    assert not sampling.is_cached(config, dataclasses.replace(DRAWN, **changes), masks)


def test_blocks_do_not_depend_on_the_batch(folder):
  """Rows with other numbers of holes, in as many steps: of the evaluator and of `generate`."""
  ckpt = pretrained.from_pretrained(folder("Dream"))
  # Larger weights, so that no two places are equally sure but for rounding.
  ckpt = dataclasses.replace(ckpt, params=jax.tree.map(lambda x: 5 * x, ckpt.params))
  config = SamplerConfig(max_new_tokens=4, steps=6, block_size=3, temperature=0.7, top_p=0.9)
  ids = [[40, *[ckpt.mask_id] * holes, 41, 42] for holes in (0, 5, 2, 8, 5)]
  rows = [sampling.Row(i, 0, row) for i, row in enumerate(ids)]

  def sampled(batch_size):
    found = {}
    for batch in sampling.sample(ckpt, rows, config, 3, batch_size):
      found |= dict(batch)
    return [(one.trace.tokens.tolist(), one.trace.step.tolist()) for _, one in sorted(found.items())]

  assert sampled(5) == sampled(1)
  done = [
    [(one.tokens.tolist(), one.trace.step.tolist()) for one in generate(ckpt, ids, config, 3, size)]
    for size in (1, 5)
  ]
  assert done[0] == done[1]


def run_program(path, own, output, *more):
  evaluate.main(
    evaluate.parse_arguments(
      ["--checkpoint", str(path), "--benchmark", "problems", "--data_path", own, "--output",
       str(output), "--max_new_tokens", str(NEW), "--temperature", "1.0", "--traces", *more]
    )
  )  # fmt: skip
  return json.loads((output / "results.json").read_text()), (output / "table.txt").read_text()


def test_both_kinds_of_network_stand_in_one_comparison(folder, own, tmp_path, capsys):
  """Autoregressive weights, and diffusion weights in AR order: one token a step, left to right."""
  causal, table = run_program(folder("qwen2"), own, tmp_path / "ar")
  assert causal["pins"]["decoding"] == "autoregressive network, left_to_right, with a cache"
  assert causal["pins"]["sampler"]["stop_at_eos"] and causal["costs"]["nfe"] <= NEW
  assert "decoding: autoregressive network, left_to_right, with a cache" in table

  results, table = run_program(folder("Dream"), own, tmp_path / "order", "--alg", "left_to_right")
  assert results["pins"]["decoding"] == "diffusion network, left_to_right"
  assert "decoding: diffusion network, left_to_right" in table and results["costs"]["nfe"] == NEW
  for number in NUMBERS:
    trace = load_trace(tmp_path / "order" / "traces" / f"own_{number}-0.npz")
    assert trace.step[0, -NEW:].tolist() == list(range(NEW)) and (trace.step[0, :-NEW] == -1).all()
    trace = load_trace(tmp_path / "ar" / "traces" / f"own_{number}-0.npz")
    steps = trace.step[0, -NEW:]
    assert steps.tolist() == [i if i < trace.nfe[0] else -1 for i in range(NEW)]

  capsys.readouterr()
  evaluate.main(
    evaluate.parse_arguments(["--compare", str(tmp_path / "ar"), str(tmp_path / "order")])
  )
  assert "diffusion network, left_to_right" in capsys.readouterr().out


def test_a_cache_changes_no_token_of_a_real_model(folder_of, monkeypatch):
  ckpt = pretrained.from_pretrained(folder_of("qwen2.5-coder-0.5b"))
  prompts = ["def is_prime(n):\n", "import os\n\n\ndef list_files(folder):\n  return [", "x = "]
  for temperature in (0.0, 0.8):
    config = SamplerConfig("left_to_right", max_new_tokens=24, temperature=temperature, top_p=0.95)
    done = generate(ckpt, prompts, config, seed=1)
    with monkeypatch.context() as patch:
      patch.setattr(queue.autoregressive, "can_write", lambda *_: False)
      plain = generate(ckpt, prompts, config, seed=1)
    for one, other in zip(done, plain, strict=True):
      np.testing.assert_array_equal(one.tokens, other.tokens)
      np.testing.assert_array_equal(one.trace.step, other.trace.step)
      np.testing.assert_allclose(one.trace.entropy, other.trace.entropy, rtol=0, atol=1e-3)
