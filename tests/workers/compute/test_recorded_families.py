"""Every family against what transformers computed for it (scripts/record_family_logits.py); needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import (
    BF16_MODELS,
    FAMILY_MODELS,
    RECORDING,
    make_family_model,
    prompts,
    recorded_columns,
    short_prompts,
    weights_digest,
)
from in_process_model import InProcessModel

from hotset.workers.compute.weights import as_float32


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_logits_at_every_position(name: str, tmp_path: Path) -> None:
    recorded = np.load(RECORDING)
    folder = make_family_model(tmp_path / "model", name)
    expect_recorded(recorded, f"{name}: weights", folder)
    model = InProcessModel(folder)
    for token_ids, expected in zip(prompts(), recorded[f"{name}: logits"], strict=True):
        logits = model.logits(token_ids)[:, recorded_columns()]
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= 2e-3


@pytest.mark.parametrize("name", BF16_MODELS)
def test_logits_computed_in_bfloat16_behind_choices_that_are_not_close(name: str, tmp_path: Path) -> None:
    """transformers rounded every intermediate result to 8 bits, we none. Whole rows, where that decided no choice."""
    recorded = np.load(RECORDING)
    folder = make_family_model(tmp_path / "model", name, dtype="bfloat16")
    expect_recorded(recorded, f"{name}: bfloat16 weights", folder)
    positions, expected = recorded[f"{name}: bfloat16 positions"], as_float32(recorded[f"{name}: bfloat16 logits"])
    assert (positions[:, 1] > 0).sum() >= 60, "hardly any position with others before it is compared"
    model, token_ids = InProcessModel(folder), short_prompts()
    for prompt in np.unique(positions[:, 0]):
        of_prompt = positions[:, 0] == prompt
        found, rows = model.logits(token_ids[prompt])[positions[of_prompt, 1]], expected[of_prompt]
        difference = np.linalg.norm(found - rows, axis=1) / np.linalg.norm(rows, axis=1)
        assert difference.max() <= 5e-2


def expect_recorded(recorded: Mapping[str, Any], key: str, folder: Path) -> None:
    if key not in recorded or str(recorded[key]) != weights_digest(folder):
        pytest.fail("the model is not the recorded one: run scripts/record_family_logits.py")


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_prompt_cut_into_pieces_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    folder = make_family_model(tmp_path / "model", name, dtype="bfloat16")
    token_ids = prompts()[0]
    whole, pieces = InProcessModel(folder).logits(token_ids), [31, 1, 1, 22, 17]
    np.testing.assert_array_equal(InProcessModel(folder).logits(token_ids, pieces), whole)
