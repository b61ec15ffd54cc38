"""Low-rank adapters (LoRA, Hu et al. 2021) in trees of parameters: adding, leaving out, merging.

With `ModelConfig.lora_rank` > 0 every projection of every layer (q, k, v, o, gate, up, down) computes
x W + (lora_alpha / lora_rank) (x A) B; `projection.Adapter` is that network's side, and
`runtime/optim.py` trains A and B only. The adapter of a kernel `w` lies beside it, as `w_lora/a` and
`w_lora/b`. lora_alpha = 2 lora_rank is what Biderman et al. 2024 ("LoRA learns less and forgets
less") recommend.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffucoder_jax.model.transformer import Transformer, init_params
from diffucoder_jax.runtime import optim


def without_adapters(params):
  """The tree without its adapters: the parameters of the network with lora_rank 0."""
  return {
    name: without_adapters(branch) if isinstance(branch, dict) else branch
    for name, branch in params.items()
    if not name.endswith(optim.ADAPTER)
  }


def with_adapters(params, config, abstract_params, key):
  """Puts fresh adapters beside the kernels of a network that has none; call with its mesh set.

  Args:
    params: tree of arrays, without adapters.
    config: `ModelConfig` with a lora_rank.
    abstract_params: the tree with adapters, as `jax.ShapeDtypeStruct` with shardings.
    key: PRNG key. The adapters are those that `init_params` makes with it, on any mesh.
  Returns:
    the tree with adapters; it computes what `params` does.
  """
  if key is None:
    raise ValueError(
      "model.lora_rank is set, but these weights have no adapters and there is no key"
    )

  def make(key):  # Random numbers for the other parameters are never drawn: nothing uses them.
    return optim.trained(nn.unbox(init_params(Transformer(config), key)))

  placed = jax.tree.map(lambda leaf: leaf.sharding, optim.trained(abstract_params))
  return optim.joined(params, jax.jit(make, out_shardings=placed)(key))


def delta(a, b, config):
  """What the adapter of one kernel adds to it in one layer: (alpha / rank) A B, in float32.

  Always the whole product at once, so that merging here and while exporting gives the same bits.

  Args:
    a: [*inputs, rank], numpy or JAX. b: [rank, *outputs].
    config: `ModelConfig`.
  Returns:
    float32 [*inputs, *outputs].
  """
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  scaled = b.reshape(len(b), -1) * (config.lora_alpha / config.lora_rank)
  product = jnp.matmul(a.reshape(-1, len(b)), scaled, precision=jax.lax.Precision.HIGHEST)
  return product.reshape(*a.shape[:-1], *b.shape[1:])


def merge(params, config):
  """Adds the adapters to the kernels, in float32, and rounds once to the kernels' dtype.

  Not for use under jit. Beyond the result it needs memory for one stacked kernel at a time.

  Args:
    params: tree of arrays of a network with adapters (without any it is returned as it is).
    config: its `ModelConfig`.
  Returns:
    (params, config with lora_rank 0): the network that computes the same without adapters, placed
    as it was.
  """
  if not config.lora_rank:
    return params, config

  def merged(tree):
    out = {}
    for name, branch in tree.items():
      if name.endswith(optim.ADAPTER):
        continue
      adapter = tree.get(name + optim.ADAPTER)
      if isinstance(branch, dict):
        branch = merged(branch)
      elif adapter is not None:
        branch = _merge_layers(jnp.asarray(branch), adapter["a"], adapter["b"], config)
      out[name] = branch
    return out

  return merged(params), dataclasses.replace(config, lora_rank=0)


def _merge_layers(kernel, a, b, config):
  layers = [
    (kernel[i].astype(jnp.float32) + delta(a[i], b[i], config)).astype(kernel.dtype)
    for i in range(len(kernel))
  ]
  return jax.device_put(jnp.stack(layers), kernel.sharding)
