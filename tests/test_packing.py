"""Documents packed into one row give the loss and the gradients of rows of their own."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from diffucoder_jax import train
from diffucoder_jax.data.pipeline import PackedRows
from diffucoder_jax.diffusion import process
from diffucoder_jax.model import attention, blockwise
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, init_params

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = ModelConfig(
  vocab_size=96, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
  rope_theta=1e4, init_std=0.1,
)  # fmt: skip
MASK_ID, PAD_ID = 95, 0
LENGTHS = ((17, 1, 9, 30), (40, 21))  # of the documents of each packed row
SEQ_LEN = 64
BLOCK = 16  # of blockwise attention: documents begin and end within blocks


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda key: nn.unbox(init_params(Transformer(CONFIG), key)))(jax.random.key(0))


def packed_and_apart():
  """(packed, apart): the same documents, several to a row and one to a row, as `PackedRows` cuts them.

  Both have as many rows (so that one compiled step serves both), the packed ones those of padding
  at the end, and each its `noised`: each token has its t and is masked or not on both sides.
  """
  rng = np.random.default_rng(0)
  packed, apart, places = (
    [],
    [],
    [],
  )  # places: (packed row, first position, length) of each document
  for lengths in LENGTHS:
    documents = [rng.integers(1, MASK_ID, n).astype(np.int32) for n in lengths]
    starts = np.cumsum([0, *lengths[:-1]])
    places += [(len(packed), *place) for place in zip(starts, lengths, strict=True)]
    packed.append(PackedRows(np.concatenate(documents), starts, SEQ_LEN, PAD_ID)[0])
    apart += [PackedRows(tokens, np.asarray([0]), SEQ_LEN, PAD_ID)[0] for tokens in documents]
  nothing = {key: np.zeros_like(value) for key, value in packed[0].items()}
  packed += [nothing] * (len(apart) - len(packed))
  packed, apart = ({key: np.stack([row[key] for row in rows]) for key in nothing}
                   for rows in (packed, apart))  # fmt: skip
  assert packed["segment_ids"].max(1).tolist() == [4, 2, 0, 0, 0, 0]

  t_B = np.asarray([0.4, 0.7, 1.0, 1.0, 1.0, 1.0], np.float32)
  noised = process.mask_tokens(
    jax.random.key(1), packed["tokens"], packed["maskable"], MASK_ID, t_B
  )
  masked_BL = np.zeros_like(apart["maskable"])
  for row, (b, start, length) in enumerate(places):
    masked_BL[row, :length] = np.asarray(noised.masked)[b, start : start + length]
  assert masked_BL.sum() == np.sum(noised.masked) > 10
  tokens_BL = np.where(masked_BL, MASK_ID, apart["tokens"])
  apart_noised = process.Noised(tokens_BL, masked_BL, t_B[[b for b, _, _ in places]])
  return {**packed, "noised": noised}, {**apart, "noised": apart_noised}


def assert_close_gradients(ours, wanted):
  """Each parameter's gradient within 1e-6 of its norm."""
  pairs = zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(ours), strict=True)
  for (path, want), got in pairs:
    size, name = np.linalg.norm(want), jax.tree_util.keystr(path)
    assert size > 0, name
    assert np.linalg.norm(got - want) <= 1e-6 * size, (name, np.linalg.norm(got - want) / size)


DIFFUSION = train.Objective()
PER_SEGMENT = train.Objective(weight="cart", normaliser="maskable")
AUTOREGRESSIVE = train.Objective(kind="autoregressive")


@pytest.mark.parametrize(
  "objective, pattern, implementation",
  [
    (DIFFUSION, attention.FULL, "xla"),
    pytest.param(AUTOREGRESSIVE, attention.CAUSAL, "blockwise", marks=pytest.mark.slow),
    pytest.param(DIFFUSION, attention.FULL, "blockwise", marks=pytest.mark.slow),
    pytest.param(DIFFUSION, attention.CAUSAL, "xla", marks=pytest.mark.slow),
    pytest.param(PER_SEGMENT, attention.FULL, "xla", marks=pytest.mark.slow),
    pytest.param(AUTOREGRESSIVE, attention.CAUSAL, "xla", marks=pytest.mark.slow),
  ],
)
def test_packed_equals_apart(params, monkeypatch, objective, pattern, implementation):
  monkeypatch.setattr(blockwise, "LARGEST_BLOCK", BLOCK)
  config = ModelConfig(**{**vars(CONFIG), "attention_impl": implementation})
  packed, apart = packed_and_apart()
  if objective.kind == "autoregressive":
    packed.pop("noised"), apart.pop("noised")

  @jax.jit
  def run(params, rows):
    def total(params):
      return train.loss_of(Transformer(config), objective, pattern, params, rows)[0]

    (loss_sum, weight), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return (loss_sum, weight), gradients

  (loss_sum, weight), gradients = jax.device_get(run(params, packed))
  (want_sum, want_weight), want_gradients = jax.device_get(run(params, apart))
  assert weight == want_weight > 10 and loss_sum > 10
  np.testing.assert_allclose(loss_sum, want_sum, rtol=1e-6)
  assert_close_gradients(gradients, want_gradients)
