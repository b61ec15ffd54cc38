"""Masked diffusion language models for code, in JAX: DiffuCoder's training, sampling and analysis.

The three functions a notebook needs, and the sampler's settings, are loaded on first use:

  ckpt = diffucoder_jax.from_pretrained(path)
  logits = diffucoder_jax.logits(ckpt, tokens)
  completions = diffucoder_jax.generate(ckpt, prompts, sampler=diffucoder_jax.SamplerConfig())
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
  "from_pretrained": "diffucoder_jax.pretrained",
  "Pretrained": "diffucoder_jax.pretrained",
  "Completion": "diffucoder_jax.completion",
  "logits": "diffucoder_jax.pretrained",
  "generate": "diffucoder_jax.completion",
  "SamplerConfig": "diffucoder_jax.diffusion.sampler",
}
__all__ = ["Completion", "Pretrained", "SamplerConfig", "from_pretrained", "generate", "logits"]


def __getattr__(name):
  # The program `python -m diffucoder_jax.generate` shares its name with the function. Programs are
  # run, never imported, so the name always means the function here.
  if name in _PUBLIC:
    return getattr(importlib.import_module(_PUBLIC[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
