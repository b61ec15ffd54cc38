"""Loads an exported folder in PyTorch and here, and compares: logits, token ids, generation.

  python launch/check_export.py FOLDER [--text 'def f(x):' ...] [--new-tokens 16]

Needs torch and transformers (`pip install -e '.[torch]'`), no network. Float32 on CPU. Ends with
exit code 1 when any generated token differs, or logits differ by more than 1e-4 and by more than
twice what PyTorch differs from itself when it runs the rows one by one: large weights, or weights
that run in another pattern than they were trained for, have no 1e-4 in float32. Where they do differ
by more, PyTorch runs again in float64 (twice the memory), and ours may be as far from that as PyTorch
in float32 is: on some processors that is 5e-4 for a model of 0.5B.
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # what an export needs lies in its folder

import jax
import numpy as np
import torch
import transformers

import diffucoder_jax
from diffucoder_jax.diffusion.sampler import SamplerConfig

TEXTS = ("def is_prime(n):\n", "import os\n\n\ndef main():\n\tprint('\u2581 caf\u00e9')\r\n")
# `origin` chooses positions at random, so its one deterministic case is a single step.
CASES = {"maskgit_plus": 0, "topk_margin": 0, "entropy": 0, "origin": 1}
TOLERANCE = 1e-4


def left_padded(rows, pad_id):
  """(ids [B, L], valid [B, L]) of rows of different lengths."""
  length = max(map(len, rows))
  ids_BL = np.full((len(rows), length), max(pad_id, 0))
  valid_BL = np.zeros((len(rows), length), bool)
  for b, row in enumerate(rows):
    ids_BL[b, length - len(row) :], valid_BL[b, length - len(row) :] = row, True
  return ids_BL, valid_BL


def same_ids(folder, texts, rows):
  """Whether `transformers` makes `rows` of the texts; prints how it must be asked to."""

  def made_by(tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

  chosen = transformers.AutoTokenizer.from_pretrained(folder)
  if made_by(chosen) == rows:
    print("token ids: the same")
    return True
  # 5.24 makes Qwen's tokenizer of any that stands beside Qwen2 weights: its vocabulary, Qwen's rules.
  if made_by(transformers.PreTrainedTokenizerFast.from_pretrained(folder)) == rows:
    print(
      "token ids: the same with PreTrainedTokenizerFast.from_pretrained, but NOT with AutoTokenizer, "
      f"which in this version makes a {type(chosen).__name__} of it: use the former"
    )
    return True
  print("token ids: DIFFERENT")
  return False


def torch_logits(model, ids_BL, valid_BL):
  """The PyTorch side's logits, shifted to their targets as ours are: [:, i] scores token i + 1."""
  valid_BL = torch.tensor(valid_BL.astype(np.int64))
  with torch.no_grad():
    return model(torch.tensor(ids_BL), attention_mask=valid_BL).logits.numpy()[:, :-1]


def same_logits(ckpt, model, rows, ids_BL, valid_BL):
  """Whether logits of real positions agree, as the first lines say; prints the largest difference."""
  ours_BLV = np.asarray(diffucoder_jax.logits(ckpt, ids_BL, valid_BL))[:, 1:]
  theirs_BLV = torch_logits(model, ids_BL, valid_BL)
  both_BL = valid_BL[:, 1:] & valid_BL[:, :-1]
  themselves = 0.0
  for row, theirs_LV, both_L in zip(rows, theirs_BLV, both_BL, strict=True):
    alone_LV = torch_logits(model, np.asarray([row]), np.ones((1, len(row)), bool))[0]
    themselves = max(themselves, float(np.abs(theirs_LV[both_L] - alone_LV).max()))
  largest = lambda a_BLV, b_BLV: float(np.abs(a_BLV - b_BLV)[both_BL].max())  # noqa: E731
  difference, exact = largest(ours_BLV, theirs_BLV), ""
  good = difference <= max(TOLERANCE, 2 * themselves)
  if not good:
    exact_BLV = torch_logits(model.double(), ids_BL, valid_BL)
    model.float()
    ours, theirs = largest(ours_BLV, exact_BLV), largest(theirs_BLV, exact_BLV)
    good = ours <= max(TOLERANCE, theirs)
    exact = f"; from PyTorch in float64: ours {ours:.1e}, PyTorch in float32 {theirs:.1e}"
  print(
    f"logits, batch of {len(rows)}, left-padded: largest difference {difference:.1e} (PyTorch from "
    f"itself, row by row: {themselves:.1e}{exact})"
  )
  return good


def generate_both(ckpt, model, rows, ids_BL, valid_BL, alg, steps, new_tokens):
  """New tokens of both sides at temperature 0, each [B, new_tokens]."""
  steps = steps or new_tokens
  sampler = SamplerConfig(
    alg=alg, steps=steps, max_new_tokens=new_tokens, temperature=0.0, top_p=0.95
  )
  ours = [completion.tokens for completion in diffucoder_jax.generate(ckpt, rows, sampler)]
  theirs = model.diffusion_generate(
    torch.tensor(ids_BL), attention_mask=torch.tensor(valid_BL.astype(np.int64)),
    max_new_tokens=new_tokens, steps=steps, alg=alg, temperature=0.0, top_p=0.95,
  )  # fmt: skip
  return np.stack(ours), theirs[:, ids_BL.shape[1] :].numpy()


def main():
  """Prints a line per comparison; returns whether all of them hold."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder")
  parser.add_argument("--text", nargs="+", default=TEXTS)
  parser.add_argument("--new-tokens", type=int, default=16)
  args = parser.parse_args()
  versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
  print(f"{args.folder} in {versions} and in jax {jax.__version__}")

  ckpt = diffucoder_jax.from_pretrained(args.folder, param_dtype="float32")
  full = ckpt.config.attention == "full"
  kind = transformers.AutoModel if full else transformers.AutoModelForCausalLM
  model = kind.from_pretrained(
    args.folder, torch_dtype=torch.float32, trust_remote_code=full
  ).eval()

  good = True
  if ckpt.tokenizer is not None:
    rows = [ckpt.tokenizer.encode(text) for text in args.text]
    good &= same_ids(args.folder, args.text, rows)
  else:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, ckpt.config.vocab_size, n).tolist() for n in (7, 12)]
  ids_BL, valid_BL = left_padded(rows, ckpt.pad_id)

  good &= same_logits(ckpt, model, rows, ids_BL, valid_BL)
  for alg, steps in CASES.items() if full else ():
    ours, theirs = generate_both(ckpt, model, rows, ids_BL, valid_BL, alg, steps, args.new_tokens)
    print(f"{alg}: {int((ours == theirs).sum())} of {ours.size} new tokens are the same")
    good &= bool((ours == theirs).all())
  return good


if __name__ == "__main__":
  sys.exit(0 if main() else "the export and the original DIFFER: see above")
