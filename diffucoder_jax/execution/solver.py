"""The process in which the answer runs. It sees the calls' arguments and never a test.

Everything in this process is in the answer's hands, this module included: what it sends is a claim,
and the judge takes it as plain data only.
"""

import os
import sys
import types

from diffucoder_jax.execution import values, wire

MODULE = "solution"  # the answer's __name__: not "__main__", whose block would read input


def load(payload):
  """Runs the dataset's prelude, then the answer. Returns (namespace, classes both sides know)."""
  module = types.ModuleType(MODULE)
  sys.modules[MODULE] = module  # dataclasses and typing look their module up
  namespace = module.__dict__
  exec(compile(payload["prelude"], "<prelude>", "exec", dont_inherit=True), namespace)
  classes = values.shared_classes(namespace, MODULE)
  exec(compile(payload["code"], "<answer>", "exec", dont_inherit=True), namespace)
  own = values.shared_classes(namespace, MODULE)
  # An answer that defines ListNode again means its own.
  return namespace, {name: own.get(name, kind) for name, kind in classes.items()}


def describe(error):
  """An exception as plain data: [class name, text, errno or None]."""
  try:
    text = str(error)[:300]
  except BaseException:
    text = ""
  number = getattr(error, "errno", None)
  # An answer's class may have any object there, also a number with too many digits for JSON.
  known = type(number) is int and abs(number) < 1 << 31
  return [type(error).__name__, text, number if known else None]


def answer_call(entry, call, classes):
  """Calls the entry point; returns the reply: a value or an error, and what the call changed."""
  decoder = values.Decoder(call["nodes"], classes, named=True)
  args = [decoder.value(x) for x in call["args"]]
  kwargs = {name: decoder.value(x) for name, x in call["kwargs"].items()}
  originals = decoder.objects
  reply = {"id": call["id"]}
  value = None
  try:
    value = entry(*args, **kwargs)
  except BaseException as error:
    reply["error"] = describe(error)
  encoder = values.Encoder(classes, originals)
  try:
    reply["value"] = encoder.value(value)
    states = {
      number: (node, encoder.state(originals[number]))
      for number, node in enumerate(call["nodes"])
      if node is not None and (type(originals[number]) in values.TAGS or node[0] == "o")
    }
    encoder.finish()
    # `repr`, since 1 == True == 1.0 and a change of type is one too.
    changed = {n: now for n, (was, now) in states.items() if repr(was) != repr(now)}
  except BaseException as error:
    return {"id": call["id"], "error": describe(error), "nodes": [], "changed": {}}
  return reply | {"nodes": encoder.nodes, "changed": changed}


def serve(payload, rpc):
  """Loads the answer, tells the judge how that went, and answers calls until the judge is gone.

  Args: payload: {"code", "prelude", "entry_point"}. rpc: descriptor of the socket to the judge.
  """
  wire.send(rpc, {"ready": True})  # confined, and no byte of the answer has run
  try:
    namespace, classes = load(payload)
    entry = eval(payload["entry_point"], namespace)
  except BaseException as error:
    wire.send(rpc, {"load": describe(error)})
    return
  wire.send(rpc, {"load": None})
  while True:
    call, _ = wire.receive(rpc)
    reply = answer_call(entry, call, classes)
    try:
      wire.send(rpc, reply)
    except (MemoryError, wire.TooLarge) as error:
      wire.send(rpc, {"id": call["id"], "error": describe(error), "nodes": [], "changed": {}})


def serve_shared(payload, host, tick):
  """The answer and the tests in one process, for tests that need the answer's classes or globals.

  The answer can forge every verdict here; outcomes say `shared`. Events as in `judge.serve`.
  """
  wire.send(host, {"ready": True})
  try:
    namespace, _ = load(payload)
    entry = eval(payload["entry_point"], namespace)
  except BaseException as error:
    name, text, _ = describe(error)
    status = "oom" if name == "MemoryError" else "error"
    wire.send(host, {"load": status, "message": f"while loading: {name}: {text}"})
    return True
  wire.send(host, {"load": None})
  for source in payload["tests"]:
    os.write(tick, b"t")
    status, message = "pass", ""
    try:
      exec(compile(source, "<test>", "exec", dont_inherit=True), namespace | {"candidate": entry})
    except BaseException as error:
      name, text, _ = describe(error)
      status, message = status_of(error), f"{name}: {text}"
    wire.send(host, {"test": status, "message": message})
  return True


def status_of(error):
  """The status of a test that raised."""
  if isinstance(error, AssertionError):
    return "fail"
  return "oom" if isinstance(error, MemoryError) else "error"
