"""Several sources in fixed proportions: which row of which source stands at a place is arithmetic.

Row r of the stream belongs to the source that a fixed table of `BLOCK` places names for place
r % BLOCK, and is that source's next row. So a batch is a function of (sources, shares, seed, step):
nothing is remembered but the step, every row of a source comes once an epoch, exactly, and neither
a restart nor another number of processes changes what comes when.
"""

import grain
import numpy as np

BLOCK = 1 << 14


class Mixture:
  """Random-access sources of rows, mixed; endless once shuffled.

  Args:
    parts: {name: rows}, each with `__len__`, `__getitem__` and `seq_len`.
    shares: {name: share of the rows}, positive; divided by their sum.
  Raises:
    ValueError: names the part that is empty or has no share.
  """

  def __init__(self, parts, shares):
    if parts.keys() != shares.keys() or not parts:
      raise ValueError(f"sources {sorted(parts)} and shares {sorted(shares)} must name the same")
    for name, rows in parts.items():
      if not len(rows):
        raise ValueError(f"source {name} of the mixture has no rows; remove it or give it text")
      if not shares[name] > 0:
        raise ValueError(f"the share of source {name} is {shares[name]}; remove it, or make it > 0")
    self.parts = dict(parts)
    total = sum(shares.values())
    self.shares = {name: shares[name] / total for name in parts}
    self.seq_len = next(iter(parts.values())).seq_len
    self._names = list(parts)
    # Largest remainders, then one fixed shuffle: the same table for every run of these shares.
    exact = np.asarray([self.shares[name] * BLOCK for name in parts])
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
      counts[i] += 1
    if not counts.all():
      few = self._names[int(np.argmin(counts))]
      raise ValueError(
        f"source {few} has less than one row in {BLOCK} of the mixture; raise its share"
      )
    table = np.repeat(np.arange(len(parts)), counts)
    self._table = np.random.default_rng(len(parts)).permutation(table)
    self._counts = counts
    # before[i, j]: rows of source i among the first j of a block.
    hits = self._table[None, :] == np.arange(len(parts))[:, None]
    self._before = np.concatenate([np.zeros((len(parts), 1), int), np.cumsum(hits, 1)], 1)

  def __len__(self):
    return sum(map(len, self.parts.values()))

  def __repr__(self):  # Grain compares sources by this when it restores
    return (
      f"Mixture({', '.join(f'{n}={self.shares[n]:.6g} of {r}' for n, r in self.parts.items())})"
    )

  def place(self, row):
    """(name of the source, which of its rows in its endless order) at place `row`."""
    block, place = divmod(row, BLOCK)
    i = int(self._table[place])
    return self._names[i], int(block * self._counts[i] + self._before[i, place])

  def rows_taken(self, count):
    """{name: how many of the first `count` rows are of this source}."""
    blocks, places = divmod(count, BLOCK)
    taken = blocks * self._counts + self._before[:, places]
    return {name: int(n) for name, n in zip(self._names, taken, strict=True)}

  def shuffled(self, seed):
    """An endless `grain.MapDataset`; every source is in another order each epoch."""
    orders = {
      name: grain.MapDataset.source(rows).seed(seed + i).shuffle().repeat(None)
      for i, (name, rows) in enumerate(self.parts.items())
    }
    return grain.MapDataset.source(_Endless(self, orders))


class _Endless:
  def __init__(self, mixture, orders):
    self._mixture, self._orders = mixture, orders

  def __len__(self):
    return 1 << 48

  def __repr__(self):
    return repr(self._mixture)

  def __getitem__(self, row):
    name, index = self._mixture.place(row)
    return self._orders[name][index]


class RecordTokens:
  """The tokens of a prepared dataset laid end to end, with bos and eos: read where they are asked for.

  Args:
    dataset: `records.Dataset`.
    bos, eos: lists of ids put around each document.
  """

  def __init__(self, dataset, bos, eos):
    self._dataset, self._bos, self._eos = dataset, bos, eos
    lengths = np.asarray(dataset.lengths, np.int64) + len(bos) + len(eos)
    self._ends = np.cumsum(lengths)
    self.starts = self._ends - lengths

  def __len__(self):
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index):
    begin, end, step = index.indices(len(self))
    assert step == 1
    first = int(np.searchsorted(self._ends, begin, side="right"))
    parts, at = [], begin
    while at < end:
      tokens = self._dataset[first]["tokens"]
      whole = np.concatenate(
        [np.asarray(part, np.int32) for part in (self._bos, tokens, self._eos)]
      )
      offset = at - self.starts[first]
      parts.append(whole[offset : offset + end - at])
      at, first = int(self._ends[first]), first + 1
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
