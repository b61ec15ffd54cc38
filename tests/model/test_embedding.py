"""The lookup in a table that is cut over the mesh: the rows, their gradient, and what travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffucoder_jax.model import embedding
from diffucoder_jax.runtime import collectives, hlo, sharding

VOCAB, WIDTH = 64, 32


def case():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
  tokens = rng.integers(0, VOCAB, (8, 12)).astype(np.int32)
  tokens[0, :3] = VOCAB, VOCAB + 100, -1  # no such rows
  return table, tokens, rng.normal(size=(8, 12, WIDTH)).astype(np.float32)


def rows_and_gradient(table, tokens, d_rows):
  rows, pull = jax.vjp(lambda table: embedding.lookup(table, tokens, "float32"), table)
  return rows, pull(d_rows)[0]


def test_reads_rows_and_adds_up_their_gradients():
  table, tokens, d_rows = case()
  rows, gradient = jax.jit(rows_and_gradient)(table, tokens, d_rows)
  nearest = np.clip(tokens, 0, VOCAB - 1)
  np.testing.assert_array_equal(rows, table[nearest])
  wanted = np.zeros_like(table)
  np.add.at(wanted, nearest[tokens == nearest], d_rows[tokens == nearest])
  inside = np.ones(VOCAB, bool)
  inside[[0, -1]] = False  # where the ids outside were read
  np.testing.assert_allclose(gradient[inside], wanted[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", ((2, 2, 2), (1, 8, 1), (2, 1, 4)))
def test_the_table_is_never_put_together(shape):
  """Also no sum of whole gradients: what travels is as large as the rows, or a part of the table."""
  table, tokens, d_rows = case()
  wanted = jax.jit(rows_and_gradient)(table, tokens, d_rows)
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
  with jax.set_mesh(mesh):
    batch, cut = place(sharding.BATCH_AXES), place("tensor", "fsdp")
    step = jax.jit(rows_and_gradient, in_shardings=(cut, batch, batch), out_shardings=(batch, cut))
    compiled = step.lower(table, tokens, d_rows).compile()
    ours = compiled(
      *(jax.device_put(x, s) for x, s in zip(case(), (cut, batch, batch), strict=True))
    )
  np.testing.assert_array_equal(ours[0], wanted[0])
  np.testing.assert_allclose(ours[1], wanted[1], rtol=0, atol=1e-6)
  module = hlo.parse(compiled.as_text())
  moved = collectives.find(module, hlo.count_runs(module), mesh.size)
  part_of_table = VOCAB * WIDTH // (shape[1] * shape[2])
  rows_of_device = tokens.size * WIDTH // (shape[0] * shape[1])
  assert any(one.bytes > tokens.nbytes for one in moved)  # not only ids
  assert all(one.bytes <= 4 * max(part_of_table, rows_of_device) for one in moved), moved


def test_the_gradient_of_bfloat16_is_summed_in_float32():
  """As a bfloat16, 256 + 1 is 256."""
  table, tokens = jnp.zeros((4, 8), jnp.bfloat16), jnp.full((2, 1000), 3, jnp.int32)
  total = lambda table: jnp.sum(embedding.lookup(table, tokens, "bfloat16").astype(jnp.float32))  # noqa: E731
  assert (jax.jit(jax.grad(total))(table)[3] == 2000).all()
