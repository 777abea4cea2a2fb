"""Arguments that the laboratory's commands share."""

from __future__ import annotations

from typing import TypeVar

Number = TypeVar("Number", int, float)


def numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected numbers with commas between them") from None


def slots_per_layer(budget: float, num_experts: int) -> int:
    slots = int(num_experts * budget / 100)
    if not 1 <= slots <= num_experts:
        raise ValueError(
            f"a budget of {budget:g} % of {num_experts} experts is {slots} slots, expected 1 to {num_experts}"
        )
    return slots
