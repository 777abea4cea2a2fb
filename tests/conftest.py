"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained_folder() -> Path:
    """The model that ships with the package."""
    folder = Path(__file__).parents[1] / "runtime" / "model" / "trained"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the trained model is not in runtime/model/trained")
    return folder
