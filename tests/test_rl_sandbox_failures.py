"""Whatever happens to the sandbox under coupled-GRPO: rewards are masked, never 0, and it goes on.

The sandbox is the real one, and so is what happens to it: SIGKILL from outside, a tmpfs that is full.
"""

import contextlib
import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from configs import grpo_7b
from diffucoder_jax.execution.sandbox import SandboxUnavailable
from diffucoder_jax.grpo import rewards
from diffucoder_jax.runtime import metrics
from tests import tiny
from tests.execution import graded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]
STEPS = 6  # three rounds of two steps
STRUCK = 1  # the round in which things happen
LONG = "import time; time.sleep(3 if x == 2 else 0)"
PATIENCE = 0.5  # seconds after which a judge or an answer is killed: long ones are, always


def unlucky(text):
  """Whether an answer is one of those that something happens to; about a third."""
  return sum(map(ord, text)) % 3 == 0


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
  folder = tmp_path_factory.mktemp("graded")
  graded.write(folder)
  return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  return tiny.finished(tmp_path_factory.getbasetemp())


# --- What happens.


def descendants(pid):
  """The processes below one, in no order; those that end meanwhile are left out."""
  for thread in os.listdir(f"/proc/{pid}/task"):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
      for child in map(int, file.read().split()):
        yield child
        with contextlib.suppress(OSError):
          yield from descendants(child)


def of_the_sandbox():
  """{pid of a fork server or what is below one: whether it is a solver or a judge}."""
  found = {}
  for pid in set(descendants(os.getpid())):
    with contextlib.suppress(OSError):
      if b"zygote.main" in open(f"/proc/{pid}/cmdline", "rb").read():
        found[pid] = os.getsid(pid) == pid  # each has a session of its own
  return found


@contextlib.contextmanager
def killing(which, patience=PATIENCE):
  """Inside, jobs that take longer than `patience` lose their judge, solver or fork server.

  `which` is a list of these words; they come in turns. Yields a list of what was killed.
  """
  killed, over = [], threading.Event()

  def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rsplit(")")[-1].split()[1])

  def kill():
    seen = {}
    while not over.wait(0.02):
      now = time.monotonic()
      working = [pid for pid, works in of_the_sandbox().items() if works]
      seen = {pid: seen.get(pid, now) for pid in working}
      pairs = {}
      with contextlib.suppress(OSError, ProcessLookupError):
        for pid in sorted(pid for pid in working if now - seen[pid] >= patience):
          pairs.setdefault(parent(pid), []).append(pid)
        for server, pair in pairs.items():
          if len(pair) == 2:  # the solver is made first
            word = which[len(killed) % len(which)]
            os.kill(
              {"fork server": server, "solver": pair[0], "judge": pair[1]}[word], signal.SIGKILL
            )
            killed.append(word)

  thread = threading.Thread(target=kill)
  thread.start()
  try:
    yield killed
  finally:
    over.set()
    thread.join()


def run(
  start, problems, workdir, monkeypatch, before, disaster=contextlib.nullcontext, hit=unlucky
):
  """Trains. In round `STRUCK` the answers for which `hit` holds begin with the lines `before`, and
  `disaster` is around the judging. Returns (what its context gave, the sandbox)."""
  score, rounds, told = rewards.score, [], []

  def fence(text):
    return graded.fence(text, before if len(rounds) == STRUCK + 1 and hit(text) else "")

  def struck(problems_, texts, sandbox, config):
    if config.fence != "graded":  # evaluation
      return score(problems_, texts, sandbox, config)
    rounds.append(sandbox)
    with disaster() if len(rounds) == STRUCK + 1 else contextlib.nullcontext() as found:
      told.append(found)
      return score(problems_, texts, sandbox, config)

  monkeypatch.setattr(rewards, "score", struck)
  monkeypatch.setitem(rewards.FENCES, "graded", fence)
  c = grpo_7b.get_config()
  c.lock()
  settings = graded.settings(start, problems, **{"optim.steps": STEPS})
  c.update_from_flattened_dict(settings)
  with tiny.fresh_process():
    try:
      tiny.program("train_grpo").main(c, str(workdir))
    except SandboxUnavailable as error:
      pytest.skip(f"no isolation on this machine: {error}")
  assert len(rounds) == STEPS // 2
  return told[STRUCK], rounds[STRUCK]


# --- What must come of it.


def lines_of(workdir, round_):
  text = (workdir / "rollouts" / f"{round_:06d}.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def check(workdir, masked):
  """The rows of round `STRUCK` for which `masked` holds were masked, and nothing else was."""
  rows = [row for row in metrics.read(workdir) if "loss" in row]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in rows)
  for round_ in range(STEPS // 2):
    lines = lines_of(workdir, round_)
    hit = [round_ == STRUCK and masked(line["completion"]) for line in lines]
    for line, was_hit in zip(lines, hit, strict=True):
      if was_hit:
        assert line["reward"] is None and line["valid"] is False and line["parts"] is None, line
        assert line["advantage"] == 0 and "infra" in line["tests"], line
      else:
        share = graded.worth(line["completion"]) / graded.COUNT
        assert line["valid"] and line["tests"] == graded.verdicts(line["completion"]), line
        assert line["parts"] == {"code": share, "format": 1.0}
        assert line["reward"] == 2 * share + 0.5
    # The others of the group are compared with each other alone.
    for group in (slice(0, 4), slice(4, 8)):
      valid = [line for line, was_hit in zip(lines[group], hit[group], strict=True) if not was_hit]
      reward = np.asarray([line["reward"] for line in valid])
      wanted = (reward - reward.mean()) * len(valid) / (len(valid) - 1) if len(valid) > 1 else [0.0]
      if valid:
        np.testing.assert_allclose([line["advantage"] for line in valid], wanted, atol=1e-5)
    row = rows[2 * round_]
    assert row["reward_masked"] == sum(hit) / 8
    assert row["judged/masked"] == row["judged/infra"] == sum(hit) and row["judged/answers"] == 8
    different = {line["completion"] for line, was_hit in zip(lines, hit, strict=True) if was_hit}
    assert row.get("judged/judged_infra", 0) >= len(different)
    rewarded = [line["reward"] for line, was_hit in zip(lines, hit, strict=True) if not was_hit]
    if rewarded:
      assert row["reward"] == pytest.approx(np.mean(rewarded))
    else:  # nobody knows; 0 would be a claim
      assert not {"reward", "reward_std", "reward/code"} & row.keys()
  return lines_of(workdir, STRUCK)


@pytest.mark.parametrize(
  "which", [["fork server", "solver", "judge"], ["judge"], ["solver"]], ids=" ".join
)
def test_killed_again_and_again(start, problems, tmp_path, monkeypatch, which):
  """Until the retries are used up; who is done before that keeps the verdict."""
  killed, box = run(
    start, problems, tmp_path / "run", monkeypatch, LONG, lambda: killing(which)
  )  # fmt: skip
  lines = check(tmp_path / "run", unlucky)
  hit = {line["completion"] for line in lines if unlucky(line["completion"])}
  assert 0 < len(hit) < 8
  assert len(killed) >= len(hit) * (1 + box.limits.retries) and set(killed) == set(which)


FILLS = {
  "a file": "with open('/tmp/x', 'wb') as g:\n  while True: g.write(bytes(1 << 20))",
  "names": "for i in range(1 << 20): open(f'/tmp/{i}', 'w').close()",
}


@pytest.mark.parametrize("how", FILLS)
def test_a_full_tmpfs(start, problems, tmp_path, monkeypatch, how):
  _, box = run(start, problems, tmp_path / "run", monkeypatch, FILLS[how])
  if box.level != "full":
    pytest.skip(f"at level {box.level} an answer has nowhere to write")
  lines = check(tmp_path / "run", unlucky)
  assert 0 < sum(unlucky(line["completion"]) for line in lines) < 8
  assert any("/tmp is full" in line["message"] for line in lines)


def test_an_answer_that_fills_the_tmpfs_and_goes_on_has_its_verdict(
  start, problems, tmp_path, monkeypatch
):
  fill = "try:\n" + "\n".join(f"  {line}" for line in FILLS["a file"].splitlines())
  run(start, problems, tmp_path / "run", monkeypatch, f"{fill}\nexcept OSError: pass")
  check(tmp_path / "run", lambda text: False)


def test_a_round_that_nobody_could_judge(start, problems, tmp_path, monkeypatch):
  """Every judge is killed: no reward, no gradient, and no end."""
  everybody = lambda text: True  # noqa: E731
  disaster = lambda: killing(["judge", "fork server"])  # noqa: E731
  run(start, problems, tmp_path / "run", monkeypatch, LONG, disaster, everybody)
  check(tmp_path / "run", everybody)
  rows = [row for row in metrics.read(tmp_path / "run") if row["step"] in (3, 4)]
  assert [row["grad_norm"] for row in rows] == [0, 0]
