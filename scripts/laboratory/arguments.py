"""Arguments that the laboratory's commands share."""

from __future__ import annotations

import math
from typing import TypeVar

Number = TypeVar("Number", int, float)


def numbers(option: str, text: str, kind: type[Number], least: int) -> list[Number]:
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= number < math.inf for number in found):
        raise ValueError(f"{option} is {text!r}, expected numbers of at least {least} with commas between them")
    return found


def slots_per_layer(budget: float, num_experts: int) -> int:
    slots = num_experts * budget / 100
    if not 1 <= slots < num_experts + 1:
        raise ValueError(
            f"a budget of {budget:g} % of {num_experts} experts is {slots:g} slots, expected 1 to {num_experts}"
        )
    return int(slots)
