"""What a score depends on, and whether a folder of samples was drawn from the same."""

import dataclasses
import hashlib
import json
import pathlib
import platform
import subprocess

from absl import logging

from diffucoder_jax.evals import sample_log, verdicts
from diffucoder_jax.runtime import fingerprint, hosts, workdir

# What samples depend on: a folder of samples goes on with the same only.
DRAWN_FROM = (
  "benchmark",
  "data",
  "asked",
  "post_processing",
  "prompt",
  "checkpoint",
  "sampler",
  "seed",
)


def fingerprint_of(params) -> str:
  """A checksum of every parameter, in hexadecimal: the same for the same weights on any mesh."""
  return f"{workdir.crc(fingerprint.describe(params)):08x}"


def code_version() -> str:
  """The commit of this code, "+changes" if files of the package differ from it; without a
  repository, a hash of the package's files."""
  package = pathlib.Path(__file__).parents[1]
  git = lambda *words: subprocess.run(  # noqa: E731
    ["git", "-C", str(package.parent), *words], capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    if (package.parent / ".git").exists():
      changed = git("status", "--porcelain", "--", package.name)
      return git("rev-parse", "HEAD") + ("+changes" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    pass
  files = sorted(package.rglob("*.py"))
  return "files " + sha256(b"".join(sha256(f.read_bytes()).encode() for f in files))


def sha256(raw):
  return hashlib.sha256(raw).hexdigest()


def of_data(opened, asked):
  """The pins of what is asked, and by which code."""
  return {
    "benchmark": opened.name,
    "data": opened.data,
    "published_data": opened.known if opened.benchmark.files else "own file",
    "tasks": f"first {asked.first}" if asked.first else "all",
    "asked": asked.how if not asked.hole_tokens else f"infill {asked.hole_tokens} masks",
    "python": platform.python_version(),
    "commit": hosts.from_main(code_version),
  }


def of(opened, asked, sandbox, samples):
  """What every score depends on, but for the samples."""
  run_here = opened.benchmark.judge == "sandbox"
  return of_data(opened, asked) | {
    "post_processing": opened.benchmark.asked[asked.how].__name__,
    "samples": samples,
    "limits": dataclasses.asdict(sandbox.limits) if run_here else "not needed",
    "sandbox": sandbox.level,
    "packages": list(verdicts.packages_of(opened)) if run_here else [],
  }


def resume(path, pins, names, samples):
  """([rows that are there], their bytes, pins); refuses samples that were drawn from something else."""
  there = path.parent / "pins.json"
  if path.exists() and path.stat().st_size and not there.exists():
    raise ValueError(
      f"{path} is there without {there.name}; name another folder, or remove the file"
    )
  if there.exists() and path.exists():
    saved = json.loads(there.read_text())
    changes = [
      line for name in DRAWN_FROM
      for line in workdir.config_changes({name: saved.get(name)}, {name: pins[name]})
      if not line.startswith("checkpoint.path")
    ]  # fmt: skip
    if changes:
      raise ValueError(
        f"the samples in {path.parent} were drawn from something else (saved -> now):\n  "
        + "\n  ".join(changes)
        + "\nName another folder, or ask for the same"
      )
    if pins["commit"] not in saved["commit"].split(", "):
      logging.warning("samples in %s are of commit %s", path.parent, saved["commit"])
      pins = {**pins, "commit": f"{saved['commit']}, {pins['commit']}"}
    else:
      pins = {**pins, "commit": saved["commit"]}
  rows, size = sample_log.read_log(path, set(names), samples)
  write_text(there, json.dumps(pins, indent=2) + "\n")
  return list(rows.values()), size, pins


def write_text(path, text):
  """Writes a file so that a reader sees all of it or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.parent / f"{path.name}.part"
  part.write_text(text)
  part.replace(path)
