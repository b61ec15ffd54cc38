"""Conversations as token ids, in the ChatML layout that Qwen2.5-Coder and DiffuCoder use.

    <|im_start|>system
    ...<|im_end|>
    <|im_start|>user
    ...<|im_end|>
    <|im_start|>assistant
    ...<|im_end|>
    <|dlm_pad|><|dlm_pad|>...

Special tokens are put in as ids and never read out of a text: what a user writes opens no turn.
"""

import ast
import re

from diffucoder_jax.data.tokenizer import Tokenizer

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|dlm_pad|>"
ROLES = ("system", "user", "assistant")
# DiffuCoder is asked with this one (paper, tables 5 and 6) ...
SYSTEM = "You are a helpful assistant."
# ... and Qwen2.5-Coder-Instruct with this one, where a conversation brings none.
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n`]*$", re.MULTILINE)


def chat_ids(tokenizer: Tokenizer) -> dict[str, int]:
  """Ids of the three tokens that a chat needs, by their text.

  Raises:
    ValueError: the vocabulary lacks one; names it.
  """
  missing = [name for name in (START, END, PAD) if name not in tokenizer.special_ids]
  if missing:
    raise ValueError(
      f"this tokenizer has no {missing[0]} among its special tokens, which instruction tuning "
      "needs; use one trained by prepare, or DiffuCoder's, or add the token to the tokenizer.json"
    )
  return {name: tokenizer.special_ids[name] for name in (START, END, PAD)}


def check_messages(messages) -> None:
  """Refuses what is no conversation that ends with an answer.

  Args:
    messages: list of {"role", "content"}: perhaps a system message, then the user's and the
      assistant's, the last one the assistant's.
  Raises:
    ValueError: says which message is wrong and how.
  """
  if not isinstance(messages, list | tuple) or not messages:
    raise ValueError("there are no messages")
  for i, message in enumerate(messages):
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
      raise ValueError(f"message {i} is not an object with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES:
      raise ValueError(f"message {i} has the role {role!r}; known: {', '.join(ROLES)}")
    if role == "system" and i:
      raise ValueError(f"message {i} is a system message; only the first may be one")
    if not isinstance(content, str):
      raise ValueError(f"message {i} has a content of type {type(content).__name__}, not a text")
    if role != "system" and not content.strip():
      raise ValueError(f"message {i} ({role}) is empty")
    content.encode()  # lone surrogates would fail in the tokenizer, without a name
  if messages[-1]["role"] != "assistant":
    raise ValueError(f"the last message is the {messages[-1]['role']}'s, not the assistant's")
  if not any(message["role"] == "user" for message in messages):
    raise ValueError("no message is the user's")


def render(messages, tokenizer: Tokenizer, system: str = SYSTEM) -> tuple[list[int], list[int]]:
  """Token ids of a conversation whose last message is the assistant's.

  Prompt and response are encoded apart, as they are when a model answers.

  Args:
    messages: see `check_messages`; earlier assistant messages belong to the prompt.
    tokenizer: a `Tokenizer` with the special tokens of `chat_ids`.
    system: the system message where the conversation has none; "" for no system turn.
  Returns:
    (prompt, response). The prompt ends after "<|im_start|>assistant\\n" and begins with bos if the
    tokenizer wants one; the response ends with <|im_end|> and a newline, pads are not in it.
  Raises:
    ValueError: no conversation, or a tokenizer without the special tokens.
  """
  return render_batch([messages], tokenizer, system)[0]


def render_batch(conversations, tokenizer: Tokenizer, system: str = SYSTEM):
  """`render` of each conversation, encoded on all cores."""
  ids = chat_ids(tokenizer)
  sides = []
  for messages in conversations:
    check_messages(messages)
    answer = messages[-1]["content"]
    sides += [_prompt_parts(messages[:-1], tokenizer, ids, system), [answer, ids[END], "\n"]]
  rendered = _encode_parts(sides, tokenizer)
  return list(zip(rendered[::2], rendered[1::2], strict=True))


def render_prompt(messages, tokenizer: Tokenizer, system: str = SYSTEM, primer: str = ""):
  """Token ids to answer: the prompt of `render`, for messages that end with the user's.

  Args:
    messages, tokenizer, system: as `render`.
    primer: how the answer must begin, such as the paper's "Here is the code to solve this
      problem:\\n```python\\n"; give it to `answer_of` together with what the model wrote.
  Returns:
    list of ids.
  """
  check_messages([*messages, {"role": "assistant", "content": "x"}])
  parts = _prompt_parts(messages, tokenizer, chat_ids(tokenizer), system)
  return _encode_parts([[*parts, primer] if primer else parts], tokenizer)[0]


def answer_of(text: str) -> str:
  """The program in a response: the first fenced block of Python, or what looks most like it.

  Takes blocks of other or no language, a fence that is never closed or never opened (the prompt
  opened it), and a bare program. Of several candidates it is the first that parses as Python and
  does more than state a value; if none does, the first one, for the judge to refuse.

  Args:
    text: a response, without special tokens.
  Returns:
    the code; "" for an empty response.
  """
  fences = list(_FENCE.finditer(text))
  tagged, others = [], []
  opened = None  # the fence that a block began with
  for fence in fences:
    if opened is not None:
      (tagged if _is_python(opened) else others).append(text[opened.end() + 1 : fence.start()])
      opened = None if not fence[1] else fence
    else:
      opened = fence
  if opened is not None:
    (tagged if _is_python(opened) else others).append(text[opened.end() + 1 :])
  # A fence inside a docstring cuts the program: all from the first to the last one; and the text
  # before the first, which a primer in the prompt opened.
  more = (
    [text[fences[0].end() + 1 : fences[-1].start()], text[: fences[0].start()]] if fences else []
  )
  candidates = [code for code in (*tagged, *others, *more, text) if code.strip()]
  return next((code for code in candidates if _is_program(code)), (candidates or [""])[0])


def _is_python(fence):
  return fence[1].lower() in ("python", "python3", "py")


def _is_program(code):
  try:
    body = ast.parse(code).body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False
  return any(not isinstance(statement, ast.Expr) for statement in body)


def _prompt_parts(messages, tokenizer, ids, system):
  """Texts and ids in turn; each text is encoded by itself, as between special tokens of a text."""
  if system and messages[0]["role"] != "system":
    messages = [{"role": "system", "content": system}, *messages]
  parts = [tokenizer.bos_id] if tokenizer.adds_bos else []
  for message in messages:
    parts += [ids[START], f"{message['role']}\n{message['content']}", ids[END], "\n"]
  return [*parts, ids[START], "assistant\n"]


def _encode_parts(sides, tokenizer):
  encoded = iter(
    tokenizer.encode_batch([part for parts in sides for part in parts if isinstance(part, str)])
  )
  rendered = []
  for parts in sides:
    side = []
    for part in parts:
      side += next(encoded) if isinstance(part, str) else [part]
    rendered.append(side)
  return rendered
