"""Which tokens are masked when a completion is scored, and what each pass counts for: the estimators.

A masked diffusion model has no exact log-probability of a text; an estimator stands in for it. Each
is a list of passes through the network, and the score of token k is

  log pi(o_k) := sum over passes p of  weights[p, k] * log f(o_k | the tokens that p leaves visible)

with a weight only where p masks k. `draw_masks` makes the passes from an explicit key; scored with
`logps.token_logps`, the same passes give the new, the old and the reference policy's scores.

Dimension key: P passes, B rows, L positions.
"""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimator:
  """Which estimator, and its switches. Unknown keys are a TypeError, unknown names a ValueError.

  Paper versus code: the defaults are the released recipe, which is also what the paper says, but
  for the scale (`normalise`), which the paper does not mention. See `paper.md` 5.1 and 6.

  Attributes:
    name: key of `ESTIMATORS`; each says whose it is and its formula.
    pairs: lambda, pairs of passes of `coupled`, `decoupled` and `single_pass`.
    t_low, t_high: mask probabilities are uniform in this range. [0.2, 0.8] keeps 1/t small; the
      theory (Gong et al. 2025, A.4) is for [0, 1]. Any range symmetric about 1/2 keeps `coupled`
      unbiased for that range.
    t_per: key of `T_PER`. "batch" is the recipe: one t for all rows of all devices. Rows then share
      the luck of one draw; "prompt" and "row" are independent draws.
    masks_per: "row" is the recipe: every completion has masks of its own. "prompt" gives all
      completions of a prompt the same masks (ours): what they have in common is then scored in the
      same contexts, and since their advantages add up to zero its gradient cancels. With "row" it
      only does so on average, and what is left of it is noise. Wants `t_per` "prompt" or "batch".
    weight: key of `WEIGHTS`. "1/t" is the NELBO's.
    full_mask_term: adds the pass that masks the whole completion, to `coupled` and `decoupled`.
    normalise: key of `NORMALISERS`. "pairs" is the paper's Eq. 4, 1 / (lambda + 1): its expectation
      with "1/t" is (2 lambda + 1) / (lambda + 1), 1.5 at lambda = 1, times a log-probability, so a
      ratio of it is an inflated power. "unit" divides by the expected weight, which makes that 1.
    prompt_mask: d1's p, the share of prompt tokens that each pass masks too.
    after_end: key of `AFTER_END`, what becomes of the completion's tokens after its end token.
    nodes: evaluation points of `quadrature`.
    causal: `autoregressive` only: the network's attention is causal, so that one pass does.
  """

  name: str = "coupled"
  pairs: int = 1
  t_low: float = 0.2
  t_high: float = 0.8
  t_per: str = "batch"
  masks_per: str = "row"
  weight: str = "1/t"
  full_mask_term: bool = True
  normalise: str = "pairs"
  prompt_mask: float = 0.0
  after_end: str = "noised"
  nodes: int = 2
  causal: bool = False

  def __post_init__(self):
    choices = {
      "name": ESTIMATORS, "t_per": T_PER, "weight": WEIGHTS, "normalise": NORMALISERS,
      "after_end": AFTER_END,
    }  # fmt: skip
    for field, table in choices.items():
      if getattr(self, field) not in table:
        got = getattr(self, field)
        raise ValueError(f"estimator.{field} is {got!r}; choose one of {sorted(table)}")
    if self.masks_per not in ("row", "prompt"):
      raise ValueError(
        f"estimator.masks_per is {self.masks_per!r}; choose one of ['prompt', 'row']"
      )
    if self.masks_per == "prompt" and self.t_per == "row":
      raise ValueError(
        'estimator.masks_per "prompt" shares masks: set t_per to "prompt" or "batch"'
      )
    for field in ("pairs", "nodes"):
      if getattr(self, field) < 1:
        raise ValueError(f"estimator.{field} is {getattr(self, field)}; it must be at least 1")
    if not (0 <= self.t_low <= self.t_high <= 1 and self.t_high > 0):
      raise ValueError(
        f"estimator.t_low and t_high are {self.t_low} and {self.t_high}; they must be a range "
        "inside [0, 1] that is more than 0"
      )
    if not 0 <= self.prompt_mask < 1:
      raise ValueError(f"estimator.prompt_mask is {self.prompt_mask}; it must lie in [0, 1)")
    if self.causal and self.name != "autoregressive":
      raise ValueError(
        f"estimator.causal is for 'autoregressive'; {self.name!r} needs full attention, set it False"
      )


@flax.struct.dataclass
class Passes:
  """What determines a completion's scores, apart from the network.

  Attributes:
    masked: bool [P, B, L], replaced by the mask token in that pass.
    weights: float32 [P, B, L], what the pass's log-probability of the token counts for; 0 where it
      is not scored. Passes may be scored apart and in any order: the scores add up.
    loss_weights: float32 [B, L], what the token's term of the loss counts for, outside the ratio; 1
      but for `single_pass`.
    causal: the network must be a causal one.
  """

  masked: jax.Array
  weights: jax.Array
  loss_weights: jax.Array
  causal: bool = flax.struct.field(pytree_node=False, default=False)


def swapped(passes):
  """`Passes` with rows first ([B, P, L]), which can be cut into micro-batches; or back again."""
  return passes.replace(
    masked=jnp.swapaxes(passes.masked, 0, 1), weights=jnp.swapaxes(passes.weights, 0, 1)
  )


def draw_masks(
  key,
  row_ids_B,
  completion_BL,
  estimator,
  *,
  group_ids_B=None,
  scored_BL=None,
  prompt_BL=None,
  max_tokens=None,
):
  """Draws the passes of every row.

  Row r draws from (key, row_ids_B[r], its group's id) by position in the completion, so neither the
  batch it sits in nor its padding changes its masks. Take a key per inner iteration.

  Args:
    key: PRNG key.
    row_ids_B: int32, global row numbers.
    completion_BL: bool, the completion: its tokens, end token and whatever follows it.
    estimator: `Estimator`.
    group_ids_B: int32, global prompt numbers; only for `t_per` or `masks_per` "prompt".
    scored_BL: bool, the tokens that need a score (`objective.completion_mask`); None: all of the
      completion.
    prompt_BL: bool, the prompt without padding; only for `prompt_mask` > 0.
    max_tokens: int, of the longest completion, only for `autoregressive`, which takes so many
      passes; None: L. What goes beyond is scored in the last pass.
  Returns:
    `Passes`.
  Raises:
    ValueError: an argument that the estimator needs is missing.
  """
  e = estimator
  completion_BL = jnp.asarray(completion_BL, bool)
  scored_BL = completion_BL if scored_BL is None else completion_BL & jnp.asarray(scored_BL, bool)
  if "prompt" in (e.t_per, e.masks_per) and group_ids_B is None:
    raise ValueError('estimator.t_per or masks_per is "prompt": draw_masks needs group_ids_B')
  if e.prompt_mask and prompt_BL is None:
    raise ValueError(f"estimator.prompt_mask is {e.prompt_mask}: draw_masks needs prompt_BL")
  ids_B = group_ids_B if e.masks_per == "prompt" else row_ids_B
  source = _Source(e, key, jnp.asarray(ids_B), group_ids_B, completion_BL)
  maskable_BL, always_BL = AFTER_END[e.after_end](completion_BL, scored_BL)
  masked_PBL, weights_PBL, loss_weights_BL = ESTIMATORS[e.name](
    source, maskable_BL, max_tokens or completion_BL.shape[1]
  )
  weights_PBL = jnp.where(scored_BL[None], weights_PBL, 0.0).astype(jnp.float32)
  if not e.causal:
    masked_PBL |= always_BL[None]
  if e.prompt_mask:
    prompt_BL = jnp.asarray(prompt_BL, bool)
    u_PBL = jax.vmap(lambda i: _by_rank(source.keys(i, 2), prompt_BL))(jnp.arange(len(masked_PBL)))
    masked_PBL |= (u_PBL < e.prompt_mask) & prompt_BL[None]
  return Passes(masked_PBL, weights_PBL, loss_weights_BL, e.causal)


@dataclasses.dataclass(frozen=True)
class _Source:
  """The random numbers of one call; draw i does not depend on how many there are.

  `rows_B` are the ids that masks are drawn from: those of the rows, or of their prompts.
  """

  estimator: Estimator
  key: jax.Array
  rows_B: jax.Array
  groups_B: jax.Array | None
  completion_BL: jax.Array

  def keys(self, i, purpose):
    key = jax.random.fold_in(jax.random.fold_in(self.key, i), purpose)
    return _fold(key, self.rows_B)

  def t(self, i):
    """Mask probabilities of draw i, float32 [B, 1]."""
    e, key = self.estimator, jax.random.fold_in(jax.random.fold_in(self.key, i), 0)
    u_B = T_PER[e.t_per](key, self.rows_B, self.groups_B)
    return (e.t_low + (e.t_high - e.t_low) * u_B)[:, None]

  def u(self, i):
    """One uniform number for each completion token, float32 [B, L]."""
    return _by_rank(self.keys(i, 1), self.completion_BL)


def _fold(key, ids_B):
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids_B)


def _by_rank(keys_B, chosen_BL):
  """Uniform numbers [B, L], by the place among the row's chosen tokens rather than by column."""
  u_BL = jax.vmap(lambda key: jax.random.uniform(key, chosen_BL.shape[1:]))(keys_B)
  rank_BL = jnp.maximum(jnp.cumsum(chosen_BL, axis=1) - 1, 0)
  return jnp.take_along_axis(u_BL, rank_BL, axis=1)


def _uniform(keys_B):
  return jax.vmap(jax.random.uniform)(keys_B)


# Every function: (key, row ids, group ids) -> float32 [B], uniform in [0, 1).
T_PER = {
  "batch": lambda key, rows_B, groups_B: jnp.full(rows_B.shape, jax.random.uniform(key)),
  "prompt": lambda key, rows_B, groups_B: _uniform(_fold(key, jnp.asarray(groups_B))),
  "row": lambda key, rows_B, groups_B: _uniform(_fold(key, rows_B)),
}

# Of a token that was masked with probability t; and the expectation of that weight times t.
WEIGHTS = {"1/t": lambda t: 1.0 / t, "none": jnp.ones_like}

# Every function: (pairs, full-mask terms, expected weight of a token) -> what the sum is divided by.
NORMALISERS = {
  "pairs": lambda pairs, full, expected: pairs + full,
  "unit": lambda pairs, full, expected: expected,
}

# Every function: (completion_BL, scored_BL) -> (may be masked, always masked). As released, tokens
# after the end take part in the noising; visible ones then tell the network how long the answer is.
AFTER_END = {
  "noised": lambda completion_BL, scored_BL: (completion_BL, jnp.zeros_like(completion_BL)),
  "masked": lambda completion_BL, scored_BL: (scored_BL, completion_BL & ~scored_BL),
  "visible": lambda completion_BL, scored_BL: (scored_BL, jnp.zeros_like(completion_BL)),
}


def _weighted(source, draws, maskable_BL, expected):
  """The passes of (masked_BL, t_B1) draws, plus the full mask, weighted by the config's rule."""
  e = source.estimator
  full = int(e.full_mask_term)
  masked = [masked_BL for masked_BL, _ in draws]
  weights = [jnp.where(m_BL, WEIGHTS[e.weight](t_B1), 0.0) for m_BL, t_B1 in draws]
  if full:
    masked.append(maskable_BL)
    weights.append(maskable_BL.astype(jnp.float32))
  divisor = NORMALISERS[e.normalise](e.pairs, full, expected[e.weight] + full)
  ones_BL = jnp.ones(maskable_BL.shape, jnp.float32)
  return jnp.stack(masked), jnp.stack(weights) / divisor, ones_BL


def _complementary(source, maskable_BL):
  """lambda pairs ((m, t), (m_hat, 1 - t)): m and m_hat share no token and miss none."""
  for i in range(source.estimator.pairs):
    t_B1 = source.t(i)
    m_BL = maskable_BL & (source.u(i) < t_B1)
    yield (m_BL, t_B1), (maskable_BL & ~m_BL, 1.0 - t_B1)


def _coupled(source, maskable_BL, max_tokens):
  """The paper's coupled sampling (Gong et al. 2025, section 5, Eq. 4): complementary masks in pairs.

  1 / (lambda + 1) [ sum over pairs (M log f / t + M_hat log f / (1 - t)) + log f(all masked) ]

  Every pair scores each token exactly once. Apple's `coupled_grpo.py` is lambda = 1; there a token
  whose number equals t is masked in neither, here the complement is one by construction.
  """
  draws = [half for pair in _complementary(source, maskable_BL) for half in pair]
  pairs = source.estimator.pairs
  return _weighted(source, draws, maskable_BL, {"1/t": 2 * pairs, "none": pairs})


def _decoupled(source, maskable_BL, max_tokens):
  """The paper's ablation: as many passes as `coupled`, each with its own t and mask.

  1 / (lambda + 1) [ sum over 2 lambda draws of M log f / t + log f(all masked) ]

  Its expectation is that of `coupled`; per token the variance of the drawn part's mean is larger by
  v^2 / (2 lambda), v being that expectation (Gong et al. 2025, A.4).
  """
  e = source.estimator
  draws = []
  for i in range(2 * e.pairs):
    t_B1 = source.t(i)
    draws.append((maskable_BL & (source.u(i) < t_B1), t_B1))
  middle = (e.t_low + e.t_high) / 2
  expected = {"1/t": 2 * e.pairs, "none": 2 * e.pairs * middle}
  return _weighted(source, draws, maskable_BL, expected)


def _full_mask(source, maskable_BL, max_tokens):
  """diffu-GRPO of d1 (Zhao et al. 2025): log f(o_k | prompt), one pass with no token visible.

  d1 also masks each prompt token with probability 0.15 (`prompt_mask`), anew in each inner
  iteration; the paper's baseline does the same.
  """
  weights_BL = maskable_BL.astype(jnp.float32)
  return maskable_BL[None], weights_BL[None], jnp.ones_like(weights_BL)


def _single_pass(source, maskable_BL, max_tokens):
  """Dream-Coder's form (Xie et al. 2025): each token scored in one pass only, by a plain log f.

  1 / lambda sum over pairs (M log f + M_hat log f); no full-mask term. 1/t is outside the ratio: it
  multiplies the token's term of the loss (`Passes.loss_weights`). Their code draws t in (0, 1) and
  the recipe has CART weights with p = 0.1 in the place of 1/t.
  """
  e = source.estimator
  pairs = list(_complementary(source, maskable_BL))
  masked_PBL = jnp.stack([m_BL for pair in pairs for m_BL, _ in pair])
  outside_PBL = jnp.stack(
    [jnp.where(m_BL, WEIGHTS[e.weight](t_B1), 0.0) for pair in pairs for m_BL, t_B1 in pair]
  )
  loss_weights_BL = jnp.where(maskable_BL, jnp.sum(outside_PBL, axis=0) / e.pairs, 1.0)
  return masked_PBL, masked_PBL / e.pairs, loss_weights_BL


def _quadrature(source, maskable_BL, max_tokens):
  """GDPO's semi-deterministic estimate (Rojas et al. 2025): fixed levels t, one drawn mask at each.

  sum over nodes w_i M_i log f / t_i, with Gauss-Legendre nodes and weights (sum 1) of [t_low,
  t_high]. GDPO integrates over [0, 1] with 2 or 3 nodes, and takes the ratio of whole sequences.
  """
  e = source.estimator
  x, w = np.polynomial.legendre.leggauss(e.nodes)
  t, w = e.t_low + (e.t_high - e.t_low) * (x + 1) / 2, w / 2
  masked_PBL = jnp.stack([maskable_BL & (source.u(i) < t[i]) for i in range(e.nodes)])
  each = {"1/t": w / t, "none": w}[e.weight]
  expected = {"1/t": 1.0, "none": float(np.sum(w * t))}[e.weight]
  each = jnp.asarray(each / NORMALISERS[e.normalise](1, 0, expected), jnp.float32)
  weights_PBL = jnp.where(masked_PBL, each[:, None, None], 0.0)
  return masked_PBL, weights_PBL, jnp.ones(maskable_BL.shape, jnp.float32)


def _autoregressive(source, maskable_BL, max_tokens):
  """JustGRPO (Ni et al. 2026): log f(o_k | prompt, o_<k), the exact likelihood of AR order.

  Pass k masks the completion from its k-th token on and scores that token: as many passes as
  tokens, as in their code. A causal network needs one pass, and no masks.
  """
  rank_BL = jnp.minimum(jnp.cumsum(maskable_BL, axis=1) - 1, max_tokens - 1)
  ones_BL = jnp.ones(maskable_BL.shape, jnp.float32)
  if source.estimator.causal:
    return jnp.zeros_like(maskable_BL)[None], maskable_BL.astype(jnp.float32)[None], ones_BL
  pass_P11 = jnp.arange(max_tokens)[:, None, None]
  masked_PBL = maskable_BL[None] & (rank_BL[None] >= pass_P11)
  weights_PBL = (maskable_BL[None] & (rank_BL[None] == pass_P11)).astype(jnp.float32)
  return masked_PBL, weights_PBL, ones_BL


# Every function: (source, maskable_BL, max_tokens) -> (masked_PBL, weights_PBL, loss_weights_BL).
ESTIMATORS = {
  "coupled": _coupled,
  "decoupled": _decoupled,
  "full_mask": _full_mask,
  "single_pass": _single_pass,
  "quadrature": _quadrature,
  "autoregressive": _autoregressive,
}
