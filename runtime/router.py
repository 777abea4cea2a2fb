"""Memory-aware routing: which experts a token goes to, preferring those that are in memory.

Selection works on adjusted scores; mixing weights always come from the unmodified gate logits. The work of a batch is
one call into the kernel (shm/core/route.h), which also keeps the books: hits and misses, affinity, activations, the
probability mass given up. A row's weights do not depend, to the last bit, on the batch it is in, nor on the
instruction set; with the policy "off" its selection depends on nothing but its own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.errors import HotsetError
from hotset.runtime.metrics import MoeMetrics
from hotset.runtime.paging_request import PagingRequest
from hotset.shm import _core
from hotset.shm.layout import Geometry
from hotset.shm.segment import Segment

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

MAX_EXPERTS = 1024
MAX_TOP_K = 32

Gating = Literal["softmax_top_k", "top_k_softmax", "sigmoid"]
Policy = Literal["off", "bonus", "range", "mass", "resnorm"]
_GATINGS: tuple[Gating, ...] = ("softmax_top_k", "top_k_softmax", "sigmoid")  # in the order of enum route_gating
_POLICIES: tuple[Policy, ...] = ("off", "bonus", "range", "mass", "resnorm")  # in the order of enum route_policy
_EPOCHS = {None: 0, 1: 1, 0: 2}  # to enum route_epochs


class ResidencyBelongsToPager(HotsetError):
    """On an instance's arena only the pager says what is resident."""


class RouterConfig(msgspec.Struct, frozen=True):
    """How a router selects.

    `cache_bonus` and `prefetch_threshold` are clamped to [0, 1]; anything else out of range is a `ValueError`.

    Attributes:
        num_experts: per layer, up to 1,024.
        top_k: experts per token, up to 32.
        cache_bonus: policy "bonus" adds it to the logits of resident experts.
        memory_aware: False routes as with policy "off".
        prefetch_threshold: gate probability from which a non-resident expert that was not selected is prefetched.
        policy: "off" is the true top-k. "bonus": see `cache_bonus`. "range" (Cache-Prior, Skliar et al., TMLR 2025):
            the bonus is `range_strength` times the running mean over tokens of max - min of the layer's logits, and
            the token's own top `keep_top` get it too. "mass" replaces experts that are not resident by resident ones
            while the gate probability given up stays <= `mass_budget` per token. "resnorm" adds `resnorm_strength` *
            p_1 * |x| / n to their probability: p_1 is the token's largest, |x| the norm of the residual that enters
            the layer and n the mean norm of the layer's expert outputs, for where |x| is large beside n a wrong
            expert does little harm. `route_batch` takes |x| / n as `residual_ratio`; without it, it is 1.
            Not with gating "sigmoid".
        gating: "softmax_top_k" (OLMoE, Qwen) takes probabilities over all experts, "top_k_softmax" (Mixtral,
            gpt-oss) over the selected ones, "sigmoid" (DeepSeek) sigmoid scores.
        renormalize: the weights of a row sum to `weight_scale`; "top_k_softmax" always does that.
        weight_scale: factor on every weight.
        num_groups, top_groups: "sigmoid" selects within the `top_groups` groups whose two best scores sum highest.
        prefer_loading: experts that are being read from disk are preferred too; they are never hits.
        affinity: decay and boost; None takes the defaults of `AffinityConfig`.
        timing: record latencies; counts are always on.
        adaptive: adjust the policy's strength, from its configured value up to `max_strength`, towards
            `target_hit_rate` while the mean mass lost per token stays <= `max_lost_mass`.
    """

    num_experts: int = 8
    top_k: int = 2
    cache_bonus: float = 0.15
    memory_aware: bool = True
    prefetch_threshold: float = 0.1
    policy: Policy = "bonus"
    range_strength: float = 0.2
    keep_top: int = 1
    mass_budget: float = 0.004
    resnorm_strength: float = 0.1
    gating: Gating = "softmax_top_k"
    renormalize: bool = False
    weight_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    prefer_loading: bool = True
    affinity: AffinityConfig | None = None
    timing: bool = True
    adaptive: bool = False
    target_hit_rate: float = 0.8
    max_lost_mass: float = 0.02
    max_strength: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cache_bonus", "prefetch_threshold"):
            value = getattr(self, name)
            if value != value:
                raise ValueError(f"{name} is {value}, expected a number")
            msgspec.structs.force_setattr(self, name, min(max(float(value), 0.0), 1.0))
        _check_range("num_experts", self.num_experts, 1, MAX_EXPERTS)
        _check_range("top_k", self.top_k, 1, min(self.num_experts, MAX_TOP_K))
        _check_range("keep_top", self.keep_top, 0, self.top_k)
        _check_range("num_groups", self.num_groups, 1, 64)
        _check_range("top_groups", self.top_groups, 1, min(self.num_groups, MAX_TOP_K))
        if self.num_experts % self.num_groups or self.num_experts // self.num_groups * self.top_groups < self.top_k:
            raise ValueError(
                f"{self.top_groups} of {self.num_groups} groups of {self.num_experts} experts do not fit: expected "
                f"groups of equal size, and at least top_k = {self.top_k} experts in those that are selected"
            )
        for name in (
            "range_strength",
            "mass_budget",
            "resnorm_strength",
            "weight_scale",
            "max_lost_mass",
            "max_strength",
        ):
            _check_range(name, getattr(self, name), 0, float(np.finfo(np.float32).max))
        _check_range("target_hit_rate", self.target_hit_rate, 0, 1)
        if self.gating not in _GATINGS:
            raise ValueError(f"gating is {self.gating!r}, expected one of {', '.join(_GATINGS)}")
        _check_policy(self.policy, self.gating)
        if self.affinity is not None and self.affinity.num_experts != self.num_experts:
            raise ValueError(
                f"affinity.num_experts is {self.affinity.num_experts}, expected num_experts = {self.num_experts}"
            )


def _check_policy(policy: str, gating: Gating) -> None:
    if policy not in _POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(_POLICIES)}")
    if policy == "resnorm" and gating == "sigmoid":
        raise ValueError("policy is 'resnorm', which needs a softmax gate's probabilities, and gating is 'sigmoid'")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")


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


class MemoryAwareRouter:
    """Routes the tokens of all layers over one residency mask.

    On private memory (no `segment`) the caller owns the mask and says what is resident; on an instance's arena the
    pager does. Any number of processes may route on one arena, each with its own `process` row.

    Args:
        config: num_experts must be the arena's.
        num_layers: of private memory; an arena has its own.
        segment: the arena.
        process: whose rows of counters and activations this router writes; no two routers that run at the same
            time may share one.
    """

    def __init__(
        self, config: RouterConfig, *, num_layers: int = 1, segment: Segment | None = None, process: int = 0
    ) -> None:
        self.config = config
        self._owns_memory = segment is None
        self._segment = segment or Segment.private(Geometry(num_layers=num_layers, num_experts=config.num_experts))
        self.num_layers = self._segment.layout.geometry.num_layers
        self.affinity = ExpertAffinity(
            config.affinity or AffinityConfig(config.num_experts), segment=self._segment, process=process
        )
        self.metrics = MoeMetrics(self._segment, process)
        self._core = _core.Router(
            self._segment.arena,
            self.affinity.core,
            process,
            config.top_k,
            _GATINGS.index(config.gating),
            config.renormalize,
            config.weight_scale,
            config.num_groups,
            config.top_groups,
            _POLICIES.index(config.policy if config.memory_aware else "off"),
            config.cache_bonus,
            config.range_strength,
            config.mass_budget,
            config.resnorm_strength,
            config.keep_top,
            config.prefetch_threshold,
            config.prefer_loading,
            config.timing,
            config.adaptive,
            config.target_hit_rate,
            config.max_lost_mass,
            config.max_strength,
        )

    @property
    def strength(self) -> float:
        """Of the configured policy, as it is now: it moves with `adaptive`."""
        return self._core.strength

    def route(
        self,
        logits: Float32,
        layer: int = 0,
        *,
        policy: Policy | None = None,
        strength: float | None = None,
    ) -> RouteResult:
        """Routes one token, float32 [num_experts]; advances the layer's affinity by one epoch.

        `policy` and `strength`, its cache_bonus, range_strength and so on, replace the configured ones.
        """
        row = self._vector(logits, "logits")
        result = self.route_batch(row[np.newaxis], layer, policy=policy, strength=strength, prefetch=True)
        experts = result.experts[0]
        requests = [PagingRequest.page_in_urgent(e, layer) for e in experts.tolist() if e in result.misses]
        requests += [PagingRequest.prefetch(e, layer) for e in sorted(result.prefetches)]
        return RouteResult(experts, result.weights[0], requests)

    def route_batch(
        self,
        logits: Float32,
        layer: int = 0,
        *,
        policy: Policy | None = None,
        strength: float | Float32 | None = None,
        epochs: Literal[0, 1] | None = None,
        prefetch: bool = False,
        residual_ratio: Float32 | None = None,
    ) -> BatchRouteResult:
        """Routes a batch, float32 [tokens, num_experts], against one snapshot of the residency mask.

        Args:
            logits: C-contiguous.
            layer: index.
            policy: replaces the configured one.
            strength: replaces the configured cache_bonus, range_strength, mass_budget or resnorm_strength; float32
                [tokens] gives each token its own, and 0 is "off" for that token.
            epochs: None advances the layer's affinity by one epoch per token, as the same single calls would. 1
                advances it by one in all and boosts each selected expert once: a step of a serving loop. 0 does the
                same within the current epoch: a further batch of the same step.
            prefetch: fill `prefetches`.
            residual_ratio: float32 [tokens], what policy "resnorm" multiplies its strength by: see `RouterConfig`.
                Refused with other policies.
        """
        if residual_ratio is not None:
            strength = self._residual_strength(policy, strength, residual_ratio)
        tokens = np.shape(logits)[0] if np.ndim(logits) == 2 else 0
        experts = np.empty((tokens, self.config.top_k), np.int32)
        weights = np.empty((tokens, self.config.top_k), np.float32)
        report = self._core.route(
            logits, experts, weights, layer, self._policy(policy), strength, _epochs(epochs), prefetch
        )
        return BatchRouteResult(experts, weights, *report)

    def bind(
        self,
        logits: Float32,
        experts: Int32,
        weights: Float32,
        layer: int = 0,
        *,
        policy: Policy | None = None,
        strength: float | None = None,
        epochs: Literal[0, 1] | None = None,
    ) -> Callable[..., int]:
        """The fast path: checks the arrays once, and returns a callable that routes what `logits` holds then.

        It writes `experts` (int32) and `weights` (float32) and returns how many distinct experts of them are not
        resident. Its argument depends on the shapes:

        * logits [num_experts], outputs [top_k]: none.
        * logits [tokens, num_experts], outputs [top_k]: the index of the token to route.
        * logits [tokens, num_experts], outputs [tokens, top_k]: how many tokens, from the first on (default: all).
        """
        return self._core.bind(logits, experts, weights, layer, self._policy(policy), strength, _epochs(epochs))

    def apply_cache_bonus(self, scores: Float32, layer: int = 0) -> Float32:
        """A copy of `scores` [num_experts], the cache bonus added to resident experts if `memory_aware`."""
        adjusted = self._vector(scores, "scores").copy()
        if self.config.memory_aware:
            adjusted[list(self._core.resident(layer))] += np.float32(self.config.cache_bonus)
        return adjusted

    def select_top_k(self, scores: Float32) -> Int32:
        """The `top_k` ids of `scores` [num_experts] by (score descending, id ascending), NaN last."""
        ids = np.empty(self.config.top_k, np.int32)
        self._core.select(self._vector(scores, "scores"), ids)
        return ids

    def update_cache_state(self, ids: Iterable[int], layer: int = 0) -> None:
        """Exactly `ids` are resident now. Private memory only; changes nothing if an id is out of range."""
        wanted = {self._checked_id(e) for e in ids}
        self._check_owns_mask()
        resident = self._core.resident(layer)
        for expert in resident - wanted:
            self._core.set_resident(layer, expert, False)
        for expert in wanted - resident:
            self._core.set_resident(layer, expert, True)

    def set_resident(self, expert: int, resident: bool, layer: int = 0) -> None:
        """Private memory only."""
        self._check_owns_mask()
        self._core.set_resident(layer, self._checked_id(expert), bool(resident))

    def is_resident(self, expert: int, layer: int = 0) -> bool:
        return expert in self._core.resident(layer)

    def resident_experts(self, layer: int = 0) -> list[int]:
        """Ascending."""
        return sorted(self._core.resident(layer))

    def generate_prefetch_requests(self, budget: int, layer: int | None = None) -> list[PagingRequest]:
        """Prefetches of the non-resident experts with the highest affinity, at most `budget`, of one layer or all."""
        scores, _ = self.affinity.snapshot()
        layers = range(self.num_layers) if layer is None else (layer,)
        absent = [
            (-float(scores[at, expert]), at, expert)
            for at in layers
            for expert in set(range(self.config.num_experts)) - self._core.resident(at)
        ]
        return [PagingRequest.prefetch(expert, at) for _, at, expert in sorted(absent)[: max(budget, 0)]]

    def hit_rate(self) -> float:
        """Of the selections since the last reset, those that were resident; 0.0 if there were none."""
        return self.metrics.hit_rate()

    def reset_metrics(self) -> None:
        self.metrics.reset()

    def close(self) -> None:
        """Lets go of private memory; a shared arena is its owner's to close. May be called twice."""
        if self._owns_memory:
            self._segment.close()
            self._owns_memory = False

    def _residual_strength(
        self, policy: Policy | None, strength: float | Float32 | None, residual_ratio: Float32
    ) -> Float32:
        if (policy or self.config.policy) != "resnorm":
            raise ValueError(
                f"residual_ratio is given with policy {policy or self.config.policy!r}, expected policy 'resnorm'"
            )
        if strength is None:
            configured = self.config.policy == "resnorm" and self.config.memory_aware
            strength = self.strength if configured else self.config.resnorm_strength
        return np.asarray(strength * residual_ratio, np.float32)

    def _policy(self, policy: Policy | None) -> int | None:
        if policy is None:
            return None
        _check_policy(policy, self.config.gating)
        return _POLICIES.index(policy)

    def _vector(self, values: Any, name: str) -> Float32:
        """`values` as float32 [num_experts]; lists are converted, arrays must be right."""
        vector = cast("Float32", values) if isinstance(values, np.ndarray) else np.asarray(values, np.float32)
        if vector.shape != (self.config.num_experts,):
            raise ValueError(f"{name} has shape {vector.shape}, expected ({self.config.num_experts},)")
        return vector

    def _check_owns_mask(self) -> None:
        if not self._owns_memory:
            raise ResidencyBelongsToPager(
                "the router is on an instance's arena, where only the pager changes what is resident; "
                "a router without a segment has a mask of its own"
            )

    def _checked_id(self, expert: int) -> int:
        if not 0 <= expert < self.config.num_experts:
            raise ValueError(f"expert id is {expert}, expected 0 <= id < {self.config.num_experts}")
        return int(expert)


def _epochs(epochs: int | None) -> int:
    if epochs not in _EPOCHS:
        raise ValueError(f"epochs is {epochs!r}, expected None (one per token), 1 (one in all) or 0 (none)")
    return _EPOCHS[epochs]
