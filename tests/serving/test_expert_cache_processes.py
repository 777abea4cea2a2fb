"""Several processes on one expert cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
from expert_cache_programs import HOLDS, QUARTER, line_of, program, use
from forks import forked, raised_in_a_fork
from instances import wait_until
from shipped_experts import EXPERTS

from hotset.runtime import (
    ExpertCache,
    ExpertCacheError,
    ExpertCacheFull,
    RouterConfig,
)


def test_processes_share_one_cache_and_read_the_right_bytes() -> None:
    with ExpertCache(processes=3, **QUARTER) as cache:

        def other(seed: int) -> Callable[[], None]:
            def run() -> None:
                with ExpertCache.attach(cache.name) as attached:
                    use(attached, 200, seed)

            return run

        with forked(other(1), other(2)):
            use(cache, 200, 0)
        stats = cache.stats()
        assert stats.expert_hits + stats.expert_misses == 3 * 200 * 4
        assert stats.resident_experts <= stats.slots == 32 and stats.pins_reclaimed == 0
        assert stats.processes == [os.getpid()]


def test_what_another_process_has_pinned_stays_and_comes_free_when_it_leaves() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache, program(HOLDS, cache.name) as other:
        assert line_of(other) == "holds"
        assert cache.stats().processes == [os.getpid(), other.pid]
        use(cache, 100, 3)
        assert cache.resident(0)[[1, 2, 3]].all()
        with pytest.raises(ExpertCacheError, match="is used by 2 processes already"):
            ExpertCache.attach(cache.name)
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        assert (line_of(other), line_of(other)) == ("held", "left")
        assert wait_until(lambda: cache.stats().processes == [os.getpid()])
        cache.page_out(0, [1, 2, 3])
        assert wait_until(lambda: not cache.resident(0)[[1, 2, 3]].any())
        assert cache.stats().pins_reclaimed == 0


def test_a_stopped_process_keeps_its_pins() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache, program(HOLDS, cache.name) as other:
        assert line_of(other) == "holds"
        other.send_signal(signal.SIGSTOP)
        use(cache, 50, 5)
        assert cache.resident(0)[[1, 2, 3]].all() and cache.stats().pins_reclaimed == 0


def test_there_are_as_many_as_it_was_made_for() -> None:
    with ExpertCache(**QUARTER) as cache:
        with pytest.raises(ExpertCacheFull) as refused:
            ExpertCache.attach(cache.name)
        assert refused.value.processes == 1 and "larger processes=" in str(refused.value)
    with pytest.raises(ExpertCacheError, match=f"there is no expert cache '{cache.name}'"):
        ExpertCache.attach(cache.name)
    with pytest.raises(ValueError, match="the instance name is 'no name'"):
        ExpertCache.attach("no name")


def test_two_of_one_name_cannot_be() -> None:
    with ExpertCache(name="mine", **QUARTER), pytest.raises(Exception, match="an instance named 'mine' is running"):
        ExpertCache(name="mine", **QUARTER)


def test_routers_of_all_processes_share_mask_and_affinity() -> None:
    config = RouterConfig(EXPERTS, 4, policy="bonus", cache_bonus=1.0)
    logits = np.linspace(1, 0, EXPERTS, dtype=np.float32)
    with ExpertCache(processes=2, **QUARTER) as cache:
        router = cache.router(config)

        def other() -> None:
            with ExpertCache.attach(cache.name) as attached:
                with attached.pinned(1, [20, 21, 22, 23]) as pinned:
                    [*pinned.values()]
                attached.router(config).route(logits, 1)

        with forked(other):
            pass
        assert {*router.route(logits, 1).experts.tolist()} == {20, 21, 22, 23}
        assert router.affinity.activation_counts(layer=1)[[19, 20, 23]].tolist() == [0, 3, 3]


def test_a_fork_has_no_part_in_its_parents_cache_but_may_attach() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache:
        uses: list[Callable[[], object]] = [
            lambda: cache.pinned(0, [1]).__enter__(),
            lambda: cache.prefetch(0, [1]),
            cache.stats,
        ]
        for action in uses:
            said = raised_in_a_fork(action)
            assert said.startswith(f"ExpertCacheClosed: this ExpertCache belongs to process {os.getpid()}, and process")
            assert said.endswith(f"it needs ExpertCache.attach('{cache.name}')")
        block = cache.pinned(0, [1, 2])
        with block as pinned:
            [*pinned.values()]
            assert raised_in_a_fork(lambda: block.__exit__(None, None, None)) == ""
            assert raised_in_a_fork(cache.close) == ""
            assert cache.page_out(0, [1, 2]) == []  # asked for, and not done: they are still pinned
            use(cache, 50, 8)
            assert cache.resident(0)[[1, 2]].all()
        assert raised_in_a_fork(lambda: use(ExpertCache.attach(cache.name), 10, 9)) == ""
        assert wait_until(lambda: cache.stats().processes == [os.getpid()])
