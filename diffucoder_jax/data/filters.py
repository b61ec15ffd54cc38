"""Which documents are worth keeping: named reasons, each with the value that decided."""

import re

from diffucoder_jax.data import sources
from diffucoder_jax.data.settings import Settings

# Every reason a document can be dropped for, in the order in which they are looked at.
REASONS = {
  "unreadable": "the file system does not give its contents",
  "linked_folder": "a link to a folder; links are not followed",
  "too_large": "larger than prepare.read_limit; not read",
  "corrupt": "a container or a record that does not parse",
  "no_text": "a record without a text under data.text_key",
  "undecodable": "not text in UTF-8 or in the encoding that a Python file names",
  "binary": "holds NUL characters",
  "empty": "nothing but white space",
  "too_short": "fewer bytes than prepare.min_bytes",
  "too_long": "more bytes than prepare.max_bytes",
  "long_line": "a line longer than prepare.max_line",
  "long_mean_line": "lines longer on average than prepare.max_mean_line",
  "few_alphanumeric": "a smaller share of letters and digits than prepare.min_alphanumeric",
  "exact_duplicate": "equal to an earlier document but for white space at line ends",
  "near_duplicate": "at least prepare.near_threshold similar to an earlier document that is kept",
}

_NOT_ALPHANUMERIC = bytes(i for i in range(128) if not chr(i).isalnum())


def decode(name: str, contents: bytes | str):
  """(text, reason, detail): the text, or "" and why there is none."""
  try:
    return sources.decode(name, contents), "", ""
  except (UnicodeError, SyntaxError, LookupError) as error:
    return "", "undecodable", sources.why(contents, error)


def judge(text: str, settings: Settings):
  """(reason, detail) of the first filter that the text does not pass; ("", "") when all let it."""
  if "\0" in text:
    return "binary", f"NUL at character {text.index(chr(0))}"
  if not text.strip():
    return "empty", f"{len(text)} characters of white space"
  data = text.encode()
  size, lines = len(data), text.split("\n")
  if size < settings.min_bytes:
    return "too_short", f"{size} bytes < {settings.min_bytes}"
  if settings.max_bytes and size > settings.max_bytes:
    return "too_long", f"{size} bytes > {settings.max_bytes}"
  longest = max(map(len, lines))
  if settings.max_line and longest > settings.max_line:
    return "long_line", f"{longest} characters > {settings.max_line}"
  mean = sum(map(len, lines)) / len(lines)
  if settings.max_mean_line and mean > settings.max_mean_line:
    return "long_mean_line", f"{mean:.1f} characters > {settings.max_mean_line:g}"
  if data.isascii():
    alphanumeric = len(data.translate(None, _NOT_ALPHANUMERIC))
  else:
    alphanumeric = sum(map(str.isalnum, text))
  if alphanumeric < settings.min_alphanumeric * len(text):
    return "few_alphanumeric", f"{alphanumeric / len(text):.3f} < {settings.min_alphanumeric:g}"
  return "", ""


# --- What is known about a document beside its text.

_LANGUAGES = {
  "python": "py pyi pyw", "c": "c h", "c++": "cc cpp cxx hh hpp hxx", "java": "java",
  "javascript": "js mjs cjs jsx", "typescript": "ts tsx", "go": "go", "rust": "rs", "ruby": "rb",
  "php": "php", "c#": "cs", "swift": "swift", "kotlin": "kt kts", "scala": "scala", "julia": "jl",
  "r": "r", "shell": "sh bash", "sql": "sql", "haskell": "hs", "lua": "lua", "perl": "pl pm",
  "cuda": "cu cuh", "markdown": "md", "restructuredtext": "rst", "text": "txt", "html": "html htm",
  "css": "css", "json": "json", "yaml": "yaml yml", "toml": "toml", "jupyter": "ipynb",
}  # fmt: skip
_BY_EXTENSION = {e: name for name, extensions in _LANGUAGES.items() for e in extensions.split()}


def language_of(name: str) -> str:
  """The language that a file's extension stands for, "" when unknown."""
  return _BY_EXTENSION.get(name.rsplit(".", 1)[-1].lower(), "") if "." in name else ""


_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+\-]+)")
# (licence, phrases that its text has, in lower case with single spaces); the first that fits.
_LICENSES = (
  ("Apache-2.0", ("apache license", "version 2.0")),
  ("AGPL-3.0", ("gnu affero general public license", "version 3")),
  ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
  ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
  ("GPL-3.0", ("gnu general public license", "version 3")),
  ("GPL-2.0", ("gnu general public license", "version 2")),
  ("MPL-2.0", ("mozilla public license", "2.0")),
  ("PSF-2.0", ("python software foundation license",)),
  ("BSD-3-Clause", ("redistribution and use in source and binary forms", "neither the name")),
  ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
  ("MIT", ("permission is hereby granted, free of charge", "the software is provided")),
  ("ISC", ("permission to use, copy, modify, and/or distribute this software",)),
  ("Unlicense", ("this is free and unencumbered software",)),
  ("CC0-1.0", ("cc0 1.0 universal",)),
)


def license_of(text: str) -> str:
  """SPDX name of a licence's text, "" when it is none of the common ones."""
  words = " ".join(text.lower().split())
  return next((name for name, has in _LICENSES if all(phrase in words for phrase in has)), "")


def declared_license(text: str) -> str:
  """What the head of a source file declares by SPDX-License-Identifier, or ""."""
  found = _SPDX.search(text, 0, 2000)
  return found.group(1) if found else ""
