"""AdamW as PyTorch does it, schedules, and micro-batches that add up to the big batch."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes  # noqa: F401  (lets safetensors read bfloat16)
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffucoder_jax.runtime import optim, sharding


def config(**changes):
  c = ml_collections.ConfigDict(
    {
      "steps": 100,
      "lr": 1e-3,
      "warmup_steps": 10,
      "schedule": "cosine",
      "lr_floor": 0.1,
      "b1": 0.9,
      "b2": 0.99,
      "eps": 1e-8,
      "weight_decay": 0.1,
      "decay": "matrices",
      "clip_norm": 1.0,
      "accumulate": 1,
      "rounding": "nearest",
      "moment_dtype": "float32",
    }
  )
  c.update(changes)
  return c


def mesh_of(data, fsdp, tensor):
  devices = jax.devices()[: data * fsdp * tensor]
  return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


@pytest.mark.parametrize(
  "schedule, expected",
  [
    ("cosine", {0: 0, 5: 0.5e-3, 10: 1e-3, 55: 0.55e-3, 100: 1e-4, 200: 1e-4}),
    ("linear", {0: 0, 5: 0.5e-3, 10: 1e-3, 55: 0.55e-3, 100: 1e-4, 200: 1e-4}),
    ("constant", {0: 0, 5: 0.5e-3, 10: 1e-3, 55: 1e-3, 200: 1e-3}),
  ],
)
def test_schedules(schedule, expected):
  _, rate = optim.make_optimizer(config(schedule=schedule))
  for step, value in expected.items():
    np.testing.assert_allclose(rate(step), value, rtol=1e-6, atol=1e-12)
  _, rate = optim.make_optimizer(config(schedule=schedule, warmup_steps=0))
  np.testing.assert_allclose(rate(0), 1e-3, rtol=1e-6)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"schedule": "step"}, "optim.schedule is 'step'; choose one of .*cosine"),
    ({"decay": "none"}, "optim.decay is 'none'"),
    ({"warmup_steps": 100}, "optim.warmup_steps is 100"),
    ({"lr": 0.0}, "optim.lr is 0.0"),
    ({"lr_floor": 2.0}, "optim.lr_floor is 2.0"),
    ({"clip_norm": -1.0}, "optim.clip_norm is -1.0"),
    ({"rounding": "up"}, "optim.rounding is 'up'; choose one of .*stochastic"),
    ({"moment_dtype": "float16"}, "optim.moment_dtype is 'float16'"),
  ],
)
def test_bad_config_is_named(changes, words):
  with pytest.raises(ValueError, match=words):
    optim.make_optimizer(config(**changes))


def test_one_step_equals_torch(shared):
  """Clip to 0.2, then AdamW with decay on everything, as PyTorch does it (golden data)."""
  from safetensors import safe_open

  with safe_open(shared / "golden/mdm_loss.safetensors", "np") as golden:
    keys = list(golden.keys())
    names = [key.removeprefix("adamw_after.") for key in keys if key.startswith("adamw_after.")]
    grads = {name: golden.get_tensor(f"grad.{name}") for name in names}
    after = {name: golden.get_tensor(f"adamw_after.{name}") for name in names}
  with safe_open(shared / "golden/checkpoint/model.safetensors", "np") as weights:
    params = {name: weights.get_tensor(name) for name in names}
  assert len(names) >= 3
  norm = json.loads((shared / "golden/mdm_loss.json").read_text())["grad_global_norm"]
  # One more leaf stands for all other parameters, so that the global norm is the same.
  rest = norm**2 - sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values())
  grads["rest"], params["rest"] = np.float32([np.sqrt(rest)]), np.zeros(1, np.float32)
  tx, _ = optim.make_optimizer(
    config(schedule="constant", warmup_steps=0, decay="all", clip_norm=0.2)
  )
  state = optim.apply_gradients(optim.init_state(jax.tree.map(jnp.asarray, params), tx), grads, tx)
  assert state.step == 1
  for name in names:
    # The step is about 1e-3 everywhere; torch adds 1e-6 to the norm it clips by.
    np.testing.assert_allclose(state.params[name], after[name], rtol=0, atol=3e-7, err_msg=name)
    assert np.abs(after[name] - params[name]).max() > 9e-4


def test_decay_leaves_scales_and_biases_alone():
  dense = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  params = {"dense": dense, "norm": {"scale": jnp.ones(2)}}
  zeros = jax.tree.map(jnp.zeros_like, params)
  for decay, shrinks in (("matrices", (True, False, False)), ("all", (True, True, True))):
    tx, _ = optim.make_optimizer(config(decay=decay, warmup_steps=0))
    new = optim.apply_gradients(optim.init_state(params, tx), zeros, tx).params
    got = (new["dense"]["kernel"], new["dense"]["bias"], new["norm"]["scale"])
    assert tuple(bool((x < 1).all()) for x in got) == shrinks


def test_clipping():
  params = {"kernel": jnp.zeros(4)}
  grads = {"kernel": jnp.asarray([3.0, 0.0, 4.0, 0.0])}
  momenta = {}
  for clip in (1.0, 10.0, 0.0):
    tx, _ = optim.make_optimizer(config(clip_norm=clip))
    state = optim.apply_gradients(optim.init_state(params, tx), grads, tx)
    momenta[clip] = optax.tree.get(state.opt_state, "mu")["kernel"]
  np.testing.assert_allclose(momenta[1.0], 0.1 * grads["kernel"] / 5, rtol=1e-6)
  np.testing.assert_allclose(momenta[10.0], 0.1 * grads["kernel"], rtol=1e-6)
  np.testing.assert_allclose(momenta[0.0], 0.1 * grads["kernel"], rtol=1e-6)


def test_bfloat16_parameters_have_float32_moments():
  params = {"kernel": jnp.ones((4,), jnp.bfloat16)}
  tx, _ = optim.make_optimizer(config(warmup_steps=0, lr=1e-2))
  state = optim.init_state(params, tx)
  after = optim.apply_gradients(state, {"kernel": jnp.ones((4,), jnp.bfloat16)}, tx)
  kinds = lambda s: jax.tree.map(lambda x: str(x.dtype), s)  # noqa: E731
  assert kinds(after) == kinds(state)
  assert after.params["kernel"].dtype == jnp.bfloat16
  assert optax.tree.get(after.opt_state, "nu")["kernel"].dtype == jnp.float32
  assert (after.params["kernel"] < 1).all()


def train_toy(rounding, dtype, steps=40, mesh=None, start=None, moment_dtype="float32"):
  """The state after some steps of pulling random weights towards a target, on a mesh."""
  mesh = mesh_of(1, 1, 1) if mesh is None else mesh
  tx, _ = optim.make_optimizer(
    config(lr=2e-4, warmup_steps=0, rounding=rounding, moment_dtype=moment_dtype)
  )
  placed = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
  target = jax.random.normal(jax.random.key(1), (32, 64))

  @jax.jit
  def step(state):
    # From bfloat16 whatever is kept, as a network that computes in it would.
    seen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    grads = {"kernel": seen["kernel"].astype(jnp.float32) - target}
    return optim.apply_gradients(state, grads, tx, jax.random.key(2))

  if start is None:
    kernel = jax.random.normal(jax.random.key(0), (32, 64), jnp.bfloat16).astype(dtype)
    start = optim.init_state({"kernel": jax.device_put(kernel, placed)}, tx)
  state = start
  for _ in range(steps):
    state = step(state)
  return state


def test_a_master_copy_trains_as_float32():
  plain, ours = train_toy("nearest", "float32"), train_toy("master", "bfloat16")
  kernel = plain.params["kernel"]
  np.testing.assert_array_equal(ours.opt_state.master["kernel"], kernel)
  assert ours.params["kernel"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(ours.params["kernel"], kernel.astype(jnp.bfloat16))
  lost = train_toy("nearest", "bfloat16").params["kernel"]
  start = train_toy("nearest", "bfloat16", steps=0).params["kernel"]
  moved = lambda x: np.abs(x.astype(jnp.float32) - start).mean()  # noqa: E731
  assert moved(lost) < 0.5 * moved(kernel)  # else there was nothing to keep


def test_stochastic_rounding_is_right_on_average():
  """1 + 0.3 of the last place goes up in 3 of 10 cases; what bfloat16 can hold stays."""
  x = jnp.concatenate([jnp.full(10_000, sign * (1 + 0.3 * 2**-7)) for sign in (1, -1)])
  rounded = np.asarray(optim.round_stochastically(jax.random.key(0), x), np.float32)
  assert set(np.abs(rounded)) == {1.0, 1 + 2**-7}
  for part in np.abs(rounded).reshape(2, -1):  # 0.0046 is one standard deviation
    assert abs((part > 1).mean() - 0.3) < 0.02
  largest_nan = np.uint32(0x7FFFFFFF).view(np.float32)  # a carry would make it -0
  held = jnp.asarray([0.0, -0.0, 1.5, -3.0, jnp.inf, -jnp.inf, jnp.nan, largest_nan])
  got = optim.round_stochastically(jax.random.key(0), held)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.astype(jnp.float32), held)


def test_stochastic_rounding_follows_float32_and_no_mesh():
  wanted = train_toy("nearest", "float32").params["kernel"]
  ours = train_toy("stochastic", "bfloat16").params["kernel"]
  assert ours.dtype == jnp.bfloat16
  start = train_toy("nearest", "float32", steps=0).params["kernel"]
  assert abs(np.mean((ours - wanted) / (wanted - start))) < 0.05
  np.testing.assert_array_equal(
    ours, train_toy("stochastic", "bfloat16", mesh=mesh_of(2, 2, 2)).params["kernel"]
  )


@pytest.mark.parametrize("rounding", ("master", "stochastic"))
def test_rounding_goes_on_where_it_stopped(rounding):
  run = lambda steps, start=None: train_toy(  # noqa: E731
    rounding, "bfloat16", steps, start=start, moment_dtype="bfloat16"
  )
  whole, half = run(6), run(3)
  assert optax.tree.get(half.opt_state, "mu")["kernel"].dtype == jnp.bfloat16
  assert optax.tree.get(half.opt_state, "nu")["kernel"].dtype == jnp.float32
  jax.tree.map(np.testing.assert_array_equal, run(3, jax.device_get(half)), whole)


@pytest.mark.parametrize("rounding", ("master", "stochastic"))
def test_rounding_of_float32_parameters_is_refused(rounding):
  with pytest.raises(ValueError, match=f"optim.rounding is '{rounding}'.*param_dtype"):
    train_toy(rounding, "float32", steps=0)


def test_where_there_are_adapters_only_they_are_trained(caplog):
  adapter = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}
  params = {"dense": {"kernel": jnp.ones((2, 2)), "kernel_lora": adapter, "bias": jnp.ones(2)}}
  params["lora_norm"] = {"scale": jnp.ones(2)}  # a name that only looks like one
  part = {"dense": {"kernel_lora": adapter}}
  assert optim.trained(params) == part
  with caplog.at_level("INFO"):
    assert optim.log_trained(params) == (4, 12)
  assert "training 4 of 12 parameters (33.3 %)" in caplog.text
  plain = {"dense": {"kernel": jnp.ones((2, 2))}}
  assert optim.trained(plain) is plain

  def loss_fn(params, batch):
    dense = params["dense"]
    y = batch @ (dense["kernel"] + dense["kernel_lora"]["a"] @ dense["kernel_lora"]["b"])
    return (jnp.sum(y * params["lora_norm"]["scale"][None]), jnp.float32(len(batch))), {}

  tx, _ = optim.make_optimizer(config(warmup_steps=0, weight_decay=0.5))
  state = optim.init_state(params, tx)
  for name in ("mu", "nu"):
    moments = optax.tree.get(state.opt_state, name)
    assert jax.tree.structure(moments) == jax.tree.structure(part)
  for accumulate in (1, 2):
    x = jnp.ones((4, 2))
    _, grads = optim.accumulated_value_and_grad(loss_fn, state.params, x, accumulate)
    assert jax.tree.structure(grads) == jax.tree.structure(part)
    np.testing.assert_allclose(grads["dense"]["kernel_lora"]["a"], np.full((2, 1), 2.0))
  zeros = jax.tree.map(jnp.zeros_like, grads)
  new = optim.apply_gradients(state, zeros, tx).params
  for name, leaf in new["dense"].pop("kernel_lora").items():  # both factors decay
    np.testing.assert_allclose(leaf, 1 - 1e-3 * 0.5, err_msg=name)
  assert new["dense"]["kernel"] is params["dense"]["kernel"]
  assert new["lora_norm"] == params["lora_norm"] and "kernel_lora" in params["dense"]


class Toy(nn.Module):
  """Two layers with logical axes, as the real network has them."""

  @nn.compact
  def __call__(self, x_BD):
    init = nn.initializers.normal(0.3)
    up = self.param("up", nn.with_logical_partitioning(init, ("embed", "mlp")), (8, 16))
    bias = self.param("bias", nn.with_logical_partitioning(init, ("mlp",)), (16,))
    down = self.param("down", nn.with_logical_partitioning(init, ("mlp", "embed")), (16, 8))
    hidden = nn.gelu(sharding.constrain(x_BD @ up + bias[None], "batch", "mlp"))
    return hidden @ down


def loss_fn(params, batch):
  """A weighted loss whose rows weigh differently, with noise from each row's own key."""
  noise_BD = jax.vmap(lambda key: jax.random.normal(key, (8,)))(batch["key"])
  error_B = jnp.sum((Toy().apply({"params": params}, batch["x"] + noise_BD) - batch["x"]) ** 2, -1)
  weight_B = batch["weight"]
  loss = jnp.sum(error_B * weight_B), jnp.sum(weight_B)
  return loss, {"half": (jnp.sum(weight_B * (weight_B > 1)), jnp.sum(weight_B))}


def make_batch(rows=16):
  weight = (jnp.arange(rows) % 5).astype(jnp.float32)
  keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(1), row))(jnp.arange(rows))
  x = jax.random.normal(jax.random.key(2), (rows, 8))
  return {"x": x, "weight": weight, "key": keys}


def make_params():
  return nn.unbox(Toy().init(jax.random.key(0), jnp.ones((1, 8))))["params"]


@pytest.mark.parametrize("accumulate", [1, 2, 4, 16])
def test_micro_batches_add_up_to_the_big_batch(accumulate):
  params, batch = make_params(), make_batch()

  def whole(params):
    (loss, weight), _ = loss_fn(params, batch)
    return loss / weight

  want, want_grads = jax.value_and_grad(whole)(params)
  step = jax.jit(lambda p, b: optim.accumulated_value_and_grad(loss_fn, p, b, accumulate))
  (loss, metrics), grads = step(params, batch)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  share = np.sum(batch["weight"] * (batch["weight"] > 1)) / np.sum(batch["weight"])
  np.testing.assert_allclose(metrics["half"], share, rtol=1e-6)
  for got, ref in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(got, ref, rtol=1e-6, atol=1e-6 * np.abs(ref).max())
  assert ("scan" in str(jax.make_jaxpr(step)(params, batch))) == (accumulate > 1)


def test_accumulation_keeps_float32_for_bfloat16_parameters():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
  for accumulate in (1, 4):
    (loss, _), grads = optim.accumulated_value_and_grad(loss_fn, params, make_batch(), accumulate)
    assert {x.dtype for x in jax.tree.leaves((loss, grads))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_weight_gives_zero(accumulate):
  params, batch = make_params(), make_batch()
  batch["weight"] = jnp.zeros_like(batch["weight"])
  (loss, metrics), grads = optim.accumulated_value_and_grad(loss_fn, params, batch, accumulate)
  assert loss == 0 and metrics["half"] == 0
  assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_bad_accumulate_is_named():
  wrong = ((3, "16 rows cannot be cut into optim.accumulate=3"), (0, "at least 1"))
  for accumulate, words in wrong:
    with pytest.raises(ValueError, match=words):
      optim.accumulated_value_and_grad(loss_fn, make_params(), make_batch(), accumulate)


@pytest.mark.slow
def test_state_is_sharded_like_the_parameters_and_training_agrees_with_one_device():
  tx, _ = optim.make_optimizer(config(warmup_steps=0))

  def init(key):
    return optim.init_state(Toy().init(key, jnp.ones((8, 8)))["params"], tx)

  def train(mesh, accumulate):
    boxed = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.shardings(boxed, mesh)
    with jax.set_mesh(mesh):
      state = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(jax.random.key(0))

      def step(state, batch):
        (loss, _), grads = optim.accumulated_value_and_grad(
          loss_fn, state.params, batch, accumulate
        )
        return optim.apply_gradients(state, grads, tx), loss

      compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
      batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))
      text = compiled.lower(state, batch).compile().as_text()
      losses = []
      for _ in range(3):
        state, loss = compiled(state, batch)
        losses.append(float(loss))
    return state, losses, text

  want, want_losses, _ = train(mesh_of(1, 1, 1), 1)
  state, losses, text = train(mesh_of(2, 2, 2), 2)
  np.testing.assert_allclose(losses, want_losses, rtol=5e-6)
  assert losses[2] < losses[0]
  assert state.step == 3
  specs = jax.tree.map(lambda x: x.sharding.spec, state.params)
  assert specs == {
    "up": PartitionSpec("fsdp", "tensor"),
    "down": PartitionSpec("tensor", "fsdp"),
    "bias": PartitionSpec("tensor"),
  }
  for name in ("mu", "nu"):
    moments = optax.tree.get(state.opt_state, name)
    assert jax.tree.map(lambda x: x.sharding.spec, moments) == specs
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(want.params), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  # Rows stay where they are and gradients are summed in shards, not whole on each device.
  (loop,) = (line for line in text.splitlines() if " while(" in line and "f32[" in line)
  assert "f32[4,8]" in loop and "f32[8,4]" in loop and "f32[2,2,8]" in loop
  assert "f32[8,16]" not in loop and "f32[16,8]" not in loop
  assert "all-to-all(" not in text and "collective-permute(" not in text
