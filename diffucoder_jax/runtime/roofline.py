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


# ---------------------------------------------------------------------------------------------
# Saying it


def _shape(mesh):
  return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def describe(result):
  """A result of `aot.analyse`, lines of text."""
  r, gib = result, 2.0**30
  lines = [f"{r['program']} on {r['topology']}, mesh {_shape(r['mesh'])}"]
  if "rows" in r:
    lines += [
      f"  {r['devices']} devices, {r['slices']} slice(s) of {'x'.join(map(str, r['shape']))} chips; "
      f"{r['rows']} rows of {r['length']} tokens, {r['rows_per_device']:g} on a device at a time "
      f"(accumulate {r['accumulate']})",
      f"  remat {r['remat']}, attention {r['attention']}, parameters {r['params']}, computing in "
      f"{r['compute']}; compiled in {r['seconds']['compile']:.0f} s",
    ]
  if "memory" in r:
    m, f, h, roof = r["memory"], r["flops"], r["hbm_bytes"], r["roofline"]
    lines += [
      "",
      "memory of a device, GiB",
      f"  arguments {m['arguments'] / gib:.2f}, outputs {m['outputs'] / gib:.2f} of which "
      f"{m['aliased'] / gib:.2f} in place, temporaries {m['temporaries'] / gib:.2f}, peak "
      f"{m['peak'] / gib:.2f} of {m['usable'] / gib:.2f}",
      "work of one call",
      f"  {f['useful']:.3g} useful FLOPs, {f['executed']:.3g} executed ({f['counting']})",
      f"  HBM: {h['compiled'] / 1e9:.1f} GB per device as compiled, loops with their rounds; "
      f"{h['least'] / 1e9:.1f} GB cannot be avoided",
      "collectives             runs  GB over ICI  GB over DCN  ICI seconds, of one device",
    ]
    for kind, t in r["collectives"].items():
      lines.append(
        f"  {kind:<19} {t['count']:6g} {t['ici_bytes'] / 1e9:12.2f} {t['dcn_bytes'] / 1e9:12.3f} "
        f"{t['ici_seconds']:12.4f}"
      )
    lines.append("  the largest:")
    for one in r["largest_collectives"][:5]:
      lines.append(
        f"    {one['kind']} of {one['bytes'] / 2**20:.1f} MiB over {one['group']}, {one['times']:g} "
        f"times, {one['ici_seconds']:.4f} s: {one['where'][-70:] or 'made by the compiler'}"
      )
    lines += [
      "roofline, seconds",
      f"  compute {roof['compute']:.4f}, HBM {roof['hbm']:.4f}, ICI {roof['ici']:.4f}, DCN "
      f"{roof['dcn']:.4f}; the limit is {roof['limit']}",
      f"  MFU at most {roof['mfu']:.1%} with perfect overlap, {roof['serial_mfu']:.1%} with none",
    ]
    lines += [f"assumed: {line}" for line in r["assumed"]]
  lines += [f"warning: {line}" for line in r.get("warnings", ())]
  return [*lines, r["verdict"]]


def compare(first, second):
  """Two results side by side, lines of text; rows that are equal in both are left out."""

  def flat(tree, prefix=""):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from flat(value, f"{prefix}{key}.")
      elif not isinstance(value, list):
        yield f"{prefix}{key}", value

  left, right = dict(flat(first)), dict(flat(second))
  show = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)  # noqa: E731
  lines = [f"{'':<40} {'A':>24} {'B':>24} {'B / A':>8}"]
  for key in dict.fromkeys([*left, *right]):
    a, b = left.get(key, "-"), right.get(key, "-")
    if a == b:
      continue
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    ratio = f"{b / a:8.3f}" if numbers and a else ""
    lines.append(f"{key:<40} {show(a)[:24]:>24} {show(b)[:24]:>24} {ratio}")
  return lines
