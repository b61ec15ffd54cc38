r"""A small autoregressive model of Python, on the standard library: what adaptation starts from.

python -m diffucoder_jax.train --config=configs/quickstart_ar.py --workdir=WORKDIR/ar \
  --config.tokenizer=WORKDIR/tokenizer.model
"""

from configs import common

STEPS = 600


def get_config(arg=None):
  if arg is not None:
    raise ValueError(f"configs/quickstart_ar.py takes no argument, got {arg!r}")
  c = common.base("small", max_seq_len=256)
  c.objective.kind = "autoregressive"
  c.data.on_undecodable = "skip"
  c.data.seq_len = 128
  c.data.global_batch = 32
  c.optim.steps = STEPS
  c.optim.lr = 4e-3
  c.optim.warmup_steps = 40
  c.checkpoint.every = 200
  c.eval.every = 200
  c.eval.rows = 128
  c.log.every = 5
  return c
