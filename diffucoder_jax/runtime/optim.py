"""The optimiser: AdamW with warm-up, gradient clipping, and gradients summed over micro-batches.

A tree of parameters with low-rank adapters in it (branches whose names end in `ADAPTER`) is trained
in these alone: the rest gets no gradient and no optimiser state, and passes through unchanged.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from absl import logging

from diffucoder_jax.runtime import sharding

NOT_MATRICES = ("scale", "bias")
ADAPTER = "_lora"

# Each takes (peak, floor, decay_steps) and gives the learning rate after the warm-up.
SCHEDULES = {
  "constant": lambda peak, floor, steps: optax.constant_schedule(peak),
  "linear": lambda peak, floor, steps: optax.linear_schedule(peak, floor, steps),
  "cosine": lambda peak, floor, steps: optax.cosine_decay_schedule(peak, steps, floor / peak),
}


@flax.struct.dataclass
class TrainState:
  """What training changes and a checkpoint keeps.

  Attributes:
    step: int32 scalar, number of finished optimiser steps.
    params: tree of parameters.
    opt_state: Optax state; its moments are float32 and sharded like `trained(params)`.
  """

  step: jax.Array
  params: Any
  opt_state: Any


def init_state(params, tx):
  """A fresh `TrainState`; Linen metadata boxes in `params` carry over to the optimiser's state."""
  opt_state = tx.init(trained(params))
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def _adapters(tree):
  found = {}
  for name, branch in tree.items():
    if isinstance(branch, dict):
      branch = branch if name.endswith(ADAPTER) else _adapters(branch)
      if branch:
        found[name] = branch
  return found


def trained(params):
  """The part of a tree (nested dicts) that training changes: its adapters; all if it has none."""
  return _adapters(params) or params


def joined(params, part):
  """`params` with the leaves of `part`, nested dicts too, put over its own or beside them."""
  inner = {
    name: joined(params[name], branch) if isinstance(branch, dict) and name in params else branch
    for name, branch in part.items()
  }
  return {**params, **inner}


def log_trained(params):
  """One line saying how many parameters are trained; abstract ones will do. Returns both counts."""
  count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
  some, every = count(trained(params)), count(params)
  logging.info(
    "training %s of %s parameters (%.3g %%)", f"{some:,}", f"{every:,}", 100 * some / every
  )
  return some, every


def _pick(what, name, choices):
  if name not in choices:
    raise ValueError(f"optim.{what} is {name!r}; choose one of {sorted(choices)}")
  return choices[name]


def make_learning_rate(optim_config):
  """The learning rate by number of finished steps: linear warm-up from 0, then `schedule`.

  "cosine" and "linear" end at `lr_floor` (a share of the peak) at step `steps` and stay there.
  DiffuCoder uses the cosine to 10 % of the peak (Gong et al. 2025).
  """
  c = optim_config
  schedule = _pick("schedule", c.schedule, SCHEDULES)
  if not c.lr > 0:
    raise ValueError(f"optim.lr is {c.lr}; it must be positive")
  if not 0 <= c.lr_floor <= 1:
    raise ValueError(f"optim.lr_floor is {c.lr_floor}; it is a share of optim.lr, between 0 and 1")
  if not 0 <= c.warmup_steps < c.steps:
    raise ValueError(
      f"optim.warmup_steps is {c.warmup_steps}; it must lie between 0 and optim.steps - 1 "
      f"({c.steps - 1})"
    )
  after = schedule(c.lr, c.lr * c.lr_floor, c.steps - c.warmup_steps)
  if not c.warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, c.lr, c.warmup_steps)
  return optax.join_schedules([warmup, after], [c.warmup_steps])


def _is_matrix(params):
  """True at each leaf that is not a scale or a bias, going by the name it has in the module."""

  def one(path, _):
    # Linen metadata boxes add an attribute below the name, hence the last *dict* key.
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1] not in NOT_MATRICES

  return jax.tree_util.tree_map_with_path(one, params)


# "all" is what torch.optim.AdamW does when it is given model.parameters().
DECAYS = {"matrices": _is_matrix, "all": None}


def _in_float32(tx):
  """Runs `tx` on float32 gradients, parameters and state, whatever the parameters' type.

  bfloat16 has 8 bits: a second moment kept in it stops moving for b2 = 0.999.
  """
  cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
  return optax.GradientTransformation(
    lambda params: tx.init(cast(params)),
    lambda grads, state, params: tx.update(cast(grads), state, cast(params)),
  )


def make_optimizer(optim_config):
  """AdamW (Loshchilov & Hutter 2019) after clipping the gradient by its global norm.

  Args:
    optim_config: steps, lr, warmup_steps, schedule ("cosine", "constant" or "linear"), lr_floor
      (share of lr), b1, b2, eps, weight_decay, decay ("matrices": all but leaves named `scale` or
      `bias`; "all"), clip_norm (0 = do not clip). Adapters are matrices: decay draws both factors
      to zero, and so the network to the one that it adapts, whose weights never decay.
  Returns:
    (tx, learning_rate_fn): the Optax transformation, and step -> learning rate.
  Raises:
    ValueError: names the key and the values it may have.
  """
  c = optim_config
  learning_rate = make_learning_rate(c)
  if c.clip_norm < 0:
    raise ValueError(f"optim.clip_norm is {c.clip_norm}; it must be positive, or 0 for no clipping")
  tx = optax.chain(
    optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
    optax.adamw(
      learning_rate,
      b1=c.b1,
      b2=c.b2,
      eps=c.eps,
      weight_decay=c.weight_decay,
      mask=_pick("decay", c.decay, DECAYS),
    ),
  )
  return _in_float32(tx), learning_rate


def _micro_batches(batch, accumulate):
  """[B, ...] -> [A, B/A, ...], each micro-batch spread over all devices.

  Devices hold neighbouring rows, so reshaping to [A, B/A] would put one micro-batch on 1/A of the
  devices and the rest would wait or rows would have to travel. [B/A, A] only splits what lies
  inside one device's block; micro-batch i gets the rows i, i + A, i + 2A, ...
  """

  def split(x):
    if x.shape[0] % accumulate:
      raise ValueError(
        f"a batch of {x.shape[0]} rows cannot be cut into optim.accumulate={accumulate} equal "
        "micro-batches; make data.global_batch a multiple of it"
      )
    return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

  return jax.tree.map(split, batch)


def accumulated_value_and_grad(loss_fn, params, batch_tree, accumulate):
  """Loss and gradients of the whole batch, computed in `accumulate` slices to save memory.

  Sums are added up and divided once by the total weight, so that slices with few masked tokens do
  not count for more and any `accumulate` gives the result of the whole batch. All randomness must
  therefore come in `batch_tree`, row by row (noise, or keys made from the global row).

  Args:
    loss_fn: (params, micro_batch) -> ((loss_sum, weight), aux). `aux` is a dict of (sum, weight)
      pairs of scalars.
    params: tree of parameters (nested dicts).
    batch_tree: tree of arrays whose first dimension is the global batch B.
    accumulate: number of slices; divides B. 1 builds no loop.
  Returns:
    ((loss, metrics), grads): float32 loss_sum / weight; dict name -> float32 sum / weight for each
    pair in aux; float32 gradients of the loss, for `trained(params)` only: no others are computed.
    A total weight of 0 (no token was masked) gives 0, also for the gradients, and not NaN.
  Raises:
    ValueError: `accumulate` does not divide the batch.

  The running sums get the sharding of what they end up in, so pin the step's `out_shardings`.
  """
  if accumulate < 1:
    raise ValueError(f"optim.accumulate is {accumulate}; it must be at least 1")

  def sums(micro_batch):
    def total(part):
      (loss_sum, weight), aux = loss_fn(joined(params, part), micro_batch)
      return loss_sum, (weight, aux)

    (loss_sum, (weight, aux)), grads = jax.value_and_grad(total, has_aux=True)(trained(params))
    tree = ((loss_sum, weight), aux, grads)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

  if accumulate == 1:
    (loss_sum, weight), aux, grads = sums(batch_tree)
  else:
    micro_batches = _micro_batches(batch_tree, accumulate)

    def add(so_far, micro_batch):
      pin = lambda x: sharding.constrain(x, "batch", *[None] * (x.ndim - 1))  # noqa: E731
      more = sums(jax.tree.map(pin, micro_batch))
      return jax.tree.map(jnp.add, so_far, more), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, first))
    ((loss_sum, weight), aux, grads), _ = jax.lax.scan(add, zeros, micro_batches)

  def mean(total, weight):
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)

  grads = jax.tree.map(lambda grad: mean(grad, weight), grads)
  metrics = {name: mean(*pair) for name, pair in aux.items()}
  return (mean(loss_sum, weight), metrics), grads


def apply_gradients(state, grads, tx):
  """One optimiser step; `grads` is for `trained(state.params)`. Returns the next `TrainState`."""
  part = trained(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, part)
  params = joined(state.params, optax.apply_updates(part, updates))
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state)
