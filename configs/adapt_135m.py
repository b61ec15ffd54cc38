r"""Real weights on a laptop: SmolLM2-135M becomes a diffusion model of Python, stage 1 in small.

python -m diffucoder_jax.convert --source SMOLLM2_FOLDER --target START --new-tokens mean \
  --reuse '<filename>' '<gh_stars>' '<issue_start>'
python -m diffucoder_jax.train --config=configs/adapt_135m.py --workdir=W --config.init_from=START
"""

from configs import common


def get_config(arg=None):
  if arg is not None:
    raise ValueError(f"configs/adapt_135m.py takes no argument, got {arg!r}")
  c = common.base("smollm2_135m", remat="none")
  c.objective.t_sampler = "stratified"
  c.objective.anneal_steps = 25
  c.objective.truncate_prob = 0.01
  c.objective.prefix_prob = 0.01
  c.data.source = "stdlib"
  c.data.on_undecodable = "skip"
  c.data.seq_len = 128
  c.data.global_batch = 4
  c.optim.steps = 250
  c.optim.lr = 2e-4
  c.optim.warmup_steps = 25
  c.optim.weight_decay = 0.0
  c.checkpoint.every = 50
  c.checkpoint.keep = 1
  c.eval.every = 25
  c.eval.rows = 32
  c.eval.draws = 2
  c.log.every = 1
  return c
