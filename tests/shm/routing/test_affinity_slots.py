"""The shared slots against a float64 moving average, from one process and from several at once."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier

import numpy as np
import pytest
from forks import FORK, forked
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RouterConfig
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.segment import InstanceLock, Segment, remove_ipc_objects

EXPERTS = 16
UPDATES = 100
LAWS = {
    "moving average": AffinityConfig(EXPERTS, 31 / 32, 1 / 32, 1.0),
    "slow": AffinityConfig(EXPERTS, 0.99, 0.01, 1.0),
    "the original's": AffinityConfig(EXPERTS, 0.99, 1.0, 1.0),
    "another scale": AffinityConfig(EXPERTS, 0.9, 1.0, 10.0),
}


def moving_average(law: AffinityConfig, activations: np.ndarray) -> np.ndarray:
    """Scores in float64 after epochs [updates, experts] of activations."""
    scores = np.zeros(activations.shape[1])
    for active in activations:
        scores = np.minimum(scores * law.decay + active * law.activation_boost, law.max_score)
    return scores


def draw_activations(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((UPDATES, EXPERTS)) < 0.2


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_one_process_agrees_with_a_float64_average(law: AffinityConfig) -> None:
    affinity = ExpertAffinity(law)
    activations = draw_activations(1)
    for active in activations:
        affinity.update(np.flatnonzero(active).tolist())
    error = np.abs(affinity.scores() - moving_average(law, activations))
    assert error.max() <= 1e-4 * law.max_score
    assert affinity.activation_counts().tolist() == activations.sum(axis=0).tolist()


@pytest.fixture
def shared() -> Iterator[tuple[str, Segment]]:
    instance = f"affinity-{secrets.token_hex(4)}"
    geometry = Geometry(num_layers=1, num_experts=EXPERTS, num_processes=4)
    lock = InstanceLock(instance)  # else the janitor of an instance that starts meanwhile takes the segment away
    segment = Segment.create(instance, geometry)
    yield instance, segment
    segment.close()
    remove_ipc_objects(instance)
    lock.release()


def update_in_turn(instance: str, geometry: Geometry, law: AffinityConfig, process: int, turns: list[int]) -> None:
    """Makes the updates of `turns` that are this process's, each when the epoch says that it is its turn."""
    segment = Segment.attach(instance, geometry)
    affinity = ExpertAffinity(law, segment=segment, process=process)
    activations = draw_activations(len(set(turns)))
    for turn, owner in enumerate(turns):
        if owner == process:
            while segment.arena.load_u64(Section.LAYERS, 0, 0) != turn:
                time.sleep(0.0001)
            affinity.update(np.flatnonzero(activations[turn]).tolist())
    del affinity
    segment.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_processes_in_turn_agree_with_a_float64_average(
    shared: tuple[str, Segment], law: AffinityConfig, processes: int
) -> None:
    instance, segment = shared
    turns = [turn if turn < processes else turn * 7919 % processes for turn in range(UPDATES)]
    updaters = [
        functools.partial(update_in_turn, instance, segment.layout.geometry, law, process, turns)
        for process in range(processes)
    ]
    with forked(*updaters):
        pass
    affinity = ExpertAffinity(law, segment=segment)
    activations = draw_activations(processes)
    error = np.abs(affinity.scores() - moving_average(law, activations))
    assert error.max() <= 1e-4 * law.max_score
    assert affinity.activation_counts().tolist() == activations.sum(axis=0).tolist()


def update_one_expert(instance: str, geometry: Geometry, law: AffinityConfig, process: int, start: Barrier) -> None:
    segment = Segment.attach(instance, geometry)
    affinity = ExpertAffinity(law, segment=segment, process=process)
    start.wait()
    for _ in range(UPDATES):
        affinity.update([3])
    del affinity
    segment.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_at_once_on_one_slot_agree_with_a_float64_average(
    shared: tuple[str, Segment], processes: int
) -> None:
    """Every epoch activates the same expert, so the order cannot matter and the average is known."""
    instance, segment = shared
    law = LAWS["slow"]
    start = FORK.Barrier(processes)
    updaters = [
        functools.partial(update_one_expert, instance, segment.layout.geometry, law, process, start)
        for process in range(processes)
    ]
    with forked(*updaters):
        pass
    affinity = ExpertAffinity(law, segment=segment)
    expected = moving_average(law, np.ones((UPDATES * processes, 1)))[0]
    assert affinity.score(3) == pytest.approx(expected, abs=1e-4)
    assert affinity.activation_count(3) == UPDATES * processes


@settings(max_examples=60, deadline=None)
@given(epochs=st.integers(0, 5000), decay=st.floats(0, 1))
def test_inv2_a_score_never_rises_without_an_activation(epochs: int, decay: float) -> None:
    affinity = ExpertAffinity(AffinityConfig(2, decay, 1.0, 1.0))
    affinity.update([0])
    last = affinity.score(0)
    for step in (1, epochs):
        for _ in range(min(step, 50)):
            affinity.update([1])
        now = affinity.score(0)
        assert now <= last
        last = now


@pytest.mark.parametrize("law", [LAWS["moving average"], LAWS["the original's"]], ids=["average", "original"])
def test_a_batch_merged_at_once_equals_its_tokens_one_by_one(law: AffinityConfig) -> None:
    rows = np.random.default_rng(0).normal(size=(64, EXPERTS)).astype(np.float32)
    config = RouterConfig(EXPERTS, 2, affinity=law)
    batched, single = MemoryAwareRouter(config), MemoryAwareRouter(config)
    batched.route_batch(rows)
    for row in rows:
        single.route(row)
    np.testing.assert_allclose(batched.affinity.scores(), single.affinity.scores(), rtol=0, atol=1e-6)
    assert batched.affinity.snapshot()[1].max() == single.affinity.snapshot()[1].max() == 64
