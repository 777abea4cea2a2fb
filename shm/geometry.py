"""The numbers of an arena: how many layers, experts, slots and pages of which size. The layout follows from them."""

from __future__ import annotations

import msgspec

PAGE = 4096
CACHE_LINE = 64
MAX_ROW_NBYTES = (1 << 32) - PAGE  # the section table has 32 bits for a stride
MAX_PAGES = (1 << 32) - 1  # block tables have 32 bits for a page, and page 0 is none
MAX_EXPERT_IDS = 1 << 24  # the slot word has 24 bits for the expert


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class SlotClass(msgspec.Struct, frozen=True):
    """`count` expert slots of `nbytes` bytes: an expert goes into a slot of the smallest class that holds it."""

    count: int
    nbytes: int


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers from which every section's size follows. No slots, pages or sequences: those parts are absent.

    Slots are numbered class after class.
    """

    num_layers: int
    num_experts: int  # per layer
    num_processes: int = 1  # rows of counters and pins: one per worker, then the pager, then the coordinator
    pins_per_process: int = 0
    slot_classes: tuple[SlotClass, ...] = ()
    num_pages: int = 0
    page_nbytes: int = 0
    block_size: int = 16  # tokens per page
    kv_groups: int = 1  # of layers with KV pages of their own: block tables of a sequence
    max_sequences: int = 0
    max_model_len: int = 0  # tokens
    demand_words: int = 0  # of each process's ring of recent demands (shm/core/demand_ring.h): a power of two, or 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "num_processes", "block_size", "kv_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in self.__struct_fields__:
            if name != "slot_classes" and getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.demand_words and (self.demand_words < CACHE_LINE or self.demand_words & (self.demand_words - 1)):
            raise ValueError(
                f"demand_words is {self.demand_words}, expected 0 or a power of two of at least {CACHE_LINE}"
            )
        for slots in self.slot_classes:
            if slots.count < 0 or not 0 < slots.nbytes <= MAX_ROW_NBYTES:
                raise ValueError(
                    f"slot_classes has {slots.count} slots of {slots.nbytes} bytes, expected at least 0 slots of "
                    f"1 to {MAX_ROW_NBYTES} bytes"
                )
        if self.num_pages >= MAX_PAGES:
            raise ValueError(f"num_pages is {self.num_pages}, expected fewer than {MAX_PAGES}")
        if self.page_nbytes > MAX_ROW_NBYTES:
            raise ValueError(f"page_nbytes is {self.page_nbytes}, expected at most {MAX_ROW_NBYTES}")
        if self.num_layers * self.num_experts >= MAX_EXPERT_IDS:
            raise ValueError(
                f"{self.num_layers} layers x {self.num_experts} experts are too many: the slot word names "
                f"fewer than {MAX_EXPERT_IDS}"
            )

    @property
    def num_slots(self) -> int:
        return sum(slots.count for slots in self.slot_classes)

    @property
    def slots_nbytes(self) -> int:
        """Of all slots together, each a whole number of pages."""
        return sum(slots.count * round_up(slots.nbytes, PAGE) for slots in self.slot_classes)

    @property
    def classes_of_slots(self) -> list[int]:
        """The index of each slot's class."""
        return [index for index, slots in enumerate(self.slot_classes) for _ in range(slots.count)]

    def class_for(self, nbytes: int) -> int:
        """The index of the class of slots for experts of this size. Raises ValueError if they fit into none."""
        fitting = [(slots.nbytes, index) for index, slots in enumerate(self.slot_classes) if slots.nbytes >= nbytes]
        if not fitting:
            raise ValueError(f"an expert has {nbytes} bytes, the slots {[s.nbytes for s in self.slot_classes]}")
        return min(fitting)[1]

    @property
    def mask_words(self) -> int:
        """u64 words of one layer's mask."""
        return -(-self.num_experts // 64)

    @property
    def max_blocks(self) -> int:
        """Entries of one sequence's block table."""
        return -(-self.max_model_len // self.block_size)
