"""Mesh shapes, micro-batches and remat policies worth compiling: those that divide, fit and may win.

Compiling takes a minute or two each, so what a candidate needs and can do is first reckoned on paper,
from below: if that is too much memory, or slower than what another has compiled to, it is left out.
"""

import itertools
from typing import NamedTuple

from diffucoder_jax.model import cost


class Candidate(NamedTuple):
  """A way to run a program. `mesh` is {axis: size}."""

  mesh: dict[str, int]
  accumulate: int
  remat: str

  @property
  def changes(self):
    """What it sets in a config, by dotted key."""
    mesh = {f"mesh.{axis}": size for axis, size in self.mesh.items()}
    return {**mesh, "optim.accumulate": self.accumulate, "model.remat": self.remat}

  def __str__(self):
    mesh = "x".join(str(size) for size in self.mesh.values())
    return f"{mesh} accumulate {self.accumulate} remat {self.remat}"


class Paper(NamedTuple):
  """What a candidate cannot do without: `bytes` of HBM on a device, and `seconds`."""

  bytes: float
  seconds: float


def _divisors(number):
  return [n for n in range(1, number + 1) if number % n == 0]


def candidates(config, devices, slices, rows, trains, remats, fill=False):
  """All `Candidate`s that the sizes allow.

  Args:
    config: `ModelConfig`. devices: int, of all slices. slices: int; `data` must hold them.
    rows: of the global batch. trains: whether micro-batches and remat policies matter.
    remats: names of policies. fill: whether rows of padding may fill the batch up.
  Returns:
    list; empty where no mesh divides the batch.
  """
  c, found = config, []
  for fsdp, tensor in itertools.product(_divisors(devices), repeat=2):
    data, rest = divmod(devices, fsdp * tensor)
    if rest or not data or data % slices or c.embed_dim % fsdp:
      continue
    placed = rows + (-rows % (data * fsdp) if fill else 0)
    if placed % (data * fsdp):
      continue
    if any(size % tensor for size in (c.num_heads, c.num_kv_heads, c.mlp_dim, c.vocab_size)):
      continue
    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for accumulate in _divisors(placed // (data * fsdp)) if trains else [1]:
      for remat in remats if trains else [c.remat]:
        found.append(Candidate(mesh, accumulate, remat))
  return found


def _kept(config, remat, tensor):
  """Elements of one token that a layer keeps for its backward pass, at least: its input, and what the
  policy adds."""
  c = config
  heads, kv = (n * c.head_dim / tensor for n in (c.num_heads, c.num_kv_heads))
  mlp = c.mlp_dim / tensor
  extra = {
    "full": 0.0,
    "offload": -c.embed_dim,  # to the host
    "attention": 2 * heads + 2 * kv,
    "dots": heads + 2 * kv + 2 * mlp + 2 * c.embed_dim,
    "none": 3 * heads + 4 * kv + 3 * mlp + 5 * c.embed_dim,
  }
  return c.embed_dim + extra.get(remat, 0.0)


def on_paper(one, config, work, length, rows, trains, chip, devices):
  """`Paper` of a candidate: less than this it cannot be.

  Args:
    one: `Candidate`. config: `ModelConfig`. work: `cost.Work` with the candidate's remat policy.
    length, rows: of the global batch. chip: `topology.Chip`. devices: int.
  """
  c, item = config, 2
  fsdp, tensor = one.mesh["fsdp"], one.mesh["tensor"]
  weights = c.num_layers * cost.layer_weights(c) + cost.head_weights(c)
  total = weights + (0 if c.tied_head else cost.head_weights(c))
  param = 4 if c.param_dtype == "float32" else 2
  state = total * (param + (8 if trains and not c.lora_rank else 0)) / (fsdp * tensor)
  tokens = rows * length / (one.mesh["data"] * fsdp) / one.accumulate
  kept = item * c.num_layers * tokens * _kept(c, one.remat, tensor) if trains else 0.0
  gathered = item * cost.head_weights(c) / tensor if fsdp > 1 else 0.0

  # Over ICI, on all links at once: weights are gathered for each pass, forward and backward (the output
  # matrix perhaps once for both), and their gradients scattered; `tensor` sums activations twice a layer
  # in each.
  moved = 3 * weights - cost.head_weights(c) if trains else weights
  sent = work.passes * one.accumulate * item * moved / tensor * (fsdp - 1) / fsdp
  again = cost.RECOMPUTED.get(one.remat, (1.0, 1.0))[0] if trains else 0.0
  sums = 2 * c.num_layers * ((2 + again) if trains else 1)
  sent += (
    work.passes * one.accumulate * sums * 2 * item * tokens * c.embed_dim * (tensor - 1) / tensor
  )
  peak, links = chip.flops / chip.devices, chip.ici_rate / 2 / chip.devices
  seconds = max(work.executed / devices / peak, sent / links)
  return Paper(state + kept + gathered, seconds)


def search(try_one, found, paper, usable, useful_seconds, limit, say=print):
  """Compiles candidates, the most promising first, and leaves out what cannot win.

  Args:
    try_one: Candidate -> result as `aot.attempt` gives it. found: list of `Candidate`.
    paper: Candidate -> `Paper`. usable: bytes of HBM. useful_seconds: of the model's own FLOPs at
      the peak. limit: how many that fit to compile. say: gets a line for each.
  Returns:
    ([(Candidate, result)], best first; lines about what was left out).
  """
  reckoned = {str(one): paper(one) for one in found}
  small = [one for one in found if reckoned[str(one)].bytes <= usable]
  left_out = []
  if len(small) < len(found):
    least = min(reckoned[str(one)].bytes for one in found if one not in small)
    left_out.append(
      f"{len(found) - len(small)} of {len(found)} need more than {usable / 2**30:.2f} GiB on paper "
      f"already (the smallest of them {least / 2**30:.2f} GiB)"
    )
  # Fewer micro-batches first among equals, then less memory.
  order = sorted(
    small, key=lambda one: (reckoned[str(one)].seconds, one.accumulate, reckoned[str(one)].bytes)
  )
  done, best, slower, larger, too_large = [], 0.0, 0, 0, {}
  for i, one in enumerate(order):
    needs, seconds = reckoned[str(one)]
    if useful_seconds / seconds <= best:
      slower += 1
      continue
    if needs >= too_large.get(one.remat, float("inf")):
      larger += 1
      continue
    if sum(result["fits"] for _, result in done) == limit:
      left_out.append(
        f"up to {len(order) - i} were not compiled: the limit is {limit}; on paper the best of them has "
        f"{useful_seconds / seconds:.1%}"
      )
      break
    result = try_one(one)
    done.append((one, result))
    if result["fits"]:
      best = max(best, result["roofline"]["mfu"])
    else:
      too_large[one.remat] = needs
    say(f"{one}: {result['verdict'][:160]}")
  if larger:
    left_out.append(
      f"{larger} need on paper no less than one with the same remat policy that did not fit"
    )
  if slower:
    left_out.append(f"{slower} cannot reach the best bound found, even on paper")
  done.sort(key=lambda pair: -pair[1]["roofline"]["mfu"] if pair[1]["fits"] else 0.0)
  return done, left_out


def table(done):
  """The results of `search` as lines of a Markdown table."""
  lines = [
    "| mesh (data x fsdp x tensor) | accumulate | remat | rows at a time | peak, GiB | spare | "
    "MFU bound | no overlap | limit |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for one, r in done:
    mesh = " x ".join(str(size) for size in one.mesh.values())
    cells = [mesh, one.accumulate, one.remat]
    if r["fits"]:
      m, roof = r["memory"], r["roofline"]
      cells += [
        f"{r['rows_per_device']:g}", f"{m['peak'] / 2**30:.2f}", f"{m['spare']:.0%}",
        f"{roof['mfu']:.1%}", f"{roof['serial_mfu']:.1%}", roof["limit"],
      ]  # fmt: skip
    else:
      cells += ["", "", "", "", "", r["verdict"][:100].replace("|", "/")]
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return lines
