"""The training program: it learns, reports what it promises, and refuses what cannot work."""

import dataclasses
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffucoder_jax import pretrained, train
from diffucoder_jax.data import batching, pipeline
from diffucoder_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from diffucoder_jax.diffusion import process
from diffucoder_jax.model import attention
from diffucoder_jax.model.config import ModelConfig
from diffucoder_jax.model.transformer import Transformer, unembed
from diffucoder_jax.runtime import metrics, optim
from tests import tiny

pytestmark = pytest.mark.usefixtures("programs")


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
  """(workdir, config) of a whole diffusion run; nobody may change the workdir."""
  return tiny.finished(tmp_path_factory.getbasetemp()), tiny.config(home)


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory):
  """The workdir of an autoregressive run: what adaptation starts from."""
  return tiny.overfitted(tmp_path_factory.getbasetemp(), "ar")[0]


# --- It learns.


@pytest.mark.parametrize(
  "arg, metric, share",
  [pytest.param("ar", "loss", 0.1, marks=pytest.mark.slow), (None, "masked_nll", 0.5)],
)
def test_overfits_one_batch_and_beats_the_unigram(tmp_path_factory, arg, metric, share):
  workdir, bits_per_byte = tiny.overfitted(tmp_path_factory.getbasetemp(), arg)
  values = [row[metric] for row in tiny.rows(workdir) if metric in row]
  assert values[0] == pytest.approx(np.log(512), rel=0.02)
  assert np.mean(values[-10:]) < share * values[0]
  last = tiny.rows(workdir)[-1]
  unigram = last["eval/unigram_bits_per_byte"]
  assert bits_per_byte == last["eval/bits_per_byte"]
  assert 0 < bits_per_byte < 0.8 * unigram


def full_losses(c, params, batch, ratios):
  """The loss of the first step for each ratio, from all the logits and one log-softmax."""
  _, data_key, _ = jax.random.split(jax.random.key(c.seed), 3)
  key = jax.random.fold_in(data_key, 0)
  noise_key, pattern_key = jax.random.split(key)[1], jax.random.fold_in(key, 2)
  tokens_BL = batch["tokens"]
  mask_id = load_tokenizer(c.tokenizer).mask_id
  noised = process.forward_process(noise_key, tokens_BL, batch["maskable"], mask_id)

  @jax.jit
  def one(params, ratio):
    features_BLD = Transformer(ModelConfig(**c.model)).apply(
      {"params": params}, noised.tokens, batch["segment_ids"], batch["positions"],
      attention.annealed(ratio, pattern_key),
    )  # fmt: skip
    log_probs_BLV = jax.nn.log_softmax(unembed(params, features_BLD))
    nll_BL = -jnp.take_along_axis(log_probs_BLV, tokens_BL[..., None], axis=-1)[..., 0]
    return jnp.sum(noised.masked * nll_BL / noised.t[:, None]) / jnp.sum(noised.masked)

  return [float(one(params, ratio)) for ratio in ratios]


@pytest.mark.slow
def test_adaptation_starts_from_autoregressive_weights(home, autoregressive, tmp_path):
  changes = {"optim.steps": 1, "optim.warmup_steps": 0, "eval.every": 0}
  changes |= {"init_from": str(autoregressive), "objective.anneal_steps": 4}
  workdir = tmp_path / "run"
  tiny.run_training(tiny.config(home, None, {**changes, "tokenizer": ""}), workdir)
  (loss,) = tiny.losses(workdir).values()

  before = pretrained.from_pretrained(autoregressive)
  c = tiny.config(home, None, changes)
  corpus = pipeline.load_corpus(c.data, before.tokenizer, c.seed)
  batch = next(batching.train_batches(corpus.train, c.data, c.seed))
  annealed, *others = full_losses(c, before.params, batch, (0.25, 0.0, 1.0))
  assert loss == pytest.approx(annealed, rel=1e-5)
  for other in others:  # neither that of causal attention nor that of full attention
    assert loss != pytest.approx(other, rel=1e-4)

  after = pretrained.from_pretrained(workdir)
  assert (before.config.attention, after.config.attention) == ("causal", "full")
  assert after.tokenizer.fingerprint() == before.tokenizer.fingerprint()
  moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before.params, after.params)
  assert 0 < max(jax.tree.leaves(moved)) < 0.01  # one step of learning rate 3e-3


def test_attention_anneals_from_causal_to_full():
  key = jax.random.key(0)
  objective = train.Objective(anneal_steps=4)
  ratios = [float(train.attention_pattern(objective, step, key).ratio) for step in range(6)]
  assert ratios == [0.25, 0.5, 0.75, 1, 1, 1]
  assert train.attention_pattern(train.Objective(), 0, key).kind == "full"
  causal = train.Objective(kind="autoregressive", anneal_steps=4)
  assert train.attention_pattern(causal, 0, key).kind == "causal"


@pytest.mark.slow
def test_accumulation_changes_nothing(finished, home, tmp_path):
  whole, _ = finished
  tiny.run_training(tiny.config(home, None, {"optim.accumulate": 2}), tmp_path / "run")
  for row, wanted in zip(tiny.rows(tmp_path / "run"), tiny.rows(whole), strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_rows_that_fill_up_a_batch_change_nothing(home, tmp_path):
  """6 rows on 4 batch shards: the losses and scores are those of 6 rows on one device."""
  changes = {"data.global_batch": 6, "optim.steps": 3, "eval.every": 3, "checkpoint.every": 3,
             "data.fill_batch": True, "objective.normaliser": "batch"}  # fmt: skip
  for devices in (1, 4):
    tiny.run_training(tiny.config(home, None, changes), tmp_path / f"{devices}", devices)
  alone, filled = (tiny.losses(tmp_path / f"{devices}") for devices in (1, 4))
  assert len(alone) == 3
  assert filled == pytest.approx(alone, rel=1e-5)
  scores = [tiny.last_row(tmp_path / f"{devices}")["eval/bits_per_byte"] for devices in (1, 4)]
  assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "arg, metric", [pytest.param("ar", "loss", marks=pytest.mark.slow), ("adapt", "masked_nll")]
)
def test_adapters_learn_while_the_weights_stay(home, autoregressive, tmp_path, arg, metric, caplog):
  """New text is learnt by the adapters alone; a stop on the way changes nothing."""
  changes = {
    "init_from": str(autoregressive), "model.lora_rank": 4, "model.lora_alpha": 8.0,
    "optim.accumulate": 2, "optim.steps": 8, "optim.lr": 1e-2, "eval.every": 0,
  }  # fmt: skip
  c = tiny.config(home, arg, changes)
  with caplog.at_level("INFO"):
    tiny.run_training(c, tmp_path / "whole")
  assert "training 8,192 of 148,032 parameters (5.53 %)" in caplog.text
  values = [row[metric] for row in tiny.rows(tmp_path / "whole") if metric in row]
  assert np.mean(values[-2:]) < 0.9 * values[0]
  before, after = tiny.params(autoregressive), tiny.params(tmp_path / "whole")
  adapters = {name for name in after if "_lora'" in name}
  assert after.keys() - adapters == before.keys()
  for name, leaf in before.items():
    assert after[name].tobytes() == leaf.tobytes(), name
  assert all(np.any(after[name]) for name in adapters)
  if arg == "ar":
    return  # to stop one of them is enough

  take, taken = batching.TrainBatches.__next__, []

  def take_and_stop(self):
    taken.append(self)
    if len(taken) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return take(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batching.TrainBatches, "__next__", take_and_stop)
    with pytest.raises(SystemExit):
      tiny.run_training(c, tmp_path / "run")
  assert tiny.steps_on_file(tmp_path / "run") == [3]
  tiny.run_training(c, tmp_path / "run")
  tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- It reports what it promises.


def test_metrics(finished):
  workdir, c = finished
  everything = metrics.read(workdir)
  training = [row for row in everything if "loss" in row]
  assert [row["step"] for row in training] == list(range(1, c.optim.steps + 1))
  _, learning_rate = optim.make_optimizer(c.optim)
  for row in training:
    assert {"time", "grad_norm", "tokens_per_second", "masked_nll", "mask_rate"} <= row.keys()
    assert row["grad_norm"] > 0 and row["tokens_per_second"] > 0 and 0 < row["mask_rate"] < 1
    assert row["learning_rate"] == pytest.approx(float(learning_rate(row["step"] - 1)))
  times = [row["time"] for row in everything]
  assert times == sorted(times)

  evaluations = [row for row in everything if "eval/bits_per_byte" in row]
  assert [row["step"] for row in evaluations] == [6, 12]
  for row in evaluations:
    assert row["eval/bits_per_byte"] > 0 and row["eval/bits_per_byte_se"] > 0
    assert row["eval/unigram_bits_per_byte"] == evaluations[0]["eval/unigram_bits_per_byte"] > 0
  assert len(everything) == len(training) + len(evaluations)


def test_bits_per_byte_are_those_of_the_saved_weights(autoregressive):
  ckpt = pretrained.from_pretrained(autoregressive)
  c = ConfigDict(json.loads((autoregressive / "config.json").read_text()))
  corpus = pipeline.load_corpus(c.data, ckpt.tokenizer, c.seed)
  token_bytes_V = ckpt.tokenizer.token_bytes()

  @jax.jit
  def log_probs(params, batch):
    features = Transformer(ckpt.config).apply(
      {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"]
    )
    return jax.nn.log_softmax(unembed(params, features))

  nats = size = 0.0
  for batch in batching.held_out_batches(corpus.held_out, c.eval.rows, 8):
    tokens_BL, scored_BL = batch["tokens"], batch["maskable"]
    log_probs_BLV = np.asarray(log_probs(ckpt.params, batch))
    nats -= np.take_along_axis(log_probs_BLV, tokens_BL[..., None], -1)[..., 0][scored_BL].sum()
    size += token_bytes_V[tokens_BL[scored_BL]].sum()
  reported = tiny.rows(autoregressive)[-1]["eval/bits_per_byte"]
  assert reported == pytest.approx(nats / size / np.log(2), rel=1e-5)


def test_the_workdir_holds_everything(finished, home):
  workdir, c = finished
  assert tiny.steps_on_file(workdir) == [4, 8, 12]
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["optim"]["lr"] == c.optim.lr and saved["model"]["attention"] == "full"
  assert (workdir / "tokenizer.model").read_bytes() == pathlib.Path(home.tokenizer).read_bytes()


def test_rows_are_as_sparse_as_asked(home, tmp_path):
  changes = {"log.every": 5, "eval.every": 0, "checkpoint.every": 100}
  tiny.run_training(tiny.config(home, None, changes), tmp_path / "run")
  assert list(tiny.losses(tmp_path / "run")) == [5, 10, 12]


def test_a_finished_run_started_again_changes_nothing(finished):
  workdir, c = finished
  before = tiny.contents(workdir)
  tiny.run_training(c, workdir)
  assert tiny.contents(workdir) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(home, tmp_path, monkeypatch):
  write = metrics.Writer.write

  def spoilt(self, step, row):
    return write(self, step, {**row, "loss": np.nan} if step == 7 else row)

  monkeypatch.setattr(metrics.Writer, "write", spoilt)
  with pytest.raises(FloatingPointError, match="loss is nan at step 7"):
    tiny.run_training(tiny.config(home, None, {"checkpoint.every": 1}), tmp_path / "run")
  assert tiny.steps_on_file(tmp_path / "run")[-1] in (5, 6)  # 6 may still be on its way


# --- It refuses what cannot work, by name.


def test_unknown_keys_are_named(home, tmp_path):
  with pytest.raises(TypeError, match="weigth"):
    train.Objective(weigth="1/t")
  with pytest.raises(TypeError, match="widht"):
    ModelConfig(**tiny.config(home).model, widht=3)
  for section, key in (("objective", "weigth"), ("model", "widht")):
    c = tiny.config(home).unlock()
    c[section][key] = 1
    with pytest.raises(TypeError, match=key):
      tiny.run_training(c, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_unknown_kinds_are_named():
  with pytest.raises(ValueError, match="objective.kind is 'ar'; choose one of .*autoregressive"):
    train.Objective(kind="ar")


def test_an_unknown_flag_is_named_with_a_suggestion(home, tmp_path):
  done = tiny.run("train", [*tiny.flags(home, tmp_path / "run"), "--config.model.mlp_dmi=3"])
  assert done.returncode != 0
  assert "mlp_dmi" in done.stderr and 'Did you mean "mlp_dim"' in done.stderr
  assert not (tmp_path / "run").exists()


def refuse(c, workdir, message, error=ValueError):
  """Runs and expects `error`; a workdir that did not exist must then not hold anything."""
  with pytest.raises(error, match=message):
    tiny.run_training(c, workdir)
  assert not pathlib.Path(workdir).exists()


def test_a_vocabulary_that_is_too_small_is_named(home, tmp_path):
  refuse(
    tiny.config(home, None, {"model.vocab_size": 300}), tmp_path / "run",
    f"ids up to {tiny.VOCABULARY - 1}, but model.vocab_size is 300",
  )  # fmt: skip


def test_a_tokenizer_without_a_mask_is_refused_for_diffusion(home):
  class Maskless:
    mask_id, pad_id, bos_id, eos_id, vocab_size = -1, 0, 1, 2, 300

  model_config = ModelConfig(**tiny.config(home).model)
  train.check_tokenizer(Maskless, model_config, train.Objective(kind="autoregressive"))
  with pytest.raises(ValueError, match="no mask token"):
    train.check_tokenizer(Maskless, model_config, train.Objective())


def test_no_tokenizer_at_all(home, tmp_path):
  refuse(tiny.config(home, None, {"tokenizer": ""}), tmp_path / "run", "no tokenizer: set --config")
  missing = str(tmp_path / "missing.model")
  c = tiny.config(home, None, {"tokenizer": missing})
  refuse(c, tmp_path / "run", "missing.model", FileNotFoundError)


def test_an_empty_corpus_is_named(home, tmp_path):
  (tmp_path / "empty").mkdir()
  c = tiny.config(home, None, {"data.path": str(tmp_path / "empty")})
  refuse(c, tmp_path / "run", "the corpus is empty.*empty")
  c = tiny.config(home, None, {"data.path": str(tmp_path / "nowhere")})
  refuse(c, tmp_path / "run", "nowhere", FileNotFoundError)


def test_an_undecodable_file_is_named_or_counted(home, tmp_path, caplog):
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  for path in pathlib.Path(home.corpus).iterdir():
    (corpus / path.name).write_bytes(path.read_bytes())
  (corpus / "broken.py").write_bytes(b"x = '\xff'\n")
  changes = {"data.path": str(corpus), "eval.every": 0}
  strict = tiny.config(home, None, {**changes, "data.on_undecodable": "error"})
  refuse(strict, tmp_path / "run", "broken.py is not valid text.*data.on_undecodable='skip'")
  with caplog.at_level("INFO"):
    tiny.run_training(tiny.config(home, None, changes), tmp_path / "run")
  text = caplog.text
  assert "skipped broken.py" in text and "undecodable 1" in text


def test_the_workdir_of_another_run_is_left_alone(finished, home):
  workdir, _ = finished
  before = tiny.contents(workdir)
  changes = {"seed": 1, "optim.lr": 1e-3, "model.mlp_dim": 96, "log.every": 2}
  with pytest.raises(ValueError) as caught:
    tiny.run_training(tiny.config(home, None, changes), workdir)
  lines = [line.strip() for line in str(caught.value).splitlines()]
  assert [line for line in lines if "->" in line and ":" in line][1:] == [
    "model.mlp_dim: 128 -> 96", "optim.lr: 0.003 -> 0.001", "seed: 0 -> 1",
  ]  # fmt: skip
  assert "new workdir" in str(caught.value)
  assert tiny.contents(workdir) == before


def test_changed_text_under_a_run_is_refused(finished, home, tmp_path):
  workdir, c = finished
  before = tiny.contents(workdir)
  name = sorted(pathlib.Path(home.corpus).iterdir())[0]
  text = name.read_text()
  try:
    name.write_text(text + "# one more line\n")
    with pytest.raises(ValueError, match="text or tokenizer changed since checkpoint 12"):
      tiny.run_training(c, workdir)
  finally:
    name.write_text(text)
  assert tiny.contents(workdir) == before


def test_weights_of_another_shape_are_named(home, autoregressive, tmp_path):
  changes = {"init_from": str(autoregressive), "model.embed_dim": 32, "eval.every": 0}
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match="model.embed_dim is 64 there and 32 in the config"):
    tiny.run_training(tiny.config(home, None, changes), workdir)
  assert not tiny.steps_on_file(workdir)


def test_a_mistake_can_be_put_right_in_the_same_workdir(home, autoregressive, tmp_path):
  workdir = tmp_path / "run"
  changes = {"init_from": str(autoregressive), "model.embed_dim": 32, "eval.every": 0}
  with pytest.raises(ValueError, match="another network"):
    tiny.run_training(tiny.config(home, None, changes), workdir)
  tiny.run_training(tiny.config(home, None, {**changes, "model.embed_dim": 64}), workdir)
  assert tiny.steps_on_file(workdir) == [4, 8, 12]


def test_weights_of_another_tokenizer_are_named(home, autoregressive, tmp_path):
  other = tmp_path / "other.model"
  train_sentencepiece(["def other(): return 1\n" * 3], other, 285)
  changes = {"init_from": str(autoregressive), "tokenizer": str(other)}
  c = tiny.config(home, None, changes)
  refuse(c, tmp_path / "run", "another tokenizer than .*other.model")
  c = tiny.config(home, None, {**changes, "init_from": str(tmp_path / "nothing")})
  refuse(c, tmp_path / "run", "nothing that can be loaded", FileNotFoundError)


@pytest.mark.slow
def test_every_objective_key_reaches_the_loss():
  """A changed default of `Objective` changes the loss or the pattern: no key is read by nobody."""
  key = jax.random.key(0)
  rng = np.random.default_rng(0)
  batch = {
    "tokens": jnp.asarray(rng.integers(10, 300, (8, 16)), jnp.int32),
    "segment_ids": jnp.ones((8, 16), jnp.int32).at[:, 12:].set(jnp.arange(8)[:, None] % 2),
    "positions": jnp.broadcast_to(jnp.arange(16), (8, 16)),
  }
  batch["prompt"] = batch["positions"] < 5
  batch["maskable"] = ~batch["prompt"] & (batch["segment_ids"] > 0)
  sizes = dict(embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8)
  model = Transformer(ModelConfig(vocab_size=320, init_std=0.5, **sizes))
  params = model.init(key, batch["tokens"])["params"]
  params = jax.tree.map(lambda leaf: leaf.unbox(), params, is_leaf=lambda x: hasattr(x, "unbox"))

  @jax.jit
  def losses():
    values = {}
    for name, objective in objectives.items():
      rows = train.PREPARE[objective.kind](objective, 4, batch, jnp.int32(0), key)
      pattern = train.attention_pattern(objective, 0, key)
      (total, weight), _ = train.loss_of(model, objective, pattern, params, rows)
      values[name] = total / weight
    return values

  changes = dict(
    kind="autoregressive", anneal_steps=3, t_sampler="stratified", weight="1-t",
    normaliser="sequence", truncate_prob=1.0, prefix_prob=1.0,
    condition_steps=9,
  )  # fmt: skip
  assert changes.keys() == {field.name for field in dataclasses.fields(train.Objective)}
  objectives = {name: train.Objective(**{name: value}) for name, value in changes.items()}
  objectives["default"] = train.Objective()
  values = {name: float(value) for name, value in losses().items()}
  assert len(set(values.values())) == len(values), values


@pytest.mark.slow
def test_samples_are_written_at_each_evaluation(home, tmp_path):
  changes = {"eval.samples": 3, "eval.sample_tokens": 8, "eval.sample_steps": 4}
  tiny.run_training(tiny.config(home, None, changes), tmp_path / "run")
  for step in (6, 12):
    lines = (tmp_path / "run" / "samples" / f"{step}.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 3 and all(sample["prompt"] for sample in samples)
    assert any(sample["completion"] for sample in samples)


def test_prompts_are_noised_in_a_falling_share_of_rows():
  """Instruction data: from all rows to none over `condition_steps`, responses always."""
  key = jax.random.key(0)
  tokens_BL = jnp.full((400, 12), 7)
  index_BL = jnp.broadcast_to(jnp.arange(12), tokens_BL.shape)
  batch = {
    "tokens": tokens_BL, "segment_ids": jnp.ones_like(tokens_BL), "positions": index_BL,
    "prompt": index_BL < 5, "maskable": index_BL >= 5,
  }  # fmt: skip
  objective = train.Objective(condition_steps=10)
  for step, share in [(0, 1.0), (4, 0.6), (9, 0.1), (10, 0.0), (50, 0.0)]:
    rows = train.PREPARE["diffusion"](objective, 4, batch, jnp.int32(step), key)
    noised_B = rows["maskable"][:, 1:5].any(1)
    assert abs(float(noised_B.mean()) - share) < 0.08
    assert (rows["maskable"][:, 1:5].all(1) == noised_B).all()  # a row's prompt is noised or not
    assert not rows["maskable"][:, 0].any() and rows["maskable"][:, 5:].all()
  rows = train.PREPARE["diffusion"](train.Objective(), 4, batch, jnp.int32(0), key)
  assert (rows["maskable"] == batch["maskable"]).all()
