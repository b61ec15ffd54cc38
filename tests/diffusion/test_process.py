"""The forward process against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.diffusion import process

ROWS, LENGTH = 64, 256


def rows():
  tokens = jnp.asarray(np.random.default_rng(0).integers(5, 90, (ROWS, LENGTH)), jnp.int32)
  maskable = jnp.arange(LENGTH)[None, :] >= jnp.arange(ROWS)[:, None]
  return tokens, maskable


def test_only_maskable_tokens_are_masked_and_the_rest_is_kept():
  tokens, maskable = rows()
  noised = process.forward_process(jax.random.key(0), tokens, maskable, 3)
  assert not (noised.masked & ~maskable).any()
  assert (noised.tokens[noised.masked] == 3).all()
  np.testing.assert_array_equal(noised.tokens[~noised.masked], tokens[~noised.masked])


def test_the_mask_rate_is_t():
  tokens, _ = rows()
  t = jnp.linspace(0.02, 1.0, ROWS)
  noised = process.mask_tokens(jax.random.key(1), tokens, jnp.ones_like(tokens, bool), 3, t)
  rate = np.asarray(noised.masked).mean(1)
  assert (np.abs(rate - t) <= 5 * np.sqrt(t * (1 - t) / LENGTH) + 1e-6).all()
  assert noised.masked[-1].all()  # t = 1 masks everything


@pytest.mark.parametrize("name", process.T_SAMPLERS)
def test_t_lies_in_its_range(name):
  t = np.asarray(process.sample_t(jax.random.key(2), 4096, name))
  assert t.min() >= process.T_MIN and t.max() <= 1
  assert abs(t.mean() - 0.5) < 0.02


def test_stratified_t_covers_every_level_and_moves():
  t = [np.sort(process.sample_t(jax.random.key(seed), 32, "stratified")) for seed in (3, 4)]
  assert (np.histogram(t[0], 8, (process.T_MIN, 1))[0] == 4).all()
  assert (t[0] != t[1]).all()


def test_a_row_draws_the_same_in_any_batch():
  tokens, maskable = rows()
  big = process.forward_process(jax.random.key(4), tokens, maskable, 3)
  small = process.forward_process(jax.random.key(4), tokens[:8], maskable[:8], 3)
  np.testing.assert_array_equal(big.tokens[:8], small.tokens)
  np.testing.assert_array_equal(big.t[:8], small.t)
  big, small = (
    process.vary_rows(jax.random.key(4), jnp.ones((n, LENGTH), jnp.int32), maskable[:n], 0.4, 0.4)
    for n in (ROWS, 8)
  )
  for a, b in zip(big, small, strict=True):
    np.testing.assert_array_equal(a[:8], b)


def test_which_tokens_are_masked_does_not_follow_from_t():
  """One key for both draws would compare a token's number with itself."""
  tokens = jnp.full((4096, 3), 7)
  noised = process.forward_process(jax.random.key(9), tokens, jnp.ones_like(tokens, bool), 3)
  excess = np.asarray(noised.masked) - np.asarray(noised.t)[:, None]  # E[t (1 - t)] = 1 / 6
  assert (np.abs(excess.mean(0)) < 5 * np.sqrt(1 / 6 / 4096)).all()


def test_rows_and_keys_differ():
  tokens, maskable = jnp.full((8, 64), 7), jnp.ones((8, 64), bool)
  one = process.mask_tokens(jax.random.key(5), tokens, maskable, 3, jnp.full(8, 0.5)).masked
  two = process.mask_tokens(jax.random.key(6), tokens, maskable, 3, jnp.full(8, 0.5)).masked
  assert len({row.tobytes() for row in np.asarray(one)}) == 8
  assert (one != two).any()


def test_unknown_sampler_is_refused():
  with pytest.raises(ValueError, match="'stratified', 'uniform'"):
    process.sample_t(jax.random.key(0), 4, "cosine")


def test_vary_rows_truncates_and_keeps_prefixes_at_the_asked_rates():
  packed = jnp.where(jnp.arange(32) < 9, 1, 2)[None, :]
  segments, maskable = jnp.repeat(packed, 4000, 0), jnp.ones((4000, 32), bool)
  new_segments, new_maskable = process.vary_rows(jax.random.key(7), segments, maskable, 0.2, 0.3)
  truncated = np.asarray(new_segments[:, -1] == 0)
  prefixed = np.asarray(new_maskable[:, -1] & ~new_maskable[:, 0])
  assert abs(truncated.mean() - 0.2) < 0.03 and abs(prefixed.mean() - 0.3) < 0.03
  assert not (truncated & prefixed).any()
  untouched = ~truncated & ~prefixed
  assert new_maskable[untouched].all() and (new_segments[untouched] == packed).all()
  np.testing.assert_array_equal(new_segments, jnp.where(new_segments > 0, segments, 0))
  assert not (new_maskable & (new_segments == 0)).any()  # nothing maskable in the padding
  assert (new_segments[:, 0] == 1).all()  # no row loses everything
  lengths = np.asarray((new_segments[truncated] > 0).sum(1))
  assert lengths.min() < 5 and lengths.max() > 27


def test_vary_rows_off_changes_nothing():
  tokens, maskable = rows()
  segments = jnp.ones_like(tokens)
  got = process.vary_rows(jax.random.key(8), segments, maskable, 0.0, 0.0)
  np.testing.assert_array_equal(got[0], segments)
  np.testing.assert_array_equal(got[1], maskable)
