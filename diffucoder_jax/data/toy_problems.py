"""Small programming problems made here, for the quickstart: one or two described operations.

    Take xs, keep the numbers above 3, then sort.
    def f(xs):

No two problems of train and test compute the same function, however they are worded.
"""

import hashlib
import json
import random
from collections.abc import Callable
from typing import NamedTuple

from diffucoder_jax.data.problems import Problem

TESTS, PLUS_TESTS = 3, 5


class Operation(NamedTuple):
  """One step from a value to a value.

  `phrase` says it in words and `code` in Python, with {k} for the constant and {v} for the variable.
  `function` computes it independently of `code`, so that running one checks the other.
  """

  takes: str
  gives: str
  phrase: str
  code: str
  function: Callable
  constants: tuple = (None,)


class _Spec(NamedTuple):
  """Operations with their constants, and what they compute on `INPUTS`."""

  steps: tuple[tuple[Operation, object], ...]
  outputs: tuple[str, ...]

  @property
  def takes(self):
    return self.steps[0][0].takes

  @property
  def behaviour(self):
    """Equal for problems that no test here could tell apart."""
    return self.takes, self.outputs


_DIGITS = tuple(range(2, 13))
_SHORT = (1, 2, 3, 4)
_LETTERS = ("a", "e", "i", "o", "n", "r", "s", "t")

OPERATIONS = [
  Operation("number", "number", "add {k}", "{v} + {k}", lambda v, k: v + k, _DIGITS),
  Operation("number", "number", "subtract {k}", "{v} - {k}", lambda v, k: v - k, _DIGITS),
  Operation("number", "number", "multiply by {k}", "{v} * {k}", lambda v, k: v * k, _DIGITS),
  Operation("number", "number", "floor divide by {k}", "{v} // {k}", lambda v, k: v // k, _DIGITS),
  Operation("number", "number", "take the remainder by {k}",
            "{v} % {k}", lambda v, k: v % k, _DIGITS),
  Operation("number", "number", "make it at least {k}",
            "max({v}, {k})", lambda v, k: k if v < k else v, _DIGITS),
  Operation("number", "number", "make it at most {k}",
            "min({v}, {k})", lambda v, k: k if v > k else v, _DIGITS),
  Operation("number", "number", "square", "{v} * {v}", lambda v, _: v**2),
  Operation("number", "number", "flip the sign", "-{v}", lambda v, _: 0 - v),
  Operation("number", "number", "drop the sign", "abs({v})", lambda v, _: v if v > 0 else -v),
  Operation("pair", "number", "add them", "a + b", lambda v, _: v[0] + v[1]),
  Operation("pair", "number", "subtract the second", "a - b", lambda v, _: v[0] - v[1]),
  Operation("pair", "number", "multiply them", "a * b", lambda v, _: v[0] * v[1]),
  Operation("pair", "number", "keep the larger", "max(a, b)", lambda v, _: sorted(v)[1]),
  Operation("pair", "number", "keep the smaller", "min(a, b)", lambda v, _: sorted(v)[0]),
  Operation("pair", "number", "take the distance", "abs(a - b)", lambda v, _: max(v) - min(v)),
  Operation("numbers", "numbers", "keep the even numbers",
            "[x for x in {v} if x % 2 == 0]", lambda v, _: [x for x in v if not x & 1]),
  Operation("numbers", "numbers", "keep the odd numbers",
            "[x for x in {v} if x % 2 == 1]", lambda v, _: [x for x in v if x & 1]),
  Operation("numbers", "numbers", "keep the numbers above {k}",
            "[x for x in {v} if x > {k}]", lambda v, k: [x for x in v if not x <= k], _DIGITS),
  Operation("numbers", "numbers", "keep the numbers below {k}",
            "[x for x in {v} if x < {k}]", lambda v, k: [x for x in v if not x >= k], _DIGITS),
  Operation("numbers", "numbers", "add {k} to each number",
            "[x + {k} for x in {v}]", lambda v, k: [x + k for x in v], _DIGITS),
  Operation("numbers", "numbers", "multiply each number by {k}",
            "[x * {k} for x in {v}]", lambda v, k: [x * k for x in v], _DIGITS),
  Operation("numbers", "numbers", "square each number",
            "[x * x for x in {v}]", lambda v, _: [x**2 for x in v]),
  Operation("numbers", "numbers", "sort", "sorted({v})", lambda v, _: sorted(v)),
  Operation("numbers", "numbers", "reverse", "{v}[::-1]", lambda v, _: list(reversed(v))),
  Operation("numbers", "numbers", "drop the first {k}",
            "{v}[{k}:]", lambda v, k: [x for i, x in enumerate(v) if i >= k], _SHORT),
  Operation("numbers", "numbers", "keep the first {k}",
            "{v}[:{k}]", lambda v, k: [x for i, x in enumerate(v) if i < k], _SHORT),
  Operation("numbers", "number", "add up the numbers", "sum({v})", lambda v, _: sum(v)),
  Operation("numbers", "number", "count the numbers", "len({v})", lambda v, _: len(v)),
  Operation("text", "text", "make it upper case", "{v}.upper()", lambda v, _: v.upper()),
  Operation("text", "text", "make it lower case", "{v}.lower()", lambda v, _: v.lower()),
  Operation("text", "text", "reverse", "{v}[::-1]", lambda v, _: "".join(reversed(v))),
  Operation("text", "text", "repeat it {k} times",
            "{v} * {k}", lambda v, k: "".join([v] * k), (2, 3, 4)),
  Operation("text", "text", "drop the first {k} letters",
            "{v}[{k}:]", lambda v, k: "".join(c for i, c in enumerate(v) if i >= k), _SHORT),
  Operation("text", "text", "keep the first {k} letters",
            "{v}[:{k}]", lambda v, k: "".join(c for i, c in enumerate(v) if i < k), _SHORT),
  Operation("text", "text", "remove every {k}",
            "{v}.replace('{k}', '')", lambda v, k: "".join(c for c in v if c != k), _LETTERS),
  Operation("text", "number", "count the letters", "len({v})", lambda v, _: len(v)),
  Operation("text", "number", "count the letter {k}",
            "{v}.count('{k}')", lambda v, k: sum(c == k for c in v), _LETTERS),
]  # fmt: skip

# One name for each, and words that read the same wherever they stand: a model of a million
# parameters has to learn the language as well.
ARGUMENTS = {"number": "x", "pair": "a, b", "numbers": "xs", "text": "s"}

# Chosen so that a wrong constant shows: many sizes and signs, no two alike.
INPUTS = {
  "number": [0, 1, 2, 3, 5, 6, 8, 9, 13, 17, 24, 31, 50, 77, 100, -1, -2, -4, -7, -11, -19, -40],
  "pair": [(0, 0), (1, 2), (2, 1), (5, 5), (3, 8), (9, 4), (12, 7), (6, 20), (-3, 4), (10, -6),
           (-5, -2), (-8, -15), (31, 2), (7, 44), (0, 9), (13, 0)],
  "numbers": [[], [4], [1, 2, 3, 4, 5, 6], [9, 7, 5, 3, 1], [10, 2, 8, 4, 6], [3, 3, 2, 2, 7, 7],
              [12, 5, 0, 9, 1, 30, 6], [6, 11, 4, 15, 2, 8, 3], [-1, 5, -6, 8, 2, -9, 7],
              [5, 10, 15, 20, 25, 9], [8, 1, 6, 2, 9, 3, 7, 5, 4], [7, 4, 14, 21, 2, 3, 28, 9]],
  "text": ["", "a", "Train", "stone", "Banana Bread", "orient express", "TEN nets", "No onions",
           "Sister", "tea or toast", "Internation", "Resist rain", "a noisy street", "Roosters"],
}  # fmt: skip


def make_problems(train=3000, test=200, seed=0, largest=9, names=("f",)):
  """Makes problems, the same ones for the same arguments on every machine.

  Args:
    train, test: how many. The test problems do not depend on `train`.
    seed: which ones, and on which inputs they are tested.
    largest: largest number in a description, up to 12. More of them make it harder: a network of a
      million parameters learns late to copy a number out of the description.
    names: what functions may be called. Several make it harder: the name has to be copied.
  Returns:
    (train problems, test problems), lists of `Problem`.
  Raises:
    ValueError: there are not that many.
  """
  # One specification for each thing that can be computed: the shortest, which comes first.
  specs = {}
  for spec in _specs(largest):
    specs.setdefault(spec.behaviour, spec)
  if train + test > len(specs):
    raise ValueError(f"asked for {train} + {test} problems, and there are only {len(specs)}")
  order = sorted(specs.values(), key=lambda spec: _hash(seed, spec.behaviour))
  sides = {"test": order[:test], "train": order[test : test + train]}
  made = {
    side: [_problem(spec, f"toy/{side}/{i}", seed, names) for i, spec in enumerate(chosen)]
    for side, chosen in sides.items()
  }
  return made["train"], made["test"]


def _specs(largest):
  singles = [
    ((op, k),) for op in OPERATIONS for k in op.constants if not isinstance(k, int) or k <= largest
  ]
  pairs = [
    first + second for first in singles for second in singles
    if first[0][0].gives == second[0][0].takes
  ]  # fmt: skip
  for steps in singles + pairs:
    inputs = INPUTS[steps[0][0].takes]
    outputs = tuple(repr(_run(steps, value)) for value in inputs)
    # Left out: what changes nothing, and what says nearly the same to every input.
    if outputs != tuple(map(repr, inputs)) and len(set(outputs)) > len(outputs) // 3:
      yield _Spec(steps, outputs)


def _run(steps, value):
  for operation, k in steps:
    value = operation.function(value, k)
  return value


def _problem(spec, task_id, seed, names):
  draw = random.Random(_hash(seed, spec.behaviour))  # from a text: the same on every machine
  name, argument = draw.choice(names), ARGUMENTS[spec.takes]
  words, lines, variable = [], [], argument
  for i, (operation, k) in enumerate(spec.steps):
    words.append(operation.phrase.format(k=k))
    expression = operation.code.format(v=variable, k=k)
    if i + 1 == len(spec.steps):
      lines.append(f"return {expression}")
    else:
      variable = variable if operation.gives == operation.takes else "result"
      lines.append(f"{variable} = {expression}")
  # Inputs with outputs of their own first: they tell most.
  inputs = INPUTS[spec.takes]
  shuffled = draw.sample(range(len(inputs)), len(inputs))
  first_of = {spec.outputs[i]: i for i in reversed(shuffled)}
  chosen = [i for i in shuffled if first_of[spec.outputs[i]] == i]
  chosen = (chosen + [i for i in shuffled if i not in chosen])[: TESTS + PLUS_TESTS]
  asserts = [f"assert {name}({_call(inputs[i])}) == {spec.outputs[i]}" for i in chosen]
  return Problem(
    task_id=task_id,
    prompt=f"Take {argument}, {', then '.join(words)}.\ndef {name}({argument}):",
    entry_point=name,
    tests=tuple(asserts[:TESTS]),
    plus_tests=tuple(asserts[TESTS:]),
    reference="\n    ".join([f"def {name}({argument}):", *lines]) + "\n",
    source="toy",
  )


def _call(value):
  return repr(value)[1:-1] if isinstance(value, tuple) else repr(value)


def _hash(seed, behaviour):
  return hashlib.sha256(json.dumps([seed, *behaviour]).encode()).hexdigest()
