r"""Masked diffusion from the quickstart's autoregressive model: stage 1 of the paper, in small.

python -m diffucoder_jax.train --config=configs/quickstart_adapt.py --workdir=W/adapt \
  --config.init_from=W/ar

Seen on 2 CPU cores (Intel Xeon, Python 3.11.7's library, 2026-11-30): at most 2.426 ± 0.047 held-out bits
per byte; from scratch 2.618 ± 0.050; a unigram model has 2.806. In 44 and 57 s of training, one after the
other; in 56 and 83 s side by side.

  :scratch  the same network and data from fresh weights, with full attention from the start, for as
            many steps as the autoregressive model and its adaptation took together
"""

from configs import quickstart_ar


def get_config(arg=None):
  c = quickstart_ar.get_config()
  c.objective.kind = "diffusion"
  # DiffuLLaMA draws t independently per row; spread evenly over the batch, the loss varies less.
  c.objective.t_sampler = "stratified"
  if arg is None:
    c.optim.steps = 350
    c.objective.anneal_steps = 35  # a tenth, as the paper: 10,000 of 100,000
    c.objective.truncate_prob = 0.01
    c.objective.prefix_prob = 0.01
  elif arg == "scratch":
    c.optim.steps = 600
  else:
    raise ValueError(f"configs/quickstart_adapt.py knows the argument 'scratch', got {arg!r}")
  return c
