"""The sections every config starts from. Values only; each key is read in exactly one module."""

from ml_collections import config_dict

from diffucoder_jax.model.config import preset


def base(model, **model_changes):
  """All sections with defaults, unlocked.

  Args:
    model: name of a preset (`diffucoder_jax.model.config.PRESETS`).
    **model_changes: `ModelConfig` fields to change.
  """
  c = config_dict.ConfigDict()
  c.seed = 0
  c.tokenizer = ""  # tokenizer.model, tokenizer.json or a folder with one; "": that of init_from
  c.init_from = ""  # workdir, checkpoint or Hugging Face folder to take parameters from; "": fresh
  # One of the three may be -1: "the rest".
  c.mesh = config_dict.create(data=1, fsdp=-1, tensor=1)
  c.model = config_dict.create(**{**preset(model), **model_changes})
  c.objective = config_dict.create(
    kind="diffusion",
    anneal_steps=0,
    t_sampler="uniform",
    weight="1/t",
    normaliser="masked",
    truncate_prob=0.0,
    prefix_prob=0.0,
    condition_steps=0,
  )
  c.data = config_dict.create(
    # Texts, tokenised at start: stdlib, folder, jsonl, parquet, array_record or tfds. Tokenised by
    # `prepare dataset`: mixture. Instruction data: conversations.
    source="stdlib",
    path="",
    pattern="**/*.py",
    text_key="content",
    held_out=0.05,  # share of the documents, by hash
    unit="file",  # what a document is; "function": each Python function, cleaned
    on_undecodable="error",  # or "skip", which counts and names them
    seq_len=256,
    global_batch=32,
    fill_batch=False,  # fills a batch that the mesh does not divide up with empty rows
    mixture=config_dict.create(),  # name=config_dict.create(path=DIR of `prepare dataset`, share=...)
    # Of conversations only:
    schema="",  # opencoder, leetcode, messages, ...; see diffucoder_jax/data/instructions.py
    on_broken="error",  # or "skip", which counts and names them
    system="",  # the system message where a conversation has none
    padding="fixed",  # all pads of a row are learnt; "flexible": `flexible_pads` of them
    flexible_pads=32,
    over_long="error",  # or "truncate", "drop"
  )
  c.optim = config_dict.create(
    steps=1000,
    lr=3e-4,
    warmup_steps=100,
    schedule="cosine",
    lr_floor=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decay="matrices",
    clip_norm=1.0,
    accumulate=1,
    rounding="nearest",  # of bfloat16 parameters; or "master", "stochastic"
    moment_dtype="float32",  # of the first moment; or "bfloat16"
  )
  c.checkpoint = config_dict.create(every=1000, keep=3, keep_every=0, accept_changes=False)
  # `samples` beginnings of held-out rows (0: none) are continued by `sample_tokens` at each evaluation.
  c.eval = config_dict.create(
    every=1000, rows=64, draws=8, samples=0, sample_tokens=64, sample_steps=32
  )
  # A process that finishes no step for so long ends, so that launchers start all again; 0: never.
  c.hosts = config_dict.create(hang_seconds=1800.0)
  c.log = config_dict.create(every=10, tensorboard=False, wandb=False)
  return c
