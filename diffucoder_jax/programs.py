"""The jitted functions that the programs run, with abstract arguments: what to compile ahead of time.

Each `prepare_*` builds its function the way its program does, for a config and a mesh, of devices that
need not exist. No array is made. `PROGRAMS` has them by name.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffucoder_jax import pretrained, train, train_grpo
from diffucoder_jax.data import batching
from diffucoder_jax.diffusion import pace, proposal, queue
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.grpo import rollout
from diffucoder_jax.grpo.rounds import Rounds, draw_passes
from diffucoder_jax.hf import load
from diffucoder_jax.model import blockwise, cost, transformer, windows
from diffucoder_jax.model.config import ModelConfig, preset
from diffucoder_jax.runtime import hlo, optim, sharding

# Ids of Dream's vocabulary; which ones they are changes nothing in a program.
MASK, END_OF_TEXT, END_OF_TURN = 151666, 151643, 151645
LOSS_CHUNK, SCORE_CHUNK = 1024, 256  # of cross_entropy.chunk_size() on a TPU and logps.token_logps


class Prepared(NamedTuple):
  """A program to compile: the jitted function, its abstract arguments, and what it costs on paper.

  `rows`, `length`: of the batch. `micro_batches`: into which it is cut. `trains`: goes backward too.
  `hints`: of loops whose rounds are decided at run time.
  """

  fn: Any
  args: tuple
  work: cost.Work
  rows: int
  length: int
  micro_batches: int
  trains: bool
  hints: tuple = ()


def _key():
  return jax.eval_shape(lambda: jax.random.key(0))


def _by_row(mesh, dtype, *shape):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def network(config, name):
  """`ModelConfig` of what a config trains. RL configs name only changes, here to the preset `name`.

  A dtype of "auto" asks which machine runs, and would find this CPU; on a TPU it is bfloat16.
  """
  given = config.model.to_dict()
  if "vocab_size" not in given:
    asked = {key: value for key, value in given.items() if value is not None}
    given = {**preset(name), "attention": "full", **asked}
  if given.get("dtype", "auto") == "auto":
    given["dtype"] = "bfloat16"
  return ModelConfig(**given)


def _hints(length, positions, chunk):
  """Of the loops whose rounds are decided at run time.

  Args:
    length: of a row. positions: on a device that may need logits. chunk: of them at a time.
  """
  blocks = -(-length // blockwise.block_size(length))
  rounds = max(1, math.ceil(positions / chunk))
  return (
    hlo.Hint("attend", (blocks + 1) / 2, f"a causal query sees half of {blocks} blocks of keys"),
    hlo.Hint("", rounds, f"logits of {positions:.0f} positions on a device, {chunk} at a time"),
  )


def prepare_train(config, mesh, options):
  """The step of `train.main`."""
  objective = train.Objective(**config.objective)
  model_config = dataclasses.replace(
    network(config, options.model), attention=train.pattern_name(objective)
  )
  model = transformer.Transformer(model_config)
  tx, _ = optim.make_optimizer(config.optim)
  abstract, _ = train.initial_state(config, mesh, model, tx, _key())
  rows = batching.placed_rows(config.data, sharding.batch_shards(mesh))
  length, accumulate = config.data.seq_len, config.optim.accumulate
  fields = dict(tokens=jnp.int32, segment_ids=jnp.int32, positions=jnp.int32, maskable=bool)
  if config.data.source == "conversations":
    fields["prompt"] = bool
  batch = {name: _by_row(mesh, dtype, rows, length) for name, dtype in fields.items()}
  fn = train.make_step_fn(model, tx, objective, MASK, accumulate, abstract, mesh)
  # t is uniform in (0, 1): half of the tokens are masked and carry loss.
  share = 0.5 if objective.kind == "diffusion" else 1.0
  on_device = share * rows * length / sharding.batch_shards(mesh) / accumulate
  work = cost.training(model_config, rows * length, length, share)
  # Rows that only fill the batch up are computed and useless.
  work = dataclasses.replace(work, useful=work.useful * config.data.global_batch / rows)
  hints = _hints(length, on_device, LOSS_CHUNK)
  return Prepared(fn, (abstract, batch, _key()), work, rows, length, accumulate, True, hints)


def _rounds(config, mesh, options):
  words = SimpleNamespace(end_of_turn_id=END_OF_TURN)
  ckpt = pretrained.Pretrained(
    network(config, options.model), None, words, MASK, END_OF_TEXT, END_OF_TEXT, mesh
  )
  return Rounds(config, ckpt, mesh, None, None, None)  # no prompts, sandbox or key: nothing runs


def _scored_batch(rounds, mesh):
  """What `Rounds.collect` places on the device before it scores."""
  batch = rollout.empty_batch(rounds.rows, 1, rounds.length, False, sharding.batch_sharding(mesh))
  names = ("tokens", "valid", "completion", "scored", "rows", "groups")
  return {name: getattr(batch, name) for name in names}


def _scoring_size(rounds, mesh):
  """(passes of the estimator, positions that are scored at most, those on a device)."""
  new = rounds.sampler.max_new_tokens
  passes = jax.eval_shape(
    functools.partial(draw_passes, estimator=rounds.estimator, new=new),
    _key(), _scored_batch(rounds, mesh),
  )  # fmt: skip
  scored = rounds.rows * new
  return passes.masked.shape[0], scored, scored / sharding.batch_shards(mesh)


def prepare_logps(config, mesh, options):
  """The scores of a round's answers, old or reference, of `Rounds.scores`."""
  rounds = _rounds(config, mesh, options)
  model_config = rounds.model.config
  passes, scored, on_device = _scoring_size(rounds, mesh)
  args = load.abstract_params(model_config, mesh), _scored_batch(rounds, mesh), _key()
  work = cost.scoring(model_config, rounds.rows * rounds.length, rounds.length, passes, scored)
  hints = _hints(rounds.length, on_device, SCORE_CHUNK)
  return Prepared(rounds.score, args, work, rounds.rows, rounds.length, 1, False, hints)


def prepare_update(config, mesh, options):
  """The optimiser's step of `train_grpo.main`."""
  rounds = _rounds(config, mesh, options)
  model_config, accumulate = rounds.model.config, config.optim.accumulate
  tx, _ = optim.make_optimizer(config.optim)
  abstract, _ = train_grpo.initial_state(config, mesh, rounds, tx, _key())
  fn = train_grpo.make_update_fn(rounds, tx, accumulate, abstract, mesh)
  passes, scored, on_device = _scoring_size(rounds, mesh)
  args = abstract, jax.ShapeDtypeStruct((), jnp.int32), _key()
  work = cost.policy_update(
    model_config, rounds.rows * rounds.length, rounds.length, passes, scored
  )
  hints = _hints(rounds.length, on_device / accumulate, SCORE_CHUNK)
  return Prepared(fn, args, work, rounds.rows, rounds.length, accumulate, True, hints)


def _sampling_hints(length, rows, slots, mesh):
  """Half of the places are masked in the mean step, and only these need logits."""
  masked = rows * slots / 2 / sharding.batch_shards(mesh)
  often = hlo.Hint("choose_tokens", 16, "the edges of nucleus and top-k are often found by then")
  return (often, *_hints(length, masked, proposal.CHUNK))


def _sampling_work(model_config, rows, length, config, slots):
  steps = config.steps or config.max_new_tokens
  return cost.scoring(model_config, rows * length, length, steps, rows * slots)


def prepare_rollout(config, mesh, options):
  """The sampler's program of a round, with the longest prompts that are allowed."""
  rounds = _rounds(config, mesh, options)
  rows = min(rounds.batch_size, rounds.rows)
  args = _written(rounds.model.config, rounds.sampler, END_OF_TURN, rows, rounds.length, mesh)
  work = _sampling_work(
    rounds.model.config, rows, rounds.length, rounds.sampler, rounds.sampler.max_new_tokens
  )
  hints = _sampling_hints(rounds.length, rows, rounds.sampler.max_new_tokens, mesh)
  return Prepared(queue.write_any_order, args, work, rows, rounds.length, 1, False, hints)


def _written(model_config, sampler, end_id, rows, length, mesh):
  """Arguments of `queue.write_any_order`, for rows without holes."""
  sizes = queue.batch_sizes_of(sampler, rows, sharding.batch_shards(mesh))
  new = sampler.max_new_tokens
  slots = new if sampler.cache != "none" else queue.bucket(new, 8)
  steps = pace.pace_of(sampler, [new], slots).ratios.shape[1]
  return (
    windows.network(model_config)[0], sampler, queue.Fixed(MASK, (end_id,), slots, sizes),
    load.abstract_params(model_config, mesh), _by_row(mesh, jnp.int32, rows, length),
    _by_row(mesh, bool, rows, length),
    pace.Pace(_by_row(mesh, jnp.int32, rows), _by_row(mesh, jnp.float32, rows, steps)),
    _by_row(mesh, jnp.uint32, rows, 2),
  )  # fmt: skip


def prepare_generate(config, mesh, options):
  """The sampler's program of `completion.generate`, with `options.batch` prompts."""
  sampler = SamplerConfig(**config.sampler) if "sampler" in config else SamplerConfig()
  model_config = network(config, options.model)
  shards = sharding.batch_shards(mesh)
  rows = options.batch + -options.batch % shards
  length = options.prompt_tokens + sampler.max_new_tokens
  args = _written(model_config, sampler, END_OF_TEXT, rows, length, mesh)
  work = _sampling_work(model_config, rows, length, sampler, sampler.max_new_tokens)
  hints = _sampling_hints(length, rows, sampler.max_new_tokens, mesh)
  return Prepared(queue.write_any_order, args, work, rows, length, 1, False, hints)


PROGRAMS = {
  "train": prepare_train,
  "rollout": prepare_rollout,
  "logps": prepare_logps,
  "update": prepare_update,
  "generate": prepare_generate,
}
