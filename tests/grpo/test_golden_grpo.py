"""Scores, losses, gradients and advantages of coupled-GRPO against the reference's numbers."""

import functools
import os
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import cross_entropy
from diffucoder_jax.grpo import logps, masks, objective
from diffucoder_jax.model.transformer import Transformer
from diffucoder_jax.runtime import optim
from tests import golden

pytestmark = pytest.mark.usefixtures("quick_compile")


# Sets made with our own PyTorch: other sizes, a tied head, a low mask id, one micro-batch.
SIZES = dict(prompt=5, completion=9, groups=2, generations=3)
MADE = {
  "tied_gqa_low_mask": (
    dict(hidden_size=40, intermediate_size=72, num_attention_heads=10, num_key_value_heads=5,
         vocab_size=131, num_hidden_layers=2, rope_theta=500.0, rms_norm_eps=1e-5,
         tie_word_embeddings=True, mask_token_id=2, pad_token_id=130, eos_token_id=130),
    dict(**SIZES, accumulate=3, iterations=2),
  ),
  "one_micro_batch_one_iteration": (
    dict(hidden_size=36, intermediate_size=50, num_attention_heads=3, num_key_value_heads=3,
         vocab_size=97, num_hidden_layers=3, rope_theta=1e4, rms_norm_eps=1e-6,
         tie_word_embeddings=False, mask_token_id=96, pad_token_id=None, eos_token_id=7),
    dict(**SIZES, accumulate=1, iterations=1),
  ),
}  # fmt: skip


def folder_of_set(name, request, tmp_path_factory):
  if name == "golden":
    given = os.environ.get("DIFFUCODER_GOLDEN")
    return pathlib.Path(given) if given else request.getfixturevalue("shared") / "golden"
  pytest.importorskip("torch")
  from tests.grpo import torch_grpo

  config, sizes = MADE[name]
  folder = tmp_path_factory.mktemp(name)
  more = {"model_type": "Dream", "hidden_act": "silu"}
  torch_grpo.make_set(folder, {**config, **more}, seed=len(name), **sizes)
  return folder


@pytest.fixture(
  scope="module",
  params=["golden", *(pytest.param(n, marks=[pytest.mark.slow, pytest.mark.torch]) for n in MADE)],
)
def case(request, tmp_path_factory):
  """A golden set; DIFFUCODER_GOLDEN names another folder of the same form than ../shared/golden."""
  folder = folder_of_set(request.param, request, tmp_path_factory)
  data = golden.tensors(folder / "grpo.safetensors")
  wanted = golden.cases(folder / "grpo.json")
  hf_config, config, params = golden.checkpoint(folder / "checkpoint")
  return types.SimpleNamespace(
    data=data, wanted=wanted, config=config, params=params, hf_config=hf_config,
    model=Transformer(config), mask_id=hf_config["mask_token_id"],
    tokens=np.concatenate([data["prompt_ids"], data["completion_ids"]], axis=1),
    completion=np.arange(wanted["P"] + wanted["C"])[None].repeat(wanted["B"], 0) >= wanted["P"],
  )  # fmt: skip


def golden_passes(case, iteration):
  """The released masks and weights as `Passes`; `draw_masks` makes them by the same formula."""
  noisy = case.data[f"score.iter{iteration}.noisy"]
  weights = case.data[f"score.iter{iteration}.weights"]
  first = (case.data[f"score.iter{iteration}.t_mask"] > 0) & case.completion
  masked = np.stack([case.completion, first, case.completion & ~first])
  assert (np.where(masked, case.mask_id, case.tokens[None]) == noisy).all()
  weights = np.where(masked, weights[:, None, None], 0) / 2
  ones = jnp.ones(case.tokens.shape, jnp.float32)
  return masks.Passes(jnp.asarray(masked), jnp.asarray(weights, jnp.float32), ones)


@functools.partial(jax.jit, static_argnums=0)
def score(model, params, tokens, passes, mask_id):
  return logps.token_logps(model, params, tokens, None, None, passes, mask_id)


def scores(case, params, tokens, passes):
  return score(case.model, params, tokens, passes, case.mask_id)


def in_place(case, completion_BC):
  """[B, C] of the golden file as [B, L]."""
  rows = completion_BC.shape[0]
  return np.concatenate([np.zeros((rows, case.wanted["P"]), np.float32), completion_BC], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradients(model, config, params, tokens, passes, mask_id, rows):
  """One compilation for all micro-batches and iterations."""

  def f(params):
    new = logps.token_logps(model, params, tokens, None, None, passes, mask_id)
    (total, weight), metrics = objective.policy_loss(
      new, rows["old"], rows["ref"], rows["advantages"], rows["mask"], config
    )
    return total / weight, (new, metrics)

  return jax.value_and_grad(f, has_aux=True)(params)


def golden_loss(case, micro_batch, iteration, config, old_too=True):
  """((loss, (scores, metrics)), gradients) of one released micro-batch and iteration."""
  size = case.wanted["B"] // case.wanted["gradient_accumulation_steps"]
  rows = slice(micro_batch * size, (micro_batch + 1) * size)
  passes = jax.tree.map(lambda x: x[..., rows, :], golden_passes(case, iteration))
  old = in_place(case, case.data["old_per_token_logps"][rows, iteration]) if old_too else None
  arrays = {
    "old": old,
    "ref": in_place(case, case.data["ref_per_token_logps"][rows, iteration]),
    "mask": in_place(case, case.data["completion_mask"][rows]) > 0,
    "advantages": case.data["advantages.scale_false"][rows],
  }
  return loss_and_gradients(
    case.model, config, case.params, case.tokens[rows], passes, case.mask_id, arrays
  )


def norm_of(gradients):
  return np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients)))


def released(case, **changes):
  e, beta = case.wanted["epsilon"], case.wanted["beta"]
  return objective.Objective(**{"epsilon_low": e, "epsilon_high": e, "beta": beta, **changes})


def test_golden_scores(case):
  for iteration in range(case.wanted["num_iterations"]):
    got = scores(case, case.params, case.tokens, golden_passes(case, iteration))
    want = in_place(case, case.data["score.per_token_logps"][:, iteration])
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert not np.asarray(got)[~case.completion].any()


@pytest.mark.slow
def test_golden_weights_are_those_of_the_formula(case):
  """The released weights, from our estimator at the released t, wherever our draw put the masks."""
  for iteration in range(case.wanted["num_iterations"]):
    t = case.wanted[f"score.iter{iteration}.mask_ratio"]
    passes = masks.draw_masks(
      jax.random.key(0), np.arange(case.wanted["B"]), case.completion,
      masks.Estimator(t_low=t, t_high=t),
    )  # fmt: skip
    got = [np.unique(w[m]) for w, m in zip(passes.weights, passes.masked, strict=True)]
    full, first, second = case.data[f"score.iter{iteration}.weights"] / 2
    np.testing.assert_allclose(np.concatenate(got), [first, second, full], rtol=1e-5)


def test_golden_selective_log_softmax(case):
  """`sls.*`: logits in the place of a network, so that only the weighting and the sum are tested."""
  data, vocab = case.data, case.data["sls.logits"].shape[-1]
  times = len(data["sls.weights"]) // 3
  logits = data["sls.logits"].reshape(times, 3, -1, *data["sls.logits"].shape[1:])
  index = data["sls.index"].reshape(times, *logits.shape[2:4])
  second = data["sls.mask"].reshape(times, *logits.shape[2:4]) > 0
  got, token_nll = [], jax.jit(cross_entropy.token_nll)
  for i in range(times):
    masked = np.stack([np.ones_like(second[i]), second[i], ~second[i]])
    weights = data["sls.weights"][3 * i : 3 * i + 3, None, None] * masked / 2
    nll = [
      token_nll(jnp.asarray(logits[i, p]), jnp.eye(vocab), index[i], weights[p] != 0)
      for p in range(3)
    ]
    got.append(-np.sum(weights * np.stack(nll), axis=0))
  np.testing.assert_allclose(np.concatenate(got), data["sls.out"], atol=1e-4)


def test_golden_losses_and_gradients(case):
  wanted, data, compared = case.wanted, case.data, 0
  size = wanted["B"] // wanted["gradient_accumulation_steps"]
  for m in range(wanted["gradient_accumulation_steps"]):
    for i in range(wanted["num_iterations"]):
      name = f"loss.mb{m}.iter{i}"
      if f"{name}.loss" not in wanted:
        continue
      (value, (new, metrics)), gradients = golden_loss(case, m, i, released(case))
      np.testing.assert_allclose(value, wanted[f"{name}.loss"], rtol=1e-5, err_msg=name)
      want = in_place(case, data[f"{name}.per_token_logps"][:, 0])
      np.testing.assert_allclose(new, want, atol=1e-4, err_msg=name)
      if f"{name}.grad_global_norm" in wanted:
        norm = wanted[f"{name}.grad_global_norm"]
        np.testing.assert_allclose(norm_of(gradients), norm, rtol=1e-4, err_msg=name)
      for key, clipped, count in golden_clipping(case, name, slice(m * size, (m + 1) * size), i):
        assert metrics[key] == (clipped, count), (name, key)
      for tensor in (key for key in data if key.startswith(f"mb{m}.iter{i}.grad.")):
        got = golden.hf_tensor(gradients, case.config, tensor.split(".grad.")[1])
        assert np.abs(got - data[tensor]).max() <= 1e-4 * np.abs(data[tensor]).max(), tensor
        compared += 1
  assert compared > 10


def golden_clipping(case, name, rows, iteration):
  """The clipped tokens, counted from the golden scores: what the reference logs mixes up rows."""
  mask = case.data["completion_mask"][rows] > 0
  old, new = case.data["old_per_token_logps"][rows, iteration], case.data[f"{name}.per_token_logps"]
  ratio = np.exp(new[:, 0] - old)
  advantages = case.data["advantages.scale_false"][rows, None]
  low = mask & (ratio < 1 - case.wanted["epsilon"]) & (advantages < 0)
  high = mask & (ratio > 1 + case.wanted["epsilon"]) & (advantages > 0)
  for key, clipped in (("clip_low", low), ("clip_high", high), ("clip", low | high)):
    yield key, clipped.sum(), mask.sum()


@pytest.mark.slow
def test_golden_single_iteration(case):
  """`variant.*`: no reference and no old policy."""
  note = re.match(r"inputs of micro-batch (\d+), seed (\d+)", case.wanted["variant.note"])
  micro_batch, iteration = int(note[1]), case.wanted["mask_seeds"].index(int(note[2]))
  config = released(case, beta=0.0)
  (value, _), gradients = golden_loss(case, micro_batch, iteration, config, old_too=False)
  np.testing.assert_allclose(value, case.wanted["variant.beta0_iter1.loss"], rtol=1e-5)
  norm = case.wanted["variant.beta0_iter1.grad_global_norm"]
  np.testing.assert_allclose(norm_of(gradients), norm, rtol=1e-4)


def test_golden_advantages(case):
  group = case.wanted["num_generations"]
  rewards = case.data["rewards"].reshape(-1, group)
  for scale in (False, True):
    got = objective.advantages(rewards, "leave_one_out", scale_std=scale)
    want = case.data[f"advantages.scale_{str(scale).lower()}"]
    np.testing.assert_array_equal(np.asarray(got).reshape(-1), want)


def test_golden_completion_mask(case):
  got = objective.completion_mask(case.tokens, case.completion, case.hf_config["eos_token_id"])
  np.testing.assert_array_equal(got, in_place(case, case.data["completion_mask"]) > 0)


@pytest.mark.slow
def test_golden_micro_batches_as_released(case):
  """The recipe's own average, of the micro-batches' means, through gradient accumulation."""
  iteration, accumulate = 0, case.wanted["gradient_accumulation_steps"]
  passes = masks.swapped(golden_passes(case, iteration))
  batch = {
    "tokens": case.tokens, "masked": passes.masked, "weights": passes.weights,
    "old": in_place(case, case.data["old_per_token_logps"][:, iteration]),
    "ref": in_place(case, case.data["ref_per_token_logps"][:, iteration]),
    "mask": in_place(case, case.data["completion_mask"]) > 0,
    "advantages": case.data["advantages.scale_false"],
  }  # fmt: skip

  def loss_fn(config, params, rows):
    by_row = masks.Passes(rows["masked"], rows["weights"], jnp.ones_like(rows["old"]))
    new = scores(case, params, rows["tokens"], masks.swapped(by_row))
    return objective.policy_loss(
      new, rows["old"], rows["ref"], rows["advantages"], rows["mask"], config
    )

  def value(aggregation, times):
    f = lambda params, rows: loss_fn(released(case, aggregation=aggregation), params, rows)  # noqa: E731
    run = jax.jit(lambda params: optim.accumulated_value_and_grad(f, params, batch, times)[0][0])
    return run(case.params)

  # Micro-batch i of ours gets the rows i, i + A, ...; those of the reference are neighbours.
  order = np.arange(case.wanted["B"]).reshape(accumulate, -1).T.reshape(-1)
  batch = jax.tree.map(lambda x: jnp.asarray(x)[order], batch)
  want = np.mean([case.wanted[f"loss.mb{m}.iter0.loss"] for m in range(accumulate)])
  np.testing.assert_allclose(value("micro_batch", accumulate), want, rtol=1e-5)
  np.testing.assert_allclose(value("token_mean", accumulate), value("token_mean", 1), rtol=1e-5)
