"""What is asked for ahead of time: where the next layer can be foreseen everything, where it cannot nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from hotset.runtime.prefetch import parse_prefetch
from hotset.shm.layout import PrefetchSource
from hotset.workers.expert_access import ExpertAccess
from hotset.workers.prefetch.affinity import Affinity
from hotset.workers.prefetch.confidence import Confidence
from hotset.workers.prefetch.prefetcher import Prefetcher
from hotset.workers.prefetch.runners_up import RunnersUp
from hotset.workers.prefetch.source import LayerStep, Source
from hotset.workers.prefetch.transitions import Transitions

LAYERS, EXPERTS, TOP_K = 3, 16, 2


class Cache:
    """In the place of the access to an instance's experts: every one of an even number is resident."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, PrefetchSource]] = []

    def is_resident(self, layer: int, expert: int) -> bool:
        return expert % 2 == 0

    def prefetch(self, layer: int, experts: list[int], source: PrefetchSource) -> None:
        self.asked += [(layer, expert, source) for expert in experts]


def prefetcher_of(source: Source) -> tuple[Prefetcher, Cache]:
    cache = Cache()
    return Prefetcher({PrefetchSource.TRANSITIONS: source}, cast("ExpertAccess", cache), TOP_K), cache


def step_of(layer: int, experts: np.ndarray) -> LayerStep:
    nothing = np.zeros((1, EXPERTS), np.float32)
    return LayerStep(layer, experts.astype(np.int32)[np.newaxis], nothing, nothing, lambda *_: {})


def deterministic(tokens: int) -> Iterator[list[np.ndarray]]:
    """Every layer uses the experts of the one before it plus a number of its own."""
    random = np.random.default_rng(0)
    for _ in range(tokens):
        first = random.choice(EXPERTS, TOP_K, replace=False)
        yield [(first + 5 * layer) % EXPERTS for layer in range(LAYERS)]


def unpredictable(tokens: int) -> Iterator[list[np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(tokens):
        yield [random.choice(EXPERTS, TOP_K, replace=False) for _ in range(LAYERS)]


def recall(prefetcher: Prefetcher, cache: Cache, tokens: Iterator[list[np.ndarray]]) -> tuple[float, int]:
    """Of the absent experts that layers after the first used, those that had been asked for; and how many others."""
    misses, foreseen, wrong = 0, 0, 0
    for token in tokens:
        for layer, experts in enumerate(token):
            absent = {int(expert) for expert in experts if expert % 2}
            asked = {expert for at, expert, _ in cache.asked if at == layer}
            if layer:
                misses += len(absent)
                foreseen += len(absent & asked)
                wrong += len(asked - absent)
            cache.asked = [ask for ask in cache.asked if ask[0] != layer]
            prefetcher.after_routing(step_of(layer, experts))
    return foreseen / misses, wrong


def test_a_table_of_transitions_foresees_layers_that_follow_from_the_one_before() -> None:
    prefetcher, cache = prefetcher_of(Transitions(range(LAYERS), EXPERTS))
    recall(prefetcher, cache, deterministic(400))  # learns the table, and then that it can be trusted
    found, wrong = recall(prefetcher, cache, deterministic(400))
    assert found > 0.98
    assert wrong < 10


@pytest.mark.parametrize("make", [lambda: Transitions(range(LAYERS), EXPERTS), lambda: Affinity(random_scores)])
def test_what_cannot_be_foreseen_is_not_asked_for(make: type[Source]) -> None:
    prefetcher, cache = prefetcher_of(make())
    recall(prefetcher, cache, unpredictable(200))
    found, wrong = recall(prefetcher, cache, unpredictable(400))
    assert (found, wrong) == (0, 0)


def random_scores() -> np.ndarray:
    return np.random.default_rng(1).random((LAYERS, EXPERTS), np.float32)


def test_a_source_that_becomes_bad_asks_for_nothing_any_more() -> None:
    prefetcher, cache = prefetcher_of(Transitions(range(LAYERS), EXPERTS))
    recall(prefetcher, cache, deterministic(400))
    _, wrong = recall(prefetcher, cache, unpredictable(3000))
    assert wrong > 0
    assert recall(prefetcher, cache, unpredictable(200)) == (0, 0)


def test_layers_that_hardly_miss_are_looked_at_now_and_then_only() -> None:
    looked_at: list[int] = []

    class Counting(Transitions):
        def scores(self, step: LayerStep) -> np.ndarray:
            looked_at.append(step.layer)
            return super().scores(step)

    prefetcher, cache = prefetcher_of(Counting(range(LAYERS), EXPERTS))
    even = ([2 * (experts // 2) for experts in token] for token in deterministic(1200))
    for token in even:
        for layer, experts in enumerate(token):
            prefetcher.after_routing(step_of(layer, experts))
        if len(looked_at) and prefetcher._layers[1].steps == 800:
            looked_at.clear()
    assert 0 < len(looked_at) <= 2 * 400 / 16 + 2
    assert cache.asked == []


def test_confidence_is_none_at_first_and_then_what_was_measured() -> None:
    confidence = Confidence((0.0, 1.0, 2.0))
    assert [confidence.bucket(score) for score in (0, 0.5, 1, 7)] == [0, 0, 1, 2]
    assert not any(confidence.trusts(bucket) for bucket in range(3))
    for turn in range(3000):
        confidence.learn(0, used=turn % 2 == 0)
        confidence.learn(2, used=turn % 10 < 7)
    assert confidence.precision(0) == pytest.approx(0.5, abs=0.01)
    assert confidence.precision(2) == pytest.approx(0.7, abs=0.01)
    assert [confidence.trusts(bucket) for bucket in range(3)] == [False, False, True]


def test_runners_up_are_what_no_row_uses_and_the_gate_gave_at_least_the_threshold() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05], [0.01, 0.8, 0.09, 0.1]], np.float32))
    step = LayerStep(0, np.array([[0], [1]], np.int32), logits, logits, lambda *_: {})
    assert RunnersUp(0.1).candidates(step, 2) == pytest.approx({2: 0.15, 3: 0.1}, rel=1e-5)
    assert RunnersUp(0.1).candidates(step, 1) == pytest.approx({2: 0.15}, rel=1e-5)


def test_what_a_table_has_learned_survives_in_its_file(tmp_path: Path) -> None:
    table, file = Transitions(range(LAYERS), EXPERTS), tmp_path / "transitions"
    for token in deterministic(50):
        for layer, experts in enumerate(token):
            table.observe(step_of(layer, experts))
    file.write_bytes(table.content())
    other = Transitions(range(LAYERS), EXPERTS)
    assert other.load(file)
    step = step_of(0, np.array([3, 9]))
    assert np.array_equal(other.scores(step), table.scores(step))
    assert other.scores(step).max() > 0


def test_a_file_of_another_model_or_half_a_file_is_not_taken(tmp_path: Path) -> None:
    table, file = Transitions(range(LAYERS), EXPERTS), tmp_path / "transitions"
    file.write_bytes(table.content())
    assert not Transitions(range(LAYERS), EXPERTS + 1).load(file)
    assert not table.load(tmp_path / "nothing")
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    assert not table.load(file)
    file.write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    assert not table.load(file)


def test_what_a_user_may_ask_for() -> None:
    assert parse_prefetch("off").sources == ()
    assert parse_prefetch("auto").guarded
    settings = parse_prefetch("transitions+gate-ahead-2")
    assert settings.sources == (PrefetchSource.TRANSITIONS, PrefetchSource.GATE_AHEAD_2)
    assert not settings.guarded
    for text in ("displaced", "gate-ahead+", "gate-ahead+gate-ahead", "auto+affinity", "none", ""):
        with pytest.raises(ValueError, match="expected off, auto, or gate-ahead, gate-ahead-2, runners-up"):
            parse_prefetch(text)
