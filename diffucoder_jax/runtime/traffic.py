"""Bytes that a compiled program moves between HBM and the chip, loops counted with their rounds.

What XLA's cost analysis counts, but for whole calls of the program: each instruction reads its
operands and writes its result once. A fusion that only takes slices of an operand reads these, and
one that updates a slice in place writes that slice. What lives in VMEM (memory space 1) costs
nothing. A Pallas kernel counts with its operands and results.
"""

# They name, order or group values; nothing moves.
FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "add-dependency", "opt-barrier", "domain",
  "async-start", "async-update", "async-done", "copy-done", "all-gather-done", "all-reduce-done",
  "collective-permute-done", "send-done", "recv-done",
}  # fmt: skip
# Custom calls of the compiler that are notes to itself.
NOTES = (
  "AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "ConcatBitcast",
  "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding", "SPMDFullToShardShape",
)  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


def _hbm(found):
  return sum(array.bytes for array in found if array.space == 0)


def _is_under_way(one):
  """A collective that an earlier instruction started and a later one ends: here it only goes on."""
  return "chain_id=" in one.attributes


def _read(inner, parameter, whole):
  """Bytes that a fusion reads of one operand, which has `whole` of them in HBM."""
  names, total = {parameter}, 0.0
  for one in inner:
    if not names & set(one.operands):
      continue
    if one.opcode == "bitcast":  # what it is used for decides
      names.add(one.name)
    elif one.opcode == "tuple" or _is_under_way(one):
      continue  # passed on
    elif one.opcode in SLICES and one.operands[0] in names:
      total += sum(array.bytes for array in one.arrays)
    elif one.opcode == "dynamic-update-slice" and one.operands[0] in names:
      continue  # updated in place; `_written` counts the slice
    else:
      return whole
  return min(total, whole)


def _written(inner, name, found):
  """Bytes that a fusion writes for the value `name`, whose arrays are `found`."""
  one = inner.instructions[name]
  while one.opcode == "bitcast" and one.operands[0] in inner.instructions:
    one = inner.instructions[one.operands[0]]
  if one.opcode == "parameter" or _is_under_way(one):
    return 0.0  # passed on
  if one.opcode == "dynamic-update-slice":
    return _hbm(found) and sum(x.bytes for x in inner.instructions[one.operands[1]].arrays)
  return _hbm(found)


def _fusion(module, computation, one):
  inner = module.computations[one.called("calls")[0]]
  targets = " ".join(x.attributes for x in inner if x.opcode == "custom-call")
  if "AsyncCollectiveStart" in targets:  # (source, destination, semaphores)
    source, destination = one.arrays[:2]
    return _hbm([source, destination])
  if "AsyncCollectiveDone" in targets:
    return 0.0
  total = 0.0
  parameters = {x.inside.strip(): x.name for x in inner if x.opcode == "parameter"}
  for number, operand in enumerate(one.operands):
    whole = _hbm(computation.instructions[operand].arrays)
    if whole:
      total += _read(inner, parameters[str(number)], whole)
  root = inner.instructions[inner.root]
  if root.opcode == "tuple":
    parts, rest = [], list(one.arrays)
    for name in root.operands:
      count = len(inner.instructions[name].arrays)
      parts.append((name, rest[:count]))
      rest = rest[count:]
  else:
    parts = [(inner.root, one.arrays)]
  return total + sum(_written(inner, name, found) for name, found in parts)


def instruction_bytes(module, computation, one):
  """Bytes that one run of an instruction moves from and to HBM."""
  if one.opcode in FREE or any(f'"{note}"' in one.attributes for note in NOTES):
    return 0.0
  if one.opcode == "fusion":
    return _fusion(module, computation, one)
  if one.opcode in SLICES:
    return 2 * _hbm(one.arrays)
  if one.opcode == "dynamic-update-slice":
    return 2 * _hbm(computation.instructions[one.operands[1]].arrays)
  operands = sum(_hbm(computation.instructions[name].arrays) for name in one.operands)
  if one.opcode == "copy-start":  # (destination, source, context)
    return operands + _hbm(one.arrays[:1])
  if one.opcode.endswith("-start"):  # (sources, destinations, ...)
    return 2 * operands
  return operands + _hbm(one.arrays)


def hbm_bytes(module, runs):
  """Bytes from and to HBM in one call of the program, on one device.

  Args:
    module: `hlo.Module`. runs: `hlo.Runs` of it.
  """
  inside = set()  # computations of fusions and reducers, which are part of an instruction
  for computation in module.computations.values():
    for one in computation:
      if one.opcode not in ("call", "while", "conditional"):
        inside |= {*one.called("calls"), *one.called("to_apply")}
  total = 0.0
  for name, computation in module.computations.items():
    if runs.times[name] and name not in inside:
      once = sum(instruction_bytes(module, computation, one) for one in computation)
      total += runs.times[name] * once
  return total
