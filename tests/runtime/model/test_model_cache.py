"""The cache folder of a model, and files in it that are replaced whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hotset.runtime.model.calibration import Calibration
from hotset.runtime.model.model_cache import LEFT_BEHIND_SECONDS, NoCacheFolder, cache_root, model_cache, replace_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_model_has_one_folder_of_the_users_cache(model: Path, cache: Path):
    assert cache_root() == cache / "hotset"
    assert model_cache(model) == model_cache(model / ".." / model.name)
    assert model_cache(model).is_relative_to(cache_root())
    assert model_cache(model).name.startswith("a-model-")


@pytest.mark.parametrize("value", ["", "relative/folder"])
def test_a_cache_folder_that_is_not_absolute_does_not_count(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_root() == Path.home() / ".cache" / "hotset"


def test_a_user_without_a_home_has_no_cache_folder(model: Path, monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(NoCacheFolder, match="this user has no home, and XDG_CACHE_HOME is not set"):
        model_cache(model)
    assert Calibration.load(model, "resnorm") is None


def test_other_weights_at_the_same_path_have_another_folder(model: Path):
    before = model_cache(model)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert model_cache(model) != before


def test_other_settings_for_the_same_weights_have_another_folder(model: Path):
    (model / "config.json").write_text('{"num_experts_per_tok": 4}')
    before = model_cache(model)
    (model / "config.json").write_text('{"num_experts_per_tok": 2, "norm_topk_prob": true}')
    assert model_cache(model) != before


def test_a_file_is_replaced_whole_and_a_failure_leaves_the_old_one(model: Path, monkeypatch: pytest.MonkeyPatch):
    path = model_cache(model) / "heat"
    replace_file(path, b"first")
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"
    monkeypatch.setattr(Path, "replace", _fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"third")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def _fail(self: Path, target: Path) -> Path:
    raise OSError("no space")


def test_what_killed_writers_left_behind_goes_with_the_next_write(tmp_path: Path) -> None:
    names = [".heat-dead", ".heat-alive", ".other-dead"]
    for name in names:
        (tmp_path / name).write_bytes(b"half of")
    for name in (".heat-dead", ".other-dead"):
        os.utime(tmp_path / name, (0, time.time() - LEFT_BEHIND_SECONDS - 10))
    replace_file(tmp_path / "heat", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".heat-alive", ".other-dead", "heat"]
