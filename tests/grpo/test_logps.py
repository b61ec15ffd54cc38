"""Scores of a small network: neighbours, padding, meshes, causal networks, and memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffucoder_jax.grpo import logps, masks, objective
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, init_params, unembed
from diffucoder_jax.runtime import sharding

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


CONFIG = ModelConfig(
  vocab_size=96, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  rope_theta=1e4, init_std=0.3,
)  # fmt: skip
MASK_ID = 95


def small_params(config=CONFIG):
  return nn.unbox(init_params(Transformer(config), jax.random.key(0)))


def small_batch(rows, prompt, completion, pads=0):
  """Rows of a prompt, `pads` columns of padding on its left, and a completion."""
  rng = np.random.default_rng(3)
  tokens = rng.integers(1, 90, (rows, prompt + completion)).astype(np.int32)
  tokens = np.concatenate([np.zeros((rows, pads), np.int32), tokens], axis=1)
  column = np.arange(pads + prompt + completion)[None].repeat(rows, 0)
  segments = (column >= pads).astype(np.int32)
  return {
    "tokens": tokens, "segments": segments, "completion": column >= pads + prompt,
    "positions": np.maximum(column - pads, 0).astype(np.int32),
    "rows": np.arange(rows, dtype=np.int32),
  }  # fmt: skip


def small_scores(config, e, params, b, key=None, chunk=256, remat=True):
  passes = masks.draw_masks(
    jax.random.key(1) if key is None else key, b["rows"], b["completion"], e, max_tokens=8
  )
  return logps.token_logps(
    Transformer(config), params, b["tokens"], b["segments"], b["positions"], passes, MASK_ID,
    chunk=chunk, remat=remat,
  )  # fmt: skip


def test_neighbours_padding_and_chunks_do_not_matter():
  params, e = small_params(), masks.Estimator(t_per="batch", pairs=2)
  run = jax.jit(small_scores, static_argnums=(0, 1), static_argnames=("chunk", "remat"))
  whole = small_batch(6, 5, 8)
  want = np.asarray(run(CONFIG, e, params, whole))[:, 5:]
  assert np.abs(want).min() > 0
  turned = jax.tree.map(lambda x: x[[4, 1]], whole)
  np.testing.assert_allclose(run(CONFIG, e, params, turned)[:, 5:], want[[4, 1]], atol=1e-5)
  padded = small_batch(6, 5, 8, pads=3)
  np.testing.assert_allclose(run(CONFIG, e, params, padded)[:, 8:], want, atol=1e-5)
  other = run(CONFIG, e, params, whole, chunk=7, remat=False)
  np.testing.assert_allclose(other[:, 5:], want, atol=1e-5)


def test_causal_network_scores_in_one_pass():
  config = ModelConfig(**{**vars(CONFIG), "attention": "causal"})
  params, b = small_params(), small_batch(2, 5, 8, pads=2)
  many = small_scores(config, masks.Estimator("autoregressive"), params, b)
  one = small_scores(config, masks.Estimator("autoregressive", causal=True), params, b)
  np.testing.assert_allclose(one, many, atol=1e-5)
  full = small_scores(CONFIG, masks.Estimator("autoregressive"), params, b)
  assert np.abs(full - many).max() > 0.1


def gradient_of_loss(config, e, params, b, key):
  def f(params):
    new = small_scores(config, e, params, b, key)
    (total, weight), _ = objective.policy_loss(
      new, new + 0.3 * jnp.cos(7.0 * b["tokens"]), new + 0.2 * jnp.sin(5.0 * b["tokens"]),
      jnp.cos(1.0 + b["rows"]), b["completion"], objective.Objective(),
    )  # fmt: skip
    return total / weight, new

  (value, new), gradients = jax.value_and_grad(f, has_aux=True)(params)
  return value, new, gradients


def test_meshes_agree(capfd):
  e, b = masks.Estimator(t_per="row"), small_batch(16, 5, 8, 2)
  results = {}
  for shape in ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)):
    mesh = sharding.make_mesh(
      dict(zip(sharding.AXES, shape, strict=True)), jax.devices()[: int(np.prod(shape))]
    )
    with jax.set_mesh(mesh):
      boxed = jax.eval_shape(lambda: init_params(Transformer(CONFIG), jax.random.key(0)))
      placed = sharding.shardings(boxed, mesh)
      run = jax.jit(
        lambda params, b, key: gradient_of_loss(CONFIG, e, params, b, key),
        out_shardings=(None, None, placed),
      )
      params = jax.device_put(jax.device_get(small_params()), placed)
      out = run(params, sharding.put_batch(b, mesh), jax.random.key(1))
      results[shape] = jax.device_get(out)
  value, new, gradients = results.pop((1, 1, 1))
  assert np.abs(new[:, 7:]).min() > 0 and abs(value) > 1e-3
  for shape, (other, other_new, other_gradients) in results.items():
    np.testing.assert_allclose(other, value, rtol=1e-5, err_msg=str(shape))
    np.testing.assert_allclose(other_new, new, atol=2e-5, err_msg=str(shape))
    for (path, want), got in zip(
      jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(other_gradients), strict=True
    ):
      difference = np.abs(got - want).max() / np.abs(want).max()
      assert difference <= 2e-5, (shape, jax.tree_util.keystr(path), difference)
  assert "nvoluntary full rematerialization" not in capfd.readouterr().err


def dense_scores(model, params, b, passes):
  """The released form: all passes in one batch, all logits of the completion, log-softmax, gather."""
  count, rows, length = passes.masked.shape
  noisy = jnp.where(passes.masked, MASK_ID, b["tokens"]).reshape(count * rows, length)
  features = model.apply({"params": params}, noisy)[:, -256:]
  log_probs = jax.nn.log_softmax(unembed(params, features), axis=-1)
  targets = jnp.broadcast_to(b["tokens"], passes.masked.shape).reshape(noisy.shape)[:, -256:, None]
  picked = jnp.take_along_axis(log_probs, targets, axis=-1)[..., 0].reshape(count, rows, 256)
  return jnp.sum(picked * passes.weights[:, :, -256:], axis=0)


def test_memory_is_a_quarter_of_the_dense_form(capsys):
  """At the recipe's sizes: V = 152,064, 256 completion tokens, 10 completions. Compiled, not run."""
  rows, prompt, vocab = 10, 200, 152_064
  config = ModelConfig(**{**vars(CONFIG), "vocab_size": vocab, "embed_dim": 64, "remat": "full"})
  model = Transformer(config)
  params = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
  b = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, small_batch(rows, prompt, 256)))

  def ours(params, b, key):
    passes = masks.draw_masks(key, b["rows"], b["completion"], masks.Estimator())
    return logps.token_logps(model, params, b["tokens"], None, None, passes, MASK_ID)

  def dense(params, b, key):
    passes = masks.draw_masks(key, b["rows"], b["completion"], masks.Estimator())
    return dense_scores(model, params, b, passes)

  def dense_of_one(params, b, key):  # a third of the released form: one of its three passes
    passes = masks.draw_masks(key, b["rows"], b["completion"], masks.Estimator("full_mask"))
    return dense_scores(model, params, b, passes)

  def compiled(f, backward):
    if backward:
      run = jax.grad(lambda params, b, key: jnp.sum(jnp.tanh(f(params, b, key))))
    else:
      run = f
    made = jax.jit(run).lower(params, b, jax.random.key(0)).compile()
    return made.memory_analysis().temp_size_in_bytes / 2**20, made.as_text()

  for backward in (False, True):
    mine, text = compiled(ours, backward)
    theirs, dense_text = compiled(dense, backward)
    one, _ = compiled(dense_of_one, backward)
    what = "forward and backward" if backward else "forward"
    with capsys.disabled():
      print(
        f"\n{what}: {mine:.0f} MiB, dense {theirs:.0f} MiB, dense by single passes {one:.0f} MiB"
      )
    assert mine <= theirs / 4 and mine <= one / 4
    # No logits of whole rows, in any order of dimensions or flattened.
    positions = {rows * length * p for length in (256, prompt + 256) for p in (1, 3)}
    found = {"ours": 0, "dense": 0}
    for name, hlo in (("ours", text), ("dense", dense_text)):
      for shape in set(re.findall(r"\[([\d,]+)\]", hlo)):
        sizes = [int(n) for n in shape.split(",")]
        if vocab in sizes:
          sizes.remove(vocab)
          found[name] += int(np.prod(sizes)) in positions
    assert found["ours"] == 0 and found["dense"] > 0, found
