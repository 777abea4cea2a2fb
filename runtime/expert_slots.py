"""Into how many expert slots of each size a budget is split.

Experts of one size share the slots of that size: a fixed distance between slots would save no memory where experts are
stored in several formats.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

import msgspec

from hotset.runtime.config import parse_nbytes
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.shm.layout import SlotClass

SLOT_ALIGNMENT = 4096  # bytes; preadv and O_DIRECT want whole pages


class ExpertClass(msgspec.Struct, frozen=True):
    """`count` experts that take a slot of `nbytes` bytes each."""

    count: int
    nbytes: int


def expert_classes(checkpoint: Checkpoint) -> tuple[ExpertClass, ...]:
    """The largest first."""
    pages = (-(-checkpoint.expert(*ids).nbytes // SLOT_ALIGNMENT) for ids in checkpoint.expert_ids)
    sizes = Counter(count * SLOT_ALIGNMENT for count in pages)
    return tuple(ExpertClass(sizes[nbytes], nbytes) for nbytes in sorted(sizes, reverse=True))


def expert_budget_nbytes(budget: str | int, classes: Sequence[ExpertClass]) -> int:
    """Bytes as given, or of a percentage of the experts, of which none is counted in part."""
    if not (isinstance(budget, str) and budget.strip().endswith("%")):
        return parse_nbytes(budget)
    text = budget.strip()[:-1]
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 100:
        raise ValueError(f"the expert budget is {budget!r}, expected a percentage over 0 and up to 100")
    count = _count(classes)
    return int(count * share / 100) * all_nbytes(classes) // count


def all_nbytes(classes: Sequence[ExpertClass]) -> int:
    return sum(experts.count * experts.nbytes for experts in classes)


def least_slots(classes: Sequence[ExpertClass], least: int) -> tuple[SlotClass, ...]:
    """`least` slots of each size, but never more than there are experts for them."""
    return tuple(SlotClass(min(experts.count, least), experts.nbytes) for experts in classes)


def split_slots(nbytes: int, classes: Sequence[ExpertClass], least: int) -> tuple[SlotClass, ...] | None:
    """The same share of the experts of each size, as large as fits into `nbytes`, but at least `least` slots.

    None if not even those fit.
    """
    count = _count(classes)
    lows = [slots.count for slots in least_slots(classes, least)]

    def slots_for(share: int) -> list[int]:
        """For `share` of `count` experts."""
        return [max(low, experts.count * share // count) for low, experts in zip(lows, classes, strict=True)]

    def cost(share: int) -> int:
        return sum(slots * experts.nbytes for slots, experts in zip(slots_for(share), classes, strict=True))

    share = bisect_right(range(count + 1), nbytes, key=cost) - 1
    if share < 0:
        return None
    left = nbytes - cost(share)
    split: list[SlotClass] = []
    for slots, experts in zip(slots_for(share), classes, strict=True):
        more = min(experts.count - slots, left // experts.nbytes)
        left -= more * experts.nbytes
        split.append(SlotClass(slots + more, experts.nbytes))
    return tuple(split)


def _count(classes: Sequence[ExpertClass]) -> int:
    return sum(experts.count for experts in classes)
