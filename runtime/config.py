"""What a user asks for (`BackendConfig`), and how sizes are written. What follows from it is in plan.py."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from hotset.runtime.argument_types import check_field_types, integer
from hotset.runtime.eviction import parse_eviction
from hotset.runtime.prefetch import parse_prefetch
from hotset.runtime.settings import Settings
from hotset.shm.layout import PrefetchSource

RoutingPolicy = Literal[  # in the order of enum route_policy
    "off", "bonus", "range", "mass", "resnorm", "substitute"
]
ReadMode = Literal["auto", "buffered", "direct"]
STRENGTH_OPTIONS: dict[RoutingPolicy, str] = {
    "bonus": "cache_bonus",
    "range": "range_strength",
    "mass": "mass_budget",
    "resnorm": "resnorm_strength",
    "substitute": "substitute_limit",
}
KvDtype = Literal["float32", "float16", "bfloat16", "q8_0", "q4_0"]

TRAINED_MODEL = Path(__file__).parent / "model" / "trained"


def model_path(given: Any) -> Path:
    """Where the model is that a user names; None is the small one that ships with hotset."""
    if not isinstance(given, str | os.PathLike | None) or given == "":
        raise ValueError(f"model is {given!r}, expected the path of a checkpoint folder or a GGUF file, or None")
    return TRAINED_MODEL if given is None else Path(os.fspath(given))  # pyright: ignore[reportUnknownArgumentType]


_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_nbytes(size: str | int, name: str = "the size") -> int:
    """Bytes from a number or from text such as "4GiB" or "500MB"; raises `ValueError` for anything else."""
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"{name} is {size}, expected a number of bytes >= 0")
        return size
    try:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    except TypeError:  # a float, say
        match = None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{name} is {size!r}, expected bytes such as 500000000, '500MB' or '4GiB'")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_nbytes(nbytes: int) -> str:
    """For people: "1.4 GiB", "96 MiB", "512 bytes"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.{1 if nbytes < 100 * size else 0}f} {unit}"
    return f"{nbytes} bytes"


def _default_workers() -> int:
    return max(1, min(2, len(os.sched_getaffinity(0))))


class BackendConfig(Settings, frozen=True, kw_only=True):
    """Everything that can be set about an instance.

    Attributes:
        model: folder of a checkpoint in Hugging Face's layout.
        workers: serving processes.
        memory: for everything: processes, dense weights, KV pages and experts, as many as fit ("4GiB"). See plan.py.
        expert_budget: memory for experts alone, instead of `memory`: "50%" of them, or bytes (4_000_000_000, "4GB",
            "4GiB"). Where neither is given, it is "50%".
        routing: "off" selects by gate logits alone, and only then is text repeatable. The others prefer experts that
            are in memory: "bonus" adds `cache_bonus` to their logits; "range" adds `range_strength` times the running
            mean of a layer's max - min; "mass" replaces others by them while the gate probability given up by a token
            stays within `mass_budget`; "resnorm" adds `resnorm_strength` times the token's largest probability to
            theirs, the more the less experts add to the token's state; "substitute" leaves others out while each
            changes the token's state by less than a share `substitute_limit` of what it is. See `RouterConfig`.
        cache_bonus, range_strength, mass_budget, resnorm_strength, substitute_limit: the strength of the policy whose
            it is; refused with another. None is what `hotset calibrate` found for the model, or else a cautious
            default.
        prefetch: which sources name experts to read before they are needed: "gate-ahead" (the next layer's gate on
            the current hidden state), "gate-ahead-2" (the layer's after it), "transitions" (what followed the current
            experts in the next layer), "runners-up" (what the gate almost wanted; see `prefetch_threshold`),
            "affinity" (what was used most lately), or several with + between them; "auto"
            times steps with "gate-ahead" and without in turn, and prefetches only while those with it are faster. Only
            candidates of a kind that has been used 60 % of the times are asked for. The default is "off": on two cores,
            which compute and read at once, 85 to 99 % of what was prefetched of a 6 GB model was used, and steps took
            1.00 to 1.10 of the time of those without.
        prefetch_threshold: the least gate probability of a runner-up; refused without that source. None is 0.02.
        eviction: which expert goes when a slot is needed: "td" the one that is needed last as far as could be learned
            while serving, "affinity" the one used least lately, "lru", "lfu", "adaptive", and blends such as
            "lru+affinity:0.5"; see `parse_eviction`. "td" is the default because it was never worse than "affinity",
            to which it falls back: 2 to 5 points more hits on recorded demands, at worst 0.3 less on made-up ones
            that cannot be learned; and what it has learned is kept for the next instance.
        read_lanes: experts that are read from disk at once, each by a thread of the pager and into a slot that nobody
            else can use meanwhile. None is 4, or what a small expert budget leaves beyond the experts of one token
            per worker (`backend.plan.read_lanes`).
        read_mode: "buffered" reads experts through the page cache, "direct" past it (O_DIRECT; packed models only), and
            "auto" directly where that was measured to be faster and the page cache cannot hold the model.
        warm_start: fill the slots, while nobody waits for the disk, with the experts that were worth most when the
            last instance of this model closed, and remember this one's (runtime/model/heat.py). False does neither.
        user_pins: slots that are kept for experts that `Backend.pin_experts` pins; the most that can be pinned.
        max_num_seqs: sequences that are served at once; further requests wait.
        max_num_batched_tokens: rows of one forward step.
        max_model_len: longest prompt plus answer, in tokens; None is what the model was trained for.
        block_size: tokens per KV page.
        kv_cache_dtype: how KV pages are stored; "q8_0" and "q4_0" are GGML's blocks of 32 with a float16 scale.
        kv_cache_memory: bytes for KV pages; None is enough for `max_num_seqs` full sequences, at most 1 GiB, or at
            most a quarter of what `memory` leaves for pages and experts.
        name: of the instance, and so of its shared-memory objects; None makes one up.
    """

    model: str = str(TRAINED_MODEL)
    workers: int = msgspec.field(default_factory=_default_workers)
    memory: str | int | None = None
    expert_budget: str | int | None = None
    routing: RoutingPolicy = "substitute"
    cache_bonus: float | None = None
    range_strength: float | None = None
    mass_budget: float | None = None
    resnorm_strength: float | None = None
    substitute_limit: float | None = None
    prefetch: str = "off"
    prefetch_threshold: float | None = None
    eviction: str = "td"
    read_lanes: int | None = None
    read_mode: ReadMode = "auto"
    warm_start: bool = True
    user_pins: int = 0
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 256
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_dtype: KvDtype = "float32"
    kv_cache_memory: str | int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        for name, low in (
            ("workers", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("read_lanes", 1),
            ("max_model_len", 1),
            ("user_pins", 0),
        ):
            value = getattr(self, name)
            if value is not None:
                integer(name, value, low)
        if self.memory is not None and self.expert_budget is not None:
            raise ValueError(
                f"memory is {self.memory!r} and expert_budget is {self.expert_budget!r}, expected one of the two: "
                "memory decides how many experts fit"
            )
        for name in ("memory", "kv_cache_memory"):
            size = getattr(self, name)
            if size is not None:
                parse_nbytes(size, name)
        parse_eviction(self.eviction)
        sources = parse_prefetch(self.prefetch).sources
        threshold = self.prefetch_threshold
        if threshold is not None:
            if not 0 <= threshold <= 1:
                raise ValueError(f"prefetch_threshold is {threshold!r}, expected a number from 0 to 1")
            if PrefetchSource.RUNNERS_UP not in sources:
                raise ValueError(
                    f"prefetch_threshold is {threshold!r} and prefetch is {self.prefetch!r}, expected 'runners-up' "
                    "among its sources: prefetch_threshold is for that one"
                )
        for policy, name in STRENGTH_OPTIONS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}, expected a number from 0 to 1")
            if policy != self.routing:
                raise ValueError(
                    f"{name} is {value!r} and routing is {self.routing!r}, expected the strength of that policy: "
                    f"{name} is for routing {policy!r}"
                )
