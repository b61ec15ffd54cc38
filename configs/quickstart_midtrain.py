r"""The quickstart's diffusion model on cleaned functions: stage 2 of the paper, in small.

python -m diffucoder_jax.train --config=configs/quickstart_midtrain.py --workdir=W/mid \
  --config.init_from=W/adapt

Seen on 2 CPU cores (AMD EPYC, Python 3.11.2's library, 2026-11-21): 22 s in all, at most 2.522 ± 0.065
bits per byte of held-out functions; a unigram model has 3.084.
"""

from configs import quickstart_adapt


def get_config(arg=None):
  if arg is not None:
    raise ValueError(f"configs/quickstart_midtrain.py takes no argument, got {arg!r}")
  c = quickstart_adapt.get_config()
  c.objective.anneal_steps = 0
  c.data.unit = "function"
  c.optim.steps = 60
  c.optim.warmup_steps = 6
  c.optim.lr = 1.5e-3
  c.eval.every = 30
  c.eval.rows = 64
  return c
