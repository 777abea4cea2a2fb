"""Whoever is killed: the pager of an expert cache, a process that has experts pinned, or the one that made it."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from expert_cache_programs import HOLDS, QUARTER, line_of, program, use
from forks import forked
from instances import processes_of, queue_exists, segment_exists, wait_until
from shipped_experts import EXPERTS, LAYERS

from hotset.runtime import (
    ExpertCache,
    ExpertCacheClosed,
    ExpertCacheError,
)


def test_the_pins_of_a_killed_process_come_free_and_its_row_too() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache:
        for turn in range(1, 4):
            with program(HOLDS, cache.name) as other:
                assert line_of(other) == "holds"
                cache.page_out(0, [1, 2, 3])
                other.kill()
                assert wait_until(lambda turn=turn: cache.stats().pins_reclaimed == 3 * turn)
            assert cache.stats().processes == [os.getpid()]
            cache.page_out(0, [1, 2, 3])
            assert wait_until(lambda: not cache.resident(0)[[1, 2, 3]].any())
        use(cache, 20, 4)


def test_a_killed_pager_is_replaced_and_nobody_notices() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache:

        def other() -> None:
            with ExpertCache.attach(cache.name) as attached:
                use(attached, 300, 6)

        with forked(other):
            for kills in range(1, 4):
                os.kill(cache.stats().pager_pid, signal.SIGKILL)
                use(cache, 60, kills)
                assert wait_until(lambda kills=kills: cache.stats().pager_restarts >= kills)
                assert cache.stats().pager_restarts == kills
        use(cache, 20, 7)


OWNER = """
import os, sys, time
cache = ExpertCache(expert_budget="25%", processes=3, warm_start=False)
fork = 0
if len(sys.argv) > 1 and not (fork := os.fork()):  # which has all sockets that its parent had
    time.sleep(100)
    os._exit(0)
print(cache.name, cache.stats().pager_pid, fork, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("arguments", [(), ("forks",)], ids=["alone", "with a fork"])
def test_a_killed_maker_takes_the_pager_with_it_and_the_others_are_told(arguments: tuple[str, ...]) -> None:
    with program(OWNER, *arguments) as owner:
        name, pager, fork = line_of(owner).split()
        cache = ExpertCache.attach(name)
        with cache.pinned(0, [1, 2]) as pinned:
            sums = [int(weights.bytes.sum()) for weights in pinned.values()]
            owner.kill()
            assert wait_until(lambda: not processes_of([int(pager)]))
            assert [int(weights.bytes.sum()) for weights in pinned.values()] == sums
            began = time.monotonic()
            dead = f"the process that owns the expert cache '{name}' is dead"
            with cache.pinned(3, [30]) as missing, pytest.raises(ExpertCacheClosed, match=dead):
                missing[30]
            assert time.monotonic() - began < 10  # it does not wait for ever
        for call in (cache.stats, lambda: cache.pinned(0, [1]).__enter__()):
            with pytest.raises(ExpertCacheClosed, match="is dead"):
                call()
        cache.close()
        owner.wait()
        if arguments:  # as long as it lives, it has the lock too
            os.kill(int(fork), signal.SIGKILL)
            assert wait_until(lambda: not processes_of([int(fork)]))
        with pytest.raises(ExpertCacheError, match=f"there is no expert cache '{name}'"):
            ExpertCache.attach(name)
        with ExpertCache(**QUARTER):  # the janitor
            assert not segment_exists(name) and not queue_exists(name)


def test_a_closed_cache_is_an_error_to_those_who_still_have_it() -> None:
    with program(OWNER) as owner:
        cache = ExpertCache.attach(line_of(owner).split()[0])
        with cache.pinned(0, [1]) as pinned:
            assert pinned[1].format == "bfloat16"
            assert owner.communicate("\n", timeout=30)[0] == ""
            with pytest.raises(ExpertCacheClosed, match="has closed it"), cache.pinned(2, [9]) as missing:
                missing[9]
            assert pinned[1]["gate"].shape == (64, 128)
        with pytest.raises(ExpertCacheClosed, match="has closed it"):
            cache.stats()
        cache.close()


SOAK = """
import sys
import numpy as np
with ExpertCache.attach(sys.argv[1]) as cache:
    rng = np.random.default_rng(int(sys.argv[2]))
    print("on", flush=True)
    while True:
        with cache.pinned(int(rng.integers(4)), rng.choice(32, 4, replace=False)) as pinned:
            for weights in pinned.values():
                weights.bytes.sum()
"""


def test_kills_under_load_leave_everything_right() -> None:
    rng = np.random.default_rng(10)
    with ExpertCache(processes=3, **QUARTER) as cache:
        for turn in range(8):
            with program(SOAK, cache.name, str(turn)) as one, program(SOAK, cache.name, str(100 + turn)) as two:
                assert (line_of(one), line_of(two)) == ("on", "on")
                use(cache, 20, turn)
                time.sleep(float(rng.random()) / 50)
                victims = [one.pid, two.pid, cache.stats().pager_pid]
                for victim in rng.permutation(victims)[:2].tolist():
                    os.kill(victim, signal.SIGKILL)
                use(cache, 20, 50 + turn)
            assert wait_until(lambda: cache.stats().processes == [os.getpid()])
        for layer in range(LAYERS):
            cache.page_out(layer, range(EXPERTS))
        # Nothing is pinned by anybody any more.
        assert wait_until(lambda: cache.stats().resident_experts == 0)
        use(cache, 50, 99)
