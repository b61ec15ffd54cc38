"""Every config builds, and the full-size ones lower: the step a pod would run, without its memory."""

import functools
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from diffucoder_jax import pretrained, programs, train, train_grpo
from diffucoder_jax.diffusion import sampler
from diffucoder_jax.execution import sandbox
from diffucoder_jax.grpo import diagnostics, masks, rewards, rounds
from diffucoder_jax.grpo import objective as grpo_objective
from diffucoder_jax.hf import load
from diffucoder_jax.model.config import ModelConfig, preset
from diffucoder_jax.model.transformer import Transformer, init_params
from diffucoder_jax.runtime import optim, sharding, workdir
from tests import tiny

STAGES = ("adapt_7b", "midtrain_7b", "sft_7b")
NAMES = sorted(
  path.stem
  for path in (tiny.ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "common")
)


def config_of(name, arg=None):
  return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", NAMES)
def test_builds(name):
  module = importlib.import_module(f"configs.{name}")
  assert "python -m diffucoder_jax." in module.__doc__
  c = module.get_config()
  if "benchmark" not in c:  # flags of evaluate, which tests/test_sweep.py reads
    optim.make_optimizer(c.optim)
  if "grpo" in c:  # the model is the one that it starts from
    rounds.Grpo(**c.grpo), masks.Estimator(**c.estimator), grpo_objective.Objective(**c.objective)
    rewards.RewardConfig(**c.reward.to_dict()), sampler.SamplerConfig(**c.sampler)
    sandbox.Limits(**c.sandbox.limits), diagnostics.Limits(**c.collapse)
  elif "model" in c:
    ModelConfig(**c.model), train.Objective(**c.objective)
  with pytest.raises(ValueError, match=f"configs/{name}.py"):
    module.get_config("no such argument")
  for change in getattr(module, "sweep", lambda: [])():
    module.get_config().unlock().update_from_flattened_dict(change)
    flat = module.get_config().to_dict()
    for key in change:
      node = flat
      for part in key.split("."):
        assert part in node, f"sweep of {name} sets {key}, which does not exist"
        node = node[part]


@pytest.mark.slow
@pytest.mark.parametrize("arg", [None, pytest.param("0_5b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STAGES)
def test_full_size_steps_lower(name, arg):
  """Shapes, shardings and types of the whole step are right; nothing is allocated."""
  c = config_of(name, arg)
  model = Transformer(ModelConfig(**c.model))
  objective = train.Objective(**c.objective)
  tx, _ = optim.make_optimizer(c.optim)
  mesh = sharding.make_mesh(dict(data=2, fsdp=4, tensor=1))
  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(
      lambda key: optim.init_state(init_params(model, key), tx), jax.random.key(0)
    )
    state = sharding.abstract(boxed, mesh)
    shape = (c.data.global_batch, c.data.seq_len)
    place = sharding.batch_sharding(mesh)
    batch = {
      key: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
      for key, dtype in dict(
        tokens=jnp.int32, segment_ids=jnp.int32, positions=jnp.int32, maskable=bool
      ).items()
    }
    if c.data.source == "conversations":
      batch["prompt"] = batch["maskable"]
    step = functools.partial(train.train_step, model, tx, objective, 151666, c.optim.accumulate)
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch, jax.random.key(1))
  after, metrics = lowered.out_info
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
  assert metrics["loss"].shape == ()
  count = sum(x.size for x in jax.tree.leaves(load.abstract_params(model.config, mesh)))
  assert count == (7_615_616_512 if arg is None else 494_032_768)


@pytest.mark.slow
def test_the_full_size_update_and_rollout_lower():
  """The recipe's optimiser step and its sampler, for the 7B network; nothing is allocated."""
  c = config_of("grpo_7b")
  mesh = sharding.make_mesh(dict(data=2, fsdp=4, tensor=1))
  network = ModelConfig(**{**preset("diffucoder_7b"), "remat": "full"})
  words = SimpleNamespace(end_of_turn_id=151645)
  ckpt = pretrained.Pretrained(network, None, words, 151666, 151643, 151643, mesh)
  tx, _ = optim.make_optimizer(c.optim)
  with jax.set_mesh(mesh):
    rounds_ = rounds.Rounds(c, ckpt, mesh, None, None, jax.random.key(0))
    state, _ = train_grpo.initial_state(c, mesh, rounds_, tx, jax.random.key(0))
    new = rounds_.sampler.max_new_tokens
    step = functools.partial(
      train_grpo.update, rounds_.model, tx, rounds_.objective, rounds_.estimator, 151666, new,
      c.optim.accumulate,
    )  # fmt: skip
    lowered = jax.jit(step, donate_argnums=0).lower(state, jnp.int32(0), jax.random.key(1))
    prepared = programs.prepare_rollout(c, mesh, SimpleNamespace(model="diffucoder_7b"))
    sampled = prepared.fn.lower(*prepared.args)
  after, metrics = lowered.out_info
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
  assert metrics["loss"].shape == () and sampled.out_info.tokens.shape == (80, 512 + 256)
  assert state.batch.old.shape == (80, 2, 768) == state.batch.ref.shape


def test_the_papers_grpo_differs_where_it_says():
  """Paper and released code: the four values in which they disagree, and nothing else."""
  recipe, paper = (config_of("grpo_7b", arg).to_dict() for arg in ("recipe", "paper"))
  assert config_of("grpo_7b").to_dict() == recipe
  changes = workdir.config_changes(recipe, paper)
  keys = [change.split(":")[0] for change in changes]
  wanted = ["grpo.ref_alpha", "objective.advantage", "problems.split", "sampler.temperature"]
  assert keys == wanted


def test_a_misspelt_key_fails_by_name():
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", str(tiny.ROOT / "configs" / "sft_7b.py"), flag_values=values
  )
  with pytest.raises(Exception, match="condition_step"):
    values(["program", "--config.objective.condition_step=3"])
