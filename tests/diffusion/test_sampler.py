"""What the sampler promises beyond the golden trajectories."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import remasking, sampler
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, init_params, unembed

MASK, EOS, VOCAB = 30, 1, 32
CONFIG = ModelConfig(
  vocab_size=VOCAB, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  rope_theta=1e4, init_std=0.5, remat="none",
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_compile")
ALGS = sorted(remasking.CONFIDENCE)


@pytest.fixture(scope="module")
def run():
  """(canvas, valid, keys, config) -> Trace, jitted, on one small random network."""
  params = nn.unbox(init_params(Transformer(CONFIG), jax.random.key(0)))
  jitted = functools.partial(jax.jit(sample, static_argnums=4, static_argnames="slots"), params)
  jitted.compiles = jitted.func._cache_size
  return jitted


def sample(params, canvas, valid, keys, config, bias=0.0, slots=None, batch_sizes=(), seen=None):
  def logits_fn(canvas, valid, index=None):
    if seen is not None:
      jax.debug.callback(functools.partial(seen.append, len(canvas)))
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    features = Transformer(CONFIG).apply(
      {"params": params}, canvas, valid.astype(jnp.int32), positions
    )
    if index is not None:
      features = jnp.take_along_axis(features, index[..., None], axis=1)
    return unembed(params, features).at[..., EOS].add(bias)

  return sampler.generate(
    logits_fn, canvas, valid, keys, config, mask_id=MASK, end_ids=(EOS,), slots=slots,
    batch_sizes=batch_sizes,
  )  # fmt: skip


def layout(prompts, new, left, right=0):
  """Canvas and valid for prompts of token lists, padded to one length."""
  length = max(map(len, prompts)) + new + left + right
  canvas, valid = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
  for b, prompt in enumerate(prompts):
    row = [*prompt, *[MASK] * new]
    end = length - right
    canvas[b, end - len(row) : end], valid[b, end - len(row) : end] = row, True
  return canvas, valid


@pytest.mark.parametrize(
  "alg, temperature", [("entropy", 0.8), ("left_to_right", 0.0), ("origin", 0.5)]
)
def test_only_what_is_written_needs_logits(run, alg, temperature):
  """Logits of 12 of 21 positions or of all: the same denoising, holes and short rows included."""
  config = sampler.SamplerConfig(
    alg=alg, steps=6, max_new_tokens=9, temperature=temperature, top_p=0.9
  )
  holes = ([2, MASK, MASK, 3, MASK, 4], [5, 6, 7, 8, 9, 10, 11], [12], [MASK, 14, 15, 16])
  canvas, valid = layout(holes, 9, left=3, right=3)
  keys = sampler.row_keys(0, 4)
  whole, part = (run(canvas, valid, keys, config, slots=slots) for slots in (None, 12))
  np.testing.assert_array_equal(part.tokens, whole.tokens)
  np.testing.assert_array_equal(part.step, whole.step)
  np.testing.assert_array_equal(part.nfe, whole.nfe)
  np.testing.assert_array_equal(part.valid, whole.valid)
  np.testing.assert_allclose(part.confidence, whole.confidence, atol=1e-5)
  np.testing.assert_allclose(part.entropy, whole.entropy, atol=1e-5)
  assert (np.asarray(part.tokens)[valid] != MASK).all()


def written(trace, b):
  return np.asarray(trace.tokens)[b][np.asarray(trace.valid)[b]]


PROMPTS = ([2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16])


@pytest.mark.parametrize(
  "alg, temperature, alg_temp",
  [
    ("entropy", 0.0, 0.0),
    pytest.param("entropy", 0.8, 0.5, marks=pytest.mark.slow),
    pytest.param("maskgit_plus", 1.0, 0.0, marks=pytest.mark.slow),
    pytest.param("topk_margin", 1.0, 0.0, marks=pytest.mark.slow),
    pytest.param("origin", 1.0, 0.0, marks=pytest.mark.slow),
    pytest.param("left_to_right", 1.0, 0.0, marks=pytest.mark.slow),
  ],
)
def test_batch_neighbours_and_padding_change_nothing(run, alg, temperature, alg_temp):
  config = sampler.SamplerConfig(
    alg=alg, steps=7, max_new_tokens=10, temperature=temperature, alg_temp=alg_temp, top_p=0.9
  )
  keys = sampler.row_keys(3, len(PROMPTS))
  together = run(*layout(PROMPTS, 10, 0), keys, config)
  canvas, valid = layout(PROMPTS, 10, 5, 4)
  canvas[~valid] = MASK  # in the padding it is nothing to write
  padded = run(canvas, valid, keys, config)
  assert (np.asarray(padded.tokens)[~valid] == MASK).all()
  for b, prompt in list(enumerate(PROMPTS))[:2]:
    alone = run(*layout([prompt], 10, 0), keys[b : b + 1], config)
    np.testing.assert_array_equal(written(together, b), written(alone, 0))
    np.testing.assert_array_equal(written(together, b), written(padded, b))
    assert together.nfe[b] == alone.nfe[0]
    steps = [np.asarray(t.step)[i][np.asarray(t.valid)[i]] for t, i in ((together, b), (alone, 0))]
    np.testing.assert_array_equal(*steps)


@pytest.mark.parametrize("alg", ALGS)
def test_everything_is_written_and_the_prompt_is_kept(run, alg):
  canvas, valid = layout(PROMPTS, 12, 2)
  for steps in (5, 40):
    config = sampler.SamplerConfig(alg=alg, steps=steps, max_new_tokens=12, temperature=0.7)
    trace = run(canvas, valid, sampler.row_keys(0, 4), config)
    given = canvas != MASK
    tokens = np.asarray(trace.tokens)
    assert not (tokens == MASK).any()
    np.testing.assert_array_equal(tokens[given], canvas[given])
    np.testing.assert_array_equal(np.asarray(trace.step) >= 0, canvas == MASK)
    # Origin throws a coin at every step; the others skip the steps at which nothing is due.
    assert (np.asarray(trace.nfe) <= (steps if alg == "origin" else min(steps, 12))).all()


def test_rows_with_other_numbers_of_masks_are_all_filled(run):
  """The reference shares the batch's mean count, which overwrites prompts and leaves masks."""
  canvas = np.full((2, 20), 7, np.int32)
  canvas[0, 2:10] = MASK
  canvas[1, 3:17] = MASK
  config = sampler.SamplerConfig(alg="entropy", steps=4, max_new_tokens=0, temperature=0.0)
  trace = run(canvas, np.ones_like(canvas, bool), sampler.row_keys(0, 2), config)
  assert not (np.asarray(trace.tokens) == MASK).any()
  assert (np.asarray(trace.tokens)[canvas == 7] == 7).all()
  for b in range(2):
    alone = run(
      canvas[b : b + 1], np.ones((1, 20), bool), sampler.row_keys(0, 2)[b : b + 1], config
    )
    np.testing.assert_array_equal(alone.tokens[0], trace.tokens[b])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_is_never_written(temperature):
  logits = np.zeros((1, 6, 8), np.float32)
  logits[..., 5] = 50.0  # the mask token, by far
  logits[..., 2] = 1.0
  fn = lambda canvas, valid: jnp.broadcast_to(jnp.asarray(logits), (*canvas.shape, 8))  # noqa: E731
  config = sampler.SamplerConfig(
    alg="maskgit_plus", steps=3, max_new_tokens=6, temperature=temperature
  )
  canvas, valid = jnp.full((1, 6), 5, jnp.int32), jnp.ones((1, 6), bool)
  trace = sampler.generate(fn, canvas, valid, sampler.row_keys(0, 1), config, mask_id=5)
  assert (trace.tokens == 2).all()


def test_a_threshold_is_on_the_token_that_is_written():
  """Where the network is sure of MASK, it is not sure of the token that is written instead."""
  logits = np.zeros((1, 6, 8), np.float32)
  logits[..., 5] = 50.0
  fn = lambda canvas, valid: jnp.broadcast_to(jnp.asarray(logits), (*canvas.shape, 8))  # noqa: E731
  config = sampler.SamplerConfig(alg="maskgit_plus", max_new_tokens=6, temperature=0.0, threshold=0.9)
  canvas, valid = jnp.full((1, 6), 5, jnp.int32), jnp.ones((1, 6), bool)
  trace = sampler.generate(fn, canvas, valid, sampler.row_keys(0, 1), config, mask_id=5)
  assert trace.nfe[0] == 6 and sorted(np.asarray(trace.step)[0].tolist()) == [*range(6)]


@pytest.mark.parametrize("left", [0, 5])
def test_left_to_right_is_in_order_one_a_step(run, left):
  config = sampler.SamplerConfig(alg="left_to_right", steps=9, max_new_tokens=9, temperature=0.5)
  trace = run(*layout([[2, 3]], 9, left), sampler.row_keys(0, 1), config)
  np.testing.assert_array_equal(trace.step[0, -9:], np.arange(9))
  np.testing.assert_array_equal(trace.confidence[0, -9:], -np.arange(2, 11))  # padding is no place


@pytest.mark.parametrize(("masks", "block", "steps"), [(9, 8, 9), (33, 32, 33), (7, 16, 7), (6, 2, 6)])
def test_no_steps_are_one_for_each_mask_in_blocks_too(run, masks, block, steps):
  config = sampler.SamplerConfig(
    alg="left_to_right", steps=0, max_new_tokens=masks, block_size=block, temperature=0.0
  )
  canvas, valid = layout([[2, 3]], masks, 0)
  trace = run(canvas, valid, sampler.row_keys(0, 1), config, slots=masks)
  step_N = np.asarray(trace.step)[0, 2:]
  assert trace.nfe[0] == steps and len(np.unique(step_N)) == masks
  assert (np.diff(step_N) > 0).all()


def test_stop_at_eos_keeps_the_tokens_before_it(run):
  """A bias towards the end token makes rows end early; what comes before must not change."""
  canvas, valid = layout([[2, 3, 4], [9, 8, 7]], 24, 0)
  keys = sampler.row_keys(5, 2)
  stopped = 0
  for alg in ("entropy", "left_to_right", "origin"):
    traces = []
    for stop in (False, True):
      config = sampler.SamplerConfig(
        alg=alg, steps=24, max_new_tokens=24, temperature=1.0, top_p=1.0, stop_at_eos=stop
      )
      traces.append(run(canvas, valid, keys, config, bias=6.0))
    full, early = (np.asarray(t.tokens) for t in traces)
    for b in range(2):
      ends = np.flatnonzero(full[b] == EOS)
      end = ends[0] + 1 if len(ends) else full.shape[1]
      np.testing.assert_array_equal(full[b, :end], early[b, :end])
      stopped += int(traces[1].nfe[b]) < int(traces[0].nfe[b])
  assert stopped > 0, "no row ended early, so the test shows nothing"


def probable(tokens, probs):
  """Logits [..., VOCAB] that give each of `tokens` its probability, and token 0 the rest."""
  one, rest = jax.nn.one_hot(tokens, VOCAB), jax.nn.one_hot(jnp.zeros_like(tokens), VOCAB)
  return jnp.log(one * probs[..., None] + rest * (1 - probs[..., None]) + 1e-30)


def test_stop_at_eos_waits_for_all_before_it_and_reads_no_prompt():
  """Row 0 writes its end token first, then what stands before it; row 1 has one in its prompt."""
  canvas = jnp.asarray([[2, *[MASK] * 5], [EOS, *[MASK] * 5]], jnp.int32)
  probs = jnp.broadcast_to(jnp.asarray([1.0, 0.8, 0.7, 0.9, 0.6, 0.55]), canvas.shape)
  tokens = jnp.where((jnp.arange(6) == 3)[None, :] & (canvas[:, :1] == 2), EOS, 4)
  logits_fn = lambda *_: probable(tokens, probs)  # noqa: E731
  config = sampler.SamplerConfig(
    alg="maskgit_plus", steps=50, max_new_tokens=5, temperature=0.0, top_p=1.0, stop_at_eos=True
  )
  keys = sampler.row_keys(0, 2)
  trace = sampler.generate(logits_fn, canvas, canvas >= 0, keys, config, mask_id=MASK, end_ids=(EOS,))
  assert trace.tokens.tolist() == [[2, 4, 4, EOS, MASK, MASK], [EOS, 4, 4, 4, 4, 4]]
  assert trace.nfe.tolist() == [3, 4]  # 1, 1, 1 and then 2 tokens are due


def test_the_trace_holds_the_confidence_and_entropy_of_the_committing_step():
  """The fewer masks are left, the less sure this network is."""

  def logits_fn(canvas, valid):
    probs_B1 = 0.5 + 0.1 * jnp.sum(canvas == MASK, axis=1, keepdims=True)
    return probable(jnp.full(canvas.shape, 4), jnp.broadcast_to(probs_B1, canvas.shape))

  canvas = jnp.asarray([[2, MASK, MASK, MASK]], jnp.int32)
  config = sampler.SamplerConfig(
    alg="maskgit_plus", steps=3, max_new_tokens=3, temperature=0.0, top_p=1.0
  )
  trace = sampler.generate(logits_fn, canvas, canvas >= 0, None, config, mask_id=MASK)
  assert trace.step.tolist() == [[-1, 1, 2, 2]] and trace.nfe.tolist() == [2]
  np.testing.assert_allclose(trace.confidence, [[0, 0.8, 0.7, 0.7]], rtol=1e-5)
  entropy = [-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (0.8, 0.7, 0.7)]
  np.testing.assert_allclose(trace.entropy, [[0, *entropy]], rtol=1e-4)
  assert trace.alternatives is None

  config = dataclasses.replace(config, alternatives=2)
  more = sampler.generate(logits_fn, canvas, canvas >= 0, None, config, mask_id=MASK)
  jax.tree.map(
    np.testing.assert_array_equal, trace, more.replace(alternatives=None, alternative_probs=None)
  )
  assert more.alternatives[0, 0].tolist() == [-1, -1] and set(
    more.alternatives[0, 1:, 0].tolist()
  ) == {4}
  np.testing.assert_allclose(more.alternative_probs[0, :, 0], [0, 0.8, 0.7, 0.7], rtol=1e-5)
  rest = more.alternative_probs[0, 1:, 1]
  assert (0 < rest).all() and (rest < 0.31).all()


def draw_rows(probs, tokens=4, rows=2048, **changes):
  """Trace of many rows of `len(probs)` masks whose network never changes its mind; two steps."""
  canvas = jnp.full((rows, len(probs)), MASK, jnp.int32)
  logits = probable(
    jnp.full(canvas.shape, tokens), jnp.broadcast_to(jnp.asarray(probs), canvas.shape)
  )
  config = sampler.SamplerConfig(
    **{"alg": "maskgit_plus", "steps": 2, "temperature": 1.0, "top_p": 1.0, **changes}
  )
  run = jax.jit(
    lambda keys: sampler.generate(
      lambda *_: logits, canvas, canvas >= 0, keys, config, mask_id=MASK
    )
  )
  return run(sampler.row_keys(0, rows))


def assert_share(got, want):
  """`got` are coins; 5 standard errors."""
  got, want = np.asarray(got), np.asarray(want)
  assert (np.abs(got.mean(0) - want) < 5 * np.sqrt(want * (1 - want) / len(got))).all()


@pytest.mark.slow
def test_positions_are_drawn_from_the_softmax_of_confidence_over_alg_temp():
  probs = [0.9, 0.7, 0.6]
  trace = draw_rows(probs, temperature=0.0, alg_temp=0.2)  # int(3 / 2) = 1 in the first step
  wanted = np.exp(np.asarray(probs) / 0.2)
  assert_share(trace.step == 0, wanted / wanted.sum())


def test_every_step_draws_afresh():
  """Step 0 commits one token 4 when any position drew it; the other two draw again."""
  trace = draw_rows([0.6] * 3)
  assert_share((trace.tokens == 4).all(1), (1 - 0.4**3) * 0.6**2)


@pytest.mark.parametrize("alg", ["maskgit_plus", "origin"])
def test_which_positions_are_drawn_says_nothing_about_their_tokens(alg):
  """Token 0 and position would share their random bits if the two draws had one key."""
  trace = draw_rows([0.5] * 4, alg=alg, alg_temp=0.0 if alg == "origin" else 1.0)
  first = np.asarray(trace.step == 0)
  assert_share(np.asarray(trace.tokens == 0)[first], 0.5)


def test_stop_at_eos_without_an_end_token_is_refused():
  config = sampler.SamplerConfig(steps=2, stop_at_eos=True)
  with pytest.raises(ValueError, match="end token"):
    sampler.generate(
      None, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), None, config, mask_id=MASK
    )


def test_one_compile_per_shape_and_config(run):
  before = run.compiles()
  config = sampler.SamplerConfig(alg="entropy", steps=3, max_new_tokens=4, temperature=0.3)
  for seed in range(3):
    run(*layout([[2 + seed, 3], [4, 5]], 4, 0), sampler.row_keys(seed, 2), config)
  assert run.compiles() == before + 1


def test_zero_commit_steps_cost_no_evaluation(run):
  config = sampler.SamplerConfig(alg="entropy", steps=200, max_new_tokens=8, temperature=0.0)
  trace = run(*layout([[2, 3]], 8, 0), sampler.row_keys(0, 1), config)
  assert trace.nfe[0] <= 8


def test_temperature_changes_the_order(run):
  orders = []
  for seed in range(6):
    config = sampler.SamplerConfig(
      alg="entropy", steps=12, max_new_tokens=12, temperature=1.2, top_p=1.0
    )
    orders.append(
      tuple(np.asarray(run(*layout([[2]], 12, 0), sampler.row_keys(seed, 1), config).step[0]))
    )
  assert len(set(orders)) > 1


def test_traces_survive_a_file(run, tmp_path):
  config = sampler.SamplerConfig(alg="entropy", steps=4, max_new_tokens=6, alternatives=2)
  trace = jax.device_get(run(*layout([[2, 3], [4]], 6, 1), sampler.row_keys(0, 2), config))
  sampler.save_trace(tmp_path / "t.npz", trace)
  again = sampler.load_trace(tmp_path / "t.npz")
  jax.tree.map(np.testing.assert_array_equal, trace, again)
  history = sampler.history(again, MASK)
  np.testing.assert_array_equal(history[-1], trace.tokens)
  assert (history[0] == MASK).sum() > (history[-1] == MASK).sum()


def test_a_trace_of_another_version_is_refused(tmp_path):
  np.savez(tmp_path / "t.npz", version=99, tokens=np.zeros((1, 1)))
  with pytest.raises(ValueError, match="version 99"):
    sampler.load_trace(tmp_path / "t.npz")


@pytest.mark.parametrize(
  "wrong",
  [
    dict(alg="best"),
    dict(top_p=0.0),
    dict(temperature=-1.0),
    dict(eps=0.0),
    dict(steps=-1),
    dict(steps=2.5),
    dict(top_k=True),
    dict(alternatives=-1),
    dict(refresh=2),
  ],
)
def test_settings_out_of_range_are_named(wrong):
  with pytest.raises(ValueError, match=f"sampler.{next(iter(wrong))}"):
    sampler.SamplerConfig(**wrong)


@pytest.mark.parametrize(
  ("alg", "temperature"),
  [("maskgit_plus", 0.0), pytest.param("left_to_right", 1.5, marks=pytest.mark.slow)],
)
def test_rows_that_are_done_leave_the_batch(run, alg, temperature):
  """Same tokens, steps and evaluations, and the network sees no more rows than it has to."""
  prompts = [[2, 3], [4] * 5, [6], [7, 8, 9], [10, 11], [12], [13], [14] * 4]
  canvas, valid = layout(prompts, 12, left=2)
  keys = sampler.row_keys(3, len(prompts))
  config = sampler.SamplerConfig(
    alg=alg, max_new_tokens=12, temperature=temperature, stop_at_eos=True, alternatives=2
  )
  bias = 6.0
  wanted = run(canvas, valid, keys, config, bias)
  seen = []
  params = run.args[0]
  got = jax.jit(
    lambda: sample(params, canvas, valid, keys, config, bias, None, (1, 2, 4, 6, 8), seen)
  )()
  jax.effects_barrier()
  for name, array in vars(got).items():
    if name == "revoked":
      assert array is None
      continue
    np.testing.assert_allclose(array, getattr(wanted, name), rtol=0, atol=1e-5, err_msg=name)
  nfe = np.asarray(got.nfe)
  left = [int((nfe >= n).sum()) for n in range(1, nfe.max() + 1)]  # rows of each evaluation
  assert seen == [min(size for size in (1, 2, 4, 6, 8) if size >= n) for n in left]
  assert len({*seen}) > 2


@pytest.mark.parametrize("alg", [pytest.param("entropy", marks=pytest.mark.slow), "maskgit_plus"])
def test_a_threshold_commits_what_is_sure_and_at_least_one(run, alg):
  canvas, valid = layout([[2, 3], [4] * 5, [6]], 12, left=0)
  keys = sampler.row_keys(0, 3)
  base = sampler.SamplerConfig(alg=alg, max_new_tokens=12, temperature=0.0, top_p=1.0)
  off, exact = (
    run(canvas, valid, keys, c) for c in (dataclasses.replace(base, threshold=1.0), base)
  )
  np.testing.assert_array_equal(off.tokens, exact.tokens)
  seen = {}
  for threshold in (0.9, 0.5, 0.2):
    config = dataclasses.replace(base, threshold=threshold)
    trace = run(canvas, valid, keys, config)
    assert (np.asarray(trace.tokens) != MASK).all()
    seen[threshold] = int(np.sum(trace.nfe))
    step_BL = np.asarray(trace.step)
    for b in range(3):
      steps, counts = np.unique(step_BL[b][step_BL[b] >= 0], return_counts=True)
      assert trace.nfe[b] == len(steps) and steps.tolist() == [*range(len(steps))]  # none is wasted
      if alg == "maskgit_plus":  # whose confidence is the token's probability
        for step, count in zip(steps, counts, strict=True):
          sure = np.sort(np.asarray(trace.confidence)[b][step_BL[b] == step])
          assert (sure[:-1] > threshold).all() and (count == 1 or sure[0] > threshold)
  assert seen[0.2] < seen[0.9] <= int(np.sum(exact.nfe)) + 3


@pytest.mark.slow
def test_an_entropy_bound_and_a_kl_bound_commit_more_or_less(run):
  canvas, valid = layout([[2, 3], [4] * 5, [6]], 12, left=0)
  keys = sampler.row_keys(0, 3)
  evaluations = lambda **changes: np.sum(  # noqa: E731
    run(canvas, valid, keys, sampler.SamplerConfig(
      max_new_tokens=12, temperature=0.0, top_p=1.0, **changes)).nfe
  )  # fmt: skip
  assert evaluations(entropy_bound=100.0) == 3  # everything at once
  assert evaluations(entropy_bound=3.0) < evaluations(entropy_bound=0.01)
  assert evaluations(threshold=0.01) == 3
  # What was seen for the first time has not been stable: two more evaluations.
  assert evaluations(threshold=0.01, kl_bound=1e9) == 9
  assert evaluations(threshold=0.01, kl_bound=1e-9) == 36
