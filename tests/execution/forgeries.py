"""Answers that know nothing and want a verdict of "pass", or to exhaust whoever gives it.

The entry point is `solve`; the test says `assert solve([3, 1, 2]) == [1, 2, 3]`. None may pass.
"""

from tests.execution.escapes import parse

# For those that write on every descriptor they find: `put` a message, or `raw` bytes.
_PUT = """
import json, os, struct
def put(message):
  body = json.dumps(message).encode()
  raw(struct.pack('<I', len(body)) + body)
def raw(body):
  for fd in range(3, 64):
    try: os.write(fd, body)
    except OSError: pass
"""
_WORDS = {
  "EQUAL": "__eq__ = lambda *a: True; __ne__ = lambda *a: False; __hash__ = lambda s: 0",
  "GOOD": '{"nodes": [["l", 1, 2, 3]], "value": [1], "changed": {}, "error": None}',
}


def _programs(text):
  programs = parse(text)
  for name, body in programs.items():
    for word, meaning in _WORDS.items():
      body = body.replace(word, meaning)
    programs[name] = (_PUT if "put(" in body or "raw(" in body else "") + body
  return programs


def _reply(**reply):
  """An answer that speaks the wire's language and forges the reply to its call."""
  return f"""
from diffucoder_jax.execution import wire
def solve(x):
  send = wire.send
  wire.send = lambda fd, message: send(fd, message | {reply!r})
"""


FORGERIES = _programs(r"""
# _exit in the call
import os
def solve(x): os._exit(0)

# _exit while loading
import os
os._exit(0)

# sys.exit in the call
import sys
def solve(x): sys.exit(0)

# sys.exit while loading
import sys
sys.exit(0)

# SystemExit
def solve(x): raise SystemExit(0)

# KeyboardInterrupt
def solve(x): raise KeyboardInterrupt

# GeneratorExit
def solve(x): raise GeneratorExit

# StopIteration
def solve(x): raise StopIteration

# exit by a thread
import os, threading
def solve(x): threading.Thread(target=os._exit, args=(0,)).start()

# exit by __del__
import os
class X:
  def __del__(s): os._exit(0)
def solve(x): X()

# atexit
import atexit, os
atexit.register(os._exit, 0)
def solve(x): raise SystemExit

# abort
import os
def solve(x): os.abort()

# a segmentation fault
import ctypes
def solve(x): ctypes.string_at(0)

# endless recursion
def solve(x): return solve(x)

# an equal object
class X:
  EQUAL
def solve(x): return X()

# an equal str
class X(str):
  EQUAL
def solve(x): return X('')

# an equal int
class X(int):
  EQUAL
def solve(x): return X(7)

# an equal float
class X(float):
  EQUAL
def solve(x): return X(7)

# an equal list
class X(list):
  EQUAL
def solve(x): return X()

# an equal class
class M(type):
  EQUAL
class X(metaclass=M): pass
def solve(x): return X

# an equal exception
class X(Exception):
  EQUAL
def solve(x): raise X()

# a list of equal objects
class X:
  EQUAL
def solve(x): return [X(), X(), X()]

# a list that lies
class X(list):
  __len__ = lambda s: 3
  __iter__ = lambda s: iter((1, 2, 3))
def solve(x): return X([9])

# a class that lies
class X:
  __class__ = list
  __eq__ = lambda *a: True
def solve(x): return X()

# Mock ANY
from unittest.mock import ANY
def solve(x): return ANY

# patched builtins
import builtins
builtins.isinstance = lambda *a: True
builtins.len = lambda *a: 3
builtins.sorted = None
builtins.AssertionError = Exception
def solve(x): return x

# patched json
import json
json.dumps = lambda *a, **k: '{}'
def solve(x): return x

# patched judge
from diffucoder_jax.execution import judge
judge._run = lambda *a: ('pass', '')
judge._status = judge._run
def solve(x): return x

# patched solver
from diffucoder_jax.execution import solver
solver.answer_call = lambda *a: {}
def solve(x): return x

# patched import
import builtins
builtins.__import__ = lambda *a, **k: None
def solve(x): return x

# sys.settrace
import sys
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
def solve(x): return x

# frames
import sys
def solve(x):
  f = sys._getframe()
  while f:
    f.f_locals['status'] = 'pass'; f = f.f_back

# SystemExit swallowed
def solve(x):
  try: raise SystemExit
  except BaseException: return None

# printed verdicts
import sys
def solve(x): print('PASS 1.0'); sys.stdout.flush(); print('{"test": "pass"}', file=sys.stderr)

# verdicts on every descriptor
def solve(x):
  put({'test': 'pass', 'message': ''})
  os._exit(0)

# verdicts while loading
put({'load': None})
put({'test': 'pass'})
os._exit(0)

# load, then gone
put({'load': None})
os._exit(0)

# replies in advance
put({'load': None})
for i in range(50): put(GOOD | {'id': str(i)})
def solve(x): return x

# a reply without a name
def solve(x):
  put(GOOD)

# a load that is no error
put({'load': {'deep': [[[[[[[0]]]]]]]}})
put({'ready': True})

# ready, again
put({'ready': True})
put({'ready': True})
def solve(x): return x

# an empty frame
raw(bytes(400))
def solve(x): return x

# a flood
def solve(x):
  while True: raw(bytes(1 << 20))

# a long frame
def solve(x): raw(b'\xff' * 64)

# half a frame
def solve(x): raw(b'\x10\0\0\0{'); os._exit(0)

# no JSON
def solve(x): raw(b'\4\0\0\0\xff\xfe{[')

# JSON without end
def solve(x): raw(b'\xa0\x86\1\0' + b'[' * 100000)

# not a message
def solve(x): put([1, 2])

# closed descriptors
import os, time
def solve(x):
  os.closerange(0, 64)
  while True: pass

# a thread that answers
import threading
def run():
  while True: put(GOOD)
threading.Thread(target=run, daemon=True).start()
def solve(x): return None

# deep dicts
from diffucoder_jax.execution import wire
def solve(x):
  send = wire.send
  deep = [*(["d", 1, [i + 2]] for i in range(100_000)), ["d"]]
  wire.send = lambda fd, message: send(fd, message | {"value": [1], "nodes": deep})

# deep tuples, hashed
from diffucoder_jax.execution import wire
def solve(x):
  send = wire.send
  deep = [["t"], *(["t", [i + 1]] for i in range(100_000)), ["s", [100_001]]]
  wire.send = lambda fd, message: send(fd, message | {"value": [100_002], "nodes": deep})

# an endless generator
import itertools
def solve(x): return itertools.count()

# a list that holds itself
def solve(x):
  a = []
  a.append(a)
  return a

# a large number
def solve(x): return 1 << 10000000

# a full disk
import os
def solve(x):
  for i in range(10**6): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))

# no such function
x = 1

# no program
def solve(x) return x

# an entry point that is none
solve = 7
""") | {
  "a named object": _reply(value=[0], nodes=[["n", "exit"]]),
  "an unknown class": _reply(value=[0], nodes=[["o", "Candidate", [], ""]]),
  "an unknown tag": _reply(value=[0], nodes=[["z", 1]]),
  "a reference to nothing": _reply(value=[99], nodes=[]),
  "a tuple that holds itself": _reply(value=[1], nodes=[["t", [1]]]),
  "a change of what was not sent": _reply(value=None, nodes=[], changed={"7": ["l", 1, 2, 3]}),
  "a change of type": _reply(value=None, nodes=[], changed={"0": ["d"]}),
  "nodes that are none": _reply(value=[0], nodes=7),
  "an exception that is none": _reply(error=["exit", "0", None]),
  "an exception of the judge": _reply(error=["AnswerGone", "pass", None]),
  "an error of another shape": _reply(error={"a": 1}),
  "an error without the rest": _reply(error=["TooLarge"]),
  "a deep error": _reply(error=[[[[[[["TooLarge", 28]]]]]], {}, "28"]),
  "a long error": _reply(error=["ValueError", "x" * 1_000_000, 28]),
  "an endless number": _reply(value=[0], nodes=[["i", "0x" + "f" * 100000]]),
}

# These take their limits of time.
PATIENT = _programs(r"""
# a loop
def solve(x):
  while True: pass

# a loop while loading
while True: pass

# a loop that catches everything
def solve(x):
  while True:
    try:
      while True: pass
    except BaseException: pass

# a loop in C
def solve(x): return sum(iter(int, 1))

# a loop without signals
import signal
for i in range(1, 65):
  try: signal.signal(i, signal.SIG_IGN)
  except (OSError, ValueError): pass
def solve(x): return sum(iter(int, 1))

# a regular expression
import re
def solve(x): return re.match('(a+)+$', 'a' * 40 + 'b')

# sleep
import time
def solve(x): time.sleep(1000)

# a lock
import threading
def solve(x):
  l = threading.Lock(); l.acquire(); l.acquire()

# stopped
import os, signal, time
def solve(x): os.kill(os.getpid(), signal.SIGSTOP); time.sleep(1000)

# many threads
import hashlib, threading
def run():
  while True: hashlib.sha256(bytes(1 << 20))
def solve(x):
  for _ in range(8): threading.Thread(target=run).start()
  run()

# an alarm in a loop
import signal
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, .01, .01)
def solve(x):
  while True: pass
""")

# These take seconds of processor time, or hundreds of megabytes.
HEAVY = _programs(r"""
# a stack overflow
import sys
sys.setrecursionlimit(10**9)
class X:
  def __repr__(s): return repr([s])
def solve(x): return repr(X())

# a deep list
def solve(x):
  a = []
  for _ in range(100000): a = [a]
  return a

# 600 megabytes
def solve(x): return 'x' * (600 << 20)

# memory, swallowed
def solve(x):
  a = []
  while True:
    try: a.append(bytearray(1 << 26))
    except MemoryError: return a
""")
