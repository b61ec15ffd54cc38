"""The queue: the plain sampler's tokens whatever goes together, and no program compiled twice."""

import dataclasses
import functools
import itertools
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax import pretrained
from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.diffusion import process, queue, sampler
from diffucoder_jax.model import windows
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, canvas_logits_fn, init_params
from diffucoder_jax.runtime import sharding

MASK, EOS = 30, 1
CONFIG = ModelConfig(
  vocab_size=32, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  rope_theta=1e4, init_std=0.5, remat="none", max_seq_len=256,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_compile")
GREEDY = sampler.SamplerConfig(max_new_tokens=6, temperature=0.0, top_p=1.0)
DRAWN = dataclasses.replace(GREEDY, temperature=0.9, top_p=0.9, alg="maskgit_plus")


@pytest.fixture(scope="module")
def params():
  return nn.unbox(init_params(Transformer(CONFIG), jax.random.key(0)))


def prompts(number, seed=0, longest=40, holes=3):
  """Rows of any length, some with holes."""
  rng = np.random.default_rng(seed)
  rows = []
  for _ in range(number):
    row = rng.integers(2, MASK, rng.integers(2, longest)).tolist()
    for place in rng.integers(0, len(row), rng.integers(0, holes + 1)):
      row[place] = MASK
    rows.append([2, *row])
  return rows


def write(params, rows, config, keys=None, model_config=CONFIG, **options):
  """{row: (tokens, steps) without padding} of the queue."""
  if keys is None:
    keys = key_data(range(len(rows)))
  options = {"mask_id": MASK, "end_ids": (EOS,), "batch_size": 16, **options}
  found = {}
  for batch in queue.write(windows.network(model_config), params, rows, keys, config, **options):
    for b, i in enumerate(batch.indices):
      one = queue.unpadded(batch.trace, b)
      assert i not in found and one.tokens.shape[1] == len(rows[i]) + config.max_new_tokens
      found[i] = one.tokens[0], one.step[0]
  return found


def key_data(rows):
  keys = process.row_keys(jax.random.key(3), max(rows) + 1)
  return np.asarray(jax.random.key_data(keys))[list(rows)]


def plainly(params, row, key, config, model_config=CONFIG, mask_id=MASK):
  """(tokens, steps) of one row alone, unpadded, with the logits of all places."""
  new = config.max_new_tokens
  canvas, valid = canvases.lay_out([row], len(row) + new, new, mask_id)
  config = dataclasses.replace(config, steps=config.steps or int(np.sum(canvas == mask_id)))
  keys = jax.random.wrap_key_data(jnp.asarray(key)[None])

  @jax.jit
  def run(params):
    logits_fn = canvas_logits_fn(Transformer(model_config), params)
    return sampler.generate(logits_fn, canvas, valid, keys, config, mask_id=mask_id)

  trace = run(params)
  return np.asarray(trace.tokens[0]), np.asarray(trace.step[0])


@pytest.mark.parametrize("config", [GREEDY, dataclasses.replace(DRAWN, steps=4)], ids=["greedy", "drawn"])
def test_rows_are_what_the_plain_sampler_writes(params, config):
  rows = prompts(24)
  found = write(params, rows, config)
  assert sorted(found) == list(range(24))
  for i in (0, 5, 11, 23):
    tokens, step = plainly(params, rows[i], key_data([i])[0], config)
    np.testing.assert_array_equal(found[i][0], tokens)
    np.testing.assert_array_equal(found[i][1], step)


@pytest.mark.slow
@pytest.mark.parametrize("config", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_two_hundred_mixed_prompts_with_every_lossless_option(params, config):
  """Exact to the first end token; and what stopped early is a part of what did not."""
  rows = prompts(200, seed=1)
  whole = write(params, rows, config, batch_size=7)
  early = write(params, rows, dataclasses.replace(config, stop_at_eos=True), batch_size=32)
  ended = 0
  for i, row in enumerate(rows):
    places = np.asarray([*row, *[MASK] * config.max_new_tokens]) == MASK
    wanted, got = whole[i][0][places], early[i][0][places]
    end = next((j for j, token in enumerate(got) if token == EOS), len(got))
    ended += end < len(got)
    np.testing.assert_array_equal(got[: end + 1], wanted[: end + 1])
    assert EOS not in wanted[:end]
    assert np.isin(got[end + 1 :], [MASK, *wanted[end + 1 :]]).all()
  assert 10 < ended < 190


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(params):
  """50 batches of mixed lengths and numbers of holes; every compilation of the process is counted."""
  config, compiled = DRAWN, []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
  )
  fixed = dict(batch_size=4, limit=96)
  # One row of each length that canvases have, with few and with many masks.
  for length in (20, 50, 80):
    for masks in (0, 8):
      write(params, [[2] * length + [MASK] * masks] * 4, config, **fixed)
  assert len(compiled) >= 6
  compiled.clear()
  lengths = set()
  for seed in range(50):
    rows = prompts(4, seed, longest=80, holes=8)
    lengths.add(max(map(len, rows)))
    assert len(write(params, rows, config, **fixed)) == 4
  assert not compiled and len(lengths) > 20


@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 100, 255, 256, 257, 300, 511, 513, 4096])
def test_buckets_are_few_and_waste_little(size):
  found = queue.bucket(size)
  assert size <= found <= max(32 * -(-size // 32), 1.25 * size)
  assert len({queue.bucket(n) for n in range(1, 4097)}) == 24


def test_no_steps_are_one_for_each_mask_of_a_block(params):
  """Also where blocks are uneven: nine masks in blocks of eight, each row by itself."""
  config = dataclasses.replace(GREEDY, max_new_tokens=0, block_size=8, alg="left_to_right")
  found = write(params, [[2, *[MASK] * 9], [2, *[MASK] * 3]], config)
  assert [len(np.unique(found[i][1][1:])) for i in (0, 1)] == [9, 3]


@pytest.mark.parametrize(
  ("rows", "changes", "words"),
  [
    ([[2, MASK]], dict(batch_size=0), "batch_size is 0; write at least one row"),
    ([[2, MASK], [2, 3]], dict(holes=True), "row 1 has no masks and max_new_tokens is 0"),
    ([[2], [2] * 60], dict(limit=64), "row 1 takes 66 places with its new tokens, and the limit is 64"),
  ],
)
def test_what_cannot_be_written_is_named(params, rows, changes, words):
  config = dataclasses.replace(GREEDY, max_new_tokens=0) if changes.pop("holes", False) else GREEDY
  with pytest.raises(ValueError, match=words):
    list(
      queue.write(
        windows.network(CONFIG), params, rows, key_data(range(2)), config, mask_id=MASK, **changes
      )
    )


def test_few_rows_make_a_small_batch_and_fillers_write_nothing(params):
  batches = list(
    queue.write(
      windows.network(CONFIG), params, prompts(5), key_data(range(5)), GREEDY, mask_id=MASK, batch_size=4
    )
  )
  assert [len(batch.indices) for batch in batches] == [4, 1]
  assert batches[1].trace.tokens.shape[0] == 1 and (batches[1].trace.nfe > 0).all()
  canvas, valid, _ = queue._lay_out([[2, MASK]], 3, GREEDY, queue.Fixed(MASK, (), 8), 20)
  assert canvas.shape == (3, 20) and np.sum((canvas == MASK) & valid, axis=1).tolist() == [7, 0, 0]
  assert list(queue.write(windows.network(CONFIG), params, [], [], GREEDY, mask_id=MASK)) == []


def launches(params, number):
  """([how many batches were launched when one was handed over], [`Batch`])."""
  launched = []

  def any_order(params, width, window):
    launched.append(1)  # traced once for each new length
    return windows.network(CONFIG)[0](params, width, window)

  rows = [[2] * n for n in (5, 50, 80, 120, 150)[:number]]
  batches = queue.write(
    (any_order, None), params, rows, key_data(range(number)), GREEDY, mask_id=MASK, batch_size=1
  )
  counts, found = [], []
  for batch in batches:
    counts.append(len(launched))
    found.append(batch)
  return counts, found


def test_the_next_batch_runs_while_one_is_read(params, monkeypatch):
  """On an accelerator two batches of three are launched when the first is handed over, never three."""
  one_by_one = functools.partial(queue._one_by_one, ahead=True)
  monkeypatch.setattr(queue, "_side_by_side", one_by_one)
  assert launches(params, 3)[0] == [2, 3, 3]


def test_a_cpu_writes_two_batches_at_a_time(params, monkeypatch):
  both, calls, fetch = threading.Barrier(2), itertools.count(), queue._fetch

  def together(*args, **options):
    if next(calls) < 2:
      both.wait(120)  # raises when the other does not come
    return fetch(*args, **options)

  monkeypatch.setattr(queue, "_fetch", together)
  began = time.monotonic()
  counts, batches = launches(params, 5)
  took = time.monotonic() - began
  assert [batch.indices for batch in batches] == [[i] for i in range(5)]
  assert all(count <= i + 1 + queue.AT_ONCE for i, count in enumerate(counts)), counts
  assert 0 < sum(batch.seconds for batch in batches) <= took
  assert all(batch.seconds >= 0 for batch in batches)


def test_what_fails_in_a_thread_is_told(params, monkeypatch):
  def fails(*_, **__):
    raise ValueError("no memory left")

  monkeypatch.setattr(queue, "_fetch", fails)
  with pytest.raises(ValueError, match="no memory left"):
    launches(params, 3)


@pytest.mark.slow
def test_a_mesh_changes_no_row(params):
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  config = dataclasses.replace(DRAWN, stop_at_eos=True)
  rows = prompts(10, seed=2)
  wanted = write(params, rows, config)
  found = write(params, rows, config, mesh=mesh, batch_size=8)
  for i in range(10):
    np.testing.assert_array_equal(found[i][0], wanted[i][0])


@pytest.mark.slow
def test_a_real_model_writes_the_same(folder_of):
  """Qwen2.5-Coder-0.5B, its attention opened: what it writes is no code, but all its sizes are real."""
  ckpt = pretrained.from_pretrained(folder_of("qwen2.5-coder-0.5b"))
  model_config = dataclasses.replace(ckpt.config, attention="full")
  mask_id, config = 151660, dataclasses.replace(GREEDY, max_new_tokens=10, steps=5)
  texts = ["def is_prime(n):\n", "import os\n\n\ndef list_files(folder):\n  return [", "x = "]
  rows = [ckpt.tokenizer.encode(text) for text in texts]
  rows[0] += [mask_id] * 3 + ckpt.tokenizer.encode("  return True")
  for temperature in (0.0, 0.8):
    now = dataclasses.replace(config, temperature=temperature)
    found = write(ckpt.params, rows, now, model_config=model_config, mask_id=mask_id)
    stopping = dataclasses.replace(now, stop_at_eos=True)
    end = int(found[2][0][-5])  # as if this were an end token
    early = write(
      ckpt.params, rows, stopping, model_config=model_config, mask_id=mask_id, end_ids=(end,)
    )
    for i, row in enumerate(rows):
      tokens, step = plainly(ckpt.params, row, key_data([i])[0], now, model_config, mask_id)
      np.testing.assert_array_equal(found[i][0], tokens)
      np.testing.assert_array_equal(found[i][1], step)
      same = (early[i][0] == tokens) | (early[i][0] == mask_id)
      ends = np.flatnonzero((tokens == end) & (step >= 0))
      assert same.all() and (early[i][0] != mask_id)[: ends[0] if len(ends) else None].all()
    assert (early[2][0] == end).any()
