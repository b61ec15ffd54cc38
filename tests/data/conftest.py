"""A small trained SentencePiece tokenizer, a small byte-level BPE, and a small `data` section."""

import inspect
import json
import textwrap

import pytest
import tokenizers
from ml_collections import ConfigDict

from diffucoder_jax.data import tokenizer as tokenizer_lib

TEXTS = [inspect.getsource(module) for module in (textwrap, json, tokenizer_lib)]
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|dlm_pad|>")


@pytest.fixture(scope="session")
def training_texts():
  return TEXTS


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
  return tokenizer_lib.train_sentencepiece(TEXTS, path, vocab_size=600)


def make_hf_json(specials=QWEN_SPECIALS):
  """The contents of a small tokenizer.json built as Qwen2.5's is, without its normaliser."""
  hf = tokenizers.Tokenizer(tokenizers.models.BPE())
  hf.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
    tokenizers.pre_tokenizers.Split(
      tokenizers.Regex(tokenizer_lib._QWEN_SPLIT), "isolated", False),
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  hf.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=500, initial_alphabet=sorted(alphabet), show_progress=False)
  hf.train_from_iterator(TEXTS, trainer)
  hf.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in specials])
  return hf.to_str().encode()


@pytest.fixture(scope="session")
def hf_json():
  return make_hf_json


@pytest.fixture(scope="session")
def hf_tokenizer():
  return tokenizer_lib.HFTokenizer(make_hf_json())


@pytest.fixture(params=["sentencepiece", "hf"])
def tokenizer(request):
  return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def data_config(tmp_path):
  return ConfigDict({
    "source": "folder", "path": str(tmp_path / "corpus"), "pattern": "**/*.py",
    "text_key": "content", "held_out": 0.25, "on_undecodable": "error", "seq_len": 16,
    "global_batch": 8, "fill_batch": False, "unit": "file",
  })
