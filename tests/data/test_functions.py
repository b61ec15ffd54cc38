"""Cleaned functions as documents: one style, each once, and none on both sides."""

import textwrap

import pytest

from diffucoder_jax.data import dataset, functions, pipeline, sources
from diffucoder_jax.data.sources import Document

ONE = """
import functools

class A:
    @functools.cache  # remembers
    def   area(self,w,h):
        '''Of a rectangle.'''
        # a comment
        size = w*h
        return size

    def short(self): return 1

def twice(x):
    y = x + x
    return y
"""
TWO = """
def twice(x):
    y = x + x   # the same as in ONE but for style

    return y

async def other(x):
    def inner(z):
        z += 1
        return z
    return inner(x)
"""


def test_functions_are_cleaned():
  train, held_out = functions.cleaned([Document("one.py", ONE)], [])
  assert held_out == []
  assert {d.name: d.text for d in train} == {
    "one.py:6": 'def area(self, w, h):\n    """Of a rectangle."""\n    size = w * h\n    return size\n',
    "one.py:14": "def twice(x):\n    y = x + x\n    return y\n",
  }


def test_what_is_held_out_is_not_trained_on():
  train, held_out = functions.cleaned([Document("one.py", ONE)], [Document("two.py", TWO)])
  assert [d.text.split("(")[0] for d in held_out] == ["def twice", "async def other", "def inner"]
  assert [d.text.split("(")[0] for d in train] == ["def area"]
  again, _ = functions.cleaned([Document("one.py", ONE), Document("copy.py", ONE)], [])
  assert len(again) == 2
  long = "def f(x):\n" + "    x += 1\n" * functions.MAX_LINES
  assert functions.cleaned([Document("long.py", long), Document("bad.py", "def f(:")], []) == ([], [])


def test_a_corpus_of_functions(data_config, sentencepiece_tokenizer, tmp_path):
  texts = [textwrap.__file__, sources.__file__, functions.__file__, pipeline.__file__]
  for i, path in enumerate(texts):
    (tmp_path / f"{i}.py").write_text(open(path).read())
  config = data_config.copy_and_resolve_references()
  config.update(source="folder", path=str(tmp_path), pattern="*.py", held_out=0.5, seq_len=64)
  whole = pipeline.load_corpus(config, sentencepiece_tokenizer, 0)
  config.unit = "function"
  made = pipeline.load_corpus(config, sentencepiece_tokenizer, 0)
  assert made.report["documents"] > whole.report["documents"] == 4
  assert 0 < made.report["held_out_documents"] < made.report["documents"]
  assert made.fingerprint != whole.fingerprint and made.report["dropped"] == 0
  config.unit = "line"
  with pytest.raises(ValueError, match="data.unit must be 'file' or 'function', got 'line'"):
    pipeline.load_corpus(config, sentencepiece_tokenizer, 0)


def test_a_prepared_dataset_holds_whole_documents(data_config, tmp_path):
  from configs import common

  config = common.base("tiny")
  config.data.unit = "function"
  with pytest.raises(ValueError, match="data.unit is 'function'"):
    dataset.build(config, tmp_path, 1)
