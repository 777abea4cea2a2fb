"""shm/core/counters.h and shm/counters.py number the counters alike."""

from __future__ import annotations

import re
from pathlib import Path

from hotset.shm.counters import Counter, Histogram
from hotset.shm.layout import COUNTERS_PER_PROCESS

CORE = Path(__file__).parents[3] / "shm" / "core"


def test_counters() -> None:
    numbers = dict(re.findall(r"COUNTER_(\w+) = (\d+)", (CORE / "counters.h").read_text()))
    assert len(numbers) > 5
    assert {name: int(number) for name, number in numbers.items()} == {name: Counter[name].value for name in numbers}
    assert max(Counter) < COUNTERS_PER_PROCESS


def test_histograms() -> None:
    numbers = dict(re.findall(r"HISTOGRAM_(\w+) = (\d+)", (CORE / "histogram.h").read_text()))
    numbers.pop("COUNT")
    assert {name: int(number) for name, number in numbers.items()} == {h.name: h.value for h in Histogram}
