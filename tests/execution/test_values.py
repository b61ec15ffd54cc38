"""What crosses between judge and solver: every plain value comes back as itself, nothing else does."""

import collections
import dataclasses
import datetime
import decimal
import fractions
import functools
import json
import math
import os

import pytest

from diffucoder_jax.execution import values, wire

VALUES = [
  None, True, 0, -1, 2**62, 2**63, -(2**200), 10**5000, 0.1, -0.0, 1e308, 5e-324, math.inf, -math.inf,
  "", "naïve ∑", "\ud800", "\0", b"", b"\0\xff", bytearray(b"ab"), 1 + 2j, [], [[]], (), ((),), {},
  [1, "a", None, 2.5], [True, 1, 1.0], (1, [2, (3,)]), {1: "a", (1, 2): [3], None: {}}, set(),
  {1, "a", (2, frozenset({3}))}, frozenset({1}), range(3, 9, 2), collections.deque([1, 2], maxlen=3),
  collections.Counter("abca"), collections.OrderedDict(b=1, a=2), decimal.Decimal("0.10"),
  fractions.Fraction(-1, 3), datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, 2, 3),
  datetime.timedelta(days=-1, microseconds=5), datetime.time(1, 2), int, len, [2**64, 1], [[1]] * 3,
]  # fmt: skip


@dataclasses.dataclass(eq=False)
class Node:
  value: object
  next: object = None

  def is_right(self):
    return False

  @functools.cached_property
  def cached(self):
    return False


CLASSES = {"Node": Node}


def crossed(x, strict=True):
  encoder = values.Encoder(CLASSES, strict=strict)
  reference = encoder.value(x)
  encoder.finish()
  told = json.loads(json.dumps([reference, encoder.nodes]))
  return values.Decoder(told[1], CLASSES, named=strict).value(told[0])


@pytest.mark.parametrize("x", VALUES, ids=lambda x: type(x).__name__)
def test_plain_values_come_back_as_themselves(x):
  back = crossed(x)
  assert type(back) is type(x)
  assert back == x
  if not isinstance(x, (set, frozenset, int)):
    assert repr(back) == repr(x)  # tells True from 1 and -0.0 from 0.0


def test_not_a_number():
  assert math.isnan(crossed(math.nan)) and math.isnan(crossed([math.nan])[0])


def test_iterators_and_views_arrive_as_what_they_give():
  assert list(crossed(iter([1, 2]))) == [1, 2]
  assert crossed({1: 2}.items()) == [(1, 2)]
  endless = crossed(iter(int, 1))
  with pytest.raises(RuntimeError, match="cut after 100000"):
    list(endless)


def test_shape_survives_sharing_cycles_and_depth():
  twice = [0]
  back = crossed([twice, twice])
  assert back[0] is back[1]
  loop = []
  loop.append(loop)
  back = crossed(loop)
  assert back[0] is back
  chain = None
  for i in range(20_000):
    chain = Node(i, chain)
  back, count = crossed(chain), 0
  while back:
    back, count = back.next, count + 1
  assert count == 20_000


def test_instances_of_subclasses_arrive_as_the_builtin():
  class Liar(int):
    __eq__ = lambda *a: True  # noqa: E731
    __hash__ = int.__hash__

  class Tuple(tuple):
    def __iter__(self):
      return iter("lie")

  assert type(crossed(Liar(3))) is int and crossed(Liar(3)) != 4
  assert crossed(Tuple((1, 2))) == (1, 2)
  assert crossed(collections.namedtuple("P", "x y")(1, 2)) == (1, 2)


def test_other_objects_equal_nothing_and_are_not_true():
  back = crossed(object(), strict=False)
  assert back != back and back != 1 and not (back == None)  # noqa: E711
  with pytest.raises(TypeError, match="no plain data"):
    assert back
  with pytest.raises(values.Unsendable, match="function"):
    crossed(lambda: 0)


@pytest.mark.parametrize(
  "nodes",
  [
    7, [7], [[]], [["z"]], [["l", [9]]], [["l", {"a": 1}]], [["t", [0]]], [["t", [1]], ["t", [0]]],
    [["n", "eval"]], [["n", "__import__"]], [["o", "Node", ["__class__"], 1]], [["o", "str", []]],
    [["s", [1]], ["l"]], [["d", 1]], [["i", "x"]], [["b", "x"]], [["F", "0x1", "0x0"]], [["x", "x"]],
    [["T", "date", "x"]], [["T", "type", "x"]], [["q", "x"]], [["o", "Node", ["a"]]], [["r", 1.5, 2, 3]],
    [["n", "bool"]], [["o", "Node", ["is_right"], True]], [["o", "Node", [1], True]],
    [["o", "Node", ["cached"], True]], [["o", "Node", ["__dict__"], [1]], ["d", "is_right", True]],
    [["o", "Node", ["__doc__"], "x"]], [["t"], *(["t", [i]] for i in range(500))], [["l", [True]]],
    [["l", [0, 0]]],
  ],
  ids=lambda x: json.dumps(x)[:40],
)  # fmt: skip
def test_what_no_encoder_writes_is_refused(nodes):
  with pytest.raises(wire.WireError):
    values.Decoder(nodes, CLASSES)


def test_frames_have_a_limit_and_an_end():
  read, write = os.pipe()
  wire.send(write, {"a": "é\ud800"})
  assert wire.receive(read)[0] == {"a": "é\ud800"}
  wire.send(write, list(range(100)))
  with pytest.raises(wire.TooLarge):
    wire.receive(read, limit=10)
  os.read(read, 4096)
  os.write(write, b"\3\0\0\0{[\xff")
  with pytest.raises(wire.WireError):
    wire.receive(read)
  os.write(write, b"\3\0")
  os.close(write)
  with pytest.raises(EOFError):
    wire.receive(read)
  os.close(read)
