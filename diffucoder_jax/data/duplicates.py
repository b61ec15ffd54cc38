"""Equal and nearly equal documents: what to compare, computed per document, and who is whose copy.

Near duplicates are found by MinHash (signatures by the rensa library) and locality-sensitive
hashing. A signature depends on the words of a text alone, not on the tokenizer.
"""

import hashlib
import re
import zlib

import numpy as np

HASHES = 128  # standard deviation of an estimated similarity of 0.8: 0.03
_RECALL = 0.99  # of pairs that are exactly as similar as the threshold
# Shorter texts share their few words by chance; only exact copies of them are found.
_FEWEST_WORDS = 10
_WORD = re.compile(rb"[\w\x80-\xff]+")
_BLOCK = 4096  # signatures compared at once: bounds the memory of one large group
_ODD = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
  """The text that is compared: all line ends are newlines, none follows white space.

  Blank lines at the beginning and the end go too. Indents and everything else stay.
  """
  lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
  return "\n".join(line.rstrip() for line in lines).strip("\n")


def exact_key(text: str) -> np.ndarray:
  """uint64 [2]: the first 128 bits of the SHA-256 of the normalised text."""
  return np.frombuffer(hashlib.sha256(normalised(text).encode()).digest()[:16], np.uint64)


def signature(text: str, shingle_words: int) -> np.ndarray | None:
  """uint32 [HASHES]: the MinHash of the shingles; None when there are too few words to tell.

  A shingle is `shingle_words` words in a row, a word a run of letters, digits and underscores.
  """
  words = _WORD.findall(normalised(text).encode())
  if len(words) < max(_FEWEST_WORDS, shingle_words):
    return None
  crc_W = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
  count = len(words) - shingle_words + 1
  shingle_S = np.zeros(count, np.uint64)
  for i in range(shingle_words):
    shingle_S = _mixed(shingle_S + crc_W[i : i + count] + _ODD)
  matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(shingle_S, [0, count], HASHES, 1)
  return np.asarray(matrix.to_rows()[0], np.uint32)


def _rensa():
  try:
    import rensa
  except ImportError as error:
    raise ImportError(
      "the search for near duplicates needs rensa: pip install -e '.[prepare]' "
      "(or switch it off with --config.prepare.near_threshold=0.0)"
    ) from error
  return rensa


def version() -> str:
  """Names the algorithm of the signatures; another one may find other duplicates."""
  return f"rensa RMinHash {_rensa().RMinHash.ALGORITHM_VERSION}"


def rows_per_band(threshold: float) -> int:
  """The most rows of a band with which a pair at the threshold meets in a band 99 times in 100."""
  fits = [r for r in range(1, HASHES + 1) if _recall(threshold, r) >= _RECALL]
  return max(fits)


def _recall(similarity, rows):
  return 1 - (1 - similarity**rows) ** (HASHES // rows)


def band_keys(signatures_DH, threshold: float):
  """uint64 [bands, D]: documents that are equal in a band of their signatures share its key."""
  rows = rows_per_band(threshold)
  keys = np.zeros((HASHES // rows, len(signatures_DH)), np.uint64)
  for band, keys_D in enumerate(keys):
    for column in range(band * rows, (band + 1) * rows):
      keys_D[:] = _mixed(keys_D + signatures_DH[:, column].astype(np.uint64) + _ODD)
  return keys


def _mixed(x):
  """The finaliser of SplitMix64, a bijection."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def find_exact(keys_D2):
  """int64 [D]: for each document the first one that has the same key, -1 for that one itself.

  Args:
    keys_D2: uint64 [D, 2] of `exact_key`, in the order of the documents.
  """
  keeper_D = np.full(len(keys_D2), -1, np.int64)
  order_D = np.lexsort((keys_D2[:, 0], keys_D2[:, 1]))  # stable: equal keys keep their order
  for group in _runs(order_D, np.all(keys_D2[order_D[1:]] == keys_D2[order_D[:-1]], axis=1)):
    keeper_D[group[1:]] = group[0]
  return keeper_D


def find_near(bands, signatures, candidates, threshold: float):
  """Who is dropped as a near duplicate of whom.

  Documents that meet in a band and are similar enough form clusters. In a cluster, in the order of
  the documents, each is kept unless it is similar enough to one kept before: every dropped document
  has been compared with the kept one that is named for it.

  Args:
    bands: iterable of uint64 [D] arrays, the keys of one band each.
    signatures: uint32 [D, HASHES], also a memory map.
    candidates: int64, ascending: the documents to look at.
    threshold: estimated Jaccard similarity.
  Returns:
    (keeper int64 [D], -1 where none; similarity float32 [D] to the keeper, 0 where none).
  """
  count = len(signatures)
  parent = np.arange(count)
  for keys_D in bands:
    keys = keys_D[candidates]
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    for group in _runs(candidates[order], same):
      if len({_root(parent, i) for i in group}) == 1:
        continue
      for leader, members, _ in _leaders(group, signatures, threshold):
        for member in members:
          low, high = sorted((_root(parent, leader), _root(parent, member)))
          parent[high] = low
  keeper_D, similarity_D = np.full(count, -1, np.int64), np.zeros(count, np.float32)
  roots = np.fromiter((_root(parent, i) for i in candidates), np.int64, len(candidates))
  order = np.argsort(roots, kind="stable")
  for cluster in _runs(candidates[order], roots[order[1:]] == roots[order[:-1]]):
    for leader, members, similarity in _leaders(cluster, signatures, threshold):
      keeper_D[members], similarity_D[members] = leader, similarity
  return keeper_D, similarity_D


def _runs(values, same_as_before):
  """Yields the stretches of `values` of two and more in which each is the same as the one before."""
  ends = np.flatnonzero(~np.append(same_as_before, False)) + 1
  starts = np.concatenate([[0], ends[:-1]])
  for run in np.flatnonzero(ends - starts > 1):
    yield values[starts[run] : ends[run]]


def _leaders(members, signatures, threshold):
  """Yields (leader, members like it, their similarities); no leader is like one before it."""
  rest = members
  while len(rest) > 1:
    leader, rest = rest[0], rest[1:]
    first = signatures[leader]
    similarity = np.concatenate(
      [
        np.mean(signatures[rest[i : i + _BLOCK]] == first, axis=1)
        for i in range(0, len(rest), _BLOCK)
      ]
    )
    alike = similarity >= threshold
    if alike.any():
      yield leader, rest[alike], similarity[alike]
    rest = rest[~alike]


def _root(parent, i):
  while parent[i] != i:
    parent[i] = parent[parent[i]]
    i = parent[i]
  return int(i)
