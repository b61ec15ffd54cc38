r"""Quality against network evaluations, on the quickstart's held-out problems: a sweep over `evaluate`.

python launch/sweep.py --config=configs/quickstart_frontier.py --program=evaluate --output=W/frontier \
  --config.checkpoint=W/sft --config.data_path=W/problems/test.jsonl

The keys are the flags of python -m diffucoder_jax.evaluate; None leaves a flag out. Any flag may be
added here and swept, each field of SamplerConfig among them.
"""

from ml_collections import config_dict


def get_config(arg=None):
  if arg is not None:
    raise ValueError(f"configs/quickstart_frontier.py takes no argument, got {arg!r}")
  c = config_dict.ConfigDict()
  c.checkpoint = ""
  c.benchmark = "problems"
  c.data_path = ""
  c.first = 128
  c.samples = 1
  c.seed = 0
  c.batch_size = 64
  c.chat = True
  c.system = ""
  c.max_new_tokens = 48
  c.steps = 48
  c.temperature = 0.0
  c.alg = "entropy"
  c.top_p = 1.0
  c.cpu_seconds = 1.0
  c.wall_seconds = 5.0
  return c


def sweep():
  """Steps, for the surest position first and for a random one, greedily and drawn."""
  for alg in ("entropy", "origin"):
    for temperature in (0.0, 0.6):
      for steps in (6, 12, 24, 48):
        yield {"alg": alg, "temperature": temperature, "steps": steps}
