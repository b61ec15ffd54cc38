"""Fingerprints of arrays: they tell whether a tree is bit for bit what it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def named_leaves(tree):
  """dict "path/of/leaf" -> leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def is_key(x):
  """True for an array of typed PRNG keys, abstract or not."""
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _check_leaf(name, x):
  if not isinstance(x, jax.Array):
    raise ValueError(f"state leaf {name} is a {type(x).__name__}; make it a jax.Array to save it")
  if is_key(x) or x.dtype == bool:
    return
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise ValueError(f"state leaf {name} is complex; save its real and imaginary parts instead")
  kind = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
  if kind(x.dtype).bits < 8:
    raise ValueError(f"state leaf {name} is {x.dtype}; types under 8 bits cannot be saved")


def _fingerprint(x, starts=None, shape=None):
  """uint32 that changes when any one element does, for any sharding and number of processes.

  Every word is mixed with its global index (MurmurHash3's finaliser, a bijection of the word) and
  all are added with wrap-around, which is exact in any order, and so piece by piece: then `starts`
  is where the piece begins in an array of `shape`.
  """
  if is_key(x):
    x = jax.random.key_data(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  sizes = words.shape if shape is None else shape
  index = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    step += jnp.uint32(0) if starts is None else starts[axis]
    index += step * jnp.uint32(stride % (1 << 32))
    stride *= sizes[axis]
  mixed = words ^ (index * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


@jax.jit
def _fingerprints(leaves):
  return [_fingerprint(x) for x in leaves]


@functools.partial(jax.jit, static_argnums=2)
def _fingerprint_of_piece(piece, starts, shape):
  return _fingerprint(piece, starts, shape)


def of_piece(piece, starts, shape):
  """What a piece adds to the fingerprint of an array, int; the sum of all is taken modulo 2**32.

  Args:
    piece: numpy array of 1, 2 or 4 byte numbers.
    starts: where it begins, an int per dimension. shape: of the whole array.
  """
  return int(_fingerprint_of_piece(piece, np.asarray(starts, np.uint32), tuple(shape)))


def describe(state):
  """dict leaf name -> shape, dtype, fingerprint. Waits for the state to be computed."""
  leaves = named_leaves(state)
  for name, x in leaves.items():
    _check_leaf(name, x)
  values = jax.device_get(_fingerprints(list(leaves.values())))
  return {
    name: {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": int(value)}
    for (name, x), value in zip(leaves.items(), values, strict=True)
  }
