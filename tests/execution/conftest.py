"""A sandbox, or a skip with the reason where this machine offers no isolation."""

import pathlib
import tempfile

import pytest

from diffucoder_jax.execution.sandbox import Sandbox, SandboxUnavailable


def open_or_skip(**arguments):
  try:
    return Sandbox(**arguments)
  except SandboxUnavailable as error:
    if "self-test" in str(error):  # that is no lack of the machine's
      raise
    pytest.skip(f"no isolation on this machine: {error}")


@pytest.fixture
def public_folder():
  """A folder that every user of the machine may read and write; pytest's own are for one."""
  with tempfile.TemporaryDirectory() as name:
    path = pathlib.Path(name)
    path.chmod(0o777)
    yield path


@pytest.fixture(scope="session")
def sandbox_or_skip():
  """`Sandbox`, as a function that skips where there is none."""
  return open_or_skip


@pytest.fixture(scope="module", params=["auto", pytest.param("no-userns", marks=pytest.mark.slow)])
def box(request):
  """A sandbox of one fork server, at the best level of this machine and at the one below."""
  with open_or_skip(workers=1, level=request.param) as box:
    yield box
