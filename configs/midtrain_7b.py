r"""Stage 2: mid-training on small, clean code (paper, B.1).

python -m diffucoder_jax.train --config=configs/midtrain_7b.py --workdir=gs://BUCKET/mid \
  --config.init_from=gs://BUCKET/adapt --config.data.mixture.code.path=DIR

124,000 steps of 128 x 4,096 tokens: OpenCoder's 16 billion annealing tokens about four times; the
paper took 90 h on 64 A100, and saw nearly all of the gain in the first epoch. Not run by us at this
size; see configs/README.md for every value's source.

  :0_5b  Qwen2.5-Coder-0.5B
  :tiny  seconds on a laptop; give --config.init_from, or --config.tokenizer
"""

from ml_collections import config_dict

from configs import adapt_7b


def get_config(arg=None):
  c = adapt_7b.base(arg, "midtrain_7b")
  c.objective.truncate_prob = 0.01
  c.objective.prefix_prob = 0.01
  c.data.source = "mixture"
  c.data.mixture = config_dict.create(code=config_dict.create(path="", share=1.0))
  c.data.seq_len = 4096
  c.data.global_batch = 128
  c.optim.steps = 124_000
  c.optim.warmup_steps = 2000
  c.optim.lr = 1e-5
  return adapt_7b.shrink(c) if arg == "tiny" else c


def sweep():
  """One epoch or four."""
  for steps in (31_000, 124_000):
    yield {"optim.steps": steps}
