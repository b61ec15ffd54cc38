"""The preparing program: a tokenizer that training can use, the same each time."""

import pathlib

from diffucoder_jax.data import sources
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
