"""The denoising loop of DiffuCoder for PyTorch: Dream's arguments, what to write, and how sure that is.

`export.model_file` puts this file into `modeling_diffucoder.py`, which says for whom it is.

Dimension key: B batch, L sequence, D embed, V vocab, P masked positions (of the whole batch, flat),
X any.
"""

import dataclasses
import types

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

# The documented defaults, in every version of transformers. (Dream's own code takes them from the
# model config, which under transformers 4.46-4.57 means temperature 1 and a hidden top_k of 50.
# Pass top_k=50 to get what published samples of DiffuCoder were made with.)
DEFAULTS = dict(
  max_length=None, max_new_tokens=None, steps=512, eps=1e-3, alg="origin", alg_temp=None,
  temperature=0.0, top_p=None, top_k=None, num_return_sequences=1, output_history=False,
  return_dict_in_generate=False, mask_token_id=None, pad_token_id=None, bos_token_id=None,
  eos_token_id=None,
)  # fmt: skip
DEFAULT_NEW_TOKENS = 20  # when neither length is given


@dataclasses.dataclass
class DiffuCoderOutput(ModelOutput):
  """The canvas [B, L] when `diffusion_generate` ended, and (if asked for) after each step."""

  sequences: torch.LongTensor = None
  history: tuple | None = None


@torch.no_grad()
def diffusion_generate(
  model, inputs, generation_config=None, *, attention_mask=None, generation_tokens_hook_func=None,
  generation_logits_hook_func=None, **kwargs,
):  # fmt: skip
  """Appends masks to prompts and denoises them; masks within the prompts are filled as well.

  Dream's, with these differences: each row commits tokens by its own number of masks (Dream takes
  the batch's mean, and so overwrites prompts); MASK is never written (where it is the choice, the
  best other token is written, in the same order); sampling is float32 whatever the model's dtype;
  ties go to the lowest index; a step that commits nothing runs no network unless a hook is given.

  Args:
    inputs: int64 [B, L], prompts, left-padded to one length.
    generation_config: any object with attributes of the names below; keyword arguments win.
    attention_mask: [B, L], 0 on padding.
    generation_tokens_hook_func: (step, x, logits) -> x, called before the first step with
      (None, x, None) and after each one.
    generation_logits_hook_func: (step, x, logits) -> logits, with logits[:, i] scoring token i.
    **kwargs: the keys of `DEFAULTS`.
  Returns:
    int64 [B, L + new tokens], or `DiffuCoderOutput` if return_dict_in_generate.
  Raises:
    TypeError, ValueError: name the argument.
  """
  c = settings(model.config, generation_config, kwargs)
  x_BL, valid_BL = canvas(model.config, inputs, attention_mask, c)
  attention_mask = None if valid_BL.all() else valid_BL
  change_tokens, change_logits = generation_tokens_hook_func, generation_logits_hook_func
  t = torch.linspace(1.0, c.eps, c.steps + 1)
  # Share of the remaining masks that each step commits.
  shares = [*(1.0 - t[1:-1] / t[:-2]).tolist(), 1.0]
  history = []
  if change_tokens is not None:
    x_BL = change_tokens(None, x_BL, None)
  for step, share in enumerate(shares):
    masked_BL = (x_BL == c.mask_token_id) & valid_BL
    if c.alg == "origin":  # each position on its own, so the number committed varies
      masked_BL &= torch.rand(x_BL.shape, device=x_BL.device) < share
      count_B = masked_BL.sum(1)
    else:
      count_B = (masked_BL.sum(1).float() * share).long()
      masked_BL &= (count_B > 0)[:, None]
    logits_BLV = None
    if change_tokens is not None or change_logits is not None:
      logits_BLV = align_with_targets(model(x_BL, attention_mask).logits, valid_BL)
    if change_logits is not None:
      logits_BLV = change_logits(step, x_BL, logits_BLV)
    if masked_BL.any():
      if logits_BLV is None:  # the output matrix is for the masked positions only
        x_BLD = align_with_targets(model.model(x_BL, attention_mask)[0], valid_BL)
        proposed = propose(x_BLD[masked_BL.to(x_BLD.device)], model.unembed, c)
      else:
        proposed = propose(logits_BLV[masked_BL.to(logits_BLV.device)], None, c)
      x_BL = commit(x_BL, masked_BL, count_B, *(x_P.to(x_BL.device) for x_P in proposed))
    if change_tokens is not None:
      x_BL = change_tokens(step, x_BL, logits_BLV)
    if c.output_history:
      history.append(x_BL.clone())
  if not c.return_dict_in_generate:
    return x_BL
  return DiffuCoderOutput(sequences=x_BL, history=tuple(history) if c.output_history else None)


def canvas(config, inputs, attention_mask, c):
  """Prompts with masks appended, and which positions are no padding: int64 and bool [B, L]."""
  if not torch.is_tensor(inputs) or inputs.dim() != 2:
    raise ValueError("inputs must be token ids [B, L]; give one prompt as [1, L]")
  valid_BL = torch.ones_like(inputs) if attention_mask is None else attention_mask != 0
  if valid_BL.shape != inputs.shape:
    raise ValueError(f"attention_mask is {[*valid_BL.shape]}, but inputs are {[*inputs.shape]}")
  length, new = inputs.shape[1], c.max_new_tokens
  if new is None:
    new = DEFAULT_NEW_TOKENS if c.max_length is None else c.max_length - length
  if new < 0 or (new == 0 and not (inputs == c.mask_token_id).any()):
    raise ValueError(
      f"there is nothing to write: {length} tokens, max_length {c.max_length}, max_new_tokens "
      f"{c.max_new_tokens}; raise one of these, or put masks into inputs"
    )
  if length + new > config.max_position_embeddings:
    raise ValueError(
      f"{length} tokens and {new} new ones are more than the model's context, "
      f"{config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
    )
  x_BL = F.pad(inputs.long(), (0, new), value=c.mask_token_id)
  valid_BL = F.pad(valid_BL.long(), (0, new), value=1).bool().to(x_BL.device)
  return tuple(x.repeat_interleave(c.num_return_sequences, 0) for x in (x_BL, valid_BL))


def first_id(ids):
  """A special token id of the config, which may hold several, or None."""
  return (ids[0] if ids else None) if isinstance(ids, (list, tuple)) else ids


def settings(config, generation_config, kwargs):
  """The arguments of `diffusion_generate`, checked: kwargs, then the config's, then `DEFAULTS`."""
  unknown = sorted(set(kwargs) - set(DEFAULTS))
  if unknown:
    raise TypeError(f"diffusion_generate got unknown arguments {unknown}; it has {list(DEFAULTS)}")
  defaults = DEFAULTS | {"mask_token_id": first_id(config.mask_token_id)}
  found = {name: getattr(generation_config, name, None) for name in DEFAULTS} | kwargs
  found = {name: defaults[name] if value is None else value for name, value in found.items()}
  c = types.SimpleNamespace(**found)
  checks = {
    "mask_token_id": (c.mask_token_id is not None, "pass it, or set it in config.json"),
    "alg": (c.alg in CONFIDENCE, f"choose one of {list(CONFIDENCE)}"),
    "steps": (c.steps >= 1, "use 1 or more"),
    "eps": (0 < c.eps < 1, "use a number in (0, 1)"),
    "temperature": (c.temperature >= 0, "use 0 or more"),
    "alg_temp": (c.alg_temp is None or c.alg_temp >= 0, "use None, 0 or more"),
    "top_p": (c.top_p is None or 0 < c.top_p <= 1, "use None or a number in (0, 1]"),
    "top_k": (c.top_k is None or c.top_k >= 0, "use None, 0 (off) or more"),
    "num_return_sequences": (c.num_return_sequences >= 1, "use 1 or more"),
  }
  for name, (good, remedy) in checks.items():
    if not good:
      raise ValueError(f"{name} is {getattr(c, name)!r}; {remedy}")
  return c


def align_with_targets(x_BLX, valid_BL):
  """Shifts one to the right, so that position i holds what predicts token i.

  The first token of a row keeps its own: what is before it is padding, or nothing.
  """
  shift = lambda x: torch.cat([x[:, :1], x[:, :-1]], 1)  # noqa: E731
  first_BL = (valid_BL & ~shift(valid_BL)).to(x_BLX.device)
  return torch.where(first_BL[:, :, None], x_BLX, shift(x_BLX))


def propose(features_PX, unembed, c, chunk=256):
  """What to write at each masked position, int64 [P], and how sure that is, float32 [P].

  `unembed` makes logits of the features, a chunk of positions at a time to bound the memory; None:
  they are logits.
  """
  proposals = []
  for x_PX in features_PX.split(chunk):
    logits_PV = (x_PX if unembed is None else unembed(x_PX)).float()
    probs_PV = filter_logits(logits_PV, c.temperature, c.top_p, c.top_k).softmax(-1)
    drawn_P = probs_PV.argmax(-1)
    if c.temperature > 0:
      drawn_P = torch.multinomial(probs_PV, 1)[:, 0]
    confidence_P = CONFIDENCE[c.alg](probs_PV, drawn_P)
    if c.alg_temp:  # the largest are then draws without replacement from softmax(confidence / it)
      gumbel_P = -torch.empty_like(confidence_P).exponential_().log()
      confidence_P = confidence_P / c.alg_temp + gumbel_P
    is_mask_V = torch.arange(logits_PV.shape[-1], device=logits_PV.device) == c.mask_token_id
    other_P = logits_PV.masked_fill(is_mask_V, -torch.inf).argmax(-1)
    proposals.append((torch.where(drawn_P == c.mask_token_id, other_P, drawn_P), confidence_P))
  return tuple(torch.cat(parts) for parts in zip(*proposals, strict=True))


def commit(x_BL, masked_BL, count_B, tokens_P, confidence_P):
  """Writes the `count_B` surest tokens of each row; the lowest index first on ties."""
  tokens_BL, scores_BL = x_BL.clone(), torch.full(x_BL.shape, -torch.inf, device=x_BL.device)
  tokens_BL[masked_BL], scores_BL[masked_BL] = tokens_P, confidence_P
  order_BL = scores_BL.sort(dim=1, descending=True, stable=True).indices
  return torch.where((order_BL.argsort(1) < count_B[:, None]) & masked_BL, tokens_BL, x_BL)


def filter_logits(logits_PV, temperature, top_p, top_k):
  """Temperature, then nucleus, then top-k, in Dream's order; float32."""
  removed = torch.finfo(logits_PV.dtype).min  # finite, so that nothing becomes NaN
  if temperature > 0:
    logits_PV = logits_PV / temperature
  if top_p is not None and top_p < 1:
    # A token stays when the more likely ones do not yet exceed top_p; tied ones stay or go together.
    probs_PV = logits_PV.softmax(-1)
    sorted_PV = probs_PV.sort(-1, descending=True).values
    before_PV = F.pad(sorted_PV.cumsum(-1)[:, :-1], (1, 0))
    last_P1 = (before_PV <= top_p).sum(-1, keepdim=True) - 1
    logits_PV = logits_PV.masked_fill(probs_PV < sorted_PV.gather(-1, last_P1), removed)
  if top_k and top_k < logits_PV.shape[-1]:
    kth_P1 = logits_PV.topk(top_k).values[:, -1:]
    logits_PV = logits_PV.masked_fill(logits_PV < kth_P1, removed)
  return logits_PV


# How sure a position is: (probs_PV, drawn_P) -> float32 [P]; higher commits first. Probabilities are
# the filtered, tempered ones. "origin" commits all that its coin picked, in whatever order.
CONFIDENCE = {
  "origin": lambda probs_PV, drawn_P: probs_PV.gather(-1, drawn_P[:, None])[:, 0],
  "maskgit_plus": lambda probs_PV, drawn_P: probs_PV.gather(-1, drawn_P[:, None])[:, 0],
  "topk_margin": lambda probs_PV, drawn_P: -probs_PV.topk(2).values.diff(dim=-1)[:, 0],
  "entropy": lambda probs_PV, drawn_P: (probs_PV * (probs_PV + 1e-10).log()).sum(-1),
}
