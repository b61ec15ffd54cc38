"""Text to token ids and back: our SentencePiece models and Hugging Face `tokenizer.json` files.

Both keep code intact (`decode(encode(text)) == text`) and neither ever reads a special token out of
a text: a file that contains the characters "<mask>" does not contain a mask.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

SPECIAL_TOKENS = (
  "<pad>",
  "<bos>",
  "<eos>",
  "<unk>",
  "<mask>",
  "<|im_start|>",
  "<|im_end|>",
  "<|dlm_pad|>",
)
LINES_PER_CHUNK = 64
MAX_TRAINING_CHARACTERS = 200_000_000
# What any tokenizer for code must bring back unchanged.
_PROBE = "  \tx  =\n\n \u2581é 😀\0\r\n\f<mask> "
# How Qwen2 splits a text before its byte-level BPE (Qwen2Tokenizer of transformers); written into
# tokenizer.json files, but a folder with only vocab.json and merges.txt leaves it to the reader.
_QWEN_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(Protocol):
  """What the rest of the package asks of a tokenizer. An id of -1 means the vocabulary has none."""

  vocab_size: int  # largest id + 1
  special_ids: dict[str, int]  # text of each special token -> its id
  mask_id: int
  pad_id: int
  bos_id: int
  eos_id: int
  end_of_turn_id: int
  adds_bos: bool  # whether a prompt starts with bos

  def encode(self, text: str) -> list[int]:
    """Ids of `text`: no special token is added, none is recognised in the text."""

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """`encode` of each text, on all cores."""

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """The text; ids outside the vocabulary and broken UTF-8 read as U+FFFD."""

  def token_bytes(self) -> np.ndarray:
    """int32 [vocab_size]: UTF-8 bytes each token stands for; 0 for special tokens."""

  def fingerprint(self) -> str:
    """16 hex digits that name the contents of the tokenizer's file."""

  def save(self, directory) -> None:
    """Writes the tokenizer's file into `directory`, where `load_tokenizer` finds it."""


class SentencePieceTokenizer:
  """A SentencePiece model with byte fallback and no normalisation (see `train_sentencepiece`).

  Args:
    model: contents of a `tokenizer.model` file.
  Raises:
    ValueError: it is not such a model, or it does not keep code intact.
  """

  def __init__(self, model: bytes):
    self._model = model
    self._sp = sp = sentencepiece.SentencePieceProcessor()
    try:
      sp.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise ValueError("this is not a SentencePiece model") from error
    self.vocab_size = sp.vocab_size()
    self.special_ids = {
      sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i)
    }
    self.mask_id = self.special_ids.get("<mask>", -1)
    self.end_of_turn_id = self.special_ids.get("<|im_end|>", -1)
    self.pad_id, self.bos_id, self.eos_id = sp.pad_id(), sp.bos_id(), sp.eos_id()
    self.adds_bos = True
    self._special_text = {i: text for text, i in self.special_ids.items()}
    self._block = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    _check_probe(self)

  def __reduce__(self):
    # The C++ processor does not pickle; the model file does.
    return SentencePieceTokenizer, (self._model,)

  def encode(self, text):
    # SentencePiece writes a space as U+2581 and could not tell the two apart afterwards, so a
    # literal U+2581 goes in as its three UTF-8 bytes.
    first, *rest = self._sp.encode(text.split("\u2581"), num_threads=1)
    return first + [i for part in rest for i in self._block + part]

  def encode_batch(self, texts):
    encoded = self._sp.encode(list(texts))
    return [
      self.encode(text) if "\u2581" in text else ids
      for text, ids in zip(texts, encoded, strict=True)
    ]

  def decode(self, ids, skip_special=True):
    return _decode(ids, self._special_text, self.vocab_size, self._sp.decode, skip_special)

  def token_bytes(self):
    sizes = np.zeros(self.vocab_size, np.int32)
    for i in range(self.vocab_size):
      if self._sp.is_byte(i):
        sizes[i] = 1
      elif i not in self._special_text:
        sizes[i] = len(self._sp.id_to_piece(i).replace("\u2581", " ").encode())
    return sizes

  def fingerprint(self):
    return hashlib.sha256(self._model).hexdigest()[:16]

  def save(self, directory):
    _write(epath.Path(directory) / "tokenizer.model", self._model)


class HFTokenizer:
  """A byte-level BPE in Hugging Face's `tokenizer.json` format, such as Qwen2.5's.

  Qwen's file composes Unicode (NFC) before it encodes, as its models were trained: decomposed
  accents come back composed. Everything else comes back exactly.

  Args:
    file: contents of a `tokenizer.json` file.
  Raises:
    ValueError: it is not such a file, is not byte-level, or does not keep code intact.
  """

  def __init__(self, file: bytes):
    self._file = file
    try:
      self._hf = hf = tokenizers.Tokenizer.from_buffer(file)
    except Exception as error:  # the Rust library raises plain Exception
      raise ValueError(f"this is not a tokenizer.json of Hugging Face: {error}") from error
    if not _is_byte_level(file):
      raise ValueError("this tokenizer.json is not a byte-level BPE, the only kind read here")
    hf.no_truncation()
    hf.no_padding()
    known = hf.get_vocab()
    # Some files list the mask as an ordinary added token, which would be recognised in a text.
    names = ("<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|dlm_pad|>")
    hf.add_special_tokens(
      [
        tokenizers.AddedToken(name, special=True, normalized=False)
        for name in names
        if name in known
      ]
    )
    hf.encode_special_tokens = True  # reads "encode them as the text they are"
    added = hf.get_added_tokens_decoder()
    self.vocab_size = max(known.values()) + 1
    self.special_ids = {token.content: i for i, token in added.items() if token.special}
    self.mask_id = self.special_ids.get("<|mask|>", -1)
    # Qwen has no token that begins a text: in pre-training it saw documents with <|endoftext|>
    # between them and nothing else, so that one token both opens and closes a document here.
    self.bos_id = self.eos_id = self.special_ids.get("<|endoftext|>", -1)
    self.pad_id = self.special_ids.get("<|dlm_pad|>", self.eos_id)
    self.end_of_turn_id = self.special_ids.get("<|im_end|>", -1)
    self.adds_bos = False
    self._special_text = {i: text for text, i in self.special_ids.items()}
    self._added_text = {i: token.content for i, token in added.items()}
    _check_probe(self)

  def __reduce__(self):
    # Pickling the Rust object would forget `encode_special_tokens`.
    return HFTokenizer, (self._file,)

  def encode(self, text):
    return self._hf.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts):
    encoded = self._hf.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encoded]

  def decode(self, ids, skip_special=True):
    return _decode(ids, self._special_text, self.vocab_size, self._hf.decode, skip_special)

  def token_bytes(self):
    sizes = np.zeros(self.vocab_size, np.int32)
    for text, i in self._hf.get_vocab().items():
      # Byte-level BPE spells each byte as one character; added tokens are spelled plainly.
      sizes[i] = len(self._added_text[i].encode()) if i in self._added_text else len(text)
    sizes[list(self._special_text)] = 0
    return sizes

  def fingerprint(self):
    return hashlib.sha256(self._file).hexdigest()[:16]

  def save(self, directory):
    _write(epath.Path(directory) / "tokenizer.json", self._file)


def load_tokenizer(path) -> Tokenizer:
  """Reads a tokenizer.

  Args:
    path: a `tokenizer.model` (SentencePiece), a `tokenizer.json` (Hugging Face), or a folder that
      holds one of them, or Qwen2's `vocab.json` and `merges.txt` as DiffuCoder is published. A
      folder with both kinds (our exports are such) is read by its `tokenizer.json` if that is
      byte-level, otherwise by its `tokenizer.model`.
  Raises:
    FileNotFoundError: nothing there.
    ValueError: the file is not a tokenizer this package can use.
  """
  path = epath.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f"no tokenizer at {path}: give a tokenizer.model, a tokenizer.json, or "
      "a folder that holds one"
    )
  files = [path]
  if path.is_dir():
    files = [path / name for name in ("tokenizer.json", "tokenizer.model")]
    files = [file for file in files if file.exists()]
    if not files and (path / "vocab.json").exists() and (path / "merges.txt").exists():
      return HFTokenizer(qwen_tokenizer_json(path))
    if not files:
      raise FileNotFoundError(
        f"{path} holds no tokenizer.model, no tokenizer.json, and no vocab.json with merges.txt"
      )
  file = files[0]
  if file.suffix not in (".model", ".json"):
    raise ValueError(
      f"{file} is not a tokenizer: expected a name that ends in .model "
      "(SentencePiece) or .json (Hugging Face)"
    )
  try:
    if len(files) == 2 and not _is_byte_level(file.read_bytes()):
      file = files[1]
    return {".model": SentencePieceTokenizer, ".json": HFTokenizer}[file.suffix](file.read_bytes())
  except ValueError as error:
    raise ValueError(f"cannot use {file}: {error}") from error


def train_sentencepiece(texts: Iterable[str], path, vocab_size: int, seed: int = 0):
  """Trains a BPE vocabulary for code and writes it to `path`; the same inputs give the same file.

  Args:
    texts: documents of the training side of the corpus. At most 200 million characters are used.
    path: file to write, conventionally `<folder>/tokenizer.model`.
    vocab_size: number of tokens, with the 8 special ones and the 256 bytes.
    seed: which documents are used of a corpus beyond that limit; otherwise without effect.
  Returns:
    the `SentencePieceTokenizer`.
  Raises:
    ValueError: `path` does not end in .model, or the texts are too small for the vocabulary.
  """
  path = epath.Path(path)
  if path.suffix != ".model":
    raise ValueError(f"a SentencePiece file must end in .model, got {path}")
  texts = list(texts)
  if sum(map(len, texts)) > MAX_TRAINING_CHARACTERS:
    order = np.random.default_rng(seed).permutation(len(texts))
    ends = np.cumsum([len(texts[i]) for i in order])
    texts = [texts[i] for i in order[: max(1, int(np.sum(ends <= MAX_TRAINING_CHARACTERS)))]]
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_chunks(texts),
      model_writer=model,
      vocab_size=vocab_size,
      model_type="bpe",
      byte_fallback=True,
      # Everything below keeps code intact; the defaults fold spaces and rewrite characters.
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      split_digits=True,
      allow_whitespace_only_pieces=True,
      max_sentence_length=1 << 24,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      pad_piece="<pad>",
      bos_piece="<bos>",
      eos_piece="<eos>",
      unk_piece="<unk>",
      # Control symbols are never read out of a text; user-defined ones would be.
      control_symbols=list(SPECIAL_TOKENS[4:]),
      # A fixed number: it is written into the model file.
      num_threads=4,
      minloglevel=2,
    )
  except RuntimeError as error:
    size = sum(map(len, texts))
    raise ValueError(
      f"SentencePiece could not make {vocab_size} tokens out of {len(texts)} "
      f"documents ({size} characters): {str(error).strip()}. Give more text or "
      "another vocab_size (at least 264 + the number of characters)"
    ) from error
  _write(path, model.getvalue())
  return SentencePieceTokenizer(model.getvalue())


def _chunks(texts):
  """Runs of 64 lines, so that newlines and indents can merge with what is around them."""
  # The trainer skips a whole chunk that holds one of the characters it uses as marks.
  marks = str.maketrans({"\0": " ", "\u2581": " ", "\u2585": " "})
  for text in texts:
    lines = text.translate(marks).splitlines(keepends=True)
    for i in range(0, len(lines), LINES_PER_CHUNK):
      yield "".join(lines[i : i + LINES_PER_CHUNK])


def _decode(ids, special_text, vocab_size, decode_run, skip_special):
  """Decodes runs of ordinary ids with `decode_run`; spells, skips or replaces the others."""

  def kind(i):
    return "special" if i in special_text else "ordinary" if 0 <= i < vocab_size else "unknown"

  parts = []
  for which, run in itertools.groupby(map(int, ids), kind):
    if which == "ordinary":
      parts.append(decode_run(list(run)))
    elif which == "unknown":
      # A model's table may have more rows than the vocabulary: show it, do not hide it.
      parts.extend("\ufffd" for _ in run)
    elif not skip_special:
      parts.extend(special_text[i] for i in run)
  return "".join(parts)


def _is_byte_level(file):
  return '"ByteLevel"' in json.dumps(json.loads(file).get("decoder"))


def _check_probe(tokenizer):
  back = tokenizer.decode(tokenizer.encode(_PROBE))
  if back != _PROBE:
    raise ValueError(
      f"it does not keep code intact: {_PROBE!r} comes back as {back!r}. Train one "
      "with train_sentencepiece, or use a byte-level BPE such as Qwen2.5's"
    )


def qwen_tokenizer_json(folder):
  """Builds the bytes of a tokenizer.json from Qwen2's vocab.json, merges.txt and added tokens."""
  vocab = json.loads((folder / "vocab.json").read_text())
  lines = (folder / "merges.txt").read_text().split("\n")
  merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
  added = {}
  if (folder / "tokenizer_config.json").exists():
    config = json.loads((folder / "tokenizer_config.json").read_text())
    listed = config.get("added_tokens_decoder", {})
    added = {token["content"]: (int(i), token.get("special", False)) for i, token in listed.items()}
  if not added and (folder / "added_tokens.json").exists():
    listed = json.loads((folder / "added_tokens.json").read_text())
    added = {text: (i, text.startswith("<|")) for text, i in listed.items()}
  # In the vocabulary too, or the library would number the added tokens without gaps.
  vocab |= {text: i for text, (i, _) in added.items()}
  hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
  hf.normalizer = tokenizers.normalizers.NFC()
  hf.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN_SPLIT), "isolated", False),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  hf.decoder = tokenizers.decoders.ByteLevel()
  hf.add_tokens(
    [
      tokenizers.AddedToken(text, special=special, normalized=False)
      for text, (_, special) in sorted(added.items(), key=lambda item: item[1])
    ]
  )
  return hf.to_str().encode()


def _write(file, contents):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(contents)
