"""What a user asks for (`BackendConfig`), and what follows from it for one model on this machine (`InstancePlan`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, get_args

import msgspec

from hotset.runtime.errors import BudgetTooSmall
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.shm.kv_page_format import KvFormat
from hotset.shm.layout import Geometry

RoutingPolicy = Literal["off", "bonus", "range", "mass"]
PrefetchPolicy = Literal["off", "displaced"]
EvictionPolicy = Literal["affinity", "lru"]
KvDtype = Literal["float32", "float16", "bfloat16", "q8_0", "q4_0"]

TRAINED_MODEL = Path(__file__).parent / "model" / "trained"
READ_LANES = 1  # slots that may be loading at once
SLOT_ALIGNMENT = 4096  # bytes; preadv and O_DIRECT want whole pages

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_nbytes(size: str | int) -> int:
    """Bytes from a number or from text such as "4GiB" or "500MB"; raises `ValueError` for anything else."""
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"the size is {size}, expected a number of bytes >= 0")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"the size is {size!r}, expected bytes such as 500000000, '500MB' or '4GiB'")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def expert_budget_slots(budget: str | int, num_experts: int, slot_nbytes: int) -> int:
    """How many of `num_experts` experts a budget holds: a percentage of them, or bytes for slots of `slot_nbytes`."""
    if isinstance(budget, str) and budget.strip().endswith("%"):
        text = budget.strip()[:-1]
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 < share <= 100:
            raise ValueError(f"the expert budget is {budget!r}, expected a percentage over 0 and up to 100")
        return int(num_experts * share / 100)
    return min(num_experts, parse_nbytes(budget) // slot_nbytes)


def _default_workers() -> int:
    return max(1, min(2, len(os.sched_getaffinity(0))))


class BackendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set about an instance.

    Attributes:
        model: folder of a checkpoint in Hugging Face's layout.
        workers: serving processes.
        expert_budget: memory for experts: "50%" of them, or bytes (4_000_000_000, "4GB", "4GiB").
        routing: "off" selects by gate logits alone, and only then is text repeatable. The others prefer resident
            experts: "bonus" adds `cache_bonus` to their logits; "range" adds `range_strength` times the running mean
            of a layer's max - min; "mass" replaces others by them while the gate probability given up by a token
            stays within `mass_budget`. See `RouterConfig`. The default, a mild "range", has not been calibrated
            against perplexity: on the shipped model it gives up 0.8 % of the gate's probability mass.
        prefetch: "displaced" asks for experts that the gate wanted and the routing policy passed over; on the shipped
            model 2 to 7 % of them were used before they went again, so the default is "off".
        eviction: which expert goes when a slot is needed.
        max_num_seqs: sequences that are served at once; further requests wait.
        max_num_batched_tokens: rows of one forward step.
        max_model_len: longest prompt plus answer, in tokens; None is what the model was trained for.
        block_size: tokens per KV page.
        kv_cache_dtype: how KV pages are stored; "q8_0" and "q4_0" are GGML's blocks of 32 with a float16 scale.
        kv_cache_memory: bytes for KV pages; None is enough for `max_num_seqs` full sequences, at most 1 GiB.
        name: of the instance, and so of its shared-memory objects; None makes one up.
    """

    model: str = str(TRAINED_MODEL)
    workers: int = msgspec.field(default_factory=_default_workers)
    expert_budget: str | int = "50%"
    routing: RoutingPolicy = "range"
    cache_bonus: float = 0.15
    range_strength: float = 0.1
    mass_budget: float = 0.004
    prefetch: PrefetchPolicy = "off"
    eviction: EvictionPolicy = "affinity"
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 256
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_dtype: KvDtype = "float32"
    kv_cache_memory: str | int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("workers", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {low}")
        for name in ("cache_bonus", "range_strength", "mass_budget"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}, expected a number from 0 to 1")
        for name, choices in (
            ("routing", RoutingPolicy),
            ("prefetch", PrefetchPolicy),
            ("eviction", EvictionPolicy),
            ("kv_cache_dtype", KvDtype),
        ):
            value, allowed = getattr(self, name), get_args(choices)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


class InstancePlan(msgspec.Struct, frozen=True):
    """The sizes of one instance: what the coordinator decided at start, and every process builds on."""

    geometry: Geometry
    max_model_len: int
    expert_nbytes: int
    expert_budget_nbytes: int
    eos_token_ids: tuple[int, ...]

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
    """Splits the budget into slots and pages. Raises `BudgetTooSmall`, or `ValueError` for a bad setting."""
    total_experts = model.num_layers * model.num_experts
    slot_nbytes = -(-checkpoint.expert_nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    num_slots = expert_budget_slots(config.expert_budget, total_experts, slot_nbytes)
    # Every worker can hold all its pins and the pager still finds a slot to load into: else two workers that wait
    # for each other's slots would wait for ever.
    needed = config.workers * model.experts_per_token + READ_LANES
    if num_slots < needed:
        raise BudgetTooSmall(str(config.expert_budget), num_slots, needed, slot_nbytes)
    spare = (num_slots - READ_LANES) // (2 * config.workers)
    pins = min(model.num_experts, max(model.experts_per_token, spare))

    max_model_len = config.max_model_len or model.max_position_embeddings
    if not 1 <= max_model_len <= model.max_position_embeddings:
        raise ValueError(
            f"max_model_len is {max_model_len}, expected 1 to {model.max_position_embeddings}, "
            "which the model was trained for"
        )
    page_nbytes = model.kv_page_layout(config.block_size, KvFormat(config.kv_cache_dtype)).page_nbytes
    blocks_per_sequence = -(-max_model_len // config.block_size)
    if config.kv_cache_memory is None:
        num_pages = min(config.max_num_seqs * blocks_per_sequence, max(blocks_per_sequence, 2**30 // page_nbytes))
    else:
        num_pages = parse_nbytes(config.kv_cache_memory) // page_nbytes
        if num_pages < 1:
            raise ValueError(
                f"kv_cache_memory is {config.kv_cache_memory}, expected at least one page of {page_nbytes} bytes"
            )
    return InstancePlan(
        geometry=Geometry(
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            num_processes=config.workers + 2,
            pins_per_process=pins,
            num_slots=num_slots,
            slot_nbytes=slot_nbytes,
            num_pages=num_pages,
            page_nbytes=page_nbytes,
            block_size=config.block_size,
            max_sequences=config.max_num_seqs,
            max_model_len=max_model_len,
        ),
        max_model_len=max_model_len,
        expert_nbytes=checkpoint.expert_nbytes,
        expert_budget_nbytes=num_slots * slot_nbytes,
        eos_token_ids=model.eos_token_ids,
    )
