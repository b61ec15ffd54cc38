import dataclasses

import pytest

from diffucoder_jax.data import filters
from diffucoder_jax.data.settings import Settings, make_settings

GOOD = "def f(x):\n  return x + 1\n" * 5


@pytest.mark.parametrize(
  "text, changes, reason, detail",
  [
    (GOOD, {}, "", ""),
    ("a\0b" + GOOD, {}, "binary", "NUL at character 1"),
    ("", {}, "empty", "0 characters"),
    (" \n\t\n", {}, "empty", "4 characters"),
    ("é" * 15, {}, "too_short", "30 bytes < 32"),
    ("é" * 16, {}, "", ""),
    (GOOD, {"max_bytes": len(GOOD)}, "", ""),
    (GOOD + "é", {"max_bytes": len(GOOD) + 1}, "too_long", f"{len(GOOD) + 2} bytes >"),
    (GOOD + "x" * 100, {"max_line": 100}, "", ""),
    (GOOD + "x" * 101, {"max_line": 100}, "long_line", "101 characters > 100"),
    ("x" * 40 + "\n" + "x" * 20, {"max_mean_line": 30.0}, "", ""),
    ("x" * 41 + "\n" + "x" * 20, {"max_mean_line": 30.0}, "long_mean_line", "30.5 characters > 30"),
    ("abc" + "-" * 37, {"min_alphanumeric": 0.075}, "", ""),
    ("abc" + "-" * 38, {"min_alphanumeric": 0.075}, "few_alphanumeric", "0.073 < 0.075"),
    # Letters of all scripts count, and as characters.
    ("日本語" + "-" * 37, {"min_alphanumeric": 0.075}, "", ""),
    ("日本語" + "-" * 38, {"min_alphanumeric": 0.075}, "few_alphanumeric", "0.073 <"),
  ],
)
def test_filters(text, changes, reason, detail):
  got = filters.judge(text, make_settings(changes))
  assert got[0] == reason and got[1].startswith(detail), got
  assert not reason or reason in filters.REASONS


def test_limits_of_zero_are_off():
  off = make_settings(
    {"min_bytes": 0, "max_bytes": 0, "max_line": 0, "max_mean_line": 0.0, "min_alphanumeric": 0.0}
  )
  for text in ("-", "x" * 2_000_000, "=" * 5000):
    assert filters.judge(text, off) == ("", "")


def test_decoding():
  latin = "# coding: latin-1\né".encode("latin-1")
  assert filters.decode("a.py", latin) == ("# coding: latin-1\né", "", "")
  assert filters.decode("a.txt", latin)[1:] == (
    "undecodable", "unexpected end of data at byte 18")  # fmt: skip
  assert filters.decode("a.txt", "é".encode()[:1])[1] == "undecodable"
  assert filters.decode("a", "\udc80")[1] == "undecodable"


@pytest.mark.parametrize(
  "section, message",
  [
    ({"min_byte": 1}, "unknown key prepare.min_byte; known: label, "),
    ({"max_line": 1.5}, "prepare.max_line must be a int, got 1.5"),
    ({"label": 1}, "prepare.label must be a str"),
    ({"min_bytes": True}, "prepare.min_bytes must be a int, got True"),
    ({"chunk_bytes": 0}, "prepare.chunk_bytes must be at least 1, got 0"),
    ({"min_alphanumeric": -0.5}, "prepare.min_alphanumeric must be at least 0"),
    ({"near_threshold": 0.2}, r"near_threshold must be 0 \(off\) or in \[0.5, 1\], got 0.2"),
    ({"near_threshold": 1.5}, "near_threshold"),
  ],
)
def test_settings_are_checked_by_name(section, message):
  with pytest.raises(ValueError, match=message):
    make_settings(section)


def test_settings_defaults_are_the_example_config_s():
  from configs import prepare_stdlib

  assert dataclasses.asdict(Settings()) == dict(prepare_stdlib.get_config().prepare)


def test_languages_and_licenses():
  assert [filters.language_of(n) for n in ("a/b.py", "A.CPP", "x.tar.rs", "Makefile", "a.zzz")] == [
    "python", "c++", "rust", "", ""]  # fmt: skip
  mit = (
    "MIT License\n\nPermission is hereby\n granted, free of charge, ... THE SOFTWARE IS PROVIDED"
  )
  apache = "        Apache License\n      Version 2.0, January 2004"
  bsd = "Redistribution and use in source and binary forms, with or without"
  assert filters.license_of(mit) == "MIT" and filters.license_of(apache) == "Apache-2.0"
  assert filters.license_of(bsd) == "BSD-2-Clause"
  assert filters.license_of(bsd + " Neither the name of") == "BSD-3-Clause"
  assert filters.license_of("all rights reserved") == ""
  assert filters.declared_license("# SPDX-License-Identifier: GPL-2.0-only\nx") == "GPL-2.0-only"
  assert filters.declared_license("x" * 3000 + "SPDX-License-Identifier: MIT") == ""
