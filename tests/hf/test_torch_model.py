"""The PyTorch file that travels with exported weights: golden numbers, and ours, through AutoModel.

Runs with whichever `transformers` is installed; `launch/transformers.sh` goes through several.
"""

import ast
import dataclasses
import json
import os
import shutil
import types

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

import diffucoder_jax  # noqa: E402
from diffucoder_jax.completion import SamplerConfig  # noqa: E402
from diffucoder_jax.diffusion import remasking, sampler  # noqa: E402
from diffucoder_jax.hf import export, load, mapping  # noqa: E402
from diffucoder_jax.model.config import ModelConfig  # noqa: E402
from tests import golden, torch_reference  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compile")]
TOLERANCE = 1e-4
ARGUMENTS = (
  "alg", "steps", "max_new_tokens", "temperature", "eps", "alg_temp", "top_p", "top_k"
)  # fmt: skip
# Everything that the golden checkpoint is not: tied, other heads than the width says, no bias.
OTHER = dict(
  model_type="Dream", vocab_size=131, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
  num_attention_heads=6, num_key_value_heads=3, head_dim=10, attention_bias=False, rope_theta=5e3,
  rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=128, mask_token_id=3,
  pad_token_id=None, bos_token_id=None, eos_token_id=[7, 8], hidden_act="silu",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """More only wait for each other here."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


def make_folder(folder, config, state):
  """An exported model: config.json, weights, and the file under test, as it travels."""
  names = {"AutoConfig": "DiffuCoderConfig", "AutoModel": "DiffuCoderModel"}
  auto_map = {auto: f"modeling_diffucoder.{name}" for auto, name in names.items()}
  config = {**config, "auto_map": auto_map, "architectures": ["DiffuCoderModel"]}
  (folder / "config.json").write_text(json.dumps(config))
  save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / export.MODEL_FILE).write_bytes(export.model_file())
  return folder


def open_torch(folder, **options):
  model, info = transformers.AutoModel.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True, **options
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  return model.eval()


@pytest.fixture(scope="module")
def golden_folder(shared, tmp_path_factory):
  source = shared / "golden" / "checkpoint"
  state = load_file(source / "model.safetensors")
  return make_folder(tmp_path_factory.mktemp("golden"), load.read_config(source), state)


@pytest.fixture(scope="module")
def model(golden_folder):
  return open_torch(golden_folder)


@pytest.fixture(scope="module")
def forward(shared):
  tensors = load_file(shared / "golden" / "forward.safetensors")
  return {k: v if v.is_floating_point() else v.long() for k, v in tensors.items()}


def other_folder(folder):
  """A random checkpoint of `OTHER`'s shape."""
  state = torch_reference.make_folder(folder, OTHER, seed=4)
  state = {name: tensor for name, tensor in state.items() if not name.endswith("bias")}
  return make_folder(folder, OTHER, state)


def mask_lover_folder(folder, golden_folder):
  """The golden checkpoint with MASK as the best token of many positions."""
  config, state = load.read_config(golden_folder), load_file(golden_folder / "model.safetensors")
  state["lm_head.weight"][config["mask_token_id"]] *= 4
  return make_folder(folder, config, state)


@pytest.fixture(scope="module", params=["golden", "other", "mask_lover"])
def both(request, golden_folder, tmp_path_factory):
  """(name, our PyTorch model, our JAX one) of the same weights."""
  folder = tmp_path_factory.mktemp(request.param)
  if request.param == "golden":
    return (
      request.param,
      request.getfixturevalue("model"),
      diffucoder_jax.from_pretrained(golden_folder),
    )
  make = other_folder if request.param == "other" else mask_lover_folder
  folder = make(folder) if request.param == "other" else make(folder, golden_folder)
  return request.param, open_torch(folder), diffucoder_jax.from_pretrained(folder)


def logits_of(model, *args, **kwargs):
  with torch.no_grad():
    return model(*args, **kwargs).logits


def difference(a, b):
  return (a.float() - b.float()).abs().max().item()


def generate(model, inputs, **arguments):
  """(sequences, history [T, B, L])."""
  output = model.diffusion_generate(
    torch.as_tensor(inputs), output_history=True, return_dict_in_generate=True, **arguments
  )
  return output.sequences, torch.stack(output.history)


# --- The network.


def test_golden_logits(model, forward):
  output = model(forward["input_ids"], output_hidden_states=True)
  assert difference(output.logits, forward["logits"]) <= TOLERANCE
  assert len(output.hidden_states) == model.config.num_hidden_layers + 1
  for i, hidden in enumerate(output.hidden_states):
    assert difference(hidden, forward[f"hidden.{i}"]) <= TOLERANCE, i
  assert torch.equal(logits_of(model, forward["input_ids"], "full"), output.logits)
  positions = logits_of(model, forward["input_ids"], position_ids=forward["positions.position_ids"])
  assert difference(positions, forward["positions.logits"]) <= TOLERANCE
  embeds = model.get_input_embeddings()(forward["input_ids"])
  (from_embeds,) = model(inputs_embeds=embeds, return_dict=False)
  assert difference(from_embeds, forward["logits"]) <= TOLERANCE


def test_golden_logits_under_every_kind_of_mask(model, forward):
  ids, valid = forward["leftpad.input_ids"], forward["leftpad.attention_mask"] == 1
  masks = (valid, valid.long(), valid[:, None, :, None] & valid[:, None, None, :])
  for mask in masks:
    logits = logits_of(model, ids, mask)
    assert difference(logits[valid], forward["leftpad.logits"][valid]) <= TOLERANCE
    assert logits.isfinite().all()
  nothing = torch.zeros_like(valid)
  assert logits_of(model, ids, nothing).isfinite().all()
  for wrong in ("causal", valid[:, 1:], valid[:, None]):
    with pytest.raises(ValueError, match="attention_mask is"):
      model(ids, wrong)


@pytest.mark.parametrize("both", ["golden", "other"], indirect=True)
def test_logits_are_those_of_our_network(both):
  _, model, ckpt = both
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, ckpt.config.vocab_size, (3, 17))
  valid = np.ones(tokens.shape, bool)
  valid[0, :5] = valid[1, -4:] = False
  for mask in (None, valid):
    raw = logits_of(model, torch.as_tensor(tokens), None if mask is None else torch.as_tensor(mask))
    wanted = np.array(diffucoder_jax.logits(ckpt, tokens, mask))
    shifted = torch_reference.shift(raw).numpy()
    if mask is None:
      np.testing.assert_allclose(shifted, wanted, rtol=0, atol=TOLERANCE)
    else:
      shifted[0, 5] = raw[0, 5]  # nothing before the first token
      np.testing.assert_allclose(shifted[mask], wanted[mask], rtol=0, atol=TOLERANCE)


def test_bfloat16(golden_folder, model, forward):
  low = open_torch(golden_folder, torch_dtype=torch.bfloat16)
  assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
  logits = logits_of(low, forward["input_ids"])
  assert logits.dtype == torch.bfloat16
  # Dream's own in bfloat16, which is up to 0.21 from float32; from ours up to 0.084, as processors round.
  assert difference(logits, forward["bf16.logits"]) < 0.1
  assert difference(logits, forward["logits"]) < 0.3
  assert difference(logits_of(model.bfloat16(), forward["input_ids"]), logits) == 0
  model.load_state_dict(load_file(golden_folder / "model.safetensors"), assign=True)
  out = low.diffusion_generate(
    forward["input_ids"][:, :8], max_new_tokens=6, steps=6, alg="entropy"
  )
  assert out.shape == (2, 14)


def test_saved_again(both, tmp_path):
  _, model, ckpt = both
  model.save_pretrained(tmp_path / "again")
  again = open_torch(tmp_path / "again")
  ids = torch.arange(20)[None]
  assert torch.equal(logits_of(again, ids), logits_of(model, ids))
  for key in ("rope_theta", "pad_token_id", "eos_token_id", "tie_word_embeddings", "head_dim"):
    assert getattr(again.config, key) == getattr(model.config, key), key
  saved = json.loads((tmp_path / "again" / "config.json").read_text())
  again = ModelConfig(**mapping.config_from_hf(saved))
  assert dataclasses.replace(again, init_std=ckpt.config.init_std) == ckpt.config
  assert saved["rope_theta"] == ckpt.config.rope_theta and "rope_parameters" not in saved


def test_config_of_transformers_5_and_what_is_refused(model):
  make = type(model.config)
  assert make(rope_parameters={"rope_type": "default", "rope_theta": 7e5}).rope_theta == 7e5
  assert make(rope_theta=7e5, rope_scaling=None).rope_theta == 7e5
  assert make(hidden_size=64, num_attention_heads=4).head_dim == 16
  for wrong in ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"hidden_act": "gelu"}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      make(**wrong)


def test_gradients_and_checkpointing(model, forward):
  def gradients():
    model.zero_grad()
    model(forward["input_ids"]).logits.logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}

  model.train()
  plain = gradients()
  model.gradient_checkpointing_enable()
  calls, checkpoint = [], model.model._gradient_checkpointing_func
  model.model._gradient_checkpointing_func = lambda *args: calls.append(1) or checkpoint(*args)
  kept = gradients()
  assert len(calls) == model.config.num_hidden_layers
  model.gradient_checkpointing_disable()
  model.zero_grad(), model.eval()
  for name, gradient in plain.items():
    assert gradient.abs().max() > 0 and difference(kept[name], gradient) <= 1e-5, name
  # As padding_idx does: the pad token's row does not learn as an input.
  assert not plain["model.embed_tokens.weight"][model.config.pad_token_id].any()


# --- Denoising.


def test_golden_trajectories_at_every_step(model, shared):
  data = golden.tensors(shared / "golden/sampler.safetensors")
  cases = golden.cases(shared / "golden/sampler_cases.json")["cases"]
  assert len(cases) == 33
  for case in cases:
    arguments, calls = {key: case[key] for key in ARGUMENTS}, []
    if case["name"].startswith("hook/"):
      forced = torch.as_tensor(data["hook.forced_last3"]).long()

      def force(step, x, logits, forced=forced, calls=calls):
        calls.append((step, None if logits is None else tuple(logits.shape)))
        x[:, -3:] = forced  # in place, as such hooks do
        return x

      arguments["generation_tokens_hook_func"] = force
    if case["inputs"] == "leftpad":
      arguments["attention_mask"] = torch.as_tensor(data["leftpad.attention_mask"])
    sequences, history = generate(model, data[case["inputs"] + ".input_ids"], **arguments)
    wanted = data[case["name"] + "/history"]
    assert history.shape == wanted.shape
    for step, canvas in enumerate(wanted):
      np.testing.assert_array_equal(history[step], canvas, err_msg=f"{case['name']} step {step}")
    np.testing.assert_array_equal(sequences, data[case["name"] + "/sequences"])
    if calls:
      shape = (*sequences.shape, model.config.vocab_size)
      assert calls == [(None, None), *((step, shape) for step in range(case["steps"]))]


def test_the_logits_hook_gets_aligned_logits_and_rules(model, shared):
  data = golden.tensors(shared / "golden/sampler.safetensors")
  seen = []

  def only_token_9(step, x, logits):
    wanted = torch_reference.shift(logits_of(model, x))
    seen.append((step, difference(logits, wanted)))
    logits = torch.full_like(logits, -torch.inf)
    logits[..., 9] = 0
    return logits

  ids = data["plain.input_ids"]
  sequences, _ = generate(
    model, ids, max_new_tokens=5, steps=9, alg="entropy", generation_logits_hook_func=only_token_9
  )
  assert (sequences[:, ids.shape[1] :] == 9).all()
  assert seen == [(step, 0.0) for step in range(9)]  # in steps that commit nothing, too


def test_history_keeps_what_a_hook_writes_over(model):
  def count(step, x, logits):
    x[:, 0] = 0 if step is None else step
    return x

  _, history = generate(
    model, torch.arange(6)[None], max_new_tokens=2, steps=9, generation_tokens_hook_func=count
  )
  assert history[:, 0, 0].tolist() == list(range(9))


def test_same_tokens_as_our_sampler_at_every_step(both):
  """Prompts of all lengths, with and without holes; one padded batch here, alone there."""
  name, model, ckpt = both
  mask_id, rng = ckpt.mask_id, np.random.default_rng(1)
  rows = [list(rng.integers(10, ckpt.config.vocab_size - 15, n)) for n in (9, 4, 12, 7)]
  rows[0][3:6] = rows[3][0:1] = [mask_id] * 3
  rows = [[int(token) for token in row] for row in rows]
  length = max(map(len, rows))
  # A mask in the padding is nothing to be filled.
  ids = torch.tensor([[mask_id] * (length - len(row)) + row for row in rows])
  seen = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
  cases = [
    dict(alg="maskgit_plus", steps=6), dict(alg="topk_margin", steps=11, eps=0.1),
    dict(alg="entropy", steps=20), dict(alg="entropy", steps=5, top_p=0.8, top_k=9),
    dict(alg="maskgit_plus", steps=7, top_p=0.6), dict(alg="origin", steps=1),
  ]  # fmt: skip
  for case in cases if name == "other" else cases[1::2]:
    settings = SamplerConfig(**{"max_new_tokens": 10, "temperature": 0.0, "top_p": 1.0, **case})
    sequences, history = generate(model, ids, attention_mask=seen, max_new_tokens=10, **case)
    assert torch.equal(sequences == mask_id, torch.nn.functional.pad(seen == 0, (0, 10)))
    for b, ours in enumerate(diffucoder_jax.generate(ckpt, rows, settings)):
      canvases = sampler.history(ours.trace, mask_id)
      for step in range(case["steps"]):
        row = history[step, b, length - len(rows[b]) :]
        mine = canvases[min(step, len(canvases) - 1), 0]
        np.testing.assert_array_equal(row, mine, err_msg=f"{name} {case} row {b} step {step}")


def test_a_row_does_not_depend_on_its_batch(model, shared):
  data = load_file(shared / "golden" / "sampler.safetensors")
  ids, seen = data["leftpad.input_ids"].long(), data["leftpad.attention_mask"]
  assert (seen == 0).any()
  arguments = dict(max_new_tokens=12, steps=9, alg="entropy", top_p=0.9)
  together, _ = generate(model, ids, attention_mask=seen, **arguments)
  for b, row in enumerate(ids):
    alone, _ = generate(model, row[None, seen[b] == 1], **arguments)
    assert torch.equal(alone[0], together[b, (seen[b] == 0).sum() :])


def test_mask_is_never_written(golden_folder, tmp_path):
  model = open_torch(mask_lover_folder(tmp_path, golden_folder))
  mask_id = model.config.mask_token_id
  ids = torch.arange(10, 40).reshape(2, 15)
  best = logits_of(model, torch.cat([ids, torch.full((2, 20), mask_id)], 1))[:, 14:-1].argmax(-1)
  assert (best == mask_id).float().mean() > 0.2  # it would be, if it could
  for alg in ("origin", "maskgit_plus", "topk_margin", "entropy"):
    for temperature in (0.0, 1.0):
      out = model.diffusion_generate(
        ids, max_new_tokens=20, steps=8, alg=alg, temperature=temperature
      )
      assert (out != mask_id).all() and torch.equal(out[:, :15], ids)


def test_schedule_is_that_of_our_sampler(model):
  """Rows of other mask counts in one batch; what each commits at each step."""
  mask_id = model.config.mask_token_id
  rows = torch.full((4, 30), 11)
  for b, holes in enumerate((1, 7, 16, 29)):
    rows[b, :holes] = mask_id
  for steps, eps in ((1, 1e-3), (8, 1e-3), (40, 1e-3), (12, 0.3)):
    _, history = generate(model, rows, max_new_tokens=3, steps=steps, eps=eps, alg="entropy")
    left = (rows == mask_id).sum(1).numpy() + 3
    ratios = remasking.commit_ratios(steps, eps)
    for step in range(steps):
      left = left - np.asarray(remasking.commit_count("entropy", left, step, steps, ratios[step]))
      np.testing.assert_array_equal((history[step] == mask_id).sum(1).numpy(), left)


def test_origin_and_drawn_positions_follow_their_law(model):
  """Commits of `origin` per step, and that alg_temp draws positions and keeps the count."""
  torch.manual_seed(0)
  ids, mask_id, steps = torch.arange(100, 108)[None].expand(64, -1), model.config.mask_token_id, 8
  _, history = generate(model, ids, max_new_tokens=32, steps=steps, alg="origin")
  left = torch.cat([torch.full((1, 64), 32), (history == mask_id).sum(-1)])
  mean = (left[:-1] - left[1:]).float().mean(1)
  assert (left[-1] == 0).all() and (mean - 32 / steps).abs().max() < 4.5 * (4 / 64) ** 0.5
  arguments = dict(max_new_tokens=32, steps=steps, alg="entropy")
  _, greedy = generate(model, ids[:4], **arguments)
  _, drawn = generate(model, ids[:4], alg_temp=5.0, **arguments)
  assert torch.equal((greedy == mask_id).sum(-1), (drawn == mask_id).sum(-1))
  where = [{tuple(row) for row in (h[0] == mask_id).tolist()} for h in (greedy, drawn)]
  assert len(where[0]) == 1 and len(where[1]) > 1


def test_arguments(model):
  ids = torch.arange(6)[None]
  base = dict(steps=4, alg="maskgit_plus")
  with pytest.raises(TypeError, match="'top_q'"):
    model.diffusion_generate(ids, top_q=0.9)
  wrong = dict(alg="best", steps=0, eps=0.0, temperature=-1.0, top_p=0.0, top_k=-1, alg_temp=-1.0)
  for name, value in wrong.items():
    with pytest.raises(ValueError, match=name):
      model.diffusion_generate(ids, **{name: value})
  for bad in (dict(max_length=5), dict(max_new_tokens=0), dict(max_new_tokens=600)):
    with pytest.raises(ValueError, match="max_new_tokens"):
      model.diffusion_generate(ids, **bad)
  assert model.diffusion_generate(ids, **base).shape == (1, 26)
  assert model.diffusion_generate(ids, max_length=9, **base).shape == (1, 9)
  both = model.diffusion_generate(ids, max_length=9, max_new_tokens=5, **base)
  assert both.shape == (1, 11)
  given = types.SimpleNamespace(alg="entropy", steps=3, max_new_tokens=5, top_k=None)
  _, history = generate(model, ids, generation_config=given, alg="maskgit_plus")
  assert torch.equal(
    history[-1], generate(model, ids, max_new_tokens=5, steps=3, alg="maskgit_plus")[0]
  )
  assert history.shape == (3, 1, 11)
  rows = model.diffusion_generate(
    ids, max_new_tokens=5, num_return_sequences=3, temperature=1.0, **base
  )
  assert rows.shape == (3, 11) and len(rows.unique(dim=0)) > 1


def make_tokenizer(folder):
  """A character-level tokenizer file whose special ids are the golden checkpoint's."""
  from tokenizers import Regex, Tokenizer, models, pre_tokenizers

  characters = [chr(i) for i in range(10, 127)]
  words = characters + [f"<unused_{i}>" for i in range(500 - len(characters))]
  special = ["<|mask|>", "<|pad|>", "<|endoftext|>", "<|begin|>"]
  tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="\n"))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
  tokenizer.add_special_tokens(special)
  names = dict(zip(("mask_token", "pad_token", "eos_token", "bos_token"), special, strict=True))
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
  fast.save_pretrained(folder)


def test_apples_demo_runs_with_only_the_path_changed(golden_folder, tmp_path):
  folder = shutil.copytree(golden_folder, tmp_path / "DiffuCoder-tiny.v1")
  make_tokenizer(folder)
  model = transformers.AutoModel.from_pretrained(
    folder, torch_dtype=torch.bfloat16, trust_remote_code=True
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
  model = model.to("cpu").eval()
  inputs = tokenizer("Write a function.\n", return_tensors="pt")
  output = model.diffusion_generate(
    inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_new_tokens=16,
    output_history=True,
    return_dict_in_generate=True,
    steps=16 // 1,
    temperature=0.3,
    top_p=0.95,
    alg="entropy",
    alg_temp=0.0,
  )
  generations = [
    tokenizer.decode(g[len(p) :].tolist())
    for p, g in zip(inputs.input_ids, output.sequences, strict=True)
  ]
  assert len(generations[0].split(tokenizer.eos_token)) >= 1 and len(output.history) == 16
  assert output.sequences.shape[1] == len("Write a function.\n") + 16
  assert (output.sequences != tokenizer.mask_token_id).all()


def test_the_file_that_travels_imports_nothing_of_ours():
  text = export.model_file().decode()
  imported = {
    node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
    for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.Import | ast.ImportFrom)
  }
  assert {name.split(".")[0] for name in imported} == {"dataclasses", "types", "torch", "transformers"}
  assert text.count("def diffusion_generate(") == text.count("class DiffuCoderModel(") == 1
