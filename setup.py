"""pip install -e .            CPU
pip install -e '.[tpu]'     on a TPU VM
pip install -e '.[cuda]'    on a GPU machine
"""

from setuptools import find_packages, setup

setup(
  name="diffucoder_jax",
  version="0.1.0",
  description="Masked diffusion language models for code (DiffuCoder) in JAX, for TPU pods",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["diffucoder_jax*", "configs*"]),
  package_data={"diffucoder_jax.evals": ["viewer.css", "viewer.js"]},  # the report's page
  install_requires=[
    "absl-py",
    "array_record",
    "etils[epath]",
    "flax>=0.12",
    "grain>=0.2.18",
    "importlib_resources",  # tensorflow-datasets imports it without asking for it
    "jax>=0.10",
    "ml-collections>=1.1",
    "ml_dtypes",
    "numpy",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "sentencepiece>=0.2",
    "tensorflow-datasets>=4.9.10",
    "tensorstore",
    "tokenizers>=0.20",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda13]>=0.10"],
    "report": ["matplotlib>=3.9"],
    "evalplus": ["evalplus>=0.3.1"],  # in a venv of its own: launch/evalplus.sh
    "parquet": ["pyarrow"],
    "prepare": ["pyarrow", "rensa>=0.5"],
    "gcs": ["gcsfs"],
    "torch": ["torch", "transformers>=4.46"],
    "test": [
      "pytest>=8",
      "pytest-xdist",
      "ruff",
      "matplotlib>=3.9",
      "pyarrow",
      "rensa>=0.5",
      "safetensors",
    ],
  },
)
