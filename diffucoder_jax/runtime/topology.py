"""TPU slices by the names people use: which chips, how they are wired, and what each of them can do.

Names: "v5p-64", "v5e-256" (or "v5litepod-256"), "v6e-64", "v4-128", "tpu7x-256"; "2xv5e-256" is two
such slices over the data-centre network. As on Google Cloud, v4 and v5p names count TensorCores, two
to a chip, so v5p-64 has 32 chips; v5e and v6e names count chips; tpu7x names count TensorCores, which
JAX sees as devices of their own.

`devices` describes them through libtpu, without a TPU: what a program is compiled for ahead of time.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from diffucoder_jax.runtime import flags
from diffucoder_jax.runtime.collectives import Place, Torus


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip is. Numbers of the vendor's pages; `usable_hbm` is what the compiler has to give.

  Attributes:
    kind: how libtpu calls it. cores_per_name: units that a name counts, per chip.
    devices: JAX devices per chip. per_host: chips that share a host's network cards.
    dims: 2 or 3, axes of the torus. flops: bfloat16 FLOP/s. hbm, usable_hbm: bytes.
    hbm_rate: bytes/s. ici_rate: bytes/s of all links of a chip, both ways.
    host_dcn_rate: bytes/s of a host's network cards, one way.
  """

  kind: str
  cores_per_name: int
  devices: int
  per_host: int
  dims: int
  flops: float
  hbm: float
  usable_hbm: float
  hbm_rate: float
  ici_rate: float
  host_dcn_rate: float

  @property
  def dcn_rate(self):
    """Bytes/s of a chip's share of its host's network cards."""
    return self.host_dcn_rate / self.per_host

  @property
  def link(self):
    """Bytes/s of one link, one way."""
    return self.ici_rate / (2 * 2 * self.dims)


GB, GIB, TERA = 1e9, 2.0**30, 1e12
GBIT = 1e9 / 8
# Sources, of November 2026: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, section "System
# architecture". `usable_hbm` is what libtpu 0.0.42's compiler says that a program may use ("exceeds
# available HBM"); the rest is reserved.
CHIPS = {
  # /v4: 275 TFLOPs, 32 GiB at 1200 GBps; 6 links of 50 GB/s one way (Jouppi et al. 2023, "TPU v4",
  # arxiv.org/abs/2304.01433). DCN: taken to be that of the next generation, /v5p.
  "v4": Chip("v4", 2, 1, 4, 3, 275 * TERA, 32 * GIB, 30.75 * GIB, 1200 * GB, 600 * GB, 200 * GBIT),
  # /v5e: 197 TFLOPs, 16 GB at 819 GBps, ICI 400 GBps both ways, 8 chips per host, 2 x 100 Gbps.
  "v5e": Chip("v5e", 1, 1, 8, 2, 197 * TERA, 16 * GIB, 15.75 * GIB, 819 * GB, 400 * GB, 200 * GBIT),
  # /v5p: 459 TFLOPs, 95 GiB at 2765 GBps, ICI 1200 GBps both ways, DCN 50 Gbps per chip, 4 to a VM.
  "v5p": Chip("v5p", 2, 1, 4, 3, 459 * TERA, 96 * GIB, 95.74 * GIB, 2765 * GB, 1200 * GB, 200 * GBIT),
  # /v6e: 918 TFLOPs, 32 GB at 1638 GBps (table of /tpu7x), ICI 800 GBps both ways, 8 chips per host,
  # 4 x 200 Gbps.
  "v6e": Chip("v6e", 1, 1, 8, 2, 918 * TERA, 32 * GIB, 31.25 * GIB, 1638 * GB, 800 * GB, 800 * GBIT),
  # /tpu7x: 2307 TFLOPs, 192 GiB at 7380 GBps, ICI 1200 GBps both ways, DCN 100 Gbps per chip, 4 to
  # a VM. Two devices to a chip, each with half of it.
  "tpu7x": Chip(
    "tpu7x", 2, 2, 4, 3, 2307 * TERA, 192 * GIB, 2 * 94.75 * GIB, 7380 * GB, 1200 * GB, 400 * GBIT
  ),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7": "tpu7x", "7x": "tpu7x"}
# Slice shapes in chips that Google Cloud offers (same pages, "Configurations"); of several shapes for
# one number, the one that is least long.
SHAPES = {
  2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
  3: [
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 4, 12), (4, 8, 8),
    (4, 4, 16), (4, 8, 12), (8, 8, 8), (8, 8, 12), (8, 8, 16), (8, 16, 16), (16, 16, 16),
    (16, 16, 24),
  ],
}  # fmt: skip


class Topology(NamedTuple):
  """Slices of chips: `name` as given, `chip` a key of `CHIPS`, `shape` of one slice, `slices`."""

  name: str
  chip: str
  shape: tuple[int, ...]
  slices: int

  @property
  def spec(self):
    return CHIPS[self.chip]

  @property
  def chips(self):
    return math.prod(self.shape) * self.slices

  @property
  def num_devices(self):
    return self.chips * self.spec.devices

  @property
  def wrap(self):
    """Which axes are rings. 3D slices: all, where each has 4 chips or a multiple ("All 4x4x4 and larger
    slices have full 3D torus", /v5p). 2D slices: those of 16 chips, the pod's own (jax-ml.github.io/
    scaling-book/tpus)."""
    if self.spec.dims == 2:
      return tuple(size == 16 for size in self.shape)
    whole = all(size % 4 == 0 for size in self.shape)
    return (whole,) * 3

  @property
  def torus(self):
    return Torus(self.shape, self.wrap, self.spec.link, self.spec.devices)


def parse(name):
  """`Topology` of a user-facing name; see the module.

  Raises:
    ValueError: an unknown chip, or a number of chips that is no slice; says which there are.
  """
  found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)-(\d+)", name.strip().lower())
  chip = ALIASES.get(found.group(2), found.group(2)) if found else None
  if chip not in CHIPS or (found.group(1) and int(found.group(1)) < 1):
    raise ValueError(
      f"unknown TPU {name!r}; give a chip and a size such as v5p-64, v5e-256, v6e-64, v4-128, "
      "tpu7x-128, or several slices such as 2xv5e-256"
    )
  spec, units = CHIPS[chip], int(found.group(3))
  sizes = {math.prod(shape): shape for shape in reversed(SHAPES[spec.dims])}
  chips, rest = divmod(units, spec.cores_per_name)
  if rest or chips not in sizes:
    known = ", ".join(f"{chip}-{size * spec.cores_per_name}" for size in sorted(sizes))
    raise ValueError(f"{name!r} is no slice of {chip}; there are {known}")
  return Topology(name, chip, sizes[chips], int(found.group(1) or 1))


def devices(topology):
  """JAX's description of the devices, from libtpu; no TPU is touched and no array can be made.

  Raises:
    ModuleNotFoundError: libtpu is not installed; names the remedy.
  """
  import importlib.util

  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(
      "compiling for a TPU needs libtpu, which is not installed here: pip install -e '.[tpu]' (1.5 GB; "
      "no TPU is needed)"
    )
  from jax.experimental import topologies

  flags.set_flags()  # the compiler's, as on a pod: libtpu reads them when it is loaded
  options = {}
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  if any(topology.wrap):
    wrap = topology.wrap if topology.spec.dims == 3 else (*topology.wrap, False)
    options["wrap"] = wrap
  if topology.chip == "v4":
    options["chip_config_name"] = "megacore"  # without it each core is a device
  if topology.shape == (1, 1):
    options["chips_per_host_bounds"] = (1, 1, 1)
  shape = "x".join(map(str, topology.shape))
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=f"{topology.spec.kind}:{shape}", **options
  )
  return described.devices


def places(mesh_devices, topology):
  """`Place` of each device, in the order of the mesh."""
  dims = topology.spec.dims
  return [
    Place(getattr(one, "slice_index", 0) or 0, tuple(one.coords[:dims]), int(one.core_on_chip))
    for one in mesh_devices
  ]
