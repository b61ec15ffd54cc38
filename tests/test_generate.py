"""Completing and infilling: the Python API on every kind of checkpoint, and the command line."""

import copy
import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

from diffucoder_jax import completion, pretrained
from diffucoder_jax.completion import SamplerConfig, generate, infill_prompt
from diffucoder_jax.data import chat
from diffucoder_jax.diffusion import constraints, sampler
from tests import tiny

pytestmark = pytest.mark.usefixtures("programs")
GREEDY = SamplerConfig(max_new_tokens=12, temperature=0.0, top_p=1.0)
DRAWN = SamplerConfig(max_new_tokens=12, temperature=0.8, top_p=0.95)
PROMPTS = ("def f1003(x):\n", "def", "(x):\n  return x", "x", "\n")
TEMPLATE = "def f1003(x):\n<|fill:6|>x + <|fill:3|>\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A diffusion run that knows its small corpus well: checkpoints 80 and 160."""
  return tiny.overfitted(tmp_path_factory.getbasetemp(), None, 160)[0]


@pytest.fixture(scope="module")
def ckpt(workdir):
  return pretrained.from_pretrained(workdir)


@pytest.fixture(scope="module")
def program():
  return tiny.program("generate")


def tokens_and_steps(completions):
  return [(c.tokens.tolist(), c.trace.step[0].tolist()) for c in completions]


# --- The Python API.


@pytest.mark.parametrize(
  "config", [GREEDY, pytest.param(DRAWN, marks=pytest.mark.slow)], ids=["greedy", "drawn"]
)
def test_neither_batch_size_nor_neighbours_matter(ckpt, config):
  wanted = tokens_and_steps(generate(ckpt, PROMPTS, config, seed=3, batch_size=len(PROMPTS)))
  assert tokens_and_steps(generate(ckpt, PROMPTS, config, seed=3, batch_size=1)) == wanted
  # A long one pads all the others, and the short ones go in another order.
  others = [PROMPTS[0], "return x + 1\n" * 5, PROMPTS[2], "def f(x):", "x = "]
  changed = tokens_and_steps(generate(ckpt, others, config, 3, batch_size=8))
  assert (changed[0], changed[2]) == (wanted[0], wanted[2])
  assert changed[1] != wanted[1]
  # The seed decides draws and nothing else does.
  again = tokens_and_steps(generate(ckpt, PROMPTS, config, seed=4))
  assert (again == wanted) == (config == GREEDY)


def test_what_was_learnt_comes_out(ckpt):
  done = generate(ckpt, ["def f1003(x):\n  return"], GREEDY)[0]
  assert done.text.startswith(" x")
  assert done.full_text.startswith("def f1003(x):\n  return x")
  assert len(done.tokens) == 12 and 6 < done.trace.nfe[0] <= 12
  assert done.trace.valid.all()


@pytest.mark.slow
def test_blocks_caches_and_parallel_decoding(ckpt):
  blocks = dataclasses.replace(GREEDY, block_size=4)
  exact = generate(ckpt, PROMPTS, blocks)
  always = generate(
    ckpt, PROMPTS, dataclasses.replace(blocks, cache="dual", refresh=1), batch_size=2
  )
  assert tokens_and_steps(always) == tokens_and_steps(exact)
  fast = dataclasses.replace(blocks, cache="prefix", threshold=0.05)
  sure = generate(ckpt, PROMPTS, fast)
  assert tokens_and_steps(sure) == tokens_and_steps(generate(ckpt, PROMPTS, fast, batch_size=1))
  assert sum(int(c.trace.nfe[0]) for c in sure) < sum(int(c.trace.nfe[0]) for c in exact)
  with pytest.raises(ValueError, match="holes cannot be cached"):
    generate(ckpt, [infill_prompt(ckpt, TEMPLATE)], fast)


def test_prompts_may_be_ids(ckpt):
  ids = [ckpt.tokenizer.bos_id, *ckpt.tokenizer.encode(PROMPTS[2])]
  text, array = generate(ckpt, [PROMPTS[2], ids], GREEDY)
  assert tokens_and_steps([text]) == tokens_and_steps([array])
  assert tokens_and_steps(generate(ckpt, [np.asarray(ids)], GREEDY)) == tokens_and_steps([text])


def test_infilling_keeps_what_was_given(ckpt):
  config = dataclasses.replace(GREEDY, max_new_tokens=0)
  ids = np.asarray(infill_prompt(ckpt, TEMPLATE))
  hole = ids == ckpt.mask_id
  assert hole.sum() == 9
  (done,) = generate(ckpt, [ids], config)
  trace = done.trace
  np.testing.assert_array_equal(trace.tokens[0][~hole], ids[~hole])
  np.testing.assert_array_equal(trace.step[0] >= 0, hole)
  assert len(done.tokens) == 9 and ckpt.mask_id not in done.tokens
  first, second = (ckpt.tokenizer.decode(part) for part in (done.tokens[:6], done.tokens[6:]))
  assert done.text == f"{first}\n{second}"
  assert done.full_text == f"def f1003(x):\n{first}x + {second}\n"
  # Holes of other prompts do not change it: rows with other numbers of masks go apart.
  other = infill_prompt(ckpt, "<|fill:2|> = <|fill:1|>")
  together = generate(ckpt, [ids, other], config, batch_size=2)
  assert tokens_and_steps(together[:1]) == tokens_and_steps([done])
  assert len(together[1].tokens) == 3


def test_infilling_starts_as_a_document_does(ckpt):
  """Training puts a begin token before every document; so do prompts, and so must templates."""
  assert infill_prompt(ckpt, "<|fill:2|>x")[0] == ckpt.tokenizer.bos_id


@pytest.mark.slow
def test_constraints_hold_for_every_prompt(ckpt):
  ending = ckpt.tokenizer.encode("# end")
  free = generate(ckpt, PROMPTS, GREEDY)
  banned = sorted({int(token) for done in free for token in done.tokens[:3]} - {*ending})
  config = dataclasses.replace(GREEDY, threshold=0.9, revoke=0.5)
  kept = constraints.together(constraints.force(ending, -len(ending)), constraints.ban(banned))
  done = generate(ckpt, PROMPTS, config, constraints=kept)
  for one in done:
    assert one.tokens[-len(ending) :].tolist() == ending and not np.isin(one.tokens, banned).any()
    assert ckpt.mask_id not in one.tokens
    assert (one.trace.step[0, -len(ending) :] == -1).all()
  alone = generate(ckpt, PROMPTS[:1], config, constraints=kept, batch_size=1)
  assert tokens_and_steps(alone) == tokens_and_steps(done[:1])
  with pytest.raises(
    ValueError, match="prompt 0: token 3 is forced at place 12, and the row has 12"
  ):
    generate(ckpt, ["x"], GREEDY, constraints=constraints.force([3], 12))
  maskless = dataclasses.replace(ckpt, mask_id=-1)
  with pytest.raises(ValueError, match="no mask token"):
    generate(maskless, ["x"], GREEDY, constraints=kept)


@pytest.mark.slow
def test_autoregressive_weights_keep_constraints_too(ckpt):
  causal = dataclasses.replace(ckpt, config=dataclasses.replace(ckpt.config, attention="causal"))
  config = dataclasses.replace(GREEDY, alg="left_to_right")
  (free,) = generate(causal, PROMPTS[:1], config)
  nothing = constraints.ban([])  # the other way to write it
  assert tokens_and_steps(generate(causal, PROMPTS[:1], config, constraints=nothing)) == (
    tokens_and_steps([free])
  )
  first = int(free.tokens[0])
  (other,) = generate(causal, PROMPTS[:1], config, constraints=constraints.ban([first], [0]))
  assert other.tokens[0] != first


def test_banned_text_on_the_command_line(program, workdir, ckpt, capsys):
  ids = [*ckpt.tokenizer.encode("x"), *ckpt.tokenizer.encode("00")]
  free, kept = (
    generate(ckpt, PROMPTS[:1], GREEDY, constraints=rules)[0].text
    for rules in (None, constraints.ban(ids))
  )
  run_program(program, workdir, "--prompt", PROMPTS[0], "--ban", "x", "--ban", "00")
  assert capsys.readouterr().out == PROMPTS[0] + kept + "\n"
  assert kept != free


def test_text_ends_at_the_end_token(ckpt):
  config = dataclasses.replace(GREEDY, alg="left_to_right")
  (plain,) = generate(ckpt, PROMPTS[:1], config)
  ids = plain.tokens.tolist()
  end = next(i for i, token in enumerate(ids) if i > 0 and token not in ids[:i])
  stopping = dataclasses.replace(ckpt, eos_id=ids[end])
  (cut,) = generate(stopping, PROMPTS[:1], config)
  assert cut.tokens.tolist() == ids
  assert cut.text == ckpt.tokenizer.decode(ids[:end]) != plain.text
  assert cut.full_text == PROMPTS[0] + cut.text
  assert (cut.length, cut.ended) == (end, True) and (plain.length, plain.ended) == (len(ids), False)
  # With stop_at_eos the rest is not even written.
  (stopped,) = generate(stopping, PROMPTS[:1], dataclasses.replace(config, stop_at_eos=True))
  assert stopped.text == cut.text and stopped.trace.nfe[0] == end + 1
  assert stopped.tokens.tolist() == ids[: end + 1] + [ckpt.mask_id] * (len(ids) - end - 1)


def test_text_ends_at_a_padding_token(ckpt):
  """Instruction tuning fills rows with <|dlm_pad|>, which in a SentencePiece file is not `pad_id`."""
  assert ckpt.tokenizer.special_ids["<|dlm_pad|>"] not in (ckpt.pad_id, ckpt.eos_id)
  config = dataclasses.replace(GREEDY, alg="left_to_right")
  (plain,) = generate(ckpt, PROMPTS[:1], config)
  ids = plain.tokens.tolist()
  end = next(i for i, token in enumerate(ids) if i > 0 and token not in ids[:i])
  padding = copy.copy(ckpt.tokenizer)  # for which what was written there is that token
  padding.special_ids = {**padding.special_ids, "<|dlm_pad|>": ids[end]}
  for changes in ({"tokenizer": padding}, {"pad_id": ids[end]}):
    (cut,) = generate(dataclasses.replace(ckpt, **changes), PROMPTS[:1], config)
    assert cut.tokens.tolist() == ids and (cut.length, cut.ended) == (end, True)
    assert cut.text == ckpt.tokenizer.decode(ids[:end]) != plain.text
    assert cut.full_text == PROMPTS[0] + cut.text


@pytest.mark.parametrize(
  "prompt, changes, message",
  [
    ([], {}, "prompt 1 is empty"),
    ([1, 512], {}, r"prompt 1 has token id 512, outside the vocabulary 0\.\.511"),
    ([1, -1], {}, "prompt 1 has token id -1"),
    ([5] * 21, {}, "prompt 1 is too long: 21 tokens and 12 new ones make 33, .* context is 32"),
    ("text", {"max_new_tokens": 0}, "prompt 0 has no masks and max_new_tokens is 0"),
    ("text", {"alternatives": 513}, "alternatives is 513, and the vocabulary has 512 tokens"),
  ],
)
def test_bad_prompts_are_named(ckpt, prompt, changes, message):
  short = dataclasses.replace(ckpt, config=dataclasses.replace(ckpt.config, max_seq_len=32))
  with pytest.raises(ValueError, match=message):
    generate(short, ["fine", prompt], dataclasses.replace(GREEDY, **changes))


def test_what_a_checkpoint_lacks_is_named(ckpt):
  maskless = dataclasses.replace(ckpt, mask_id=-1)
  with pytest.raises(ValueError, match="no mask token: only autoregressive"):
    generate(maskless, ["x"], GREEDY)
  with pytest.raises(ValueError, match="no mask token, so it cannot fill holes"):
    infill_prompt(maskless, TEMPLATE)
  with pytest.raises(ValueError, match="the template has no hole"):
    infill_prompt(ckpt, "no hole, not even <|fill:x|>")
  wordless = dataclasses.replace(ckpt, tokenizer=None)
  with pytest.raises(ValueError, match="without a tokenizer; give prompts as token ids"):
    generate(wordless, ["x"], GREEDY)
  with pytest.raises(ValueError, match="tokenizer"):
    infill_prompt(wordless, TEMPLATE)


def test_nothing_in_nothing_out(ckpt):
  assert generate(ckpt, [], GREEDY) == []
  with pytest.raises(ValueError, match="prompts is one text; give a list"):
    generate(ckpt, "abc", GREEDY)
  for size in (0, -1):
    with pytest.raises(ValueError, match=f"batch_size is {size}"):
      generate(ckpt, PROMPTS, GREEDY, batch_size=size)


def test_other_numbers_of_prompts_and_holes_compile_nothing(ckpt):
  compiled = []
  config = dataclasses.replace(GREEDY, max_new_tokens=0)
  texts = [f"ab<|fill:{n}|>cd" for n in (3, 5, 6, 7)]
  rows = [infill_prompt(ckpt, text) for text in texts]
  generate(ckpt, rows[:3], config, constraints=constraints.ban([3]))
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
  )
  generate(ckpt, rows, config, constraints=constraints.ban([4]))
  assert not compiled


def test_length_counts_what_was_written(ckpt):
  """With `stop_at_eos` an end in the first hole leaves masks in the second."""
  end = ckpt.tokenizer.eos_id
  limits = constraints.force([end], at=1)
  config = dataclasses.replace(GREEDY, stop_at_eos=True, max_new_tokens=0, alg="left_to_right")
  (got,) = generate(ckpt, [infill_prompt(ckpt, "a<|fill:2|>b<|fill:4|>c")], config, constraints=limits)
  assert got.ended and (got.tokens[2:] == ckpt.mask_id).all()
  assert got.length == 1 and len(got.tokens) == 6


@pytest.mark.slow
def test_autoregressive_weights_need_no_mask(ckpt, monkeypatch):
  causal = dataclasses.replace(ckpt.config, attention="causal")
  with_mask = dataclasses.replace(ckpt, config=causal)
  without = dataclasses.replace(with_mask, mask_id=-1)
  config = dataclasses.replace(GREEDY, alg="left_to_right")
  a, b = (generate(weights, PROMPTS[:2], config) for weights in (with_mask, without))
  assert tokens_and_steps(a) == tokens_and_steps(b)
  # Left to right is what they get by default.
  short = functools.partial(SamplerConfig, max_new_tokens=8)
  monkeypatch.setattr(completion, "SamplerConfig", short)
  (chosen,) = generate(without, PROMPTS[:1])
  assert chosen.trace.step[0][-8:].tolist() == list(range(8))


@pytest.mark.slow
def test_every_kind_of_path(workdir, ckpt, shared):
  by_step = {
    path: generate(pretrained.from_pretrained(workdir / path), PROMPTS[:1], GREEDY)
    for path in ("checkpoints/80", "checkpoints/160")
  }
  newest = tokens_and_steps(generate(ckpt, PROMPTS[:1], GREEDY))
  assert tokens_and_steps(by_step["checkpoints/160"]) == newest
  assert tokens_and_steps(by_step["checkpoints/80"]) != newest
  golden = pretrained.from_pretrained(shared / "golden" / "checkpoint")
  (done,) = generate(golden, [[7, 8, 9, golden.mask_id, 11]], GREEDY)
  assert done.text == "" and len(done.tokens) == 13
  assert done.trace.tokens[0, [0, 1, 2, 4]].tolist() == [7, 8, 9, 11]
  assert golden.mask_id not in done.tokens


@pytest.mark.slow
def test_a_mesh_changes_nothing(workdir, ckpt):
  mesh = tiny.sharding.make_mesh(dict(data=2, fsdp=1, tensor=2), jax.devices()[:4])
  spread = pretrained.from_pretrained(workdir, mesh)
  prompts = PROMPTS[:3]  # which two shards do not divide
  for config in (DRAWN, dataclasses.replace(DRAWN, block_size=4, cache="dual", threshold=0.05)):
    wanted = tokens_and_steps(generate(ckpt, prompts, config))
    assert tokens_and_steps(generate(spread, prompts, config)) == wanted


# --- The command line.


def run_program(program, workdir, *arguments):
  common = ("--checkpoint", str(workdir), "--max_new_tokens", "12", "--temperature", "0")
  program.main(program.parse_arguments([*arguments, *common, "--top_p", "1"]))


def test_prompts_on_the_command_line(program, workdir, ckpt, capsys):
  prompts = [argument for text in PROMPTS[:2] for argument in ("--prompt", text)]
  run_program(program, workdir, *prompts)
  printed = capsys.readouterr()
  for text, done in zip(PROMPTS, generate(ckpt, PROMPTS[:2], GREEDY), strict=False):
    assert text + done.text + "\n" in printed.out
  assert "24 tokens in" in printed.err and "network evaluations" in printed.err


def test_a_chat_on_the_command_line(program, workdir, ckpt, capsys):
  """What the user says is asked in ChatML; only the answer is printed."""
  run_program(program, workdir, "--chat", "--system", "", "--prompt", PROMPTS[0])
  asked = chat.render_prompt([{"role": "user", "content": PROMPTS[0]}], ckpt.tokenizer, "")
  (done,) = generate(ckpt, [asked], GREEDY)
  assert capsys.readouterr().out == done.text + "\n"


def test_infill_on_the_command_line(program, workdir, ckpt, capsys):
  arguments = program.parse_arguments(
    ["--checkpoint", str(workdir), "--infill", TEMPLATE, "--temperature", "0", "--top_p", "1"]
  )
  program.main(arguments)
  printed = capsys.readouterr().out
  config = dataclasses.replace(GREEDY, max_new_tokens=0)
  assert printed == generate(ckpt, [infill_prompt(ckpt, TEMPLATE)], config)[0].full_text + "\n"
  assert printed.startswith("def f1003(x):\n")


def test_files_in_and_out(program, workdir, ckpt, tmp_path, capsys):
  requests = [
    {"prompt": PROMPTS[0], "id": 7},
    {"infill": "def f1003(x):\n<|fill:6|>\n", "prompt": "ignored", "tag": "é\u2028"},
    {"prompt": PROMPTS[2]},
  ]
  lines = [json.dumps(request, ensure_ascii=False) + "\n" for request in requests]
  (tmp_path / "in.jsonl").write_text("".join(lines))
  files = {"prompts": "in.jsonl", "output": "made/out.jsonl", "traces": "traces"}
  paths = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
  run_program(program, workdir, *paths)
  lines = (tmp_path / "made" / "out.jsonl").read_text().splitlines()
  answers = [json.loads(line) for line in lines]
  texts = [a.pop("completion") for a in answers]
  evaluations = [a.pop("nfe") for a in answers]
  assert [(a.pop("length"), a.pop("ended")) for a in answers] == [
    (12, False),
    (6, False),
    (12, False),
  ]
  assert answers == requests
  plain = generate(ckpt, [PROMPTS[0], PROMPTS[2]], GREEDY)
  assert [texts[0], texts[2]] == [done.text for done in plain]
  assert [evaluations[0], evaluations[2]] == [int(done.trace.nfe[0]) for done in plain]
  for i, done in ((0, plain[0]), (2, plain[1])):
    trace = sampler.load_trace(tmp_path / "traces" / f"{i}.npz")
    jax.tree.map(np.testing.assert_array_equal, trace, done.trace)
  assert (sampler.load_trace(tmp_path / "traces" / "1.npz").step >= 0).sum() == 6


def test_show_draws_the_denoising(program, workdir, capsys, monkeypatch):
  monkeypatch.setattr(program.terminal.time, "sleep", lambda _: None)
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  run_program(program, workdir, "--prompt", PROMPTS[0], "--show")
  printed = capsys.readouterr().out
  assert printed.count("\x1b[J") > 6  # a frame for each step
  assert "f1003" in printed.replace("\x1b[0m", "")


@pytest.mark.parametrize(
  "line, message",
  [
    ("not json", "line 2 is not JSON"),
    ('{"text": "x"}', 'line 2 needs "prompt" or "infill"'),
    ('["prompt"]', 'line 2 needs "prompt" or "infill"'),
    ('{"prompt": 5}', "line 2: 'prompt' is not a text: 5"),
    ('{"prompt": "x", "infill": [1]}', "line 2: 'infill' is not a text"),
    ("", "line 2 is not JSON"),
  ],
)
def test_bad_lines_are_named_before_anything_is_loaded(program, tmp_path, line, message):
  (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
  with pytest.raises(ValueError, match=message):
    run_program(program, tmp_path / "no checkpoint", "--prompts", str(tmp_path / "in.jsonl"))


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--prompt", "x", "--steps", "-1"], "sampler.steps is -1"),
    (["--prompt", "x", "--batch_size", "0"], "--batch_size is 0; write at least one row"),
    (["--infill", TEMPLATE, "--max_new_tokens", "7"], "a template says how long its holes are"),
  ],
)
def test_flags_are_checked_before_anything_is_loaded(program, tmp_path, flags, message):
  with pytest.raises(ValueError, match=message):
    run_program(program, tmp_path / "no checkpoint", *flags)


def test_a_flag_is_true_or_false(program, tmp_path, capsys):
  with pytest.raises(SystemExit):
    run_program(program, tmp_path, "--prompt", "x", "--stop_at_eos", "on")
  assert "'on' is neither of true and false" in capsys.readouterr().err


@pytest.mark.parametrize(
  "line, flags, message",
  [
    ('{"infill": "no hole"}', [], "in.jsonl line 3: the template has no hole"),
    ('{"infill": "<|fill:999999|>"}', [], "in.jsonl line 3 is too long: 1000000 tokens"),
    ('{"infill": "<|fill:3|>"}', ["--cache", "dual", "--block_size", "4"], "line 3: sampler.cache"),
  ],
)
def test_all_lines_are_checked_before_any_is_written(
  program, workdir, tmp_path, monkeypatch, line, flags, message
):
  def never(*_, **__):
    raise AssertionError("something was written")

  monkeypatch.setattr(completion, "generate", never)
  (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "x"}\n' + line + "\n")
  with pytest.raises(ValueError, match=message):
    run_program(program, workdir, "--prompts", str(tmp_path / "in.jsonl"), *flags)


def test_an_empty_file_is_named(program, tmp_path):
  (tmp_path / "in.jsonl").write_text("")
  with pytest.raises(ValueError, match="in.jsonl holds no prompts"):
    run_program(program, tmp_path, "--prompts", str(tmp_path / "in.jsonl"))


@pytest.mark.slow
def test_standard_input_and_errors_of_the_real_program(workdir, ckpt, tmp_path):
  flags = ["--max_new_tokens", "12", "--temperature", "0", "--top_p", "1"]
  done = tiny.run("generate", ["--checkpoint", str(workdir), *flags], stdin=PROMPTS[0])
  assert done.returncode == 0, done.stderr
  assert done.stdout == PROMPTS[0] + generate(ckpt, PROMPTS[:1], GREEDY)[0].text + "\n"
  done = tiny.run("generate", ["--checkpoint", str(tmp_path), "--prompt", "x"])
  assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("generate: ")
  assert "Traceback" not in done.stderr
