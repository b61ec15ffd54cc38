"""Trains a network: autoregressive, adaptation to diffusion, or continued diffusion pre-training.

  python -m diffucoder_jax.train --config=configs/quickstart_ar.py --workdir=WORKDIR

Started again with the same workdir it goes on where it stopped, bitwise. One command runs the same
on every host of a pod.
"""

import dataclasses
import functools
import json
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from diffucoder_jax import completion, pretrained
from diffucoder_jax.data import batching, pipeline
from diffucoder_jax.data import corpus as corpora
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.diffusion import loss, process
from diffucoder_jax.diffusion.sampler import SamplerConfig
from diffucoder_jax.evals import held_out
from diffucoder_jax.model import attention
from diffucoder_jax.model.config import ModelConfig, train_flops_per_token
from diffucoder_jax.model.transformer import Transformer, init_params, output_matrix
from diffucoder_jax.runtime import checkpoint, heartbeat, hosts, metrics, optim, sharding
from diffucoder_jax.runtime import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is learnt. Unknown keys are a TypeError.

  `kind` "autoregressive" reads none of the others. "diffusion" with `anneal_steps` > 0 goes from
  causal to full attention over that many steps (adaptation); with 0 it is full from the start.
  Paper versus code: the paper gives neither the distribution of t nor the normaliser. The defaults
  are DiffuLLaMA's, whose recipe DiffuCoder follows: t uniform in (1e-3, 1), weight 1/t, divided by
  the number of masked tokens.
  """

  kind: str = "diffusion"
  anneal_steps: int = 0
  t_sampler: str = "uniform"
  weight: str = "1/t"
  normaliser: str = "masked"
  truncate_prob: float = 0.0  # the paper's stage 1: 0.01
  prefix_prob: float = 0.0  # the paper's stage 1: 0.01
  # Instruction data: prompts are noised too in a share of the rows that falls from 1 to 0 over
  # these steps (the paper's first epoch of stage 3); 0: prompts are never noised.
  condition_steps: int = 0

  def __post_init__(self):
    if self.kind not in PREPARE:
      raise ValueError(f"objective.kind is {self.kind!r}; choose one of {sorted(PREPARE)}")


# ---------------------------------------------------------------------------------------------
# One step


def _prepare_diffusion(objective, mask_id, batch, step, key):
  vary_key, noise_key = jax.random.split(key)
  maskable_BL = batch["maskable"]
  if "prompt" in batch and objective.condition_steps:
    share = jnp.maximum(0.0, 1.0 - step / objective.condition_steps)
    prompt_BL = batch["prompt"] & (batch["positions"] > 0)  # nothing predicts a row's first token
    maskable_BL |= process.unconditional(jax.random.fold_in(key, 3), prompt_BL, share)
  segment_ids_BL, maskable_BL = process.vary_rows(
    vary_key, batch["segment_ids"], maskable_BL, objective.truncate_prob, objective.prefix_prob
  )
  noised = process.forward_process(
    noise_key, batch["tokens"], maskable_BL, mask_id, objective.t_sampler
  )
  return {**batch, "segment_ids": segment_ids_BL, "maskable": maskable_BL, "noised": noised}


# What the whole batch goes through before it is cut into micro-batches: all the randomness.
PREPARE = {
  "autoregressive": lambda objective, mask_id, batch, step, key: batch,
  "diffusion": _prepare_diffusion,
}


def attention_pattern(objective, step, key):
  """Who sees whom at this step: causal, annealed over `anneal_steps`, or full."""
  if objective.kind == "autoregressive":
    return attention.CAUSAL
  if objective.anneal_steps == 0:
    return attention.FULL
  return attention.annealed(jnp.minimum(1.0, (step + 1) / objective.anneal_steps), key)


def loss_of(model, objective, pattern, params, rows):
  """((sum, weight), metrics as (sum, weight) pairs) of some rows; see `loss.py`."""
  noised = rows.get("noised")
  inputs_BL = rows["tokens"] if noised is None else noised.tokens
  features_BLD = model.apply(
    {"params": params}, inputs_BL, rows["segment_ids"], rows["positions"], pattern
  )
  matrix_DV = output_matrix(params)
  if noised is None:
    total, _ = loss.autoregressive_loss(features_BLD, matrix_DV, rows["tokens"], rows["maskable"])
    return total, {}
  total, nll_BL = loss.masked_diffusion_loss(
    features_BLD, matrix_DV, rows["tokens"], noised, rows["maskable"], rows["segment_ids"],
    objective.weight, objective.normaliser,
  )  # fmt: skip
  masked = jnp.sum(noised.masked).astype(jnp.float32)
  maskable = jnp.sum(rows["maskable"]).astype(jnp.float32)
  return total, {"masked_nll": (jnp.sum(nll_BL), masked), "mask_rate": (masked, maskable)}


def train_step(model, tx, objective, mask_id, accumulate, state, batch, key):
  """One optimiser step. Returns (state, metrics); everything random comes from (key, step)."""
  key = jax.random.fold_in(key, state.step)
  # 0 and 1 are the keys that `split` gives to the noise, 3 is that of the prompts, 4 of rounding.
  pattern = attention_pattern(objective, state.step, jax.random.fold_in(key, 2))
  batch = PREPARE[objective.kind](objective, mask_id, batch, state.step, key)
  loss_fn = functools.partial(loss_of, model, objective, pattern)
  (value, extra), grads = optim.accumulated_value_and_grad(loss_fn, state.params, batch, accumulate)
  metrics_ = {"loss": value, "grad_norm": optax.tree.norm(grads), **extra}
  state = optim.apply_gradients(state, grads, tx, jax.random.fold_in(key, 4))
  return state, metrics_


def make_step_fn(model, tx, objective, mask_id, accumulate, abstract, mesh):
  """`train_step` compiled for a state like `abstract`, which it takes over and gives back in place."""
  return jax.jit(
    functools.partial(train_step, model, tx, objective, mask_id, accumulate),
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), sharding.replicated(mesh)),
  )


# ---------------------------------------------------------------------------------------------
# The program


def open_tokenizer(config):
  """The tokenizer of `config.tokenizer`, or the one that came with the weights of `init_from`."""
  theirs = pretrained.load_tokenizer_of(config.init_from) if config.init_from else None
  if not config.tokenizer:
    if theirs is None:
      raise ValueError(
        "no tokenizer: set --config.tokenizer to a tokenizer.model or tokenizer.json, or "
        "--config.init_from to weights that have one beside them"
      )
    return theirs
  tokenizer = load_tokenizer(config.tokenizer)
  if theirs is not None and theirs.fingerprint() != tokenizer.fingerprint():
    raise ValueError(
      f"the weights in {config.init_from} were made with another tokenizer than {config.tokenizer}; "
      "leave --config.tokenizer empty to use theirs"
    )
  return tokenizer


def check_tokenizer(tokenizer, model_config, objective):
  """Refuses ids that the embedding does not have, and diffusion without a mask token."""
  named = (tokenizer.mask_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
  largest = max(tokenizer.vocab_size - 1, *named)
  if largest >= model_config.vocab_size:
    raise ValueError(
      f"the tokenizer has ids up to {largest}, but model.vocab_size is {model_config.vocab_size}; "
      "set model.vocab_size to at least one more, or use the tokenizer the model was made with"
    )
  if objective.kind == "diffusion" and tokenizer.mask_id < 0:
    raise ValueError("this tokenizer has no mask token; diffusion needs one (<|mask|> or <mask>)")


def initial_state(config, mesh, model, tx, key):
  """(abstract state, function that makes the first state: from `init_from`, or fresh)."""

  def init(key):
    return optim.init_state(init_params(model, key), tx)

  boxed = jax.eval_shape(init, key)
  abstract = sharding.abstract(boxed, mesh)
  placed = sharding.shardings(boxed, mesh)

  def make():
    if not config.init_from:
      return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=placed)(key)
    logging.info("parameters from %s", config.init_from)
    params = pretrained.load_params(config.init_from, model.config, abstract.params, key)
    return jax.jit(functools.partial(optim.init_state, tx=tx), out_shardings=placed)(params)

  return abstract, make


def write_samples(ckpt, rows, eval_config, path):
  """Completes the beginnings of held-out rows, and writes them beside what stood there as jsonl.

  Args:
    ckpt: `pretrained.Pretrained`. rows: the held-out rows, of one source or of several.
    eval_config: `samples`, how many of each source; `sample_tokens`, how long; `sample_steps`.
    path: of the file.
  """
  c, lines = eval_config, []
  sampler = SamplerConfig(
    alg="left_to_right" if ckpt.config.attention == "causal" else "entropy",
    steps=c.sample_steps, max_new_tokens=c.sample_tokens, temperature=0.0, top_p=1.0,
  )  # fmt: skip
  for source, part in pipeline.parts(rows).items():
    prompts, references = pipeline.prompts(part, c.samples, c.sample_tokens)
    for i, done in enumerate(completion.generate(ckpt, prompts, sampler, batch_size=c.samples)):
      prompt, reference = (ckpt.tokenizer.decode(x) for x in (prompts[i], references[i]))
      line = {"source": source, "prompt": prompt, "completion": done.text, "reference": reference}
      lines.append(json.dumps(line) + "\n")
  if sharding.is_main_process():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def main(config, workdir):
  """Trains to `config.optim.steps`, continuing where `workdir` left off.

  Args:
    config: as the files in `configs/` make it.
    workdir: folder for everything the run writes; may be gs://.
  Returns:
    the last held-out (bits_per_byte, standard error).
  Raises:
    SystemExit: with code 42 after a preemption, when the state has been saved.
  """
  workdir = workdirs.absolute(workdir)
  hosts.check_same_everywhere({**hosts.versions(), **workdirs.flat(config.to_dict(), "config")})

  # Where: devices and randomness.
  mesh = sharding.make_mesh(config.mesh)
  jax.set_mesh(mesh)
  sharding.log_mesh(mesh)
  init_key, data_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)

  # What: text, network, optimiser.
  objective = Objective(**config.objective)
  model = Transformer(ModelConfig(**{**config.model, "attention": pattern_name(objective)}))
  tx, learning_rate = optim.make_optimizer(config.optim)
  tokenizer = open_tokenizer(config)
  check_tokenizer(tokenizer, model.config, objective)
  corpus = corpora.open_corpus(config.data, tokenizer, config.seed)
  hosts.check_same_everywhere(
    {"the tokenizer": tokenizer.fingerprint(), "the text": corpus.fingerprint}
  )
  placed_rows = batching.placed_rows(config.data, sharding.batch_shards(mesh))
  batches = batching.train_batches(
    corpus.train, config.data, config.seed, sharding.batch_shard(mesh), placed_rows
  )

  # State, by precedence: 1. this workdir's checkpoint  2. config.init_from  3. fresh.
  as_json = {**config.to_dict(), "model": dataclasses.asdict(model.config)}
  workdirs.claim_workdir(workdir, as_json)
  if sharding.is_main_process():
    tokenizer.save(workdir)
  abstract, make_state = initial_state(config, mesh, model, tx, init_key)
  optim.log_trained(abstract.params)
  manager = checkpoint.open_manager(workdir, config.checkpoint)
  resumed = checkpoint.resume(manager, workdir, abstract, as_json)
  if resumed is None:
    state, start = make_state(), 0
  else:
    state, data_state, start = resumed
    if data_state["corpus"] != corpus.fingerprint:
      raise ValueError(
        f"the text or tokenizer changed since checkpoint {start} of {workdir} was made; restore "
        "them, or use a new workdir with --config.init_from"
      )
    batches.set_state(data_state["batches"])
  checkpoint.catch_sigterm()

  # Held-out rows are fixed; so are their noise and their order.
  token_bytes_V = np.asarray(tokenizer.token_bytes())
  eval_sets, unigram = {}, {}
  if config.eval.every:
    eval_sets = held_out.load_sets(
      pipeline.parts(corpus.held_out), config.eval, config.data.global_batch, token_bytes_V, mesh,
      placed_rows,
    )
    if hasattr(corpus.train, "scored_counts"):
      unigram["eval/unigram_bits_per_byte"] = pipeline.unigram_bits_per_byte(
        corpus.train, corpus.held_out, token_bytes_V, config.eval.rows
      )
  autoregressive = objective.kind == "autoregressive"
  draws = 1 if autoregressive else config.eval.draws
  nats_fn = held_out.make_nats_fn(model, autoregressive, tokenizer.mask_id, draws, mesh)

  # Loop: metrics stay on the device and are read one step late, so that it never waits for us.
  # When annealing is over attention is full, which has faster kernels: the same step, compiled anew.
  annealing_fn, open_fn = (
    make_step_fn(model, tx, what, tokenizer.mask_id, config.optim.accumulate, abstract, mesh)
    for what in (objective, dataclasses.replace(objective, anneal_steps=0))
  )
  tokens_per_step = config.data.global_batch * config.data.seq_len
  flops_per_step = train_flops_per_token(model.config, config.data.seq_len) * tokens_per_step
  writer = metrics.Writer(workdir, start + 1, config.log)
  progress = metrics.Progress(config.optim.steps, start)
  alive = heartbeat.Heartbeat(config.hosts.hang_seconds)
  # All at once: one by one they would queue up on the device, behind the step that is running.
  rates = jax.device_get(jax.vmap(learning_rate)(np.arange(config.optim.steps)))
  last_eval = None
  pending = None  # (step, metrics still on the device)
  clock = (start, time.monotonic())  # of the last row written

  def flush():
    nonlocal pending, clock
    if pending is None:
      return
    (step, on_device), (last_step, last_time) = pending, clock
    row = {**jax.device_get(on_device), "learning_rate": float(rates[step - 1])}
    pending, clock = None, (step, time.monotonic())
    seconds = (clock[1] - last_time) / (step - last_step)
    row["tokens_per_second"] = tokens_per_step / seconds
    row["mfu"] = metrics.mfu(flops_per_step, seconds, jax.devices())
    row |= pipeline.sources_seen(corpus.train, step * config.data.global_batch) | alive.report()
    progress.update(step, writer.write(step, row))

  with alive, manager, writer:  # which wait for a save in flight, however the loop ends
    for step in range(start + 1, config.optim.steps + 1):
      step_fn = annealing_fn if step < objective.anneal_steps else open_fn
      began = time.monotonic()
      batch = sharding.put_batch(next(batches), mesh)
      own = time.monotonic() - began
      state, on_device = step_fn(state, batch, data_key)
      flush()
      alive.beat(step, own)
      last = step == config.optim.steps
      if step % config.log.every == 0 or last:
        pending = (step, on_device)
      preempted = checkpoint.reached_preemption(manager, step)
      if config.eval.every and (step % config.eval.every == 0 or last):
        flush()
        began = time.monotonic()
        row = held_out.evaluate(nats_fn, draws, eval_sets, state.params, eval_key)
        last_eval = row["eval/bits_per_byte"], row["eval/bits_per_byte_se"]
        if config.eval.samples:
          ckpt = pretrained.Pretrained(
            model.config, state.params, tokenizer, tokenizer.mask_id, tokenizer.eos_id,
            tokenizer.pad_id, mesh,
          )  # fmt: skip
          write_samples(ckpt, corpus.held_out, config.eval, workdir / "samples" / f"{step}.jsonl")
        seconds = time.monotonic() - began
        writer.write(step, {**row, **unigram, "eval/seconds": seconds})
        alive.beat(step)
        clock = (clock[0], clock[1] + seconds)
      due = last or preempted
      if due or step % config.checkpoint.every == 0:
        # What is on file never lags behind a checkpoint, and a loss that is not finite is never saved.
        if clock[0] < step:
          pending = (step, on_device)
        flush()
        writer.flush()
        data_state = {"batches": batches.get_state(), "corpus": corpus.fingerprint}
        checkpoint.save(manager, step, state, data_state, as_json, force=due)
      if preempted and not last:
        manager.wait_until_finished()
        logging.warning(
          "preempted: saved step %d to %s; start the same command again", step, workdir
        )
        sys.exit(hosts.PREEMPTED)
    flush()
  return last_eval


def pattern_name(objective):
  """The attention pattern the trained weights are for, by which a checkpoint is used later."""
  return "causal" if objective.kind == "autoregressive" else "full"


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "what to run", lock_config=True)
  _WORKDIR = flags.DEFINE_string("workdir", None, "folder for everything the run writes")
  flags.mark_flags_as_required(["config", "workdir"])

  def _main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
    hosts.start_distributed()
    hosts.together(main, _CONFIG.value, _WORKDIR.value)

  app.run(_main)
