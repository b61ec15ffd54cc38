"""What the C library does with memory that arrays gave back, where they live in it: on CPU."""

import ctypes
import importlib.metadata
import importlib.util
import os

import jax

# Of glibc's malloc.h: (parameter, value, reason).
SETTINGS = (
  (-8, 1, "one arena: another thread's cannot hold what is larger than 64 MB"),
  (-4, 0, "large blocks come from the heap, too, instead of fresh pages each time"),
  (-1, 2**31 - 1, "and the heap's end is not given back"),
)


def keep_freed_memory():
  """Lets this process use memory again that it has had, rather than ask the system for zeroed pages.

  XLA for CPU allocates what a program needs, often a gigabyte, at each call, and glibc gives blocks so
  large back when they are freed; the next call's are then mapped and zeroed page by page, a fifth of a
  training step of 31M parameters. It costs memory: the process stays as large as it has been at most,
  and large blocks do not fit where small ones lie between them; that step holds 4.1 GB instead of 2.3.
  Call it before anything uses a device. Nothing happens where arrays may live on an accelerator, where
  the C library is not glibc, and where the environment says something about malloc (MALLOC_*,
  GLIBC_TUNABLES).

  Returns: bool, whether it was set.
  """
  said = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
  library = ctypes.CDLL(None) if os.name == "posix" else None
  if said or not only_cpu() or not hasattr(library, "gnu_get_libc_version"):
    return False
  return all([library.mallopt(parameter, value) for parameter, value, _ in SETTINGS])


def only_cpu():
  """Whether JAX can find no accelerator, told without starting it."""
  platforms = jax.config.jax_platforms
  if platforms:
    return platforms == "cpu"
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  return not plugins and importlib.util.find_spec("libtpu") is None
