r"""Stage 1: Qwen2.5-Coder becomes a diffusion model while its attention opens (paper, section 3, B.1).

python -m diffucoder_jax.convert --source QWEN_FOLDER --target START --new-tokens mean
python -m diffucoder_jax.train --config=configs/adapt_7b.py --workdir=gs://BUCKET/adapt \
  --config.init_from=START --config.data.mixture.code.path=DIR --config.data.mixture.web.path=DIR \
  --config.data.mixture.math.path=DIR

100,000 steps of 160 x 4,096 tokens, 65.5 billion in all; the paper took 40 h on 80 H100. Not run by
us at this size: what was checked is that it builds, lowers and partitions (tests/test_configs.py).
Every value's source is in configs/README.md.

  :0_5b  Qwen2.5-Coder-0.5B, the same recipe
  :tiny  seconds on a laptop: fresh weights, the standard library, all switches of the recipe on;
         give --config.tokenizer
"""

from ml_collections import config_dict

from configs import common

SIZES = {None: "diffucoder_7b", "0_5b": "qwen2_5_coder_0_5b"}


def base(arg, name):
  """What stages 1 to 3 share, at the size that `arg` names."""
  if arg not in (*SIZES, "tiny"):
    raise ValueError(f"configs/{name}.py knows the arguments '0_5b' and 'tiny', got {arg!r}")
  c = common.base("tiny" if arg == "tiny" else SIZES[arg])
  if arg != "tiny":
    c.model.attention = "full"
    c.model.attention_impl = "splash"  # on TPU; blockwise elsewhere and while attention anneals
    c.model.frozen_input_id = 151643  # Dream's padding_idx; see the model's config
    c.checkpoint.every = 1000
    c.checkpoint.keep_every = 10_000
    c.eval.every = 1000
    c.eval.rows = 128
    c.eval.samples = 4
  # "Adam"; the paper gives no betas, decay or clipping. Decay 0 is plain Adam.
  c.optim.weight_decay = 0.0
  c.optim.lr_floor = 0.1
  return c


def shrink(c):
  """Turns a full-size recipe into one of 12 steps on the standard library."""
  c.data.source = "stdlib"
  c.data.on_undecodable = "skip"
  c.data.seq_len = 64
  c.data.global_batch = 8
  c.optim.steps = 12
  c.optim.warmup_steps = 3
  c.optim.lr = 3e-3
  c.checkpoint.every = 6
  c.eval.every = 6
  c.eval.rows = 16
  c.eval.draws = 2
  c.log.every = 1
  return c


def get_config(arg=None):
  c = base(arg, "adapt_7b")
  c.objective.anneal_steps = 10_000
  c.objective.truncate_prob = 0.01
  c.objective.prefix_prob = 0.01
  # Tokens times the paper's weights: 330 B, 55 B + 33 B, and 3 B three times.
  c.data.source = "mixture"
  c.data.mixture = config_dict.create(
    code=config_dict.create(path="", share=330.0),
    web=config_dict.create(path="", share=88.0),
    math=config_dict.create(path="", share=9.0),
  )
  c.data.seq_len = 4096
  c.data.global_batch = 160
  c.optim.steps = 100_000
  c.optim.warmup_steps = 20_000
  c.optim.lr = 2e-5
  if arg == "tiny":
    shrink(c)
    c.objective.anneal_steps = 6
    c.model.attention_impl = "blockwise"
  return c


def sweep():
  """Is annealing needed? DiffuLLaMA's own 7B run went without."""
  for steps in (0, 1000, 10_000):
    yield {"objective.anneal_steps": steps}
