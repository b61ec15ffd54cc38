"""The outside world of the launch scripts: a gcloud, an xpk and a uv that keep their state in a folder.

Run as `python fake_cloud.py gcloud|xpk|uv ARGUMENTS` with FAKE_CLOUD naming the folder. A machine is a
folder of its own that serves as HOME; ssh runs the command there, for real. The flags are those of
gcloud 528 (`gcloud compute tpus ... --help`) and xpk 1.16; another one is an error, as with the real
programs. What the world does to a pod is in files: see `World`.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

PYTHON = f'"{sys.executable}" -I -S'  # without packages it starts much faster


class World:
  """The state in a folder: requests/NAME.json, machines/NAME/NODE-WORKER/, calls.jsonl, and

  error    every gcloud and xpk call prints this text and fails
  states   what the next requests go through, a word a line, the last one for good
  workers  how many a node has (1)
  unreachable        the node that ssh does not get to
  environment.json   of what runs on a machine
  """

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    for name in ("requests", "machines", "workloads"):
      (self.folder / name).mkdir(parents=True, exist_ok=True)

  def text(self, name, default=""):
    path = self.folder / name
    return path.read_text() if path.exists() else default

  def request(self, name):
    path = self.folder / "requests" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None

  def write(self, name, request):
    path = self.folder / "requests" / f"{name}.json"
    path.with_suffix(".new").write_text(json.dumps(request))
    path.with_suffix(".new").rename(path)

  def machines(self, name):
    return sorted((self.folder / "machines" / name).glob("*-*"))

  def calls(self):
    return [json.loads(line) for line in self.text("calls.jsonl").splitlines()]

  def preempt(self, name, number=signal.SIGKILL):
    """Takes a pod away: its processes get the signal, SIGKILL soon after, and its disks are gone."""
    self.write(name, {**self.request(name), "states": ["SUSPENDING", "SUSPENDED"]})
    self.destroy(name, number)

  def destroy(self, name, number=signal.SIGKILL):
    for machine in self.machines(name):
      kill(machine, number)
    if number != signal.SIGKILL:
      time.sleep(0.2)
    for machine in self.machines(name):
      kill(machine, signal.SIGKILL)
    machines = self.folder / "machines" / name
    if machines.exists():  # at once, and not file by file while a command looks at them
      shutil.rmtree(
        machines.rename(self.folder / f"gone-{time.monotonic_ns()}"), ignore_errors=True
      )


def kill(machine, number):
  """Signals all that `worker.sh start` started on a machine."""
  try:
    pid = int((machine / "diffucoder" / "run" / "pid").read_text())
    if str(machine) in pathlib.Path(f"/proc/{pid}/environ").read_text():
      os.killpg(os.getpgid(pid), number)
  except (FileNotFoundError, ProcessLookupError, ValueError):
    pass


class Parser(argparse.ArgumentParser):
  def error(self, message):
    print(f"ERROR: ({self.prog}) {message}", file=sys.stderr)
    sys.exit(2)


def parse(command, positional, flags, arguments):
  """Strict: a flag that is not listed, or listed as required ("!") and absent, is an error."""
  parser = Parser(prog=command, allow_abbrev=False)
  for name in positional:
    parser.add_argument(name)
  for flag in flags.split():
    word = flag.strip("!+-")
    kind = (
      {"action": "store_true"}
      if flag.endswith("-")
      else {"action": "append"}
      if "+" in flag
      else {}
    )
    parser.add_argument(f"--{word}", **kind, **({"required": True} if flag.endswith("!") else {}))
  return parser.parse_args(arguments)


# Command -> (positional arguments, flags: "!" required, "-" without a value).
GCLOUD = {
  "queued-resources create": (
    ["name"], "project! zone! accelerator-type! runtime-version! node-id node-count node-prefix spot- "
    "reserved- guaranteed- labels metadata network subnetwork service-account tags internal-ips- "
    "valid-until-duration async-"),
  "queued-resources describe": (["name"], "project! zone! format"),
  "queued-resources delete": (["name"], "project! zone! force- quiet- async-"),
  "tpu-vm describe": (["name"], "project! zone! format"),
  "tpu-vm ssh": (["name"], "project! zone! worker command! internal-ip-"),
  "tpu-vm scp": (["source", "target"], "project! zone! worker internal-ip- recurse-"),
}  # fmt: skip
XPK = {
  "workload create": (
    [], "workload! cluster! project zone tpu-type! num-slices docker-image max-restarts priority "
    "restart-on-exit-codes termination-grace-period-seconds env+ command!"),
  "workload list": ([], "cluster! project zone filter-by-job filter-by-status"),
  "workload delete": ([], "workload! cluster! project zone force-"),
}  # fmt: skip


def not_found(name):
  print(f"ERROR: (gcloud) NOT_FOUND: Resource '{name}' was not found", file=sys.stderr)
  sys.exit(1)


def gcloud(world, arguments):
  alpha = arguments[:1] == ["alpha"]  # where ssh can go through a tunnel
  arguments = arguments[alpha:]
  if arguments[:2] != ["compute", "tpus"]:
    sys.exit(f"ERROR: (gcloud) Invalid choice: {arguments[:2]}")
  name = " ".join(arguments[2:4])
  positional, flags = GCLOUD[name]
  flags += " tunnel-through-iap- batch-size" if alpha else ""
  args = parse(f"gcloud.compute.tpus.{name}", positional, flags, arguments[4:])
  return {
    "queued-resources create": create, "queued-resources describe": describe,
    "queued-resources delete": delete,
    "tpu-vm describe": describe_node, "tpu-vm ssh": ssh, "tpu-vm scp": scp,
  }[name](world, args)  # fmt: skip


def create(world, args):
  if world.request(args.name):
    sys.exit(f"ERROR: (gcloud) ALREADY_EXISTS: Resource '{args.name}' already exists")
  if (args.node_id is None) == (args.node_count is None):
    sys.exit("ERROR: (gcloud) Exactly one of (--node-id | --node-count) must be specified.")
  states = world.text("states", "WAITING_FOR_RESOURCES PROVISIONING ACTIVE").split()
  prefix = args.node_prefix or args.name
  nodes = [args.node_id] if args.node_id else [f"{prefix}-{i}" for i in range(int(args.node_count))]
  world.write(args.name, {"states": states, "nodes": nodes})
  for i in range(len(nodes)):
    for j in range(int(world.text("workers", "1"))):
      (world.folder / "machines" / args.name / f"{i}-{j}").mkdir(parents=True)


def describe(world, args):
  request = world.request(args.name) or not_found(args.name)
  states = request["states"]
  if args.format == "value(state.state)":
    print(states[0])
    world.write(args.name, {**request, "states": states[1:] or states})
  else:
    print("Quota 'TPUS_PER_PROJECT' exceeded" if states[0] == "FAILED" else "")


def node(world, name):
  """(name of the request, number in it) of a node that is there."""
  for path in (world.folder / "requests").glob("*.json"):
    request = json.loads(path.read_text())
    if name in request["nodes"] and request["states"][0] == "ACTIVE":
      return path.stem, request["nodes"].index(name)
  return not_found(name)


def describe_node(world, args):
  node(world, args.name)
  print("READY")


def delete(world, args):
  world.request(args.name) or not_found(args.name)
  world.destroy(args.name)
  (world.folder / "requests" / f"{args.name}.json").unlink()


def chosen(world, name, worker):
  request, number = node(world, name)
  if world.text("unreachable") == name:
    sys.exit(
      "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255]."
    )
  return [
    machine for machine in world.machines(request)
    if machine.name.startswith(f"{number}-") and worker in ("all", machine.name.split("-")[1])
  ]  # fmt: skip


def ssh(world, args):
  """All workers at once, as gcloud does it; the exit code of the first that fails."""
  started = []
  for machine in chosen(world, args.name, args.worker or "0"):
    programs = machine / ".programs"
    if not programs.exists():  # what a machine's image brings
      programs.mkdir()
      host = f"t1v-{machine.parent.name}-{machine.name}"
      script(programs / "hostname", f"echo {host}")
      script(programs / "uv", f'FAKE_CLOUD="{world.folder}" exec {PYTHON} "{__file__}" uv "$@"')
    env = {
      **json.loads(world.text("environment.json", "{}")), "HOME": str(machine), "LANG": "C.UTF-8",
      "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
    }  # fmt: skip
    started.append(subprocess.Popen(["bash", "-c", args.command], cwd=machine, env=env,
                                    stdin=subprocess.DEVNULL))  # fmt: skip
  codes = [process.wait() for process in started]
  sys.exit(next((code for code in codes if code), 0))


def scp(world, args):
  name, target = args.target.split(":")
  for machine in chosen(world, name, args.worker or "0"):
    shutil.copy(args.source, machine / target)


def uv(world, arguments):
  """Installs nothing: the machine's python is the one of the tests, with all packages."""
  if (world.folder / "no_network").exists():
    sys.exit("error: Failed to fetch: `https://pypi.org/simple/`")
  if arguments[0] == "venv":
    python = pathlib.Path(arguments[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True)
    script(python, f'exec "{sys.executable}" "$@"')


def script(path, line):
  path.write_text(f"#!/bin/sh\n{line}\n")
  path.chmod(0o755)


def xpk(world, arguments):
  name = " ".join(arguments[:2])
  args = parse(f"xpk {name}", *XPK[name], arguments[2:])
  path = world.folder / "workloads"
  if name == "workload list":
    print(
      "[XPK] Starting workload list\n[XPK] Workload List Output:\nJobset Name   Priority  Status"
    )
    pattern = (args.filter_by_job or "").strip("^$")
    for file in sorted(path.iterdir()):
      status = file.read_text().split()[0]
      among = {"FINISHED": ("SUCCESSFUL", "FAILED")}.get(
        args.filter_by_status, (args.filter_by_status,)
      )
      if pattern in ("", file.name) and (args.filter_by_status is None or status in among):
        print(f"{file.name}   medium  {status}")
  elif name == "workload create":
    if (path / args.workload).exists():
      sys.exit(f"[XPK] {args.workload} already exists, XPK will not create this workload.")
    (path / args.workload).write_text(f"QUEUED\n{args.command}\n")
  else:
    (path / args.workload).unlink()


if __name__ == "__main__":
  world_ = World(os.environ["FAKE_CLOUD"])
  program, *words = sys.argv[1:]
  with open(world_.folder / "calls.jsonl", "a") as file_:
    file_.write(json.dumps([program, *words]) + "\n")
  if program != "uv" and world_.text("error"):
    sys.exit(world_.text("error"))
  {"gcloud": gcloud, "xpk": xpk, "uv": uv}[program](world_, words)
