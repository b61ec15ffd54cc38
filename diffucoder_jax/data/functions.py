"""Python functions of a corpus: as things to complete, and cleaned, as documents to train on."""

import ast
import hashlib
import warnings
from typing import NamedTuple

from diffucoder_jax.data.sources import Document

# Of a cleaned function: shorter ones say nothing, longer ones fill whole rows.
MIN_LINES, MAX_LINES = 3, 40


class Function(NamedTuple):
  """One function's source, cut after its signature and docstring: source = prompt + body."""

  name: str  # file and line
  prompt: str
  body: str


def find_functions(document):
  """The functions of a `sources.Document`; a file that does not parse has none.

  Args:
    document: has `name` and `text`.
  Returns:
    list of `Function`, in the file's order, indentation kept.
  """
  lines = document.text.splitlines(keepends=True)
  functions = []
  for node in _definitions(document):
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    if not body or body[0].lineno == node.lineno:  # nothing but a docstring, or all in one line
      continue
    first = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", ()))])
    prompt = "".join(lines[node.lineno - 1 : first - 1])
    text = "".join(lines[first - 1 : node.end_lineno])
    functions.append(Function(f"{document.name}:{node.lineno}", prompt, text))
  return functions


def cleaned(train, held_out):
  """Functions as documents of their own, in one style: no comments, no decorators, no indentation.

  Args:
    train, held_out: lists of `sources.Document`.
  Returns:
    (train, held_out): lists of documents, one for each distinct function of MIN_LINES to MAX_LINES
    lines. What is held out is not trained on, wherever else it stands.
  """
  seen, sides = set(), []
  for documents in (held_out, train):
    sides.append([])
    for document in documents:
      for node in _definitions(document):
        node.decorator_list = []
        text = ast.unparse(node) + "\n"
        if text not in seen and MIN_LINES <= text.count("\n") <= MAX_LINES:
          seen.add(text)
          sides[-1].append(Document(f"{document.name}:{node.lineno}", text))
  return sides[1], sides[0]


def _definitions(document):
  """The nodes of all functions of a file; a file that does not parse has none."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # odd escapes in old files are not our business
      tree = ast.parse(document.text)
  except (SyntaxError, ValueError):
    return []
  kinds = ast.FunctionDef | ast.AsyncFunctionDef
  return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def pick_functions(documents, count, fits):
  """A fixed choice of functions for which `fits(function)` holds: the first by hash of their text.
  Of functions that begin alike only one is taken.

  Raises:
    ValueError: fewer than `count` of them.
  """
  found = {f.prompt: f for d in documents for f in find_functions(d) if fits(f)}
  found = list(found.values())
  found.sort(key=lambda f: hashlib.sha256((f.prompt + f.body).encode()).hexdigest())
  if len(found) < count:
    raise ValueError(f"asked for {count} functions, and only {len(found)} are of a fitting length")
  return found[:count]
