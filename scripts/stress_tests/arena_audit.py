"""What must hold of the arena while no worker is in a step, and the pager has nothing left to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xxhash
from stress_tests.checks import Check, Scoreboard
from stress_tests.synthetic_experts import SyntheticExperts, format_of, nbytes_of_expert

from hotset.shm.layout import Section, SlotState
from hotset.shm.segment import Segment

Report = Callable[[Check, str], None]


class ArenaAudit:
    """Looks at pins, requests, slots, masks and directory.

    Args:
        budget_nbytes: computed from what the user asked for, not from the plan.
        report: is told of each violation.
    """

    def __init__(
        self,
        segment: Segment,
        experts: SyntheticExperts,
        budget_nbytes: int,
        scoreboard: Scoreboard,
        report: Report,
    ) -> None:
        self._arena = segment.arena
        self._geometry = segment.layout.geometry
        self._slots = segment.slots()
        self._info = segment.view(Section.SLOT_INFO)
        self._experts = experts
        self._budget_nbytes = budget_nbytes
        self._scoreboard = scoreboard
        self._report = report

    def _check(self, check: Check, holds: bool, problem: Callable[[], str]) -> None:
        self._scoreboard.checked(check)
        if not holds:
            self._report(check, problem())

    def pins_of(self, process: int) -> list[int]:
        """Ids that the process pins."""
        pins = (self._arena.load_u32(Section.PINS, process, i) for i in range(self._geometry.pins_per_process))
        return [pin - 1 for pin in pins if pin]

    def no_pins(self, process: int, who: str) -> None:
        pins = self.pins_of(process)
        self._check(Check.PINS, not pins, lambda: f"{who} still pins the experts {pins}")

    def budget(self) -> None:
        """At any time."""
        nbytes = 0
        for slot in range(self._geometry.num_slots):
            _, expert, state = self._arena.slot(slot)
            if state in (SlotState.RESIDENT, SlotState.LOADING):
                nbytes += (
                    int(self._info[slot, 0]["nbytes"]) if state == SlotState.RESIDENT else nbytes_of_expert(expert)
                )
        self._check(
            Check.BUDGET,
            nbytes <= self._budget_nbytes,
            lambda: f"{nbytes} bytes of experts are in memory, the budget is {self._budget_nbytes}",
        )

    def drained(self) -> bool:
        """Whether nothing is asked for and nothing being loaded."""
        states = {self._arena.slot(slot)[2] for slot in range(self._geometry.num_slots)}
        return (
            not self._arena.urgent_requests()
            and not self._arena.prefetch_requests()
            and states <= {SlotState.EMPTY, SlotState.RESIDENT}
        )

    def quiet(self, seconds: float) -> None:
        """After a drain of `seconds`: requests, pins, every slot, masks and directory."""
        urgent, prefetch = self._arena.urgent_requests(), self._arena.prefetch_requests()
        self._check(
            Check.REQUESTS,
            self.drained(),
            lambda: (
                f"after {seconds:.1f} s of drain the experts {urgent} (urgent) and {prefetch} (prefetch) are "
                "asked for, or a slot is neither empty nor resident"
            ),
        )
        for process in range(self._geometry.num_processes):
            self.no_pins(process, f"process {process}, which is idle,")
        self.budget()
        resident: dict[int, int] = {}
        for slot in range(self._geometry.num_slots):
            _, expert, state = self._arena.slot(slot)
            if state != SlotState.RESIDENT:
                continue
            self._check(
                Check.BUDGET,
                expert not in resident,
                lambda expert=expert, slot=slot: f"expert {expert} is in the slots {resident[expert]} and {slot}",
            )
            resident[expert] = slot
            self._slot(slot, expert)
        bits = self._arena.resident_experts()
        self._check(
            Check.WHOLE,
            bits == sorted(resident),
            lambda: f"the residency mask and the slots differ in the experts {sorted(set(bits) ^ resident.keys())}",
        )
        ids = range(self._geometry.num_layers * self._geometry.num_experts)
        wrong = [e for e in ids if self._arena.find(e) != resident.get(e, -1)]
        self._check(Check.WHOLE, not wrong, lambda: f"the directory is wrong about the experts {wrong}")

    def _slot(self, slot: int, expert: int) -> None:
        nbytes, weight_format = int(self._info[slot, 0]["nbytes"]), int(self._info[slot, 0]["format"])
        memory = self._slots[slot][: nbytes_of_expert(expert)]
        where = f"slot {slot}, which holds expert {expert},"
        self._check(
            Check.FORMAT,
            (nbytes, weight_format) == (nbytes_of_expert(expert), format_of(expert)),
            lambda: f"{where} has {nbytes} bytes of format {weight_format}",
        )
        expected = self._experts.checksums[expert]
        found, recorded = xxhash.xxh3_64_intdigest(memory), int(self._info[slot, 0]["checksum"])
        self._check(
            Check.SLOT_BYTES,
            found == recorded == expected,
            lambda: f"{where} has checksum {found:#x}, its record says {recorded:#x}, the expert has {expected:#x}",
        )
        self._check(
            Check.WHOLE,
            np.array_equal(memory, self._experts.contents[expert]),
            lambda: f"{where} has other bytes than the expert",
        )
