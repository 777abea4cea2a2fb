"""Experts that a block of code uses: pinned from its beginning to its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from hotset.runtime.experts.reader import Demand, ExpertReader
from hotset.runtime.experts.weights import ExpertWeights


class PinnedExperts(Mapping[int, ExpertWeights]):
    """The weights of each expert, to be used inside of `with`. See `ExpertCache.pinned`.

    The block begins at once, when all that is missing has been asked for. An expert is waited for where it is looked
    up; iterating gives those that are in memory first, and the others as they arrive.

    Attributes:
        missed: experts that were not in memory when the block began.
    """

    def __init__(
        self, reader: ExpertReader, layer: int, experts: tuple[int, ...], demand: Demand, *, prefill: bool
    ) -> None:
        self._reader = reader
        self._layer = layer
        self._experts = experts
        self._demand = demand
        self._prefill = prefill
        self._pins: dict[int, int] | None = None
        self._slots: dict[int, int] = {}  # of those that have arrived
        self.missed: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        if self._pins is not None:
            raise ValueError("these experts are pinned already, expected another call of pinned() for each block")
        self._pins, found = self._reader.begin(self._layer, self._experts, self._demand, prefill=self._prefill)
        self._slots = dict(found)
        self.missed = tuple(expert for expert in self._experts if expert not in self._slots)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pins is not None:
            pins, self._pins = self._pins, None
            self._reader.end(pins.values())

    def __getitem__(self, expert: int) -> ExpertWeights:
        """Waits for it. Raises `ExpertUnavailable` if it cannot be loaded, `ExpertCacheClosed` if nobody loads it any
        more."""
        self._check_pinned()
        if expert not in self._experts:
            raise KeyError(expert)
        if expert not in self._slots:
            self._slots.update(self._reader.wait(self._layer, [expert]))
        return self._reader.weights(self._slots[expert], self._layer, expert)

    def __iter__(self) -> Iterator[int]:
        given: set[int] = set()
        while len(given) < len(self._experts):
            self._check_pinned()
            ready = [expert for expert in self._slots if expert not in given]
            if not ready:
                waiting = [expert for expert in self._experts if expert not in self._slots]
                self._slots.update(self._reader.wait(self._layer, waiting))
            given.update(ready)
            yield from ready

    def __contains__(self, expert: object) -> bool:
        return expert in self._experts

    def __len__(self) -> int:
        return len(self._experts)

    def _check_pinned(self) -> None:
        if self._pins is None:
            raise ValueError(f"experts of layer {self._layer} are used outside of their block, where they are pinned")
