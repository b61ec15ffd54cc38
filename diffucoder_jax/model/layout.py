"""Parameters laid out for a CPU that reads them many times: layer by layer, each matrix as it is read.

XLA copies a layer's matrices out of the stack whenever it comes to them, also when the loop over layers
is written out, and on CPU its product with few rows is quicker when the dimension that is summed over is
the last one of the matrix. One row of 31M parameters takes 0.74 of the time, 16 rows 0.97 (2-core Intel
Xeon, 2026-11-29). It costs another copy of the layers, made once for each batch.
"""

import math

import jax

from diffucoder_jax.model.projection import INPUTS_LAST
from diffucoder_jax.model.transformer import written_out
from diffucoder_jax.runtime.optim import ADAPTER


def for_many_reads(config, params):
  """`unrolled` where it saves time and is possible: few layers on one CPU, no adapters; else `params`.

  Args: config: `ModelConfig`. params: a tree as of `init_params`, unboxed, or of `unrolled`. Call it
    under `jax.jit`, before the loop that reads them.
  Returns: a tree for `Transformer.apply`, of the same numbers.
  """
  few_on_one = written_out(config) and jax.sharding.get_abstract_mesh().size <= 1
  if not few_on_one or config.lora_rank or "layers" not in params:
    return params
  return unrolled(params)


def unrolled(params):
  """Parameters that `Transformer` goes through layer after layer, with the inputs of each matrix last.

  Args: params: a tree as of `init_params`, unboxed. Call it under `jax.jit`.
  Returns: a tree for `Transformer.apply` and `unembed`, of the same numbers.
  Raises: ValueError: there are adapters; merge them first.
  """
  tree = {name: x for name, x in params.items() if name != "layers"}
  depth = len(jax.tree.leaves(params["layers"])[0])
  for i in range(depth):
    layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
    attn, mlp = dict(layer["attn"]), layer["mlp"]
    if any(name.endswith(ADAPTER) for name in (*attn, *attn["q"], *mlp)):
      raise ValueError("parameters with adapters cannot be unrolled; merge them first")
    for name in "qkv":
      attn[name] = dict(attn[name])
      attn[name]["kernel" + INPUTS_LAST] = _inputs_last(attn[name].pop("kernel"), 1)
    attn["o" + INPUTS_LAST] = _inputs_last(attn.pop("o"), 2)
    mlp = {name + INPUTS_LAST: _inputs_last(kernel, 1) for name, kernel in mlp.items()}
    tree[f"layer_{i}"] = {**layer, "attn": attn, "mlp": mlp}
  return tree


def _inputs_last(kernel, inputs):
  """[outputs, inputs] of a kernel whose first `inputs` dimensions are inputs."""
  return kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T
