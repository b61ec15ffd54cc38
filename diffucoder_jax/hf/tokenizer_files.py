"""Tokenizer files of an exported Hugging Face folder, which `AutoTokenizer` opens without our code.

No remote code is needed: every folder gets a `tokenizer.json` for the plain fast tokenizer class of
transformers, with the same ids as ours.
"""

import json

import sentencepiece
import tokenizers
from absl import logging
from etils import epath

from diffucoder_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer, qwen_tokenizer_json

JSON, CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
FILES = (
  JSON,
  CONFIG,
  SENTENCEPIECE,
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "chat_template.json",
)
FAST_CLASS = "PreTrainedTokenizerFast"
# Dream's and DiffuCoder's additions to Qwen2.5, in the order of their ids (151665 and on).
DIFFUSION_TOKENS = ("<|beginoftext|>", "<|mask|>", "<|dlm_pad|>")
# Which special token plays which part: the first that the vocabulary has.
ROLES = {
  "bos_token": ("<bos>", "<|beginoftext|>"),
  "eos_token": ("<eos>", "<|endoftext|>"),
  "pad_token": ("<pad>", "<|dlm_pad|>", "<|endoftext|>"),
  "mask_token": ("<mask>", "<|mask|>"),
  "unk_token": ("<unk>",),
}
OTHER_SPECIALS = ("<|im_start|>", "<|im_end|>", "<|dlm_pad|>")
CHATML = (
  "{% for message in messages %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_LIMIT = int(1e30)  # what transformers itself writes for "any length"


def write(source, target) -> list[str]:
  """Writes into `target` the tokenizer of `source`, as files that need no remote code.

  A tokenizer.json is copied byte for byte with the files that belong to it; without one it is made
  of tokenizer.model (ours) or of vocab.json and merges.txt (how DiffuCoder is published). A
  tokenizer_config.json is copied, made where there is none, and changed only where it names Python
  code that does not travel with the folder.

  Args:
    source: folder with a tokenizer: a workdir of ours or a Hugging Face folder; may be gs://.
    target: existing folder; may be gs:// too.
  Returns:
    names of the files written; empty if `source` holds no tokenizer.
  Raises:
    ValueError: a file cannot be read as what its name says, or ids would change on the way.
  """
  source, target = epath.Path(source), epath.Path(target)
  files = {name: (source / name).read_bytes() for name in FILES if (source / name).exists()}
  if JSON not in files and SENTENCEPIECE in files:
    files[JSON] = sentencepiece_as_json(files[SENTENCEPIECE])
  elif JSON not in files and {"vocab.json", "merges.txt"} <= set(files):
    files[JSON] = qwen_tokenizer_json(source)
  if JSON not in files:
    return []
  if CONFIG not in files:
    files[CONFIG] = _dump(default_config(files[JSON], _length_limit(source)))
  else:
    config = _load(files[CONFIG], source / CONFIG)
    if "auto_map" in config or config.get("tokenizer_class") == "DreamTokenizer":
      logging.info("%s: %s instead of its remote code", source / CONFIG, FAST_CLASS)
      files[CONFIG] = _dump(without_remote_code(config))
  for name, contents in files.items():
    (target / name).write_bytes(contents)
  return list(files)


def sentencepiece_as_json(model: bytes) -> bytes:
  """The same BPE as a tokenizer.json of the `tokenizers` library, 0.20 or newer.

  SentencePiece merges the pair whose union is the best piece, leftmost first; `tokenizers` ranks
  the pairs themselves. So every way to cut a piece in two becomes a merge, and pieces keep their
  order. What is left is the order among several cuts of one piece, where SentencePiece knows only
  "leftmost". It would show where two cuts of one piece overlap in a text, which needs the same
  characters to have been merged in two ways before. No such text was found, for trained
  vocabularies nor for random ones; every piece of this one is compared before it is returned.

  Args:
    model: contents of a tokenizer.model file.
  Returns:
    contents of a tokenizer.json. It adds <bos> to a text, as our prompts have it; with
    `add_special_tokens=False` the ids are those of `SentencePieceTokenizer.encode`.
  Raises:
    ValueError: not a model this package uses, or (a unigram model) not one of merges.
  """
  ours = SentencePieceTokenizer(model)
  sp = sentencepiece.SentencePieceProcessor()
  sp.LoadFromSerializedProto(model)
  vocab, pieces = {}, []
  for i in range(sp.vocab_size()):
    text = sp.id_to_piece(i)
    if not (sp.is_byte(i) or i in ours.special_ids.values() or sp.is_unused(i)):
      # A space is spelled as itself: a literal U+2581 is then in no piece and falls back to its
      # bytes, as in our `encode`, and nothing needs to be normalised.
      text = text.replace("\u2581", " ")
      pieces.append((-sp.get_score(i), i, text))
    vocab[text] = i
  mergeable = {text for _, _, text in pieces}
  merges = [
    [text[:cut], text[cut:]]
    for _, _, text in sorted(pieces)
    for cut in range(1, len(text))
    if text[:cut] in mergeable and text[cut:] in mergeable
  ]
  specials = sorted(ours.special_ids.items(), key=lambda item: item[1])
  contents = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [_added_token(text, i) for text, i in specials],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": _prepend(sp.id_to_piece(ours.bos_id), ours.bos_id),
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": True,
      "ignore_merges": False,
      "vocab": vocab,
      "merges": merges,
    },
  }
  file = json.dumps(contents, ensure_ascii=False, indent=2).encode()
  _check_same(ours, file, [text for _, _, text in pieces])
  return file


def default_config(file: bytes, model_max_length: int) -> dict:
  """The tokenizer_config.json for a tokenizer.json that came without one."""
  contents = _load(file, JSON)
  added = {token["content"] for token in contents.get("added_tokens", [])}
  # As HFTokenizer: these are special even where the file lists them as ordinary words.
  added |= {text for text in contents["model"].get("vocab", ()) if text.startswith("<|")}
  roles = {
    role: next(name for name in names if name in added)
    for role, names in ROLES.items()
    if added & set(names)
  }
  others = [name for name in OTHER_SPECIALS if name in added - set(roles.values())]
  chat = {}
  if {"<|im_start|>", "<|im_end|>"} <= added:
    adds_bos = "bos_token" in roles and f'"{roles["bos_token"]}"' in json.dumps(
      contents.get("post_processor")
    )
    # A template spells all special tokens: transformers adds none to its text.
    chat = {"chat_template": "{{ bos_token }}" * adds_bos + CHATML}
  return {
    "tokenizer_class": FAST_CLASS,
    **roles,
    "additional_special_tokens": others,
    **chat,
    "clean_up_tokenization_spaces": False,
    "model_max_length": model_max_length,
    "padding_side": "left",
  }


def without_remote_code(config: dict) -> dict:
  """A tokenizer_config.json for the fast class of transformers; its other keys stay as they are."""
  rest = {key: value for key, value in config.items() if key != "auto_map"}
  return rest | {"tokenizer_class": FAST_CLASS}


def with_diffusion_tokens(file: bytes, reuse=()) -> tuple[bytes, dict[str, int]]:
  """Adds <|beginoftext|>, <|mask|> and <|dlm_pad|> to a tokenizer.json that lacks them.

  Args:
    file: contents of a tokenizer.json, such as Qwen2.5's.
    reuse: three special tokens of the file that become these, in this order; () adds new ones.
  Returns:
    (contents, ids): the file, in which nothing else is changed, and the ids of the three. A token
    that was there keeps its id, others get the next free ones: 151665 and on for Qwen2.5.
  Raises:
    ValueError: it is not a tokenizer.json of a BPE, or `reuse` names no special tokens of it.
  """
  contents = _load(file, JSON)
  if reuse:
    return _renamed(contents, dict(zip(reuse, DIFFUSION_TOKENS, strict=True)))
  added, vocab = contents.setdefault("added_tokens", []), contents["model"]["vocab"]
  if not isinstance(vocab, dict):
    raise ValueError(
      f"tokens are added to a BPE only; this {JSON} is a {contents['model']['type']}"
    )
  there = {token["content"]: token["id"] for token in added}
  known = vocab | there
  new = [name for name in DIFFUSION_TOKENS if name not in there]
  for name in new:
    known.setdefault(name, max(known.values()) + 1)
  ids = {name: known[name] for name in DIFFUSION_TOKENS}
  if not new:
    return file, ids
  added.extend(_added_token(name, ids[name]) for name in new)
  added.sort(key=lambda token: token["id"])
  # The library numbers added tokens by how many there are; where ids have gaps, only the vocabulary
  # itself can say otherwise.
  out = _dump_like(file, contents)
  hf = tokenizers.Tokenizer.from_buffer(out)
  if any(hf.token_to_id(name) != i for name, i in ids.items()):
    vocab |= {name: ids[name] for name in new}
    out = _dump_like(file, contents)
  return out, ids


def config_with_diffusion_tokens(config: dict, ids: dict[str, int]) -> dict:
  """The tokenizer_config.json that goes with `with_diffusion_tokens`.

  Args:
    config: the dict of the file; not changed.
    ids: the ids that `with_diffusion_tokens` returned.
  Returns:
    a dict whose `added_tokens_decoder`, if it has one, lists the three tokens, and whose
    `mask_token` is <|mask|> if it had none.
  """
  config = config | {"mask_token": config.get("mask_token") or "<|mask|>"}
  if "added_tokens_decoder" in config:
    listed = {str(i): _added_token(name) for name, i in ids.items()}
    # What was there stays as it was, but for tokens that got another name.
    old = config["added_tokens_decoder"]
    listed |= {i: t for i, t in old.items() if t["content"] == listed.get(i, t)["content"]}
    config["added_tokens_decoder"] = dict(sorted(listed.items(), key=lambda item: int(item[0])))
  return config


def add_diffusion_tokens(folder, reuse=()) -> dict[str, int]:
  """`with_diffusion_tokens` for the files of a folder, in place. Returns {token: id}."""
  file, config = epath.Path(folder) / JSON, epath.Path(folder) / CONFIG
  if not file.exists():
    raise FileNotFoundError(f"no {JSON} to add tokens to; give a source with a Qwen tokenizer")
  contents, ids = with_diffusion_tokens(file.read_bytes(), reuse)
  file.write_bytes(contents)
  if config.exists():
    described = config_with_diffusion_tokens(_load(config.read_bytes(), config), ids)
    config.write_bytes(_dump(described))
  return ids


def check_ids(folder_config: dict, tokenizer: Tokenizer) -> None:
  """Checks that config.json and the tokenizer beside it mean the same special tokens.

  They may name different ones (Dream pads with <|endoftext|> where DiffuCoder's tokenizer pads with
  <|dlm_pad|>; either <|endoftext|> or <|im_end|> ends), but each must be a special token, and the
  mask must be the tokenizer's own if it has one.

  Args:
    folder_config: the dict of a config.json; absent ids and None are not checked.
    tokenizer: the tokenizer that is exported with it.
  Raises:
    ValueError: names the key, both values and the remedy.
  """
  vocab_size = folder_config.get("vocab_size")
  if vocab_size is not None and tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size of config.json is "
      f"{vocab_size}: export the tokenizer that these weights were trained with"
    )
  special_ids = set(tokenizer.special_ids.values())
  for name in ("mask", "pad", "eos", "bos"):
    key = f"{name}_token_id"
    value = folder_config.get(key)
    for i in value if isinstance(value, list | tuple) else [value]:
      if i is None or i == -1:  # both are ways to say that there is none
        continue
      if not isinstance(i, int) or i < 0:
        raise ValueError(f"{key} of config.json must be a token id, got {i!r}: correct it")
      if vocab_size is not None and i >= vocab_size:
        raise ValueError(
          f"{key} {i} of config.json is outside its vocab_size {vocab_size}: "
          f"{_remedy(tokenizer, name)}"
        )
      if name == "mask" and tokenizer.mask_id >= 0 and i != tokenizer.mask_id:
        raise ValueError(
          f"{key} of config.json is {i}, the tokenizer's mask is {tokenizer.mask_id}: "
          f"{_remedy(tokenizer, name)}, or export the tokenizer that these weights were trained with"
        )
      # A network may be trained with a row of its table as the mask that the tokenizer never makes.
      if i not in special_ids and not (name == "mask" and i >= tokenizer.vocab_size):
        what = repr(tokenizer.decode([i])) if i < tokenizer.vocab_size else "no token"
        raise ValueError(
          f"{key} of config.json is {i}, which is {what} in the tokenizer and none of its special "
          f"tokens ({', '.join(f'{t} {k}' for t, k in list(tokenizer.special_ids.items())[:40])}): "
          f"{_remedy(tokenizer, name)}"
        )


def _remedy(tokenizer, name):
  i = getattr(tokenizer, f"{name}_id")
  return f"set {name}_token_id to {i}" if i >= 0 else f"remove {name}_token_id"


def _renamed(contents, names):
  """`contents` with special tokens under other names, and the ids of these."""
  special = {token["content"]: token for token in contents["added_tokens"] if token["special"]}
  missing = [name for name in names if name not in special]
  if missing or set(names.values()) & special.keys():
    wrong = f"has no special token {missing[0]!r}" if missing else "has such tokens already"
    raise ValueError(f"--reuse: this {JSON} {wrong}; its special tokens are {' '.join(special)}")
  vocab = contents["model"]["vocab"]
  for old, new in names.items():
    special[old]["content"] = new
    if old in vocab:
      vocab[new] = vocab.pop(old)
  return _dump(contents), {new: special[old]["id"] for old, new in names.items()}


def _added_token(text, i=None):
  flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
  return ({} if i is None else {"id": i}) | {"content": text} | flags


def _prepend(text, i):
  """A post processor that puts one special token before each text."""
  special = {"SpecialToken": {"id": text, "type_id": 0}}
  first, second = ({"Sequence": {"id": part, "type_id": k}} for k, part in enumerate("AB"))
  return {
    "type": "TemplateProcessing",
    "single": [special, first],
    "pair": [special, first, second],
    "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]}},
  }


def _check_same(ours, file, pieces):
  """Every piece, alone and among the others, has the same ids in both libraries."""
  hf = tokenizers.Tokenizer.from_buffer(file)
  hf.encode_special_tokens = True  # reads "encode them as the text they are"
  texts = [*pieces, "".join(pieces), "".join(reversed(pieces)), "\u2581 \0\r\n\U0001f600"]
  for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
    theirs = hf.encode(text, add_special_tokens=False).ids
    if ids != theirs:
      raise ValueError(
        f"this SentencePiece model cannot be written as a tokenizer.json: {text[:40]!r} is "
        f"{ids[:8]} here and {theirs[:8]} there. Only models of merges (model_type bpe) without "
        "symbols of the user's are; use one made by train_sentencepiece"
      )


def _length_limit(folder):
  file = folder / "config.json"
  config = _load(file.read_bytes(), file) if file.exists() else {}
  return config.get("max_position_embeddings") or NO_LIMIT


def _load(contents, name):
  try:
    return json.loads(contents)
  except ValueError as error:
    raise ValueError(f"{name} is not JSON ({error}): fetch it again") from error


def _dump(contents):
  return (json.dumps(contents, ensure_ascii=False, indent=2) + "\n").encode()


def _dump_like(file, contents):
  """Writes JSON spaced as `file` is: one line, or indented by two, as the library does both."""
  style = dict(indent=2) if file.lstrip()[1:2].isspace() else dict(separators=(",", ":"))
  return json.dumps(contents, ensure_ascii=False, **style).encode()
