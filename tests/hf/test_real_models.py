"""Real weights through the whole path: bits per byte of real models on real code.

The models are made by `shared/tools/real_models.py` (about 600 MB of downloads) into the folder
$DIFFUCODER_REAL_MODELS, or a temporary one.
"""

import dataclasses
import itertools
import pathlib
import sys
import textwrap

import jax
import numpy as np
import pytest

from diffucoder_jax import pretrained
from diffucoder_jax.completion import generate
from diffucoder_jax.diffusion import queue
from diffucoder_jax.diffusion.sampler import SamplerConfig

pytestmark = pytest.mark.slow
NUM_TOKENS = 512
TEXT = pathlib.Path(textwrap.__file__).read_text()[:6000]
# Autoregressive, float32, first 512 tokens of Python 3.11's textwrap.py: from the notes on those
# models in shared/benchmarks/README.md.
BITS_PER_BYTE = {"smollm2-135m": 0.89, "qwen2.5-coder-0.5b": 0.64}
NLL = {"qwen2.5-coder-0.5b": 1.92}


@pytest.mark.parametrize("name", sorted(BITS_PER_BYTE))
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the text is Python 3.11's textwrap.py")
def test_bits_per_byte(folder_of, name):
  ckpt = pretrained.from_pretrained(folder_of(name))
  assert ckpt.config.attention == "causal" and ckpt.config.tied_head
  ids = np.asarray(ckpt.tokenizer.encode(TEXT)[:NUM_TOKENS])
  logps_LV = np.asarray(jax.nn.log_softmax(pretrained.logits(ckpt, ids[None])[0]))
  nll_L = -logps_LV[np.arange(1, NUM_TOKENS), ids[1:]]
  num_bytes = ckpt.tokenizer.token_bytes()[ids[1:]].sum()
  assert nll_L.sum() / np.log(2) / num_bytes == pytest.approx(BITS_PER_BYTE[name], abs=0.01)
  if name in NLL:
    assert nll_L.mean() == pytest.approx(NLL[name], abs=0.01)


def test_the_qwen_folder_has_dreams_ids(folder_of):
  ckpt = pretrained.from_pretrained(folder_of("qwen2.5-coder-0.5b"), param_dtype="bfloat16")
  assert (ckpt.mask_id, ckpt.eos_id, ckpt.pad_id) == (151666, 151643, 151667)
  assert ckpt.mask_id < ckpt.config.vocab_size


def test_greedy_decoding_completes_is_prime(folder_of):
  """Autoregressive order, temperature 0, no cache: the function that comes out is right."""
  ckpt = pretrained.from_pretrained(folder_of("qwen2.5-coder-0.5b"))
  sampler = SamplerConfig(
    alg="left_to_right", max_new_tokens=96, temperature=0.0, top_p=1.0, stop_at_eos=True
  )
  (completion,) = generate(ckpt, ["def is_prime(n):\n"], sampler)
  first, *rest = completion.full_text.splitlines()
  body = itertools.takewhile(lambda line: not line.strip() or line.startswith(" "), rest)
  source = "\n".join([first, *body])
  namespace = {}
  exec(source, namespace)
  primes = [n for n in range(60) if namespace["is_prime"](n)]
  assert primes == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59], source


def test_neighbours_and_padding_change_no_token_of_a_real_model(folder_of):
  """135M weights as they are, denoised with full attention: any tokens do, they must not change."""
  ckpt = pretrained.from_pretrained(folder_of("smollm2-135m"))
  # SmolLM2 has no mask token; an id that its text never uses stands in for one.
  ckpt = dataclasses.replace(
    ckpt, mask_id=5, config=dataclasses.replace(ckpt.config, attention="full")
  )
  # The longest stands on a longer canvas, and the others beside it on as long a one.
  longest = "import os\n\n\ndef list_files(folder):\n  names = sorted(os.listdir(folder))\n  return ["
  prompts = ["def add(a, b):\n", longest, "x = "]
  lengths = [len(ckpt.tokenizer.encode(prompt)) + 16 for prompt in prompts]
  assert len({queue.bucket(length) for length in lengths}) > 1
  for temperature in (0.0, 0.8):
    sampler = SamplerConfig(
      alg="entropy", steps=8, max_new_tokens=16, temperature=temperature, top_p=0.95
    )
    together = generate(ckpt, prompts, sampler, seed=1, batch_size=3)
    alone = generate(ckpt, prompts, sampler, seed=1, batch_size=1)
    same = [_same_but_for_rounding(a.trace, b.trace) for a, b in zip(together, alone, strict=True)]
    assert all(same) if temperature == 0 else any(same)


def _same_but_for_rounding(a, b):
  """Whether two traces of a row are the same; where not, what was drawn from must be, up to that step.

  49,152 tokens share the line that a number is drawn on, so their borders stand close, and rows of other
  batches are rounded otherwise (by up to 1e-3 in these logits).
  """
  differs = (a.tokens != b.tokens) | (a.step != b.step)
  if not differs.any():
    return True
  first = np.minimum(a.step, b.step)[differs].min()
  np.testing.assert_array_equal(a.step == first, b.step == first)
  until = a.step <= first
  np.testing.assert_allclose(a.entropy[until], b.entropy[until], rtol=1e-3, atol=1e-3)
  return False
