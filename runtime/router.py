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
from hotset.runtime.argument_types import check_instance, integer, integers
from hotset.runtime.config import STRENGTH_OPTIONS
from hotset.runtime.errors import HotsetError
from hotset.runtime.metrics import MoeMetrics
from hotset.runtime.paging_request import PagingRequest
from hotset.runtime.router_config import GATINGS, POLICIES, RESIDUAL_POLICIES, Policy, RouterConfig, check_policy
from hotset.runtime.settings import takes
from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_EPOCHS = {None: 0, 1: 1, 0: 2}  # to enum route_epochs


class ResidencyBelongsToPager(HotsetError):
    """On an instance's arena only the pager says what is resident."""


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
        selection_bias: float32 [layers, num_experts], of a sigmoid gate: added to its scores where it selects, and only
            there.
    """

    @takes("config", RouterConfig)
    def __init__(
        self,
        config: RouterConfig,
        *,
        num_layers: int = 1,
        segment: Segment | None = None,
        process: int = 0,
        selection_bias: Float32 | None = None,
    ) -> None:
        check_instance("config", config, RouterConfig)
        num_layers, process = integer("num_layers", num_layers, 1), integer("process", process, 0)
        if segment is not None:
            check_instance("segment", segment, Segment)
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
            GATINGS.index(config.gating),
            config.renormalize,
            config.weight_scale,
            config.num_groups,
            config.top_groups,
            POLICIES.index(config.policy if config.memory_aware else "off"),
            config.cache_bonus,
            config.range_strength,
            config.mass_budget,
            config.resnorm_strength,
            config.substitute_limit,
            config.keep_top,
            config.prefetch_threshold,
            config.prefer_loading,
            config.timing,
            config.adaptive,
            config.target_hit_rate,
            config.max_lost_mass,
            config.max_strength,
            selection_bias,
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
            strength: replaces the configured one of the policy (cache_bonus, range_strength and so on); float32
                [tokens] gives each token its own, and 0 is "off" for that token.
            epochs: None advances the layer's affinity by one epoch per token, as the same single calls would. 1
                advances it by one in all and boosts each selected expert once: a step of a serving loop. 0 does the
                same within the current epoch: a further batch of the same step.
            prefetch: fill `prefetches`.
            residual_ratio: float32 [tokens], what "resnorm" and "substitute" multiply their strength by: see
                `RouterConfig`.
                Refused with other policies.
        """
        number = self._policy(policy)
        if residual_ratio is not None:
            strength = self._residual_strength(policy, strength, residual_ratio)
        experts, weights = self._room_for(logits)
        report = self._core.route(logits, experts, weights, layer, number, strength, _epochs(epochs), prefetch)
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

    def true_top_k(self, logits: Float32, layer: int = 0) -> Int32:
        """What the gate alone chooses, whatever is in memory: int32 [tokens, top_k], each row best first, of logits
        float32 [tokens, num_experts]. Counts nothing.
        """
        experts = np.empty((np.shape(logits)[0] if np.ndim(logits) == 2 else 0, self.config.top_k), np.int32)
        self._core.top_k(logits, experts, layer)
        return experts

    def foresee(
        self,
        logits: Float32,
        layer: int = 0,
        *,
        policy: Policy | None = None,
        strength: float | Float32 | None = None,
        residual_ratio: Float32 | None = None,
    ) -> dict[int, float]:
        """What `route_batch` would select now that is neither in memory nor being loaded: each such expert, with the
        largest weight that a token would give it. Counts nothing and changes nothing, so `logits` may be a guess.

        The arguments are those of `route_batch`.
        """
        number = self._policy(policy)
        if residual_ratio is not None:
            strength = self._residual_strength(policy, strength, residual_ratio)
        experts, weights = self._room_for(logits)
        missing = self._core.foresee(logits, experts, weights, layer, number, strength)
        foreseen: dict[int, float] = {}
        if missing:
            for expert, weight in zip(experts.ravel().tolist(), weights.ravel().tolist(), strict=True):
                if expert in missing:
                    foreseen[expert] = max(weight, foreseen.get(expert, weight))
        return foreseen

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
        wanted = {self._checked_id(e) for e in integers("ids", ids)}
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
        return integer("expert id", expert) in self._core.resident(layer)

    def resident_experts(self, layer: int = 0) -> list[int]:
        """Ascending."""
        return sorted(self._core.resident(layer))

    def generate_prefetch_requests(self, budget: int, layer: int | None = None) -> list[PagingRequest]:
        """Prefetches of the non-resident experts with the highest affinity, at most `budget`, of one layer or all."""
        most = max(integer("budget", budget), 0)
        layers = range(self.num_layers) if layer is None else (integer("layer", layer),)
        scores, _ = self.affinity.snapshot()
        absent = [
            (-float(scores[at, expert]), at, expert)
            for at in layers
            for expert in set(range(self.config.num_experts)) - self._core.resident(at)
        ]
        return [PagingRequest.prefetch(expert, at) for _, at, expert in sorted(absent)[:most]]

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

    def _room_for(self, logits: Float32) -> tuple[Int32, Float32]:
        """Experts and weights, [tokens, top_k], of a batch of logits, whose shape the core checks."""
        shape = np.shape(logits)[0] if np.ndim(logits) == 2 else 0, self.config.top_k
        return np.empty(shape, np.int32), np.empty(shape, np.float32)

    def _residual_strength(
        self, policy: Policy | None, strength: float | Float32 | None, residual_ratio: Float32
    ) -> Float32:
        chosen = self.config.policy if policy is None else policy
        if chosen not in RESIDUAL_POLICIES:
            raise ValueError(
                f"residual_ratio is given with policy {chosen!r}, expected one of {', '.join(RESIDUAL_POLICIES)}"
            )
        if strength is None:
            configured = self.config.policy == chosen and self.config.memory_aware
            strength = self.strength if configured else cast("float", getattr(self.config, STRENGTH_OPTIONS[chosen]))
        try:
            return np.asarray(strength * residual_ratio, np.float32)
        except (TypeError, ValueError):
            raise ValueError(
                f"strength is {strength!r}, expected a number or float32 of shape (tokens,), and residual_ratio is "
                f"{residual_ratio!r}, expected float32 of shape (tokens,)"
            ) from None

    def _policy(self, policy: Policy | None) -> int | None:
        if policy is None:
            return None
        check_policy(policy)
        return POLICIES.index(policy)

    def _vector(self, values: Any, name: str) -> Float32:
        """`values` as float32 [num_experts]; lists are converted, arrays must be right."""
        try:
            vector = cast("Float32", values) if isinstance(values, np.ndarray) else np.asarray(values, np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {values!r}, expected {self.config.num_experts} numbers") from None
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
        expert = integer("expert id", expert)
        if not 0 <= expert < self.config.num_experts:
            raise ValueError(f"expert id is {expert}, expected 0 <= id < {self.config.num_experts}")
        return expert


def _epochs(epochs: int | None) -> int:
    try:
        return _EPOCHS[epochs]
    except (KeyError, TypeError):  # TypeError: it cannot even be looked up
        raise ValueError(f"epochs is {epochs!r}, expected None (one per token), 1 (one in all) or 0 (none)") from None
