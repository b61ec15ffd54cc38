"""Rounds of coupled-GRPO on the host: sample, judge, score, and log what happened."""

import concurrent.futures
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffucoder_jax.diffusion import sampler
from diffucoder_jax.execution.worker import STATUSES
from diffucoder_jax.grpo import diagnostics, logps, masks, objective, rewards, rollout
from diffucoder_jax.model.transformer import Transformer, positions_of
from diffucoder_jax.runtime import optim, sharding

# How held-out answers are judged: all tests or nothing, whatever the form.
SOLVED = rewards.RewardConfig(weights={"solved": 1.0}, run="any", train_on_shared=True)


@dataclasses.dataclass(frozen=True)
class Grpo:
  """How often things happen. Unknown keys are a TypeError.

  Attributes:
    prompts: problems asked in a round.
    num_generations: G, answers to each.
    num_iterations: mu, optimiser steps on each round, with new masks each.
    ref_every, ref_alpha: the reference moves by `ref_alpha` towards the policy every so many steps.
      Paper versus code: the paper's Algorithm 1 copies; the recipe, through TRL, moves by 0.6 every 64.
    variance_every: rounds between two measurements of the estimator's variance; 0: never.
    on_collapse: "stop" or "warn"; the limits are in the config's `collapse`.
    collapse_rounds: over so many rounds metrics are averaged before they are compared.
  """

  prompts: int = 8
  num_generations: int = 10
  num_iterations: int = 2
  ref_every: int = 64
  ref_alpha: float = 0.6
  variance_every: int = 0
  on_collapse: str = "warn"
  collapse_rounds: int = 10

  def __post_init__(self):
    for name in ("prompts", "num_iterations", "ref_every", "collapse_rounds"):
      if getattr(self, name) < 1:
        raise ValueError(f"grpo.{name} is {getattr(self, name)}; it must be at least 1")
    if self.num_generations < 2:
      raise ValueError("grpo.num_generations must be at least 2: an advantage compares answers")
    if self.on_collapse not in ("stop", "warn"):
      raise ValueError(f"grpo.on_collapse is {self.on_collapse!r}; choose 'stop' or 'warn'")


def draw_passes(key, batch, estimator, new):
  """The masks of one inner iteration of a round."""
  return masks.draw_masks(
    key, batch["rows"], batch["completion"], estimator, group_ids_B=batch["groups"],
    scored_BL=batch["scored"], prompt_BL=batch["valid"] & ~batch["completion"], max_tokens=new,
  )  # fmt: skip


def score(model, estimator, mask_id, new, params, batch, key):
  """Scores [B, L] of a round's answers; the same for the sampling policy and the reference."""
  passes = draw_passes(key, batch, estimator, new)
  return logps.token_logps(
    model, params, batch["tokens"], batch["valid"].astype(jnp.int32), positions_of(batch["valid"]),
    passes, mask_id,
  )  # fmt: skip


class Rounds:
  """Samples, judges and scores rounds. One for a run: it holds what all rounds share."""

  def __init__(self, config, ckpt, mesh, prompts, sandbox, key, order=None):
    """Args as `train_grpo.main` makes them.

    order: (step_BL, scored_BL) -> dict of floats, metrics of the order in which tokens were written.
    """
    c = self.config = config
    self.order = order or (lambda step_BL, scored_BL: {})
    self.ckpt, self.mesh, self.prompts, self.sandbox, self.key = ckpt, mesh, prompts, sandbox, key
    self.grpo, self.estimator = Grpo(**c.grpo), masks.Estimator(**c.estimator)
    self.objective = objective.Objective(**c.objective)
    self.reward = rewards.RewardConfig(**c.reward.to_dict())
    self.sampler = sampler.SamplerConfig(**c.sampler)
    if self.reward.fence == "strict" and self.sampler.stop_at_eos:
      raise ValueError(
        "reward.fence 'strict' wants the newline after an answer's end token, and with "
        "sampler.stop_at_eos nothing is written there; set one of them otherwise"
      )
    self.model = Transformer(ckpt.config)
    tokenizer = ckpt.tokenizer
    self.end_id = tokenizer.end_of_turn_id if tokenizer.end_of_turn_id >= 0 else ckpt.eos_id
    self.rows = self.grpo.prompts * self.grpo.num_generations
    self.length = c.rollout.max_prompt_tokens + self.sampler.max_new_tokens
    self.batch_size = c.rollout.get("batch_size", 0) or self.rows  # younger than some logged rounds
    ids = np.arange(self.rows, dtype=np.int32)
    if self.rows % sharding.batch_shards(mesh):
      raise ValueError(
        f"grpo.prompts x grpo.num_generations is {self.rows} rows, which {sharding.batch_shards(mesh)} "
        "parts of the mesh cannot share equally; make it a multiple"
      )
    self.block = self.part(self.rows)
    self.ids = {"rows": ids[self.block], "groups": ids[self.block] // self.grpo.num_generations}
    self.score = jax.jit(
      functools.partial(
        score, self.model, self.estimator, ckpt.mask_id, self.sampler.max_new_tokens
      )
    )
    by_row = sharding.batch_sharding(mesh)
    self.stack = jax.jit(self._stack, out_shardings=by_row)
    self.take = jax.jit(
      lambda batch, rows_B: jax.tree.map(lambda x: x[rows_B], batch), out_shardings=by_row
    )
    self.measure = jax.jit(self._measure)
    self.judge = concurrent.futures.ThreadPoolExecutor(1)

  def part(self, rows):
    """This process's part of a batch of so many rows."""
    index, count = sharding.batch_shard(self.mesh)
    return slice(index * rows // count, (index + 1) * rows // count)

  def _stack(self, scores):
    return jnp.stack(scores, axis=1) if scores else jnp.zeros((self.rows, 1, self.length))

  def _measure(self, params, batch, key):
    one = lambda key, estimator: score(  # noqa: E731
      self.model, estimator, self.ckpt.mask_id, self.sampler.max_new_tokens, params, batch, key
    )
    return diagnostics.estimator_variance(one, self.estimator, key, 4, batch["scored"])

  def keys(self, round_):
    """(key of the sampling, [keys of the masks of each inner iteration]) of a round."""
    sample, mask = jax.random.split(jax.random.fold_in(self.key, round_))
    return sample, [jax.random.fold_in(mask, i) for i in range(self.grpo.num_iterations)]

  def sample(self, round_, params):
    """(problems of this process's rows, their trace)."""
    chosen = rollout.problems_of_round(
      round_, self.grpo.prompts, len(self.prompts.problems), self.config.seed
    )
    chosen = np.repeat(chosen, self.grpo.num_generations)
    ids = [self.prompts.ids[i] for i in chosen]
    trace = self.answers(ids, params, self.keys(round_)[0], self.sampler)
    mine = jax.tree.map(lambda x: x[self.block], trace)
    return [self.prompts.problems[i] for i in chosen[self.block]], mine

  def answers(self, ids, params, key, config):
    """`rollout.sample` with what all rounds share; all rows on every host."""
    return rollout.sample(
      self.ckpt.config, params, ids, key, config, self.ckpt.mask_id, self.end_id, self.mesh,
      self.length, self.batch_size,
    )  # fmt: skip

  def texts(self, trace):
    """What was written, up to the end token."""
    tokenizer = self.ckpt.tokenizer
    rows = rollout.completions(trace, self.sampler.max_new_tokens).tolist()
    if self.reward.fence == "strict":  # which looks at what follows the end, too
      return [tokenizer.decode(row) for row in rows]
    ends = {self.end_id, self.ckpt.eos_id, self.ckpt.pad_id, self.ckpt.mask_id}
    return [tokenizer.decode(rollout.answer_ids(row, ends)) for row in rows]

  def solved(self, problems, ids, params, key, config):
    """Answers each problem once, and says which answers pass all tests.

    Args:
      problems: list of `Problem`. ids: their prompts' tokens. params: the policy. key: PRNG key;
        answer i draws from fold_in(key, i). config: `SamplerConfig`.
    Returns:
      float [problems], 1 or 0, NaN where nobody knows; and {i: text} of this process's answers.
    """
    trace = self.answers(ids, params, key, config)
    size = len(ids) + -len(ids) % sharding.batch_shards(self.mesh)
    mine = np.minimum(np.arange(size), len(ids) - 1)[self.part(size)]
    texts = self.texts(jax.tree.map(lambda x: x[mine], trace))
    scored = rewards.score([problems[i] for i in mine], texts, self.sandbox, SOLVED)
    found = sharding.all_rows(np.asarray([one.reward for one in scored]), self.mesh)
    return found[: len(ids)], dict(zip(mine.tolist(), texts, strict=True))

  def collect(self, round_, params, ref):
    """A round: sampled, judged, scored.

    Args:
      round_: its number. params: the policy. ref: the trained part of the reference, {} for none.
    Returns:
      (`rollout.Batch` on the device, metrics, lines for the log).
    """
    began = time.monotonic()
    problems, trace = self.sample(round_, params)
    texts = self.texts(trace)
    sampled = time.monotonic()
    judged = self.judge.submit(rewards.score, problems, texts, self.sandbox, self.reward)

    # While the answers run, the device scores them: neither needs the rewards.
    arrays = rollout.make_batch(trace, self.sampler.max_new_tokens, self.end_id)
    placed = sharding.put_batch({**arrays, **self.ids}, self.mesh)
    old, ref_scores = self.scores(round_, params, ref, placed)
    scored = time.monotonic()
    found = judged.result()
    waited = time.monotonic()

    # Advantages compare the answers of a group, which other hosts may hold.
    rewards_PG, valid_PG = self.grouped(found)
    c = self.objective
    advantages_PG = objective.advantages(rewards_PG, c.advantage, c.scale_std, valid_PG)
    selection = objective.select_groups(rewards_PG, c.zero_variance, valid_PG)
    used_PG = valid_PG & selection.used[:, None]
    local = {"advantages": advantages_PG.ravel()[self.block], "used": used_PG.ravel()[self.block]}
    batch = rollout.Batch(**placed, **sharding.put_batch(local, self.mesh), old=old, ref=ref_scores)
    if c.zero_variance == "substitute":
      batch = self.substituted(batch, selection.index)

    row = {
      **diagnostics.reward_summary(rewards_PG, valid_PG),
      **self.about(trace, arrays, found),
      "rollout_tokens_per_second": self.rows * self.sampler.max_new_tokens / (sampled - began),
      "rollouts_per_second": self.rows / (sampled - began),
      "judged_per_second": self.rows / max(waited - sampled, 1e-9),
      "seconds/rollout": sampled - began,
      "seconds/scoring": scored - sampled,
      "seconds/waiting_for_judge": waited - scored,
    }
    if not valid_PG.any():  # a reward of 0 would be a claim
      del row["reward"], row["reward_std"]
    if self.grpo.variance_every and round_ % self.grpo.variance_every == 0:
      row |= self.variance(round_, params, placed)
    return batch, row, self.lines(round_, problems, texts, trace, found, local["advantages"])

  def scores(self, round_, params, ref, placed):
    """(old, reference) scores with the masks of each inner iteration, [B, I, L], on the device."""
    keys = self.keys(round_)[1]
    old = [self.score(params, placed, key) for key in keys]
    ref_scores = []
    if self.objective.beta:
      reference = optim.joined(params, ref)
      ref_scores = [self.score(reference, placed, key) for key in keys]
    return jax.block_until_ready((self.stack(old), self.stack(ref_scores)))

  def grouped(self, found):
    """(rewards, whether they count), [prompts, G], of all hosts."""
    shape = (self.grpo.prompts, self.grpo.num_generations)
    valid_B = sharding.all_rows(np.asarray([one.valid for one in found]), self.mesh)
    reward_B = sharding.all_rows(np.asarray([one.reward for one in found]), self.mesh)
    return np.where(valid_B, reward_B, 0.0).reshape(shape), valid_B.reshape(shape)

  def about(self, trace, arrays, found):
    """Metrics of the answers and verdicts of all hosts."""
    whole = lambda x: sharding.all_rows(np.asarray(x), self.mesh)  # noqa: E731
    scored_BL = whole(arrays["scored"])
    summary = diagnostics.answer_summary(
      scored_BL, whole(arrays["completion"]), whole(trace.entropy)
    )
    summary |= self.order(whole(trace.step), scored_BL)
    valid_B = whole([one.valid for one in found])
    parts = {}
    for name in self.reward.weights:
      part_B = whole([one.parts[name] for one in found])[valid_B]
      parts |= {f"reward/{name}": float(part_B.mean())} if len(part_B) else {}
    counts = rewards.counts(found)
    names = [*rewards.counts([]), *(f"judged_{status}" for status in STATUSES)]
    # Each host counts what it ran: a row for each.
    sums = whole([[counts.get(name, 0) for name in names]]).sum(axis=0).tolist()
    counted = {
      f"judged/{name}": count
      for name, count in zip(names, sums, strict=True)
      if count or not name.startswith("judged_")
    }
    nfe = float(np.mean(whole(trace.nfe)))
    return {**jax.device_get(summary), "nfe": nfe, **parts, **counted}

  def substituted(self, batch, index_P):
    """Other groups' rows, with their masks, in the place of those that teach nothing."""
    rows = (np.asarray(index_P)[:, None] * self.grpo.num_generations
            + np.arange(self.grpo.num_generations)).ravel()  # fmt: skip
    return self.take(batch, rows)

  def variance(self, round_, params, placed):
    """The estimator's variance on this round's answers, beside that of `decoupled`."""
    key = jax.random.fold_in(self.keys(round_)[0], self.rows)
    found = jax.device_get(self.measure(params, placed, key))
    return {f"estimator/{name}": float(value) for name, value in found.items()}

  def lines(self, round_, problems, texts, trace, found, advantages):
    """One JSON object for each of this process's rows: readable, and enough to sample it again."""
    key = jax.random.key_data(self.keys(round_)[0]).tolist()
    rows = rollout.completions(trace, self.sampler.max_new_tokens).tolist()
    lines = []
    for i, (problem, one) in enumerate(zip(problems, found, strict=True)):
      outcome = one.outcome
      line = {
        "round": round_, "row": self.block.start + i, "step": round_ * self.grpo.num_iterations,
        "task_id": problem.task_id, "prompt": problem.prompt, "completion": texts[i],
        "reward": one.reward if one.valid else None, "valid": one.valid,
        "parts": one.parts if one.valid else None,
        "tests": list(outcome.tests) if outcome else None,
        "message": outcome.message if outcome else "not run",
        "advantage": float(advantages[i]), "key": key, "tokens": rows[i],
      }  # fmt: skip
      lines.append(json.dumps(line) + "\n")
    return lines

  def path(self, folder, number):
    """Where this process logs its rows of round or step `number`."""
    index, count = sharding.batch_shard(self.mesh)
    part = "" if count == 1 else f".{index}-of-{count}"
    return folder / f"{number:06d}{part}.jsonl"
