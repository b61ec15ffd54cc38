"""Stages 1 to 3 in small, one from the other: the recipes' own configs, 12 steps each."""

import numpy as np
import pytest

from configs import adapt_7b, midtrain_7b, sft_7b
from diffucoder_jax import pretrained
from diffucoder_jax.data import conversations
from diffucoder_jax.data.problems import write_problems
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.data.toy_problems import make_problems
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]


def run(module, workdir, changes):
  c = module.get_config("tiny")
  c.lock()
  c.update_from_flattened_dict(changes)
  tiny.run_training(c, workdir)
  return tiny.rows(workdir)


def test_one_stage_after_the_other(home, tmp_path):
  corpus = {"data.source": "folder", "data.path": home.corpus, "data.held_out": 0.2}
  start = {**corpus, "tokenizer": home.tokenizer}
  rows = run(adapt_7b, tmp_path / "adapt", start)
  assert rows[-1]["eval/bits_per_byte"] < rows[-1]["eval/unigram_bits_per_byte"] * 3
  losses = list(tiny.losses(tmp_path / "adapt").values())
  assert len(losses) == 12 and np.isfinite(losses).all()

  run(midtrain_7b, tmp_path / "mid", {**corpus, "init_from": str(tmp_path / "adapt")})

  train, _ = make_problems(train=200, test=10)
  problems = tmp_path / "problems.jsonl"
  write_problems(train, problems)
  # A vocabulary of 400 pieces spells these out: room for them.
  changes = {
    "init_from": str(tmp_path / "mid"), "data.path": str(problems), "data.seq_len": 256,
    "optim.steps": 24, "model.lora_rank": 0,
  }  # fmt: skip
  rows = run(sft_7b, tmp_path / "sft", changes)
  assert 0 < rows[-1]["eval/bits_per_byte"] < rows[-1]["eval/unigram_bits_per_byte"] * 3
  losses = list(tiny.losses(tmp_path / "sft").values())
  assert np.mean(losses[-6:]) < np.mean(losses[:6])
  ckpt = pretrained.from_pretrained(tmp_path / "sft")
  assert ckpt.config.attention == "full"

  # What is learnt: nothing of the prompt, all of the response, and the pads that say it is over.
  c = sft_7b.get_config("tiny")
  c.data.path, c.data.seq_len = str(problems), 256
  opened = conversations.load_conversations(c.data, load_tokenizer(home.tokenizer))
  assert opened.report["dropped"] == 0
  row = opened.train[0]
  assert not (row["maskable"] & row["prompt"]).any() and (row["maskable"] | row["prompt"]).all()
  pad = ckpt.tokenizer.special_ids["<|dlm_pad|>"]
  assert row["maskable"][row["tokens"] == pad].all() and (row["tokens"] == pad).sum() > 10
