"""Prepares what training reads. For now: a SentencePiece tokenizer for a corpus.

  python -m diffucoder_jax.prepare tokenizer --config=configs/quickstart_ar.py --output=DIR/tokenizer.model
"""

import time

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from diffucoder_jax.data import sources
from diffucoder_jax.data.tokenizer import train_sentencepiece


def tokenizer(config, output):
  """Trains a tokenizer of `model.vocab_size` pieces on the corpus's training side; writes `output`."""
  began = time.monotonic()
  documents, dropped = sources.read_documents(config.data)
  train, held_out = sources.split(documents, config.data.held_out)
  print(f"tokenizer: {len(train)} files to learn from, {len(held_out)} held out, {len(dropped)} dropped")
  epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
  made = train_sentencepiece(
    (document.text for document in train), output, config.model.vocab_size, config.seed
  )
  text = "".join(document.text for document in held_out or train)
  print(
    f"tokenizer: {made.vocab_size} pieces, {len(text.encode()) / len(made.encode(text)):.2f} bytes per "
    f"token on {'held-out' if held_out else 'training'} text, {time.monotonic() - began:.0f} s, {output}"
  )


COMMANDS = {"tokenizer": tokenizer}


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "a config with the corpus", lock_config=True)
  _OUTPUT = flags.DEFINE_string("output", None, "where to write")
  flags.mark_flags_as_required(["config", "output"])

  def _main(argv):
    if len(argv) != 2 or argv[1] not in COMMANDS:
      raise app.UsageError(f"say what to prepare, one of {sorted(COMMANDS)}, got {argv[1:]}")
    COMMANDS[argv[1]](_CONFIG.value, _OUTPUT.value)

  app.run(_main)
