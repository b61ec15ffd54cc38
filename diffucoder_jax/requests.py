"""What programs are asked to write: prompts and templates, from flags, a file or stdin, and how.

`args` are flags: `prompt`, `infill`, `prompts`, `chat` and `system`, as `generate --help` has them.
"""

import argparse
import dataclasses
import json
import sys

from etils import epath

from diffucoder_jax import completion
from diffucoder_jax.data import chat


def read_requests(args):
  """The prompts as dicts with "prompt" or "infill".

  Raises:
    ValueError: names the line that holds neither.
  """
  if args.prompt or args.infill:
    kind = "prompt" if args.prompt else "infill"
    return [{kind: text} for text in args.prompt or args.infill]
  if args.prompts in (None, "-"):
    return [{"prompt": sys.stdin.read()}]
  requests = []
  # Not splitlines(): JSON strings may hold U+2028 and its like, which it takes for line ends.
  lines = epath.Path(args.prompts).read_text().removesuffix("\n").split("\n")
  for number, line in enumerate(lines if lines != [""] else [], 1):
    try:
      request = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{args.prompts} line {number} is not JSON: {error}") from error
    if not isinstance(request, dict) or not {"prompt", "infill"} & request.keys():
      raise ValueError(f'{args.prompts} line {number} needs "prompt" or "infill"')
    kind = "infill" if "infill" in request else "prompt"
    if not isinstance(request[kind], str):
      raise ValueError(f"{args.prompts} line {number}: {kind!r} is not a text: {request[kind]!r}")
    requests.append(request)
  if not requests:
    raise ValueError(f"{args.prompts} holds no prompts")
  return requests


def names_of(args, requests):
  """What errors call each request."""
  if args.prompts in (None, "-"):
    return [f"prompt {i + 1}" for i in range(len(requests))]
  return [f"{args.prompts} line {i + 1}" for i in range(len(requests))]


def add_fields(parser, settings, words, skip=()):
  """A flag for each field of a dataclass, None where it is not given; `settings` has the defaults."""
  for field in dataclasses.fields(settings):
    if field.name in skip:
      continue
    kind = dict(type=field.type)
    if field.type is bool:
      kind = dict(type=yes_or_no, nargs="?", const=True)
    default = getattr(settings, field.name)
    parser.add_argument(f"--{field.name}", help=f"{words} (default {default})", **kind)


def yes_or_no(text):
  """The value of a flag of type bool."""
  words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
  if text.lower() not in words:
    raise argparse.ArgumentTypeError(f"{text!r} is neither of true and false")
  return words[text.lower()]


def to_prompt(args, ckpt, request):
  """What `completion.generate` takes: a text, or token ids of holes or of a conversation."""
  if "infill" in request:
    return completion.infill_prompt(ckpt, request["infill"])
  if args.chat:
    messages = [{"role": "user", "content": request["prompt"]}]
    return chat.render_prompt(messages, ckpt.tokenizer, args.system)
  return request["prompt"]
