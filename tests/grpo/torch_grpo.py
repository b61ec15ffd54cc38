"""Coupled-GRPO in plain PyTorch, and golden sets made with it on any shape.

Written from statements about the released code (its formulas and array shapes), not from its lines.
"""

import json

import numpy as np
import torch
from safetensors.numpy import save_file

from tests import torch_reference as reference


def scores(state, config, tokens, prompt, noisy, weights, first):
  """log-probabilities [B, C] weighted as released: (full + where(first, w1 part, w2 part)) / 2."""
  parts = []
  for ids in noisy:
    logits = reference.forward(state, config, ids)[:, prompt - 1 : -1]
    log_probs = torch.log_softmax(logits, -1)
    parts.append(log_probs.gather(-1, tokens[:, prompt:, None])[..., 0])
  full, one, two = (part * weight for part, weight in zip(parts, weights, strict=True))
  return (full + torch.where(first[:, prompt:], one, two)) / 2


def loss(new, old, ref, advantages, mask, epsilon, beta):
  ratio = torch.exp(new - old)
  clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
  terms = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
  if beta:
    terms = terms + beta * (torch.exp(ref - new) - (ref - new) - 1)
  return (terms * mask).sum() / mask.sum().clamp(min=1)


def make_set(folder, config, seed, prompt, completion, groups, generations, accumulate, iterations):
  """Writes checkpoint/, grpo.json and grpo.safetensors in the form of the golden set."""
  state = reference.make_folder(folder / "checkpoint", config, seed)
  rng, rows = np.random.default_rng(seed), groups * generations
  vocab, mask_id, end = config["vocab_size"], config["mask_token_id"], config["eos_token_id"]
  wanted = {
    "P": prompt, "C": completion, "B": rows, "num_generations": generations, "mask_seeds": [3, 5, 8],
    "gradient_accumulation_steps": accumulate, "num_iterations": iterations, "beta": 0.02,
    "epsilon": 0.3,
  }  # fmt: skip
  ids = rng.integers(0, vocab, (rows, prompt + completion))
  ids[ids == mask_id] = (mask_id + 1) % vocab
  ids[ids == end] = (end + 2) % vocab if (end + 2) % vocab != mask_id else (end + 3) % vocab
  lengths = rng.integers(1, completion + 1, rows)
  for row in range(0, rows, 2):
    ids[row, prompt + lengths[row] - 1 :] = end
  tokens = torch.tensor(ids)
  is_end = ids[:, prompt:] == end
  mask = torch.tensor((np.cumsum(is_end, 1) - is_end) == 0)
  data = {"prompt_ids": ids[:, :prompt], "completion_ids": ids[:, prompt:]}
  data["completion_mask"] = mask.numpy()

  noise = lambda: torch.tensor(rng.normal(0, 0.5, (rows, completion)), dtype=torch.float32)  # noqa: E731
  in_completion = torch.arange(prompt + completion)[None] >= prompt
  passes, every, old, ref = [], [], [], []
  for i in range(iterations):
    t = rng.uniform(0.2, 0.8)
    first = in_completion & torch.tensor(rng.random((rows, prompt + completion)) < t)
    masked = torch.stack([in_completion.expand_as(first), first, in_completion & ~first])
    noisy = torch.where(masked, mask_id, tokens)
    weights = torch.tensor([1, 1 / t, 1 / (1 - t)], dtype=torch.float32)
    passes.append((noisy, weights, first))
    wanted[f"score.iter{i}.mask_ratio"] = t
    data |= {f"score.iter{i}.noisy": noisy.numpy(), f"score.iter{i}.t_mask": first.numpy()}
    data[f"score.iter{i}.weights"] = weights.numpy()
    with torch.no_grad():
      every.append(scores(state, config, tokens, prompt, *passes[i]))
    old.append(every[-1] + noise())
    ref.append(every[-1] + noise())
  for name, x in (("score", every), ("old", old), ("ref", ref)):
    x = torch.stack(x, 1).numpy()
    data["score.per_token_logps" if name == "score" else f"{name}_per_token_logps"] = x

  tests = rng.integers(0, 5, rows) / 4
  rewards = torch.tensor(2.0 * tests + 0.5 * rng.choice([0, 0.5, 1], rows), dtype=torch.float32)
  grouped = rewards.view(-1, generations)
  others = (grouped.sum(1, keepdim=True) - grouped) / (generations - 1)
  advantages = (grouped - others).view(-1)
  data |= {"rewards": rewards.numpy(), "advantages.scale_false": advantages.numpy()}
  data["advantages.scale_true"] = (
    (grouped - others) / (grouped.std(1, keepdim=True) + 1e-4)
  ).view(-1).numpy()  # fmt: skip

  def step(m, i, beta, old_too=True):
    part = slice(m * rows // accumulate, (m + 1) * rows // accumulate)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    noisy, weights, first = passes[i]
    new = scores(leaves, config, tokens[part], prompt, noisy[:, part], weights, first[part])
    before = old[i][part] if old_too else new.detach()
    value = loss(new, before, ref[i][part], advantages[part], mask[part], wanted["epsilon"], beta)
    value.backward()
    gradients = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values()))
    return value.item(), new.detach().numpy(), gradients, norm

  for m in range(accumulate):
    for i in range(iterations):
      name = f"loss.mb{m}.iter{i}"
      value, new, gradients, norm = step(m, i, wanted["beta"])
      wanted |= {f"{name}.loss": value, f"{name}.grad_global_norm": norm}
      data[f"{name}.per_token_logps"] = new[:, None]
      if m == 0 and i == iterations - 1:
        data |= {f"mb{m}.iter{i}.grad.{key}": g for key, g in gradients.items()}
  value, _, _, norm = step(accumulate - 1, 0, 0.0, False)
  wanted |= {"variant.beta0_iter1.loss": value, "variant.beta0_iter1.grad_global_norm": norm}
  wanted["variant.note"] = f"inputs of micro-batch {accumulate - 1}, seed 3, num_iterations 1"

  logits = torch.tensor(rng.normal(0, 3, (3 * 3, 5, 17)), dtype=torch.float32)
  index, half = torch.tensor(rng.integers(0, 17, (3, 5))), torch.tensor(rng.random((3, 5)) < 0.5)
  weights = torch.tensor(rng.uniform(1, 3, 9), dtype=torch.float32)
  out = []
  for i in range(3):
    log_probs = torch.log_softmax(logits[3 * i : 3 * i + 3], -1)
    parts = log_probs.gather(-1, index[i].expand(3, 5)[..., None])[..., 0]
    parts = parts * weights[3 * i : 3 * i + 3, None]
    out.append((parts[0] + torch.where(half[i], parts[1], parts[2])) / 2)
  data |= {"sls.logits": logits.numpy(), "sls.index": index.numpy(), "sls.mask": half.numpy()}
  data |= {"sls.weights": weights.numpy(), "sls.out": torch.stack(out).numpy()}

  def stored(x):
    x = np.ascontiguousarray(x)
    return x.astype({"b": np.uint8, "i": np.int32, "f": np.float32}[x.dtype.kind])

  save_file({name: stored(x) for name, x in data.items()}, folder / "grpo.safetensors")
  (folder / "grpo.json").write_text(json.dumps(wanted))
