"""The process in which the tests run. The answer is behind a stub: `Candidate`.

A test passes if it raises nothing here, where the answer has never run: what comes from the solver
is plain data in exact builtin types, an exception is rebuilt from its name, and a reply that does
not fit the call ends the solver. The judge tells the host directly; it is confined like the solver,
since tests of a dataset are nobody's friends either, and it has nowhere to write.
"""

import builtins
import errno
import os
import re
import sys
import types

from diffucoder_jax.execution import solver, values, wire

MODULE = "judge"
USED_BY_TESTS = ("sys", "math", "collections", "itertools", "re", "random", "string")  # MBPP/596


class AnswerGone(BaseException):
  """The solver ended or was cut off; `status` is None when the fork server has to say why."""

  def __init__(self, message, status=None):
    super().__init__(message)
    self.status = status


class AnswerExit(BaseException):
  """The answer raised what is no Exception, such as SystemExit: no test may catch it by accident."""


def _claim(error):
  """The solver's description of an exception, [class name, text, errno or None], made sure of."""
  parts = (error if type(error) is list else []) + [None, None, None]
  name, text = (x[:300] if type(x) is str else "" for x in parts[:2])
  return [name, text, parts[2] if type(parts[2]) is int else None]


class Channel:
  """The judge's end of the socket to the solver.

  Attributes: gone: the AnswerGone that ended it, or None. error: the last call's error as the solver
    described it, or None. left: bytes that the answer may still send in this test.
  """

  def __init__(self, fd, output_bytes, tmp_fd):
    self.fd, self.output_bytes, self.tmp_fd = fd, output_bytes, tmp_fd
    self.classes, self.names = {}, {}
    self.gone, self.error, self.left = None, None, output_bytes

  def _end(self, message, status=None):
    self.gone = AnswerGone(message, status)
    return self.gone

  def receive(self):
    """The next message; raises AnswerGone."""
    try:
      message, count = wire.receive(self.fd, self.left)
    except (EOFError, OSError):
      raise self._end("the answer's process ended") from None
    except wire.TooLarge as error:
      raise self._end(f"the answer sent too much: {error}", "killed") from None
    except wire.WireError as error:
      raise self._end(f"the answer forged a reply: {error}", "killed") from None
    except MemoryError:
      raise self._end("the answer sent more than fits into memory", "oom") from None
    self.left -= count
    if type(message) is not dict:
      raise self._end("the answer forged a reply", "killed")
    return message

  def call(self, args, kwargs):
    """One call of the entry point: arguments over, changes in place and the result back."""
    if self.gone:
      raise self.gone
    self.error = None
    encoder = values.Encoder(self.classes, strict=True)
    call = {
      # Nobody can answer in advance what has not been asked.
      "id": os.urandom(8).hex(),
      "args": [encoder.value(x) for x in args],
      "kwargs": {name: encoder.value(x) for name, x in kwargs.items()},
    }
    encoder.finish()
    try:
      wire.send(self.fd, call | {"nodes": encoder.nodes})
    except OSError:
      raise self._end("the answer's process ended") from None
    reply = self.receive()
    try:
      if reply.get("id") != call["id"]:
        raise wire.WireError("it answers another call")
      decoder = values.Decoder(reply["nodes"], self.classes, encoder.objects)
      changed = {int(number): node for number, node in reply["changed"].items()}
      if any(number not in range(len(encoder.objects)) for number in changed):
        raise wire.WireError("it changes what was not sent")
      for number, node in changed.items():
        decoder.fill(number, node)
      value = decoder.value(reply["value"]) if reply.get("error") is None else None
    except MemoryError:
      raise
    except Exception as error:
      raise self._end(f"the answer forged a reply: {error!r:.200}", "killed") from None
    if reply.get("error") is not None:
      self.error = _claim(reply["error"])
      raise self._exception(self.error)
    return value

  def _exception(self, error):
    """The exception that the answer says it raised, if it is a builtin or the dataset's own."""
    name, text, _ = error
    kind = getattr(builtins, name, None) or self.names.get(name)
    if kind in (StopIteration, StopAsyncIteration):
      # It would end a loop of the test's over map(candidate, ...), and with it the assertions.
      return RuntimeError(f"{name}: {text}")
    if isinstance(kind, type) and issubclass(kind, Exception):
      try:
        return kind(text)
      except Exception:  # UnicodeDecodeError wants five arguments
        return RuntimeError(f"{name}: {text}")
    if isinstance(kind, type) and issubclass(kind, BaseException):
      return AnswerExit(f"{name}: {text}")
    return RuntimeError(f"{name}: {text}")

  def tmp_is_full(self):
    """Whether the solver's /tmp has no room left: a fact of the kernel's, not the answer's word."""
    if self.tmp_fd is None:
      return False
    room = os.fstatvfs(self.tmp_fd)
    return room.f_bfree == 0 or room.f_ffree == 0


class Candidate:
  """Called like the answer's entry point, `name`."""

  def __init__(self, channel, name):
    self._channel = channel
    self.__name__ = self.__qualname__ = name

  def __call__(self, /, *args, **kwargs):  # `self` may be an argument of the answer's
    return self._channel.call(args, kwargs)

  def __get__(self, instance, owner=None):  # a function in a class body would be bound
    return self


def _status(channel, error):
  """(status, message) of a test that raised."""
  claimed = channel.error or [None, None, None]
  if channel.gone:
    return channel.gone.status, str(channel.gone)
  if claimed[2] == errno.ENOSPC and channel.tmp_is_full():
    return "infra", "the answer's /tmp is full"
  if claimed[0] == "TooLarge":
    return "killed", f"the answer sent too much: {claimed[1]}"
  name, text, number = solver.describe(error)
  if isinstance(error, values.Unsendable):
    text += "; such tests need Job(integrity='shared')"
  if isinstance(error, AssertionError) and claimed[0] == "AssertionError":
    return "error", f"{name} in the answer: {text}"
  if errno.ENOMEM in (number, claimed[2]):
    return "oom", f"{name}: {text}"
  return solver.status_of(error), f"{name}: {text}"


def _run(channel, source, namespace):
  """Runs one test; returns (status, message)."""
  channel.left, channel.error = channel.output_bytes, None
  try:
    exec(compile(source, "<test>", "exec", dont_inherit=True), namespace)
  except BaseException as error:
    return _status(channel, error)
  if channel.gone:  # and the test swallowed it
    return _status(channel, channel.gone)
  return "pass", ""


def serve(payload, host, rpc, tick, tmp_fd):
  """Judges the tests one after the other, each in a copy of the prelude's namespace.

  Args: payload: {"prelude", "entry_point", "tests", "output_bytes"}. host, rpc, tick: descriptors;
    a byte on `tick` starts the clocks of the next test. tmp_fd: the solver's /tmp or None.
  Events to the host: {"ready"} when the solver is confined, {"load": None | status, "message"}, per
    test {"test": status, "message"}. {"gone": status | None, "message"} comes instead of
    the next of these when the solver has ended; None: the fork server knows why.
  Returns: whether every test has its verdict.
  """
  channel = Channel(rpc, payload["output_bytes"], tmp_fd)
  try:
    if channel.receive() != {"ready": True}:
      return False  # it never ran; no event is the event
  except AnswerGone:
    return False
  wire.send(host, {"ready": True})
  try:
    loaded = channel.receive()
    if list(loaded) != ["load"]:
      raise AnswerGone("the answer forged a message", "killed")
    error = loaded["load"]
    if error is not None:
      name, text, number = _claim(error)
      status = "oom" if name == "MemoryError" or number == errno.ENOMEM else "error"
      if number == errno.ENOSPC and channel.tmp_is_full():
        status = "infra"
      wire.send(host, {"load": status, "message": f"while loading: {name}: {text}"})
      return True
  except AnswerGone as gone:
    wire.send(host, {"gone": gone.status, "message": f"while loading: {gone}"})
    return False

  module = types.ModuleType(MODULE)
  sys.modules[MODULE] = module
  namespace = module.__dict__
  namespace |= {name: sys.modules[name] for name in USED_BY_TESTS}
  try:
    exec(compile(payload["prelude"], "<prelude>", "exec", dont_inherit=True), namespace)
  except BaseException as error:
    text = ": ".join(solver.describe(error)[:2])
    wire.send(host, {"load": "error", "message": f"the dataset's prelude: {text}"})
    return True
  channel.classes = values.shared_classes(namespace, MODULE)
  channel.names = {
    name: kind
    for name, kind in namespace.items()
    if isinstance(kind, type) and issubclass(kind, Exception)
  }
  wire.send(host, {"load": None})
  entry = payload["entry_point"]
  namespace["candidate"] = Candidate(channel, entry)
  if entry.isidentifier():
    namespace[entry] = namespace["candidate"]
  elif method := re.fullmatch(r"(\w+)\(\)\.(\w+)", entry):  # tests may write Solution().solve(...)
    stub = types.SimpleNamespace(**{method[2]: namespace["candidate"]})
    namespace[method[1]] = lambda: stub
  for source in payload["tests"]:
    os.write(tick, b"t")
    status, message = _run(channel, source, dict(namespace))
    if channel.gone:
      wire.send(host, {"gone": status, "message": message})
      return False
    wire.send(host, {"test": status, "message": message})
  return True
