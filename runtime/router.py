"""Memory-aware routing: which experts a token goes to, preferring those that are in memory.

Selection works on adjusted scores; mixing weights always come from the unmodified gate logits. The work of a batch is
one call into the kernel (shm/core/route.h), which also keeps the books: hits and misses, affinity, activations, the
probability mass given up. A row's weights do not depend, to the last bit, on the batch it is in, nor on the
instruction set; with the policy "off" its selection depends on nothing but its own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.argument_types import check_instance, integer, integers
from hotset.runtime.errors import HotsetError
from hotset.runtime.metrics import MoeMetrics
from hotset.runtime.paging_request import PagingRequest
from hotset.runtime.route_result import BatchRouteResult, Float32, Int32, RouteResult
from hotset.runtime.router_arguments import epochs_number, policy_number, residual_strength, vector
from hotset.runtime.router_config import GATINGS, POLICIES, Policy, RouterConfig
from hotset.runtime.settings import takes
from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment


class ResidencyBelongsToPager(HotsetError):
    """On an instance's arena only the pager says what is resident."""


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
        row = vector("logits", logits, self.config.num_experts)
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
                `RouterConfig`. Refused with other policies.
        """
        number = policy_number(policy)
        if residual_ratio is not None:
            strength = residual_strength(self.config, policy, strength, self.strength, residual_ratio)
        experts, weights = self._room_for(logits)
        report = self._core.route(logits, experts, weights, layer, number, strength, epochs_number(epochs), prefetch)
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
        return self._core.bind(logits, experts, weights, layer, policy_number(policy), strength, epochs_number(epochs))

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
        number = policy_number(policy)
        if residual_ratio is not None:
            strength = residual_strength(self.config, policy, strength, self.strength, residual_ratio)
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
        adjusted = vector("scores", scores, self.config.num_experts).copy()
        if self.config.memory_aware:
            adjusted[list(self._core.resident(layer))] += np.float32(self.config.cache_bonus)
        return adjusted

    def select_top_k(self, scores: Float32) -> Int32:
        """The `top_k` ids of `scores` [num_experts] by (score descending, id ascending), NaN last."""
        ids = np.empty(self.config.top_k, np.int32)
        self._core.select(vector("scores", scores, self.config.num_experts), ids)
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
