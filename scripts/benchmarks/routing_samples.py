"""Timed passes, and which of them count on cores that take turns."""

from __future__ import annotations

import time

import msgspec
import numpy as np
from routing_passes import ROWS, Pass

RAN = 0.95  # CPU time of a sample against its wall time


class Sample(msgspec.Struct, array_like=True):
    """Nanoseconds: when it began and ended, and the CPU time in between."""

    began: int
    ended: int
    cpu: int

    @property
    def wall(self) -> int:
        return self.ended - self.began

    @property
    def ran(self) -> bool:
        return self.cpu >= RAN * self.wall


class Result(msgspec.Struct):
    name: str
    experts: int
    top_k: int
    mode: str
    processes: int
    ns_per_token: float
    median_of: int


def take_samples(run: Pass, seconds: float) -> list[Sample]:
    """Of passes within `seconds`, at least three, after one that is not timed."""
    run()
    samples: list[Sample] = []
    stop = time.monotonic_ns() + int(seconds * 1e9)
    while not samples or samples[-1].ended < stop or len(samples) < 3:
        cpu, began = time.process_time_ns(), time.monotonic_ns()
        run()
        ended = time.monotonic_ns()
        samples.append(Sample(began, ended, time.process_time_ns() - cpu))
    return samples


def ran_throughout(sample: Sample, other: list[Sample]) -> bool:
    """Whether `other`'s process was measuring during all of `sample` and was not interrupted meanwhile."""
    touching = [o for o in other if o.began < sample.ended and o.ended > sample.began]
    return (
        bool(touching)
        and all(o.ran for o in touching)
        and touching[0].began <= sample.began
        and touching[-1].ended >= sample.ended
    )


def median(name: str, experts: int, top_k: int, mode: str, rows: list[list[Sample]]) -> Result:
    """Of the samples of all processes that count; of all of them if none does, with `median_of` 0."""
    good: list[int] = []
    for process, samples in enumerate(rows):
        others = rows[:process] + rows[process + 1 :]
        good += [s.wall for s in samples if s.ran and all(ran_throughout(s, other) for other in others)]
    walls = good or [s.wall for samples in rows for s in samples]
    return Result(name, experts, top_k, mode, len(rows), round(float(np.median(walls)) / ROWS, 1), len(good))
