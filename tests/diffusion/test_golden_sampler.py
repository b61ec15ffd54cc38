"""Filtering, confidences, schedules and whole trajectories against Dream's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import remasking, sampler
from tests import golden

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.slow
def test_filtered_probabilities_and_confidences(shared):
  data = golden.tensors(shared / "golden/sampling.safetensors")
  checked = 0
  for case in golden.cases(shared / "golden/sampling_cases.json"):
    key = case["key"]
    if key.startswith("bf16") or case.get("logits") not in data:
      continue
    logits_BLV = jnp.asarray(data[case["logits"]], jnp.float32)[None]
    probs_BLV = remasking.filtered_probs(
      logits_BLV, case["temperature"], case["top_p"] or 1.0, case["top_k"] or 0
    )
    drawn_BL, tokens_BL = remasking.draw_tokens(logits_BLV, probs_BLV, -1)
    np.testing.assert_array_equal(drawn_BL, tokens_BL)
    for name in (name for name in data if name.startswith(key + "/")):
      what = name.removeprefix(key + "/")
      if what == "probs":
        np.testing.assert_allclose(probs_BLV[0], data[name], atol=1e-5, err_msg=name)
      elif what.endswith("/x0") and not key.startswith("tied"):
        np.testing.assert_array_equal(drawn_BL[0], data[name], err_msg=name)
      elif what.endswith("/confidence"):
        got = remasking.CONFIDENCE[what.split("/")[0]](probs_BLV, drawn_BL, None)[0]
        np.testing.assert_allclose(got, data[name], atol=1e-5, err_msg=name)
      else:
        continue
      checked += 1
  assert checked > 200


def test_position_probabilities_under_alg_temp(shared):
  """Drawing positions without replacement: the first one has softmax(confidence / alg_temp)."""
  data = golden.tensors(shared / "golden/sampling.safetensors")
  names = [
    name for name in data if name.startswith("alg_temp/") and name.endswith("position_probs")
  ]
  assert names
  probs = data[names[0]].reshape(-1, data[names[0]].shape[-1])[0]  # one row
  wanted = probs[probs > 0]
  log_L = jnp.log(jnp.asarray(wanted))[None, :]
  draws = 4000
  gumbel = jax.random.gumbel(jax.random.key(0), (draws, len(wanted)))
  masked = jnp.ones((draws, len(wanted)), bool)
  chosen = remasking.choose_positions(
    jnp.broadcast_to(log_L, gumbel.shape), masked, jnp.ones(draws, jnp.int32), gumbel
  )
  np.testing.assert_array_equal(chosen.sum(1), 1)
  share = np.asarray(chosen).mean(0)
  assert (np.abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / draws) + 1e-3).all()


def test_schedules(shared):
  for case in golden.cases(shared / "golden/transfer_schedule.json"):
    left, got = np.asarray([case["new_tokens"]]), []
    ratios_T = remasking.commit_ratios(case["steps"], case["eps"])
    for step in range(case["steps"]):
      count = remasking.commit_count("entropy", jnp.asarray(left), step, case["steps"], ratios_T[step])
      left = left - np.asarray(count)
      got.append(int(count[0]))
    assert got == case["transfers"], (case["new_tokens"], case["steps"], case["eps"])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(config, sampler_config, mask_id, params, canvas, valid, keys):
  logits_fn = functools.partial(golden.logits, config, params)
  return sampler.generate(logits_fn, canvas, valid, keys, sampler_config, mask_id=mask_id)


def sampler_config(case):
  return sampler.SamplerConfig(
    alg=case["alg"], steps=case["steps"], max_new_tokens=case["max_new_tokens"],
    temperature=case["temperature"], top_p=case["top_p"] or 1.0, top_k=case["top_k"] or 0,
    alg_temp=case["alg_temp"] or 0.0, eps=case["eps"],
  )  # fmt: skip


@pytest.mark.slow
def test_trajectories_are_token_identical_at_every_step(shared):
  data = golden.tensors(shared / "golden/sampler.safetensors")
  hf_config, config, params = golden.checkpoint(shared / "golden/checkpoint")
  mask_id = hf_config["mask_token_id"]
  all_cases = golden.cases(shared / "golden/sampler_cases.json")["cases"]
  assert len(all_cases) >= 30
  for case in all_cases:
    ids = data[case["inputs"] + ".input_ids"]
    seen = data.get(case["inputs"] + ".attention_mask", np.ones_like(ids))
    canvas, valid = golden.canvas(ids, seen, case["max_new_tokens"], mask_id)
    if case["name"].startswith("hook/"):  # its hook forces these before the loop, and keeps them
      canvas[:, -3:] = data["hook.forced_last3"]
    keys = sampler.row_keys(0, len(ids))
    trace = run(config, sampler_config(case), mask_id, params, canvas, valid, keys)
    got, wanted = sampler.history(trace, mask_id), data[case["name"] + "/history"]
    for step, canvas_after in enumerate(wanted):
      mine = got[min(step, len(got) - 1)]
      np.testing.assert_array_equal(mine, canvas_after, err_msg=f"{case['name']} step {step}")
    np.testing.assert_array_equal(trace.tokens, data[case["name"] + "/sequences"])


@pytest.mark.slow
def test_origin_commits_at_the_reference_rate(shared):
  case = golden.cases(shared / "golden/sampler_cases.json")["origin"][0]
  data = golden.tensors(shared / "golden/sampler.safetensors")
  hf_config, config, params = golden.checkpoint(shared / "golden/checkpoint")
  mask_id, new = hf_config["mask_token_id"], 32
  ids = np.repeat(data["plain.input_ids"][:1], 64, 0)
  canvas, valid = golden.canvas(ids, np.ones_like(ids), new, mask_id)
  settings = sampler.SamplerConfig(alg="origin", steps=case["steps"], max_new_tokens=new, top_p=1.0)
  trace = run(config, settings, mask_id, params, canvas, valid, sampler.row_keys(1, 64))
  step = np.asarray(trace.step)
  committed = np.stack([(step == s).sum(1) for s in range(case["steps"])])  # [T, B]
  assert (committed.sum(0) == new).all()
  np.testing.assert_allclose(
    remasking.commit_ratios(case["steps"], 1e-3)[:-1], case["p_transfer"][:-1], atol=1e-5
  )
  wanted = np.ravel(case["mean_transferred_per_row"])[: case["steps"]]
  error = np.sqrt(2 * np.maximum(wanted, 0.5) / 64)  # both are means over 64 rows or more
  assert (np.abs(committed.mean(1) - wanted) <= 4.5 * error).all()
