"""What follows from a `BackendConfig` for one model: how many slots and pages, and where the memory goes."""

from __future__ import annotations

import mmap

import msgspec

from hotset.runtime.config import BackendConfig, format_nbytes, parse_nbytes
from hotset.runtime.errors import MemoryTooSmall
from hotset.runtime.eviction import check_pool, eviction_nbytes
from hotset.runtime.expert_slots import expert_classes, least_slots, split_slots
from hotset.runtime.kv.layer_groups import pages_of_sequence
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.routing_preference import RoutingPreference, routing_preference
from hotset.runtime.slot_needs import SlotNeeds
from hotset.shm.geometry import MAX_PAGES, Geometry, SlotClass
from hotset.shm.kv_page_format import KvFormat
from hotset.shm.layout import Layout

DEFAULT_EXPERT_BUDGET = "50%"
MAX_DEFAULT_KV_NBYTES = 2**30
DEMAND_WORDS = 1 << 16  # of a process: 18 steps of 16 sequences through 24 layers
PROCESS_NBYTES = 32 << 20  # interpreter, numpy and this package: 20 to 28 MiB of PSS in each process were measured
PAGE_TABLE_ENTRY_NBYTES = 8


class MemorySplit(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of an instance go; they add up to at most `memory`, where that is given.

    `processes` is what coordinator, pager, workers and the client's part use for themselves: an estimate from
    above. Dense weights are mapped and exist once, experts and KV pages are the arena, and `bookkeeping` is the
    rest of the arena and the page tables of the processes that map it.
    """

    processes: int
    dense_weights: int
    experts: int
    kv_pages: int
    bookkeeping: int

    @property
    def total(self) -> int:
        return self.processes + self.dense_weights + self.experts + self.kv_pages + self.bookkeeping

    def __str__(self) -> str:
        return (
            f"{format_nbytes(self.total)}: experts {format_nbytes(self.experts)}, dense weights "
            f"{format_nbytes(self.dense_weights)}, KV pages {format_nbytes(self.kv_pages)}, processes "
            f"{format_nbytes(self.processes)}, bookkeeping {format_nbytes(self.bookkeeping)}"
        )


class InstancePlan(msgspec.Struct, frozen=True):
    """The sizes of one instance and how it routes: what the client decided at start, and every process builds on."""

    geometry: Geometry
    max_model_len: int
    expert_nbytes: int  # of the largest, if they are not all of one format
    read_lanes: int  # slots that may be loading at once
    eos_token_ids: tuple[int, ...]
    memory: MemorySplit
    routing: RoutingPreference
    kv_windows: tuple[int, ...] = (0,)  # per group of layers
    kv_max_step: int | None = None  # see SequenceTables

    @property
    def expert_budget_nbytes(self) -> int:
        return self.geometry.slots_nbytes

    @property
    def num_workers(self) -> int:
        """The last two rows of counters and pins belong to the pager and to the coordinator."""
        return self.geometry.num_processes - 2

    @property
    def pager_process(self) -> int:
        return self.num_workers

    @property
    def coordinator_process(self) -> int:
        return self.num_workers + 1


def plan_instance(config: BackendConfig, model: ModelConfig, checkpoint: Checkpoint) -> InstancePlan:
    """Decides the sizes. Raises `BudgetTooSmall`, `MemoryTooSmall`, `UnusableCalibration`, or `ValueError` for a bad
    setting."""
    return _Planner(config, model, checkpoint).plan()


class _Planner:
    def __init__(self, config: BackendConfig, model: ModelConfig, checkpoint: Checkpoint) -> None:
        self.config = config
        self.model = model
        self.checkpoint = checkpoint
        self.num_experts = model.num_experts_in_all
        self.classes = expert_classes(checkpoint)
        self.page_nbytes = model.kv_page_layout(config.block_size, KvFormat(config.kv_cache_dtype)).page_nbytes
        self.max_model_len = config.max_model_len or model.max_position_embeddings
        if not 1 <= self.max_model_len <= model.max_position_embeddings:
            raise ValueError(
                f"max_model_len is {self.max_model_len}, expected 1 to {model.max_position_embeddings}, "
                "which the model was trained for"
            )
        self.needs = SlotNeeds(
            config.workers,
            model.experts_per_token,
            config.user_pins,
            config.read_lanes,
            f"workers={config.workers} with {model.experts_per_token} experts per token",
        )
        least = least_slots(self.classes, self.needs.of_a_size)
        self.least_slots = sum(slots.count for slots in least)
        self.least_nbytes = sum(slots.count * slots.nbytes for slots in least)
        self.kv_windows = model.kv_groups.windows
        self.kv_max_step = (
            2 * config.max_num_batched_tokens
        )  # while one step is computed, pages for the next are granted
        self.pages_for_one = pages_of_sequence(self.kv_windows, self.max_model_len, config.block_size, self.kv_max_step)
        self.pages_for_all = config.max_num_seqs * self.pages_for_one

    def plan(self) -> InstancePlan:
        slots, num_pages = self._slots_and_pages()
        geometry = self._geometry(slots, num_pages)
        cycle = self.num_experts // self.model.num_experts * self.model.experts_per_token  # of one token, all layers
        check_pool(self.config.eviction, slots=geometry.num_slots, cycle=cycle)
        return InstancePlan(
            geometry=geometry,
            max_model_len=self.max_model_len,
            expert_nbytes=self.checkpoint.expert_nbytes,
            read_lanes=self.needs.lanes(geometry.num_slots),
            eos_token_ids=self.model.eos_token_ids,
            routing=routing_preference(self.config),
            memory=MemorySplit(
                processes=self._processes_nbytes(),
                dense_weights=self.checkpoint.dense_nbytes,
                experts=geometry.slots_nbytes,
                kv_pages=num_pages * self.page_nbytes,
                bookkeeping=self._bookkeeping_nbytes(geometry),
            ),
            kv_windows=self.kv_windows,
            kv_max_step=self.kv_max_step,
        )

    def _slots_and_pages(self) -> tuple[tuple[SlotClass, ...], int]:
        if self.config.memory is None:
            budget = DEFAULT_EXPERT_BUDGET if self.config.expert_budget is None else self.config.expert_budget
            slots = self.needs.split(budget, self.classes)
            pages = max(self.pages_for_one, MAX_DEFAULT_KV_NBYTES // self.page_nbytes)
            return slots, self._asked_pages() or min(self.pages_for_all, pages)
        return self._split(parse_nbytes(self.config.memory))

    def _split(self, memory: int) -> tuple[tuple[SlotClass, ...], int]:
        """Pages get what they are given, or a quarter and less where experts would not have their least; experts get
        the rest, and what they leave over goes to pages."""
        asked_pages = self._asked_pages()
        free = memory - self._fixed_nbytes(memory, asked_pages)
        quarter, room = free // 4 // self.page_nbytes, (free - self.least_nbytes) // self.page_nbytes
        num_pages = asked_pages or max(1, min(self.pages_for_all, quarter, room))
        slots = split_slots(free - num_pages * self.page_nbytes, self.classes, self.needs.of_a_size)
        if slots is None:
            needed = self._least_memory(memory, asked_pages)
            raise MemoryTooSmall(self.config.memory or 0, needed, self.least_slots, str(self.needs))
        if asked_pages is None:
            slots_nbytes = sum(of_a_size.count * of_a_size.nbytes for of_a_size in slots)
            num_pages = min(self.pages_for_all, (free - slots_nbytes) // self.page_nbytes)
        return slots, num_pages

    def _fixed_nbytes(self, memory: int, asked_pages: int | None) -> int:
        """All but the rows of slots and pages: what it takes at most in an arena that fits into `memory`."""
        num_pages = asked_pages or max(1, min(self.pages_for_all, memory // self.page_nbytes))
        largest = self._geometry(least_slots(self.classes, self.num_experts), num_pages)
        bookkeeping = self._bookkeeping_nbytes(largest, most=memory)
        return self._processes_nbytes() + self.checkpoint.dense_nbytes + bookkeeping

    def _least_memory(self, memory: int, asked_pages: int | None) -> int:
        """`memory` is too small; this is not, but one byte less."""
        rows = self.least_nbytes + (asked_pages or 1) * self.page_nbytes
        # More memory may hold a larger arena, whose bookkeeping is larger, by far less.
        while (needed := rows + self._fixed_nbytes(memory, asked_pages)) > memory:
            memory = needed
        return memory

    def _asked_pages(self) -> int | None:
        if self.config.kv_cache_memory is None:
            return None
        num_pages = parse_nbytes(self.config.kv_cache_memory) // self.page_nbytes
        if num_pages < 1:
            raise ValueError(
                f"kv_cache_memory is {self.config.kv_cache_memory}, expected at least one page of "
                f"{self.page_nbytes} bytes"
            )
        if num_pages >= MAX_PAGES:
            raise ValueError(
                f"kv_cache_memory is {self.config.kv_cache_memory}, expected fewer than {MAX_PAGES} pages of "
                f"{self.page_nbytes} bytes"
            )
        return num_pages

    def _geometry(self, slots: tuple[SlotClass, ...], num_pages: int) -> Geometry:
        config, model = self.config, self.model
        return Geometry(
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            num_processes=config.workers + 2,
            pins_per_process=self.needs.pins_of_a_reader(slots, self.classes, model.num_experts),
            slot_classes=slots,
            num_pages=num_pages,
            page_nbytes=self.page_nbytes,
            block_size=config.block_size,
            kv_groups=len(self.kv_windows),
            max_sequences=config.max_num_seqs,
            max_model_len=self.max_model_len,
            demand_words=DEMAND_WORDS,
        )

    def _processes_nbytes(self) -> int:
        """Coordinator, pager with its policy, regret helper, workers, client, and a worker's activations of the largest
        step."""
        config, model = self.config, self.model
        row = 8 * model.hidden_size + 3 * (model.num_heads + model.num_kv_heads) * model.head_dim + model.num_experts
        row += model.experts_per_token * (model.hidden_size + 2 * model.intermediate_size)
        row += 3 * model.widest_feed_forward
        logits = 3 * config.max_num_seqs * model.vocab_size  # as computed, scaled and sorted
        activations = 4 * (config.max_num_batched_tokens * row + logits)
        eviction = eviction_nbytes(
            config.eviction,
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            num_streams=config.max_num_seqs,
        )
        return (config.workers + 4) * PROCESS_NBYTES + config.workers * activations + eviction

    def _bookkeeping_nbytes(self, geometry: Geometry, most: int | None = None) -> int:
        """`most`: bytes that the arena will have at most, if not all slots and pages of `geometry` are to be there."""
        arena = Layout(geometry).nbytes
        mapped = arena if most is None else min(arena, most)
        page_tables = geometry.num_processes * PAGE_TABLE_ENTRY_NBYTES * (mapped // mmap.PAGESIZE)
        rows = geometry.slots_nbytes + geometry.num_pages * geometry.page_nbytes
        return arena - rows + page_tables
