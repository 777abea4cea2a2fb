"""What a user may ask for as eviction policy, as text: "affinity", "td", "lru+affinity:0.3@bypass" ..."""

from __future__ import annotations

import re
from typing import Literal, cast, get_args

import msgspec

EvictionBase = Literal["lru", "lfu", "adaptive", "affinity", "td"]
Admission = Literal["auto", "always", "bypass"]

EVICTION_SYNTAX = (
    f"one of {', '.join(get_args(EvictionBase))}; lru, lfu or adaptive blended with affinity as "
    "'lru+affinity:0.5'; and, if wanted, how a missed expert is admitted: '@always' or '@bypass'"
)


class EvictionSettings(msgspec.Struct, frozen=True):
    """An eviction policy.

    Attributes:
        base: "lru", "lfu", "adaptive" (LFU while the most used expert of a layer has 3 times the uses of the least,
            else LRU), "affinity" (a moving average of use), "td" (learns how soon an expert is used again).
        affinity_weight: of a blend `(1 - weight) * base + weight * affinity`.
        admission: whether a missed expert always stays ("always"), or goes at once when it is worth less than all
            that are resident ("bypass"); "auto" decides by how crowded the slots are.
    """

    base: EvictionBase = "affinity"
    affinity_weight: float = 0.0
    admission: Admission = "auto"


def parse_eviction(text: str) -> EvictionSettings:
    """Raises `ValueError` naming the text and what is expected."""
    match = re.fullmatch(r"([a-z]+)(?:\+affinity(?::([0-9.]+))?)?(?:@([a-z]+))?", text)
    if match is None or match[1] not in get_args(EvictionBase):
        raise ValueError(f"eviction is {text!r}, expected {EVICTION_SYNTAX}")
    base, admission = cast("EvictionBase", match[1]), match[3] or "auto"
    weight = 0.0
    if "+affinity" in text:
        try:
            weight = float(match[2] or 0.5)
        except ValueError:
            weight = -1.0
        if base in ("affinity", "td") or not 0 < weight < 1:
            raise ValueError(f"eviction is {text!r}, expected lru, lfu or adaptive, and a weight between 0 and 1")
    if admission not in get_args(Admission):
        raise ValueError(f"eviction is {text!r}, expected {EVICTION_SYNTAX}")
    return EvictionSettings(base, weight, cast("Admission", admission))


def eviction_nbytes(policy: str, *, num_layers: int, num_experts: int, num_streams: int) -> int:
    """Memory that the pager needs for a policy beyond a few numbers per expert: td's weights, 16 bits for each pair of
    experts in six sets, or 8 where experts are many, three times while they are saved; and what it knows of each
    stream. See core/td.h of workers/eviction.
    """
    if parse_eviction(policy).base != "td":
        return 0
    weight_nbytes = 2 if num_experts <= 64 else 1
    vector = 64 // weight_nbytes
    row = -(-num_experts // vector) * vector
    weights = num_layers * num_experts * row * 6 * weight_nbytes
    return 3 * weights + num_streams * num_layers * (5 * 4 * row + 400)


def check_pool(policy: str, *, slots: int, cycle: int) -> None:
    """A shared pool that LRU keeps, smaller than what one token uses in all layers, never hits: refuse it."""
    settings = parse_eviction(policy)
    if settings.base == "lru" and not settings.affinity_weight and slots < cycle:
        raise ValueError(
            f"eviction is {policy!r} with {slots} expert slots, expected at least {cycle}: one token uses that many, "
            "so least-recently-used would have evicted each expert just before it is used again"
        )
