"""Completes or infills text from a workdir, a checkpoint or a Hugging Face folder.

  python -m diffucoder_jax.generate --checkpoint PATH --prompt 'def is_prime(n):' --show
  python -m diffucoder_jax.generate --checkpoint PATH --infill 'def f(x):<|fill:20|>    return y'
  python -m diffucoder_jax.generate --checkpoint PATH --prompts FILE.jsonl --output OUT.jsonl --traces DIR
  echo 'import os' | python -m diffucoder_jax.generate --checkpoint PATH
  python -m diffucoder_jax.generate --checkpoint PATH --chat --prompt 'Write a function that ...'

`--prompts` lines are {"prompt": text}, or {"infill": text with <|fill:N|> holes}, which goes first
when there are both; other fields are kept, but for those of the same name as what is found. Settings and
lines are checked before the model is loaded, and what they hold before anything is written.
"""

import argparse
import dataclasses
import json
import sys
import time

import jax
from etils import epath

from diffucoder_jax import completion
from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import constraints, sampler
from diffucoder_jax.evals import terminal
from diffucoder_jax.pretrained import from_pretrained
from diffucoder_jax.requests import add_fields, names_of, read_requests, to_prompt
from diffucoder_jax.runtime import heap, sharding


def parse_arguments(argv=None):
  """Command line; the fields of `SamplerConfig` are flags, left to the checkpoint's kind if unset."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--checkpoint", required=True, help="workdir, checkpoint or Hugging Face folder"
  )
  source = parser.add_mutually_exclusive_group()
  source.add_argument("--prompt", action="append", help="text to continue; may be given again")
  source.add_argument("--infill", action="append", help="text with <|fill:N|> holes of N tokens")
  source.add_argument("--prompts", help="jsonl file of prompts; '-' or no flag: text on stdin")
  parser.add_argument(
    "--chat", action="store_true", help="prompts are what a user says to an instruction-tuned model"
  )
  parser.add_argument(
    "--system", default=chat.SYSTEM, help="with --chat, the system message; '' for none"
  )
  parser.add_argument(
    "--output",
    help="write jsonl here: the input's fields, completion, its length in tokens, whether it ended, nfe",
  )
  parser.add_argument("--traces", help="folder for one .npz trace per prompt")
  parser.add_argument("--show", action="store_true", help="replay the denoising in the terminal")
  parser.add_argument(
    "--ban",
    action="append",
    default=[],
    help="text none of whose tokens is written; again for more",
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument(
    "--param_dtype", choices=("float32", "bfloat16"), help="default: the checkpoint's"
  )
  for axis in sharding.AXES:
    parser.add_argument(f"--{axis}", type=int, default=1, help=f"mesh size along {axis}")
  add_fields(parser, sampler.SamplerConfig(), "sampler")
  return parser.parse_args(argv)


def sampler_config(args, causal, infill):
  """`SamplerConfig` of the flags that were given, on defaults that suit the checkpoint.

  Templates have nothing behind them (max_new_tokens 0)."""
  names = [field.name for field in dataclasses.fields(sampler.SamplerConfig)]
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  defaults = {"alg": "left_to_right"} if causal else {}
  holes_only = {"max_new_tokens": 0} if infill else {}
  return sampler.SamplerConfig(**{**defaults, **given, **holes_only})


def of_kinds(requests):
  """{whether they are templates: places of such requests}, of the kinds that there are."""
  kinds = {infill: [] for infill in (False, True)}
  for i, request in enumerate(requests):
    kinds["infill" in request].append(i)
  return {infill: chosen for infill, chosen in kinds.items() if chosen}


def check_flags(args, requests):
  """Raises ValueError for what no checkpoint can do."""
  if args.batch_size < 1:
    raise ValueError(f"--batch_size is {args.batch_size}; write at least one row at a time")
  if args.max_new_tokens and False not in of_kinds(requests):
    raise ValueError("--max_new_tokens is for prompts; a template says how long its holes are")
  for infill in of_kinds(requests):
    sampler_config(args, False, infill)


def load(args):
  """The checkpoint, over the mesh that was asked for."""
  mesh = None
  sizes = {axis: getattr(args, axis) for axis in sharding.AXES}
  if any(size != 1 for size in sizes.values()):
    mesh = sharding.make_mesh(sizes)
  ckpt = from_pretrained(args.checkpoint, mesh=mesh, param_dtype=args.param_dtype)
  if ckpt.tokenizer is None:
    raise ValueError(
      f"{args.checkpoint} has no tokenizer file; add one, or use the Python API with ids"
    )
  return ckpt


def answer(args, ckpt, requests):
  """`Completion` of every request; all are checked before any is written."""
  # A piece of text has other tokens with a space before it: give both.
  banned = sorted({token for text in args.ban for token in ckpt.tokenizer.encode(text)})
  limits = constraints.ban(banned) if banned else None
  names, asked = names_of(args, requests), {}
  for infill, chosen in of_kinds(requests).items():
    config = sampler_config(args, ckpt.config.attention == "causal", infill)
    prompts = [_named(names[i], to_prompt, args, ckpt, requests[i]) for i in chosen]
    rows = completion.check(ckpt, prompts, config, limits, [names[i] for i in chosen])
    asked[infill] = rows, config
  results = [None] * len(requests)
  for infill, chosen in of_kinds(requests).items():
    found = completion.generate(ckpt, *asked[infill], args.seed, args.batch_size, limits)
    for i, one in zip(chosen, found, strict=True):
      results[i] = one
  return results


def _named(name, fn, *args):
  """fn(*args), whose errors tell the name."""
  try:
    return fn(*args)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def main(args):
  """Answers every request, prints the text, and writes what was asked for."""
  requests = read_requests(args)
  check_flags(args, requests)
  if args.traces:
    epath.Path(args.traces).mkdir(parents=True, exist_ok=True)
  if args.output:
    epath.Path(args.output).parent.mkdir(parents=True, exist_ok=True)
  ckpt = load(args)
  began = time.monotonic()
  results = answer(args, ckpt, requests)
  seconds = time.monotonic() - began
  if not sharding.is_main_process():
    return
  for i, (request, output) in enumerate(zip(requests, results, strict=True)):
    if args.show:
      terminal.render(output.trace, 0, ckpt.tokenizer)
    else:
      before = "" if args.chat else request.get("prompt", "")
      print(output.full_text if "infill" in request else before + output.text)
    if len(requests) > 1:
      print(f"--- {i + 1} of {len(requests)}", flush=True)
    if args.traces:
      sampler.save_trace(epath.Path(args.traces) / f"{i}.npz", output.trace)
  if args.output:
    lines = []
    for request, output in zip(requests, results, strict=True):
      found = {"completion": output.text, "length": output.length, "ended": output.ended}
      lines.append(json.dumps({**request, **found, "nfe": int(output.trace.nfe[0])}) + "\n")
    epath.Path(args.output).write_text("".join(lines))
  written = sum(len(output.tokens) for output in results)
  evaluations = sum(int(output.trace.nfe[0]) for output in results)
  print(
    f"{written} tokens in {seconds:.1f} s ({written / seconds:.1f} tokens/s with compilation), "
    f"{evaluations} network evaluations, {jax.devices()[0].device_kind}",
    file=sys.stderr,
  )


if __name__ == "__main__":
  heap.keep_freed_memory()
  try:
    main(parse_arguments())
  except (ValueError, OSError) as error:
    sys.exit(f"generate: {error}")
