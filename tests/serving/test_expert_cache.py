"""The expert cache in one program: values, what is in memory, and what is counted."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from instances import wait_until
from model_factory import make_model
from shipped_experts import EXPERTS, LAYERS, PARTS, bits, evict_all

from hotset.runtime import (
    ExpertCache,
    NotEnoughPins,
    TooManyPins,
)
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.pack import Packer
from hotset.workers.expert_store import read_expert


def test_every_expert_has_the_values_of_the_checkpoint_with_a_quarter_of_them_in_memory(cache: ExpertCache) -> None:
    for _ in range(2):
        for layer in range(LAYERS):
            for experts in np.arange(EXPERTS).reshape(-1, 4):
                with cache.pinned(layer, experts) as pinned:
                    assert len(pinned) == 4
                    for expert, weights in pinned.items():
                        for part in PARTS:
                            stored = bits(layer, expert, part)
                            assert np.array_equal(weights[part], stored)
                            values = (stored.astype(np.uint32) << 16).view(np.float32)
                            assert np.array_equal(weights.float32(part), values)
    stats = cache.stats()
    assert stats.resident_experts <= stats.slots == LAYERS * EXPERTS // 4 and stats.evictions > 0


@pytest.mark.parametrize("format", ["q8_0", "q4_0", None])
def test_packed_experts_come_as_the_bytes_that_were_packed(tmp_path: Path, format: str | None) -> None:
    options = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 16}
    Packer(make_model(tmp_path / "model", **options), tmp_path / "packed", format).run(lambda finished: None)
    checkpoint = Checkpoint.open(tmp_path / "packed")
    with ExpertCache(tmp_path / "packed", expert_budget="40%") as cache:
        for layer, expert in checkpoint.expert_ids:
            with cache.pinned(layer, [expert]) as pinned:
                assert pinned[expert].format == (format or "bfloat16")
                assert np.array_equal(pinned[expert].bytes, read_expert(checkpoint, layer, expert))


def test_weights_cannot_be_written(cache: ExpertCache) -> None:
    with cache.pinned(0, [1]) as pinned:
        for array in (pinned[1]["gate"], pinned[1].bytes):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True


def test_what_is_missing_is_requested_at_once_and_given_after_what_is_there(cache: ExpertCache) -> None:
    evict_all(cache)
    with cache.pinned(1, [5, 9]) as pinned:
        assert {*pinned} == {5, 9}
    with cache.pinned(1, [3, 9, 4, 5]) as pinned:
        assert pinned.missed == (3, 4) and 3 in pinned and 6 not in pinned
        # Nobody has waited for them, and they come.
        assert wait_until(lambda: cache.resident(1)[[3, 4]].all())
        assert [*pinned][:2] == [9, 5] and {*pinned} == {3, 9, 4, 5}
        with pytest.raises(KeyError):
            pinned[6]
    assert sorted(np.flatnonzero(cache.resident(1))) == [3, 4, 5, 9]


def test_hits_misses_and_reads_are_counted(cache: ExpertCache) -> None:
    evict_all(cache)
    cache.reset_stats()
    for experts in ([1, 2], [2, 3], [2, 2]):
        with cache.pinned(0, experts) as pinned:
            pinned.values()
            {expert: weights["gate"][0, 0] for expert, weights in pinned.items()}
    with cache.pinned(0, [[1, 2], [3, 4]], prefill=True) as pinned:
        [*pinned.values()]
    stats = cache.stats()
    assert (stats.expert_hits, stats.expert_misses, stats.urgent_page_ins) == (2, 3, 4)
    assert (stats.prefill_expert_hits, stats.prefill_expert_misses) == (3, 1)
    assert stats.hit_rate == 0.4 and stats.bytes_read == 4 * 49152 and stats.expert_wait_seconds > 0
    assert stats.tiers[0].experts == 4 and stats.paging.count == 4


def test_what_is_prefetched_is_there_when_it_is_pinned(cache: ExpertCache) -> None:
    evict_all(cache)
    cache.reset_stats()
    assert wait_until(lambda: cache.prefetch(2, [7, 8]) or cache.resident(2)[[7, 8]].all(), pause=0.2)
    with cache.pinned(2, [7, 8]) as pinned:
        assert pinned.missed == ()
    assert cache.stats().prefetch_hits == 2


def test_experts_that_the_user_pins_stay_whatever_else_is_used(cache: ExpertCache) -> None:
    evict_all(cache)
    cache.pin_experts(3, [30, 31])
    with pytest.raises(TooManyPins):
        cache.pin_experts(3, [1])
    assert cache.page_out(3, [29, 30]) == [30]
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            with cache.pinned(layer, [expert]) as pinned:
                pinned[expert]
    assert cache.resident(3)[[30, 31]].all() and cache.stats().pinned_experts == [(3, 30), (3, 31)]
    cache.unpin_experts(3, [30, 31])
    assert cache.stats().pinned_experts == []


def test_a_block_holds_what_it_pinned_while_others_are_loaded(cache: ExpertCache) -> None:
    with cache.pinned(0, [0, 1, 2]) as held:
        arrays = {expert: weights["down"] for expert, weights in held.items()}
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                with cache.pinned(layer, [expert]) as pinned:
                    pinned[expert]
        for expert, array in arrays.items():
            assert np.array_equal(array, bits(0, expert, "down"))
    with pytest.raises(ValueError, match="used outside of their block"):
        held[0]
    with pytest.raises(ValueError, match="used outside of their block"):
        list(held)


def test_blocks_share_the_pins_of_the_process(cache: ExpertCache) -> None:
    pins = cache.pins_per_process
    with cache.pinned(0, range(pins - 1)), cache.pinned(0, [0]) as inner:
        inner[0]
        with pytest.raises(NotEnoughPins, match=f"1 experts are to be pinned, but 0 of the {pins} pins"):
            cache.pinned(1, [5]).__enter__()
    with pytest.raises(NotEnoughPins, match="pin fewer at a time"):
        cache.pinned(0, range(pins + 1)).__enter__()
    with cache.pinned(2, range(pins)) as pinned:
        assert len([*pinned.values()]) == pins


def test_more_experts_than_pins_come_one_after_the_other(cache: ExpertCache) -> None:
    evict_all(cache)
    with cache.pinned(1, [7, 9]) as pinned:
        [*pinned.values()]
    cache.reset_stats()
    given = []
    for expert, weights in cache.in_turn(1, np.arange(24).reshape(6, 4)):
        assert np.array_equal(weights["gate"], bits(1, expert, "gate"))
        given.append(expert)
    assert sorted(given) == [*range(24)] and given.index(7) < cache.pins_per_process > given.index(9)
    assert (cache.stats().expert_hits, cache.stats().expert_misses) == (2, 22)
    pins = cache.pins_per_process
    for _ in cache.in_turn(2, range(EXPERTS)):
        break  # whoever stops early gives the pins back
    with cache.pinned(2, range(pins)), pytest.raises(NotEnoughPins):
        next(cache.in_turn(2, [1]))
    assert [*cache.in_turn(2, [])] == []


def test_threads_use_it_at_once() -> None:
    failures: list[BaseException] = []

    def use(cache: ExpertCache, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(150):
                layer, experts = int(rng.integers(LAYERS)), rng.choice(EXPERTS, 3, replace=False)
                with cache.pinned(layer, experts, streams=[seed]) as pinned:
                    for expert, weights in pinned.items():
                        assert np.array_equal(weights["up"], bits(layer, expert, "up"))
        except BaseException as error:
            failures.append(error)

    with ExpertCache(expert_budget="25%", pins_per_process=12, warm_start=False) as cache:
        threads = [threading.Thread(target=use, args=(cache, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        with cache.pinned(0, range(12)) as pinned:  # none was lost
            assert len(pinned) == 12
