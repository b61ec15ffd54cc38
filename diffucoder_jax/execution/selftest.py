"""Attacks that every sandbox has to withstand before it is used; about 10 ms each.

Each attack is an answer that tries something and returns "contained" when it could not, so that the
job passes when the sandbox held; the last ones try to pass without an answer and have to fail. The
host looks for itself whether anything arrived.
"""

import os
import secrets
import socket
import tempfile

# name: body of `attack(path, port, pid)`; it escaped if it ends without an exception.
ATTACKS = {
  "reading a file": "open(path + '/secret').read()",
  "writing a file": "open(path + '/written', 'w').close()",
  "a connection": "import socket; socket.create_connection(('127.0.0.1', port), 2)",
  "a process": "import os\n  if os.fork() == 0: os._exit(0)",
  "a namespace": (
    "import ctypes, os\n  if ctypes.CDLL(None).unshare(0x10000000) != 0: raise OSError()"
  ),
  "a signal": "import os; os.kill(pid, 0)",
  "a program": "import os; os.execv('/bin/true', ['true'])",
  "more memory than allowed": "import mmap; mmap.mmap(-1, memory)",
  "the tests' text": (
    "import gc, sys\n  frame, seen = sys._getframe(), []\n"
    "  while frame: seen.append(frame.f_locals); frame = frame.f_back\n"
    "  if 'test-' + marker not in str(gc.get_objects()) + str(seen): raise OSError()"
  ),
}
# At level full the file is not only unreadable: it is not there.
HIDDEN = {"the host's files": "import os; os.stat(path + '/secret')"}
FORGERIES = {
  "an exit": "import os\ndef attack(*a): os._exit(0)",
  "an object equal to everything": (
    "class X(str):\n  __eq__ = lambda *a: True\n  __hash__ = str.__hash__\n"
    "def attack(*a): return X('wrong')"
  ),
}


def escapes(box, integrity="isolated"):
  """The names of the attacks that get through.

  Args: box: a Sandbox with a fork server. integrity: of the forgeries' jobs; `shared` takes the
    judge away, to test this test.
  """
  from diffucoder_jax.execution.sandbox import Job  # it imports this module

  attacks = ATTACKS | (HIDDEN if box.level == "full" else {})
  marker = secrets.token_hex(8)
  with tempfile.TemporaryDirectory() as path, socket.create_server(("127.0.0.1", 0)) as server:
    os.chmod(path, 0o777)
    with open(os.path.join(path, "secret"), "w") as f:
      f.write(marker)
    os.chmod(f.name, 0o644)
    server.setblocking(False)
    jobs = []
    arguments = f"{path!r}, {server.getsockname()[1]}, {os.getpid()}"
    for body in attacks.values():
      body = body.replace("memory", str(box.limits.memory_bytes))
      code = (
        f"marker = {marker[::-1]!r}[::-1]\ndef attack(path, port, pid):\n try:\n  {body}\n"
        " except (OSError, MemoryError): return 'contained'\n return 'escaped'\n"
      )
      test = f"assert candidate({arguments}) == 'contained', {'test-' + marker!r}"
      jobs.append(Job(code, "attack", (test,)))
    for code in FORGERIES.values():
      test = f"assert candidate({arguments}) == 'right'"
      jobs.append(Job(code, "attack", (test,), integrity=integrity))
    outcomes = box.run(jobs)
    through = [
      # Also when it could not be told.
      name if outcome.status == "fail" else f"{name} ({outcome.status}: {outcome.message})"
      for name, outcome in zip(attacks, outcomes, strict=False)
      if outcome.status != "pass"
    ]
    through += [
      name
      for name, outcome in zip(FORGERIES, outcomes[len(attacks) :], strict=True)
      if outcome.status not in ("fail", "error", "killed")
    ]
    if os.path.exists(os.path.join(path, "written")) and "writing a file" not in through:
      through.append("writing a file")
    try:
      server.accept()
      through.append("a connection that the host saw")
    except BlockingIOError:
      pass
  return through
