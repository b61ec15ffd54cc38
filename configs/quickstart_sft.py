r"""The quickstart's instruction tuning, on small programming problems: stage 3 of the paper, in small.

python -m diffucoder_jax.prepare problems --config=configs/quickstart_sft.py --output=W/problems
python -m diffucoder_jax.train --config=configs/quickstart_sft.py --workdir=W/sft \
  --config.init_from=W/mid --config.data.path=W/problems/train.jsonl
"""

from ml_collections import config_dict

from configs import quickstart_adapt


def get_config(arg=None):
  if arg is not None:
    raise ValueError(f"configs/quickstart_sft.py takes no argument, got {arg!r}")
  c = quickstart_adapt.get_config()
  c.problems = config_dict.create(train=3000, test=200)  # made by `prepare problems`
  c.objective.anneal_steps = 0
  c.objective.truncate_prob = 0.0
  c.objective.prefix_prob = 0.0
  # Prompts are noised in a share of the rows that falls to nothing: the paper's first of five epochs.
  c.objective.condition_steps = 200
  # The paper's loss divides by t. With rows this short that is mostly noise: see the sweep.
  c.objective.weight = "none"
  c.data.source = "conversations"
  c.data.schema = "opencoder"
  c.data.seq_len = 112
  c.data.global_batch = 16
  c.optim.steps = 1000
  c.optim.warmup_steps = 50
  c.optim.lr = 3e-3
  c.eval.every = 500
  c.eval.rows = 64
  return c


def sweep():
  """The paper's weight, and learning rates around the one that is set."""
  for weight in ("none", "1/t"):
    for lr in (1.5e-3, 3e-3):
      yield {"objective.weight": weight, "optim.lr": lr}
