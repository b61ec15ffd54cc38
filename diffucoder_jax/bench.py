"""How fast we are on this machine, beside PyTorch on the same weights where that can be had.

  python -m diffucoder_jax.bench sample      denoising
  python -m diffucoder_jax.bench steps       one step of it, against length and rows, beside the roofline
  python -m diffucoder_jax.bench quality     problems solved by each way to denoise, beside its seconds
  python -m diffucoder_jax.bench train       forward pass, gradient, whole step of training
  python -m diffucoder_jax.bench logps       scores of coupled-GRPO, and their gradient
  python -m diffucoder_jax.bench sandbox     programs judged per second
  python -m diffucoder_jax.bench convert     Hugging Face folder to Orbax checkpoint and back

Prints one table, all of it measured in this run; `bench sample --help` names the settings. Nothing is
written unless --output says where: DIR/sample.json and DIR/sample.txt, and a picture of some. PyTorch is
optional: pip install -e '.[torch]'; so is matplotlib, for pictures: '.[report]'.
"""

import argparse
import json
import sys

from etils import epath

from diffucoder_jax.benchmarking import (
  conversion,
  quality,
  sampling,
  sandbox,
  scoring,
  steps,
  table,
  timing,
  training,
)
from diffucoder_jax.execution.sandbox import SandboxUnavailable
from diffucoder_jax.runtime import heap

BENCHES = {
  "sample": sampling,
  "steps": steps,
  "quality": quality,
  "train": training,
  "logps": scoring,
  "sandbox": sandbox,
  "convert": conversion,
}


def parse_arguments(argv=None):
  """Command line."""
  parser = argparse.ArgumentParser(
    prog="python -m diffucoder_jax.bench",
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parts = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
  for name, module in BENCHES.items():
    part = parts.add_parser(
      name, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    part.add_argument(
      "--repeats", type=timing.at_least(1), default=5, help="of each measurement, in turns"
    )
    part.add_argument(
      "--output", metavar="DIR",
      help=f"also write DIR/{name}.json, with every repeat, and DIR/{name}.txt",
    )  # fmt: skip
    module.add_arguments(part)
  return parser.parse_args(argv)


def open_output(path):
  """The folder, made if need be; told before an hour of measuring if it cannot be written to."""
  folder = epath.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f"--output {path} cannot be written to ({error}); name another folder"
    ) from error
  return folder


def main(argv=None):
  """Runs one benchmark, prints its table and writes it where --output says. Returns the JSON value."""
  args = parse_arguments(argv)
  folder = open_output(args.output) if args.output else None
  around = timing.surroundings()
  found = BENCHES[args.bench].run(args)
  text = "\n".join(table.lines(found, around))
  print(text)
  result = table.as_json(found, args.bench, vars(args), around)
  if folder is not None:
    (folder / f"{args.bench}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{args.bench}.txt").write_text(text + "\n")
    try:
      if found.picture:
        found.picture(folder / f"{args.bench}.png")
    except ImportError as error:
      print(f"no picture ({error}): pip install -e '.[report]'", file=sys.stderr)
  return result


if __name__ == "__main__":
  heap.keep_freed_memory()
  try:
    main()
  # A folder that is absent, weights that do not fit, a machine without isolation.
  except (OSError, ValueError, SandboxUnavailable) as error:
    sys.exit(f"bench: {error}")
