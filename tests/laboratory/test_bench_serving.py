"""What `bench serving` says about runs that took turns."""

from __future__ import annotations

from typing import Any

from serving import compared


def row(prefetch: str, tokens_per_second: float, memory: str = "25% of experts") -> dict[str, Any]:
    return {"routing": "off", "memory": memory, "prefetch": prefetch, "tokens_per_second": tokens_per_second}


def test_runs_that_took_turns_are_compared_round_by_round() -> None:
    rounds = [(10.0, 11.0), (20.0, 18.0), (16.0, 16.0)]
    found = [row(prefetch, rate) for pair in rounds for prefetch, rate in zip(("off", "auto"), pair, strict=True)]
    assert compared(found) == [
        "off, 25% of experts: prefetch auto / off 1.000 in the middle of 3 (0.900 to 1.100); "
        "medians 16.0 and 16.0 tokens/s"
    ]


def test_rows_of_one_prefetch_are_compared_with_nothing() -> None:
    assert compared([row("off", 10.0), row("off", 12.0, "2GiB in all")]) == []
