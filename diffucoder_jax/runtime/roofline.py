"""The best a compiled program can do on its chips: compute, HBM, ICI and DCN, each at its peak.

Two bounds: if everything overlaps perfectly, the slowest of the four decides; if nothing does, their
sum. What a real step takes lies between the two at best, since no unit runs at its peak all the time.
"""

from typing import NamedTuple

UNITS = ("compute", "hbm", "ici", "dcn")


class Roofline(NamedTuple):
  """Seconds of one call on a device: `compute`, `hbm`, `ici`, `dcn`; and `useful`, seconds that the
  model's own FLOPs would take at the peak."""

  compute: float
  hbm: float
  ici: float
  dcn: float
  useful: float

  @property
  def seconds(self):
    """With perfect overlap."""
    return max(self.compute, self.hbm, self.ici, self.dcn)

  @property
  def serial_seconds(self):
    """With no overlap."""
    return self.compute + self.hbm + self.ici + self.dcn

  @property
  def limit(self):
    """Which of `UNITS` is the slowest."""
    return max(UNITS, key=lambda unit: getattr(self, unit))

  @property
  def mfu(self):
    """Model FLOPs utilisation with perfect overlap: the bound."""
    return self.useful / self.seconds

  @property
  def serial_mfu(self):
    """Model FLOPs utilisation with no overlap."""
    return self.useful / self.serial_seconds


def roofline(chip, devices, useful_flops, executed_flops, hbm_bytes, ici_seconds, dcn_bytes):
  """`Roofline` of one call.

  Args:
    chip: `topology.Chip`. devices: int, of the whole program.
    useful_flops, executed_flops: of all devices together.
    hbm_bytes, ici_seconds, dcn_bytes: of one device.
  """
  peak = chip.flops / chip.devices
  return Roofline(
    compute=executed_flops / devices / peak,
    hbm=hbm_bytes / (chip.hbm_rate / chip.devices),
    ici=ici_seconds,
    dcn=dcn_bytes / (chip.dcn_rate / chip.devices),
    useful=useful_flops / devices / peak,
  )


WANTED_SPARE = 0.15


def verdict(usable, peak, reason=None):
  """(fits, sentence) about a program that needs `peak` of `usable` bytes; `reason`: why it was not
  compiled."""
  if reason is not None:
    return False, f"does not fit, because {reason}"
  spare = 1 - peak / usable
  need = f"{peak / 2**30:.2f} of {usable / 2**30:.2f} GiB"
  if spare < 0:
    return False, f"does not fit, because the peak is {need}"
  tight = "" if spare >= WANTED_SPARE else f" (tight: less than {WANTED_SPARE:.0%})"
  return True, f"fits: {need} at the peak, {spare:.1%} spare{tight}"
