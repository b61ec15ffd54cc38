import gzip
import json
import pathlib
import pickle

import grain
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from absl import logging
from ml_collections import ConfigDict

from diffucoder_jax.data import batching, chat, conversations, instructions, pipeline
from diffucoder_jax.data import rows as rows_lib

LEETCODE = pathlib.Path(__file__).parents[3] / "shared/benchmarks/leetcode"


def records(count=40):
  """Questions with answers of quite different lengths."""
  return [
    {"instruction": f"Add {i} to x.", "output": "".join(f"x += {j}\n" for j in range(i % 7 + 1))}
    for i in range(count)
  ]


def write_jsonl(path, rows):
  path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return path


@pytest.fixture
def config(tmp_path):
  path = write_jsonl(tmp_path / "sft.jsonl", records())
  return ConfigDict({
    "path": str(path), "schema": "opencoder", "on_broken": "error", "held_out": 0.25,
    "system": "Be brief.", "seq_len": 160, "padding": "fixed", "flexible_pads": 4,
    "over_long": "error", "global_batch": 8,
  })


def with_settings(config, **settings):
  return ConfigDict({**config.to_dict(), **settings})


def rendered(tokenizer, row, system="Be brief."):
  messages = [{"role": "user", "content": row["instruction"]},
              {"role": "assistant", "content": row["output"]}]
  return chat.render(messages, tokenizer, system)


def all_rows(rows):
  return [rows[i] for i in range(len(rows))]


# ---------------------------------------------------------------------------------------------
# Rows


def test_a_row_is_prompt_response_and_learnt_pads(config, tokenizer):
  config.held_out = 0.0
  rows = conversations.load_conversations(config, tokenizer).train
  pad = tokenizer.special_ids["<|dlm_pad|>"]
  assert len(rows) == 40
  for row, record in zip(all_rows(rows), records(), strict=True):
    prompt, response = rendered(tokenizer, record)
    p, n = len(prompt), len(prompt) + len(response)
    assert row["tokens"].tolist() == prompt + response + [pad] * (160 - n)
    assert row["prompt"].tolist() == [True] * p + [False] * (160 - p)
    # The prompt is never noised; response, end token, newline and all pads are.
    assert row["maskable"].tolist() == [False] * p + [True] * (160 - p)
    assert (row["segment_ids"] == 1).all() and row["positions"].tolist() == list(range(160))
    assert row["tokens"][n - 2 : n].tolist() == [tokenizer.end_of_turn_id, *tokenizer.encode("\n")]
    assert n < 160
  assert {key: value.dtype for key, value in row.items()} == {
    "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "maskable": bool,
    "prompt": bool}
  with pytest.raises(IndexError, match="row 40 of 40"):
    rows[40]
  with pytest.raises(IndexError, match="row -1"):
    rows[-1]


@pytest.mark.parametrize("flexible_pads", [0, 4, 1000])
def test_flexible_padding_learns_a_margin(config, hf_tokenizer, flexible_pads):
  fixed = conversations.load_conversations(config, hf_tokenizer)
  config = with_settings(config, padding="flexible", flexible_pads=flexible_pads)
  flexible = conversations.load_conversations(config, hf_tokenizer)
  pads = 0
  for row, whole in zip(all_rows(flexible.train), all_rows(fixed.train), strict=True):
    n = int(np.argmax(row["tokens"] == hf_tokenizer.special_ids["<|dlm_pad|>"]))
    used = np.arange(160) < n + flexible_pads
    for key in ("tokens", "positions", "prompt"):
      np.testing.assert_array_equal(row[key], whole[key])
    np.testing.assert_array_equal(row["segment_ids"], used.astype(np.int32))
    np.testing.assert_array_equal(row["maskable"], used & ~row["prompt"])
    pads += min(160 - n, flexible_pads)
  held_out = sum(min(int(np.sum(row["tokens"] == hf_tokenizer.special_ids["<|dlm_pad|>"])),
                     flexible_pads) for row in all_rows(flexible.held_out))
  assert flexible.report["pad_tokens"] == pads + held_out
  assert (flexible.fingerprint == fixed.fingerprint) == (flexible_pads == 1000)


def test_scored_counts_are_those_of_the_rows(config, tokenizer):
  for padding in ("fixed", "flexible"):
    rows = conversations.load_conversations(with_settings(config, padding=padding), tokenizer).train
    counts = rows.scored_counts(tokenizer.vocab_size)
    scored = np.concatenate([row["tokens"][row["maskable"]] for row in all_rows(rows)])
    np.testing.assert_array_equal(counts, np.bincount(scored, minlength=tokenizer.vocab_size))


@pytest.mark.parametrize("padding", conversations.PADDING)
def test_the_unigram_counts_responses_and_their_pads(config, hf_tokenizer, padding):
  """From the rows as they are: what a model must beat on them, and nothing of the prompts."""
  opened = conversations.load_conversations(with_settings(config, padding=padding), hf_tokenizer)
  train, held_out = (
    np.concatenate([row["tokens"][row["maskable"]] for row in all_rows(rows)])
    for rows in (opened.train, opened.held_out)
  )
  token_bytes = hf_tokenizer.token_bytes()
  counts = np.bincount(train, minlength=len(token_bytes)) + 1.0
  wanted = -np.log2(counts / counts.sum())[held_out].sum() / token_bytes[held_out].sum()
  got = pipeline.unigram_bits_per_byte(opened.train, opened.held_out, token_bytes)
  assert got == pytest.approx(wanted)


# ---------------------------------------------------------------------------------------------
# Over-long conversations


def lengths(tokenizer):
  return [tuple(map(len, rendered(tokenizer, record))) for record in records()]


def test_over_long_is_an_error_that_names_the_record(config, sentencepiece_tokenizer):
  sizes = lengths(sentencepiece_tokenizer)
  config.seq_len = max(p + r for p, r in sizes) - 1
  first = next(i for i, (p, r) in enumerate(sizes) if p + r > config.seq_len)
  with pytest.raises(ValueError, match=rf"sft.jsonl:{first + 1} is too long: .*data.over_long"):
    conversations.load_conversations(config, sentencepiece_tokenizer)
  config.seq_len += 1
  assert conversations.load_conversations(config, sentencepiece_tokenizer).report["examples"] == 40


def test_over_long_is_dropped_and_counted(config, sentencepiece_tokenizer):
  sizes = lengths(sentencepiece_tokenizer)
  config = with_settings(config, over_long="drop", seq_len=int(np.median([p + r for p, r in sizes])))
  corpus = conversations.load_conversations(config, sentencepiece_tokenizer)
  fits = [(p, r) for p, r in sizes if p + r <= config.seq_len]
  assert 10 < len(fits) < 40
  assert corpus.report["dropped"] == 40 - len(fits)
  assert corpus.report["truncated"] == corpus.report["prompt_too_long"] == 0
  assert corpus.report["examples"] == len(fits) == len(corpus.train) + len(corpus.held_out)
  assert corpus.report["held_out_examples"] == len(corpus.held_out)
  assert corpus.report["prompt_tokens"] == sum(p for p, _ in fits)
  assert corpus.report["response_tokens"] == sum(r for _, r in fits)
  assert corpus.report["response_max"] == max(r for _, r in fits)
  assert corpus.report["pad_tokens"] == sum(config.seq_len - p - r for p, r in fits)


def test_over_long_is_cut_and_counted(config, sentencepiece_tokenizer):
  tokenizer = sentencepiece_tokenizer
  sizes = lengths(tokenizer)
  long_question = {"instruction": "Add 1 to x. " * 40, "output": "x += 1"}
  write_jsonl(pathlib.Path(config.path), [*records(), long_question])
  seq_len = int(np.median([p + r for p, r in sizes]))
  config = with_settings(config, over_long="truncate", seq_len=seq_len, held_out=0.0)
  corpus = conversations.load_conversations(config, tokenizer)
  cut = [p + r > seq_len for p, r in sizes]
  report = corpus.report
  assert report["truncated"] == sum(cut) > 5
  # A prompt that fills the row leaves nothing to learn.
  assert (report["dropped"], report["prompt_too_long"]) == (1, 1)
  assert report["examples"] == len(corpus.train) == 40
  # Lengths are those before the cut: a user sees how much seq_len costs.
  whole = sorted(r for _, r in sizes)
  assert (report["response_min"], report["response_max"]) == (whole[0], whole[-1])
  assert report["response_p50"] in whole and whole[0] < report["response_p50"] < whole[-1]
  for row, record, was_cut in zip(all_rows(corpus.train), records(), cut, strict=True):
    prompt, response = rendered(tokenizer, record)
    assert row["tokens"].tolist()[: len(prompt) + len(response)] == (prompt + response)[:seq_len]
    answer = row["tokens"][row["maskable"]].tolist()
    if was_cut:
      assert len(answer) == seq_len - len(prompt) and answer == response[: len(answer)]


def test_a_cut_leaves_at_least_one_token_of_the_response(config, hf_tokenizer):
  prompt, response = map(len, rendered(hf_tokenizer, records()[0]))
  write_jsonl(pathlib.Path(config.path), [records()[0]])
  config = with_settings(config, over_long="truncate", held_out=0.0, seq_len=prompt + 1)
  corpus = conversations.load_conversations(config, hf_tokenizer)
  assert corpus.train[0]["maskable"].tolist() == [False] * prompt + [True] and response > 1
  with pytest.raises(ValueError, match="nothing to train on: 1 conversation.* 1 dropped"):
    conversations.load_conversations(with_settings(config, seq_len=prompt), hf_tokenizer)


def test_a_cut_far_from_the_end_leaves_no_end_token(config, hf_tokenizer):
  write_jsonl(pathlib.Path(config.path), [{"instruction": "Go", "output": "x = 1\n" * 200}])
  config = with_settings(config, over_long="truncate", held_out=0.0)
  row = conversations.load_conversations(config, hf_tokenizer).train[0]
  answer = row["tokens"][row["maskable"]].tolist()
  assert hf_tokenizer.end_of_turn_id not in answer and row["tokens"].tolist()[-1] == answer[-1]
  assert hf_tokenizer.special_ids["<|dlm_pad|>"] not in answer


# ---------------------------------------------------------------------------------------------
# Split, determinism, Grain


def test_split_is_by_prompt_and_moves_nobody(config, hf_tokenizer):
  def sides(path, rows):
    config.path = str(write_jsonl(path, rows))
    corpus = conversations.load_conversations(config, hf_tokenizer)
    return [{row["tokens"].tobytes() for row in all_rows(side)}
            for side in (corpus.train, corpus.held_out)], corpus

  path = pathlib.Path(config.path)
  (train, held_out), corpus = sides(path, records())
  assert 3 <= len(held_out) <= 20 and len(train) + len(held_out) == 40
  # Second answers to the same questions go where the first ones are; a repeated record is counted.
  second = [dict(record, output="x = x + 1") for record in records()]
  (more, more_held_out), doubled = sides(path, [*records(), *second, records()[3]])
  assert train < more and held_out < more_held_out
  assert len(more_held_out) == 2 * len(held_out) and doubled.report["duplicates"] == 1
  # The order of the file decides nothing about the held-out rows.
  _, turned = sides(path, records()[::-1])
  for a, b in zip(all_rows(turned.held_out), all_rows(corpus.held_out), strict=True):
    np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_fingerprint_names_contents_and_layout(config, hf_tokenizer, sentencepiece_tokenizer):
  def fingerprint(tokenizer=hf_tokenizer, **settings):
    loaded = conversations.load_conversations(with_settings(config, **settings), tokenizer)
    return loaded.fingerprint

  first = fingerprint()
  assert fingerprint() == first == fingerprint(global_batch=4)
  longer = str(write_jsonl(pathlib.Path(config.path).with_name("b.jsonl"), records(41)))
  others = [fingerprint(sentencepiece_tokenizer), fingerprint(system=""), fingerprint(seq_len=161),
            fingerprint(padding="flexible"), fingerprint(held_out=0.5), fingerprint(path=longer)]
  assert len({first, *others}) == 7


def test_rows_pickle_and_repeat(config, tokenizer):
  rows = conversations.load_conversations(config, tokenizer).train
  again = conversations.load_conversations(config, tokenizer).train
  other = pickle.loads(pickle.dumps(rows))
  assert repr(other) == repr(rows) == repr(again)
  for a, b, c in zip(all_rows(rows), all_rows(other), all_rows(again), strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
      np.testing.assert_array_equal(a[key], c[key])
  assert isinstance(rows, grain.sources.RandomAccessDataSource)


def test_batches_are_the_same_for_one_and_two_processes(config, hf_tokenizer):
  rows = conversations.load_conversations(config, hf_tokenizer).train
  steps = 2 * len(rows) // 8 + 1  # into the third epoch
  whole = batching.train_batches(rows, config, seed=3)
  parts = [batching.train_batches(rows, config, 3, (i, 2)) for i in range(2)]
  seen = []
  for _ in range(steps):
    batch, *halves = next(whole), *(next(part) for part in parts)
    assert set(batch) == {"tokens", "segment_ids", "positions", "maskable", "prompt"}
    assert batch["prompt"].shape == (8, 160) and halves[0]["prompt"].shape == (4, 160)
    for key, value in batch.items():
      np.testing.assert_array_equal(value, np.concatenate([half[key] for half in halves]))
    seen += [tokens.tobytes() for tokens in batch["tokens"]]
  first = seen[: len(rows)]
  assert sorted(first) == sorted(row["tokens"].tobytes() for row in all_rows(rows))
  assert first != [row["tokens"].tobytes() for row in all_rows(rows)]


def test_held_out_batches_are_filled_up_with_nothing(config, hf_tokenizer):
  rows = conversations.load_conversations(config, hf_tokenizer).held_out
  batches = list(batching.held_out_batches(rows, len(rows), 16))
  last = {key: value[len(rows) % 16 :] for key, value in batches[-1].items()}
  assert len(last["tokens"]) and (last["tokens"] == rows.pad_id).all()
  assert not any(last[key].any() for key in ("segment_ids", "maskable", "prompt"))


@pytest.mark.parametrize("settings, what", [
  ({"padding": "batch"}, "data.padding is 'batch'; choose one of"),
  ({"over_long": "cut"}, "data.over_long is 'cut'; choose one of"),
  ({"flexible_pads": -1}, "data.flexible_pads"),
  ({"seq_len": 1}, "data.seq_len must be at least 2"),
  ({"held_out": 1.0}, r"data.held_out must be in \[0, 1\)"),
  ({"seq_len": 8, "over_long": "drop"}, "nothing to train on: 40 conversation.*40 dropped"),
  ({"seq_len": 8, "over_long": "truncate"}, "nothing to train on: 40 conversation.*40 dropped"),
])
def test_settings_that_cannot_be(config, hf_tokenizer, settings, what):
  with pytest.raises(ValueError, match=what):
    conversations.load_conversations(with_settings(config, **settings), hf_tokenizer)


# ---------------------------------------------------------------------------------------------
# Records


def turns(*contents):
  return [{"role": role, "content": content}
          for role, content in zip(("user", "assistant") * 2, contents, strict=False)]


SCHEMA_EXAMPLES = [
  ("opencoder", {"seq_id": 7, "instruction": "Q", "output": "A", "code": "c", "testcase": ["t"]},
   turns("Q", "A")),
  ("leetcode", {"task_id": "t", "query": "Q", "response": "A", "completion": "C\n"}, turns("Q", "A")),
  ("leetcode", {"task_id": "t", "query": "Q", "response": "", "completion": "def f(): 1\n"},
   turns("Q", "```python\ndef f(): 1\n```")),
  ("messages", {"messages": turns("Q", "A", "Q2", "A2"), "id": 1}, turns("Q", "A", "Q2", "A2")),
  ("messages", {"messages": [{"role": "system", "content": "S"}, *turns("Q", "A", "Q2")]},
   [{"role": "system", "content": "S"}, *turns("Q", "A")]),
]


def write_as(kind, tmp_path, rows):
  path = tmp_path / f"data.{kind}"
  if kind == "parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    text = "".join(json.dumps(row) + "\n\n" for row in rows).encode()  # blank lines count for nothing
    path.write_bytes(gzip.compress(text) if kind == "jsonl.gz" else text)
  return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("schema, record, messages", SCHEMA_EXAMPLES)
def test_schemas_and_formats(tmp_path, monkeypatch, kind, schema, record, messages):
  monkeypatch.setattr(rows_lib, "_ROWS_AT_ONCE", 1)
  path = write_as(kind, tmp_path, [record, record])
  found, broken = instructions.read_conversations(path, schema)
  assert [conversation.messages for conversation in found] == [messages, messages] and not broken
  numbers = [0, 1] if kind == "parquet" else [1, 3]
  assert [conversation.name for conversation in found] == [f"{path}:{i}" for i in numbers]


def test_a_folder_is_read_by_name(tmp_path):
  write_as("parquet", tmp_path, [{"instruction": "P", "output": "A"}])
  write_as("jsonl.gz", tmp_path, [{"instruction": "G", "output": "A"}])
  write_as("jsonl", tmp_path, [{"instruction": "J", "output": "A"}])
  (tmp_path / "README.md").write_text("no data")
  found, _ = instructions.read_conversations(tmp_path, "opencoder")
  assert [conversation.messages[0]["content"] for conversation in found] == ["J", "G", "P"]


BROKEN = [
  ("{", "Expecting property name"),
  ("[1]", "it is no JSON object"),
  ('{"instruction": "Q"}', "it has no 'output', only"),
  ('{"instruction": "Q", "output": 3}', "'output' is a int, not a text"),
  ('{"instruction": "Q", "output": "  "}', r"message 1 \(assistant\) is empty"),
  ('{"instruction": "Q", "output": "\\ud800"}', "surrogates not allowed"),
]


@pytest.mark.parametrize("line, what", BROKEN)
def test_a_broken_record_is_named(tmp_path, line, what):
  path = write_jsonl(tmp_path / "a.jsonl", [records()[0], line])
  with pytest.raises(ValueError, match=rf"a.jsonl:2 cannot be used as 'opencoder': .*{what}"):
    instructions.read_conversations(path, "opencoder")


def test_broken_records_are_counted(tmp_path, config, hf_tokenizer, monkeypatch):
  shown = []
  monkeypatch.setattr(logging, "warning", lambda *args: shown.append(args[0] % args[1:]))
  path = tmp_path / "sft.jsonl"
  lines = [line for pair in zip((json.dumps(r) for r in records()), [b for b, _ in BROKEN],
                                strict=False) for line in pair]
  path.write_bytes("\n".join(lines).encode() + b'\n{"instruction": "\xff", "output": "A"}\n')
  found, broken = instructions.read_conversations(path, "opencoder", "skip")
  assert len(found) == len(BROKEN) and broken == [f"{path}:{i}" for i in (2, 4, 6, 8, 10, 12, 13)]
  assert len(shown) == 6 and shown[-1] == "skipped 7 broken record(s) of 13"
  config = with_settings(config, on_broken="skip", held_out=0.0)
  assert conversations.load_conversations(config, hf_tokenizer).report["broken"] == 7


def test_broken_parquet_rows_are_named(tmp_path):
  table = pyarrow.table({
    "instruction": pyarrow.array([b"Q", b"\xff", b"Q"], pyarrow.binary()).cast(
      pyarrow.string(), safe=False),
    "output": ["A", "A", None],
  })
  path = tmp_path / "a.parquet"
  pyarrow.parquet.write_table(table, path)
  found, broken = instructions.read_conversations(path, "opencoder", "skip")
  assert len(found) == 1 and broken == [f"{path}:1", f"{path}:2"]
  with pytest.raises(ValueError, match="has none of the columns.*set data.schema"):
    instructions.read_conversations(path, "messages")
  path.write_bytes(b"PAR1 and no more")
  with pytest.raises(ValueError, match="not a readable parquet file"):
    instructions.read_conversations(path, "opencoder", "skip")


def test_a_damaged_gzip_is_an_error(tmp_path):
  rows = [dict(record, instruction=f"{i} {np.random.default_rng(i).bytes(99).hex()}")
          for i, record in enumerate(records(400))]
  path = write_as("jsonl.gz", tmp_path, rows)
  path.write_bytes(path.read_bytes()[:-2000])
  with pytest.raises(ValueError, match=r"data.jsonl.gz is damaged after line \d\d+"):
    instructions.read_conversations(path, "opencoder", "skip")


def test_errors_of_the_source(tmp_path):
  def read(path, schema="opencoder", on_broken="error"):
    return instructions.read_conversations(path, schema, on_broken)

  empty = write_jsonl(tmp_path / "empty.jsonl", [])
  bad = write_jsonl(tmp_path / "bad.jsonl", ["{"])
  with pytest.raises(ValueError, match="data.path is empty"):
    read("")
  with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
    read(tmp_path / "nowhere.jsonl")
  with pytest.raises(ValueError, match="must end in one of .jsonl"):
    read(pathlib.Path(__file__))
  with pytest.raises(ValueError, match="no .jsonl, .jsonl.gz, .parquet file in"):
    read(pathlib.Path(__file__).parent)
  with pytest.raises(ValueError, match="no conversation in .*empty"):
    read(empty)
  with pytest.raises(ValueError, match=r"no conversation in .*bad.*\(1 were broken and skipped\)"):
    read(bad, on_broken="skip")
  with pytest.raises(ValueError, match="unknown data.schema 'alpaca'; known: opencoder, leetcode"):
    read(empty, "alpaca")
  with pytest.raises(ValueError, match="data.on_broken must be"):
    read(empty, on_broken="ignore")


@pytest.mark.skipif(not LEETCODE.exists(), reason="needs ../shared/benchmarks")
def test_leetcode_as_published():
  found, broken = instructions.read_conversations(
    LEETCODE / "LeetCodeDataset-v0.3.1-test.jsonl.gz", "leetcode")
  assert len(found) == 228 and not broken
  assert all("class Solution" in chat.answer_of(c.messages[1]["content"]) for c in found)
