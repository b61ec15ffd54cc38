"""Compiles the 7B's programs for five TPU slices, without a TPU, and makes one table of all.

  python launch/aot_table.py --output=DIR                    about an hour on 2 cores
  python launch/aot_table.py --output=DIR --only=stage1 --only=v5p-64
  python launch/aot_table.py --output=DIR --extra=--config.model.remat=dots

Needs libtpu: pip install -e '.[tpu]'. Each cell is a run of `python -m diffucoder_jax.aot` with a JSON
file in DIR; started again, only those are run that are missing or whose command has changed. DIR/table.md
is written after each. Meshes are below: `data` x `fsdp` x `tensor`, chosen so that the batch divides and
fsdp leaves 112 of 3584 rows or more (see `aot`'s warning). `aot --search` finds others.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SLICES = ("v5e-256", "v5p-64", "v5p-128", "v6e-64", "v6e-256")

# Stage 1 after attention has opened, which is nine steps of ten. 160 rows of 4,096 tokens are the
# paper's 655,360 a step; 256 chips with 4 kv heads make at least 64 parts of a batch, so 32 rows of
# padding fill up 192 there, and their compute counts as lost.
SPLASH = "--config.model.attention_impl=splash"
STAGE1 = (
  "train", "adapt_7b", SPLASH, "--config.objective.anneal_steps=0", "--config.data.fill_batch"
)  # fmt: skip
SFT = ("train", "sft_7b", SPLASH)
# 8 prompts x 10 answers of up to 200 + 256 tokens, the released recipe; on 256 chips four such rounds at
# once, for 80 answers have too few parts. One micro-batch.
RL = (SPLASH, "--config.rollout.max_prompt_tokens=200", "--config.optim.accumulate=1")
# By program, the mesh for each slice, in the order of SLICES.
ROWS = {
  "stage1": (STAGE1, ("2x32x4", "1x32x1", "1x32x2", "1x32x2", "2x32x4")),
  "sft": (SFT, ("4x32x2", "1x32x1", "2x32x1", "2x32x1", "4x32x2")),
  "logps": (("logps", "grpo_7b", *RL), ("2x32x4", "1x16x2", "1x16x4", "1x16x4", "2x32x4")),
  "update": (("update", "grpo_7b", *RL), ("2x32x4", "1x16x2", "1x16x4", "1x16x4", "2x32x4")),
  "rollout": (("rollout", "grpo_7b", *RL), ("2x32x4", "1x16x2", "1x16x4", "1x16x4", "2x32x4")),
}


def cells(only, extra):
  """(name, row, slice, arguments of `aot`) of each cell; `only`: names of rows and slices, or none."""
  for row, ((program, config, *settings), meshes) in ROWS.items():
    for tpu, mesh in zip(SLICES, meshes, strict=True):
      wanted = [names for names in (set(only) & set(ROWS), set(only) & set(SLICES)) if names]
      if not all({row, tpu} & names for names in wanted):
        continue
      sizes = zip(("data", "fsdp", "tensor"), mesh.split("x"), strict=True)
      arguments = [
        f"--config=configs/{config}.py", f"--topology={tpu}", f"--program={program}", *settings,
        *(f"--config.mesh.{axis}={size}" for axis, size in sizes),
      ]  # fmt: skip
      if config == "grpo_7b" and tpu.endswith("-256"):
        arguments.append("--config.grpo.prompts=32")
      yield f"{row}-{tpu}", row, tpu, [*arguments, *extra]


def is_done(path, arguments):
  """Whether the file holds the result of this very command."""
  if not path.exists():
    return False
  told = [word for word in json.loads(path.read_text())["arguments"] if "--output" not in word]
  return told == arguments


def table(results):
  """Lines of Markdown, from (row, slice, result) triples."""
  lines = [
    "| program | slice | mesh: data x fsdp x tensor | batch | HBM of a device, GiB | MFU bound (without "
    "overlap) | limit | compiled in |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row, tpu, r in results:
    cells_ = [row, tpu, " x ".join(map(str, r["mesh"].values()))]
    if "rows" in r:
      cells_.append(f"{r['rows']} x {r['length']}")
    else:
      cells_.append("")
    if r["fits"]:
      m, roof = r["memory"], r["roofline"]
      cells_ += [
        f"{m['peak'] / 2**30:.1f} of {m['usable'] / 2**30:.1f} ({m['spare']:.0%} spare)",
        f"{roof['mfu']:.0%} ({roof['serial_mfu']:.0%})", roof["limit"],
        f"{r['seconds']['compile']:.0f} s",
      ]  # fmt: skip
    else:
      cells_ += [r["verdict"][:120].replace("|", "/"), "", "", ""]
    lines.append("| " + " | ".join(cells_) + " |")
  return lines


def main(arguments=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for the results")
  parser.add_argument(
    "--only", action="append", default=[], help=f"of {', '.join([*ROWS, *SLICES])}; may be repeated"
  )
  parser.add_argument("--extra", action="append", default=[], help="argument for all runs of aot")
  parser.add_argument("--print", action="store_true", help="write the commands, run nothing")
  args = parser.parse_args(arguments)
  unknown = set(args.only) - set(ROWS) - set(SLICES)
  if unknown:
    parser.error(f"--only {sorted(unknown)}: choose of {', '.join([*ROWS, *SLICES])}")
  output = args.output.resolve()
  results, failed = [], False
  for name, row, tpu, words in cells(args.only, args.extra):
    path, log = output / f"{name}.json", output / f"{name}.log"
    command = [sys.executable, "-m", "diffucoder_jax.aot", *words, f"--output={path}"]
    if args.print:
      print(" ".join(["python", *command[1:]]))
      continue
    output.mkdir(parents=True, exist_ok=True)
    if not is_done(path, words):
      path.unlink(missing_ok=True)
      with log.open("w") as file:
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if not path.exists():
      print(f"{name}: failed, see {log}", flush=True)
      failed = True
      continue
    results.append((row, tpu, json.loads(path.read_text())))
    print(f"{name}: {results[-1][2]['verdict'][:160]}", flush=True)
    (output / "table.md").write_text("\n".join(table(results)) + "\n")
  if results:
    print("\n".join(["", *table(results)]))
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
