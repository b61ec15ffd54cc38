"""What is measured of sets of decodings, each under its label (a temperature, a model, a language).

A set holds P problems sampled with S seeds; values are float [P, S], NaN where there is none, so that
intervals can be had over both.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from diffucoder_jax.evals import arness, bootstrap, orders
from diffucoder_jax.evals.dumps import Decodings

STEP_BINS = 20
# What is compared between labels: its name in results.json -> how a sentence calls it.
COMPARED = {
  "local@1": "local AR-ness@1",
  "global@1": "global AR-ness@1",
  "global@1 over chance": "global AR-ness@1 over that of random orders as long",
  "distance": "the distance between the orders of repeated samples",
  "order_entropy": "order entropy",
  "sink": "the entropy sink at the first step",
}


class Options(NamedTuple):
  """How AR-ness is counted; see `arness`."""

  definition: str = "set"
  denominator: str = "seen"
  tail: str = "trim"
  ties: str = "left_to_right"


class Group(NamedTuple):
  """The decodings of one label.

  Attributes:
    label: str. names: the problems, those of all seeds. seeds: one `Decodings` for each.
    prompts: {name: bytes}, what was given.
  """

  label: str
  names: list
  seeds: list[Decodings]
  prompts: dict


def grouped(labels, decodings, sources):
  """Puts folders of one label together as its seeds.

  Args:
    labels, decodings, sources: lists alike: label, `Decodings` and path of each folder.
  Returns:
    list of `Group`, in the order of first appearance.
  Raises:
    ValueError: two seeds of a label were asked different prompts under one name.
  """
  groups = {}
  for label, found, source in zip(labels, decodings, sources, strict=True):
    group = groups.setdefault(label, Group(label, [], [], {}))
    for row in found.rows:
      if group.prompts.setdefault(row.name, row.prompt()) != row.prompt():
        raise ValueError(
          f"problem {row.name} of {source} has another prompt than that of the first folder labelled "
          f"{label!r}; give folders of other problems another label"
        )
    group.names.extend(row.name for row in found.rows if row.name not in group.names)
    group.seeds.append(found)
  return list(groups.values())


def same_problems(a, b):
  """Whether two groups were asked the same, so that they may be compared problem by problem."""
  return a.prompts == b.prompts


def crossed(group, of_seeds):
  """Puts values of each seed's rows, [B, ...], into one array [P, S, ...], NaN where there is none."""
  index = {name: i for i, name in enumerate(group.names)}
  found = np.full((len(group.names), len(group.seeds), *of_seeds[0].shape[1:]), np.nan)
  for s, (decodings, values) in enumerate(zip(group.seeds, of_seeds, strict=True)):
    found[[index[row.name] for row in decodings.rows], s] = values
  return found


# --- One label.


def measure(group, options):
  """Everything that needs the steps alone.

  Returns:
    dict of float [P, S]: "local@k", "global@k", "global@1 over chance" (0: as random orders of so many
    tokens, 1: left to right; chance favours short answers), "tokens", "ended", "tied", "revised", the
    times of `orders.length_commitment`, "distance" (of a sample to the others of its problem) and
    "order_entropy" [P, 1].
  """
  values = {}
  for decodings in group.seeds:
    for name, value in _measure_rows(decodings, options).items():
      values.setdefault(name, []).append(np.asarray(value, float))
  values = {name: crossed(group, of_seeds) for name, of_seeds in values.items()}
  apart, entropy = np.full((len(group.names), len(group.seeds)), np.nan), []
  for p, (samples, seeds) in enumerate(_samples(group)):
    apart[p, seeds] = orders.mean_distances(orders.distances(*samples))
    entropy.append(orders.order_entropy(*samples))
  return {**values, "distance": apart, "order_entropy": np.array(entropy)[:, None]}


def _measure_rows(decodings, options):
  step, region = decodings.step, decodings.region
  order = arness.orders_of(step, region, options.ties)
  local = arness.local_arness(order, arness.LOCAL_K, options.definition, options.denominator)
  global_ = arness.global_arness(order)
  chance = np.array([arness.random_global(int(n), 1) for n in order.count_B])
  over_chance = arness.ratio(global_[:, 0] - chance, np.where(order.count_B > 1, 1 - chance, 0.0))
  return {
    **{f"local@{k + 1}": local[:, k] for k in range(arness.LOCAL_K)},
    **{f"global@{k + 1}": x for k, x in enumerate(global_.T)},
    "global@1 over chance": over_chance,
    **orders.length_commitment(step, decodings.written, region),
    "tokens": order.count_B,
    "ended": [row.ended for row in decodings.rows],
    "tied": arness.tied_share(step, region),
    "revised": [row.revised for row in decodings.rows],
  }


def _samples(group):
  """((step, region), seeds) of each problem: int and bool [samples, L], and which seeds they are of."""
  where = {}
  for s, decodings in enumerate(group.seeds):
    for b, row in enumerate(decodings.rows):
      where.setdefault(row.name, []).append((s, b))
  for name in group.names:
    width = max(group.seeds[s].step.shape[1] for s, _ in where[name])
    step = np.full((len(where[name]), width), -1, np.int32)
    region = np.zeros(step.shape, bool)
    for i, (s, b) in enumerate(where[name]):
      size = group.seeds[s].step.shape[1]
      step[i, :size], region[i, :size] = group.seeds[s].step[b], group.seeds[s].region[b]
    yield (step, region), [s for s, _ in where[name]]


def variants(group, ties):
  """Mean AR-ness under each way of counting: {"local" or "global": {"tail, ...": [mean for each k]}}."""
  found = {"local": {}, "global": {}}
  for tail in ("trim", "keep"):
    rows = [arness.orders_of(d.step, d.region if tail == "trim" else d.written, ties)
            for d in group.seeds]  # fmt: skip
    found["global"][tail] = arness.column_means(
      np.concatenate([arness.global_arness(order) for order in rows])
    ).tolist()
    for way in itertools.product(("set", "sequence"), ("seen", "all")):
      local = [arness.local_arness(order, arness.LOCAL_K, *way) for order in rows]
      found["local"][", ".join((tail, *way))] = arness.column_means(np.concatenate(local)).tolist()
  return found


def random_reference(group, options):
  """What random orders of as many tokens would score: {"local@k" or "global@k": mean}."""
  lengths, times = np.unique(
    np.concatenate([(d.region & (d.step >= 0)).sum(axis=1) for d in group.seeds]),
    return_counts=True,
  )
  local = functools.partial(
    arness.random_local, definition=options.definition, denominator=options.denominator
  )
  found = {}
  for name, expected, most in (
    ("local", local, arness.LOCAL_K),
    ("global", arness.random_global, arness.GLOBAL_K),
  ):
    for k in range(1, most + 1):
      values = np.array([expected(int(n), k) for n in lengths])
      known = np.isfinite(values)
      found[f"{name}@{k}"] = float(arness.ratio((values * times)[known].sum(), times[known].sum()))
  return found


def profiles(group, options):
  """Where AR-ness is lost: {"local@1" and "global@1": {"by_step", "by_position": list}}.

  By step in `STEP_BINS` equal parts of decoding; by position place by place, where at least a tenth of
  the rows have one.
  """
  width = max(d.step.shape[1] for d in group.seeds)
  found = {"local@1": [], "global@1": []}
  counts, places = [], []
  for d in group.seeds:
    order = arness.orders_of(d.step, d.region, options.ties)
    hits = {
      "local@1": arness.local_hits(order, 1, options.definition)[:, :, 0],
      "global@1": arness.global_hits(order, 1)[:, :, 0],
    }
    grow = ((0, 0), (0, width - d.step.shape[1]))
    for name, hits_BT in hits.items():
      found[name].append(np.pad(hits_BT, grow, constant_values=np.nan))
    counts.append(order.count_B)
    places.append(np.pad(order.place_BT, grow))
  count, place = np.concatenate(counts), np.concatenate(places)
  least = math.ceil(len(count) / 10)
  return {
    name: {
      "by_step": arness.by_step(np.concatenate(hits), count, STEP_BINS).tolist(),
      "by_position": arness.by_position(np.concatenate(hits), place, width, least).tolist(),
    }
    for name, hits in found.items()
  }


def entropy_sink(group, confidence):
  """{"gap", "sink" (over the answer), "gap_canvas", "sink_canvas" (over all that was to be written)}.

  Args:
    group: `Group`. confidence: float [B, L] of the rows of its first seed, at the first step.
  Returns:
    dict of float [P, 1]; see `orders.entropy_sink`.
  """
  first = group.seeds[0]
  alone = group._replace(seeds=[first])
  return {
    name + where: crossed(alone, [value])
    for where, places in (("", first.region), ("_canvas", first.written))
    for name, value in orders.entropy_sink(confidence, places).items()
  }


def by_place(values):
  """Mean of float [B, L] at each place, with its interval over rows: {"mean", "low", "high": list}."""
  means = [bootstrap.mean_interval(column[:, None]) for column in values.T]
  return dict(zip(("mean", "low", "high"), map(list, zip(*means, strict=True)), strict=True))


def committed_map(group, rows):
  """`orders.committed_map` of all seeds' rows, by shares of the most steps that one of them took."""
  width = max(d.step.shape[1] for d in group.seeds)
  grow = lambda x, fill: np.pad(  # noqa: E731
    x, ((0, 0), (0, width - x.shape[1])), constant_values=fill
  )
  step = np.concatenate([grow(d.step, -1) for d in group.seeds])
  written = np.concatenate([grow(d.written, False) for d in group.seeds])
  return orders.committed_map(step, written, int(step.max(initial=0)) + 1, rows)


def summary(values):
  """Mean, intervals and spread over problems of [P, S], as a dict for results.json."""
  both, seeds = bootstrap.mean_interval(values), bootstrap.seed_interval(values)
  spread = bootstrap.spread_interval(values)
  return {
    "mean": both.value, "low": both.low, "high": both.high,
    "seed_low": seeds.low, "seed_high": seeds.high,
    "spread": spread._asdict(), "values": int(np.isfinite(values).sum()),
  }  # fmt: skip


# --- Between labels.


def changes(groups, values):
  """Differences of `COMPARED` between successive labels, and between the first and the last.

  Args:
    groups: list of `Group`. values: {label: {name: [P, S]}}.
  Returns:
    list of dicts: "from", "to", "measure", "paired", "before" and "after" (means), "difference",
    "low", "high" (problems and seeds resampled), "seed_low", "seed_high" (seeds alone) and "change":
    "falls" or "rises" where no interval that there is holds 0, else "not told".
  """
  pairs = [*itertools.pairwise(groups)]
  if len(groups) > 2:
    pairs.append((groups[0], groups[-1]))
  found = []
  for first, last in pairs:
    for name in COMPARED:
      if name not in values[first.label] or name not in values[last.label]:
        continue
      before, after = values[first.label][name], values[last.label][name]
      paired = same_problems(first, last) and before.shape == after.shape
      if paired:  # what one of them lacks is left out of both
        after = after[[last.names.index(name) for name in first.names]]
        known = np.isfinite(before) & np.isfinite(after)
        before, after = np.where(known, before, np.nan), np.where(known, after, np.nan)
      both = bootstrap.difference_interval(after, before, paired)
      if math.isnan(both.value):
        continue
      seeds = bootstrap.Interval(both.value, math.nan, math.nan)
      if paired:
        seeds = bootstrap.seed_interval(after - before)
      # NaN ends, where there is one problem or one seed, exclude nothing.
      ends = [x for x in (both.low, both.high, seeds.low, seeds.high) if not math.isnan(x)]
      sure = bool(ends) and (max(ends) < 0 or min(ends) > 0)
      found.append({
        "from": first.label, "to": last.label, "measure": name, "paired": paired,
        "before": float(np.nanmean(before)), "after": float(np.nanmean(after)),
        "difference": both.value, "low": both.low, "high": both.high,
        "seed_low": seeds.low, "seed_high": seeds.high,
        "change": ("falls" if both.value < 0 else "rises") if sure else "not told",
      })  # fmt: skip
  return found


def order_matrix(groups):
  """How far orders are apart within labels and between them, on the same problems.

  Args:
    groups: list of `Group` of the same problems.
  Returns:
    (mean distances, float [labels, labels], the differences "between the first and the last label, less
    the mean of the two within", float [P, 1]): above 0, the label changes the order itself and not
    only its spread. Samples of one seed share their noise, so between labels only samples of different
    seeds are compared (where there are several).
  """
  names = groups[0].names
  by_name = [dict(zip(group.names, _samples(group), strict=True)) for group in groups]
  sums = np.full((len(names), len(groups), len(groups)), np.nan)
  for p, name in enumerate(names):
    parts = [found[name] for found in by_name]
    width = max(step.shape[1] for (step, _), _ in parts)
    grow = lambda x, fill, w=width: np.pad(  # noqa: E731
      x, ((0, 0), (0, w - x.shape[1])), constant_values=fill
    )
    step = np.concatenate([grow(step, -1) for (step, _), _ in parts])
    region = np.concatenate([grow(region, False) for (_, region), _ in parts])
    label = np.repeat(np.arange(len(parts)), [len(seeds) for _, seeds in parts])
    seed = np.concatenate([seeds for _, seeds in parts])
    apart = orders.distances(step, region)
    several = len(set(seed.tolist())) > 1
    for a, b in itertools.product(range(len(parts)), repeat=2):
      block = (label[:, None] == a) & (label[None] == b) & np.isfinite(apart)
      if a == b or several:
        block &= seed[:, None] != seed[None]
      if block.any():
        sums[p, a, b] = apart[block].mean()
  return arness.column_means(sums), (sums[:, 0, -1] - (sums[:, 0, 0] + sums[:, -1, -1]) / 2)[
    :, None
  ]
