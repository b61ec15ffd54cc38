"""Some tokens of a row and a cache of the others: what the whole row gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.model import attention, kv_cache
from diffucoder_jax.model.transformer import Transformer, align_with_targets, positions_of
from tests.model.test_transformer import CONFIG, close, params, tokens  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]
LENGTH = 12
VALID = np.arange(LENGTH)[None, :] >= np.asarray([[0], [3], [7]])  # padded left by 0, 3 and 7


@functools.partial(jax.jit, static_argnums=0, static_argnames="kind")
def read(config, params, tokens_BL, index_BL, cache=None, kind="causal"):  # noqa: F811
  """(hidden states of the tokens at `index_BL`, their `Cache`)."""
  at = lambda x_BL: jnp.take_along_axis(x_BL, index_BL, axis=1)  # noqa: E731
  segment_ids_BL, positions_BL = VALID.astype(np.int32), positions_of(VALID)
  cache = kv_cache.nothing(config, len(VALID)) if cache is None else cache
  arrays = at(tokens_BL), at(segment_ids_BL), at(positions_BL), attention.PATTERNS[kind]
  return Transformer(config).apply({"params": params}, *arrays, cache, index_BL)


def places(first, last):
  return np.broadcast_to(np.arange(first, last), (len(VALID), last - first))


def test_states_are_those_of_the_plain_network(params):  # noqa: F811
  tokens_BL = tokens(3, LENGTH)
  hidden_BLD, fresh = read(CONFIG, params, tokens_BL, places(0, LENGTH))
  segment_ids_BL = VALID.astype(np.int32)
  wanted_BLD = Transformer(CONFIG).apply(
    {"params": params}, tokens_BL, segment_ids_BL, positions_of(VALID), attention.CAUSAL
  )
  close(align_with_targets(hidden_BLD, segment_ids_BL), wanted_BLD)
  assert fresh.keys.shape == fresh.values.shape == (2, 3, LENGTH, 2, 8)
  assert fresh.segment_ids.tolist() == segment_ids_BL.tolist()


@pytest.mark.parametrize("pieces", [(5, 6, 7, 12), (1, 4, 12), (11, 12)])
def test_a_causal_network_may_read_a_row_in_pieces(params, pieces):  # noqa: F811
  tokens_BL = tokens(3, LENGTH)
  whole_BLD, _ = read(CONFIG, params, tokens_BL, places(0, LENGTH))
  hidden_BLD, fresh = read(CONFIG, params, tokens_BL, places(0, pieces[0]))
  cache, states = kv_cache.extend(fresh, LENGTH), [hidden_BLD]
  for first, last in zip(pieces, pieces[1:], strict=False):
    hidden_BLD, fresh = read(CONFIG, params, tokens_BL, places(first, last), cache)
    cache = kv_cache.write(cache, fresh, first)
    states.append(hidden_BLD)
  together_BLD = np.concatenate(states, axis=1)
  assert np.isfinite(together_BLD).all()
  close(together_BLD[VALID], whole_BLD[VALID])


@pytest.mark.parametrize("layers", [1, 2])
def test_a_network_that_sees_both_ways_computes_any_places_again(params, layers):  # noqa: F811
  """With one layer the keys of the others depend on nothing but themselves: the cache is exact, and
  what a renewed place held before must not be seen. With two it is when nothing was changed."""
  config = dataclasses.replace(CONFIG, num_layers=layers)
  used = {**params, "layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
  tokens_BL, index_BL = tokens(3, LENGTH), np.asarray([[2, 6, 7], [4, 5, 11], [10, 7, 8]])
  run = functools.partial(read, config, used, kind="full")
  whole_BLD, cache = run(tokens_BL, places(0, LENGTH))
  if layers == 1:
    before_BLD = whole_BLD
    tokens_BL = tokens_BL.copy()  # JAX may still be reading the old one
    np.put_along_axis(tokens_BL, index_BL, tokens(3, 3, seed=1), axis=1)
    whole_BLD, _ = run(tokens_BL, places(0, LENGTH))
    assert np.abs(np.asarray(whole_BLD - before_BLD)).max() > 1e-2
  hidden_BLD, _ = run(tokens_BL, index_BL, cache)
  close(hidden_BLD, np.take_along_axis(np.asarray(whole_BLD), index_BL[:, :, None], axis=1))
