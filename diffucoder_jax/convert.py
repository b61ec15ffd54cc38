"""Hugging Face folder to Orbax checkpoint and back, streamed: no machine holds the model even once.

  python -m diffucoder_jax.convert --source HF_FOLDER --target WORKDIR         (train from it, or sample)
  python -m diffucoder_jax.convert --source WORKDIR --target HF_FOLDER         (hand it to PyTorch)
  python -m diffucoder_jax.convert --verify HF_FOLDER                          (against its manifest)

A source is a Hugging Face folder (Qwen2, Llama or Dream layout), a workdir (its newest checkpoint),
or checkpoints/<step>, written on any mesh. A target appears under its name only when it is whole.
All paths may be gs://, where there is no renaming: there config.json is what is written last.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
from etils import epath

from diffucoder_jax import pretrained
from diffucoder_jax.hf import export, mapping, shards, tokenizer_files, weights
from diffucoder_jax.runtime import checkpoint, streaming

DTYPES = ("bfloat16", "float32")
FORMATS = ("hf", "orbax")


def parse_arguments(argv=None):
  """Command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  flag = parser.add_argument
  flag("--source", help="Hugging Face folder, workdir, or checkpoints/<step>")
  flag("--target", help="folder to make")
  flag("--verify", metavar="FOLDER", help="compare an exported folder with its manifest.json")
  flag("--format", choices=FORMATS, help="of the target; default: the other one than the source's")
  flag("--dtype", choices=DTYPES, help="to store; default: the source's")
  flag("--shard-size", default="5GB", help="largest safetensors file (default 5GB)")
  flag("--remote-code", choices=export.REMOTE_CODE, default="own",
       help="own: our PyTorch file travels along; dream: point at Dream's published code")  # fmt: skip
  flag("--new-tokens", choices=weights.NEW_ROWS,
       help="add <|beginoftext|>, <|mask|> and <|dlm_pad|> to a Qwen vocabulary, and how their\n"
       "rows begin: mean of the known rows (take this one if unsure), normal (drawn around it),\n"
       "keep (what the spare row holds). Default: add nothing")  # fmt: skip
  flag("--reuse", nargs=3, metavar="TOKEN", default=(),
       help="with --new-tokens, where a vocabulary has no spare rows: its special tokens that become\n"
       "<|beginoftext|>, <|mask|> and <|dlm_pad|>")  # fmt: skip
  flag("--overwrite", action="store_true", help="replace a target that exists")
  args = parser.parse_args(argv)
  if not args.verify and not (args.source and args.target):
    parser.error("give --source and --target, or --verify FOLDER")
  if args.reuse and not args.new_tokens:
    parser.error("--reuse needs --new-tokens: say how the rows of these tokens begin")
  return args


def progress(total):
  """A function to call with bytes done; prints a line with the remaining time now and then."""
  start, done, shown = time.monotonic(), 0, time.monotonic()

  def advance(num_bytes):
    nonlocal done, shown
    done, now = done + num_bytes, time.monotonic()
    if now - shown > 5:
      shown, left = now, (now - start) * (total - done) / done
      print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {left:.0f} s left", file=sys.stderr)

  return advance


@contextlib.contextmanager
def appearing(target, overwrite):
  """A folder to write into that takes the name `target` when all went well, and not before.

  Raises:
    FileExistsError: something is there and `overwrite` is False.
  """
  target = epath.Path(target)
  taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
  if taken and not overwrite:
    raise FileExistsError(f"{target} exists; name another --target, or replace it with --overwrite")
  if "://" in str(target):  # Nothing is renamed over there; see the module's docstring.
    if taken:
      target.rmtree()
    yield target
    return
  target = epath.Path(target.absolute())
  part = target.parent / f"{target.name}.partial"
  if part.exists():  # of a conversion that was killed
    part.rmtree()
  part.mkdir(parents=True)
  try:
    yield part
  except Exception:
    part.rmtree()
    raise
  if target.exists():
    target.rmtree() if target.is_dir() else target.unlink()
  part.rename(target)


def source_weights(described, path, stack):
  """The source's `weights.Weights`."""
  if described.is_hf:
    return weights.from_folder(path, described.config, stack)
  return weights.from_checkpoint(path, described.config)


def token_ids(described, tokenizer):
  """What config.json of the target says of special tokens: {"mask_token_id": int or None, ...}."""

  def named(key, otherwise):
    raw = mapping.raw_id(described.hf_config, key)
    return raw if raw is not None else otherwise if otherwise >= 0 else None

  known = lambda name: -1 if tokenizer is None else getattr(tokenizer, name)  # noqa: E731
  return {
    "mask_token_id": named("mask_token_id", known("mask_id")),
    "eos_token_id": named("eos_token_id", known("eos_id")),
    "bos_token_id": named("bos_token_id", known("bos_id")),
    # PyTorch freezes this row of the embedding, so it is named only where we freeze it too.
    "pad_token_id": named("pad_token_id", described.config.frozen_input_id),
  }


def add_tokens(folder, described, opened, init, reuse):
  """Adds the diffusion tokens to the tokenizer in `folder` and gives them rows.

  Returns:
    (`weights.Weights`, id of the mask).
  """
  if not described.is_hf or described.config.attention != "causal":
    raise ValueError(
      "--new-tokens is for autoregressive Hugging Face folders; what was trained on masks has its "
      "tokens, and other rows would undo that"
    )
  ids = tokenizer_files.add_diffusion_tokens(folder, reuse)
  if max(ids.values()) >= described.config.vocab_size:
    raise ValueError(
      f"{max(ids, key=ids.get)} would be token {max(ids.values())}, and vocab_size is "
      f"{described.config.vocab_size}: there is no spare row for it, and tables are not resized; name "
      "three special tokens that the model can do without, with --reuse"
    )
  print(f"new tokens: {', '.join(f'{token} {i}' for token, i in ids.items())}; rows: {init}")
  known = described.config.vocab_size if reuse else None
  return weights.with_new_rows(opened, ids.values(), init, known), ids["<|mask|>"]


def convert(source, target, to=None, dtype=None, shard_size="5GB", remote_code="own",
            new_tokens=None, overwrite=False, reuse=()):  # fmt: skip
  """Converts weights from one form to the other; the arguments are the flags.

  Returns:
    bytes of weights written.
  Raises:
    FileNotFoundError, FileExistsError, ValueError: name the file, tensor or id and what to do.
  """
  described = pretrained.describe(source)
  to = to or ("orbax" if described.is_hf else "hf")
  shard_bytes = export.parse_size(shard_size)
  export.check_remote_code(remote_code, described.config)
  tokenizer = pretrained.load_tokenizer_of(source)
  if tokenizer is not None and described.hf_config:
    tokenizer_files.check_ids(described.hf_config, tokenizer)
  with contextlib.ExitStack() as stack:
    opened = source_weights(described, source, stack)
    stored = jnp.dtype(dtype) if dtype else opened.dtype()
    if str(stored) not in DTYPES:
      raise ValueError(f"the weights are {stored}; say --dtype bfloat16 or --dtype float32")
    sizes = mapping.hf_shapes(described.config)
    total = sum(shards.num_bytes(shape, stored) for shape in sizes.values())
    ids = token_ids(described, tokenizer)
    with appearing(target, overwrite) as folder:
      folder.mkdir(parents=True, exist_ok=True)
      tokenizer_files.write(described.folder, folder)
      if new_tokens:
        opened, ids["mask_token_id"] = add_tokens(folder, described, opened, new_tokens, reuse)
      config = {} if described.is_hf else checkpoint.load_config(source)
      step = 0 if described.is_hf else int(checkpoint.find_step(source).name)
      if to == "hf":
        code = export.model_code(described.config, remote_code, described.folder)
        origin = {"source": str(source), "step": step, "config": config, "dtype": str(stored)}
        export.write_folder(
          folder, opened, stored, shard_bytes, described.hf_config, ids, code, origin,
          progress(total),
        )  # fmt: skip
      else:
        write_checkpoint(folder, opened, stored, described, ids, config, step, progress(total))
  return total


def write_checkpoint(folder, opened, dtype, described, ids, config, step, advance):
  """Writes a workdir with one checkpoint that holds parameters and nothing else."""
  model = dataclasses.asdict(dataclasses.replace(described.config, param_dtype=str(dtype)))
  config = {**config, "model": model, "hf_config": {**described.hf_config, **ids}}
  arrays = weights.to_arrays(opened, dtype, advance)
  streaming.save(folder / "checkpoints" / str(step), arrays, {}, config)
  opened.check()
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def verify(folder):
  """Compares an exported folder with its manifest; prints what was compared."""
  with contextlib.ExitStack() as stack:
    total = sum(path.stat().length for path in epath.Path(folder).glob("*.safetensors"))
    count = export.verify(folder, stack, progress(total))
  print(f"{folder}: {count} tensors and files are as they were written")


def main(argv=None):
  """Runs the command line."""
  args = parse_arguments(argv)
  jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator, or waits for one
  if args.verify:
    return verify(args.verify)
  start = time.monotonic()
  total = convert(
    args.source, args.target, args.format, args.dtype, args.shard_size, args.remote_code,
    args.new_tokens, args.overwrite, args.reuse,
  )  # fmt: skip
  seconds = time.monotonic() - start
  rate = f", {seconds / total * 1e9:.1f} s per GB" if total > 1e8 else ""
  print(f"wrote {total / 1e9:.2f} GB of weights to {args.target} in {seconds:.0f} s{rate}")


if __name__ == "__main__":
  try:
    main()
  except (OSError, ValueError) as error:  # absent, in the way, disk full; not what it should be
    sys.exit(f"convert: {error}")
