"""The end of an expert cache, however it comes: nothing stays behind, and who has it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instances import processes_of, queue_exists, segment_exists, wait_until
from shipped_experts import EXPERTS, bits

from hotset.runtime import (
    Backend,
    ExpertCache,
    ExpertCacheClosed,
    ExpertCacheError,
    RouterConfig,
    SamplingParams,
    pager_process,
)


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
