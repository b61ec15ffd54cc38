import random

import numpy as np
import pytest

from diffucoder_jax.data import duplicates

pytest.importorskip("rensa")
THRESHOLD = 0.8


def words(seed, count=400):
  """A text of words that no other seed has."""
  return [f"w{seed}_{i}" for i in range(count)]


def changed(text, count, seed):
  """The words with `count` of them replaced, spread evenly: each ends 5 shingles."""
  out = list(text)
  step = len(text) // count
  for i in range(count):
    out[i * step + step // 2] = f"new{seed}_{i}"
  return out


def jaccard(a, b, n=5):
  a, b = ({tuple(x[i : i + n]) for i in range(len(x) - n + 1)} for x in (a, b))
  return len(a & b) / len(a | b)


def near(texts, threshold=THRESHOLD):
  signatures = np.stack([duplicates.signature(" ".join(text), 5) for text in texts])
  bands = duplicates.band_keys(signatures, threshold)
  return duplicates.find_near(bands, signatures, np.arange(len(texts)), threshold)


def test_normalised():
  same = ["a\n  b\n\nc\n", "a  \r\n  b\t\r\n\r\nc", "\n\na\r  b\r\rc\n\n\n"]
  assert {duplicates.normalised(text) for text in same} == {"a\n  b\n\nc"}
  assert len({duplicates.exact_key(text).tobytes() for text in same}) == 1
  for other in ("a\n b\n\nc", "a\n  b\nc", "A\n  b\n\nc", "  a\n  b\n\nc"):
    assert (duplicates.exact_key(other) != duplicates.exact_key(same[0])).any()


def test_exact_keeps_the_first():
  keys = np.stack([duplicates.exact_key(text) for text in "c a b a c a d".split()])
  assert duplicates.find_exact(keys).tolist() == [-1, -1, -1, 1, 0, 1, -1]
  assert duplicates.find_exact(keys[:0]).tolist() == []


def test_estimates_are_of_the_jaccard_similarity():
  for count in (2, 6, 12, 24):
    errors = []
    for seed in range(20):
      a = words(seed)
      b = changed(a, count, seed)
      signatures = [duplicates.signature(" ".join(text), 5) for text in (a, b)]
      errors.append(np.mean(signatures[0] == signatures[1]) - jaccard(a, b))
    # 20 estimates with a standard deviation of at most 0.044 each.
    assert abs(np.mean(errors)) < 4 * 0.044 / 20**0.5
    assert np.std(errors) < 0.08


def test_near_copies_are_dropped_and_near_misses_kept():
  texts, copies, misses = [], {}, set()
  order = random.Random(0)
  for seed in range(40):
    first = len(texts)
    texts.append(words(seed))
    copies[len(texts)] = first
    texts.append(changed(words(seed), 4, seed))
    misses.add(len(texts))
    texts.append(changed(words(seed), 16, seed))
    assert jaccard(texts[-2], texts[first]) > 0.9 and 0.6 < jaccard(texts[-1], texts[first]) < 0.7
  keeper, similarity = near(texts)
  assert {i: k for i, k in enumerate(keeper) if k >= 0} == copies
  assert all(similarity[i] >= THRESHOLD for i in copies) and not similarity[list(misses)].any()
  # The first in the order of the documents is the one that is kept, whatever that order.
  shuffled = order.sample(range(len(texts)), len(texts))
  keeper, _ = near([texts[i] for i in shuffled])
  for place, k in enumerate(keeper):
    i = shuffled[place]
    if i in misses:
      assert k == -1
      continue
    other = copies.get(i, i + 1)
    assert k == (shuffled.index(other) if shuffled.index(other) < place else -1), i


def test_a_chain_does_not_drop_what_differs_from_the_kept():
  a = words(0)
  b = changed(a, 6, "b")
  c = [y if y != x else z for x, y, z in zip(a, b, changed(a, 7, "c"), strict=True)]
  assert jaccard(a, b) > 0.85 and jaccard(b, c) > 0.82 and jaccard(a, c) < 0.75
  keeper, _ = near([a, b, c])
  assert keeper.tolist() == [-1, 0, -1]
  keeper, _ = near([b, a, c])
  assert keeper.tolist() == [-1, 0, 0]


def test_every_dropped_one_is_like_its_keeper():
  """Many overlapping clusters: the named keeper is kept, comes before, and is similar enough."""
  order = random.Random(1)
  texts = [words(0)]
  for i in range(300):
    texts.append(changed(order.choice(texts), order.choice((2, 5, 9)), i))
  keeper, similarity = near(texts)
  dropped = np.flatnonzero(keeper >= 0)
  assert 20 < len(dropped) < 290
  signatures = np.stack([duplicates.signature(" ".join(text), 5) for text in texts])
  for i in dropped:
    assert keeper[keeper[i]] == -1 and keeper[i] < i
    assert similarity[i] == pytest.approx(np.mean(signatures[i] == signatures[keeper[i]]))
    assert similarity[i] >= THRESHOLD
  # What is kept has no kept one before it that is as similar, but for what no band shows.
  kept = np.flatnonzero(keeper < 0)
  pairs = [(i, j) for n, j in enumerate(kept) for i in kept[:n]]
  missed = [(i, j) for i, j in pairs if np.mean(signatures[i] == signatures[j]) >= THRESHOLD]
  assert len(missed) <= 0.02 * len(dropped), missed


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.75, 0.8, 0.85, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
  rows = duplicates.rows_per_band(threshold)
  bands = duplicates.HASHES // rows
  assert 1 - (1 - threshold**rows) ** bands >= 0.99
  generator = np.random.default_rng(0)
  a = generator.integers(0, 2**32, (2000, duplicates.HASHES), np.uint32)
  other = generator.integers(0, 2**32, a.shape, np.uint32)
  b = np.where(generator.random(a.shape) < threshold, a, other)
  keys_a, keys_b = (duplicates.band_keys(x, threshold) for x in (a, b))
  assert keys_a.shape == (bands, 2000)
  assert (keys_a == keys_b).any(axis=0).mean() > 0.98
  assert not (keys_a == duplicates.band_keys(other, threshold)).any()


def test_short_texts_are_not_compared():
  assert duplicates.signature("import os\nimport sys\n", 5) is None
  assert duplicates.signature(" ".join(words(0, 10)), 5) is not None
  assert duplicates.signature(" ".join(words(0, 10)), 11) is None
  # Only words count: signs, indents and the tokenizer do not.
  a, b = (duplicates.signature(s.join(words(0, 30)), 5) for s in (" ", ",\n\t"))
  assert (a == b).all() and a.dtype == np.uint32 and a.shape == (duplicates.HASHES,)
