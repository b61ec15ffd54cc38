r"""The quickstart's coupled-GRPO, on its small programming problems: stage 4 of the paper, in small.

python -m diffucoder_jax.train_grpo --config=configs/quickstart_grpo.py --workdir=W/grpo \
  --config.init_from=W/sft --config.problems.path=W/problems/train.jsonl \
  --config.problems.eval_path=W/problems/test.jsonl

It runs; what it gains, and how long it takes, was not measured yet: the values are first guesses.
"""

from configs import grpo_7b


def get_config(arg=None):
  if arg not in (None, "decoupled", "full_mask"):
    raise ValueError(f"configs/quickstart_grpo.py knows 'decoupled' and 'full_mask', got {arg!r}")
  c = grpo_7b.base()
  c.problems.set = "problems"
  c.rollout.max_prompt_tokens = 48
  c.rollout.system = ""
  c.sampler.max_new_tokens = 48
  c.sampler.steps = 12
  c.sampler.temperature = 0.8
  c.sampler.top_p = 1.0
  c.grpo.prompts = 16
  c.grpo.num_generations = 8
  c.grpo.num_iterations = 2
  c.estimator.name = arg or "coupled"
  c.optim.steps = 40
  c.optim.lr = 1e-4
  c.optim.warmup_steps = 2
  c.checkpoint.every = 10
  c.eval.every = 20
  c.eval.problems = 128
  c.log.every = 1
  return c


def sweep():
  """The paper's ablation, three seeds each."""
  for estimator in ("coupled", "decoupled", "full_mask"):
    for seed in (0, 1, 2):
      yield {"estimator.name": estimator, "seed": seed}
