"""The estimators: what their masks are, and what their scores are on a sequence short enough to
enumerate every mask."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffucoder_jax.grpo import diagnostics, logps, masks

pytestmark = pytest.mark.usefixtures("quick_compile")


class Table:
  """A network that is a table: logits by which tokens are visible. `apply` as a Transformer has."""

  config = types.SimpleNamespace(attention="full")

  def __init__(self, length, vocab):
    self.length, self.vocab = length, vocab

  def params(self, key):
    table = jax.random.normal(key, (2**self.length, self.length, self.vocab))
    return {"table": 1.5 * table, "head": jnp.eye(self.vocab)}

  def apply(self, variables, tokens_BL, segment_ids_BL, positions_BL):
    powers_1L = 2 ** jnp.arange(self.length)[None, :]
    seen_B = jnp.sum((tokens_BL != self.vocab) * powers_1L, axis=1)
    return variables["params"]["table"][seen_B]


LENGTH, VOCAB = 4, 5
TABLE = Table(LENGTH, VOCAB)
TOKENS = np.asarray([2, 0, 4, 1], np.int32)


@pytest.fixture(scope="module")
def table():
  """(params, logp): logp[visible set, k] is the exact log-probability of token k."""
  params = TABLE.params(jax.random.key(5))
  log_probs = np.asarray(jax.nn.log_softmax(params["table"]), np.float64)
  return params, log_probs[:, np.arange(LENGTH), TOKENS]


def expected_part(logp, t, weight):
  """E[M_k weight(t) log f_k] for each k, by enumerating all masks of the sequence."""
  total = np.zeros(LENGTH)
  for visible in itertools.product((0, 1), repeat=LENGTH):
    visible = np.asarray(visible)
    probability = np.prod(np.where(visible, 1 - t, t))
    seen = int((visible * 2 ** np.arange(LENGTH)).sum())
    total += probability * (1 - visible) * logp[seen] * (1 / t if weight == "1/t" else 1)
  return total


def expected_score(logp, e):
  """The exact expectation of an estimator's score of each token, from its formula."""
  x, w = np.polynomial.legendre.leggauss(8)  # exact: a polynomial of degree LENGTH in t
  t, w = e.t_low + (e.t_high - e.t_low) * (x + 1) / 2, w / 2
  part = sum(wi * expected_part(logp, ti, e.weight) for ti, wi in zip(t, w, strict=True))
  if e.name == "full_mask":
    return logp[0]
  if e.name == "quadrature":
    return part
  if e.name == "autoregressive":
    return np.asarray([logp[2**k - 1, k] for k in range(LENGTH)])
  if e.name == "single_pass":  # a plain log f, in m with probability t and in its complement else
    flipped = sum(
      wi * (expected_part(logp, ti, "none") + expected_part(logp, 1 - ti, "none"))
      for ti, wi in zip(t, w, strict=True)
    )
    return flipped
  full = int(e.full_mask_term)
  total = 2 * e.pairs * part + full * logp[0]
  if e.normalise == "pairs":
    return total / (e.pairs + full)
  return total / ((2 if e.weight == "1/t" else 1) * e.pairs + full)


def draws_of(params, e, rows, key=0, **more):
  """Scores [rows, LENGTH] of one sequence, each row with masks of its own."""

  @jax.jit
  def run(key):
    tokens = jnp.asarray(TOKENS)[None].repeat(rows, 0)
    passes = masks.draw_masks(key, jnp.arange(rows), tokens >= 0, e, **more)
    return logps.token_logps(
      TABLE, params, tokens, None, None, passes, VOCAB, chunk=rows * LENGTH, remat=False
    )

  return np.asarray(run(jax.random.key(key)), np.float64)


ESTIMATORS = [
  *(
    masks.Estimator(name, t_per="row", **more)
    for name in ("coupled", "decoupled")
    for more in (
      {}, {"pairs": 2, "normalise": "unit"}, {"weight": "none", "full_mask_term": False},
      {"t_low": 0.0, "t_high": 1.0},
    )
  ),
  masks.Estimator("full_mask"),
  masks.Estimator("single_pass", t_per="row", pairs=2),
  masks.Estimator("autoregressive"),
  masks.Estimator("quadrature", nodes=2, t_low=0.0, t_high=1.0),
  masks.Estimator("quadrature", nodes=3),
]  # fmt: skip


def marked(estimators):
  """The recipe's estimator by default, the others with the slow tests."""
  return [estimators[0], *(pytest.param(e, marks=pytest.mark.slow) for e in estimators[1:])]


@pytest.mark.parametrize(
  "e", marked(ESTIMATORS), ids=lambda e: f"{e.name}-{e.pairs}-{e.weight}-{e.t_low}"
)
def test_unbiased_against_all_masks(table, e):
  params, logp = table
  got = draws_of(params, e, 20_000)
  error = got.std(axis=0, ddof=1) / np.sqrt(len(got))
  want = expected_score(logp, e)
  # 2e-6 of rounding: two of the estimators draw nothing.
  assert (np.abs(got.mean(axis=0) - want) <= 4.5 * error + 2e-6 * np.abs(want).max()).all(), e
  assert (error < 0.03 * np.abs(want)).all(), "too noisy to tell"


def test_full_range_is_the_average_over_orders(table):
  """With t in [0, 1] the expectation is the mean over orders of log f (Ou et al. 2024). Two Gauss
  nodes integrate the cubic that 4 tokens make exactly."""
  logp, want = table[1], np.zeros(LENGTH)
  for order in itertools.permutations(range(LENGTH)):
    seen = 0
    for k in order:
      want[k] += logp[seen, k] / 24
      seen += 2**k
  e = masks.Estimator("quadrature", nodes=2, t_low=0.0, t_high=1.0)
  np.testing.assert_allclose(expected_score(logp, e), want, rtol=1e-9)
  nodes = 0.5 + np.asarray([-0.5, 0.5]) / np.sqrt(3)
  two = sum(expected_part(logp, t, "1/t") for t in nodes) / 2
  np.testing.assert_allclose(two, want, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [1, 3])
def test_variance_that_coupling_saves(table, pairs):
  """Var_MC - Var_AV = v^2 / 2N (Gong et al. 2025, A.4), within the error of both variances."""
  params, rows, variances = table[0], 40_000, {}
  for name in ("coupled", "decoupled"):
    e = masks.Estimator(
      name, pairs=pairs, t_per="row", full_mask_term=False, normalise="unit", t_low=0.1, t_high=0.9
    )
    square = np.square(x := draws_of(params, e, rows, key=1)) - 2 * x * x.mean(0) + x.mean(0) ** 2
    variances[name] = square.mean(axis=0), square.std(axis=0) / np.sqrt(rows)
    v = expected_score(table[1], e)
  difference = variances["decoupled"][0] - variances["coupled"][0]
  error = np.hypot(variances["decoupled"][1], variances["coupled"][1])
  want = v**2 / (2 * pairs)
  assert (np.abs(difference - want) < 4.5 * error).all(), (difference, want, error)
  assert (error < 0.1 * want).all(), "too noisy to tell"


@pytest.mark.slow
def test_passes_may_be_scored_apart(table):
  params, e = table[0], masks.Estimator(pairs=3, t_per="row")
  tokens = jnp.asarray(TOKENS)[None].repeat(3, 0)
  passes = masks.draw_masks(jax.random.key(2), jnp.arange(3), tokens >= 0, e)
  run = lambda passes: logps.token_logps(TABLE, params, tokens, None, None, passes, VOCAB)  # noqa: E731
  part = lambda rows: passes.replace(masked=passes.masked[rows], weights=passes.weights[rows])  # noqa: E731
  whole = run(passes)
  assert np.abs(whole).min() > 0
  np.testing.assert_allclose(run(part(slice(0, 3))) + run(part(slice(3, 7))), whole, rtol=1e-5)


def test_passes_for_a_causal_network_need_one(table):
  tokens = jnp.asarray(TOKENS)[None]
  e = masks.Estimator("autoregressive", causal=True)
  passes = masks.draw_masks(jax.random.key(2), jnp.arange(1), tokens >= 0, e)
  with pytest.raises(ValueError, match="unset estimator.causal"):
    logps.token_logps(TABLE, table[0], tokens, None, None, passes, VOCAB)


# ---------------------------------------------------------------------------------------------
# The masks themselves


@functools.partial(jax.jit, static_argnums=3, static_argnames="max_tokens")
def drawn(key, row_ids, completion, e, **more):
  return masks.draw_masks(key, row_ids, completion, e, **more)


def draw(e, rows=64, prompt=3, completion=40, key=0, **more):
  """(passes as numpy, completion)."""
  completion_BL = np.arange(prompt + completion)[None].repeat(rows, 0) >= prompt
  made = drawn(jax.random.key(key), np.arange(rows), completion_BL, e, **more)
  return jax.tree.map(np.asarray, made), completion_BL


@pytest.mark.parametrize(
  "t_per", ["prompt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("batch", "row"))]
)
def test_pairs_are_complements_that_score_each_token_once(t_per):
  e = masks.Estimator(pairs=2, t_per=t_per, full_mask_term=False)
  groups = np.arange(64) // 8
  passes, completion = draw(e, group_ids_B=groups)
  assert passes.masked.shape == passes.weights.shape == (4, *completion.shape)
  for m, m_hat in (passes.masked[:2], passes.masked[2:]):
    assert not (m & m_hat).any() and ((m | m_hat) == completion).all() and m.any() and m_hat.any()
  scored = passes.weights != 0
  assert (scored == passes.masked).all()
  assert (scored[:2].sum(0) == completion).all() and (scored[2:].sum(0) == completion).all()
  assert diagnostics.coverage(passes, completion) == (2, 2)
  # 1 / t and 1 / (1 - t), halved: two pairs; and t is where it should be.
  t = 1 / (2 * passes.weights[0].max(1))
  np.testing.assert_allclose(passes.weights[1].max(1), 1 / (2 * (1 - t)), rtol=1e-5)
  assert (t >= 0.2 - 1e-6).all() and (t <= 0.8 + 1e-6).all()
  different = {"batch": 1, "prompt": 8, "row": 64}[t_per]
  assert len(np.unique(t)) == different
  share = passes.masked[0][:, 3:].mean(1)
  assert np.abs((share - t) / np.sqrt(t * (1 - t) / 40)).max() < 4.5
  assert len({row.tobytes() for row in passes.masked[0]}) == 64
  assert (passes.masked[0] != passes.masked[2]).any()


def test_full_mask_term_and_scale():
  passes, completion = draw(masks.Estimator())
  assert (passes.masked[2] == completion).all() and (passes.weights[2][completion] == 0.5).all()
  assert diagnostics.coverage(passes, completion) == (2, 2)
  unit, _ = draw(masks.Estimator(normalise="unit"))
  np.testing.assert_allclose(unit.weights, passes.weights * 2 / 3, rtol=1e-6)


@pytest.mark.slow
def test_unweighted_scores_have_the_scale_of_one_log_probability():
  for name in masks.NORMALISERS:
    plain, completion = draw(masks.Estimator(weight="none", normalise=name))
    np.testing.assert_array_equal(plain.weights.sum(0), completion)


@pytest.mark.slow
def test_the_other_estimators_passes():
  passes, completion = draw(masks.Estimator("decoupled", pairs=3))
  assert len(passes.masked) == 7  # as many as three pairs and the full mask
  least, most = diagnostics.coverage(passes, completion)
  assert least >= 1 and most > 4, "some tokens are drawn more often than others"
  passes, completion = draw(masks.Estimator("full_mask", pairs=5))
  assert (passes.masked == completion).all() and (passes.weights == completion).all()
  passes, completion = draw(masks.Estimator("single_pass", t_low=0.3, t_high=0.3))
  assert (passes.weights == passes.masked).all() and (passes.masked.sum(0) == completion).all()
  want = np.where(passes.masked[0], 1 / 0.3, np.where(passes.masked[1], 1 / 0.7, 1))
  np.testing.assert_allclose(passes.loss_weights, want, rtol=1e-5)
  passes, completion = draw(masks.Estimator("quadrature", nodes=1))
  assert passes.weights.max() == 2 and 0.45 < passes.masked[0][completion].mean() < 0.55
  passes, completion = draw(masks.Estimator("autoregressive"), max_tokens=40)
  for k in range(40):
    assert (passes.weights[k].nonzero()[1] == 3 + k).all()
    assert passes.masked[k][:, 3 + k :].all() and not passes.masked[k][:, : 3 + k].any()
  short, _ = draw(masks.Estimator("autoregressive"), max_tokens=10)
  assert diagnostics.coverage(short, completion) == (1, 1), "the last pass scores what is left"


@pytest.mark.parametrize(
  "name",
  [
    "coupled",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("decoupled", "quadrature")),
  ],
)
def test_rows_do_not_depend_on_batch_padding_or_canvas(name):
  e = masks.Estimator(name, pairs=2, t_per="row", prompt_mask=0.3)
  prompt = np.arange(43)[None].repeat(64, 0) < 3
  want, completion = draw(e, prompt_BL=prompt)
  rows = np.asarray([5, 60])
  key = jax.random.key(0)
  padded = np.pad(completion[rows], ((0, 0), (6, 2)))  # other columns on both sides
  few = drawn(key, rows, padded, e, prompt_BL=np.pad(prompt[rows], ((0, 0), (6, 2))))
  np.testing.assert_array_equal(few.masked[:, :, 6:-2], want.masked[:, rows])
  np.testing.assert_array_equal(few.weights[:, :, 6:-2], want.weights[:, rows])
  assert not np.asarray(few.masked)[:, :, :6].any()
  assert want.masked[:, :, :3].any() and not want.weights[:, :, :3].any()
  other, _ = draw(e, key=1, prompt_BL=prompt)
  assert (other.masked != want.masked).any()


def test_completions_of_a_prompt_can_share_their_masks():
  e = masks.Estimator(t_per="prompt", masks_per="prompt", full_mask_term=False)
  groups = np.repeat(np.arange(16), 4)
  passes, _ = draw(e, group_ids_B=groups)
  for groups_of in (passes.masked, passes.weights):
    of_groups = np.asarray(groups_of).reshape(2, 16, 4, -1)
    np.testing.assert_array_equal(of_groups, of_groups[:, :, :1].repeat(4, axis=2))
  first = np.asarray(passes.masked)[0, ::4]
  assert len(np.unique(first, axis=0)) == 16
  own, _ = draw(masks.Estimator(t_per="prompt", full_mask_term=False), group_ids_B=groups)
  assert len(np.unique(np.asarray(own.masked)[0], axis=0)) > 60


@pytest.mark.slow
def test_more_pairs_change_no_mask():
  more, completion = draw(masks.Estimator(pairs=3))
  fewer, _ = draw(masks.Estimator(pairs=2))
  np.testing.assert_array_equal(more.masked[:4], fewer.masked[:4])
  assert (more.masked[4] != fewer.masked[4]).any() and (fewer.masked[4] == completion).all()


@pytest.mark.slow
def test_prompt_mask_is_a_share_of_the_prompt():
  prompt = np.arange(43)[None].repeat(64, 0) < 30
  e = masks.Estimator("full_mask", prompt_mask=0.15)
  passes, completion = draw(e, prompt=30, completion=13, prompt_BL=prompt)
  share = passes.masked[0][prompt].mean()
  assert abs(share - 0.15) < 4 * np.sqrt(0.15 * 0.85 / prompt.sum())
  assert passes.masked[0][completion].all() and not passes.weights[0][prompt].any()


@pytest.mark.parametrize(
  "name", ["coupled", pytest.param("autoregressive", marks=pytest.mark.slow)]
)
def test_tokens_after_the_end(name):
  scored = np.arange(43)[None].repeat(64, 0)
  scored = (scored >= 3) & (scored < 20)
  seen = {}
  for after_end in masks.AFTER_END:
    e = masks.Estimator(name, after_end=after_end)
    passes, completion = draw(e, scored_BL=scored, max_tokens=40)
    tail = completion & ~scored
    assert not passes.weights[:, tail].any()
    assert diagnostics.coverage(passes, scored)[0] >= 1
    seen[after_end] = passes.masked[:, tail].mean()
    part = passes.masked[0], passes.weights[0]
    first = part if after_end == "noised" else first  # noqa: F821
    np.testing.assert_array_equal(part[0][scored], first[0][scored])
    np.testing.assert_array_equal(part[1], first[1])
  assert seen["masked"] == 1 and seen["visible"] == 0 and 0.1 < seen["noised"] < 1


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(name="elbo"), "estimator.name is 'elbo'; choose one of .*'coupled'"),
    (dict(masks_per="token"), "estimator.masks_per is 'token'"),
    (dict(masks_per="prompt", t_per="row"), "set t_per to"),
    (dict(t_per="token"), "estimator.t_per is 'token'; choose one of .*'prompt'"),
    (dict(weight="t"), "estimator.weight is 't'; choose one of"),
    (dict(normalise="sum"), "estimator.normalise is 'sum'"),
    (dict(after_end="gone"), "estimator.after_end is 'gone'"),
    (dict(pairs=0), "estimator.pairs is 0"),
    (dict(nodes=0), "estimator.nodes is 0"),
    (dict(t_low=0.9), "t_low and t_high are 0.9 and 0.8"),
    (dict(t_high=1.5), "inside"),
    (dict(prompt_mask=1.0), "prompt_mask is 1.0"),
    (dict(causal=True), "is for 'autoregressive'"),
  ],
)
def test_wrong_estimators_are_refused_by_name(changes, match):
  with pytest.raises(ValueError, match=match):
    masks.Estimator(**changes)


def test_missing_arguments_are_named():
  with pytest.raises(TypeError, match="lamda"):
    masks.Estimator(lamda=2)
  with pytest.raises(ValueError, match="needs group_ids_B"):
    draw(masks.Estimator(t_per="prompt"))
  with pytest.raises(ValueError, match="needs prompt_BL"):
    draw(masks.Estimator(prompt_mask=0.15))
