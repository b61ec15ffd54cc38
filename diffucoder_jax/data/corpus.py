"""What a run reads, by `data.source`: texts, a mixture of prepared datasets, or conversations."""

import hashlib
import json

from absl import logging

from diffucoder_jax.data import conversations, pipeline, records
from diffucoder_jax.data.mixture import Mixture, RecordTokens


def open_corpus(data_config, tokenizer, seed):
  """Opens the corpus of a run.

  Args:
    data_config: the `data` section. `source` "mixture" reads `mixture`, the prepared datasets and
      their shares; "conversations" is instruction data (see `conversations.load_conversations`);
      all others are texts that are tokenised now (see `pipeline.load_corpus`).
    tokenizer: a `Tokenizer`.
    seed: order of training texts.
  Returns:
    `pipeline.Corpus`, or the like: train, held_out (rows, or a dict of rows by source), report,
    fingerprint.
  """
  openers = {
    "mixture": lambda: _open_mixture(data_config, tokenizer),
    "conversations": lambda: conversations.load_conversations(data_config, tokenizer),
  }
  texts = lambda: pipeline.load_corpus(data_config, tokenizer, seed)  # noqa: E731
  return openers.get(data_config.source, texts)()


def _open_mixture(data_config, tokenizer):
  """Prepared datasets, packed and mixed; nothing but their indices is read now."""
  if not data_config.mixture:
    raise ValueError(
      "data.source is 'mixture', but data.mixture is empty; give it entries such as "
      "code=dict(path='DIR of `prepare dataset`', share=0.8)"
    )
  rows, shares, identity = {"train": {}, "held_out": {}}, {}, [str(data_config.seq_len)]
  report = {}
  bos, eos = ([i] if i >= 0 else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
  pad_id = tokenizer.pad_id if tokenizer.pad_id >= 0 else 0  # never read: segment 0
  for name, part in data_config.mixture.items():
    if not part.path:
      raise ValueError(f"data.mixture.{name}.path is empty; name the DIR of a `prepare dataset`")
    for split, side in rows.items():
      dataset = records.open_dataset(part.path, split)
      if dataset.tokenizer_fingerprint != tokenizer.fingerprint():
        raise ValueError(
          f"data.mixture.{name}: {part.path} was tokenised with another tokenizer "
          f"({dataset.tokenizer_fingerprint}) than this run's ({tokenizer.fingerprint()}); prepare "
          "it again, or set --config.tokenizer to its own"
        )
      stream = RecordTokens(dataset, bos, eos)
      packed = pipeline.PackedRows(stream, stream.starts, data_config.seq_len, pad_id)
      if len(packed) or split == "train":
        side[name] = packed
    shares[name] = part.share
    report[f"{name}_tokens"] = len(rows["train"][name].tokens)
    identity += [name, dataset.fingerprint, repr(float(part.share))]
  train = Mixture(rows["train"], shares)
  report |= {f"{name}_share": share for name, share in train.shares.items()}
  logging.info("mixture: %s", ", ".join(f"{key} {value:.6g}" for key, value in report.items()))
  fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  return pipeline.Corpus(train, rows["held_out"], report, fingerprint)
