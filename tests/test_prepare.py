"""The preparing program: a tokenizer and a dataset that training can use, the same each time."""

import pathlib
import random
import sysconfig

import pytest

from configs import prepare_stdlib, quickstart_sft
from diffucoder_jax.data import dataset, instructions, problems, records, sources
from diffucoder_jax.data.tokenizer import load_tokenizer
from tests import tiny


def test_tokenizer(home, tmp_path, capsys):
  changes = {"model.vocab_size": 380}
  c = tiny.config(home, None, changes)
  prepare = tiny.program("prepare")
  made = []
  for folder in ("once", "again"):
    path = tmp_path / folder / "deeper" / "tokenizer.model"
    prepare.tokenizer(c, str(path))
    made.append(path.read_bytes())
  assert made[0] == made[1]
  tokenizer = load_tokenizer(path)
  assert tokenizer.vocab_size == 380 and tokenizer.mask_id >= 0
  documents, _ = sources.read_documents(c.data)
  for document in documents:
    assert tokenizer.decode(tokenizer.encode(document.text)) == document.text
  train, held_out = sources.split(documents, c.data.held_out)
  printed = capsys.readouterr().out
  assert f"{len(train)} files to learn from, {len(held_out)} held out, 0 dropped" in printed
  size = sum(len(d.text.encode()) for d in held_out)
  tokens = len(tokenizer.encode("".join(d.text for d in held_out)))
  assert f"380 pieces, {size / tokens:.2f} bytes per token on held-out text" in printed


def test_tokenizer_learns_from_the_training_side_alone(home, tmp_path):
  """Held-out files may say anything: the tokenizer's file stays the same."""
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  for path in pathlib.Path(home.corpus).iterdir():
    (corpus / path.name).write_bytes(path.read_bytes())
  c = tiny.config(home, None, {"data.path": str(corpus), "model.vocab_size": 380})
  prepare = tiny.program("prepare")
  prepare.tokenizer(c, str(tmp_path / "a.model"))
  _, held_out = sources.split(sources.read_documents(c.data)[0], c.data.held_out)
  assert held_out
  for document in held_out:
    (corpus / document.name).unlink()
  c = tiny.config(home, None, {"data.path": str(corpus), "model.vocab_size": 380})
  prepare.tokenizer(c, str(tmp_path / "b.model"))
  assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_the_real_program(home, tmp_path):
  """One command makes a tokenizer; mistakes are named."""
  values = [f"--config.{k}={v}" for k, v in tiny.settings(home, {"model.vocab_size": 380}).items()]
  output = tmp_path / "tokenizer.model"
  common = ["--config=configs/tiny.py", *values, f"--output={output}"]
  done = tiny.run("prepare", ["tokenizer", *common])
  assert done.returncode == 0, done.stderr
  assert load_tokenizer(output).vocab_size == 380
  done = tiny.run("prepare", ["tokeniser", *common])
  assert done.returncode != 0 and "say what to prepare, one of" in done.stderr
  assert "tokenizer" in done.stderr and "got ['tokeniser']" in done.stderr


def dataset_settings(home, changes=()):
  """Flat config overrides that make configs/prepare_stdlib.py read `home`."""
  return {"data.source": "folder", "data.path": home.corpus, "tokenizer": home.tokenizer,
          **dict(changes)}  # fmt: skip


def dataset_flags(settings, output, workers):
  values = [f"--config.{key}={value}" for key, value in settings.items()]
  common = ["dataset", "--config=configs/prepare_stdlib.py", f"--output={output}"]
  return [*common, f"--workers={workers}", *values]


def build_here(settings, output):
  c = prepare_stdlib.get_config()
  c.lock()
  c.update_from_flattened_dict(settings)
  return dataset.build(c, output, 1)


def test_dataset_by_the_real_program(home, tmp_path):
  """One command makes a dataset; the same again does nothing, another is refused."""
  pytest.importorskip("rensa")
  settings = dataset_settings(home)
  done = tiny.run("prepare", dataset_flags(settings, tmp_path / "out", 1))
  assert done.returncode == 0, done.stderr
  made = records.read_manifest(tmp_path / "out")
  assert f"sha256 {made['sha256'][:16]}" in done.stdout and "documents/s" in done.stdout
  before = tiny.contents(tmp_path / "out")
  build_here(settings, tmp_path / "here")
  assert tiny.contents(tmp_path / "here") == before
  settings = dataset_settings(home, {"prepare.min_bytes": 100})
  done = tiny.run("prepare", dataset_flags(settings, tmp_path / "out", 1))
  assert done.returncode != 0 and "prepare.min_bytes: 32 -> 100" in done.stderr
  assert tiny.contents(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_dataset_killed_at_random_is_the_same(home, tmp_path, seed):
  """Killed five times while it prepares and once while it writes shards, by any number of workers."""
  pytest.importorskip("rensa")
  source = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
  changes = {"data.path": str(source), "prepare.chunk_bytes": 8000, "prepare.shard_bytes": 50_000}
  settings = dataset_settings(home, changes)
  out, chunks = tmp_path / "out", tmp_path / "out" / "work" / "chunks"
  expected = build_here(settings, tmp_path / "here")
  assert len(expected["shards"]) > 5
  order = random.Random(seed)
  stops = sorted(order.sample(range(1, 25), 5))
  kills = [lambda stop=stop: len(list(chunks.glob("*/chunk.json"))) >= stop for stop in stops]
  kills.append(lambda: len(list((out / "work" / "shards").glob("*.json"))) >= 2)
  middle = 0
  for reached in kills:
    process = tiny.start("prepare", dataset_flags(settings, out, order.choice((1, 2))),
                         tmp_path / "log")  # fmt: skip
    tiny.wait_until(reached, process)
    process.kill()
    process.wait()
    middle += not (out / "manifest.json").exists()
  assert middle >= 3, "it was too quick to be interrupted"
  done = tiny.run("prepare", dataset_flags(settings, out, 2))
  assert done.returncode == 0, done.stderr
  assert tiny.contents(out) == tiny.contents(tmp_path / "here")


def test_problems(tmp_path, capsys):
  c = quickstart_sft.get_config()
  c.problems.train, c.problems.test = 30, 10
  tiny.program("prepare").problems(c, str(tmp_path / "made"))
  train, test = (problems.read_problems(tmp_path / "made" / f"{s}.jsonl") for s in ("train", "test"))
  assert (len(train), len(test)) == (30, 10) and not {p.prompt for p in train} & {p.prompt for p in test}
  assert test[0].prompt in capsys.readouterr().out
  rows, broken = instructions.read_conversations(tmp_path / "made" / "train.jsonl", "opencoder")
  assert not broken and rows[0].messages[0]["content"] == train[0].prompt
