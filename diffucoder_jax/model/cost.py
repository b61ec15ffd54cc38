"""What a program costs on paper: FLOPs and bytes of a network of a given shape, before compiling it.

Counted by hand because XLA counts the body of a scan over layers once and a Pallas kernel not at all.
FLOPs are those of matrix products, 2 per multiply and add; everything else is small beside them.
"""

import dataclasses
from typing import NamedTuple

from diffucoder_jax.model.config import train_flops_per_token


class Flops(NamedTuple):
  """Of one token, or summed over many: the projections of the layers, attention (scores and values),
  and the output matrix."""

  layers: float
  attention: float
  head: float

  @property
  def total(self):
    return self.layers + self.attention + self.head

  def scaled(self, factor):
    return Flops(*(factor * part for part in self))


def layer_weights(config):
  """Elements of the seven matrices of one layer."""
  c = config
  return c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + (
    3 * c.embed_dim * c.mlp_dim
  )


def head_weights(config):
  """Elements of the output matrix."""
  return config.embed_dim * config.vocab_size


def forward_flops(config, seq_len):
  """`Flops` of a forward pass, per token, with every pair of positions computed."""
  c = config
  return Flops(
    2.0 * c.num_layers * layer_weights(c),
    4.0 * c.num_layers * c.num_heads * c.head_dim * seq_len,
    2.0 * head_weights(c),
  )


# What the backward pass computes again, by name of the remat policy: (layers, attention), as shares
# of a forward pass. "dots" keeps the projections' results and not attention's, "attention" the other
# way round. A name that is not here counts like "full".
RECOMPUTED = {"none": (0.0, 0.0), "full": (1.0, 1.0), "dots": (0.0, 1.0), "attention": (1.0, 0.0)}
# A fused backward pass of attention makes the scores again: 5 products where forward has 2.
ATTENTION_BACKWARD = 2.5
# One that keeps the [L, L] probabilities ("xla") has 4.
ATTENTION_BACKWARD_KEPT = 2.0


@dataclasses.dataclass(frozen=True)
class Work:
  """Of one call of a program, on all devices together.

  Attributes:
    useful: FLOPs that the model needs, which MFU counts. executed: FLOPs that run: with what is
      computed again, and with the output matrix at the positions that need it only.
    tokens: that enter the network. passes: forward passes of each of them.
    what: the counting in words.
  """

  useful: float
  executed: float
  tokens: float
  passes: float
  what: str


def _backward(config, forward):
  kept = config.attention_impl == "xla"
  attention = (ATTENTION_BACKWARD_KEPT if kept else ATTENTION_BACKWARD) * forward.attention
  # Frozen weights under adapters get no gradient: half of the backward pass.
  return Flops((1.0 if config.lora_rank else 2.0) * forward.layers, attention, 0.0)


def _executed(config, forward, passes):
  """FLOPs of a token in the layers: `passes` forward passes, what is computed again, and backward."""
  backward = _backward(config, forward)
  layers, attention = RECOMPUTED.get(config.remat, (1.0, 1.0))
  return (
    forward.layers * (passes + layers) + backward.layers
    + forward.attention * (passes + attention) + backward.attention
  )  # fmt: skip


def training(config, tokens, seq_len, head_share):
  """`Work` of a training step.

  Args:
    config: `ModelConfig`. tokens: of the global batch. seq_len: of a row.
    head_share: share of the positions whose logits are computed (once, and their gradients).
  """
  forward = forward_flops(config, seq_len)
  executed = _executed(config, forward, 1) + forward.head * 3 * head_share
  return Work(
    tokens * train_flops_per_token(config, seq_len), tokens * executed, tokens, 1,
    f"useful: 6 per weight and token and attention; executed: with remat {config.remat!r}, scores "
    f"made again, and logits at {head_share:.0%} of the positions",
  )  # fmt: skip


def policy_update(config, tokens, seq_len, passes, scored):
  """`Work` of a policy-gradient step: `passes` noisy passes over `tokens`, logits of `scored` positions.

  Every pass is run again in the backward pass, on top of what its layers compute again.
  """
  forward = forward_flops(config, seq_len)
  body = _executed(config, forward, 2)
  per_token = train_flops_per_token(config, seq_len) - 3 * forward.head
  useful = passes * (tokens * per_token + 3 * scored * forward.head)
  return Work(
    useful, passes * (tokens * body + 5 * scored * forward.head), tokens, passes,
    f"{passes:g} passes, each forward, forward again and backward; logits of {scored:g} positions",
  )  # fmt: skip


def scoring(config, tokens, seq_len, passes, scored):
  """`Work` of forward passes: `passes` over `tokens`, with logits of `scored` positions in each."""
  forward = forward_flops(config, seq_len)
  flops = passes * (tokens * (forward.layers + forward.attention) + scored * forward.head)
  return Work(
    flops, flops, tokens, passes, f"{passes:g} forward passes, logits of {scored:g} positions"
  )


def least_hbm_bytes(config, work, shards, tensor, state_bytes, micro_batches, trains):
  """Bytes from and to HBM that a device cannot avoid: what a perfect fusion would leave.

  The state is read, and written when it is trained. Each pass reads its layers' weights whole (they
  are gathered, bfloat16) once, in training also when it computes again, for the inputs' gradients,
  and writes the weights' gradients. Each matrix product reads its input and writes its output once.

  Args:
    config: `ModelConfig`. work: `Work`. shards: parts of the batch. tensor: mesh size along it.
    state_bytes: of a device's arguments. micro_batches: passes over the weights are as many.
    trains: whether there is a backward pass.
  """
  c, item = config, 2
  weights = item * (c.num_layers * layer_weights(c) + head_weights(c)) / tensor
  wide = (
    2 * (c.num_heads + 2 * c.num_kv_heads + c.num_heads) * c.head_dim + 5 * c.mlp_dim
  ) / tensor
  per_token = item * c.num_layers * (wide + 4 * c.embed_dim)
  computed_again = RECOMPUTED.get(c.remat, (1.0, 1.0))[0] if trains else 0.0
  visits = work.passes * micro_batches * ((3 + computed_again) if trains else 1)
  activations = (
    work.passes * work.tokens / shards * per_token * (3 + computed_again if trains else 1)
  )
  return (2 if trains else 1) * state_bytes + visits * weights + activations
