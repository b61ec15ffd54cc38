"""What each stage of training is worth, for the page: scores of the same problems, side by side."""

import html

from diffucoder_jax.evals import scores


def _percent(x):
  return f"{100 * x:.1f}"


def _sampled(pins):
  """How the answers were drawn, in words."""
  if "sampler" not in pins:
    return "given"
  c = pins["sampler"]
  drawn = f"temperature {c['temperature']:g}" if c["temperature"] else "greedy"
  return f"{drawn}, {c['alg'].replace('_', ' ')}, {c['steps'] or 'one token a step'}" + (
    " steps" if c["steps"] else ""
  )


def _row(label, results):
  (name, score), *_ = list(list(results["scores"].values())[-1].items())
  costs = results["costs"]
  cost = lambda key, form: form.format(costs[key]) if key in costs else "–"  # noqa: E731
  return (
    label, _sampled(results["pins"]), name, _percent(score["value"]),
    f"{_percent(score['low'])} to {_percent(score['high'])}", cost("nfe", "{:.1f}"),
    cost("length", "{:.0f}"), cost("ended", "{:.0%}"),
  )  # fmt: skip


def _changes(found):
  """A sentence for each two stages, one after the other, whose answers were drawn in the same way."""
  said, last = [], {}
  for label, results in found:
    how = _sampled(results["pins"])
    if how in last:
      before, first = last[how]
      *_, by_k = scores.compare(results, first).values()
      name, d = next(iter(by_k.items()))
      told = "" if d["low"] > 0 or d["high"] < 0 else ", which may be chance"
      said.append(
        f"From “{before}” to “{label}”, {how}: {100 * d['difference']:+.1f} points of {name} "
        f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]{told}; {d['only_first']} problems gained, "
        f"{d['only_second']} lost."
      )
    last[how] = label, results
  return said


def scores_of(folders):
  """Pieces of HTML: a table of evaluations, and what changes from each to the next.

  Args:
    folders: list of (label, folder of `evaluate`), in the order of the stages.
  Raises:
    ValueError: a folder holds no results, or two were scored on other problems.
  """
  found = [(label, scores.read_results(folder)) for label, folder in folders]
  heads = ("model", "sampled", "score", "%", "95 % interval", "evaluations", "tokens", "ended")
  cells = lambda kind, row: "".join(f"<{kind}>{html.escape(x)}</{kind}>" for x in row)  # noqa: E731
  rows = "".join(f"<tr>{cells('td', _row(label, results))}</tr>" for label, results in found)
  pins = found[0][1]["pins"]
  return [
    "<h2>Problems solved after each stage</h2>",
    f"<p>{html.escape(str(pins['benchmark']))}: {len(found[0][1]['problems'])} held-out problems, "
    f"{pins['samples']} answer(s) to each, judged by running all tests; sandbox level "
    f"{html.escape(str(pins['sandbox']))}. Evaluations of the network and tokens are those of one "
    "answer; ended: the share of answers that end by themselves.</p>",
    '<div class="wide" tabindex="0" role="region" aria-label="Scores"><table><tr>'
    f"{cells('th', heads)}</tr>{rows}</table></div>",
    *(f"<p>{html.escape(sentence)}</p>" for sentence in _changes(found)),
  ]
