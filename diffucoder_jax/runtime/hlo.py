"""A compiled program's text, read: its computations, and how often each of them runs.

`compiled.as_text()` is HLO: computations, each a list of instructions. What stands in the body of a
loop is printed once and runs many times, so everything that is counted here is counted with the
number of its runs. XLA's own `cost_analysis()` counts a body once.

How many rounds a loop takes is read from the program: from `known_trip_count` where the backend
writes it (CPU), else from the loop's condition, `counter < limit`, the counter's start and its step
(TPU). Where the limit is computed at run time, a hint of the caller decides, and the loop is listed
in `Runs.assumed`.
"""

import dataclasses
import math
import re
from typing import NamedTuple

ITEM_BITS = {
  "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
  "u32": 32, "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32,
  "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
# dtype[dims], and the layout in braces behind it, in which S(1) is a memory space: none is HBM.
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
SPACE = re.compile(r"S\((\d+)\)")
NAME = re.compile(r"%([\w.\-]+)")
START = re.compile(r"\s+(ROOT )?%[\w.\-]+ = ")


class Array(NamedTuple):
  """An array type: `dtype`, `dims`, and the memory `space` (0: HBM, 1: VMEM, others: scalars)."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def bytes(self):
    return math.prod(self.dims) * ITEM_BITS[self.dtype] / 8


def arrays(text):
  """The arrays of a type as HLO writes it, of a tuple one after the other."""
  found = []
  for dtype, dims, layout in ARRAY.findall(text):
    if dtype not in ITEM_BITS:
      raise ValueError(f"unknown element type {dtype!r} in the compiled program's type {text[:80]}")
    space = SPACE.search(layout)
    sizes = tuple(int(size) for size in dims.split(",") if size)
    found.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`name` = `type` `opcode`(`operands`), `attributes`; all text as it stands there."""

  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  inside: str  # what stands in the parentheses: a constant's value, a parameter's number
  attributes: str

  @property
  def arrays(self):
    return arrays(self.type)

  def called(self, attribute):
    """Names of the computations that `attribute`, say "body", names."""
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
    return tuple(NAME.findall(found.group(1))) if found else ()

  @property
  def op_name(self):
    """Where in the Python program it comes from, such as "jit(f)/layers/mlp/dot_general"."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in their order; `root` is the name of the one that is returned."""

  name: str
  instructions: dict[str, Instruction]
  root: str

  def __iter__(self):
    return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Module:
  """All computations by name; `entry` is the name of the one that starts."""

  computations: dict[str, Computation]
  entry: str


def _closing(text, start):
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"a parenthesis is never closed in {text[:120]!r}")


def _instruction(line):
  name, rest = line.split(" = ", 1)
  if rest.startswith("("):
    end = _closing(rest, 0) + 1
  else:
    end = rest.index(" ")
  type_, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing]
  operands = tuple(NAME.findall(inside))
  return Instruction(
    NAME.match(name).group(1), rest[:opening], type_, operands, inside, rest[closing + 1 :]
  )


def _computation(name, lines):
  body, root = {}, None
  for line in lines:
    is_root, line = line.lstrip().startswith("ROOT "), line.lstrip().removeprefix("ROOT ")
    one = _instruction(line)
    body[one.name] = one
    root = one.name if is_root else root
  return Computation(name, body, root)


def parse(text):
  """`Module` of what `compiled.as_text()` gives.

  Raises:
    ValueError: there is no entry computation in it: it is no HLO.
  """
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    if name is None:
      # "%name (parameters) -> type {" at the margin, with ENTRY before it where the program starts.
      if line[:1] in ("%", "E") and line.rstrip().endswith("{"):
        name, lines = NAME.search(line).group(1), []
        entry = name if line.startswith("ENTRY") else entry
    elif line.rstrip() == "}":
      computations[name] = _computation(name, lines)
      name = None
    elif START.match(line):
      lines.append(line)
    elif lines:  # attributes of kernels run over several lines
      lines[-1] += " " + line
  if entry is None:
    raise ValueError(f"no ENTRY computation in what should be a compiled program: {text[:80]!r}")
  return Module(computations, entry)


# ---------------------------------------------------------------------------------------------
# Loops


class Hint(NamedTuple):
  """How often a loop runs whose limit is not in the program: `trips` of the loops whose origin
  (`op_name`) contains `where`; `why` is for the reader."""

  where: str
  trips: float
  why: str


@dataclasses.dataclass(frozen=True)
class Runs:
  """How often each computation runs in one call of the program.

  Attributes:
    times: {computation: number of runs}; fusions' and reducers' computations are in it too.
    loops: {name of the while instruction: rounds each time it is reached}.
    assumed: lines about loops whose rounds are not in the program.
  """

  times: dict[str, float]
  loops: dict[str, float]
  assumed: tuple[str, ...]


FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}


def _constant(computation, name):
  """The integer that an instruction is, through copies; None if it is none."""
  one = computation.instructions.get(name)
  while one is not None and one.opcode in ("copy", "convert", "bitcast", "copy-done", "copy-start"):
    one = computation.instructions.get(one.operands[0])
  if one is None or one.opcode != "constant":
    return None
  found = re.fullmatch(r"-?\d+", one.inside.strip())
  return int(one.inside) if found else None


def _element(computation, name):
  """Which element of the computation's parameter an instruction is; None if it is none."""
  one = computation.instructions.get(name)
  while one is not None and one.opcode in ("copy", "convert", "bitcast"):
    one = computation.instructions.get(one.operands[0])
  if one is None or one.opcode != "get-tuple-element":
    return None
  source = computation.instructions[one.operands[0]]
  found = re.search(r"index=(\d+)", one.attributes)
  return int(found.group(1)) if source.opcode == "parameter" else None


def _comparison(module, computation, name):
  """The comparison that a condition returns, or None: (left, right, direction), where a side is a pair
  (computation, name). Looks into fusions; of a conjunction (a loop that may also stop early) it takes
  the part that compares integers with a limit.
  """
  one = computation.instructions[name]
  if one.opcode == "compare":
    left, right = ((computation, operand) for operand in one.operands)
    direction = re.search(r"direction=(\w+)", one.attributes).group(1)
    whole = all(computation.instructions[x].arrays[0].dtype[0] in "su" for x in one.operands)
    return (left, right, direction) if whole and direction in FLIPPED else None
  if one.opcode in ("and", "bitcast", "copy", "convert"):
    found = (_comparison(module, computation, operand) for operand in one.operands)
    return next((x for x in found if x), None)
  if one.opcode == "fusion":
    inner = module.computations[one.called("calls")[0]]
    found = _comparison(module, inner, inner.root)
    if found is None:
      return None
    outside = []
    for where, operand in found[:2]:
      instruction = where.instructions[operand]
      if where is inner and instruction.opcode == "parameter":
        outside.append((computation, one.operands[int(instruction.inside)]))
      else:
        outside.append((where, operand))
    return (*outside, found[2])
  return None


def _step(module, body, index):
  """By how much a round moves the counter, element `index` of what the body returns; None: unknown."""
  root = body.instructions[body.root]
  if root.opcode != "tuple":
    return None
  computation, one = body, body.instructions[root.operands[index]]
  while one.opcode in ("copy", "bitcast"):
    one = computation.instructions[one.operands[0]]
  if one.opcode != "add":
    return None
  left, right = one.operands
  if _element(body, left) == index:
    return _constant(body, right)
  return _constant(body, left) if _element(body, right) == index else None


def trips(module, computation, loop):
  """Rounds of a `while` instruction, read from the program; None where it does not say.

  Args:
    module: `Module`. computation: the one that `loop`, an `Instruction`, stands in.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known.group(1))
  condition = module.computations[loop.called("condition")[0]]
  body = module.computations[loop.called("body")[0]]
  found = _comparison(module, condition, condition.root)
  if found is None:
    return None
  left, right, direction = found
  if direction in ("GT", "GE"):  # limit > counter
    left, right, direction = right, left, FLIPPED[direction]
  index = _element(*left)
  if index is None:
    return None
  initial = computation.instructions[loop.operands[0]]

  def start_of(element):
    return _constant(computation, initial.operands[element]) if initial.opcode == "tuple" else None

  limit = _constant(*right)
  if limit is None and (element := _element(*right)) is not None:
    limit = start_of(element)  # an element that the loop carries along, if it is a constant
  if limit is None:
    return None
  # A counter begins at 0 and goes up by 1 unless the program says otherwise.
  start, step = start_of(index) or 0, _step(module, body, index) or 1
  return max(0, math.ceil((limit + (direction == "LE") - start) / step))


def count_runs(module, hints=()):
  """`Runs` of a module; `hints` are `Hint`s for loops whose limit is computed at run time.

  A loop without limit and hint counts as one round, and `assumed` says so. All branches of a
  conditional count as taken.
  """
  times = dict.fromkeys(module.computations, 0.0)
  loops, assumed = {}, []

  def rounds(computation, loop):
    found = trips(module, computation, loop)
    if found is not None:
      return found
    where = loop.op_name or loop.name
    for hint in hints:
      if hint.where in where:
        assumed.append(f"{where}: {hint.trips:g} rounds assumed, {hint.why}")
        return hint.trips
    assumed.append(f"{where}: its number of rounds is not in the program; counted once")
    return 1

  def visit(name, factor):
    computation = module.computations[name]
    times[name] += factor
    for one in computation:
      if one.opcode == "while":
        if one.name not in loops:
          loops[one.name] = rounds(computation, one)
        count = loops[one.name]
        visit(one.called("body")[0], factor * count)
        visit(one.called("condition")[0], factor * (count + 1))
        continue
      for attribute in ("calls", "to_apply", "branch_computations", "true_computation",
                        "false_computation", "called_computations"):  # fmt: skip
        for called in one.called(attribute):
          visit(called, factor)

  visit(module.entry, 1.0)
  return Runs(times, loops, tuple(dict.fromkeys(assumed)))
