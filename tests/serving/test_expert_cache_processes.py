"""Several processes on one expert cache, any of which is killed: the pager, one that has experts pinned, the maker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from forks import forked
from instances import processes_of, queue_exists, segment_exists, wait_until
from shipped_experts import EXPERTS, LAYERS, PARTS, bits

from hotset.runtime import (
    ExpertCache,
    ExpertCacheClosed,
    ExpertCacheError,
    ExpertCacheFull,
    RouterConfig,
)

QUARTER = {"expert_budget": "25%", "warm_start": False}


def use(cache: ExpertCache, steps: int, seed: int) -> None:
    """Compares every byte of what it pins, while it is pinned."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        layer, experts = int(rng.integers(LAYERS)), rng.choice(EXPERTS, 4, replace=False)
        with cache.pinned(layer, experts) as pinned:
            for expert, weights in pinned.items():
                for part in PARTS:
                    assert np.array_equal(weights[part], bits(layer, expert, part))


@contextmanager
def program(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program; it is killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from hotset.runtime import ExpertCache\n" + text, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLDS = """
import sys, time
cache = ExpertCache.attach(sys.argv[1])
with cache.pinned(0, [1, 2, 3]) as pinned:
    sums = [int(weights.bytes.sum()) for weights in pinned.values()]
    print("holds", flush=True)
    sys.stdin.readline()
    assert sums == [int(pinned[expert].bytes.sum()) for expert in pinned]
    print("held", flush=True)
cache.close()
print("left", flush=True)
sys.stdin.readline()
"""


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


def test_a_stopped_process_keeps_its_pins() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache, program(HOLDS, cache.name) as other:
        assert line_of(other) == "holds"
        other.send_signal(signal.SIGSTOP)
        use(cache, 50, 5)
        assert cache.resident(0)[[1, 2, 3]].all() and cache.stats().pins_reclaimed == 0


def test_a_killed_pager_is_replaced_and_nobody_notices() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache:

        def other() -> None:
            with ExpertCache.attach(cache.name) as attached:
                use(attached, 300, 6)

        with forked(other):
            for kills in range(1, 4):
                os.kill(cache.stats().pager_pid, signal.SIGKILL)
                use(cache, 60, kills)
                assert wait_until(lambda kills=kills: cache.stats().pager_restarts == kills)
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


def said_in_a_fork(action: Callable[[], object]) -> str:
    """What a forked process that does this raises."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(100)
        try:
            action()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


def test_a_fork_has_no_part_in_its_parents_cache_but_may_attach() -> None:
    with ExpertCache(processes=2, **QUARTER) as cache:
        uses: list[Callable[[], object]] = [
            lambda: cache.pinned(0, [1]).__enter__(),
            lambda: cache.prefetch(0, [1]),
            cache.stats,
        ]
        for action in uses:
            said = said_in_a_fork(action)
            assert said.startswith(f"ExpertCacheClosed: this ExpertCache belongs to process {os.getpid()}, and process")
            assert said.endswith(f"it needs ExpertCache.attach('{cache.name}')")
        block = cache.pinned(0, [1, 2])
        with block as pinned:
            [*pinned.values()]
            assert said_in_a_fork(lambda: block.__exit__(None, None, None)) == ""
            assert said_in_a_fork(cache.close) == ""
            assert cache.page_out(0, [1, 2]) == []  # asked for, and not done: they are still pinned
            use(cache, 50, 8)
            assert cache.resident(0)[[1, 2]].all()
        assert said_in_a_fork(lambda: use(ExpertCache.attach(cache.name), 10, 9)) == ""
        assert wait_until(lambda: cache.stats().processes == [os.getpid()])


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
