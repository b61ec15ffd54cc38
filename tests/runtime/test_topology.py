"""The names of TPU slices, what the chips can do, and the roofline, against numbers worked by hand."""

import dataclasses

import numpy as np
import pytest

from diffucoder_jax.runtime import collectives, metrics, roofline, sharding, topology
from diffucoder_jax.runtime.collectives import Collective, Place, Torus


@pytest.mark.parametrize(
  ("name", "chip", "shape", "slices", "devices", "wrap"),
  [
    ("v4-8", "v4", (2, 2, 1), 1, 4, (False,) * 3),
    ("v5p-64", "v5p", (2, 4, 4), 1, 32, (False,) * 3),  # names of v4 and v5p count cores
    ("v5p-128", "v5p", (4, 4, 4), 1, 64, (True,) * 3),
    ("v5e-256", "v5e", (16, 16), 1, 256, (True, True)),
    ("v5litepod-16", "v5e", (4, 4), 1, 16, (False, False)),
    ("V6E-128", "v6e", (8, 16), 1, 128, (False, True)),
    ("tpu7x-128", "tpu7x", (4, 4, 4), 1, 128, (True,) * 3),  # two devices to a chip
    ("2xv5e-256", "v5e", (16, 16), 2, 512, (True, True)),
  ],
)
def test_names(name, chip, shape, slices, devices, wrap):
  found = topology.parse(name)
  assert (found.chip, found.shape, found.slices) == (chip, shape, slices)
  assert found.num_devices == devices and found.wrap == wrap


def test_names_that_are_none():
  with pytest.raises(ValueError, match="no slice of v5p; there are v5p-8, v5p-16, v5p-32, v5p-64"):
    topology.parse("v5p-65")
  for name in ("h100-8", "v5p", "v5p:2x2x2", "0xv5e-16", ""):
    with pytest.raises(ValueError, match="unknown TPU"):
      topology.parse(name)


def test_chips_agree_with_the_table_that_training_uses():
  kinds = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
  }
  assert kinds.keys() == topology.CHIPS.keys()
  for name, kind in kinds.items():
    chip = topology.CHIPS[name]
    assert metrics.peak_flops(kind) == chip.flops / chip.devices
    assert 0.9 < chip.usable_hbm / chip.hbm < 1
  # 4800 Gbit/s one way over the six links of a v5p, 1600 over the four of a v5e.
  assert topology.CHIPS["v5p"].link == 4800e9 / 8 / 6
  assert topology.CHIPS["v5e"].link == 1600e9 / 8 / 4
  # Of a pod of 256: 6.4 and 25.6 Tbit/s (docs.cloud.google.com/tpu/docs/v6e).
  assert 256 * topology.CHIPS["v5e"].dcn_rate == 6.4e12 / 8
  assert 256 * topology.CHIPS["v6e"].dcn_rate == 25.6e12 / 8


# ---------------------------------------------------------------------------------------------
# What collectives cost

RING = Torus((4, 4), (True, True), 100.0)
LINE = Torus((4, 4), (False, False), 100.0)
GRID = [Place(0, (x, y)) for x in range(4) for y in range(4)]
ROWS = tuple(tuple(range(4 * x, 4 * x + 4)) for x in range(4))
ALL = (tuple(range(16)),)


@pytest.mark.parametrize(
  ("kind", "groups", "torus", "received", "rate"),
  [
    ("all-gather", ROWS, RING, 0.75 * 800, 200.0),  # from both neighbours of a ring
    ("all-gather", ROWS, LINE, 0.75 * 800, 100.0),  # the ends of a line have one
    ("reduce-scatter", ALL, RING, 15 / 16 * 800, 400.0),  # both axes at once
    ("all-reduce", ALL, LINE, 2 * 15 / 16 * 800, 200.0),
    # Every second chip: two such groups share the ring's links.
    ("all-gather", ((0, 2), (1, 3)), LINE, 0.5 * 800, 50.0),
    # Four in a ring: two pieces of 200 go one link, one goes two; both directions share them.
    ("all-to-all", ROWS, RING, 0.75 * 800, 600 / (800 / 200)),
    # On a line everything of the left half for the right one passes one link: 4 / 4 of 800.
    ("all-to-all", ROWS, LINE, 0.75 * 800, 600 / (800 / 100)),
  ],
)
def test_cost_inside_a_slice(kind, groups, torus, received, rate):
  found = collectives.cost(Collective(kind, 800.0, groups, 1, ""), GRID, torus)
  assert found == pytest.approx((received, 0.0, received / rate))


def test_cost_between_slices():
  """Four chips in each of two slices reduce 800 bytes: 2 x 3/4 inside, then a quarter of it across."""
  places = [Place(s, (0, y)) for s in (0, 1) for y in range(4)]
  one = Collective("all-reduce", 800.0, (tuple(range(8)),), 1, "")
  assert collectives.cost(one, places, RING)[:2] == (2 * 600.0, 2 * 200.0 / 2)
  only_across = Collective("all-reduce", 800.0, ((0, 4), (1, 5)), 1, "")
  assert collectives.cost(only_across, places, RING) == (0.0, 800.0, 0.0)
  sent = Collective("all-reduce", 200.0, (), 3, "")  # as the compiled program has it
  by_kind, _ = collectives.totals([sent], places, RING, slices=2)
  assert by_kind["all-reduce"].dcn_bytes == 3 * 200.0


def test_permutations_of_one_loop_share_the_links():
  """To the right and to the left at once use different links; twice to the right the same ones."""
  row = [Place(0, (0, y)) for y in range(4)]
  right = tuple((i, (i + 1) % 4) for i in range(4))
  left = tuple((b, a) for a, b in right)
  seconds = lambda *pairs, torus=RING: collectives.permutation_seconds(  # noqa: E731
    [(100.0, one) for one in pairs], row, torus
  )
  assert seconds(right) == seconds(right, left) == 1.0
  assert seconds(right, right) == 2.0
  # Without a ring the last one's data travels back over three links, beside the others' of `left`.
  assert seconds(right, torus=LINE) == 1.0 and seconds(right, left, torus=LINE) == 2.0
  found = [Collective("collective-permute", 100.0, p, 5, "", "body") for p in (right, left)]
  by_kind, each = collectives.totals(found, row, RING)
  assert by_kind["collective-permute"].ici_seconds == pytest.approx(5.0)
  assert by_kind["collective-permute"].ici_bytes == 5 * 200.0 and len(each) == 2


def test_two_cores_of_a_chip_share_its_links():
  torus = Torus((2, 2, 1), (False,) * 3, 100.0, cores=2)
  places = [Place(0, (x, y, 0), core) for x in range(2) for y in range(2) for core in range(2)]
  across = Collective("all-gather", 800.0, ((0, 2, 4, 6),), 1, "")
  assert collectives.cost(across, places, torus).ici_seconds == pytest.approx(600 / (2 * 50))
  inside = Collective("all-gather", 800.0, ((0, 1),), 1, "")
  assert collectives.cost(inside, places, torus).ici_seconds == pytest.approx(400 / 1200)


# ---------------------------------------------------------------------------------------------
# Roofline


def test_roofline_by_hand():
  """32 chips of v5p: 2 s of useful FLOPs, 2.5 s of executed ones, HBM 1 s, ICI 3 s, DCN 0.5 s."""
  chip = topology.CHIPS["v5p"]
  roof = roofline.roofline(
    chip, 32, 2 * 32 * 459e12, 2.5 * 32 * 459e12, 2765e9, 3.0, 0.5 * 50e9 / 8
  )
  assert roof == pytest.approx((2.5, 1.0, 3.0, 0.5, 2.0))
  assert (roof.limit, roof.seconds, roof.serial_seconds) == ("ici", 3.0, pytest.approx(7.0))
  assert roof.mfu == pytest.approx(2 / 3) and roof.serial_mfu == pytest.approx(2 / 7)
  # A device of tpu7x is half a chip.
  half = roofline.roofline(topology.CHIPS["tpu7x"], 2, 2307e12, 2307e12, 7380e9 / 2, 0.0, 0.0)
  assert half == pytest.approx((1.0, 1.0, 0.0, 0.0, 1.0))


def test_verdicts():
  gib = 2.0**30
  assert roofline.verdict(16 * gib, 8 * gib) == (
    True,
    "fits: 8.00 of 16.00 GiB at the peak, 50.0% spare",
  )
  assert "tight: less than 15%" in roofline.verdict(16 * gib, 15 * gib)[1]
  assert roofline.verdict(16 * gib, 17 * gib)[0] is False
  assert roofline.verdict(16 * gib, 0, "of VMEM") == (False, "does not fit, because of VMEM")


def test_compare_shows_what_differs():
  first = {
    "mesh": {"data": 1, "fsdp": 8},
    "roofline": {"mfu": 0.5},
    "warnings": ["x"],
    "fits": True,
  }
  second = {"mesh": {"data": 2, "fsdp": 8}, "roofline": {"mfu": 0.6}, "warnings": [], "fits": False}
  head, *lines = roofline.compare(first, second)
  assert [line.split() for line in lines] == [
    ["mesh.data", "1", "2", "2.000"], ["roofline.mfu", "0.5", "0.6", "1.200"], ["fits", "True", "False"],
  ]  # fmt: skip
  assert head.split() == ["A", "B", "B", "/", "A"]


# ---------------------------------------------------------------------------------------------
# Where devices go in the mesh


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  process_index: int
  slice_index: int
  coords: tuple[int, ...]
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def tpu_devices(shape, slices=1):
  """Like libtpu's: hosts of 2 x 2 chips along the first two axes, one after the other."""
  found = []
  for s in range(slices):
    for y in range(shape[1]):
      for x in range(shape[0]):
        host = s * shape[0] * shape[1] // 4 + (y // 2) * (shape[0] // 2) + x // 2
        found.append(Device(id=len(found), process_index=host, slice_index=s, coords=(x, y, 0)))
  return found


@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 8, 1), (1, 8, 2), (2, 2, 4), (4, 4, 1)])
@pytest.mark.parametrize("slices", [1, 2])
def test_every_host_holds_one_block_of_rows(sizes, slices):
  """Whatever the torus: else the loader of a host would have to read scattered rows, and refuses."""
  sizes = (sizes[0] * slices, *sizes[1:])
  mesh = sharding.make_mesh(
    dict(zip(sharding.AXES, sizes, strict=True)), tpu_devices((4, 4), slices)
  )
  assert mesh.devices.shape == sizes
  assert len({device.id for device in mesh.devices.flat}) == 16 * slices
  rows = {}
  for row, group in enumerate(mesh.devices.reshape(-1, sizes[2])):
    for device in group:
      rows.setdefault(device.process_index, set()).add(row)
  for held in map(sorted, rows.values()):
    assert held == list(range(held[0], held[0] + len(held))) and held[0] % len(held) == 0
  # Only `data` crosses slices.
  for part in np.split(mesh.devices, slices):
    assert len({device.slice_index for device in part.flat}) == 1


def test_slices_must_share_data():
  with pytest.raises(ValueError, match="data=1 cannot be divided over 2 TPU slices"):
    sharding.make_mesh(dict(data=1, fsdp=32, tensor=1), tpu_devices((4, 4), 2))
