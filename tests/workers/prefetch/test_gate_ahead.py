"""The next layers' gates on the current hidden state, in models whose layers add nothing to it, or everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_factory import make_model

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.router import MemoryAwareRouter
from hotset.workers.compute.gates import Gates, selection_bias
from hotset.workers.moe import router_config
from hotset.workers.prefetch.gate_ahead import GateAhead
from hotset.workers.prefetch.source import LayerStep

TOP_K = 4

Model = tuple[Gates, ModelConfig, Checkpoint]


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("model")
    biased = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0} if request.param == "deepseek_v3" else {}
    make_model(folder, family=request.param, num_layers=3, num_experts=16, experts_per_token=TOP_K, **biased)
    config = ModelConfig.load(folder)
    checkpoint = Checkpoint.open(folder, config)
    return Gates(config, checkpoint), config, checkpoint


class World:
    """A model with a router on private memory. Steps are of a state that every layer leaves as it is."""

    def __init__(self, gates: Gates, config: ModelConfig, checkpoint: Checkpoint, **policy: Any) -> None:
        self.gates = gates
        self.router = MemoryAwareRouter(
            router_config(config, **policy), num_layers=3, selection_bias=selection_bias(checkpoint)
        )

    def step(self, residual: np.ndarray) -> LayerStep:
        logits = self.gates(0, residual)
        return LayerStep(0, self.router.true_top_k(logits, 0), logits, residual, self.foresee)

    def foresee(self, layer: int, logits: np.ndarray) -> dict[int, float]:
        return self.router.foresee(logits, layer)

    def misses(self, layer: int, residual: np.ndarray) -> set[int]:
        """Of the step when it gets there."""
        return {*self.router.route_batch(self.gates(layer, residual), layer).misses}


@pytest.fixture
def exact(model: Model) -> World:
    return World(*model)


def hidden(gates: Gates, rows: int) -> np.ndarray:
    width = gates._gates[0][0].shape[0]
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("distance", [1, 2])
def test_a_state_that_layers_leave_as_it_is_tells_exactly_what_they_miss(exact: World, distance: int) -> None:
    source = GateAhead(exact.gates, distance)
    exact.router.update_cache_state(range(0, 16, 2), layer=distance)
    for row in hidden(exact.gates, 20):
        foreseen = source.candidates(exact.step(row[np.newaxis]), 16)
        assert {*foreseen} == exact.misses(distance, row[np.newaxis])


def test_a_batch_misses_what_any_of_its_rows_misses(exact: World) -> None:
    rows = hidden(exact.gates, 5)
    assert {*GateAhead(exact.gates, 1).candidates(exact.step(rows), 16)} == exact.misses(1, rows)


def test_the_score_is_the_weight_and_the_heaviest_are_kept(exact: World) -> None:
    rows = hidden(exact.gates, 5)
    foreseen = GateAhead(exact.gates, 1).candidates(exact.step(rows), 16)
    routed = exact.router.route_batch(exact.gates(1, rows), 1)
    for expert, weight in foreseen.items():
        assert weight == routed.weights[routed.experts == expert].max()
    heaviest = GateAhead(exact.gates, 1).candidates(exact.step(rows), 3)
    assert sorted(heaviest.values()) == sorted(foreseen.values())[-3:]


def test_what_the_router_would_take_instead_is_not_missed(model: Model) -> None:
    world = World(*model, policy="bonus", cache_bonus=100.0)
    world.router.update_cache_state(range(8), layer=1)
    row = hidden(world.gates, 1)
    foreseen = GateAhead(world.gates, 1).candidates(world.step(row), 16)
    assert {*foreseen} == world.misses(1, row)
    assert len(foreseen) < len({*world.router.true_top_k(world.gates(1, row), 1)[0].tolist()} - {*range(8)})


def test_the_last_layers_have_nothing_ahead(exact: World) -> None:
    one, two = GateAhead(exact.gates, 1), GateAhead(exact.gates, 2)
    assert [one.target(layer) for layer in range(3)] == [1, 2, None]
    assert [two.target(layer) for layer in range(3)] == [2, None, None]
