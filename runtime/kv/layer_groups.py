"""Groups of layers that see equally far back: each has pages of its own, given back behind its own window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import msgspec


class LayerGroups(msgspec.Struct, frozen=True):
    """A page holds the tokens of the layers of one group. All groups have equally many layers, so that all pages are
    of one size and any page serves any group.

    Attributes:
        windows: per group, how many positions a row sees, its own included; 0: all. The first group sees furthest: the
            prefix tree is made of its pages.
        places: per layer its group, and its index among the group's layers.
    """

    windows: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, windows: Sequence[int]) -> Self:
        """Groups the layers by their windows. Windows of unequally many layers make several groups each."""
        layers: dict[int, list[int]] = {}
        for layer, window in enumerate(windows):
            layers.setdefault(window, []).append(layer)
        size = math.gcd(*map(len, layers.values()))
        furthest_first = sorted(layers, key=lambda window: -window or -math.inf)
        places: dict[int, tuple[int, int]] = {}
        groups: list[int] = []
        for window in furthest_first:
            for index, layer in enumerate(layers[window]):
                places[layer] = (len(groups) + index // size, index % size)
            groups += [window] * (len(layers[window]) // size)
        return cls(tuple(groups), tuple(places[layer] for layer in range(len(windows))))

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    @property
    def layers_per_group(self) -> int:
        return len(self.places) // len(self.windows)


def pages_of_sequence(windows: Sequence[int], num_tokens: int, block_size: int, max_step: int | None) -> int:
    """The most pages that one sequence holds at a time while it grows to `num_tokens` tokens.

    Args:
        windows: per group, 0 for none.
        max_step: tokens ahead of the written ones for which groups with a window have pages; None: all.
    """
    blocks = -(-num_tokens // block_size)
    pages = 0
    for window in windows:
        # From the block of the first position seen to that of the last one ahead; the window is moved once in a block.
        held = blocks if not window or max_step is None else (window + max_step) // block_size + 3
        pages += min(blocks, held)
    return pages
