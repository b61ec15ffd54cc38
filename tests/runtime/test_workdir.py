"""A workdir belongs to one run, and says which values of another config differ."""

import json

import pytest

from diffucoder_jax.runtime import workdir as workdirs

CONFIG = {
  "seed": 0,
  "model": {"width": 16, "layers": 2},
  "mesh": {"data": 2},
  "checkpoint": {"every": 1, "accept_changes": False},
}


def changed(**changes):
  config = json.loads(json.dumps(CONFIG))
  for key, value in changes.items():
    section, name = key.split("__")
    config[section][name] = value
  return config


def test_config_changes_are_listed_key_by_key():
  new = changed(model__width=32, model__heads=4, mesh__data=8)
  del new["seed"]
  assert workdirs.config_changes(CONFIG, new) == [
    "mesh.data: 2 -> 8",
    "model.heads: absent -> 4",
    "model.width: 16 -> 32",
    "seed: 0 -> absent",
  ]
  assert workdirs.config_changes({"a": (1, 2), "b": 1}, {"a": [1, 2], "b": 1.0}) == []
  assert workdirs.config_changes({"a": float("nan")}, {"a": float("nan")}) == []
  assert workdirs.config_changes({"a": {}}, {"a": {"b": None}}) == [
    "a: {} -> absent",
    "a.b: absent -> null",
  ]


def test_claim_workdir(tmp_path):
  path = tmp_path / "run" / "config.json"
  workdirs.claim_workdir(tmp_path / "run", CONFIG)
  first = path.read_text()
  assert json.loads(first) == CONFIG
  (tmp_path / "run" / "metrics.jsonl").touch()  # it has begun
  workdirs.claim_workdir(str(tmp_path / "run"), CONFIG)
  with pytest.raises(ValueError, match="model.width: 16 -> 32"):
    workdirs.claim_workdir(tmp_path / "run", changed(model__width=32, mesh__data=8))
  assert path.read_text() == first
  workdirs.claim_workdir(tmp_path / "run", changed(mesh__data=8))
  assert json.loads(path.read_text())["mesh"] == {"data": 8}
  accepted = changed(model__width=32, checkpoint__accept_changes=True)
  workdirs.claim_workdir(tmp_path / "run", accepted)
  assert json.loads(path.read_text()) == accepted
  assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", "metrics.jsonl"]
  path.write_text(first[:-9])
  with pytest.raises(ValueError, match="config.json is not valid JSON"):
    workdirs.claim_workdir(tmp_path / "run", CONFIG)


def test_paths_are_made_absolute_unless_they_are_remote(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(workdirs.absolute("runs/a")) == str(tmp_path / "runs" / "a")
  assert str(workdirs.absolute("gs://bucket/a")) == "gs://bucket/a"


def test_keys_that_came_later_do_not_stop_a_run_at_their_old_meaning():
  """A run from before there was optim.rounding goes on, but not with another rounding."""
  old = {"optim": {"lr": 1e-3}}
  new = {"optim": {"lr": 1e-3, "rounding": "nearest", "moment_dtype": "float32"}}
  assert workdirs.check_config(old, new, "it") == []
  new["optim"]["rounding"] = "stochastic"
  with pytest.raises(ValueError, match="optim.rounding: absent"):
    workdirs.check_config(old, new, "it")


def test_a_run_may_move_to_a_pod_of_another_shape():
  old = {"data": {"batch_size": 160}}
  new = {"data": {"batch_size": 160, "fill_batch": True}, "hosts": {"hang_seconds": 600.0}}
  assert workdirs.check_config(old, new, "it") == [
    "data.fill_batch: absent -> true", "hosts.hang_seconds: absent -> 600.0",
  ]  # fmt: skip
  with pytest.raises(ValueError, match="data.batch_size: 160 -> 80"):
    workdirs.check_config(old, {"data": {"batch_size": 80}}, "it")
