"""What an instance with a given routing, eviction and budget would hold and route to, without its processes.

Router and eviction policies are the real ones; experts are ids of which an account is kept.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.eviction import parse_eviction
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RESIDUAL_POLICIES, Policy
from hotset.shm.demands import HEADER_WORDS, demands_of_steps
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.segment import Segment
from hotset.workers.eviction._core import Cache
from hotset.workers.eviction.replay import make_policy
from hotset.workers.moe import in_true_top_k, residual_ratio, router_config

Floats = npt.NDArray[np.float32]


class Setting(msgspec.Struct, frozen=True):
    """One kind of instance.

    Attributes:
        routing, strength: the preference; "off" has no strength.
        eviction: as `parse_eviction` takes it.
        slots: experts in memory, per layer.
        batch: texts that an instance decodes at once, of which each step has a token.
        shared: all layers share the slots, as in the pager.
    """

    routing: Policy
    strength: float
    eviction: str
    slots: int
    batch: int = 1
    shared: bool = False


class SimulatedCache:
    """What an instance would hold, and how often it found there what it needed."""

    def __init__(self, config: ModelConfig, setting: Setting) -> None:
        policy = make_policy(
            parse_eviction(setting.eviction),
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            num_streams=setting.batch,
            slots_per_layer=setting.slots,
        )
        if setting.shared:
            self._cache = Cache(policy, setting.slots * len(config.expert_layers), shared=True)
        else:
            self._cache = Cache(policy, setting.slots)
        self.mask = np.zeros((config.num_layers, -(-config.num_experts // 64)), np.uint64)
        self._record = demands_of_steps(np.zeros((1, setting.batch, 1, config.experts_per_token), np.int64))
        self._wanted = self._record[HEADER_WORDS:].reshape(setting.batch, -1)[:, 1:]
        self.hits = self.misses = 0

    def use(self, layer: int, experts: npt.NDArray[np.int32], wanted: npt.NDArray[np.integer]) -> None:
        """A step of the layer uses `experts` [batch, top_k]. The policy learns `wanted`, what the gate chose."""
        self._record[1] = layer
        self._wanted[:] = wanted
        hits, misses = self._cache.step(self._record, experts, self.mask)
        self.hits += hits
        self.misses += misses


class SimulatedInstance:
    """Routes its rows by what its cache holds. The mask changes as soon as a layer has been routed: what it selected is
    loaded before the step ends. `bias`: of the gates (workers/compute/gates.py)."""

    def __init__(self, config: ModelConfig, setting: Setting, bias: Floats | None) -> None:
        self._setting = setting
        self._weight_scale = config.weight_scale
        self._segment = Segment.private(Geometry(num_layers=config.num_layers, num_experts=config.num_experts))
        self._resident = self._segment.view(Section.RESIDENT_MASK)
        self._router = MemoryAwareRouter(
            router_config(config, policy=setting.routing, timing=False),
            num_layers=config.num_layers,
            segment=self._segment,
            selection_bias=bias,
        )
        self.cache = SimulatedCache(config, setting)
        self.measures_norms = setting.routing in RESIDUAL_POLICIES

    def route(self, layer: int, gate_logits: Floats, residual_norms: Floats) -> tuple[npt.NDArray[np.int32], Floats]:
        ratio = None
        if self.measures_norms:
            ratio = residual_ratio(self._segment.arena, layer, residual_norms, self._weight_scale)
        routed = self._router.route_batch(
            gate_logits, layer, strength=self._setting.strength, epochs=1, residual_ratio=ratio
        )
        wanted = self._router.true_top_k(gate_logits, layer)
        self.cache.use(layer, routed.experts, wanted)
        self._resident[:, : self.cache.mask.shape[1]] = self.cache.mask
        if self._setting.routing == "substitute":  # a worker does not compute them
            routed.weights[~in_true_top_k(routed.experts, wanted)] = 0
        return routed.experts, routed.weights

    def note_norms(self, layer: int, norms: Floats) -> None:
        """Of the outputs of its rows' experts, float32 [batch], a row's mean each."""
        self._segment.arena.note_expert_norm(layer, float(norms.mean()), len(norms))
