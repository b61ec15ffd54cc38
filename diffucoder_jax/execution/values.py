"""Plain data between judge and solver: values as flat graphs of builtins, in JSON.

A value crosses as a leaf (None, bool, int, float, str) or as a reference `[i]` to a node; a node is
`[tag, ...items]`. Nodes lie in one flat list, so depth costs nothing, and cycles and shared objects
survive. Whoever decodes builds exact builtin types and looks up no name but those of classes that
the dataset defined: nothing that the other side says can run code here (no pickle, no marshal).

The containers among a call's arguments keep their numbers in the reply. That is how a change made
in place travels back, and how an answer that returns its argument returns that very object.
"""

import collections
import datetime
import decimal
import fractions
import itertools
import re

from diffucoder_jax.execution.wire import WireError

ITEMS_OF_AN_ITERATOR = 100_000  # an endless generator is cut here, and raises where it was cut
DEPTH = 100  # of immutable values, which hashing walks on the C stack
INLINE = 1 << 63  # larger integers travel in hexadecimal, which has no limit on digits

SEQUENCES = {"l": list, "q": collections.deque}
MAPPINGS = {
  "d": dict,
  "C": collections.Counter,
  "O": collections.OrderedDict,
}
TAGS = {kind: tag for tag, kind in (SEQUENCES | MAPPINGS).items()}
TAGS |= {set: "s", bytearray: "B"}  # the mutable ones
LEAVES = {type(None), bool, float, str}
FLAT = (int, float, str, bytes, list, tuple, dict, set, frozenset, collections.deque)
DATES = {kind.__name__: kind for kind in (datetime.date, datetime.datetime, datetime.time)}
# Builtins that a test may pass by name, `keep(int, values)` or `apply(sum, values)`. An answer may
# not: a test that calls what it got would call `bool`.
NAMED = {
  x.__name__: x
  for x in (
    bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, object, range,
    abs, all, any, len, max, min, sum, sorted, round, ord, chr, hex, bin, pow, divmod, type(None),
  )
}  # fmt: skip


class Unsendable(TypeError):
  """A value that is no plain data, such as a function."""


class Opaque:
  """Stands for an answer's value that is no plain data: equal to nothing, and without a truth."""

  __slots__ = ("_name", "_true")
  __hash__ = None

  def __init__(self, name, true=False):
    self._name, self._true = name, true

  def __eq__(self, other):
    return False

  def __bool__(self):
    if self._true:
      return True
    raise TypeError(f"the answer is a {self._name}, which is no plain data")

  def __repr__(self):
    return f"<a {self._name} of the answer>"


# Values to graphs --------------------------------------------------------------------------------


class Encoder:
  """Numbers values and the objects below them.

  Attributes: objects: by number, first the `originals` (which the other side has), then the new
    ones. nodes: one per new object; complete after `finish`.
  """

  def __init__(self, classes, originals=(), strict=False):
    """`classes`: {name: class} that both sides know. `strict`: raise Unsendable, else send "?"."""
    self.names = {kind: name for name, kind in classes.items()}
    self.strict = strict
    self.objects = list(originals)
    self.nodes = []
    self._first = len(self.objects)
    self._numbers = {id(x): i for i, x in enumerate(self.objects)}
    self._depth = 0
    self._open = collections.deque()  # numbers of mutable objects whose nodes are not made yet

  def value(self, x):
    """A leaf or a reference for `x`; recursion goes through immutable values only."""
    kind = type(x)
    if x is None or kind is str or kind is float or kind is bool:
      return x
    if kind is int and -INLINE < x < INLINE:
      return x
    number = self._numbers.get(id(x))
    if number is not None:
      return [number]
    if kind in TAGS or kind in self.names:
      self._open.append(len(self.objects))
      return [self._add(x, None)]
    flat = self._flat(x, kind)
    if flat is not None:
      reference = self.value(flat)
      self.objects.append(x)  # alive, so that its id stays its own
      self.nodes.append(None)
      return reference
    self._depth += 1
    node = self._node(x, kind)
    self._depth -= 1
    return [self._add(x, node)]

  def _items(self, values):
    """`value` of each; at once where all are leaves, which is the common case."""
    values = list(values)
    kinds = set(map(type, values))
    if kinds <= LEAVES or (kinds == {int} and -INLINE < min(values) <= max(values) < INLINE):
      return values
    return map(self.value, values)

  def finish(self):
    """Makes the nodes of the mutable objects found so far, and of those found on the way."""
    while self._open:
      number = self._open.popleft()
      self.nodes[number - self._first] = self.state(self.objects[number])

  def state(self, x):
    """The node of a mutable object as it is now."""
    kind = type(x)
    if kind in self.names:
      items = vars(x)
      return ["o", self.names[kind], list(items), *self._items(items.values())]
    tag = TAGS[kind]
    if tag == "B":
      return [tag, x.hex()]
    if tag == "q":
      return [tag, x.maxlen, *self._items(x)]
    if tag in MAPPINGS:
      return [tag, *self._items(itertools.chain.from_iterable(x.items()))]
    return [tag, *self._items(x)]

  def _add(self, x, node):
    self._numbers[id(x)] = len(self.objects)
    self.objects.append(x)
    self.nodes.append(node)
    return len(self.objects) - 1

  def _flat(self, x, kind):
    """An exact builtin with the contents of an instance of a subclass, by the base's own methods."""
    for base in FLAT:
      if kind is not base and isinstance(x, base):
        if base in (int, float):
          return base.__pos__(x)
        if base in (str, bytes):
          return base.__getitem__(x, slice(None)) if base is bytes else str.__str__(x)
        return base(base.items(x) if base is dict else base.__iter__(x))
    if kind in (type({}.keys()), type({}.values()), type({}.items())):
      return list(x)
    if kind.__module__ == "numpy" and hasattr(x, "tolist"):  # arrays and scalars, if it is offered
      return x.tolist()
    return None

  def _node(self, x, kind):
    """The node of an immutable object; the nodes it refers to come before it."""
    if kind is int:
      return ["i", hex(x)]
    if self._depth > DEPTH and not self.strict:
      return ["?", f"{kind.__name__} nested too deeply"]
    if self._depth > DEPTH:
      raise Unsendable(f"a {kind.__name__} is nested too deeply")
    if kind is tuple or kind is frozenset:
      return ["t" if kind is tuple else "f", *self._items(x)]
    if kind is bytes:
      return ["b", x.hex()]
    if kind is complex:
      return ["c", x.real, x.imag]
    if kind is range:
      return ["r", self.value(x.start), self.value(x.stop), self.value(x.step)]
    if kind is decimal.Decimal:
      return ["x", str(x)]
    if kind is fractions.Fraction:
      return ["F", hex(x.numerator), hex(x.denominator)]
    if kind is datetime.timedelta:
      return ["E", x.days, x.seconds, x.microseconds]
    if DATES.get(kind.__name__) is kind:
      return ["T", kind.__name__, x.isoformat()]
    if kind is re.Match:
      return ["m"]
    if self.strict and callable(x) and NAMED.get(getattr(x, "__name__", None)) is x:
      return ["n", x.__name__]
    if hasattr(kind, "__next__"):
      items = list(itertools.islice(x, ITEMS_OF_AN_ITERATOR + 1))
      cut = len(items) > ITEMS_OF_AN_ITERATOR
      return ["g", cut, *self._items(items[:ITEMS_OF_AN_ITERATOR])]
    if self.strict:
      raise Unsendable(f"a {kind.__name__} is no plain data")
    return ["?", kind.__name__]


# Graphs to values --------------------------------------------------------------------------------


def _is_method(x):
  return callable(x) or hasattr(type(x), "__get__")


class _Missing:
  """In the place of a node that is not built yet."""


def _iterate(items, cut):
  yield from items
  if cut:
    raise RuntimeError(f"an iterator was cut after {len(items)} items")


class Decoder:
  """Builds the objects of a message. Attributes: objects: by number, `originals` first."""

  def __init__(self, nodes, classes, originals=(), named=False):
    """Raises WireError for anything that `Encoder` would not have written.

    Args: named: whether builtins may come by name, as from judge to solver.
    """
    self.classes, self.named = classes, named
    self.objects = list(originals)
    self._depths = {}  # of immutable objects, by number
    first = len(self.objects)
    try:
      self.objects += map(self._shell, nodes)
      for number, node in enumerate(nodes, first):
        if self.objects[number] is _Missing and node is not None:
          self.objects[number] = self._build(number, node)
      # Keys and members last: their hashes may need what the others hold.
      hashed = []
      for number, node in enumerate(nodes, first):
        if node is not None and node[0] in ("s", *MAPPINGS):
          hashed.append((number, node))
        elif node is not None and node[0] in ("l", "q", "B", "o"):
          self.fill(number, node)
      for number, node in hashed:
        self.fill(number, node)
    except (WireError, MemoryError):
      raise
    except Exception as error:
      raise WireError(f"malformed value: {error}") from None

  def value(self, item):
    """The object for a leaf or a reference."""
    if type(item) is not list:
      if type(item) is dict:
        raise WireError("a value is neither a leaf nor a reference")
      return item
    (number,) = item
    if type(number) is not int or not 0 <= number < len(self.objects):
      raise WireError("a reference to nothing")
    found = self.objects[number]
    if found is _Missing:
      raise WireError("a reference to a later value")
    return found

  def _values(self, items):
    if {list, dict}.isdisjoint(map(type, items)):
      return items
    return list(map(self.value, items))

  def fill(self, number, node):
    """Gives a mutable object the contents that its node tells, in place."""
    x, tag = self.objects[number], node[0]
    if tag == "o":
      _, name, names, *values = node
      if type(x) is not self.classes[name] or len(names) != len(values):
        raise WireError("an object changed its class")
      for attribute in names:
        # Methods of the dataset's classes are not the answer's to replace.
        if attribute.startswith("__") or _is_method(getattr(type(x), attribute, None)):
          raise WireError("an attribute that is none")
      vars(x).clear()
      for attribute, value in zip(names, values, strict=True):
        object.__setattr__(x, attribute, self.value(value))
    elif TAGS.get(type(x)) != tag:
      raise WireError("a container changed its type")
    elif tag == "B":
      x[:] = bytes.fromhex(node[1])
    else:
      values = self._values(node[2:] if tag == "q" else node[1:])
      x.clear()
      if tag in MAPPINGS:
        for key, value in zip(values[::2], values[1::2], strict=True):
          x[key] = value
      elif tag == "s":
        x.update(values)
      else:
        x.extend(values)

  def _shell(self, node):
    if node is None:
      return _Missing
    tag = node[0]
    if tag == "q":
      return collections.deque(maxlen=node[1])
    if tag in SEQUENCES:
      return SEQUENCES[tag]()
    if tag in MAPPINGS:
      return MAPPINGS[tag]()
    if tag == "s":
      return set()
    if tag == "B":
      return bytearray()
    if tag == "o":
      return object.__new__(self.classes[node[1]])
    return _Missing

  def _build(self, number, node):
    tag, *items = node
    if tag == "i":
      return int(items[0], 16)
    if tag in ("t", "f"):
      below = [self._depths.get(item[0], 0) for item in items if type(item) is list]
      self._depths[number] = depth = 1 + max(below, default=0)
      if depth > DEPTH:
        raise WireError("a value is nested too deeply")
      return (tuple if tag == "t" else frozenset)(self._values(items))
    if tag == "b":
      return bytes.fromhex(items[0])
    if tag == "c":
      return complex(*items)
    if tag == "r":
      return range(*map(self.value, items))
    if tag == "x":
      return decimal.Decimal(items[0])
    if tag == "F":
      return fractions.Fraction(int(items[0], 16), int(items[1], 16))
    if tag == "E":
      return datetime.timedelta(*items)
    if tag == "T":
      return DATES[items[0]].fromisoformat(items[1])
    if tag == "n" and self.named:
      return NAMED[items[0]]
    if tag == "g":
      return _iterate(self._values(items[1:]), items[0])
    if tag in ("m", "?"):
      return Opaque("re.Match" if tag == "m" else str(items[0]), true=tag == "m")
    raise WireError(f"unknown tag {tag!r}")


def shared_classes(namespace, module):
  """The classes that code of the dataset defined: {name: class}, those that are plain records."""
  return {
    name: kind
    for name, kind in namespace.items()
    if isinstance(kind, type)
    and kind.__module__ == module
    and kind.__new__ is object.__new__
    and kind.__dictoffset__
  }
