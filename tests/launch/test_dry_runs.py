"""What the launch scripts would run, as it is written down, and what they refuse."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from tests import tiny

HERE = pathlib.Path(__file__).parent
SETTINGS = ("PROJECT", "ZONE", "NAME", "ACCELERATOR_TYPE", "CLUSTER", "IMAGE")
TRAIN = "python -m diffucoder_jax.train --config=configs/adapt_7b.py --workdir=gs://B/adapt".split()

MULTISLICE = {"SLICES": "2", "ACCELERATOR_TYPE": "v5e-256", "PROVISIONING": "reserved", "SSH_VIA": "iap",
              "BUCKET": "gs://my-bucket/runs", "PREPARE": "mkdir -p ../data && mount 'a b'"}  # fmt: skip
ODD = ["python", "-m", "diffucoder_jax.train", "--config.mesh=(2, 2)", "it's", '"$HOME"', "a;b"]
DRY = {
  "create": ("tpu.sh", ["--dry-run", "create"], {}),
  "create_multislice": ("tpu.sh", ["create", "--dry-run", "--wait", "--", "--network=mine"], MULTISLICE),
  "create_on_demand": (
    "tpu.sh", ["--dry-run", "create"], {"PROVISIONING": "on-demand", "ACCELERATOR_TYPE": "v6e-64"}),
  "setup": ("tpu.sh", ["--dry-run", "setup"], {}),
  "run": ("tpu.sh", ["--dry-run", "run", *TRAIN], {}),
  "run_multislice": ("tpu.sh", ["--dry-run", "run", "--", *ODD], MULTISLICE),
  "status": ("tpu.sh", ["status", "--dry-run"], {}),
  "status_multislice": ("tpu.sh", ["status", "--dry-run"], MULTISLICE),
  "logs": ("tpu.sh", ["--dry-run", "logs", "--worker=3", "--lines=20", "--follow"], {}),
  "stop": ("tpu.sh", ["--dry-run", "stop", "--seconds=60"], {}),
  "delete": ("tpu.sh", ["--dry-run", "delete"], {}),
  "babysit": ("babysit.sh", ["--dry-run", "--delete-when-done", *TRAIN], {}),
  "xpk_image": ("xpk.sh", ["--dry-run", "image", "--push"], {}),
  "xpk_create": ("xpk.sh", ["--dry-run", "create", *TRAIN], {}),
  "xpk_create_multislice": ("xpk.sh", ["--dry-run", "create", "--restarts=7", "--", *ODD], MULTISLICE),
  "xpk_list": ("xpk.sh", ["--dry-run", "list"], {}),
  "xpk_logs": ("xpk.sh", ["--dry-run", "logs", "--follow"], {}),
  "xpk_delete": ("xpk.sh", ["--dry-run", "delete"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DRY)
def test_dry_runs_print_what_is_written_down(launch, name):
  """UPDATE_GOLDEN=1 writes tests/launch/golden/*.txt anew; read the difference before it is committed."""
  script, words, settings = DRY[name]
  code, text = launch(script, *words, **settings)
  assert code == 0, text
  assert not launch.world.calls(), "a dry run ran something"
  path = HERE / "golden" / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    path.write_text(text)
  assert text == path.read_text()


def test_what_is_quoted_arrives_as_it_was(launch):
  line = subprocess.run(
    ["bash", "-c", 'source launch/env.sh; quote "$@"', "x", *ODD, ""], cwd=launch.checkout,
    capture_output=True, text=True, check=True).stdout  # fmt: skip
  back = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True)
  assert back.stdout.splitlines() == [*ODD, ""]


@pytest.mark.parametrize(
  ("words", "settings", "message"),
  [
    (["tpu.sh", "create"], {"NAME": "my pod"}, "NAME='my pod' is not allowed"),
    (["tpu.sh", "status"], {"NAME": "a;b"}, "NAME='a;b' is not allowed"),
    (["tpu.sh", "delete", "--yes"], {"NAME": "-x"}, "NAME='-x' is not allowed"),
    (["tpu.sh", "status"], {"PROJECT": ""}, "PROJECT is not set; for example: export PROJECT="),
    (
      ["tpu.sh", "status"],
      {"ZONE": "us-east5"},
      "ZONE='us-east5' is not allowed; it looks like us-east5-a",
    ),
    (["tpu.sh", "status"], {"BUCKET": "my-bucket"}, "BUCKET='my-bucket' is not allowed"),
    (["tpu.sh", "create"], {"ACCELERATOR_TYPE": "v5e-265"}, "v5e has 1, 4, 8, 16"),
    (["tpu.sh", "create"], {"ACCELERATOR_TYPE": "v5p-12"}, "counts cores, a multiple of 8"),
    (["tpu.sh", "create"], {"ACCELERATOR_TYPE": "v9-8"}, "v9-8 is not known"),
    (["tpu.sh", "create"], {"ACCELERATOR_TYPE": "tpu7x-64"}, "use launch/xpk.sh"),
    (["tpu.sh", "create"], {"PROVISIONING": "cheap"}, "it looks like spot, on-demand or reserved"),
    (["tpu.sh", "create", "--spot"], {}, "create does not know '--spot'"),
    (["tpu.sh", "run"], {}, "run needs a command"),
    (["tpu.sh", "run", "--worker=1", "x"], {}, "run does not know '--worker=1'"),
    (["tpu.sh", "logs", "--worker=one"], {}, "--worker=one is no number"),
    (["tpu.sh", "stop", "--seconds=x"], {}, "--seconds=x is no number"),
    (["tpu.sh", "setup", "--commit=none"], {}, "git knows no commit 'none'"),
    (["tpu.sh", "delete"], {}, "not deleted"),
    (["tpu.sh", "frobnicate"], {}, "'frobnicate' is none of create, setup"),
    (["tpu.sh"], {}, "say what to do"),
    (["babysit.sh"], {}, "needs a command"),
    (["babysit.sh", "--failures=0", "x"], {}, "--failures=0 is no number"),
    (["babysit.sh", "--force", "x"], {}, "'--force' is no option"),
    (["xpk.sh", "create", "x"], {"CLUSTER": "a b"}, "CLUSTER='a b' is not allowed"),
    (["xpk.sh", "create", "x\ny"], {}, "line break"),
    (["xpk.sh", "delete"], {}, "not deleted"),
  ],
)
def test_what_is_wrong_is_refused_by_a_clear_line(launch, words, settings, message):
  code, text = launch(*words, **settings)
  assert code == 1 and message in text, text
  assert not launch.world.calls()


@pytest.mark.parametrize("script", ["tpu.sh", "babysit.sh", "xpk.sh"])
def test_help_is_the_comment_at_the_head(launch, script):
  code, text = launch(script, "--help", PROJECT="")
  assert code == 0 and f"bash launch/{script}" in text and "set -euo" not in text


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="apt-get install shellcheck")
def test_shellcheck_finds_nothing():
  files = [*sorted((tiny.ROOT / "launch").glob("*.sh")), tiny.ROOT / ".ci" / "run"]
  files = [str(path) for path in files if path.exists()]
  done = subprocess.run(["shellcheck", "-x", *files], cwd=tiny.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_scripts_are_careful():
  for path in (tiny.ROOT / "launch").glob("*.sh"):
    sourced = path.name in ("env.sh", "venv.sh")
    assert sourced or "\nset -euo pipefail\n" in path.read_text(), path.name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_the_real_gcloud_has_the_flags_that_are_used():
  used = {}
  for path in (HERE / "golden").glob("*.txt"):
    for words in re.findall(
      r"^\+ gcloud ((?:alpha )?compute tpus \S+ \S+)(.*)", path.read_text(), re.M
    ):
      flags = re.findall(r"(?<=[ '])--[a-z-]+", words[1].split("--command=")[0])
      used.setdefault(words[0], set()).update(
        flags, ["--command"] if "--command=" in words[1] else []
      )
  assert len(used) >= 5
  for command, flags in used.items():
    done = subprocess.run(
      ["gcloud", *command.split(), "--help"], capture_output=True, text=True,
      env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"})  # fmt: skip
    shown = done.stdout
    if done.returncode and command.startswith("alpha"):
      continue  # a component that is not installed
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown) + " --project --format --quiet"  # of all commands
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", shown)], command


def readme_lines():
  """The lines of launch/README.md's blocks, continued ones joined."""
  text = (tiny.ROOT / "launch" / "README.md").read_text()
  blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
  return [
    line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()
  ]


def test_the_commands_of_the_readme_are_those_of_the_scripts(launch):
  lines = [x for x in readme_lines() if x.startswith(("export ", "bash ")) or " bash launch/" in x]
  commands = [x for x in lines if "bash launch/" in x]
  assert len(commands) >= 14
  launch.environment = {x: y for x, y in launch.environment.items() if x not in SETTINGS}
  (launch.checkout / "launch" / "readme_lines.sh").write_text(
    "set -euo pipefail\nexport DRY_RUN=1\n" + "\n".join(lines) + "\n"
  )
  code, text = launch("readme_lines.sh")
  (launch.checkout / "launch" / "readme_lines.sh").unlink()
  assert code == 0 and not launch.world.calls(), text
  assert text.count("worker.sh start") == 5 and text.count("+ xpk workload create") == 1


def test_the_programs_and_keys_of_the_readme_exist():
  checked = 0
  for line in readme_lines():
    for name in re.findall(r"-m diffucoder_jax\.(\w+)", line):
      assert (tiny.ROOT / "diffucoder_jax" / f"{name}.py").exists(), name
    for path in re.findall(r"--config=(\S+)", line):
      spec = importlib.util.spec_from_file_location("shown", tiny.ROOT / path)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      known = module.get_config().copy_and_resolve_references()
      for key in re.findall(r"--config\.([\w.]+)=", line):
        part = known
        for name in key.split("."):
          assert name in part, f"{path} has no {key}"
          part = part[name]
        checked += 1
  assert checked >= 14
