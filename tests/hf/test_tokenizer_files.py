"""Tokenizer files of an export: the same ids in `tokenizers` and `transformers` as here."""

import io
import json
import os
import pathlib
import random
import subprocess
import sys
import sysconfig

import pytest
import sentencepiece
import tokenizers

from diffucoder_jax.data.tokenizer import (
  HFTokenizer,
  SentencePieceTokenizer,
  load_tokenizer,
  train_sentencepiece,
)
from diffucoder_jax.hf import tokenizer_files as files
from tests.data.conftest import make_hf_json

TEXTS = [
  "",
  " ",
  "\n",
  "def f(x):\n\tif x:\n\t\treturn 1  \n\n\n",
  "a = 1\r\nb = 2\r\r\n\f\v\x1b\x7f",
  "  leading and trailing   ",
  "s = 'é e\u0301 日本語 😀 \u200b\u2028\ufeff'",
  "nul \0 in the middle\0",
  "\u2581 is not \u2581\u2581 a space\u2581 ",
  "\u2585\u2047 ⁇ \ufffd <0x41> ##a Ġ Ċ",
  "hello , world . don 't , ' s",
  "x" * 20_000 + " " * 20_000 + "=" * 301 + "#-" * 200,
  "x <mask><|mask|> <|im_end|> <unk> <eos>",
  "<mask>",
]
# A tokenizer_config.json with what DiffuCoder's has: remote code, and ids of the added tokens.
PUBLISHED = {
  "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
  "bos_token": "<|beginoftext|>",
  "chat_template": "theirs {{ messages[0]['content'] }}",
  "eos_token": "<|endoftext|>",
  "errors": "replace",
  "mask_token": "<|mask|>",
  "model_max_length": 777,
  "pad_token": "<|dlm_pad|>",
  "padding_side": "right",
  "tokenizer_class": "DreamTokenizer",
}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a\n"}]
SPELLED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na\n<|im_end|>\n"
QWEN_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>")
DREAM_ADDED = (*QWEN_ADDED, *files.DIFFUSION_TOKENS)


def library():
  """Texts of the standard library, in a fixed order."""
  for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
    if "site-packages" not in path.parts:
      yield path.read_bytes().decode(errors="ignore")


@pytest.fixture(scope="session")
def library_texts():
  return list(library())


@pytest.fixture(scope="session")
def ours(library_texts, tmp_path_factory):
  """A SentencePiece tokenizer of ours, large enough for every indent to be a token."""
  path = tmp_path_factory.mktemp("ours") / "tokenizer.model"
  return train_sentencepiece(random.Random(0).sample(library_texts, 60), path, 2000)


@pytest.fixture(scope="session")
def converted(ours):
  """The same as a `tokenizers.Tokenizer`."""
  return as_hf(ours)


@pytest.fixture(scope="session")
def dream_json():
  return qwen_like(DREAM_ADDED)


def qwen_like(added):
  """A small tokenizer.json that, as Qwen's does, composes Unicode: transformers 5 insists on it."""
  contents = json.loads(make_hf_json(added)) | {"normalizer": {"type": "NFC"}}
  return json.dumps(contents, ensure_ascii=False).encode()


def as_hf(tokenizer):
  hf = tokenizers.Tokenizer.from_buffer(files.sentencepiece_as_json(model_of(tokenizer)))
  hf.encode_special_tokens = True  # reads "encode them as the text they are"
  return hf


def model_of(tokenizer):
  return tokenizer.__reduce__()[1][0]


def disagreements(ours, hf, texts):
  theirs = hf.encode_batch(list(texts), add_special_tokens=False)
  pairs = zip(texts, ours.encode_batch(texts), theirs, strict=True)
  return [text for text, ids, encoding in pairs if ids != encoding.ids]


def random_texts(rng, alphabets, count, length):
  """Strings over small alphabets, where the same pieces meet in every way."""
  return [
    "".join(rng.choices(alphabet, k=rng.randint(1, length)))
    for alphabet in alphabets
    for _ in range(count)
  ]


def publish(folder, file, config=PUBLISHED):
  """Writes a tokenizer.json apart into vocab.json and merges.txt, as DiffuCoder is published."""
  contents = json.loads(file)
  listed = {str(t.pop("id")): t for t in contents["added_tokens"]}
  names = {token["content"] for token in listed.values()}
  vocab = {text: i for text, i in contents["model"]["vocab"].items() if text not in names}
  merges = [" ".join(pair) for pair in contents["model"]["merges"]]
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
  config = {**config, "added_tokens_decoder": listed}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))


def read(path):
  return json.loads(path.read_text())


@pytest.fixture
def folders(tmp_path):
  (tmp_path / "source").mkdir()
  (tmp_path / "target").mkdir()
  return tmp_path / "source", tmp_path / "target"


# --- sentencepiece_as_json


def test_ids_are_ours(ours, converted):
  assert disagreements(ours, converted, TEXTS) == []
  for text in TEXTS:
    assert converted.decode(ours.encode(text), skip_special_tokens=False) == text
  assert converted.get_vocab_size() == ours.vocab_size
  assert {text: converted.token_to_id(text) for text in ours.special_ids} == ours.special_ids


def test_ids_are_ours_on_the_standard_library(ours, converted, library_texts):
  texts = library_texts[::16]
  assert sum(map(len, texts)) > 500_000  # Debian ships the library without its tests
  assert disagreements(ours, converted, texts) == []


def test_ids_are_ours_on_random_texts(ours, converted):
  rng = random.Random(1)
  pieces = [text for text in converted.get_vocab() if text not in ours.special_ids]
  alphabets = (" =", "ab", " \n", "-#= ", "()[]:,. \n\t", "\u2581 é日😀\0\r<0x41>", pieces)
  assert disagreements(ours, converted, random_texts(rng, alphabets, 1500, 60)) == []
  runs = [char * n for char in " =-#.\n\ta0" for n in range(1, 200)]
  assert disagreements(ours, converted, runs) == []


def random_vocabulary(rng, folder):
  """A tokenizer trained on few words over few characters: long pieces of periodic text."""
  alphabet = rng.choice([" a", " =", "ab \n", "abc ", "a b"])
  words = random_texts(rng, [alphabet], rng.randint(1, 8), 6)
  docs = [" x" * 3] + ["".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(20)]
  for vocab_size in (400, 340, 300, 280, 272):
    try:
      tokenizer = train_sentencepiece(docs, folder / "tokenizer.model", vocab_size)
    except ValueError:  # too small a text for so many tokens
      continue
    return tokenizer, random_texts(rng, [alphabet, words], 400, 40)
  return None, []


def test_ids_are_ours_for_random_vocabularies(tmp_path):
  vocabularies = 0
  for seed in range(25):
    tokenizer, texts = random_vocabulary(random.Random(seed), tmp_path)
    if tokenizer is not None:
      vocabularies += 1
      assert disagreements(tokenizer, as_hf(tokenizer), texts) == [], seed
  assert vocabularies > 15


def test_all_ways_to_cut_a_piece_are_needed(ours):
  """With one merge a piece, as tokenizer files usually have them, ids differ: the tests can fail."""
  contents = json.loads(files.sentencepiece_as_json(model_of(ours)))
  first = {"".join(pair): pair for pair in reversed(contents["model"]["merges"])}
  contents["model"]["merges"] = list(reversed(first.values()))
  hf = tokenizers.Tokenizer.from_buffer(json.dumps(contents).encode())
  assert disagreements(ours, hf, [TEXTS[3] * 3, pathlib.Path(json.__file__).read_text()])


def test_a_text_starts_with_bos_as_our_prompts_do(ours):
  hf = tokenizers.Tokenizer.from_buffer(files.sentencepiece_as_json(model_of(ours)))
  assert hf.encode("a b").ids == [ours.bos_id, *ours.encode("a b")]
  assert hf.encode("a", "b").ids == [ours.bos_id, *ours.encode("a"), *ours.encode("b")]


def test_other_sentencepiece_models_are_refused(library_texts):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter("".join(library_texts[:5]).splitlines(True)), model_writer=model,
    vocab_size=600, hard_vocab_limit=False, model_type="unigram", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
    allow_whitespace_only_pieces=True, minloglevel=2, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
    control_symbols=["<mask>"],
  )  # fmt: skip
  SentencePieceTokenizer(model.getvalue())  # of use to us, but not a BPE
  with pytest.raises(ValueError, match="cannot be written as a tokenizer.json"):
    files.sentencepiece_as_json(model.getvalue())


# --- write


def test_our_tokenizer(ours, folders):
  source, target = folders
  ours.save(source)
  (source / "config.json").write_text('{"model": {}}')
  written = files.write(str(source), str(target))
  assert sorted(written) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
  assert sorted(written) == sorted(path.name for path in target.iterdir())
  config = read(target / "tokenizer_config.json")
  named = {key: value for key, value in config.items() if key.endswith("_token")}
  assert named == {
    "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>",
    "unk_token": "<unk>",
  }  # fmt: skip
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>", "<|dlm_pad|>"]
  assert config["padding_side"] == "left" and not config["clean_up_tokenization_spaces"]
  back = load_tokenizer(target)
  assert back.fingerprint() == ours.fingerprint() and type(back) is SentencePieceTokenizer
  again = target.parent / "again"
  again.mkdir()
  assert sorted(files.write(target, again)) == sorted(written)
  assert all((again / name).read_bytes() == (target / name).read_bytes() for name in written)


def test_files_that_are_there_are_copied_byte_for_byte(folders):
  source, target = folders
  for name in files.FILES:
    (source / name).write_bytes(f'{{"tokenizer_class" :"Qwen2Tokenizer", "of": "{name}"}}'.encode())
  (source / "model.safetensors").write_bytes(b"")
  assert sorted(files.write(source, target)) == sorted(files.FILES)
  for name in files.FILES:
    assert (target / name).read_bytes() == (source / name).read_bytes()
  assert not (target / "model.safetensors").exists()


def test_a_tokenizer_json_alone_gets_a_config(dream_json, folders):
  source, target = folders
  (source / "tokenizer.json").write_bytes(dream_json)
  (source / "config.json").write_text('{"max_position_embeddings": 4096}')
  assert sorted(files.write(source, target)) == ["tokenizer.json", "tokenizer_config.json"]
  assert (target / "tokenizer.json").read_bytes() == dream_json
  config = read(target / "tokenizer_config.json")
  assert config.pop("chat_template")
  assert config == {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|beginoftext|>",
    "eos_token": "<|endoftext|>", "pad_token": "<|dlm_pad|>", "mask_token": "<|mask|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "padding_side": "left",
    "clean_up_tokenization_spaces": False, "model_max_length": 4096,
  }  # fmt: skip
  smol = files.default_config(make_hf_json(("<|endoftext|>",)), 1)
  assert smol["pad_token"] == smol["eos_token"] == "<|endoftext|>"
  assert not {"mask_token", "bos_token", "unk_token", "chat_template"} & set(smol)


@pytest.mark.parametrize("with_json", [False, True])
def test_remote_code_is_left_behind(dream_json, folders, with_json):
  source, target = folders
  publish(source, dream_json)
  if with_json:
    (source / "tokenizer.json").write_bytes(dream_json)
  before = {path.name: path.read_bytes() for path in source.iterdir()}
  assert set(files.write(source, target)) == {*before, "tokenizer.json"}
  assert {path.name: path.read_bytes() for path in source.iterdir()} == before
  kept = read(source / "tokenizer_config.json")
  del kept["auto_map"]
  kept["tokenizer_class"] = "PreTrainedTokenizerFast"
  assert read(target / "tokenizer_config.json") == kept
  assert (target / "vocab.json").read_bytes() == before["vocab.json"]
  wanted, loaded = HFTokenizer(dream_json), load_tokenizer(target)
  assert loaded.special_ids == wanted.special_ids
  assert loaded.encode_batch(TEXTS) == wanted.encode_batch(TEXTS)
  if with_json:
    assert (target / "tokenizer.json").read_bytes() == dream_json


def test_nothing_to_write(folders):
  source, target = folders
  (source / "vocab.json").write_text("{}")  # no merges.txt
  (source / "special_tokens_map.json").write_text("{}")
  assert not files.write(source, target)
  assert list(target.iterdir()) == []


def test_damaged_files_are_named(dream_json, folders):
  source, target = folders
  (source / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ValueError, match="tokenizer.json is not JSON"):
    files.write(source, target)
  (source / "tokenizer.json").write_bytes(dream_json)
  (source / "tokenizer_config.json").write_bytes(b"{")
  with pytest.raises(ValueError, match="source/tokenizer_config.json is not JSON"):
    files.write(source, target)
  assert list(target.iterdir()) == []


# --- with_diffusion_tokens


@pytest.mark.parametrize("indent", [None, 2])
def test_diffusion_tokens_get_the_next_ids(indent):
  style = {"separators": (",", ":")} if indent is None else {"indent": indent}
  base = json.dumps(json.loads(make_hf_json(QWEN_ADDED)), ensure_ascii=False, **style).encode()
  first = HFTokenizer(base).vocab_size
  file, ids = files.with_diffusion_tokens(base)
  assert ids == {name: first + k for k, name in enumerate(files.DIFFUSION_TOKENS)}
  loaded = HFTokenizer(file)
  assert (loaded.mask_id, loaded.pad_id, loaded.vocab_size) == (first + 1, first + 2, first + 3)
  assert loaded.encode_batch(TEXTS) == HFTokenizer(base).encode_batch(TEXTS)
  # Nothing else of the file is changed: without the tokens it is what it was, to the byte.
  contents = json.loads(file)
  contents["added_tokens"] = [t for t in contents["added_tokens"] if t["content"] not in ids]
  assert json.dumps(contents, ensure_ascii=False, **style).encode() == base
  assert files.with_diffusion_tokens(file) == (file, ids)


def test_diffusion_tokens_that_exist_keep_their_ids():
  base = make_hf_json(("<|mask|>", "<|endoftext|>"))
  mask_id = HFTokenizer(base).mask_id
  file, ids = files.with_diffusion_tokens(base)
  assert ids == {"<|beginoftext|>": mask_id + 2, "<|mask|>": mask_id, "<|dlm_pad|>": mask_id + 3}
  assert HFTokenizer(file).special_ids == HFTokenizer(base).special_ids | ids


def test_diffusion_tokens_of_a_vocabulary_with_gaps():
  contents = json.loads(make_hf_json(QWEN_ADDED))
  contents["model"]["vocab"]["<|file_sep|>"] = 900  # far behind the others
  contents["added_tokens"][-1]["id"] = 900
  file, ids = files.with_diffusion_tokens(json.dumps(contents).encode())
  assert list(ids.values()) == [901, 902, 903]
  assert HFTokenizer(file).special_ids | ids == HFTokenizer(file).special_ids
  # A name that is in the vocabulary, but that nobody listed as special.
  contents["model"]["vocab"]["<|mask|>"] = 905
  file, ids = files.with_diffusion_tokens(json.dumps(contents).encode())
  assert ids == {"<|beginoftext|>": 906, "<|mask|>": 905, "<|dlm_pad|>": 907}
  assert HFTokenizer(file).special_ids | ids == HFTokenizer(file).special_ids


def test_diffusion_tokens_take_the_place_of_others():
  base = make_hf_json(QWEN_ADDED)
  before = HFTokenizer(base).special_ids
  reuse = list(before)[-3:]
  file, ids = files.with_diffusion_tokens(base, reuse)
  assert list(ids) == list(files.DIFFUSION_TOKENS) and [*ids.values()] == [before[t] for t in reuse]
  loaded = HFTokenizer(file)
  assert loaded.mask_id == ids["<|mask|>"] and loaded.vocab_size == HFTokenizer(base).vocab_size
  assert not set(reuse) & loaded.special_ids.keys()
  assert loaded.encode_batch(TEXTS) == HFTokenizer(base).encode_batch(TEXTS)
  decoder = {str(before[t]): {"content": t, "special": True} for t in reuse}
  listed = files.config_with_diffusion_tokens({"added_tokens_decoder": decoder}, ids)
  assert {t["content"] for t in listed["added_tokens_decoder"].values()} == ids.keys()
  with pytest.raises(ValueError, match="no special token '<gh_stars>'"):
    files.with_diffusion_tokens(base, ["<gh_stars>", *reuse[1:]])
  with pytest.raises(ValueError, match="has such tokens already"):
    files.with_diffusion_tokens(files.with_diffusion_tokens(base)[0], reuse)


def test_diffusion_tokens_need_a_bpe():
  unigram = {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}
  with pytest.raises(ValueError, match="this tokenizer.json is a Unigram"):
    files.with_diffusion_tokens(json.dumps(unigram).encode())


def test_diffusion_tokens_in_the_config():
  ids = {"<|beginoftext|>": 30, "<|mask|>": 7, "<|dlm_pad|>": 31}
  theirs = {"7": {"content": "<|mask|>", "special": False}, "9": {"content": "x"}}
  config = {"added_tokens_decoder": theirs, "mask_token": None, "pad_token": "<|endoftext|>"}
  new = files.config_with_diffusion_tokens(config, ids)
  assert list(new["added_tokens_decoder"]) == ["7", "9", "30", "31"]
  assert new["added_tokens_decoder"]["7"] == theirs["7"]
  assert new["added_tokens_decoder"]["31"]["content"] == "<|dlm_pad|>"
  assert new["mask_token"] == "<|mask|>" and new["pad_token"] == "<|endoftext|>"
  assert config["mask_token"] is None and len(theirs) == 2
  assert files.config_with_diffusion_tokens({"mask_token": "<m>"}, ids) == {"mask_token": "<m>"}


def test_diffusion_tokens_of_a_folder(tmp_path):
  with pytest.raises(FileNotFoundError, match="no tokenizer.json to add tokens to"):
    files.add_diffusion_tokens(tmp_path)
  (tmp_path / "tokenizer.json").write_bytes(make_hf_json(QWEN_ADDED))
  ids = files.add_diffusion_tokens(tmp_path)
  assert load_tokenizer(tmp_path).mask_id == ids["<|mask|>"]
  (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
  assert files.add_diffusion_tokens(tmp_path) == ids
  listed = read(tmp_path / "tokenizer_config.json")["added_tokens_decoder"]
  assert {token["content"]: int(i) for i, token in listed.items()} == ids


# --- check_ids


@pytest.fixture(scope="session")
def dream(dream_json):
  return HFTokenizer(dream_json)


def good(tokenizer):
  return {
    "vocab_size": tokenizer.vocab_size + 100,
    "mask_token_id": tokenizer.mask_id,
    "pad_token_id": tokenizer.eos_id,  # as in Dream, whose tokenizer may pad with another
    "eos_token_id": [tokenizer.eos_id, tokenizer.end_of_turn_id],
    "bos_token_id": None,
  }


def test_ids_that_agree(dream, ours):
  for tokenizer in (dream, ours):
    files.check_ids(good(tokenizer), tokenizer)
    files.check_ids({}, tokenizer)
    files.check_ids(good(tokenizer) | {"eos_token_id": tokenizer.end_of_turn_id}, tokenizer)
    files.check_ids(good(tokenizer) | {"pad_token_id": -1}, tokenizer)
  causal = HFTokenizer(make_hf_json(QWEN_ADDED))
  # A row that the tokenizer never makes may stand for the mask.
  files.check_ids(good(causal) | {"mask_token_id": causal.vocab_size}, causal)


def test_ids_that_disagree(dream):
  def refused(match, **changes):
    with pytest.raises(ValueError, match=match):
      files.check_ids(good(dream) | changes, dream)

  eos, mask, size = dream.eos_id, dream.mask_id, dream.vocab_size
  refused(f"mask_token_id of config.json is {eos}, .* mask is {mask}: set mask_token_id to {mask}",
          mask_token_id=eos)  # fmt: skip
  refused(f"mask_token_id {size + 100} .* outside its vocab_size {size + 100}: set mask_token_id "
          f"to {mask}", mask_token_id=size + 100)  # fmt: skip
  refused(f"pad_token_id of config.json is {size}, which is no token .*set pad_token_id to "
          f"{dream.pad_id}", pad_token_id=size)  # fmt: skip
  refused(f"eos_token_id of config.json is 5, which is '.*<\\|im_end\\|> {dream.end_of_turn_id}.*: "
          f"set eos_token_id to {eos}", eos_token_id=[eos, 5])  # fmt: skip
  refused("bos_token_id of config.json is 6, which is", bos_token_id=6)
  refused("eos_token_id of config.json must be a token id, got '<eos>'", eos_token_id="<eos>")
  refused("pad_token_id of config.json must be a token id, got -5", pad_token_id=-5)
  refused(f"ids up to {size - 1}, but vocab_size of config.json is {size - 1}", vocab_size=size - 1)
  causal = HFTokenizer(make_hf_json(QWEN_ADDED))
  with pytest.raises(ValueError, match="mask_token_id of config.json is 5, .*remove mask_token_id"):
    files.check_ids(good(causal) | {"mask_token_id": 5}, causal)


# --- transformers


def automatic(folder, **arguments):
  """AutoTokenizer for a folder whose config.json asks for code, as that of an export does."""
  transformers = pytest.importorskip("transformers")
  auto_map = {"AutoModel": "modeling_diffucoder.DiffuCoderModel"}
  config = {"model_type": "Dream", "auto_map": auto_map, "transformers_version": "4.46.2"}
  (folder / "config.json").write_text(json.dumps(config))
  # Without trust_remote_code, transformers 5 asks about the network's code.
  return transformers.AutoTokenizer.from_pretrained(
    str(folder), trust_remote_code=False, local_files_only=True, **arguments
  )


def check_automatic(folder, tokenizer, template, begins=()):
  """Ids, texts, special tokens and batches of AutoTokenizer are those of `tokenizer`."""
  auto = automatic(folder)
  assert auto.is_fast and len(auto) == tokenizer.vocab_size
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert auto(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    assert auto.decode(ids) == tokenizer.decode(ids)
    if "<" not in text:
      assert auto(text, add_special_tokens=False)["input_ids"] == ids
      assert auto(text)["input_ids"] == [*begins, *ids]
  split = automatic(folder, split_special_tokens=True)
  assert split(TEXTS[-2], add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXTS[-2])
  # Otherwise special tokens are read out of a text: what a prompt is made of.
  for text, i in tokenizer.special_ids.items():
    assert auto.encode(text, add_special_tokens=False) == [i]
    assert auto.decode([i]) == text and auto.decode([i], skip_special_tokens=True) == ""
  assert auto.mask_token_id == tokenizer.mask_id and auto.eos_token_id == tokenizer.eos_id
  short, long = TEXTS[3][:4], TEXTS[3]
  batch = auto([short, long], padding=True, padding_side="left")
  rows = [[*begins, *tokenizer.encode(text)] for text in (short, long)]
  fill = len(rows[1]) - len(rows[0])
  assert batch["input_ids"] == [[auto.pad_token_id] * fill + rows[0], rows[1]]
  assert batch["attention_mask"] == [[0] * fill + [1] * len(rows[0]), [1] * len(rows[1])]
  assert auto.apply_chat_template(CHAT, tokenize=False) == template
  ids = auto.apply_chat_template(CHAT)
  ids = ids if isinstance(ids, list) else ids["input_ids"]  # a dict from version 5 on
  assert ids == auto(template, add_special_tokens=False)["input_ids"]
  return auto


@pytest.mark.torch
def test_automatic_from_ours(ours, folders):
  source, target = folders
  ours.save(source)
  files.write(source, target)
  auto = check_automatic(target, ours, "<bos>" + SPELLED, [ours.bos_id])
  assert auto.padding_side == "left" and auto.pad_token_id == ours.pad_id
  prompt = auto.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
  assert prompt == "<bos><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
  again = target.parent / "again"
  auto.save_pretrained(again)
  assert automatic(again)(TEXTS[8])["input_ids"] == [ours.bos_id, *ours.encode(TEXTS[8])]


@pytest.mark.torch
def test_automatic_from_a_tokenizer_json(dream_json, dream, folders):
  source, target = folders
  (source / "tokenizer.json").write_bytes(dream_json)
  files.write(source, target)
  auto = check_automatic(target, dream, SPELLED)
  assert auto.pad_token_id == dream.pad_id and auto.bos_token == "<|beginoftext|>"


@pytest.mark.torch
def test_automatic_from_what_is_published(dream_json, dream, folders):
  source, target = folders
  publish(source, dream_json)
  files.write(source, target)
  auto = check_automatic(target, dream, "theirs hi")
  assert auto.model_max_length == 777 and auto.padding_side == "right"


@pytest.mark.torch
def test_automatic_from_qwen_with_new_tokens(folders):
  source, target = folders
  qwen = {k: v for k, v in PUBLISHED.items() if k not in ("auto_map", "bos_token", "mask_token")}
  qwen |= {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"}
  publish(source, qwen_like(QWEN_ADDED), qwen)
  (source / "tokenizer.json").write_bytes(qwen_like(QWEN_ADDED))
  files.write(source, target)
  files.add_diffusion_tokens(target)
  check_automatic(target, load_tokenizer(target), "theirs hi")


# --- Qwen's own vocabulary


@pytest.fixture(scope="session")
def qwen_json(shared, tmp_path_factory):
  """Qwen2.5's tokenizer.json with Dream's tokens, from `shared/tools/real_models.py`."""
  given = os.environ.get("DIFFUCODER_REAL_MODELS")
  folder = pathlib.Path(given or tmp_path_factory.mktemp("real")) / "qwen-tokenizer"
  if not (folder / "tokenizer.json").exists():
    folder.mkdir(exist_ok=True)
    tool = shared / "tools" / "real_models.py"
    made = subprocess.run(
      [sys.executable, str(tool), "qwen-tokenizer", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
      pytest.skip(f"{tool} could not make it (no network?): {made.stderr[-300:]}")
  return (folder / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_qwen_gets_dreams_ids(qwen_json):
  contents = json.loads(qwen_json)
  listed = contents["added_tokens"]
  contents["added_tokens"] = [t for t in listed if t["content"] not in files.DIFFUSION_TOKENS]
  base = json.dumps(contents, ensure_ascii=False, indent=2).encode()
  file, ids = files.with_diffusion_tokens(base)
  assert ids == {"<|beginoftext|>": 151665, "<|mask|>": 151666, "<|dlm_pad|>": 151667}
  assert file == qwen_json


@pytest.mark.slow
@pytest.mark.torch
def test_automatic_from_qwen(qwen_json, folders):
  source, target = folders
  (source / "tokenizer.json").write_bytes(qwen_json)
  files.write(source, target)
  check_automatic(target, HFTokenizer(qwen_json), SPELLED)


@pytest.mark.slow
def test_ids_are_ours_on_all_of_the_standard_library(library_texts, tmp_path):
  """30 million characters, a small and a large vocabulary."""
  rng = random.Random(0)
  for vocab_size in (600, 16384):
    texts = rng.sample(library_texts, 400)
    tokenizer = train_sentencepiece(texts, tmp_path / "tokenizer.model", vocab_size)
    assert disagreements(tokenizer, as_hf(tokenizer), library_texts) == []
