"""Every family against what transformers computed for it (scripts/record_family_logits.py); needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family_models import FAMILY_MODELS, RECORDING, make_family_model, prompts, recorded_columns, weights_digest
from in_process_model import InProcessModel


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_logits_at_every_position(name: str, tmp_path: Path) -> None:
    recorded = np.load(RECORDING)
    folder = make_family_model(tmp_path / "model", name)
    if f"{name}: weights" not in recorded or str(recorded[f"{name}: weights"]) != weights_digest(folder):
        pytest.fail("the model is not the recorded one: run scripts/record_family_logits.py")
    model = InProcessModel(folder)
    for token_ids, expected in zip(prompts(), recorded[f"{name}: logits"], strict=True):
        logits = model.logits(token_ids)[:, recorded_columns()]
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= 2e-3


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_prompt_cut_into_pieces_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    folder = make_family_model(tmp_path / "model", name, dtype="bfloat16")
    token_ids = prompts()[0]
    whole, pieces = InProcessModel(folder).logits(token_ids), [31, 1, 1, 22, 17]
    np.testing.assert_array_equal(InProcessModel(folder).logits(token_ids, pieces), whole)
