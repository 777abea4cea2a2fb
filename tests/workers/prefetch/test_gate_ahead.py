"""The next layers' gates on the current hidden state, in models whose layers add nothing to it, or everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_factory import make_model

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.workers.compute.gates import Gates
from hotset.workers.prefetch.gate_ahead import GateAhead
from hotset.workers.prefetch.source import LayerStep

TOP_K = 4


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def gates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gates:
    folder: Path = tmp_path_factory.mktemp("model")
    biased = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0} if request.param == "deepseek_v3" else {}
    make_model(folder, family=request.param, num_layers=3, num_experts=16, experts_per_token=TOP_K, **biased)
    config = ModelConfig.load(folder)
    return Gates(config, Checkpoint.open(folder, config))


def step_at(gates: Gates, layer: int, residual: np.ndarray) -> LayerStep:
    logits = gates(layer, residual)
    ranked = np.argsort(-gates.scores(layer, logits), axis=1)
    return LayerStep(layer, ranked[:, :TOP_K].astype(np.int32), logits, residual)


def hidden(gates: Gates, rows: int) -> np.ndarray:
    width = gates._gates[0][0].shape[0]
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("distance", [1, 2])
def test_a_state_that_layers_leave_as_it_is_tells_exactly_what_they_use(gates: Gates, distance: int) -> None:
    source = GateAhead(gates, distance, TOP_K)
    for row in hidden(gates, 20):
        scores = source.scores(step_at(gates, 0, row[np.newaxis]))
        used = step_at(gates, distance, row[np.newaxis]).experts[0]
        assert {*np.flatnonzero(scores > 0).tolist()} == {*used.tolist()}


def test_a_batch_wants_what_any_of_its_rows_wants(gates: Gates) -> None:
    rows = hidden(gates, 5)
    scores = GateAhead(gates, 1, TOP_K).scores(step_at(gates, 0, rows))
    assert {*np.flatnonzero(scores > 0).tolist()} == {*step_at(gates, 1, rows).experts.ravel().tolist()}


def test_preferred_experts_leave_less_room_for_others(gates: Gates) -> None:
    row = hidden(gates, 1)
    used = step_at(gates, 1, row).experts[0].tolist()
    preferred = [expert for expert in range(16) if expert not in used][:TOP_K]
    scores = GateAhead(gates, 1, TOP_K, lambda layer: (100.0, preferred)).scores(step_at(gates, 0, row))
    without = GateAhead(gates, 1, TOP_K).scores(step_at(gates, 0, row))
    assert (scores < without).all()
    # A sigmoid is at most 1, whatever is added to a logit: an expert with a large bias may still be chosen.
    assert (scores <= 0).sum() >= (16 if gates.scores(1, np.zeros((1, 16), np.float32)).max() == 0 else 13)


def test_the_last_layers_have_nothing_ahead(gates: Gates) -> None:
    one, two = GateAhead(gates, 1, TOP_K), GateAhead(gates, 2, TOP_K)
    assert [one.target(layer) for layer in range(3)] == [1, 2, None]
    assert [two.target(layer) for layer in range(3)] == [2, None, None]
