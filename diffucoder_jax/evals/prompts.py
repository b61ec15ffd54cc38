"""What is asked of a model, and what of its answer is the solution: by name, since both are pins.

An instruction-tuned model is asked as DiffuCoder's tables 5 and 6 ask (`data.problem_sets` has the
words), with the beginning of the answer given; a base model continues the problem's own text.
"""

import re

from diffucoder_jax.data import chat

# How an answer begins (tables 5 and 6): the model goes on inside the fence.
PRIMER = "Here is the code to solve this problem:\n```python\n"
HOLE = "<|fill|>"  # where the missing part of an infilling problem's prompt stands
# What a continuation is cut at. Source: evalplus 0.3.1, `provider.utility`.
_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(")
HUMANEVAL_STOPS = (*_STOPS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
MBPP_STOPS = (*_STOPS, '\n"""', "\nassert")
GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>", "<|endoftext|>")


def cut(text: str, stops) -> str:
  """The text before the first of `stops`."""
  return text[: min((i for i in map(text.find, stops) if i >= 0), default=len(text))]


def continued(problem) -> str:
  """What a base model goes on from. As EvalPlus does it, the model begins on a line of its own."""
  return problem.stub.strip() + "\n"


# Post-processing: functions of (problem, text); the text begins with the primer, if there was one.


def fenced_program(problem, text):
  """The program in an answer, alone: what is not in it, such as an import, is not added."""
  return chat.answer_of(text)


def humaneval_continuation(problem, text):
  """The problem's text and what follows, up to the next statement at the margin."""
  return continued(problem) + cut(text, HUMANEVAL_STOPS)


def mbpp_continuation(problem, text):
  """The problem's text, a docstring, and the program after it."""
  return continued(problem) + cut(text, MBPP_STOPS)


def infilled_program(problem, text):
  """The program with its missing part."""
  before, after = problem.prompt.split(HOLE)
  return before + text + after


def whole_text(problem, text):
  """The text up to where a model of few examples begins the next one."""
  return cut(text, GSM8K_STOPS)


# GSM8K: the last number of a text is its answer.
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def number_of(text: str) -> float | None:
  """The number that a solution ends with: behind "####" if it has that, or else its last one."""
  marked = re.findall(r"####\s*(\S+)", text)
  found = _NUMBER.findall(marked[-1] if marked else text)
  return float(found[-1].replace(",", "").replace("$", "")) if found else None


def same_number(answer: str, reference: str) -> bool:
  """Whether two solutions of a word problem end with one number."""
  number = number_of(answer)
  return number is not None and abs(number - number_of(reference)) < 1e-6


def messages_of(problem):
  """A problem as a conversation, for `chat.render_prompt`."""
  return [{"role": "user", "content": problem.prompt}]
