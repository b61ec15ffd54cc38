"""What `convert` writes, run by PyTorch: the check that users are given, on small and real weights."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from packaging import version

from diffucoder_jax import convert as program
from diffucoder_jax import pretrained
from diffucoder_jax.data.tokenizer import load_tokenizer
from tests import tiny
from tests.hf import folders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.slow]


def check(folder, *flags):
  """Runs launch/check_export.py in a process of its own, without network. Returns (code, output)."""
  command = [sys.executable, str(tiny.ROOT / "launch" / "check_export.py"), str(folder), *flags]
  done = subprocess.run(
    command, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(folder / "hf_home")}
  )
  return done.returncode, done.stdout + done.stderr


def test_the_golden_checkpoint(shared, tmp_path):
  program.convert(shared / "golden" / "checkpoint", tmp_path / "hf", to="hf", shard_size="100KB")
  code, text = check(tmp_path / "hf")
  assert code == 0, text
  assert text.count("32 of 32 new tokens are the same") == 4


@pytest.mark.parametrize("kind", ["Dream", "qwen2-tied", "llama"])
def test_with_our_tokenizer(tmp_path, tmp_path_factory, kind):
  tokenizer = load_tokenizer(tiny.make_home(tmp_path_factory.getbasetemp()).tokenizer)
  ids = dict(mask_token_id=tokenizer.mask_id, eos_token_id=tokenizer.eos_id, pad_token_id=0)
  # Of small weights all places are equally sure, but for rounding.
  folders.make(tmp_path / "source", kind, np.float32, scale=0.5, vocab_size=400, **ids)
  tokenizer.save(tmp_path / "source")
  program.convert(tmp_path / "source", tmp_path / "orbax")
  program.convert(tmp_path / "orbax", tmp_path / "hf")
  code, text = check(tmp_path / "hf")
  assert code == 0, text
  assert "token ids: the same" in text
  takes_qwens = kind == "qwen2-tied" and version.parse(transformers.__version__) >= version.parse("5.24")
  assert takes_qwens or "NOT with AutoTokenizer" not in text
  assert text.count("32 of 32 new tokens are the same") == (4 if kind == "Dream" else 0)


def test_the_check_can_fail(tmp_path):
  folders.make(tmp_path / "source", "Dream", np.float32)
  program.convert(tmp_path / "source", tmp_path / "hf", to="hf")
  model = tmp_path / "hf" / "modeling_diffucoder.py"
  before = model.read_text()
  assert "rsqrt" in before
  model.write_text(before.replace("rsqrt", "sqrt", 1))
  code, text = check(tmp_path / "hf")
  assert code != 0 and "DIFFER" in text


def test_dreams_own_code_is_pointed_at(tmp_path):
  folders.make(tmp_path / "source", "Dream", np.float32)
  program.convert(tmp_path / "source", tmp_path / "hub", to="hf", remote_code="dream")
  config = json.loads((tmp_path / "hub" / "config.json").read_text())
  assert config["auto_map"]["AutoModel"] == (
    "Dream-org/Dream-v0-Instruct-7B--modeling_dream.DreamModel"
  )
  assert config["architectures"] == ["DreamModel"]
  assert not (tmp_path / "hub" / "modeling_diffucoder.py").exists()
  for name in ("configuration_dream.py", "modeling_dream.py", "generation_utils.py"):
    (tmp_path / "source" / name).write_text(f"# {name}")
  program.convert(tmp_path / "source", tmp_path / "local", to="hf", remote_code="dream")
  config = json.loads((tmp_path / "local" / "config.json").read_text())
  assert config["auto_map"]["AutoModel"] == "modeling_dream.DreamModel"
  assert (tmp_path / "local" / "modeling_dream.py").read_text() == "# modeling_dream.py"
  folders.make(tmp_path / "plain", "Dream", np.float32, attention_bias=False)
  with pytest.raises(ValueError, match="use --remote-code own"):
    program.convert(tmp_path / "plain", tmp_path / "no", to="hf", remote_code="dream")


def test_real_weights(folder_of, tmp_path):
  """Qwen2.5-Coder-0.5B through Orbax: by transformers' own class, and by ours in Dream's layout."""
  real = folder_of("qwen2.5-coder-0.5b")
  program.convert(real, tmp_path / "orbax")
  program.convert(tmp_path / "orbax", tmp_path / "causal", shard_size="300MB")
  code, text = check(tmp_path / "causal")
  assert code == 0, text
  assert "token ids: the same" in text
  assert "NOT with AutoTokenizer" not in text

  config = json.loads((tmp_path / "orbax" / "config.json").read_text())
  source = tmp_path / "source"
  source.mkdir()
  for name in ("model.safetensors", "tokenizer.json"):
    (source / name).symlink_to(real / name)
  ids = dict(mask_token_id=151666, pad_token_id=151643, eos_token_id=151643)
  dream = config["hf_config"] | dict(model_type="Dream", attention_bias=True) | ids
  (source / "config.json").write_text(json.dumps(dream))
  program.convert(source, tmp_path / "full", to="hf")
  code, text = check(tmp_path / "full", "--new-tokens", "8")
  assert code == 0, text
  assert text.count("16 of 16 new tokens are the same") == 4

  # Our file with these weights in the pattern they were trained for.
  ckpt = pretrained.from_pretrained(tmp_path / "full", param_dtype="float32")
  model = transformers.AutoModel.from_pretrained(
    tmp_path / "full", torch_dtype=torch.float32, trust_remote_code=True
  )
  tokens = np.asarray([ckpt.tokenizer.encode("def is_prime(n):\n    for i in range(2, n):\n")])
  causal = torch.tril(torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens), attention_mask=causal).logits.numpy()
  ours = np.asarray(pretrained.logits(ckpt, tokens, attention="causal"))
  np.testing.assert_allclose(ours[:, 1:], theirs[:, :-1], atol=1e-4)
