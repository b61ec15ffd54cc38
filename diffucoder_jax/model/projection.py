"""A product with a matrix of parameters: plain, laid out for many reads, or with an adapter beside it."""

import math

import flax.linen as nn
import jax.numpy as jnp

from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.runtime.optim import ADAPTER
from diffucoder_jax.runtime.sharding import constrain

INPUTS_LAST = "_inputs_last"  # behind the name of a matrix [outputs, inputs]


def weight(module, name, std, shape, axes):
  """A module's parameter `name`: normal with `std`, in its config's `param_dtype`, with logical axes."""
  c = module.config
  init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
  return module.param(name, init, shape, c.param_dtype)


def _project(x, kernel, contracted):
  """Contracts the last `contracted` dimensions of x with the first ones of the kernel.

  As one plain matrix product over flat positions: the same numbers, but XLA on CPU copies and
  transposes three-dimensional operands for the weight's gradient, which took half the MLP's time.
  """
  outer, inner = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
  width = math.prod(kernel.shape[:contracted])
  flat = x.reshape(-1, width) @ kernel.reshape(width, -1).astype(x.dtype)
  return flat.reshape(*outer, *inner)


def projected(module, name, x, shape, axes, contracted=1):
  """x times the kernel `name`, plus what the adapter beside it adds, if the config has adapters.

  Args:
    module: of Linen, with a `config`, within its `__call__`.
    x: floating, [..., inputs]; its last `contracted` dimensions are inputs.
    shape, axes: of the kernel, inputs first, and its logical axes.
  Returns: [..., outputs] in the dtype of x.
  """
  c = module.config
  if module.has_variable("params", name + INPUTS_LAST):  # `layout.unrolled` made it
    inputs, outputs = shape[:contracted], shape[contracted:]
    matrix = module.get_variable("params", name + INPUTS_LAST).astype(x.dtype)
    flat = jnp.einsum("BI,OI->BO", x.reshape(-1, math.prod(inputs)), matrix)
    return flat.reshape(*x.shape[: x.ndim - contracted], *outputs)
  y = _project(x, weight(module, name, c.init_std, shape, axes), contracted)
  if c.lora_rank:
    y += Adapter(c, shape, axes, contracted, name=name + ADAPTER)(x)
  return y


class Adapter(nn.Module):
  """What LoRA (Hu et al. 2021) adds to x W: (alpha / rank) (x A) B.

  B begins at zero, so that a network begins as the one it adapts. A is normal with a variance of
  1 / inputs: x A is then as large as x whatever the width, and so is what B learns from. Both are
  float32 whatever `param_dtype` is: they are small, and bfloat16 would swallow small updates.
  """

  config: ModelConfig
  shape: tuple[int, ...]  # of the kernel, and its logical axes
  axes: tuple[str | None, ...]
  contracted: int  # so many dimensions of the kernel are inputs

  @nn.compact
  def __call__(self, x):
    c, k = self.config, self.contracted
    init = nn.initializers.normal(math.prod(self.shape[:k]) ** -0.5)
    init_a = nn.with_logical_partitioning(init, (*self.axes[:k], None))
    init_b = nn.with_logical_partitioning(nn.initializers.zeros, (None, *self.axes[k:]))
    a = self.param("a", init_a, (*self.shape[:k], c.lora_rank), jnp.float32)
    b = self.param("b", init_b, (c.lora_rank, *self.shape[k:]), jnp.float32)
    h_BLr = constrain(_project(x, a, k), "batch", None, None)
    return _project(h_BLr * (c.lora_alpha / c.lora_rank), b, 1)
