"""How fast rows are written: how many steps each takes, and what share of its masks each step commits.

Numbers and not part of a program, so that one program serves rows of any number of masks, together.
"""

import flax
import jax
import numpy as np

from diffucoder_jax.diffusion import remasking


@flax.struct.dataclass
class Pace:
  """Of B rows; T is no less than the most steps."""

  steps: jax.Array  # int32 [B], of each block
  ratios: jax.Array  # float32 [B, T], `remasking.commit_ratios` of so many steps

  def ratio(self, step):
    """The share that each row commits at a step, float32 [B]."""
    return jax.lax.dynamic_index_in_dim(self.ratios, step, axis=1, keepdims=False)


def pace_of(config, masks, most):
  """The pace of rows that go through the sampler together, numpy.

  Args:
    config: `SamplerConfig`; steps of 0 are one for each mask of a block.
    masks: ints, of each row in all, at least 1.
    most: `slots` of `sampler.generate`: T, and so the program, follows from it and not from the rows.
  """
  width = config.block_size or most
  blocks = [-(-count // width) for count in masks]
  if config.steps:
    steps = [-(-config.steps // number) for number in blocks]
  else:
    steps = [min(width, count) for count in masks]
  return _stacked(config, steps, config.steps or min(width, most))


def even_pace(config, slots, batch):
  """The pace of `batch` rows with the same number of steps, whatever their masks are.

  Raises:
    ValueError: neither steps nor new tokens are asked for.
  """
  if not config.steps and not config.max_new_tokens:
    raise ValueError("sampler.steps and max_new_tokens are both 0; say how many steps to take")
  width = config.block_size or slots
  steps = min(width, config.max_new_tokens)
  if config.steps:
    steps = -(-config.steps // -(-slots // width))
  return _stacked(config, [steps] * batch, steps)


def _stacked(config, steps, most):
  ratios_BT = np.zeros((len(steps), most), np.float32)
  for b, number in enumerate(steps):
    ratios_BT[b, :number] = remasking.commit_ratios(number, config.eps, config.schedule)
  return Pace(np.asarray(steps, np.int32), ratios_BT)
