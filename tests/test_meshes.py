"""Loss and gradients do not depend on the mesh; indivisible sizes are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffucoder_jax.diffusion import loss, process
from diffucoder_jax.model import attention
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, init_params, output_matrix, unembed
from diffucoder_jax.runtime import sharding

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = ModelConfig(
  vocab_size=96, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  rope_theta=1e4, init_std=0.3,
)  # fmt: skip
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2), (1, 4, 2))


def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 90, (16, 24)).astype(np.int32)
  segments = np.where(np.arange(24) < rng.integers(4, 20, (16, 1)), 1, 2).astype(np.int32)
  segments[:4, 18:] = 0  # some rows end in padding
  first = np.concatenate([np.ones((16, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
  return {"tokens": tokens, "segment_ids": segments, "maskable": (segments > 0) & ~first}


def mesh_of(shape):
  return sharding.make_mesh(
    dict(zip(sharding.AXES, shape, strict=True)), jax.devices()[: int(np.prod(shape))]
  )


def fresh_params(config, mesh):
  with jax.set_mesh(mesh):
    init = lambda: init_params(Transformer(config), jax.random.key(0))  # noqa: E731
    placed = sharding.shardings(jax.eval_shape(init), mesh)
    return jax.jit(lambda: nn.unbox(init()), out_shardings=placed)()


def loss_and_gradients(config, mesh, objective, params):
  model = Transformer(config)

  def objective_sum(params, b):
    key = jax.random.key(3)
    if objective == "autoregressive":
      features = model.apply(
        {"params": params}, b["tokens"], b["segment_ids"], pattern=attention.CAUSAL
      )
      total, _ = loss.autoregressive_loss(
        features, output_matrix(params), b["tokens"], b["maskable"]
      )
    else:
      noised = process.forward_process(key, b["tokens"], b["maskable"], 95, "stratified")
      pattern = attention.annealed(0.5, jax.random.fold_in(key, 1))
      features = model.apply({"params": params}, noised.tokens, b["segment_ids"], pattern=pattern)
      total, _ = loss.masked_diffusion_loss(
        features, output_matrix(params), b["tokens"], noised, b["maskable"], b["segment_ids"]
      )
    return total[0] / total[1]

  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    placed = sharding.shardings(boxed, mesh)
    step = jax.jit(jax.value_and_grad(objective_sum), out_shardings=(None, placed))
    result = step(jax.device_put(params, placed), sharding.put_batch(batch(), mesh))
  return jax.device_get(result)


@pytest.mark.parametrize(
  "objective, tied, meshes",
  [
    pytest.param("diffusion", False, MESHES, marks=pytest.mark.slow),
    ("diffusion", True, MESHES[3:4]),
    ("autoregressive", False, MESHES[4:5]),
  ],
)
def test_meshes_agree(objective, tied, meshes, capfd):
  config = ModelConfig(**{**vars(CONFIG), "tied_head": tied})
  params = jax.device_get(fresh_params(config, mesh_of((1, 1, 1))))
  value, gradients = loss_and_gradients(config, mesh_of((1, 1, 1)), objective, params)
  assert np.isfinite(value) and value > 1
  for shape in meshes:
    other_value, other_gradients = loss_and_gradients(config, mesh_of(shape), objective, params)
    np.testing.assert_allclose(other_value, value, rtol=1e-5, err_msg=str(shape))
    for (path, want), got in zip(
      jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(other_gradients), strict=True
    ):
      scale = np.abs(want).max()
      assert scale > 0, jax.tree_util.keystr(path)
      difference = np.abs(got - want).max()
      assert difference <= 1e-5 * scale, (shape, jax.tree_util.keystr(path), difference, scale)
  assert "nvoluntary full rematerialization" not in capfd.readouterr().err


def test_fresh_parameters_do_not_depend_on_the_mesh():
  one, many = (
    jax.device_get(fresh_params(CONFIG, mesh_of(shape))) for shape in ((1, 1, 1), (2, 2, 2))
  )
  jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.slow
def test_the_full_size_step_is_partitioned_without_rematerialisation(capfd):
  """Warnings that only appear at real widths: the 7B's layers on (2, 2, 2), compiled, never run."""
  from diffucoder_jax.model.config import preset

  config = ModelConfig(**{**preset("diffucoder_7b"), "num_layers": 2, "dtype": "bfloat16"})
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  model = Transformer(config)

  def step(params, b, key):
    def f(params):
      noised = process.forward_process(key, b["tokens"], b["maskable"], 151666)
      features = model.apply({"params": params}, noised.tokens, b["segment_ids"])
      total, _ = loss.masked_diffusion_loss(
        features, output_matrix(params), b["tokens"], noised, b["maskable"], b["segment_ids"]
      )
      return total[0] / total[1]

    return jax.value_and_grad(f)(params)

  with jax.set_mesh(mesh):
    init = lambda: init_params(model, jax.random.key(0))  # noqa: E731
    abstract = sharding.abstract(jax.eval_shape(init), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    rows = sharding.batch_sharding(mesh)
    row = lambda dtype: jax.ShapeDtypeStruct((8, 512), dtype, sharding=rows)  # noqa: E731
    b = {"tokens": row(jnp.int32), "segment_ids": row(jnp.int32), "maskable": row(jnp.bool_)}
    jax.jit(step, out_shardings=(None, shardings)).lower(abstract, b, jax.random.key(0)).compile()
  assert "nvoluntary full rematerialization" not in capfd.readouterr().err


def test_parameters_and_batches_are_cut_over_the_whole_mesh():
  """A rule that goes missing changes no number, only the memory: each device holds 1 / parts."""
  parts = {"embed": 4, "head": 4, "kernel": 4, "o": 4, "gate": 4, "up": 4, "down": 4, "bias": 2}
  mesh = mesh_of((2, 2, 2))
  for path, leaf in jax.tree_util.tree_leaves_with_path(fresh_params(CONFIG, mesh)):
    shard = leaf.addressable_shards[0].data
    assert leaf.size == parts.get(path[-1].key, 1) * shard.size, jax.tree_util.keystr(path)
  for leaf in sharding.put_batch(batch(), mesh).values():
    assert {shard.data.shape for shard in leaf.addressable_shards} == {(4, *leaf.shape[1:])}


def test_activations_are_cut_over_the_whole_mesh():
  """Over (data, fsdp) by rows; what has heads or a vocabulary also over `tensor`."""
  mesh, parts = mesh_of((2, 2, 2)), {}
  model, params = Transformer(CONFIG), fresh_params(CONFIG, mesh)

  def forward(params, b):
    features, kept = model.apply(
      {"params": params}, b["tokens"], b["segment_ids"], capture_intermediates=True,
      mutable=["intermediates"],
    )  # fmt: skip
    return {"logits": unembed(params, features), **kept["intermediates"]}

  with jax.set_mesh(mesh):
    made = jax.jit(forward)(params, sharding.put_batch(batch(), mesh))
  for path, leaf in jax.tree_util.tree_leaves_with_path(made):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    parts[name] = leaf.size // leaf.addressable_shards[0].data.size
  over_tensor = {"logits", *(f"layers/attn/{name}/__call__/0" for name in "qkv")}
  assert over_tensor < parts.keys()
  assert parts == {name: 8 if name in over_tensor else 4 for name in parts}


@pytest.mark.parametrize(
  "change, mesh, name",
  [
    (dict(num_heads=6, num_kv_heads=3), dict(data=1, fsdp=2, tensor=4), "attn/k"),
    (dict(embed_dim=36), dict(data=1, fsdp=8, tensor=1), "embed"),
    (dict(vocab_size=97), dict(data=4, fsdp=1, tensor=2), "embed"),
  ],
)
def test_indivisible_sizes_are_refused_by_name(change, mesh, name):
  config = ModelConfig(**{**vars(CONFIG), **change})
  mesh = sharding.make_mesh(mesh)
  boxed = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
  with pytest.raises(ValueError, match=f"parameter .*{name}.* cannot divide"):
    sharding.shardings(boxed, mesh)


def test_one_size_may_be_left_open():
  assert dict(sharding.make_mesh(dict(data=2, fsdp=-1, tensor=2)).shape)["fsdp"] == 2


def test_a_mesh_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    sharding.make_mesh(dict(data=3, fsdp=-1, tensor=1))


def test_a_batch_that_does_not_divide_is_refused():
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
  with pytest.raises(ValueError, match="global batch of 12 rows"):
    sharding.put_batch({"tokens": np.zeros((12, 4), np.int32)}, mesh)


def test_unknown_logical_axes_are_refused():
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="'expert' has no rule"):
    jax.jit(lambda x: sharding.constrain(x, "expert"))(jnp.zeros(8))


def test_axes_of_another_rank_are_refused():
  with jax.set_mesh(mesh_of((8, 1, 1))), pytest.raises(ValueError, match=r"shape \(8, 2\)"):
    jax.jit(lambda x: sharding.constrain(x, "batch"))(jnp.zeros((8, 2)))
