"""Coupled-GRPO: improves an instruction-tuned model on problems whose answers can be run.

  python -m diffucoder_jax.train_grpo --config=configs/quickstart_grpo.py --workdir=WORKDIR
  python -m diffucoder_jax.train_grpo --replay=WORKDIR/rollouts/000012.jsonl

A round samples answers, has them judged, and takes `grpo.num_iterations` optimiser steps on them.
Started again with the same workdir it goes on where it stopped, bitwise, also between two steps of
a round. `--replay` samples a logged round again and compares, token for token.
"""

import dataclasses
import functools
import json
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_dict, config_flags

from diffucoder_jax import pretrained
from diffucoder_jax.data import problem_sets
from diffucoder_jax.evals import arness
from diffucoder_jax.execution.sandbox import Limits, Sandbox
from diffucoder_jax.grpo import diagnostics, logps, masks, objective, rollout
from diffucoder_jax.grpo.rounds import Rounds, draw_passes
from diffucoder_jax.model import lora
from diffucoder_jax.model.transformer import Transformer, init_params, positions_of
from diffucoder_jax.runtime import checkpoint, heartbeat, hosts, metrics, optim, sharding
from diffucoder_jax.runtime import workdir as workdirs


@flax.struct.dataclass
class State:
  """What training changes and a checkpoint keeps: an `optim.TrainState`, the reference, the round.

  `ref` holds the trained parameters of the reference, {} without one.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ref: Any
  batch: rollout.Batch


# ---------------------------------------------------------------------------------------------
# On the device


def update(model, tx, objective_config, estimator, mask_id, new, accumulate, state, iteration, key):
  """One optimiser step on the round in `state.batch`. Returns (state, metrics)."""
  batch = vars(state.batch)
  passes = draw_passes(key, batch, estimator, new)
  rows = {**batch, "passes": masks.swapped(passes)}
  rows["old"], rows["ref"] = batch["old"][:, iteration], None
  if objective_config.beta:
    rows["ref"] = batch["ref"][:, iteration]

  def loss_fn(params, rows):
    passes = masks.swapped(rows["passes"])
    new_BL = logps.token_logps(
      model, params, rows["tokens"], rows["valid"].astype(jnp.int32), positions_of(rows["valid"]),
      passes, mask_id,
    )  # fmt: skip
    total, extra = objective.policy_loss(
      new_BL, rows["old"], rows["ref"], rows["advantages"], rows["scored"], objective_config,
      rows["used"], passes.loss_weights,
    )  # fmt: skip
    used_BL = rows["scored"] & rows["used"][:, None]
    extremes = diagnostics.ratio_extremes(new_BL, rows["old"], used_BL)
    # Of each micro-batch; what is logged is their mean.
    extra |= {name: (extremes[name], 1.0) for name in ("ratio_min", "ratio_max")}
    return total, extra

  (value, extra), grads = optim.accumulated_value_and_grad(loss_fn, state.params, rows, accumulate)
  share = diagnostics.effective_share(extra["ratio"], extra.pop("ratio_squared"))
  # Rows have numbers from 0; this one is nobody's.
  state = optim.apply_gradients(state, grads, tx, jax.random.fold_in(key, 2**31 - 1))
  report = {"loss": value, "grad_norm": optax.tree.norm(grads), "ratio_effective_share": share}
  return state, {**report, **extra}


def make_update_fn(rounds, tx, accumulate, abstract, mesh):
  """`update` compiled for a state like `abstract`, which it takes over and gives back in place."""
  return jax.jit(
    functools.partial(
      update, rounds.model, tx, rounds.objective, rounds.estimator, rounds.ckpt.mask_id,
      rounds.sampler.max_new_tokens, accumulate,
    ),
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), sharding.replicated(mesh)),
  )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The program


def open_prompts(config, tokenizer):
  """(prompts to learn from, held-out ones or None), and a line about what was left out."""
  c = config.problems
  loaded = problem_sets.load_problems(c.set, c.path, c.split)
  usable = [p for p in loaded if config.reward.train_on_shared or p.integrity == "isolated"]
  encode = functools.partial(
    rollout.encode_prompts, tokenizer=tokenizer, system=config.rollout.system,
    primer=config.rollout.primer, max_tokens=config.rollout.max_prompt_tokens,
  )  # fmt: skip
  prompts, long = encode(usable)
  logging.info(
    "problems: %d of %d from %s; %d can only be judged in the answer's process, %d are too long",
    len(prompts.ids), len(loaded), c.path, len(loaded) - len(usable), long,
  )  # fmt: skip
  held_out = None
  if config.eval.every:
    held_out, long = encode(problem_sets.load_problems(c.set, c.eval_path, c.split))
    held_out = rollout.Prompts(*(part[: config.eval.problems] for part in held_out))
    if long:
      logging.warning("held out: %d problems are too long and not asked", long)
  return prompts, held_out


def evaluate(rounds, held_out, config, params, key):
  """pass@1 on held-out problems: greedy, and at the rollouts' temperature; all tests must pass.

  Returns:
    {"eval/pass@1", "eval/pass@1_se", "eval/pass@1_greedy", "eval/pass@1_greedy_se"}; standard errors
    are over problems. And lines for the log: this process's answers.
  """
  report, lines = {}, []
  kinds = {"": (rounds.sampler, config.eval.samples)}
  kinds["_greedy"] = (dataclasses.replace(rounds.sampler, temperature=0.0), 1)
  whole = [dataclasses.replace(p, tests=(*p.tests, *p.plus_tests)) for p in held_out.problems]
  for name, (sampler_config, samples) in kinds.items():
    rows = np.repeat(np.arange(len(whole)), samples)
    passed, texts = rounds.solved(
      [whole[i] for i in rows], [held_out.ids[i] for i in rows], params, key, sampler_config
    )
    for i, text in texts.items():
      line = {
        "task_id": whole[rows[i]].task_id, "sample": int(i % samples),
        "temperature": sampler_config.temperature, "prompt": whole[rows[i]].prompt,
        "completion": text, "passed": None if np.isnan(passed[i]) else bool(passed[i]),
      }  # fmt: skip
      lines.append(json.dumps(line) + "\n")
    passed_PS = passed.reshape(len(whole), samples)
    rate_P = np.nanmean(passed_PS, axis=1)  # a problem that was never judged is left out
    rate_P = rate_P[np.isfinite(rate_P)]
    report[f"eval/pass@1{name}"] = float(rate_P.mean())
    report[f"eval/pass@1{name}_se"] = float(rate_P.std(ddof=1) / np.sqrt(len(rate_P)))
  return report, lines


def main(config, workdir):
  """Trains to `config.optim.steps`, continuing where `workdir` left off.

  Args:
    config: as the files in `configs/` make it.
    workdir: folder for everything the run writes; may be gs://.
  Returns:
    the last evaluation, a dict of floats.
  Raises:
    SystemExit: with code 42 after a preemption, when the state has been saved.
  """
  workdir = workdirs.absolute(workdir)
  hosts.check_same_everywhere({**hosts.versions(), **workdirs.flat(config.to_dict(), "config")})

  # Where: devices and randomness.
  mesh = sharding.make_mesh(config.mesh)
  jax.set_mesh(mesh)
  sharding.log_mesh(mesh)
  init_key, round_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)

  # What: the policy, the problems, the sandbox, the optimiser.
  ckpt = open_policy(config.init_from, config.model, mesh, init_key)
  prompts, held_out = open_prompts(config, ckpt.tokenizer)
  asked = [part.ids if part else None for part in (prompts, held_out)]
  hosts.check_same_everywhere(
    {"the tokenizer": ckpt.tokenizer.fingerprint(), "the problems": asked}
  )
  sandbox = Sandbox(
    limits=Limits(**config.sandbox.limits), allow_unsafe=config.sandbox.allow_unsafe
  )
  logging.info("sandbox: level %s", sandbox.level)
  rounds = Rounds(config, ckpt, mesh, prompts, sandbox, round_key, arness.mean_arness)
  tx, learning_rate = optim.make_optimizer(config.optim)

  # State, by precedence: 1. this workdir's checkpoint  2. config.init_from.
  as_json = {**config.to_dict(), "model": dataclasses.asdict(ckpt.config)}
  workdirs.claim_workdir(workdir, as_json)
  if sharding.is_main_process():
    ckpt.tokenizer.save(workdir)
  abstract, make_state = initial_state(config, mesh, rounds, tx, init_key)
  optim.log_trained(abstract.params)
  manager = checkpoint.open_manager(workdir, config.checkpoint)
  resumed = checkpoint.resume(manager, workdir, abstract, as_json)
  state, start = (make_state(ckpt.params), 0) if resumed is None else (resumed[0], resumed[2])
  ckpt = rounds.ckpt = dataclasses.replace(ckpt, params=None)  # the state's are donated and move on
  checkpoint.catch_sigterm()

  # Loop: a step of the optimiser each; a new round whenever the last one is used up.
  update_fn = make_update_fn(rounds, tx, config.optim.accumulate, abstract, mesh)
  move_ref = jax.jit(functools.partial(objective.ref_update, alpha=rounds.grpo.ref_alpha))
  rates = jax.device_get(jax.vmap(learning_rate)(np.arange(config.optim.steps)))
  writer = metrics.Writer(workdir, start + 1 if start else 0, config.log)
  progress = metrics.Progress(config.optim.steps, start)
  alarm = diagnostics.Limits(**config.collapse)
  alive = heartbeat.Heartbeat(config.hosts.hang_seconds)
  last_eval = {}

  def evaluate_now(step):
    began = time.monotonic()
    row, lines = evaluate(rounds, held_out, config, state.params, eval_key)
    write_lines(rounds.path(workdir / "answers", step), lines)
    writer.write(step, {**row, "eval/seconds": time.monotonic() - began})
    return row

  with alive, sandbox, manager, writer:
    if config.eval.every and start == 0:
      last_eval = evaluate_now(0)
    for step in range(start + 1, config.optim.steps + 1):
      round_, iteration = divmod(step - 1, rounds.grpo.num_iterations)
      began, row = time.monotonic(), {}
      if iteration == 0:
        batch, row, lines = rounds.collect(round_, state.params, state.ref)
        state = state.replace(batch=batch)
        write_lines(rounds.path(workdir / "rollouts", round_), lines)
      key = rounds.keys(round_)[1][iteration]
      state, on_device = update_fn(state, jnp.int32(iteration), key)
      if rounds.objective.beta and step % rounds.grpo.ref_every == 0:
        state = state.replace(ref=move_ref(state.ref, optim.trained(state.params)))
      row |= {**jax.device_get(on_device), "learning_rate": float(rates[step - 1])}
      row["seconds/step"] = time.monotonic() - began
      alive.beat(step, row.get("seconds/waiting_for_judge", 0.0))
      row |= alive.report()
      progress.update(step, writer.write(step, row))
      check_collapse(workdir, writer, step, alarm, rounds.grpo)
      last = step == config.optim.steps
      if config.eval.every and (step % config.eval.every == 0 or last):
        last_eval = evaluate_now(step)
        alive.beat(step)
      preempted = checkpoint.reached_preemption(manager, step)
      if last or preempted or step % config.checkpoint.every == 0:
        writer.flush()
        data_state = {"round": round_, "iteration": iteration}
        checkpoint.save(manager, step, state, data_state, as_json, force=last or preempted)
      if preempted and not last:
        manager.wait_until_finished()
        logging.warning(
          "preempted: saved step %d to %s; start the same command again", step, workdir
        )
        sys.exit(hosts.PREEMPTED)
  return last_eval


def open_policy(path, changes, mesh, key):
  """The model to improve: the weights at `path`, with `changes` (dict) of their `ModelConfig`.

  A change of None is none. Adapters (model.lora_rank) are made with `key` where there are none yet.
  """
  if not path:
    raise ValueError("init_from is empty; name the instruction-tuned model to start from")
  ckpt = pretrained.from_pretrained(path, mesh=mesh)
  if ckpt.tokenizer is None or ckpt.mask_id < 0:
    raise ValueError(f"{path} has no tokenizer with a mask token; RL needs both")
  asked = {name: value for name, value in changes.items() if value is not None}
  model_config, params = dataclasses.replace(ckpt.config, **asked), ckpt.params
  theirs, ours = ((c.lora_rank, c.lora_alpha) for c in (ckpt.config, model_config))
  if ckpt.config.lora_rank and theirs != ours:
    raise ValueError(
      f"{path} has adapters of rank and alpha {theirs}, and model.lora_rank and lora_alpha are "
      f"{ours}: leave them None to go on with those, or merge them into the weights first, by making "
      "a Hugging Face folder (python -m diffucoder_jax.convert)"
    )
  if model_config.lora_rank and not ckpt.config.lora_rank:
    boxed = jax.eval_shape(functools.partial(init_params, Transformer(model_config)), key)
    params = lora.with_adapters(params, model_config, sharding.abstract(boxed, mesh), key)
  return dataclasses.replace(ckpt, config=model_config, params=params)


def initial_state(config, mesh, rounds, tx, key):
  """(abstract state, function from the policy's parameters to the first state)."""

  def init(key):
    return optim.init_state(init_params(rounds.model, key), tx)

  boxed = jax.eval_shape(init, key)
  train = sharding.abstract(boxed, mesh)
  with_ref = rounds.objective.beta > 0
  ref = optim.trained(train.params) if with_ref else {}
  empty = rollout.empty_batch(
    rounds.rows, rounds.grpo.num_iterations, rounds.length, with_ref, sharding.batch_sharding(mesh)
  )
  abstract = State(train.step, train.params, train.opt_state, ref, empty)

  def make(params):
    def first(params):
      state = optim.init_state(params, tx)
      ref = jax.tree.map(jnp.copy, optim.trained(params)) if with_ref else {}
      batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty)
      return State(state.step, state.params, state.opt_state, ref, batch)

    return jax.jit(first, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(params)

  return abstract, make


def write_lines(path, lines):
  """Writes a log whole; a round that is sampled again after a kill writes the same."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.parent / f"{path.name}.part"
  part.write_text("".join(lines))
  part.replace(path)


def check_collapse(workdir, writer, step, limits, grpo):
  """Compares the newest rounds with the run's first ones, and stops or warns; on all processes."""
  if step % (grpo.num_iterations * grpo.collapse_rounds):
    return
  found = []
  if sharding.is_main_process():  # which has the file
    writer.flush()
    rows = [row for row in metrics.read(workdir) if "reward" in row]
    first, now = (
      {name: float(np.mean([row[name] for row in part])) for name in ("reward", "entropy", "logp")}
      for part in (rows[: grpo.collapse_rounds], rows[-grpo.collapse_rounds :])
    )
    found = diagnostics.collapse(first, now, limits)
  for sentence in found:
    logging.warning("step %d: %s", step, sentence)
  if hosts.largest_everywhere(len(found)) and grpo.on_collapse == "stop":
    raise SystemExit(f"stopped at step {step}: {'; '.join(found)}. See grpo.on_collapse")


def replay(path):
  """Samples a logged round again, from the checkpoint that it began with, and compares.

  Returns:
    (answers that are the same token for token, answers).
  Raises:
    FileNotFoundError: there is no checkpoint of that step any more.
  """
  path = epath.Path(path)
  workdir = path.parent.parent
  logged = [json.loads(line) for line in path.read_text().splitlines()]
  step, round_ = logged[0]["step"], logged[0]["round"]
  config = config_dict.ConfigDict(json.loads((workdir / "config.json").read_text()))
  source = workdir / "checkpoints" / str(step) if step else config.init_from
  if step and not source.exists():
    raise FileNotFoundError(
      f"{path} was sampled from step {step}, and there is no {source}; keep it with "
      "checkpoint.every and checkpoint.keep"
    )
  mesh = sharding.make_mesh(config.mesh)
  jax.set_mesh(mesh)
  init_key, key, _ = jax.random.split(jax.random.key(config.seed), 3)
  ckpt = open_policy(source, config.model, mesh, init_key)
  prompts, _ = open_prompts(config, ckpt.tokenizer)
  rounds = Rounds(config, ckpt, mesh, prompts, None, key)
  _, trace = rounds.sample(round_, ckpt.params)
  again = rollout.completions(trace, rounds.sampler.max_new_tokens).tolist()
  same = sum(tokens == line["tokens"] for tokens, line in zip(again, logged, strict=True))
  print(f"{path}: {same} of {len(logged)} answers are the same, token for token")
  return same, len(logged)


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "what to run", lock_config=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "folder for everything the run writes")
  _REPLAY = flags.DEFINE_string("replay", None, "a file of WORKDIR/rollouts to sample again")

  def _main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
    hosts.start_distributed()
    if _REPLAY.value:
      same, count = replay(_REPLAY.value)
      sys.exit(0 if same == count else 1)
    if not (_CONFIG.value and _WORKDIR.value):
      raise app.UsageError("give --config and --workdir, or --replay")
    hosts.together(main, _CONFIG.value, _WORKDIR.value)

  app.run(_main)
