"""The `prepare` section of a config: what `prepare dataset` keeps, and how it stores it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
  """Values only; a config without the section, or without a key, has these defaults.

  The limits on lines and characters are StarCoder's (Li et al. 2023, section 3.1), counted in
  characters. 0 switches a limit off, and for `near_threshold` the search for near duplicates.
  """

  label: str = ""  # the `source` of every record; "": the name of data.source
  license_key: str = "license"  # of jsonl, parquet and tfds records that have it
  language_key: str = "language"
  read_limit: int = 20_000_000  # bytes; nothing larger is ever read whole
  min_bytes: int = 32  # UTF-8 bytes of a text
  max_bytes: int = 1_000_000
  max_line: int = 1000
  max_mean_line: float = 100.0
  min_alphanumeric: float = 0.25  # share of the characters
  near_threshold: float = 0.8  # estimated Jaccard similarity of word shingles
  shingle_words: int = 5
  chunk_bytes: int = 8_000_000  # of input, one piece of work; does not change the dataset
  shard_bytes: int = 256_000_000  # of records before compression


def make_settings(section) -> Settings:
  """Settings from a mapping.

  Raises:
    ValueError: an unknown key, a value of another type than the default's, or out of range.
  """
  defaults = dataclasses.asdict(Settings())
  for key, value in section.items():
    if key not in defaults:
      raise ValueError(f"unknown key prepare.{key}; known: {', '.join(defaults)}")
    kinds = (int, float) if isinstance(defaults[key], float) else (type(defaults[key]),)
    if not isinstance(value, kinds) or isinstance(value, bool):
      raise ValueError(f"prepare.{key} must be a {kinds[-1].__name__}, got {value!r}")
  settings = Settings(**section)
  for key, lowest in (("read_limit", 1), ("chunk_bytes", 1), ("shard_bytes", 1),
                      ("shingle_words", 1), ("min_bytes", 0), ("max_bytes", 0), ("max_line", 0),
                      ("max_mean_line", 0), ("min_alphanumeric", 0)):  # fmt: skip
    if getattr(settings, key) < lowest:
      raise ValueError(f"prepare.{key} must be at least {lowest}, got {getattr(settings, key)}")
  if settings.near_threshold and not 0.5 <= settings.near_threshold <= 1:
    raise ValueError(
      f"prepare.near_threshold must be 0 (off) or in [0.5, 1], got {settings.near_threshold}"
    )
  return settings
