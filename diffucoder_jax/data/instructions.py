"""Instruction data: records of several schemas in jsonl, jsonl.gz and parquet, as conversations.

A record that cannot be used is named at once or counted and skipped, as `on_broken` says.
"""

from typing import NamedTuple

from absl import logging
from etils import epath

from diffucoder_jax.data import chat, rows

_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_NAMES_SHOWN = 5


class Conversation(NamedTuple):
  """Messages (see `chat.check_messages`), and a name that leads back to their record."""

  name: str
  messages: list[dict[str, str]]


def read_conversations(path, schema: str, on_broken: str = "error"):
  """Reads instruction data.

  Args:
    path: a .jsonl, .jsonl.gz or .parquet file, or a folder: all of them directly in it, by name.
    schema: a key of `SCHEMAS`.
    on_broken: "error": the first record that cannot be used stops with its name. "skip": such
      records are left out, counted, and the first few of them logged.
  Returns:
    (list of `Conversation` in the order of the files, names of the broken records).
  Raises:
    FileNotFoundError: nothing there.
    ValueError: an unknown schema or policy, a broken record, a damaged file, or nothing left.
  """
  if schema not in SCHEMAS:
    raise ValueError(f"unknown data.schema {schema!r}; known: {', '.join(SCHEMAS)}")
  if on_broken not in ("error", "skip"):
    raise ValueError(f"data.on_broken must be 'error' or 'skip', got {on_broken!r}")
  columns, to_messages = SCHEMAS[schema]
  found, broken = [], []
  for file in _files(path):
    for name, load in rows.open_rows(file, columns):
      try:
        record = load()
        if not isinstance(record, dict):
          raise ValueError("it is no JSON object")
        messages = to_messages(record)
        chat.check_messages(messages)
      # UnicodeError and JSONDecodeError are ValueErrors.
      except (ValueError, RecursionError) as error:
        where = f"{name} cannot be used as {schema!r}: {error}"
        if on_broken == "error":
          raise ValueError(
            f"{where}; repair or remove it, or set data.on_broken='skip' or another data.schema"
          ) from error
        broken.append(name)
        if len(broken) <= _NAMES_SHOWN:
          logging.warning("skipped %s", where)
        continue
      found.append(Conversation(name, messages))
  if broken:
    logging.warning("skipped %d broken record(s) of %d", len(broken), len(broken) + len(found))
  if not found:
    skipped = f" ({len(broken)} were broken and skipped)" if broken else ""
    raise ValueError(f"no conversation in {path}{skipped}; give another data.path or data.schema")
  return found, broken


def _opencoder(record):
  """OpenCoder SFT (opc-sft-stage1, -stage2): what is asked in `instruction`, answered in `output`."""
  return _turns(_field(record, "instruction"), _field(record, "output"))


def _leetcode(record):
  """LeetCodeDataset: `query` and `response`.

  Where no model answered (response is empty in 109 of its 228 test records), the answer is the
  reference in `completion`, fenced as the others are.
  """
  response = _field(record, "response")
  if not response.strip():
    completion = _field(record, "completion")
    if not completion.strip():
      raise ValueError("'response' and 'completion' are both empty")
    response = f"```python\n{completion.rstrip()}\n```"
  return _turns(_field(record, "query"), response)


def _messages(record):
  """`messages`: a list of {"role", "content"}; nothing after the last assistant message is used."""
  if "messages" not in record:
    raise ValueError(f"it has no 'messages', only {sorted(record)}")
  messages = record["messages"]
  if not isinstance(messages, list):
    raise ValueError(f"'messages' is a {type(messages).__name__}, not a list")
  roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
  if "assistant" not in roles:
    raise ValueError("no message is the assistant's")
  return messages[: len(roles) - roles[::-1].index("assistant")]


# Name -> (columns that it reads, function from a record to messages, ValueError if it cannot).
SCHEMAS = {
  "opencoder": (("instruction", "output"), _opencoder),
  "leetcode": (("query", "response", "completion"), _leetcode),
  "messages": (("messages",), _messages),
}


def _field(record, key):
  if key not in record:
    raise ValueError(f"it has no {key!r}, only {sorted(record)}")
  value = record[key]
  if isinstance(value, bytes):
    value = value.decode()
  if not isinstance(value, str):
    raise ValueError(f"{key!r} is a {type(value).__name__}, not a text")
  return value


def _turns(instruction, output):
  return [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]


def _files(path):
  if not path:
    raise ValueError("data.path is empty; instruction data needs a file or a folder")
  found = epath.Path(path)
  if not found.exists():
    raise FileNotFoundError(f"data.path={str(path)!r} does not exist")
  if found.is_dir():
    files = sorted(file for file in found.iterdir() if file.name.endswith(_ENDINGS))
    if not files:
      raise ValueError(f"no {', '.join(_ENDINGS)} file in data.path={str(path)!r}")
    return files
  if not found.name.endswith(_ENDINGS):
    raise ValueError(f"data.path={str(path)!r} must end in one of {', '.join(_ENDINGS)}")
  return [found]
