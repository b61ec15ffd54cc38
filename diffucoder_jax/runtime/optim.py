"""The optimiser: AdamW with warm-up, gradient clipping, and gradients summed over micro-batches.

A tree of parameters with low-rank adapters in it (branches whose names end in `ADAPTER`) is trained
in these alone: the rest gets no gradient and no optimiser state, and passes through unchanged.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    opt_state: Optax state; its moments are sharded like `trained(params)`.
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


class Optimizer(NamedTuple):
  """Like an Optax transformation, but it ends at the new parameters: rounding them is its business.

  Attributes:
    init: params -> state.
    update: (grads, state, params, key) -> (params, state).
  """

  init: Callable
  update: Callable


class WithMaster(NamedTuple):
  """State of an optimiser that also keeps the parameters in float32."""

  inner: Any
  master: Any


def _float32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _like(tree, params):
  return jax.tree.map(lambda x, param: x.astype(param.dtype), tree, params)


def _moved(tx, grads, state, params32):
  """What `tx` makes of float32 parameters: (the next ones, state)."""
  updates, state = tx.update(_float32(grads), state, params32)
  return optax.apply_updates(params32, updates), state


def _nearest(tx):
  def update(grads, state, params, key):
    moved, state = _moved(tx, grads, state, _float32(params))
    return _like(moved, params), state

  return Optimizer(lambda params: tx.init(_float32(params)), update)


def _refuse_float32(params, rounding):
  if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
    raise ValueError(
      f"optim.rounding is {rounding!r}, but all trained parameters are float32, which nothing rounds; "
      "set model.param_dtype to 'bfloat16', or optim.rounding to 'nearest'"
    )


def _master(tx):
  def init(params):
    _refuse_float32(params, "master")
    return WithMaster(tx.init(_float32(params)), _float32(params))

  def update(grads, state, params, key):
    master, inner = _moved(tx, grads, state.inner, state.master)
    return _like(master, params), WithMaster(inner, master)

  return Optimizer(init, update)


def round_stochastically(key, x):
  """float32 to bfloat16, up or down by chance, so that the mean is x. What is not finite stays so.

  A float32 is a bfloat16 and 16 more bits; adding 16 random bits carries into the bfloat16 with
  just the probability that these bits are as a share of its last place.
  """
  bits = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits
  cut = jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _stochastic(tx):
  def init(params):
    _refuse_float32(params, "stochastic")
    return tx.init(_float32(params))

  def update(grads, state, params, key):
    moved, state = _moved(tx, grads, state, _float32(params))
    leaves, structure = jax.tree.flatten(moved)
    leaves = [
      round_stochastically(jax.random.fold_in(key, i), leaf) if old.dtype == jnp.bfloat16 else leaf
      for i, (leaf, old) in enumerate(zip(leaves, jax.tree.leaves(params), strict=True))
    ]
    return jax.tree.unflatten(structure, leaves), state

  return Optimizer(init, update)


# How parameters in bfloat16 take an update, which is mostly smaller than their last place; gradients
# and arithmetic are float32 in all. With float32 moments, float32 parameters take 12 bytes each.
# "nearest" loses small updates (10 bytes); float32 parameters are not rounded at all. "master" keeps
# a float32 copy in the state: the learning of float32, and parameters that a sampler reads in half
# the time (14 bytes). "stochastic" is right on average (10 bytes; 8 with a bfloat16 first moment).
ROUNDINGS = {"nearest": _nearest, "master": _master, "stochastic": _stochastic}
# Of the first moment. The second one is always float32: in bfloat16 it stops moving for b2 = 0.999.
MOMENT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_optimizer(optim_config):
  """AdamW (Loshchilov & Hutter 2019) after clipping the gradient by its global norm.

  Args:
    optim_config: steps, lr, warmup_steps, schedule ("cosine", "constant" or "linear"), lr_floor
      (share of lr), b1, b2, eps, weight_decay, decay ("matrices": all but leaves named `scale` or
      `bias`; "all"), clip_norm (0 = do not clip), rounding (see `ROUNDINGS`), moment_dtype (of the
      first moment, "float32" or "bfloat16"). Adapters are matrices: decay draws both factors
      to zero, and so the network to the one that it adapts, whose weights never decay.
  Returns:
    (tx, learning_rate_fn): an `Optimizer`, and step -> learning rate.
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
      mu_dtype=_pick("moment_dtype", c.moment_dtype, MOMENT_DTYPES),
      weight_decay=c.weight_decay,
      mask=_pick("decay", c.decay, DECAYS),
    ),
  )
  return _pick("rounding", c.rounding, ROUNDINGS)(tx), learning_rate


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


def apply_gradients(state, grads, tx, key=None):
  """One optimiser step; `grads` is for `trained(state.params)`. Returns the next `TrainState`.

  `key` is what stochastic rounding draws from, together with `state.step`; nothing else needs one.
  """
  part = trained(state.params)
  key = None if key is None else jax.random.fold_in(key, state.step)
  part, opt_state = tx.update(grads, state.opt_state, part, key)
  return state.replace(step=state.step + 1, params=joined(state.params, part), opt_state=opt_state)
