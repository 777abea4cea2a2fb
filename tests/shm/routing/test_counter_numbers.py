"""shm/core/counters.h and shm/counters.py number the counters alike."""

from __future__ import annotations

import re
from pathlib import Path

from hotset.shm.counters import Counter, Histogram, PrefetchCount, prefetch_counter
from hotset.shm.layout import COUNTERS_PER_PROCESS, PrefetchSource

CORE = Path(__file__).parents[3] / "shm" / "core"


def test_counters() -> None:
    numbers = dict(re.findall(r"COUNTER_(\w+) = (\d+)", (CORE / "counters.h").read_text()))
    assert len(numbers) > 5
    assert {name: int(number) for name, number in numbers.items()} == {name: Counter[name].value for name in numbers}
    assert max(Counter) < COUNTERS_PER_PROCESS


def test_counters_of_prefetch_sources_share_no_number_with_others() -> None:
    numbers = [prefetch_counter(source, count) for source in PrefetchSource for count in PrefetchCount]
    assert len({*numbers, *Counter}) == len(numbers) + len(Counter)
    assert max(numbers) < COUNTERS_PER_PROCESS


def test_histograms() -> None:
    numbers = dict(re.findall(r"HISTOGRAM_(\w+) = (\d+)", (CORE / "histogram.h").read_text()))
    numbers.pop("COUNT")
    assert {name: int(number) for name, number in numbers.items()} == {h.name: h.value for h in Histogram}
