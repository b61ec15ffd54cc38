"""The MLP's gate, with a backward pass that keeps only its two inputs."""

import jax

from diffucoder_jax.runtime.sharding import platform


@jax.custom_vjp
def swiglu(gate, up):
  """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), elementwise.

  JAX's own backward pass keeps sigmoid(gate) and silu(gate) as well, each as large as the inputs; on
  CPU reading and writing them takes longer than computing them again.

  Args: gate, up: of one shape and floating dtype, which the result and the gradients have.
  """
  return jax.nn.silu(gate) * up


def _forward(gate, up):
  return swiglu(gate, up), (gate, up)


def _backward(saved, d):
  # Where layers are written out, XLA would find this sigmoid to be the forward pass's, and keep that.
  gate, up = jax.lax.optimization_barrier(saved) if platform() == "cpu" else saved
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  return d * up * (sigmoid + silu * (1 - sigmoid)), d * silu


swiglu.defvjp(_forward, _backward)
