"""The same weights in PyTorch: the model file that travels with our exports, or Dream's own.

PyTorch is optional here, and imported in these functions only.
"""

import functools
import json
import os
import pathlib
import shutil
import tempfile

import jax

from diffucoder_jax.benchmarking import timing
from diffucoder_jax.hf import export


def absent():
  """Why PyTorch cannot be compared with here, in words; "" if it can."""
  # Both are read when transformers is imported: all is in the folders; copies of models' code do not go
  # among the user's.
  os.environ["HF_HUB_OFFLINE"] = "1"
  os.environ.setdefault("HF_MODULES_CACHE", _modules().name)
  try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
  except ImportError as error:
    return f"left out: the PyTorch twin ({error}): pip install -e '.[torch]'"
  if jax.default_backend() != "cpu":
    return (
      f"left out: the PyTorch twin, which runs on CPU while JAX runs on {jax.default_backend()}"
    )
  return ""


def versions():
  """{"torch", "transformers"}: their versions; needs both."""
  import torch
  import transformers

  return {"torch": torch.__version__, "transformers": transformers.__version__}


@functools.cache
def _modules():
  """Where `transformers` puts copies of models' code; gone at exit."""
  return tempfile.TemporaryDirectory()


def open_twin(folder):
  """The model of a Hugging Face folder, through AutoModel and the code beside the weights.

  Args: folder: with config.json, safetensors and a model file.
  Returns: a `transformers.PreTrainedModel` in float32, for inference, on as many threads as XLA has.
  Raises: whatever that code or `transformers` raises.
  """
  import torch
  import transformers

  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(timing.cores())
  return transformers.AutoModel.from_pretrained(
    folder, torch_dtype=torch.float32, trust_remote_code=True
  ).eval()


def open_other(folder, code, more, config, target):
  """The weights of `folder` under Dream's modeling code, its original or a changed copy of it.

  Args:
    folder: ours. code: folder with `export.DREAM_FILES` and the files `more`. config: `ModelConfig`.
    target: to make.
  Raises:
    FileNotFoundError: a file of the code is absent; ValueError: it cannot express this network.
  """
  code = pathlib.Path(code)
  missing = [name for name in (*export.DREAM_FILES, *more) if not (code / name).exists()]
  if missing:
    raise FileNotFoundError(f"{code} lacks {', '.join(missing)}")
  export.check_remote_code("dream", config)
  shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.py"))
  keys, files = export.model_code(config, "dream", code)
  for name, contents in (files | {name: (code / name).read_bytes() for name in more}).items():
    (target / name).write_bytes(contents)
  hf_config = json.loads((target / "config.json").read_text())
  (target / "config.json").write_text(json.dumps({**hf_config, **keys}, indent=2))
  return open_twin(target)
