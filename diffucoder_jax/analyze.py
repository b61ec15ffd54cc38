"""Measures how decodings went: AR-ness, order, entropy sink, length; figures and a page.

Of what was sampled before, a folder for each label and seed (a label given again is another seed of it):
  python -m diffucoder_jax.analyze --traces W/code W/math --labels code math --tokenizer W/sft \\
    --output OUT
Or samples first, every prompt at each temperature with each seed, and measures that:
  python -m diffucoder_jax.analyze --checkpoint W/sft --chat --system '' --prompts FILE.jsonl \\
    --temperatures 0.2 0.6 1.0 1.2 --seeds 3 --max_new_tokens 50 --output OUT

Folders hold .npz traces of `generate --traces`, or histories of Hugging Face's `diffusion_generate`
(evals/dumps.py has the form). Sampled traces go to OUT/traces/TEMPERATURE/SEED and are used again when
the program is started again. Writes OUT/results.json, OUT/index.html and the figures as .svg.
"""

import argparse
import dataclasses
import datetime
import json
import math
import sys

from etils import epath

from diffucoder_jax import completion
from diffucoder_jax.data import chat, rows
from diffucoder_jax.data.tokenizer import load_tokenizer
from diffucoder_jax.diffusion import sampler
from diffucoder_jax.evals import (
  arness,
  bootstrap,
  decoding,
  dumps,
  findings,
  order_charts,
  orders,
  replay,
  report,
)
from diffucoder_jax.pretrained import describe, from_pretrained
from diffucoder_jax.requests import add_fields
from diffucoder_jax.runtime import checkpoint, heap, workdir


def parse_arguments(argv=None):
  """Command line; the fields of `SamplerConfig` but its temperature are flags."""
  parser = argparse.ArgumentParser(
    prog="python -m diffucoder_jax.analyze", description=__doc__,
    formatter_class=argparse.RawTextHelpFormatter,
  )  # fmt: skip
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--traces", nargs="+", metavar="DIR", help="folders of .npz files")
  source.add_argument("--prompts", help='.jsonl of {"prompt": text} or {"infill": text} to sample')
  parser.add_argument("--labels", nargs="+", help="one for each DIR; default: their names")
  parser.add_argument("--output", required=True, help="folder for the results")
  parser.add_argument("--title", default="How it was decoded")
  parser.add_argument("--checkpoint", help="workdir, checkpoint or Hugging Face folder: to sample,\n"
                      "and to ask for the confidence of positions while they are masked")  # fmt: skip
  parser.add_argument(
    "--tokenizer", help="tokenizer file or folder of the traces; default: the checkpoint's"
  )
  parser.add_argument("--mask_id", type=int, default=-1, help="instead of a tokenizer")
  parser.add_argument("--end_ids", type=int, nargs="+", default=[], help="instead of a tokenizer")
  parser.add_argument("--results", nargs="+", default=[], metavar="LABEL=FILE",
                      help="JSON with pass@k, to draw over the labels")  # fmt: skip
  counting = parser.add_argument_group("how AR-ness is counted (evals/arness.py)")
  default = decoding.Options()
  counting.add_argument("--definition", choices=("set", "sequence"), default=default.definition)
  counting.add_argument("--denominator", choices=("seen", "all"), default=default.denominator)
  counting.add_argument("--tail", choices=("trim", "keep"), default=default.tail)
  counting.add_argument("--ties", choices=tuple(arness.TIES), default=default.ties)
  parser.add_argument("--maps", type=int, default=4, help="problems in the confidence map; 0: none")
  parser.add_argument("--map_steps", type=int, default=24, help="rows of the maps")
  sampling = parser.add_argument_group("sampling")
  sampling.add_argument("--temperatures", type=float, nargs="+", default=[0.2, 0.6, 1.0, 1.2])
  sampling.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each temperature")
  sampling.add_argument("--limit", type=int, help="only so many prompts, the first ones")
  sampling.add_argument("--chat", action="store_true", help="prompts are what a user says")
  sampling.add_argument("--system", default=chat.SYSTEM, help="with --chat; '' for none")
  sampling.add_argument("--batch_size", type=int, default=8)
  add_fields(sampling, sampler.SamplerConfig(), "sampler", skip=("temperature",))
  args = parser.parse_args(argv)
  if args.prompts and not args.checkpoint:
    parser.error("--prompts are sampled from a --checkpoint; give one")
  if args.traces and args.labels and len(args.labels) != len(args.traces):
    parser.error(f"{len(args.traces)} folders need as many --labels, not {len(args.labels)}")
  if args.prompts and args.labels:
    parser.error("--labels belong to --traces; what is sampled is labelled by its temperature")
  if args.seeds < 1 or len(set(args.temperatures)) < len(args.temperatures):
    parser.error("--seeds must be at least 1, and each of --temperatures another one")
  if args.map_steps < 1 or args.batch_size < 1 or args.maps < 0:
    parser.error("--map_steps and --batch_size must be at least 1, --maps 0 or more")
  return args


def ids_of(tokenizer, mask_id=-1, end_ids=()):
  """`dumps.Ids` by a tokenizer; what is given wins."""
  if tokenizer is None:
    return dumps.Ids(mask_id, tuple(end_ids))
  # Instruction tuning ends answers with these pads, which in a SentencePiece file are not pad_id.
  pad = tokenizer.special_ids.get(chat.PAD, -1)
  ends = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_of_turn_id, pad} - {-1}
  mask_id = tokenizer.mask_id if mask_id < 0 else mask_id
  return dumps.Ids(mask_id, tuple(end_ids) or tuple(sorted(ends)))


# --- Sampling.


def read_prompts(args, ckpt):
  """Token ids of the prompts, by the same rules as `generate`."""
  if ckpt.tokenizer is None:
    raise ValueError(f"{args.checkpoint} has no tokenizer file, so prompts cannot be read; add one")
  prompts = []
  for name, row in rows.read_rows(args.prompts):
    kind = "infill" if "infill" in row else "prompt"
    if not isinstance(row.get(kind), str):
      raise ValueError(f'{name} needs "prompt" or "infill" with a text')
    if kind == "infill":
      prompts.append(completion.infill_prompt(ckpt, row[kind]))
    elif args.chat:
      said = [{"role": "user", "content": row[kind]}]
      prompts.append(chat.render_prompt(said, ckpt.tokenizer, args.system))
    else:
      prompts.append(completion.prompt_ids(ckpt, row[kind]))
    if len(prompts) == args.limit:
      break
  if not prompts:
    raise ValueError(f"{args.prompts} holds no prompts; write one JSON object a line")
  return prompts


def sampler_config(args, causal, temperature):
  """`SamplerConfig` of the flags that were given."""
  names = [field.name for field in dataclasses.fields(sampler.SamplerConfig)]
  given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
  defaults = {"alg": "left_to_right"} if causal else {}
  return sampler.SamplerConfig(**{**defaults, **given, "temperature": temperature})


def sample(args, ckpt, output):
  """Samples what is not there yet. Returns (labels, folders), one of each for a label and seed."""
  prompts = read_prompts(args, ckpt)
  labels, folders = [], []
  for temperature in args.temperatures:
    config = sampler_config(args, ckpt.config.attention == "causal", temperature)
    for seed in range(args.seeds):
      label = f"{temperature:g}"
      folder = output / "traces" / label / str(seed)
      labels.append(label)
      folders.append(folder)
      about = {
        **ids_of(ckpt.tokenizer, ckpt.mask_id)._asdict(), "seed": seed,
        "checkpoint": _weights(args.checkpoint), "prompts": len(prompts),
        "prompts_crc": workdir.crc(prompts), "sampler": dataclasses.asdict(config),
      }  # fmt: skip
      if _sampled(folder, about):
        continue
      folder.mkdir(parents=True, exist_ok=True)
      found = completion.generate(ckpt, prompts, config, seed, args.batch_size)
      for i, one in enumerate(found):
        sampler.save_trace(folder / f"{i}.npz", one.trace)
      # Last, so that it says that the folder is whole.
      (folder / dumps.ABOUT).write_text(json.dumps(about) + "\n")
      print(f"sampled {len(found)} prompts at temperature {label}, seed {seed}", file=sys.stderr)
  return labels, folders


def _weights(path):
  """A checkpoint by its path, and its step where it has one."""
  return str(path) if describe(path).is_hf else str(checkpoint.find_step(path))


def _sampled(folder, about):
  """Whether a folder holds these samples already; refuses one that holds others."""
  path = folder / dumps.ABOUT
  if not path.exists():
    return False
  changes = workdir.config_changes(json.loads(path.read_text()), about)
  if changes:
    raise ValueError(
      f"{folder} holds samples of other settings (there -> now): {'; '.join(changes)}. Name another "
      "--output, or remove that folder"
    )
  return True


def config_of(args, folder):
  """`SamplerConfig` that the traces of a folder were sampled with, by its about.json or the flags."""
  path = epath.Path(folder) / dumps.ABOUT
  saved = json.loads(path.read_text()).get("sampler") if path.exists() else None
  return sampler.SamplerConfig(**saved) if saved else sampler_config(args, False, 0.0)


# --- Results.


def _plain(x):
  """JSON has no NaN."""
  if isinstance(x, dict):
    return {name: _plain(value) for name, value in x.items()}
  if isinstance(x, list | tuple):
    return [_plain(value) for value in x]
  return None if isinstance(x, float) and not math.isfinite(x) else x


def main(args):
  """Samples if asked to, measures, and writes the results. Returns what is in results.json."""
  output = epath.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)
  ckpt = from_pretrained(args.checkpoint) if args.checkpoint else None

  # Decodings: made now, or earlier.
  tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else ckpt and ckpt.tokenizer
  mask_id = ckpt.mask_id if ckpt and args.mask_id < 0 else args.mask_id
  ids = ids_of(tokenizer, mask_id, args.end_ids)
  if args.prompts:
    labels, folders = sample(args, ckpt, output)
  else:
    folders = [epath.Path(folder) for folder in args.traces]
    labels = args.labels or [folder.name for folder in folders]
  read = [dumps.read_folder(folder, ids, args.tail) for folder in folders]
  groups = decoding.grouped(labels, read, folders)
  temperatures = len(groups) > 1 and all(_is_number(group.label) for group in groups)
  if temperatures:
    groups = sorted(groups, key=lambda group: float(group.label))
  first_folder = {label: folder for label, folder in reversed([*zip(labels, folders, strict=True)])}

  # Numbers of each label.
  options = decoding.Options(args.definition, args.denominator, args.tail, args.ties)
  values, summaries, maps = {}, {}, {"committed": {}, "confidence": {}}
  for group in groups:
    found = values[group.label] = decoding.measure(group, options)
    config = config_of(args, first_folder[group.label])
    first, grid = replay.confidence_maps(
      group.seeds[0], ckpt, config, args.maps, args.map_steps, args.batch_size
    )
    about = summaries[group.label] = {"problems": len(group.names), "seeds": len(group.seeds)}
    if first is not None:
      found |= decoding.entropy_sink(group, first)
      about["first_step"] = decoding.by_place(first)
    about |= {name: decoding.summary(value) for name, value in found.items()}
    about["random"] = decoding.random_reference(group, options)
    about["coin_entropy"] = orders.coin_entropy(len(group.seeds)) if len(group.seeds) > 1 else None
    about["variants"] = decoding.variants(group, args.ties)
    about["profiles"] = decoding.profiles(group, options)
    maps["committed"][group.label] = decoding.committed_map(group, args.map_steps)
    if grid is not None:
      maps["confidence"][group.label] = grid

  # Between labels.
  changes = decoding.changes(groups, values)
  said = findings.sentences(groups, changes, temperatures)
  results = {
    "title": args.title, "options": options._asdict(), "labels": summaries, "changes": changes,
    "pass_at_k": dumps.read_pass_at_k(args.results, list(summaries)),
    "notes": findings.notes_of(groups, summaries, any("sink" in x for x in summaries.values())),
  }  # fmt: skip
  if len(groups) > 1 and all(decoding.same_problems(groups[0], group) for group in groups):
    means, beyond = decoding.order_matrix(groups)
    found = bootstrap.mean_interval(beyond)
    results["order_matrix"] = {"means": means.tolist(), "between_less_within": found._asdict()}
    said += findings.order_sentence(groups, found)
  results["said"] = said
  results["made"] = {"of": args.checkpoint or ", ".join(map(str, folders)), **report.machine()} | {
    "made on": datetime.date.today().isoformat()
  }

  # Out.
  table = findings.table(summaries)
  (output / "results.json").write_text(json.dumps(_plain(results), indent=1) + "\n")
  order_charts.write(output, args.title, results, table, maps)
  for line in (*findings.aligned(table), *said, *(f"Note: {note}" for note in results["notes"])):
    print(line)
  print(f"wrote {output / 'index.html'}")
  return results


def _is_number(label):
  try:
    return math.isfinite(float(label))
  except ValueError:
    return False


if __name__ == "__main__":
  heap.keep_freed_memory()
  try:
    main(parse_arguments())
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f"analyze: {error}")
