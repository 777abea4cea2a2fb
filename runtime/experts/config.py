"""What can be set about an expert cache (`ExpertCacheConfig`), and what follows from it for one model."""

from __future__ import annotations

import msgspec

from hotset.runtime.argument_types import check_field_types, integer
from hotset.runtime.config import TRAINED_MODEL, ReadMode
from hotset.runtime.eviction import check_pool, parse_eviction
from hotset.runtime.expert_slots import expert_classes
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.plan import DEFAULT_EXPERT_BUDGET, DEMAND_WORDS
from hotset.runtime.settings import Settings
from hotset.runtime.slot_needs import SlotNeeds
from hotset.shm.demands import NO_STREAM
from hotset.shm.geometry import Geometry

MAX_PROCESSES = 256


class ExpertCacheConfig(Settings, frozen=True, kw_only=True):
    """Everything that can be set about an `ExpertCache`.

    Attributes:
        model: folder of a checkpoint in Hugging Face's layout, or of a pack.
        expert_budget: memory for experts: "25%" of them, or bytes (4_000_000_000, "4GB", "4GiB").
        processes: that may use the cache at once, its maker included.
        pins_per_process: experts that a process may pin at once. None is as many as half of the slots allow, and at
            least the experts of one token.
        user_pins: slots that are kept for experts that `pin_experts` pins; the most that can be pinned.
        streams: texts that a process decodes at once; eviction learns what each of them uses.
        eviction, read_lanes, read_mode, warm_start: as in `BackendConfig`.
        name: of the cache, by which other processes find it; None makes one up.
    """

    model: str = str(TRAINED_MODEL)
    expert_budget: str | int = DEFAULT_EXPERT_BUDGET
    processes: int = 1
    pins_per_process: int | None = None
    user_pins: int = 0
    streams: int = 16
    eviction: str = "td"
    read_lanes: int | None = None
    read_mode: ReadMode = "auto"
    warm_start: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        integer("processes", self.processes, 1, MAX_PROCESSES)
        integer("streams", self.streams, 1, (NO_STREAM - 1) // self.processes)
        integer("user_pins", self.user_pins, 0)
        for name in ("pins_per_process", "read_lanes"):
            value = getattr(self, name)
            if value is not None:
                integer(name, value, 1)
        parse_eviction(self.eviction)


class ExpertCachePlan(msgspec.Struct, frozen=True):
    """The sizes of one cache."""

    geometry: Geometry
    read_lanes: int

    @property
    def processes(self) -> int:
        """Rows of pins and counters; the last one, behind these, is the pager's."""
        return self.geometry.num_processes - 1


def plan_cache(config: ExpertCacheConfig, checkpoint: Checkpoint) -> ExpertCachePlan:
    """Raises `BudgetTooSmall`, or `ValueError` for a bad setting."""
    model = checkpoint.config
    classes = expert_classes(checkpoint)
    pins = config.pins_per_process
    in_words = f"{model.experts_per_token} experts per token" if pins is None else f"pins_per_process={pins}"
    needs = SlotNeeds(
        config.processes,
        pins or model.experts_per_token,
        config.user_pins,
        config.read_lanes,
        f"processes={config.processes} with {in_words}",
    )
    slots = needs.split(config.expert_budget, classes)
    geometry = Geometry(
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        num_processes=config.processes + 1,
        pins_per_process=pins or needs.pins_of_a_reader(slots, classes, model.num_experts),
        slot_classes=slots,
        max_sequences=config.processes * config.streams,
        demand_words=DEMAND_WORDS,
    )
    cycle = model.num_experts_in_all // model.num_experts * model.experts_per_token
    check_pool(config.eviction, slots=geometry.num_slots, cycle=cycle)
    return ExpertCachePlan(geometry, needs.lanes(geometry.num_slots))
