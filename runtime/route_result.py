"""What a router gives: experts, weights, and what of them is not in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.paging_request import PagingRequest

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


class RouteResult(msgspec.Struct, frozen=True):
    """One token's routing.

    Attributes:
        experts: int32 [top_k], best first.
        weights: float32 [top_k], from the unmodified logits.
        requests: urgent page-ins of selected experts that are not resident, in the order of `experts`, then
            prefetches of others whose gate probability is >= `prefetch_threshold`.
    """

    experts: Int32
    weights: Float32
    requests: list[PagingRequest]


class BatchRouteResult(msgspec.Struct, frozen=True):
    """A batch's routing; unpacks into experts, weights and misses.

    Attributes:
        experts: int32 [tokens, top_k], each row best first.
        weights: float32 [tokens, top_k], from the unmodified logits.
        misses: selected experts that are not resident.
        displaced: experts in the true top-k of a row that were not selected there, and are not in memory.
        prefetches: see `RouterConfig.prefetch_threshold`; empty unless asked for.
        lost_mass: gate probability given up for residency, summed over the tokens.
        changed: how many selections are not in their row's true top-k.
    """

    experts: Int32
    weights: Float32
    misses: frozenset[int]
    displaced: frozenset[int]
    prefetches: frozenset[int]
    lost_mass: float
    changed: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.experts, self.weights, self.misses))

    @property
    def changed_share(self) -> float:
        """Of all selections, 0 to 1."""
        return self.changed / self.experts.size if self.experts.size else 0.0
