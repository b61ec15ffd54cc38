r"""The smallest run that goes through everything: for tests and for debugging on a laptop.

python -m diffucoder_jax.train --config=configs/tiny.py --workdir=/tmp/tiny --config.tokenizer=TOKENIZER

12 steps, a few seconds after compilation; the loss falls from about 18 to about 9.

  :ar     the autoregressive objective
  :adapt  diffusion from --config.init_from, attention annealed over the first half
"""

from configs import common


def get_config(arg=None):
  c = common.base("tiny")
  c.data.on_undecodable = "skip"
  c.data.seq_len = 64
  c.data.global_batch = 8
  c.optim.steps = 12
  c.optim.lr = 3e-3
  c.optim.warmup_steps = 2
  c.checkpoint.every = 4
  c.eval.every = 6
  c.eval.rows = 16
  c.eval.draws = 2
  c.log.every = 1
  if arg == "ar":
    c.objective.kind = "autoregressive"
  elif arg == "adapt":
    c.objective.anneal_steps = 6
  elif arg is not None:
    raise ValueError(f"configs/tiny.py knows the arguments 'ar' and 'adapt', got {arg!r}")
  return c


def sweep():
  """Learning rates worth trying first."""
  for lr in (1e-3, 3e-3, 1e-2):
    yield {"optim.lr": lr}
