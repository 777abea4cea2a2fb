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
from hotset.runtime.model.pack_manifest import PackManifest
from hotset.shm.geometry import SlotClass

SLOT_ALIGNMENT = 4096  # bytes; preadv and O_DIRECT want whole pages
STEPS = 1 << 12  # of the search for the largest share that fits
LEAST_HEAT = 0.05  # experts that were never used while heat was recorded may be from now on


class ExpertClass(msgspec.Struct, frozen=True):
    """`count` experts that take a slot of `nbytes` bytes each, and how often one of them is used, compared with those
    of the other classes."""

    count: int
    nbytes: int
    heat: float = 1.0


def expert_classes(checkpoint: Checkpoint) -> tuple[ExpertClass, ...]:
    """The largest first. What is known of their use is what a pack's formats were chosen by."""
    manifest = PackManifest.of(checkpoint.folder)
    counts: Counter[int] = Counter()
    activations: Counter[int] = Counter()
    for layer, expert in checkpoint.expert_ids:
        nbytes = -(-checkpoint.expert(layer, expert).nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        counts[nbytes] += 1
        activations[nbytes] += manifest.experts[layer][expert].activations if manifest is not None else 0
    mean = activations.total() / counts.total()
    return tuple(
        ExpertClass(counts[nbytes], nbytes, activations[nbytes] / counts[nbytes] / mean if mean else 1.0)
        for nbytes in sorted(counts, reverse=True)
    )


def expert_budget_nbytes(budget: str | int, classes: Sequence[ExpertClass]) -> int:
    """Bytes as given, or of a percentage of the experts, of which none is counted in part."""
    if not (isinstance(budget, str) and budget.strip().endswith("%")):
        try:
            return parse_nbytes(budget)
        except ValueError:
            raise ValueError(
                f"the expert budget is {budget!r}, expected a share such as '50%', or bytes such as 500000000 or '4GiB'"
            ) from None
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
    """The slots of each size that fit into `nbytes`, at least `least` of each; None if not even those fit.

    A class gets slots for a share of its experts that grows with the square of their heat. Where hits grow with the
    square root of the share, as they do about where slots are few, this reads the fewest bytes: a byte more then saves
    the same in every class. Without heat, every class gets the same share.
    """
    lows = [slots.count for slots in least_slots(classes, least)]
    weights = [max(experts.heat, LEAST_HEAT) ** 2 for experts in classes]

    def slots_for(step: int) -> list[int]:
        """At the last step, for all experts."""
        scale = step / STEPS / min(weights)
        return [
            max(low, int(experts.count * min(1.0, scale * weight)))
            for low, experts, weight in zip(lows, classes, weights, strict=True)
        ]

    def cost(step: int) -> int:
        return sum(slots * experts.nbytes for slots, experts in zip(slots_for(step), classes, strict=True))

    step = bisect_right(range(STEPS + 1), nbytes, key=cost) - 1
    if step < 0:
        return None
    left = nbytes - cost(step)
    split: list[SlotClass] = []
    for slots, experts in zip(slots_for(step), classes, strict=True):
        more = min(experts.count - slots, left // experts.nbytes)
        left -= more * experts.nbytes
        split.append(SlotClass(slots + more, experts.nbytes))
    return tuple(split)


def _count(classes: Sequence[ExpertClass]) -> int:
    return sum(experts.count for experts in classes)
