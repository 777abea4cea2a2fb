"""Medians of the processor time that this thread takes for an operation, garbage collection off."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def medians_ns(operations: Sequence[Callable[[], object]], calls: int, repeats: int = 41) -> list[float]:
    """Nanoseconds of one of `calls` calls of each operation, the loop around it included; medians of the repeats.

    The operations take turns, so that what else the machine does reaches all of them alike.
    """
    samples: list[list[float]] = [[] for _ in operations]
    with quiet():
        for _ in range(repeats):
            for operation, times in zip(operations, samples, strict=True):
                begin = time.thread_time_ns()
                for _ in range(calls):
                    operation()
                times.append((time.thread_time_ns() - begin) / calls)
    return [statistics.median(times) for times in samples]


def median_ns(operation: Callable[[], object], calls: int) -> float:
    return medians_ns([operation], calls)[0]


def medians_of_fresh_ns(makes: Sequence[Callable[[], Callable[[], object]]], repeats: int = 21) -> list[float]:
    """Nanoseconds of operations that need a state of their own each time; they take turns."""
    samples: list[list[float]] = [[] for _ in makes]
    with quiet():
        for _ in range(repeats):
            for make, times in zip(makes, samples, strict=True):
                operation = make()
                begin = time.thread_time_ns()
                operation()
                times.append(time.thread_time_ns() - begin)
    return [statistics.median(times) for times in samples]
