"""Each worker computes with its share of the cores, and the text does not depend on how many that is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from instances import wait_until

from hotset.runtime import Backend, SamplingParams

CORES = sorted(os.sched_getaffinity(0))
LONG_PROMPT = "def fibonacci(n):\n    a, b = 0, 1\n    while n > 0:\n        a, b, n = b, a + b, n - 1\n" * 6
GREEDY = SamplingParams(temperature=0, max_tokens=16, routing="off", ignore_eos=True)


@pytest.fixture
def affinity() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, CORES)


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_computes_alone_has_all_cores(workers: int) -> None:
    with Backend(workers=workers) as backend:
        backend.generate(LONG_PROMPT, GREEDY)
        assert max(threads_of(pid) for pid in backend.worker_pids) == len(CORES)


def test_workers_that_compute_at_once_share_the_cores() -> None:
    with Backend(workers=2) as backend:
        long = msgspec.structs.replace(GREEDY, max_tokens=400)
        streams = [backend.stream(LONG_PROMPT, long) for _ in range(4)]
        for stream in streams:
            next(stream)
        each = max(1, len(CORES) // 2)
        assert wait_until(lambda: {threads_of(pid) for pid in backend.worker_pids} == {each})
        for stream in streams:
            stream.close()


@pytest.mark.usefixtures("affinity")
@pytest.mark.skipif(len(CORES) < 2, reason="one core is one thread in any case")
def test_a_worker_on_one_core_has_one_thread_and_gives_the_same_text() -> None:
    with Backend(workers=1) as backend:
        expected = backend.generate(LONG_PROMPT, GREEDY).token_ids
    os.sched_setaffinity(0, CORES[:1])
    with Backend(workers=1) as backend:
        assert threads_of(backend.worker_pids[0]) == 1
        assert backend.generate(LONG_PROMPT, GREEDY).token_ids == expected


def test_the_threads_of_an_idle_worker_sleep() -> None:
    with Backend(workers=1) as backend:
        backend.generate(LONG_PROMPT, GREEDY)
        tasks = Path(f"/proc/{backend.worker_pids[0]}/task")
        assert wait_until(lambda: all(" S " in (task / "stat").read_text() for task in tasks.iterdir()))
