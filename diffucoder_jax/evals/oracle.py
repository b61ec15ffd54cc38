"""HumanEval+ and MBPP+ as EvalPlus judges them: inputs, a reference, and a comparison.

The published files hold inputs without results. Here the tests carry the reference along and run it
where they run themselves, in the judge's process, which the answer never sees; so every version is
judged in one way, and nothing has to be computed, stored or trusted beforehand.

Source: Liu et al. 2023; the comparison is that of evalplus 0.3.1 (`eval.unsafe_execute`), in whose
verdicts scores are published. `tests/test_evalplus.py` compares the two.
"""

import json

from diffucoder_jax.data.problem_sets import COMPLETE
from diffucoder_jax.data.problems import Problem
from diffucoder_jax.data.rows import read_rows

FIELDS = (
  "task_id",
  "prompt",
  "entry_point",
  "canonical_solution",
  "base_input",
  "plus_input",
  "atol",
)

# JSON has lists only. How the arguments of some tasks of MBPP are meant: an expression of `args`
# (one input's arguments as published) and the numbers of the tasks.
_ARGUMENTS = {
  "[tuple(a) for a in args]": (
    2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726,
    740, 744, 809,
  ),
  "[[tuple(x) for x in a] for a in args]": (
    63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780,
  ),
  "[[tuple(x) for x in args[0]], args[1]]": (75, 413, 444, 753),
  "[args[0], tuple(args[1])]": (106, 750),
  "[[set(x) if isinstance(x, list) and x else {} for x in args[0]]]": (115,),
  "[float(args[0]), complex(args[1])]": (124,),
  "[tuple(args[0]), args[1]]": (250, 405, 446, 617, 720, 763, 808),
  "[complex(args[0])]": (252,),
  "[tuple(tuple(x) for x in a) for a in args]": (259, 401, 445),
  "[tuple(tuple(x) if isinstance(x, list) else x for x in args[0])]": (278,),
  "[tuple(args[0]), args[1], args[2]]": (307,),
  "deep(args)": (580, 615, 791),
  "[{key: tuple(x) for key, x in args[0].items()}, *args[1:]]": (722,),
}  # fmt: skip
# Five inputs of MBPP+ ask for up to 1.7 million tuples of 76 colours and more: up to a gigabyte, which
# no answer can hand from its process to the judge's. They are left out; 104 smaller ones remain.
TOO_LARGE = {"Mbpp/255": lambda args: args[1] > 70}
_EXPRESSION = {f"Mbpp/{i}": text for text, numbers in _ARGUMENTS.items() for i in numbers}

# Answers that may differ from the reference's: entry point -> expression of out, exp, args, atol
# that replaces equality. The comments give the task.
_SAME_SET = "set(out) == set(exp)"
_SOMETHING = "out == exp if type(out) is bool else exp == (out is not None)"
_ORACLES = {
  "mbpp": {
    **dict.fromkeys(
      ("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly",
       "larg_nnum", "intersection_array", "find_dissimilar", "Diff"), _SAME_SET),
    **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), _SOMETHING),
    "are_equivalent": "True",  # 164: the text does not say what is equivalent
    "sum_div": "out == exp or out == 0",  # 295: the divisors of 1
    "surface_Area": "out == exp or abs(out - surface_area(*args)) <= atol",  # 581: height or slant
    "digit_distance_nums": "out == exp or out == digit_distance(*args)",  # 558: of unequal length
  },
  # 32: any zero will do. The file of HumanEval+ in the original format has this one wrong.
  "humaneval": {"find_zero": "abs(sum(c * math.pow(out, i) for i, c in enumerate(args[0]))) <= atol"},
}  # fmt: skip

# What every test begins with. `close` is numpy's allclose for plain numbers and lists of them: what
# numpy would refuse to compare is different. Like EvalPlus, `judge` keeps the tolerance that a
# result of floats calls for, for the inputs after it as well.
_JUDGE = """\
import copy, json, math

def deep(x):
  return tuple(map(deep, x)) if isinstance(x, list) else x

def surface_area(base, height):
  return round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))

def digit_distance(a, b):
  width = max(len(str(a)), len(str(b)))
  return sum(abs(int(x) - int(y)) for x, y in zip(str(a).zfill(width), str(b).zfill(width)))

def close(out, exp, atol):
  if isinstance(exp, (list, tuple)):
    return (isinstance(out, (list, tuple)) and len(out) == len(exp)
            and all(close(x, y, atol) for x, y in zip(out, exp)))
  for x in (out, exp):
    if not isinstance(x, (int, float, complex)) or isinstance(x, int) and not -(2**63) <= x < 2**64:
      return False
  return out == exp or abs(out - exp) <= atol + 1e-07 * abs(exp) < math.inf

def floats(x):
  if isinstance(x, (list, tuple)) and x:
    return all(isinstance(y, float) for y in x)
  return isinstance(x, float)

def judge(candidate, reference, inputs, arguments, same, something, zero, atol):
  for number, args in enumerate(inputs):
    args = arguments(args)
    exp = None if zero else reference(*copy.deepcopy(args))
    if something:
      exp = exp is not None
    out = candidate(*args)
    matches = same(out, exp, args, atol)
    if zero:
      assert matches, f"input {number}"
      continue
    if atol == 0 and floats(exp):
      atol = 1e-6
    if not matches and atol != 0:
      assert type(out) is type(exp) and close(out, exp, atol), f"input {number}"
    else:
      assert matches, f"input {number}"

"""


def read_evalplus(path) -> list[Problem]:
  """Reads HumanEvalPlus.jsonl(.gz) or MbppPlus.jsonl(.gz), whichever version.

  Returns:
    problems with one program in `tests`, all inputs of the original set, and one in `plus_tests`,
    all that EvalPlus added. Their stub is the published prompt. Nothing helps an answer that lacks
    an import.
  Raises:
    FileNotFoundError: no such file. ValueError: a record without what such files hold; names it.
  """
  problems = []
  for name, row in read_rows(path):
    missing = [field for field in FIELDS if field not in row]
    if missing:
      raise ValueError(f"{name} has no {missing[0]!r}, as the files of EvalPlus do")
    family = "mbpp" if row["task_id"].startswith("Mbpp/") else "humaneval"
    code = row["prompt"] + row["canonical_solution"]
    base, plus = (_program(family, row, code, row[key]) for key in ("base_input", "plus_input"))
    question = f"```\n{row['prompt'].strip()}\n```\n"
    problems.append(
      Problem(
        task_id=row["task_id"],
        prompt=question if family == "mbpp" else COMPLETE + question,
        entry_point=row["entry_point"],
        tests=(base,),
        plus_tests=(plus,),
        reference=code,
        source=f"{family}plus",
        stub=row["prompt"],
      )
    )
  return problems


def _program(family, row, code, inputs):
  """A test: all inputs in turn, up to the first on which the answer is wrong."""
  entry = row["entry_point"]
  too_large = TOO_LARGE.get(row["task_id"], lambda args: False)
  inputs = [args for args in inputs if not too_large(args)]
  same = _ORACLES[family].get(entry, "out == exp")
  arguments = _EXPRESSION.get(row["task_id"], "args")
  zero = (family, entry) == ("humaneval", "find_zero")
  return (
    f"{_JUDGE}names = {{}}\nexec({code!r}, names)\n"
    f"judge(candidate, names[{entry!r}], json.loads({json.dumps(inputs)!r}), lambda args: {arguments},\n"
    f"      lambda out, exp, args, atol: {same}, {same is _SOMETHING}, {zero}, {row['atol']!r})\n"
  )
