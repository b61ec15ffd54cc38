"""The network's own promises: who sees whom, alignment, remat, and the tree of the 7B."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.hf import mapping
from diffucoder_jax.model import attention, transformer
from diffucoder_jax.model.config import PRESETS, ModelConfig, preset
from diffucoder_jax.model.transformer import Transformer, positions_of, unembed

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = ModelConfig(
  vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
  remat="none",
)  # fmt: skip
TOLERANCE = 2e-5  # features have a standard deviation of about 1


@pytest.fixture(scope="module")
def params():
  """Weights by numpy, which takes no compiling; norms about 1."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return 1 + 0.1 * noise if path[-1].key == "scale" else 0.3 * noise

  return jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))


def abstract_params(config):
  tokens_BL = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return nn.unbox(jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens_BL))["params"]


@jax.jit
def features(params, tokens_BL, segment_ids_BL=None, positions_BL=None, pattern=None):
  model = Transformer(CONFIG)
  return model.apply({"params": params}, tokens_BL, segment_ids_BL, positions_BL, pattern)


def tokens(batch, length, seed=0):
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length), np.int32)


def close(ours, wanted):
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE)


def test_only_full_attention_sees_later_tokens(params):
  before_BL = tokens(2, 12)
  after_BL = before_BL.copy()
  after_BL[:, 8] = (after_BL[:, 8] + 1) % CONFIG.vocab_size
  # Feature 8 scores token 8 out of what is before it, so it is the last that must not change.
  change = {}
  for name, pattern in attention.PATTERNS.items():
    first, second = (features(params, x, pattern=pattern) for x in (before_BL, after_BL))
    change[name] = np.abs(np.asarray(first) - np.asarray(second)).max((0, 2))
  assert (change["causal"][:9] == 0).all() and (change["causal"][9:] > 1e-3).all()
  assert (change["full"] > 1e-3).all()


def test_annealing_goes_from_causal_to_full(params):
  tokens_BL, key = tokens(2, 12), jax.random.key(1)
  run = lambda pattern: np.asarray(features(params, tokens_BL, pattern=pattern))  # noqa: E731
  np.testing.assert_array_equal(run(attention.annealed(0.0, key)), run(attention.CAUSAL))
  close(run(attention.annealed(1.0, key)), run(attention.FULL))
  between = run(attention.annealed(0.5, key))
  assert np.abs(between - run(attention.CAUSAL)).max() > 1e-2
  assert np.abs(between - run(attention.FULL)).max() > 1e-2
  np.testing.assert_array_equal(between, run(attention.annealed(0.5, jax.random.key(1))))
  assert np.abs(between - run(attention.annealed(0.5, jax.random.key(2)))).max() > 1e-2


def test_annealing_opens_the_asked_share_of_later_positions():
  index = jnp.arange(1024)

  def seen(ratio, seed):
    pattern = attention.annealed(ratio, jax.random.key(seed))
    return np.asarray(attention.visible(pattern, index[:, None], index[None, :]))

  seen_LM = seen(0.3, 0)
  later_LM = np.triu(np.ones_like(seen_LM), 1)
  assert seen_LM[~later_LM].all()
  assert abs(seen_LM[later_LM].mean() - 0.3) < 0.005
  # Each query and each key gets its share; neighbours and other seeds are independent.
  corner = slice(1, 512), slice(513, 1024)
  assert abs(seen_LM[corner].mean(1) - 0.3).max() < 0.1
  assert abs(seen_LM[corner].mean(0) - 0.3).max() < 0.1
  for other_LM in (np.roll(seen_LM, 1, 0), np.roll(seen_LM, 1, 1), seen(0.3, 1)):
    assert abs((seen_LM[corner] & other_LM[corner]).mean() - 0.3**2) < 0.005
  # More is opened as the ratio grows, and nothing is closed.
  assert (seen(0.6, 0) | ~seen_LM).all()


def test_packed_documents_equal_separate_rows(params):
  lengths = (5, 3, 4)
  packed_BL = tokens(1, sum(lengths) + 2)
  segment_ids_BL = np.repeat([[1, 2, 3, 0]], (*lengths, 2), axis=1).astype(np.int32)
  positions_BL = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None].astype(np.int32)
  together_BLD = features(params, packed_BL, segment_ids_BL, positions_BL)
  assert np.isfinite(together_BLD).all()
  start = 0
  for length in lengths:
    alone_BLD = features(params, packed_BL[:, start : start + length])
    close(together_BLD[:, start : start + length], alone_BLD)
    start += length


def test_padding_on_either_side_changes_nothing(params):
  tokens_BL = tokens(2, 6)
  alone_BLD = features(params, tokens_BL)
  for left, right in ((3, 0), (0, 3), (2, 4)):
    pad = ((0, 0), (left, right))
    for filler in (0, 7):
      padded_BL = np.pad(tokens_BL, pad, constant_values=filler)
      segment_ids_BL = np.pad(np.ones_like(tokens_BL), pad)
      padded_BLD = features(params, padded_BL, segment_ids_BL)
      assert np.isfinite(padded_BLD).all()
      close(padded_BLD[:, left : left + 6], alone_BLD)


def test_alignment_starts_anew_at_each_segment():
  x_BLD = jnp.arange(8.0)[None, :, None]
  segment_ids_BL = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0]])
  aligned_BLD = transformer.align_with_targets(x_BLD, segment_ids_BL)
  assert aligned_BLD[0, :, 0].tolist() == [0, 0, 2, 2, 3, 5, 5, 7]
  assert transformer.align_with_targets(x_BLD)[0, :, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_remat_policies_give_equal_gradients(params):
  tokens_BL = tokens(2, 10)

  def grads(remat):
    model = Transformer(dataclasses.replace(CONFIG, remat=remat))
    loss = lambda params: jnp.mean(  # noqa: E731
      jax.nn.logsumexp(unembed(params, model.apply({"params": params}, tokens_BL)), -1)
    )
    return jax.jit(jax.grad(loss))(params)

  wanted = grads("none")
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # noqa: E731
  for remat in set(transformer.REMAT) - {"none"}:
    jax.tree.map(close, grads(remat), wanted)
  with pytest.raises(ValueError, match="model.remat is 'some'; choose one of"):
    grads("some")


def test_remat_is_in_force(params):
  """Not only equal: the recomputation is really in the program."""

  def text(remat):
    model = Transformer(dataclasses.replace(CONFIG, remat=remat))
    loss = lambda params: jnp.sum(model.apply({"params": params}, tokens(1, 4)))  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(params))

  counts = {remat: text(remat).count("dot_general") for remat in transformer.REMAT}
  assert counts["full"] > counts["none"]


@pytest.mark.parametrize(
  "changes, written_out", [({}, True), ({"remat": "full"}, False), ({"num_layers": 13}, False)]
)
def test_few_layers_are_written_out_on_a_cpu(changes, written_out):
  model = Transformer(dataclasses.replace(CONFIG, **changes))
  tokens_BL = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  program = jax.jit(model.apply).lower({"params": abstract_params(model.config)}, tokens_BL)
  assert ("stablehlo.while" in program.as_text()) != written_out


def test_frozen_row_learns_through_the_head_only(params):
  tokens_BL = np.full((1, 4), 9, np.int32)

  def grad(frozen_input_id, tied_head):
    config = dataclasses.replace(CONFIG, frozen_input_id=frozen_input_id, tied_head=tied_head)
    model = Transformer(config)
    used = {name: leaf for name, leaf in params.items() if not (tied_head and name == "head")}
    loss = lambda params: jnp.mean(  # noqa: E731
      jax.nn.log_softmax(unembed(params, model.apply({"params": params}, tokens_BL)))[..., 3]
    )
    return jax.jit(jax.grad(loss))(used)["embed"][9]

  assert np.abs(grad(-1, False)).max() > 1e-4
  assert not grad(9, False).any()
  assert 0 < np.abs(grad(9, True)).max() != np.abs(grad(-1, True)).max()


# What a Hugging Face folder of DiffuCoder-7B holds, written out: H hidden, hd head_dim, I mlp.
STATE_DICT = """
model.embed_tokens.weight                          V,H
model.layers.{i}.input_layernorm.weight            H
model.layers.{i}.post_attention_layernorm.weight   H
model.layers.{i}.self_attn.q_proj.weight           heads*hd,H
model.layers.{i}.self_attn.q_proj.bias             heads*hd
model.layers.{i}.self_attn.k_proj.weight           kv*hd,H
model.layers.{i}.self_attn.k_proj.bias             kv*hd
model.layers.{i}.self_attn.v_proj.weight           kv*hd,H
model.layers.{i}.self_attn.v_proj.bias             kv*hd
model.layers.{i}.self_attn.o_proj.weight           H,heads*hd
model.layers.{i}.mlp.gate_proj.weight              I,H
model.layers.{i}.mlp.up_proj.weight                I,H
model.layers.{i}.mlp.down_proj.weight              H,I
model.norm.weight                                  H
lm_head.weight                                     V,H
"""
SIZES_7B = dict(V=152064, H=3584, heads=28, kv=4, hd=128, I=18944)


def test_the_7b_is_the_published_network():
  config = ModelConfig(**preset("diffucoder_7b"))
  tree = abstract_params(config)
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 7_615_616_512

  wanted = {}
  for line in STATE_DICT.strip().splitlines():
    name, dims = line.split()
    shape = tuple(eval(dim, {}, SIZES_7B) for dim in dims.split(","))
    wanted |= {name.format(i=i): shape for i in range(28 if "{i}" in name else 1)}
  assert len(wanted) == 12 * 28 + 3
  assert mapping.hf_shapes(config) == wanted

  # Every leaf of ours belongs to exactly one row, and its layers turn into that row's tensors.
  paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
  rows = mapping.rows(config)
  assert sorted(row.path for row in rows) == sorted(paths)
  for row in rows:
    leaf = mapping.get(tree, row)
    one = jax.ShapeDtypeStruct(leaf.shape[1:] if row.stacked else leaf.shape, leaf.dtype)
    theirs = jax.eval_shape(lambda x, row=row: mapping.to_theirs(row, x), one)
    assert all(wanted[name] == theirs.shape for name in row.names(config))
    assert leaf.shape == ((28,) if row.stacked else ()) + one.shape


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_whole_networks(name):
  config = ModelConfig(**preset(name))
  tree = abstract_params(config)
  assert ("head" in tree) != config.tied_head
  tokens_BL = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  apply = lambda params, tokens_BL: unembed(  # noqa: E731
    params, Transformer(config).apply({"params": params}, tokens_BL)
  )
  assert jax.eval_shape(apply, tree, tokens_BL).shape == (2, 16, config.vocab_size)


@pytest.mark.parametrize(
  "positions", [lambda x_BL: x_BL, lambda x_BL: positions_of(x_BL > 3)], ids=["given", "counted"]
)
def test_on_a_cpu_angles_are_found_once(params, positions):
  """Not again in each loop over heads that reads them; this counts in what XLA made of the network. Of
  counted positions, as a sampler's are, it knows that they are not negative."""

  def total(params, x_BL):
    return Transformer(CONFIG).apply({"params": params}, x_BL, positions_BL=positions(x_BL)).sum()

  quick = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)  # as users compile
  try:
    text = jax.jit(jax.grad(total)).lower(params, tokens(2, 12)).compile().as_text()
  finally:
    jax.config.update("jax_disable_most_optimizations", quick)
  assert text.count(" cosine(") == text.count(" sine(") == 2  # in each of two branches


@pytest.mark.parametrize("first", [0, 7, -(2**30) - 1])  # both branches of `rotary`, and below 0
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_are_rotated_alike_on_all_machines(dtype, first, monkeypatch):
  x_BLHK, d_BLHK = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8)).astype(dtype)

  def both():
    tables = attention.rotary(jnp.arange(10).reshape(2, 5) - first, 8, 10_000.0)
    value, backward = jax.vjp(lambda x: attention.rotate(x, *tables), x_BLHK)
    return value, *backward(d_BLHK)

  on_cpu = both()
  monkeypatch.setattr(attention.sharding, "platform", lambda: "tpu")
  for ours, theirs in zip(on_cpu, both(), strict=True):
    assert ours.dtype == theirs.dtype == dtype
    np.testing.assert_allclose(
      *(x.astype(jnp.float32) for x in (ours, theirs)),
      rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6,
      atol=1e-6,
    )
