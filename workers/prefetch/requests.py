"""The pager's side of prefetching: which requests are waiting, and for how long they are worth anything."""

from __future__ import annotations

from collections.abc import Iterable, Set

from hotset.shm import _core
from hotset.shm.layout import PrefetchSource, Section

NOBODY: Set[int] = frozenset()


class PrefetchRequests:
    """A request is for the layer's next step. When the layer has been routed, as its epoch tells, it is stale; with
    several workers, when it has been routed as often as there are workers, since it may have been by the others.

    Args:
        arena: of the instance.
        num_experts: per layer.
        num_workers: that route.
    """

    def __init__(self, arena: _core.Arena, num_experts: int, num_workers: int) -> None:
        self._arena = arena
        self._num_experts = num_experts
        self._num_workers = num_workers
        self._waiting: dict[int, tuple[int, PrefetchSource]] = {}  # with the layer's epoch at arrival
        self._begun: dict[int, int] = {}  # those that were begun, likewise

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def note(self, experts: Iterable[int], source: PrefetchSource) -> None:
        """A message has come, from who set their bits: what is known of an earlier request is out of date."""
        for expert in experts:
            self._waiting.pop(expert, None)
            self._waiting[expert] = self._epoch(expert), source

    def repair(self, experts: Iterable[int]) -> None:
        """Bits are set, whoever set them: those that no message told of are requests too."""
        for expert in experts:
            self._waiting.setdefault(expert, (self._epoch(expert), PrefetchSource.NONE))

    def take(self) -> tuple[int, PrefetchSource, int | None]:
        """The latest request: expert, source, and the layer's epoch at arrival, or None if it is stale."""
        expert, (epoch, source) = self._waiting.popitem()
        return expert, source, epoch if self._is_to_come(expert, epoch) else None

    def take_stale(self) -> list[int]:
        """Those that came too late while the disk was busy. Their bits have to go: as long as they are set, nobody asks
        for these experts again."""
        stale = [expert for expert, (epoch, _) in self._waiting.items() if not self._is_to_come(expert, epoch)]
        for expert in stale:
            del self._waiting[expert]
        return stale

    def begin(self, expert: int, epoch: int) -> None:
        """It is being read, and `awaited` from now on."""
        self._begun[expert] = epoch

    def awaited(self) -> Set[int]:
        """Experts that were prefetched for a step that is still to come: what was done for them would be lost."""
        if not self._begun:
            return NOBODY
        self._begun = {expert: epoch for expert, epoch in self._begun.items() if self._is_to_come(expert, epoch)}
        return {*self._begun}

    def _is_to_come(self, expert: int, epoch: int) -> bool:
        return self._epoch(expert) - epoch < self._num_workers

    def _epoch(self, expert: int) -> int:
        return self._arena.load_u64(Section.LAYERS, expert // self._num_experts, 0)
