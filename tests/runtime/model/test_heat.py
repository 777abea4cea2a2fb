"""The heat file of a model: what it keeps, and that a damaged one is refused in words."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from hotset.runtime.model.heat import Heat, UnusableHeat

SHAPE = (2, 4)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def heat(current: list[list[int]], ranking: list[int], earlier: int = 0) -> Heat:
    return Heat(
        instance="first",
        earlier=np.full(SHAPE, earlier, np.uint64),
        current=np.array(current, np.uint64),
        affinity=np.full(SHAPE, 0.25, np.float32),
        ranking=np.array(ranking, np.int64),
    )


def test_what_was_saved_is_loaded(model: Path) -> None:
    assert Heat.load(model, SHAPE) is None
    saved = heat([[1, 2, 3, 4], [0, 0, 9, 0]], [6, 3], earlier=7)
    saved.save(model)
    loaded = Heat.load(model, SHAPE)
    assert loaded is not None and loaded.instance == "first"
    for name in ("earlier", "current", "affinity", "ranking"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name), strict=True)
    assert loaded.activations.tolist() == [[8, 9, 10, 11], [7, 7, 16, 7]]


def test_percentiles_are_mid_ranks_over_the_layers_that_have_experts() -> None:
    assert heat([[0, 0, 0, 0], [5, 1, 1, 3]], []).percentiles().tolist() == [[0, 0, 0, 0], [0.875, 0.25, 0.25, 0.625]]
    assert (heat([[2, 2, 2, 2], [2, 2, 2, 2]], []).percentiles() == 0.5).all()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"ranking": np.array([8])}, "an expert that is not one of 8"),
        ({"ranking": np.array([3, 3])}, "an expert twice"),
        ({"current": np.zeros((2, 5), np.uint64)}, r"current is uint64 \[2, 5\], expected uint64 \[2, 4\]"),
        ({"earlier": np.zeros(SHAPE)}, "earlier is float64"),
        ({"affinity": np.full(SHAPE, np.nan, np.float32)}, "affinity scores"),
    ],
)
def test_a_file_that_contradicts_the_model_is_refused(model: Path, damage: dict[str, object], problem: str) -> None:
    msgspec.structs.replace(heat([[0] * 4] * 2, [1]), **damage).save(model)
    with pytest.raises(UnusableHeat, match=problem):
        Heat.load(model, SHAPE)


@pytest.mark.parametrize("content", [b"", b"not a heat file", bytes(100)])
def test_a_file_that_is_something_else_is_refused(model: Path, content: bytes) -> None:
    heat([[0] * 4] * 2, [1]).save(model)
    Heat.path(model).write_bytes(content)
    with pytest.raises(UnusableHeat, match="is ignored"):
        Heat.load(model, SHAPE)


def test_a_file_that_lacks_a_part_is_refused(model: Path) -> None:
    from safetensors.numpy import save_file

    Heat.path(model).parent.mkdir(parents=True)
    save_file({"ranking": np.zeros(1, np.int64)}, Heat.path(model))
    with pytest.raises(UnusableHeat, match="is ignored"):
        Heat.load(model, SHAPE)
