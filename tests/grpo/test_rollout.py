"""What a round asks, and the arrays that its answers become."""

import jax.numpy as jnp
import numpy as np

from diffucoder_jax.diffusion import canvas as canvases
from diffucoder_jax.diffusion import sampler
from diffucoder_jax.grpo import rollout


def test_problems_come_once_an_epoch():
  order = [i for r in range(6) for i in rollout.problems_of_round(r, 4, 12, seed=3)]
  assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
  assert rollout.problems_of_round(5, 4, 12, 3) == order[20:]
  assert rollout.problems_of_round(0, 20, 12, 3)[:12] == order[:12]


def test_a_batch_is_the_canvas_with_what_was_sampled():
  canvas, valid = canvases.lay_out([[5, 6], [7, 8, 9]], 9, 4, mask_id=1)
  assert canvas.tolist() == [[0, 0, 0, 5, 6, 1, 1, 1, 1], [0, 0, 7, 8, 9, 1, 1, 1, 1]]
  assert valid.tolist() == [[False] * 3 + [True] * 6, [False] * 2 + [True] * 7]
  tokens = np.where(canvas == 1, [[0] * 5 + [4, 2, 4, 3], [0] * 5 + [4] * 4], canvas)
  zeros = jnp.zeros(canvas.shape)
  trace = sampler.Trace(tokens, zeros, zeros, zeros, jnp.zeros(2), valid)
  batch = rollout.make_batch(trace, 4, end_id=2)
  assert batch["tokens"].tolist() == [[0, 0, 0, 5, 6, 4, 2, 4, 3], [0, 0, 7, 8, 9, 4, 4, 4, 4]]
  assert batch["valid"].sum(1).tolist() == [6, 7] and batch["completion"].sum(1).tolist() == [4, 4]
  assert batch["scored"][:, -4:].tolist() == [[True, True, False, False], [True] * 4]
  assert rollout.completions(trace, 4).tolist() == [[4, 2, 4, 3], [4, 4, 4, 4]]
  assert rollout.answer_ids([4, 2, 4, 3], {2, 3}) == [4]
