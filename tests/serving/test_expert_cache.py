"""The expert cache in one program: values, residency, what is refused, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instances import processes_of, queue_exists, segment_exists, wait_until
from model_factory import make_model
from shipped_experts import EXPERTS, LAYERS, PARTS, bits

from hotset.runtime import (
    Backend,
    BudgetTooSmall,
    ExpertCache,
    ExpertCacheClosed,
    ExpertCacheError,
    ExpertUnavailable,
    ModelNotFound,
    NotEnoughPins,
    RouterConfig,
    SamplingParams,
    TooManyPins,
)
from hotset.runtime import pager_process as pager_process
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.pack import Packer
from hotset.shm.demands import NO_STREAM, DemandReader, split_records
from hotset.workers.expert_store import read_expert


@pytest.fixture(scope="module")
def cache() -> Iterator[ExpertCache]:
    """A quarter of the experts, and nobody else who uses them; tests begin where others have left it."""
    with ExpertCache(expert_budget="25%", user_pins=2, warm_start=False) as running:
        yield running


def evict_all(cache: ExpertCache) -> None:
    for layer in range(LAYERS):
        assert cache.page_out(layer, range(EXPERTS)) == []
    assert wait_until(lambda: not any(cache.resident(layer).any() for layer in range(LAYERS)))


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


# ---- routing and learning


def test_a_router_prefers_what_the_pager_says_is_in_memory(cache: ExpertCache) -> None:
    evict_all(cache)
    with cache.pinned(1, [20, 21, 22, 23]) as pinned:
        [*pinned.values()]
    router = cache.router(RouterConfig(EXPERTS, 4, policy="bonus", cache_bonus=1.0))
    logits = np.linspace(1, 0, EXPERTS, dtype=np.float32)[np.newaxis]
    experts, _, misses = router.route_batch(logits, 1)
    assert {*experts[0].tolist()} == {20, 21, 22, 23} and not misses
    assert router.route_batch(logits, 1, policy="off").experts[0].tolist() == [0, 1, 2, 3]
    before = router.affinity.activation_count(20, layer=1)
    with cache.pinned(1, experts):  # the router has counted that use
        assert router.affinity.activation_count(20, layer=1) == before
    with pytest.raises(ValueError, match="num_experts is 8, expected 32"):
        cache.router(RouterConfig(8, 2))


def test_use_is_counted_for_the_affinity_where_no_router_does_it() -> None:
    with ExpertCache(expert_budget="25%", warm_start=False) as cache:
        for _ in range(5):
            with cache.pinned(2, [4, 6]):
                pass
        affinity = cache.router(RouterConfig(EXPERTS, 4)).affinity
        assert affinity.activation_counts(layer=2)[[4, 5, 6]].tolist() == [5, 0, 5]
        assert affinity.top_k_by_affinity(2, layer=2) == [4, 6]


def test_eviction_is_told_what_each_stream_wanted() -> None:
    with ExpertCache(expert_budget="25%", processes=2, streams=3, warm_start=False) as cache:
        with ExpertCache.attach(cache.name) as other:
            reader = DemandReader(cache._reader._segment)
            with cache.pinned(0, [1, 2]):
                pass
            with cache.pinned(1, [[1, 2], [2, 3]], wanted=[[7, 8], [8, 9]], streams=[2, 0]):
                pass
            with cache.pinned(2, [[1, 2], [2, 3]], prefill=True):
                pass
            with cache.pinned(3, [[e] for e in (4, 5, 4, 5)]):  # more than there are streams
                pass
            with other.pinned(3, [6]):
                pass
            written = [record.tolist() for records, _ in reader.read() for record in split_records(records.copy())]
        bodies = [(record[1], record[8:]) for record in written]
        assert bodies == [
            (0, [0, 1, 2]),
            (1, [2, 7, 8, 0, 8, 9]),
            (2, [NO_STREAM, 1, 2, 3]),
            (3, [NO_STREAM, 4, 5]),
            (3, [3, 6]),
        ]


def test_eviction_learns_from_what_is_pinned() -> None:
    with ExpertCache(expert_budget="25%", eviction="affinity", read_lanes=1, warm_start=False) as cache:
        for turn in range(120):
            for layer in range(LAYERS):
                experts = [0, 1, 8 + turn % 24]  # two that are wanted always, and one that comes round
                with cache.pinned(layer, experts) as pinned:
                    [*pinned.values()]
            if turn == 60:
                cache.reset_stats()
        hits = cache.stats()
        assert hits.expert_hits >= 2 * LAYERS * 59  # the two never go


def test_the_next_cache_begins_with_what_the_last_one_had() -> None:
    with ExpertCache(expert_budget="25%") as cache:
        for _ in range(3):
            with cache.pinned(2, [11, 12, 13]) as pinned:
                [*pinned.values()]
    with ExpertCache(expert_budget="25%") as cache:
        assert wait_until(lambda: cache.resident(2)[[11, 12, 13]].all())
        assert cache.stats().warm_page_ins == 3 and cache.stats().expert_misses == 0


# ---- what is refused


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda cache: cache.pinned(4, [1]), "layer is 4, expected one of 4 that has experts"),
        (lambda cache: cache.pinned(-1, [1]), "layer is -1, expected"),
        (lambda cache: cache.pinned("0", [1]), "layer is '0', expected an integer"),
        (lambda cache: cache.pinned(0, [32]), "expert id is 32, expected 0 <= id < 32"),
        (lambda cache: cache.pinned(0, np.array([[1, -1]])), "expert id is -1, expected"),
        (lambda cache: cache.pinned(0, [2**40]), f"expert id is {2**40}, expected"),
        (lambda cache: cache.pinned(0, [1.5]), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, "12"), "experts is '12', expected integers"),
        (lambda cache: cache.pinned(0, 1), "experts is 1, expected integers"),
        (lambda cache: cache.pinned(0, [[1], [2, 3]]), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, [True]), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, np.zeros((1, 1, 1), int)), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, [1], wanted=[40]), "expert id is 40, expected"),
        (lambda cache: cache.pinned(0, [1], streams=[16]), "stream is 16, expected 0 <= stream < 16"),
        (lambda cache: cache.pinned(0, [1], streams=[0, 1]), "expected one for each row"),
        (lambda cache: cache.prefetch(0, [32]), "expert id is 32"),
        (lambda cache: cache.resident(9), "layer is 9"),
        (lambda cache: cache.pin_experts(0, [32]), "expert id is 32"),
        (lambda cache: cache.page_out(0, None), "experts is None, expected several integers"),
        (lambda cache: cache.router(cache_bonus=0.1), "expected config=RouterConfig"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(cache: ExpertCache, use: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        use(cache)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expert_budget": "0%"}, "the expert budget is '0%'"),
        ({"expert_budget": "lots"}, "the expert budget is 'lots'"),
        ({"processes": 0}, "processes is 0, expected an integer from 1 to"),
        ({"pins_per_process": 0}, "pins_per_process is 0"),
        ({"streams": 0}, "streams is 0"),
        ({"eviction": "oldest"}, "eviction is 'oldest'"),
        ({"read_mode": "fast"}, "read_mode is 'fast'"),
        ({"workers": 2}, "ExpertCache is given workers=2, expected"),
        ({"name": "a b"}, "the instance name is 'a b'"),
        ({"model": ""}, "model is ''"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ExpertCache(**settings)


def test_a_budget_that_could_deadlock_is_refused_with_what_is_needed() -> None:
    with pytest.raises(BudgetTooSmall, match="processes=4 with 4 experts per token, user_pins=3 and read_lanes=1") as e:
        ExpertCache(expert_budget="10%", processes=4, user_pins=3)
    assert (e.value.slots, e.value.needed) == (12, 20)
    with pytest.raises(BudgetTooSmall, match="processes=1 with pins_per_process=40"):
        ExpertCache(expert_budget="25%", pins_per_process=40)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        ExpertCache(tmp_path / "none")


def test_a_damaged_expert_is_named_and_the_others_can_be_used(tmp_path: Path) -> None:
    Packer(make_model(tmp_path / "model"), tmp_path / "packed", None).run(lambda finished: None)
    location = Checkpoint.open(tmp_path / "packed").expert(1, 3).parts[0]
    with location.file.open("r+b") as file:
        file.seek(location.offset)
        file.write(b"\xff" * 100)
    with ExpertCache(tmp_path / "packed", pins_per_process=3) as cache:
        with cache.pinned(1, [2, 3]) as pinned:
            assert pinned[2]["gate"].shape == (24, 32)
            for _ in range(2):
                with pytest.raises(ExpertUnavailable, match=f"expert 3 of layer 1 .* {location.file} at byte"):
                    pinned[3]
        with pytest.raises(ExpertUnavailable, match=f"expert 3 of layer 1 .* {location.file} at byte"):
            [*cache.in_turn(1, range(8))]
        assert cache.stats().failed_loads >= 1
        with cache.pinned(1, range(3)) as pinned:
            assert len([*pinned.values()]) == 3


# ---- life


def test_nothing_stays_behind_and_nothing_of_the_program_is_touched(capfd: pytest.CaptureFixture[str]) -> None:
    def of_this_process() -> tuple[Any, ...]:
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        files = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        return handlers, {thread.name for thread in threading.enumerate()}, files, os.environ.copy()

    with ExpertCache(expert_budget="25%") as first:  # what is imported once
        first.stats()
    before = of_this_process()
    cache = ExpertCache(expert_budget="25%", processes=2)
    name, stats = cache.name, cache.stats()
    router = cache.router(RouterConfig(EXPERTS, 4))
    with ExpertCache.attach(name) as other, other.pinned(0, [1]) as pinned:
        pinned[1]
    with cache.pinned(0, [1]) as pinned:
        weights = pinned[1]
    assert segment_exists(name) and queue_exists(name)
    cache.close()
    cache.close()
    assert not segment_exists(name) and not queue_exists(name) and processes_of([stats.pager_pid]) == []
    with pytest.raises(ChildProcessError):  # no zombie either
        os.waitpid(stats.pager_pid, os.WNOHANG)
    with pytest.raises(ValueError):
        router.route(np.zeros(EXPERTS, np.float32))
    del weights, pinned, router
    assert of_this_process() == before
    assert name not in Path("/proc/self/maps").read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: cache.pinned(0, [1]).__enter__(),
        lambda cache: cache.prefetch(0, [1]),
        lambda cache: cache.resident(0),
        lambda cache: cache.stats(),
        lambda cache: cache.reset_stats(),
        lambda cache: cache.pin_experts(0, [1]),
        lambda cache: cache.router(RouterConfig(EXPERTS, 4)),
        lambda cache: cache.__enter__(),
    ],
    ids=["pinned", "prefetch", "resident", "stats", "reset_stats", "pin_experts", "router", "with"],
)
def test_a_closed_cache_says_so(use: Any, closed: ExpertCache) -> None:
    with pytest.raises(ExpertCacheClosed, match=f"the expert cache '{closed.name}' is closed"):
        use(closed)


@pytest.fixture(scope="module")
def closed() -> ExpertCache:
    cache = ExpertCache(expert_budget="25%", warm_start=False)
    cache.close()
    return cache


def test_a_block_that_is_open_when_the_cache_is_closed_ends_in_peace() -> None:
    cache = ExpertCache(expert_budget="25%", warm_start=False)
    with cache.pinned(0, [3]) as pinned:
        weights = pinned[3]
        cache.close()
        assert np.array_equal(weights["gate"], bits(0, 3, "gate"))
        with pytest.raises(ExpertCacheClosed):
            cache.pinned(0, [3]).__enter__()
    assert not segment_exists(cache.name)


def test_who_waits_for_an_expert_when_the_cache_is_closed_is_told() -> None:
    cache = ExpertCache(expert_budget="25%", warm_start=False)
    os.kill(cache.stats().pager_pid, signal.SIGSTOP)  # nothing arrives
    said: list[BaseException] = []

    def use() -> None:
        try:
            with cache.pinned(0, [3]) as pinned:
                pinned[3]
        except ExpertCacheClosed as error:
            said.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    assert wait_until(lambda: cache.stats().expert_misses == 1)
    cache.close()
    thread.join(10)
    assert len(said) == 1 and not segment_exists(cache.name)


PROGRAMS = {
    "ends": "pass",
    "raises": "raise SystemExit(3)",
    "forgets": "del cache; import gc; gc.collect(); assert not os.path.exists(path)",
    "is interrupted": "import signal; signal.raise_signal(signal.SIGINT)",
}


@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_that_does_not_close_it_leaves_nothing(how: str) -> None:
    program = (
        "import os; from hotset.runtime import ExpertCache\n"
        "cache = ExpertCache(expert_budget='25%', warm_start=False)\n"
        "path = f'/dev/shm/hotset.{cache.name}'; print(cache.name, cache.stats().pager_pid, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program + PROGRAMS[how]], capture_output=True, text=True, timeout=60
    )
    name, pager = done.stdout.split()
    assert not segment_exists(name) and not queue_exists(name) and not Path(f"/dev/shm/hotset.{name}.lock").exists()
    assert wait_until(lambda: not processes_of([int(pager)]))
    assert done.returncode == {"ends": 0, "raises": 3, "forgets": 0, "is interrupted": -signal.SIGINT}[how]


def test_a_pager_that_cannot_start_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager_process, "PAGER_MODULE", "hotset.workers.nobody")
    with pytest.raises(ExpertCacheError, match=r"the pager cannot start: .* 3 times in a row; .*hotset.workers.nobody"):
        ExpertCache(expert_budget="25%")


def test_a_pager_that_cannot_be_replaced_ends_the_cache_and_all_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        ExpertCache(expert_budget="25%", processes=2, warm_start=False) as cache,
        ExpertCache.attach(cache.name) as other,
    ):
        monkeypatch.setattr(pager_process, "PAGER_MODULE", "hotset.workers.nobody")
        os.kill(cache.stats().pager_pid, signal.SIGKILL)
        for each in (cache, other):
            with (
                each.pinned(0, [1]) as pinned,
                pytest.raises(ExpertCacheClosed, match=r"the pager cannot start: .*hotset.workers.nobody"),
            ):
                pinned[1]
        assert not segment_exists(cache.name)


def test_it_works_beside_a_backend_in_the_same_program() -> None:
    params = SamplingParams(temperature=0, max_tokens=8, routing="off")
    with ExpertCache(expert_budget="25%") as cache, Backend(workers=1, expert_budget="25%") as backend:
        stream = backend.stream("def f(", params)
        for piece in range(8):
            with cache.pinned(1, [piece]) as pinned:
                assert np.array_equal(pinned[piece]["gate"], bits(1, piece, "gate"))
        assert len([*stream]) > 0
        cache.close()
        assert backend.generate("def f(", params).token_ids
