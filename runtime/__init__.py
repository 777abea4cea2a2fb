"""Everything public: decisions about routing, KV pages and scheduling, and the `Backend` that runs a model.

Names are imported when they are first used, so that a child process, or a program that wants only the router, does
not pay for the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotset.runtime.affinity import AffinityConfig as AffinityConfig
    from hotset.runtime.affinity import ExpertAffinity as ExpertAffinity
    from hotset.runtime.answers import Completion as Completion
    from hotset.runtime.answers import Piece as Piece
    from hotset.runtime.backend import Backend as Backend
    from hotset.runtime.config import BackendConfig as BackendConfig
    from hotset.runtime.errors import BackendError as BackendError
    from hotset.runtime.errors import BudgetTooSmall as BudgetTooSmall
    from hotset.runtime.errors import HotsetError as HotsetError
    from hotset.runtime.errors import MemoryTooSmall as MemoryTooSmall
    from hotset.runtime.errors import RequestFailed as RequestFailed
    from hotset.runtime.errors import RequestTooLong as RequestTooLong
    from hotset.runtime.errors import TooManyPins as TooManyPins
    from hotset.runtime.expert_pins import ExpertUnavailable as ExpertUnavailable
    from hotset.runtime.experts.cache import ExpertCache as ExpertCache
    from hotset.runtime.experts.config import ExpertCacheConfig as ExpertCacheConfig
    from hotset.runtime.experts.errors import ExpertCacheClosed as ExpertCacheClosed
    from hotset.runtime.experts.errors import ExpertCacheError as ExpertCacheError
    from hotset.runtime.experts.errors import ExpertCacheFull as ExpertCacheFull
    from hotset.runtime.experts.errors import NotEnoughPins as NotEnoughPins
    from hotset.runtime.experts.pinned import PinnedExperts as PinnedExperts
    from hotset.runtime.experts.stats import ExpertCacheStats as ExpertCacheStats
    from hotset.runtime.experts.weights import ExpertWeights as ExpertWeights
    from hotset.runtime.kv.cache import PagedKvCache as PagedKvCache
    from hotset.runtime.kv.errors import OutOfBounds as OutOfBounds
    from hotset.runtime.kv.errors import OutOfPages as OutOfPages
    from hotset.runtime.kv.errors import UnknownSequence as UnknownSequence
    from hotset.runtime.kv.page_memory import KvFormat as KvFormat
    from hotset.runtime.kv.page_memory import KvPageLayout as KvPageLayout
    from hotset.runtime.kv.page_memory import KvPageMemory as KvPageMemory
    from hotset.runtime.kv.shared_prompts import Admission as Admission
    from hotset.runtime.kv.statistics import FragmentationStats as FragmentationStats
    from hotset.runtime.kv.statistics import PagedCacheStats as PagedCacheStats
    from hotset.runtime.metrics import Latency as Latency
    from hotset.runtime.metrics import MoeMetrics as MoeMetrics
    from hotset.runtime.metrics import MoeMetricsSummary as MoeMetricsSummary
    from hotset.runtime.model.chat_template import ChatTemplateError as ChatTemplateError
    from hotset.runtime.model.chat_template import NoChatTemplate as NoChatTemplate
    from hotset.runtime.model.errors import CorruptCheckpoint as CorruptCheckpoint
    from hotset.runtime.model.errors import ModelNotFound as ModelNotFound
    from hotset.runtime.model.errors import UnsupportedModel as UnsupportedModel
    from hotset.runtime.paging_request import PagingDirection as PagingDirection
    from hotset.runtime.paging_request import PagingPriority as PagingPriority
    from hotset.runtime.paging_request import PagingRequest as PagingRequest
    from hotset.runtime.route_result import BatchRouteResult as BatchRouteResult
    from hotset.runtime.route_result import RouteResult as RouteResult
    from hotset.runtime.router import MemoryAwareRouter as MemoryAwareRouter
    from hotset.runtime.router import ResidencyBelongsToPager as ResidencyBelongsToPager
    from hotset.runtime.router_config import RouterConfig as RouterConfig
    from hotset.runtime.sampling_params import SamplingParams as SamplingParams
    from hotset.runtime.stats import BackendStats as BackendStats

_MODULES = {
    "affinity": ("AffinityConfig", "ExpertAffinity"),
    "answers": ("Completion", "Piece"),
    "backend": ("Backend",),
    "config": ("BackendConfig",),
    "errors": (
        "BackendError",
        "BudgetTooSmall",
        "HotsetError",
        "MemoryTooSmall",
        "RequestFailed",
        "RequestTooLong",
        "TooManyPins",
    ),
    "expert_pins": ("ExpertUnavailable",),
    "experts.cache": ("ExpertCache",),
    "experts.config": ("ExpertCacheConfig",),
    "experts.errors": ("ExpertCacheClosed", "ExpertCacheError", "ExpertCacheFull", "NotEnoughPins"),
    "experts.pinned": ("PinnedExperts",),
    "experts.stats": ("ExpertCacheStats",),
    "experts.weights": ("ExpertWeights",),
    "metrics": ("Latency", "MoeMetrics", "MoeMetricsSummary"),
    "kv.cache": ("PagedKvCache",),
    "kv.shared_prompts": ("Admission",),
    "kv.errors": ("OutOfBounds", "OutOfPages", "UnknownSequence"),
    "kv.page_memory": ("KvFormat", "KvPageLayout", "KvPageMemory"),
    "kv.statistics": ("FragmentationStats", "PagedCacheStats"),
    "model.chat_template": ("ChatTemplateError", "NoChatTemplate"),
    "model.errors": ("CorruptCheckpoint", "ModelNotFound", "UnsupportedModel"),
    "paging_request": ("PagingDirection", "PagingPriority", "PagingRequest"),
    "route_result": ("BatchRouteResult", "RouteResult"),
    "router": ("MemoryAwareRouter", "ResidencyBelongsToPager"),
    "router_config": ("RouterConfig",),
    "sampling_params": ("SamplingParams",),
    "stats": ("BackendStats",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_MODULE_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
