import io
import json
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers

from diffucoder_jax.data.tokenizer import (
  SPECIAL_TOKENS,
  HFTokenizer,
  SentencePieceTokenizer,
  load_tokenizer,
  train_sentencepiece,
)

CODE = [
  "",
  " ",
  "\n",
  "def f(x):\n\tif x:\n\t\treturn 1  \n\n\n",
  "a = 1\r\nb = 2\r\r\n",
  "  leading and trailing   ",
  "s = 'é e\u0301 日本語 😀 \u200b\u2028\ufeff'",
  "nul \0 in the middle\0",
  "page\f\v\x1b\x7f",
  "\u2581 is not \u2581\u2581 a space\u2581",
  "\u2585\u2047 ⁇ \ufffd",
  "x" * 20_000 + " " * 20_000,
  "<0x41> <unk> ##a Ġ Ċ",
  "0123456789 1_000.5e-3",
]


@pytest.mark.parametrize("text", CODE)
def test_round_trip_is_exact(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_encodes_as_one_by_one(tokenizer):
  assert tokenizer.encode_batch(CODE) == [tokenizer.encode(text) for text in CODE]
  assert tokenizer.encode_batch([]) == []


def test_special_tokens_are_never_read_out_of_a_text(tokenizer):
  special_ids = set(tokenizer.special_ids.values())
  assert {tokenizer.mask_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id,
          tokenizer.end_of_turn_id} <= special_ids
  for text in [*tokenizer.special_ids, " ".join(tokenizer.special_ids), "x<mask>y<|mask|>"]:
    assert not special_ids & set(tokenizer.encode(text))
    assert not special_ids & set(tokenizer.encode_batch([text, text])[1])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_token_bytes_add_up_to_the_text(tokenizer):
  sizes = tokenizer.token_bytes()
  assert sizes.dtype == np.int32 and sizes.shape == (tokenizer.vocab_size,)
  for text in CODE:
    assert sizes[np.asarray(tokenizer.encode(text), int)].sum() == len(text.encode())
  assert not sizes[list(tokenizer.special_ids.values())].any()


def test_decode_skips_or_spells_special_tokens_and_shows_unknown_ids(tokenizer):
  ids = [tokenizer.mask_id, *tokenizer.encode("a b"), tokenizer.end_of_turn_id]
  mask = next(text for text, i in tokenizer.special_ids.items() if i == tokenizer.mask_id)
  assert tokenizer.decode(np.asarray(ids, np.int32)) == "a b"
  assert tokenizer.decode(ids, skip_special=False) == f"{mask}a b<|im_end|>"
  assert tokenizer.decode([*ids, tokenizer.vocab_size, -1]) == "a b\ufffd\ufffd"
  assert tokenizer.decode([]) == ""


def test_pickle_keeps_everything(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  text = "".join(tokenizer.special_ids) + CODE[3]
  assert copy.encode(text) == tokenizer.encode(text)
  assert copy.fingerprint() == tokenizer.fingerprint()


def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "new" / "folder")
  (file,) = (tmp_path / "new" / "folder").iterdir()
  for path in (file, str(file.parent)):
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode(CODE[3]) == tokenizer.encode(CODE[3])


def test_fingerprint_tells_files_apart(sentencepiece_tokenizer, hf_tokenizer, hf_json):
  others = [sentencepiece_tokenizer, hf_tokenizer, HFTokenizer(hf_json(("<|endoftext|>",)))]
  assert len({each.fingerprint() for each in others}) == 3


def test_training_twice_gives_the_same_file(training_texts, tmp_path):
  files = [tmp_path / name / "tokenizer.model" for name in "ab"]
  for file in files:
    train_sentencepiece(iter(training_texts), file, 500)
  assert files[0].read_bytes() == files[1].read_bytes()


def test_our_specials_and_prefix(sentencepiece_tokenizer):
  ours = sentencepiece_tokenizer
  assert [ours.special_ids[text] for text in SPECIAL_TOKENS] == list(range(8))
  assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.mask_id, ours.end_of_turn_id) == (
    0, 1, 2, 4, 6)
  assert ours.adds_bos


def test_newlines_merge_with_their_neighbours(sentencepiece_tokenizer):
  assert len(sentencepiece_tokenizer.encode("):\n")) == 1
  assert len(sentencepiece_tokenizer.encode("        ")) == 1  # an indent is one token


def test_digits_stay_apart(tmp_path):
  trained = train_sentencepiece(["value = 2024\n" * 200], tmp_path / "t.model", 276)
  assert len(trained.encode("2024")) == 4 and len(trained.encode("value")) < 5


@pytest.mark.parametrize("mark", ["\0", "\u2581", "\u2585"])
def test_training_does_not_lose_texts_with_marks_of_the_trainer(mark, tmp_path):
  words = "".join(f"unusualword{mark} = {i}\n" for i in range(100))
  trained = train_sentencepiece([words, "plain text\n" * 20], tmp_path / "t.model", 315)
  assert len(trained.encode("unusualword")) < 4


def test_training_errors(training_texts, tmp_path):
  with pytest.raises(ValueError, match=r"end in \.model"):
    train_sentencepiece(training_texts, tmp_path / "tokenizer", 500)
  with pytest.raises(ValueError, match="could not make 5000 tokens out of 1 documents"):
    train_sentencepiece(["abc\n" * 10], tmp_path / "t.model", 5000)
  with pytest.raises(ValueError, match="another vocab_size"):
    train_sentencepiece(training_texts, tmp_path / "t.model", 100)


def test_large_corpora_are_sampled_by_seed(monkeypatch, tmp_path):
  monkeypatch.setattr("diffucoder_jax.data.tokenizer.MAX_TRAINING_CHARACTERS", 3000)
  texts = [f"name_{chr(97 + i) * 5} = value\n" * 50 for i in range(20)]
  made = [train_sentencepiece(texts, tmp_path / "t.model", 290, seed) for seed in (0, 0, 1)]
  assert made[0].fingerprint() == made[1].fingerprint() != made[2].fingerprint()


def test_hf_special_ids(hf_json):
  full = HFTokenizer(hf_json())
  ids = full.special_ids
  assert full.bos_id == full.eos_id == ids["<|endoftext|>"]
  assert full.mask_id == ids["<|mask|>"] and full.pad_id == ids["<|dlm_pad|>"]
  assert full.end_of_turn_id == ids["<|im_end|>"] and not full.adds_bos
  assert full.vocab_size == max(ids.values()) + 1
  smol = HFTokenizer(hf_json(("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
  assert smol.mask_id == -1 and smol.pad_id == smol.eos_id == smol.special_ids["<|endoftext|>"]
  assert "<|mask|>" not in smol.special_ids


def test_hf_mask_listed_as_an_ordinary_added_token_is_still_special(hf_json):
  contents = json.loads(hf_json())
  for token in contents["added_tokens"]:
    token["special"] = False
  loaded = HFTokenizer(json.dumps(contents).encode())
  assert loaded.mask_id not in loaded.encode("a <|mask|> b")
  assert loaded.decode([loaded.mask_id]) == ""


def test_hf_settings_left_in_the_file_do_not_cut_or_pad(hf_json):
  hf = tokenizers.Tokenizer.from_buffer(hf_json())
  hf.enable_truncation(4)
  hf.enable_padding(length=64)
  loaded = HFTokenizer(hf.to_str().encode())
  assert loaded.decode(loaded.encode(CODE[3])) == CODE[3]
  assert len(loaded.encode("a")) == 1


def test_folder_as_diffucoder_is_published(hf_json, tmp_path):
  contents = json.loads(hf_json())
  # As in Qwen: added tokens after a gap, and not in vocab.json.
  added = {i + 10: token["content"] for i, token in
           enumerate(contents["added_tokens"], len(contents["model"]["vocab"]))}
  pairs = [" ".join(pair) for pair in contents["model"]["merges"]]
  merges = "\n".join(["#version: 0.2", *pairs, ""])
  vocab = {text: i for text, i in contents["model"]["vocab"].items() if text not in added.values()}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text(merges)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
    str(i): {"content": text, "special": True} for i, text in added.items()}}))
  loaded = load_tokenizer(tmp_path)
  assert loaded.special_ids == {text: i for i, text in added.items()}
  assert loaded.encode(CODE[3]) == HFTokenizer(hf_json()).encode(CODE[3])
  assert loaded.mask_id not in loaded.encode("<|mask|>")
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / "added_tokens.json").write_text(json.dumps({text: i for i, text in added.items()}))
  assert load_tokenizer(tmp_path).special_ids == loaded.special_ids


def test_load_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    load_tokenizer(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="holds no tokenizer.model"):
    load_tokenizer(tmp_path)
  for name in ("bad.model", "bad.json"):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"cannot use .*{name}"):
      load_tokenizer(tmp_path / name)
  (tmp_path / "words.txt").write_text("a")
  with pytest.raises(ValueError, match=r"words.txt is not a tokenizer"):
    load_tokenizer(tmp_path / "words.txt")


def test_a_folder_with_both_kinds(sentencepiece_tokenizer, hf_tokenizer, tmp_path):
  sentencepiece_tokenizer.save(tmp_path)
  hf_tokenizer.save(tmp_path)
  assert load_tokenizer(tmp_path).fingerprint() == hf_tokenizer.fingerprint()
  # What our exports hold: the same tokenizer again, in a form that others read and we do not.
  copy = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [], byte_fallback=True))
  copy.decoder = tokenizers.decoders.ByteFallback()
  (tmp_path / "tokenizer.json").write_text(copy.to_str())
  assert load_tokenizer(tmp_path).fingerprint() == sentencepiece_tokenizer.fingerprint()
  (tmp_path / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ValueError, match="cannot use .*tokenizer.json"):
    load_tokenizer(tmp_path)


def test_tokenizers_that_damage_code_are_refused(training_texts):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(training_texts[0].splitlines()), model_writer=model, vocab_size=400,
    model_type="bpe", byte_fallback=True, minloglevel=2)
  with pytest.raises(ValueError, match="does not keep code intact"):
    SentencePieceTokenizer(model.getvalue())
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
  with pytest.raises(ValueError, match="not a byte-level BPE"):
    HFTokenizer(words.to_str().encode())
