"""What a compiled program sends between devices: which collectives, how many bytes, over which links.

Three shapes that XLA's TPU compiler gives to collectives need care. A reduce-scatter is a fusion in
which an all-reduce is cut by a dynamic-slice. An asynchronous all-gather appears in the fusion that
starts it, in the fusions that run beside it and in the one that ends it, all with one `chain_id`; it
is counted where it starts. With several slices the text is one slice's program, and what goes to the
others is a `send` to the host, with the kind of transfer among its attributes.
"""

import collections
import dataclasses
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = (
  "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip


# What a send between slices does, by the name it has there; others move what they are given.
TRANSFERS = {
  "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
  "ALL_TO_ALL": "all-to-all",
}  # fmt: skip


class Place(NamedTuple):
  """Where a device is: which slice, its chip's coordinates in the torus, which core of that chip."""

  slice: int
  coords: tuple[int, ...]
  core: int = 0


class Torus(NamedTuple):
  """A slice's network: `shape` in chips, `wrap` per axis, `link`, bytes/s of one link one way, and
  `cores`, devices that share a chip's links."""

  shape: tuple[int, ...]
  wrap: tuple[bool, ...]
  link: float
  cores: int = 1


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program.

  Attributes:
    kind: one of `KINDS`. bytes: of the whole array on a device: what is gathered, or what goes into
      a reduction, an exchange or a permutation.
    groups: device numbers (in the mesh's order) that work together; of a permutation, its pairs;
      empty for a transfer between slices, through the hosts.
    times: runs in one call of the program. where: the operation it comes from. scope: the
      computation it stands in; permutations of one scope are in flight together.
  """

  kind: str
  bytes: float
  groups: tuple[tuple[int, ...], ...]
  times: float
  where: str
  scope: str = ""

  @property
  def group_size(self):
    return max(map(len, self.groups), default=0)


# ---------------------------------------------------------------------------------------------
# Reading them


def _grid(sizes, permutation):
  """Device numbers 0.. laid out as `sizes`, transposed by `permutation` (None: not)."""
  grid = np.arange(math.prod(sizes)).reshape(sizes)
  return grid if permutation is None else grid.transpose(permutation)


def _numbers(text):
  return [int(number) for number in text.split(",") if number.strip()]


def replica_groups(text, devices):
  """Groups of device numbers from a collective's attributes, in any of the three ways to write them.

  Args:
    text: with `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]` (perhaps with T(...), a transposition), or
      `mesh['a'=2,'b'=2] {'b'}` (perhaps with `device_ids=([...]T(...))`).
    devices: int, how many there are; an empty list of groups means all of them.
  Raises:
    ValueError: another form.
  """
  text = re.search(r"replica_groups=(.*)", text).group(1)
  if text.startswith("{"):
    end = text.index("}}") + 1 if text.startswith("{{") else text.index("}")
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text[: end + 1])]
    return tuple(map(tuple, groups)) or (tuple(range(devices)),)
  found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if found:
    shape, sizes, order = found.groups()
    grid = _grid(_numbers(sizes), _numbers(order) if order else None)
    return tuple(map(tuple, grid.reshape(_numbers(shape)).tolist()))
  found = re.match(
    r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
  )
  if found is None or ":(" in found.group(4):
    raise ValueError(f"replica groups of an unknown form: {text[:120]}")
  axes = re.findall(r"'([^']+)'=(\d+)", found.group(1))
  sizes = [int(size) for _, size in axes]
  order = None if found.group(2) is None else _numbers(found.group(2))
  ids = _grid(
    [math.prod(sizes)] if order is None else order, _numbers(found.group(3) or "") or None
  )
  chosen = re.findall(r"'([^']+)'", found.group(4))
  inside = [i for i, (name, _) in enumerate(axes) if name in chosen]
  outside = [i for i in range(len(axes)) if i not in inside]
  grid = ids.reshape(sizes).transpose(outside + inside)
  size = math.prod(sizes[i] for i in inside)
  return tuple(map(tuple, grid.reshape(-1, size).tolist()))


def _pairs(text):
  inside = re.search(r"source_target_pairs=\{(.*?)\}\}", text).group(1)
  return tuple(tuple(_numbers(pair)) for pair in re.findall(r"\{([\d,]+)", inside + "}"))


def _is_scattered(computation, name):
  """Whether an all-reduce's result is only ever read in slices, inside one fusion."""
  users = [one for one in computation if name in one.operands]
  while users and all(one.opcode in ("get-tuple-element", "bitcast") for one in users):
    names = {one.name for one in users}
    users = [one for one in computation if names & set(one.operands)]
  return bool(users) and all(one.opcode == "dynamic-slice" for one in users)


def _payload(kind, one, computation):
  """Bytes of the whole array; see `Collective`."""
  starts = one.opcode.endswith("-start")
  output = one.arrays
  operands = [
    array
    for name in one.operands
    for array in computation.instructions[name].arrays
  ]  # fmt: skip
  if kind == "all-gather":
    if starts:  # (inputs, outputs)
      output = output[len(operands) :]
    return sum(array.bytes for array in output)
  return sum(array.bytes for array in operands)


def find(module, runs, devices):
  """The program's collectives.

  Args:
    module: `hlo.Module`. runs: `hlo.Runs` of it. devices: int, how many it is for.
  Returns:
    list of `Collective`; those among one device, and those that never run, are left out.
  """
  found = []
  fused = {
    called
    for computation in module.computations.values()
    for one in computation
    if one.opcode == "fusion"
    for called in one.called("calls")
  }
  for name, computation in module.computations.items():
    if not runs.times[name]:
      continue
    starts_chain = any("AsyncCollectiveStart" in one.attributes for one in computation)
    for one in computation:
      transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
      if one.opcode == "send" and transfer:
        kind = TRANSFERS.get(transfer.group(1), "collective-permute")
        size = sum(x.bytes for x in computation.instructions[one.operands[0]].arrays)
        found.append(Collective(kind, size, (), runs.times[name], one.op_name, name))
        continue
      kind = one.opcode.removesuffix("-start")
      if kind not in KINDS or one.opcode.endswith("-done"):
        continue
      if "chain_id=" in one.attributes and not starts_chain:
        continue  # a later part of one that is counted where it starts
      if kind == "all-reduce" and name in fused and _is_scattered(computation, one.name):
        kind = "reduce-scatter"
      if kind == "collective-permute":
        groups = tuple(pair for pair in _pairs(one.attributes) if pair[0] != pair[1])
      else:
        groups = replica_groups(one.attributes, devices)
      if not groups or max(map(len, groups)) < 2:
        continue
      size = _payload(kind, one, computation)
      found.append(Collective(kind, size, groups, runs.times[name], one.op_name, name))
  return found


# ---------------------------------------------------------------------------------------------
# What they cost


class Cost(NamedTuple):
  """Of one run, for the device that has most to do: bytes that it receives over ICI and over DCN, and
  seconds that its links need for the first."""

  ici_bytes: float
  dcn_bytes: float
  ici_seconds: float


def _axis_rate(values, size, wraps, link):
  """Bytes/s a device can receive along one torus axis from a group that has `values` on it."""
  gaps = {b - a for a, b in itertools.pairwise(values)}
  gap = max(gaps)
  if wraps and len(gaps) == 1 and gap * len(values) == size and len(values) > 2:
    return 2 * link / gap  # a ring, shared by the groups in between
  return link / gap  # a line, whose ends have one neighbour


def _axes(places, torus):
  """(chips, bytes/s a device can receive) for each axis that a group inside one slice spans."""
  found = []
  for axis, (size, wraps) in enumerate(zip(torus.shape, torus.wrap, strict=True)):
    values = sorted({place.coords[axis] for place in places})
    if len(values) > 1:
      found.append((len(values), _axis_rate(values, size, wraps, torus.link) / torus.cores))
  # Between two cores of one chip: "six times faster than a 1D ICI link" (docs.cloud.google.com/tpu/
  # docs/tpu7x, dual-chiplet architecture).
  return found or [(2, 6 * 2 * torus.link)]


def _seconds(kind, one_bytes, received, places, torus):
  """Of a group inside one slice: all axes work at once, but what an exchange sends far passes the
  middle of an axis of n chips: n / 4 of what a device has."""
  axes = _axes(places, torus)
  if "all-to-all" in kind:
    return max(one_bytes * chips / 4 / rate for chips, rate in axes)
  return received / sum(rate for _, rate in axes)


def _route(a, b, torus):
  """Links from chip to chip, (coordinates, axis, direction), axis by axis, the short way round."""
  at, links = list(a.coords), []
  for axis, (size, wraps) in enumerate(zip(torus.shape, torus.wrap, strict=True)):
    distance = b.coords[axis] - at[axis]
    if wraps and abs(distance) > size / 2:
      distance -= int(math.copysign(size, distance))
    step = 1 if distance > 0 else -1
    for _ in range(abs(distance)):
      links.append((tuple(at), axis, step))
      at[axis] = (at[axis] + step) % size
  return links


def permutation_seconds(bytes_and_pairs, places, torus):
  """Seconds of permutations that are in flight together: those of the link that carries most."""
  load = collections.Counter()
  for size, pairs in bytes_and_pairs:
    for a, b in pairs:
      if places[a].slice == places[b].slice:
        load.update({link: size for link in _route(places[a], places[b], torus)})
  return max(load.values(), default=0.0) / torus.link


def cost(one, places, torus, slices=1):
  """`Cost` of one run of a collective by the best algorithm for the links that it may use.

  An all-gather or reduce-scatter of V bytes over n devices moves V (n - 1) / n to each device, an
  all-reduce twice that. Groups that span s slices first work inside a slice, then each device
  exchanges its part between the slices.

  Args:
    one: `Collective`. places: list of `Place` by device number. torus: `Torus`. slices: int, how many.
  """
  factor = 2 if one.kind == "all-reduce" else 1
  if not one.groups:
    share = {"all-gather": slices - 1, "collective-permute": 1}.get(one.kind, (slices - 1) / slices)
    return Cost(0.0, factor * share * one.bytes, 0.0)
  if one.kind == "collective-permute":
    inside = [pair for pair in one.groups if places[pair[0]].slice == places[pair[1]].slice]
    crossing = len(inside) < len(one.groups)
    seconds = permutation_seconds([(one.bytes, inside)], places, torus)
    return Cost(one.bytes if inside else 0.0, one.bytes if crossing else 0.0, seconds)
  worst = Cost(0.0, 0.0, 0.0)
  for group in one.groups:
    by_slice = collections.defaultdict(list)
    for device in group:
      by_slice[places[device].slice].append(places[device])
    parts, inside = len(by_slice), max(map(len, by_slice.values()))
    ici = factor * one.bytes * (inside - 1) / inside
    dcn = factor * one.bytes / inside * (parts - 1) / parts
    if "all-to-all" in one.kind:
      ici = one.bytes * (inside - 1) / len(group)
      dcn = one.bytes * (parts - 1) / parts
    seconds = 0.0
    if inside > 1:
      seconds = max(
        _seconds(one.kind, one.bytes, ici, members, torus) for members in by_slice.values()
      )
    worst = Cost(*map(max, worst, Cost(ici, dcn, seconds)))
  return worst


class Totals(NamedTuple):
  """Of a whole call of the program: `count` of collectives that run, `bytes` over ICI and DCN that a
  device receives, and the seconds of ICI."""

  count: float = 0.0
  ici_bytes: float = 0.0
  dcn_bytes: float = 0.0
  ici_seconds: float = 0.0


def totals(found, places, torus, slices=1):
  """What a list of `Collective` costs in one call of the program.

  Returns:
    ({kind: `Totals`}, [(`Collective`, its own `Totals`)], the costliest first).
  """
  together = collections.defaultdict(list)
  for one in found:
    if one.kind == "collective-permute" and one.groups:
      together[one.scope].append((one.bytes, one.groups))
  seconds_per_byte = {
    scope: permutation_seconds(pairs, places, torus) / max(sum(size for size, _ in pairs), 1)
    for scope, pairs in together.items()
  }
  by_kind, each, costs = {}, [], {}
  for one in found:
    shape = (one.kind, one.bytes, one.groups)
    if shape not in costs:
      costs[shape] = cost(one, places, torus, slices)
    once = costs[shape]
    if one.kind == "collective-permute" and one.groups:  # its part of what goes on together
      once = once._replace(ici_seconds=one.bytes * seconds_per_byte[one.scope])
    whole = Totals(one.times, *(one.times * x for x in once))
    each.append((one, whole))
    by_kind[one.kind] = Totals(*map(sum, zip(by_kind.get(one.kind, Totals()), whole, strict=True)))
  each.sort(key=lambda pair: (-pair[1].ici_seconds, -pair[1].dcn_bytes))
  return {kind: by_kind[kind] for kind in KINDS if kind in by_kind}, each
