"""The shipped model against what transformers computed for it (scripts/record_reference.py); needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_model import InProcessModel
from numpy.typing import NDArray

from hotset.runtime.model.tokenizer import Tokenizer

RECORDING = Path(__file__).parents[2] / "data" / "reference_logits.npz"
Recording = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def recording(trained_folder: Path) -> Recording:
    recorded = dict(np.load(RECORDING))
    actual = hashlib.sha256((trained_folder / "model.safetensors").read_bytes()).hexdigest()
    if str(recorded["model_sha256"]) != actual:
        pytest.fail("the model has changed since the recording: run scripts/record_reference.py")
    return recorded


@pytest.fixture(scope="module")
def model(trained_folder: Path) -> InProcessModel:
    return InProcessModel(trained_folder)


def test_logits_at_every_position(model: InProcessModel, recording: Recording) -> None:
    for index, token_ids in enumerate(recording["token_ids"]):
        logits = model.logits(token_ids)
        assert len(logits) == 256
        assert np.abs(logits[:, recording["columns"]] - recording["logits"][index]).max() <= 2e-3
        highest = logits.max(axis=1, keepdims=True)
        logsumexp = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
        assert np.abs(logsumexp - recording["logsumexp"][index]).max() <= 2e-3
        best_two = np.sort(logits, axis=1)[:, -2:]
        clear = best_two[:, 1] - best_two[:, 0] > 4e-3
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(logits.argmax(axis=1)[clear], recording["argmax"][index][clear])


def test_greedy_text_of_200_tokens(model: InProcessModel, recording: Recording, trained_folder: Path) -> None:
    tokenizer = Tokenizer(trained_folder)
    prompts = np.split(recording["prompts"], np.cumsum(recording["prompt_lengths"])[:-1])
    for prompt, continuation in zip(prompts, recording["continuations"], strict=True):
        chosen = model.greedy(prompt, 200)
        assert tokenizer.decode(chosen) == tokenizer.decode(continuation)
        assert chosen == continuation.tolist()
