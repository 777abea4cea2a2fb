"""Whole instances: real processes, the model that ships with the package, and a check that nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from instances import abandoned, wait_until

from hotset.runtime import Backend, ExpertCache


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test of this folder, whatever it kills, leaves /dev/shm as it was."""
    yield
    assert wait_until(lambda: not abandoned()), abandoned()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's instances have learned of a model is not known to those of the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend(workers=2, expert_budget="50%", warm_start=False) as running:
        yield running


@pytest.fixture(scope="module")
def cache() -> Iterator[ExpertCache]:
    """A quarter of the experts, and nobody else who uses them; tests begin where others have left it."""
    with ExpertCache(expert_budget="25%", user_pins=2, warm_start=False) as running:
        yield running
