r"""Stage 3: instruction tuning with a clean prompt and learnt length (paper, B.1).

python -m diffucoder_jax.train --config=configs/sft_7b.py --workdir=gs://BUCKET/sft \
  --config.init_from=gs://BUCKET/mid --config.data.path=FILE_OR_FOLDER

Five epochs over OpenCoder's 436,000 instructions, rows of 2,048 tokens. Prompts are noised in a
share of the rows that falls from one to nothing in the first epoch; responses are padded with
<|dlm_pad|> to the row's end, and the pads are noised and learnt. The paper took about 24 h on 64
H100; its batch size is not given, 128 is ours. Not run by us at this size; see configs/README.md.

  :0_5b  Qwen2.5-Coder-0.5B
  :tiny  seconds on a laptop; give --config.data.path and --config.tokenizer or --config.init_from
"""

from configs import adapt_7b

EXAMPLES, EPOCHS, BATCH = 436_000, 5, 128
EPOCH = EXAMPLES // BATCH


def get_config(arg=None):
  c = adapt_7b.base(arg, "sft_7b")
  c.objective.condition_steps = EPOCH
  c.data.source = "conversations"
  c.data.schema = "opencoder"
  c.data.system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
  c.data.on_broken = "skip"
  c.data.over_long = "drop"
  c.data.held_out = 0.005
  c.data.seq_len = 2048
  c.data.global_batch = BATCH
  c.optim.steps = EPOCHS * EPOCH
  c.optim.warmup_steps = EPOCHS * EPOCH // 10
  c.optim.lr = 1e-5
  if arg == "tiny":
    adapt_7b.shrink(c)
    c.objective.condition_steps = 4
    c.data.source = "conversations"
    c.data.system = ""
    c.data.held_out = 0.2
    c.data.seq_len = 96
  return c


def sweep():
  """The paper's comparison: fixed and flexible padding, with and without clean prompts at first."""
  for padding in ("fixed", "flexible"):
    for condition_steps in (0, EPOCH):
      yield {"data.padding": padding, "objective.condition_steps": condition_steps}
