"""Frames of JSON between processes: four bytes of length, then the message. See `values` for values."""

import json
import os
import struct

FRAME_BYTES = 64 << 20  # the largest frame anybody may send


class WireError(ValueError):
  """The other side sent what no honest encoder sends."""


class TooLarge(WireError):
  """A frame is larger than the reader takes."""


def send(fd, message):
  """Writes a JSON-able message. Raises OSError (the reader is gone), TooLarge."""
  body = json.dumps(message, separators=(",", ":")).encode()
  if len(body) > FRAME_BYTES:
    raise TooLarge(f"a message of {len(body)} bytes")
  rest = memoryview(struct.pack("<I", len(body)) + body)
  while rest:
    rest = rest[os.write(fd, rest) :]


def _read(fd, count):
  parts = []
  while count:
    part = os.read(fd, min(count, 1 << 20))
    if not part:
      raise EOFError("the other side is gone")
    parts.append(part)
    count -= len(part)
  return b"".join(parts)


def receive(fd, limit=FRAME_BYTES):
  """Reads a message; returns (message, bytes read). Raises EOFError, TooLarge, WireError, OSError."""
  (count,) = struct.unpack("<I", _read(fd, 4))
  if count > min(limit, FRAME_BYTES):
    raise TooLarge(f"a message of {count} bytes; {min(limit, FRAME_BYTES)} are allowed")
  return parse(_read(fd, count)), count


def parse(body):
  """JSON from bytes. Raises WireError."""
  try:
    return json.loads(body)
  except (ValueError, RecursionError) as error:
    raise WireError(f"no JSON: {error}") from None
