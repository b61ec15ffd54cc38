"""Prepares what the other programs read: a tokenizer, a tokenised dataset, prompts, problems.

python -m diffucoder_jax.prepare tokenizer --config=CONFIG --output=DIR/tokenizer.model
python -m diffucoder_jax.prepare dataset --config=CONFIG --config.tokenizer=DIR --output=DATASET
python -m diffucoder_jax.prepare prompts --config=CONFIG --config.tokenizer=DIR --output=DIR/prompts.jsonl
python -m diffucoder_jax.prepare problems --config=CONFIG --output=DIR
"""

import json
import os
import time

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from diffucoder_jax.data import dataset as dataset_lib
from diffucoder_jax.data import functions, sources, toy_problems
from diffucoder_jax.data.problems import write_problems
from diffucoder_jax.data.tokenizer import load_tokenizer, train_sentencepiece

PROMPTS = 4  # of each kind


def tokenizer(config, output, _=None):
  """Trains a tokenizer of `model.vocab_size` pieces on the corpus's training side; writes `output`."""
  began = time.monotonic()
  documents, dropped = sources.read_documents(config.data)
  train, held_out = sources.split(documents, config.data.held_out)
  print(
    f"tokenizer: {len(train)} files to learn from, {len(held_out)} held out, {len(dropped)} dropped"
  )
  epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
  made = train_sentencepiece(
    (document.text for document in train), output, config.model.vocab_size, config.seed
  )
  text = "".join(document.text for document in held_out or train)
  print(
    f"tokenizer: {made.vocab_size} pieces, {len(text.encode()) / len(made.encode(text)):.2f} bytes per "
    f"token on {'held-out' if held_out else 'training'} text, {time.monotonic() - began:.0f} s, {output}"
  )


def dataset(config, output, workers=None):
  """Filters, deduplicates and tokenises the corpus into the folder `output`; goes on after a kill."""
  dataset_lib.build(config, output, workers or os.cpu_count())


def prompts(config, output, _=None):
  """Writes held-out functions as jsonl for `generate`: some to complete, some with a hole to fill.

  A hole is one line from the middle of a body, and says how many tokens were there. All fit into
  half a training row, so that the model has seen such lengths.
  """
  encode = load_tokenizer(config.tokenizer).encode
  documents, _ = sources.read_documents(config.data)
  _, held_out = sources.split(documents, config.data.held_out)
  room = config.data.seq_len // 2

  def fits(function):
    whole = len(encode(function.prompt + function.body))
    return room // 2 <= whole <= room and function.body.count("\n") >= 3

  rows = []
  for i, f in enumerate(functions.pick_functions(held_out, 2 * PROMPTS, fits)):
    row = {"source": f.name, "kind": "complete", "prompt": f.prompt, "reference": f.body}
    if i >= PROMPTS:
      lines = f.body.splitlines(keepends=True)
      hole = lines[len(lines) // 2]
      before, after = (
        f.prompt + "".join(lines[: len(lines) // 2]),
        "".join(lines[len(lines) // 2 + 1 :]),
      )
      row |= {"kind": "infill", "prompt": before, "suffix": after, "reference": hole}
      row["infill"] = f"{before}<|fill:{len(encode(hole))}|>{after}"
    rows.append(row)
  epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
  epath.Path(output).write_text("".join(json.dumps(row) + "\n" for row in rows))
  print(f"prompts: {len(rows)} from {len(held_out)} held-out files, {output}")


def problems(config, output, _=None):
  """Makes small programming problems with tests: `train.jsonl` and `test.jsonl` in `output`.

  No two of them compute the same function. Each line is a problem, for RL and evaluation, and an
  instruction with its answer, for tuning.
  """
  c = config.problems
  sides = toy_problems.make_problems(c.train, c.test, config.seed, c.largest)
  for name, side in zip(("train", "test"), sides, strict=True):
    write_problems(side, epath.Path(output) / f"{name}.jsonl")
  first = sides[1][0]
  print(f"problems: {len(sides[0])} to learn from, {len(sides[1])} to be tested on, {output}; such as")
  print(f"\n{first.prompt}\n\n{first.reference}\n{first.tests[0]}\n")


COMMANDS = {"tokenizer": tokenizer, "dataset": dataset, "prompts": prompts, "problems": problems}


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a config with the corpus", lock_config=True
  )
  _OUTPUT = flags.DEFINE_string("output", None, "where to write")
  _WORKERS = flags.DEFINE_integer(
    "workers", None, "processes of `dataset`; all cores by default", 1
  )
  flags.mark_flags_as_required(["config", "output"])

  def _main(argv):
    if len(argv) != 2 or argv[1] not in COMMANDS:
      raise app.UsageError(f"say what to prepare, one of {sorted(COMMANDS)}, got {argv[1:]}")
    COMMANDS[argv[1]](_CONFIG.value, _OUTPUT.value, _WORKERS.value)

  app.run(_main)
