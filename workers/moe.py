"""The mixture-of-experts layer of a worker: route, pin, compute what is there, wait for the rest, combine.

Getting at the experts, whether they are in memory or not, is workers/expert_access.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RESIDUAL_POLICIES, RouterConfig
from hotset.shm import _core
from hotset.shm.layout import Section
from hotset.shm.segment import Segment
from hotset.workers.compute.experts import combine_in_rank_order, experts_forward, group_by_expert, row_norms
from hotset.workers.expert_access import ExpertAccess
from hotset.workers.prefetch.prefetcher import Prefetcher
from hotset.workers.prefetch.source import LayerStep

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

MAX_RESIDUAL_RATIO = 2.0
"""The most that a residual counts as beside the layer's expert outputs. 99 of 100 tokens of the model that the
policies were measured on are below it. In a model of many layers residuals can be 20 times as large as what one layer
adds: there the bare rules would never ask for an expert that is not in memory, in any layer."""


def router_config(model: ModelConfig, **policy: Any) -> RouterConfig:
    """The model's own gate, with `policy` as the preference for resident experts (fields of `RouterConfig`)."""
    return RouterConfig(
        num_experts=model.num_experts,
        top_k=model.experts_per_token,
        gating=model.family.gating,
        renormalize=model.normalize_top_k,
        weight_scale=model.weight_scale,
        num_groups=model.expert_groups,
        top_groups=model.top_expert_groups,
        **policy,
    )


class MixtureOfExperts:
    """Computes the expert part of each layer; called by the transformer once per layer and step.

    Args:
        segment: the arena.
        router: on the same arena.
        config: of the model.
        access: to the experts, this worker's.
        prefetcher: foresees what the next layers use; None for not.
    """

    def __init__(
        self,
        segment: Segment,
        router: MemoryAwareRouter,
        config: ModelConfig,
        access: ExpertAccess,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self._arena = segment.arena
        self._slots = segment.slots()
        self._formats = segment.view(Section.SLOT_INFO)[:, 0]["format"]
        self._access = access
        self._router = router
        self._prefetcher = prefetcher
        self._config = config
        self._measures_norms = router.config.policy in RESIDUAL_POLICIES
        self._leaves_out = router.config.policy == "substitute"
        self._exact: npt.NDArray[np.bool_] | bool = False  # per row, or of all rows
        self._streams: npt.NDArray[np.int32] | None = None

    def begin_step(self, exact: Sequence[bool], *, prefill: bool, streams: Sequence[int]) -> None:
        """Before each forward step: which rows take exactly the experts that the gate chooses, whatever is resident,
        under which counters the hits fall, and whose tokens the rows of a decode step are."""
        alike = all(exact) or not any(exact)
        self._exact = exact[0] if alike else np.array(exact)
        self._access.count_as(prefill=prefill)
        self._streams = None if prefill else np.asarray(streams, np.int32)
        if self._prefetcher is not None and not prefill:
            self._prefetcher.begin_step()

    def end_step(self) -> None:
        """After each forward step."""
        if self._prefetcher is not None and self._streams is not None:
            self._prefetcher.end_step(len(self._streams))

    def __call__(self, layer: int, hidden: Float32, gate_logits: Float32, residual: Float32) -> Float32:
        """hidden [rows, hidden_size], after its norm, and gate logits [rows, num_experts] -> weighted sum of outputs.

        An expert's rows are computed together, once, wherever in the batch they are. Raises `ExpertUnavailable`.
        """
        residual_norms = row_norms(residual) if self._measures_norms else None
        # A step is one epoch of affinity, however many rows it has.
        routed = self._router.route_batch(gate_logits, layer, epochs=1, **self._preference(layer, residual_norms))
        # The demand is what the gate chose, not what was taken instead because it is in memory: that would look useful
        # for ever, and what is displaced useless.
        wanted = self._router.true_top_k(gate_logits, layer) if routed.changed else routed.experts
        if self._streams is None:  # a prefill wants most experts, in no order that says what comes next
            self._access.note_demand(layer, np.unique(wanted)[np.newaxis])
        else:
            self._access.note_demand(layer, wanted, self._streams)
        kept = in_true_top_k(routed.experts, wanted) if self._leaves_out and routed.changed else None
        selections = group_by_expert(routed.experts, kept)
        outputs = (np.empty if kept is None else np.zeros)((*routed.experts.shape, hidden.shape[1]), np.float32)
        if kept is not None:
            self._access.count_left_out(np.unique(routed.experts).size - len(selections))
        look_ahead = None
        if self._prefetcher is not None and self._streams is not None:
            foresee = partial(self._foresee, residual_norms)
            step = LayerStep(layer, routed.experts, gate_logits, residual, foresee)
            look_ahead = partial(self._prefetcher.after_routing, step)
        for found in self._access.resident_together(layer, list(selections), look_ahead):
            experts_forward(
                hidden,
                [selections[expert] for expert, _ in found],
                [self._slots[slot] for _, slot in found],
                [self._formats.item(slot) for _, slot in found],
                self._config,
                outputs,
            )
        if self._measures_norms:
            norms = row_norms(outputs)
            computed = norms.size if kept is None else max(1, np.count_nonzero(kept))
            self._arena.note_expert_norm(layer, float(np.add.reduce(norms, None)) / computed, len(outputs))
        # In rank order, so that the sum does not depend on which expert arrived first.
        return combine_in_rank_order(outputs, routed.weights)

    def _foresee(self, residual_norms: Float32 | None, layer: int, gate_logits: Float32) -> dict[int, float]:
        return self._router.foresee(gate_logits, layer, **self._preference(layer, residual_norms))

    def _preference(self, layer: int, residual_norms: Float32 | None) -> dict[str, Any]:
        """How far the step's rows may go from what the layer's gate chooses: arguments of the router. The norms are
        None under policies that regard none."""
        if self._exact is True:
            return {"policy": "off"}
        options: dict[str, Any] = {}
        if self._exact is not False:  # 0 is "off" for a row
            options["strength"] = np.where(self._exact, np.float32(0), np.float32(self._router.strength))
        if residual_norms is not None:
            options["residual_ratio"] = residual_ratio(self._arena, layer, residual_norms, self._config.weight_scale)
        return options


def in_true_top_k(experts: Int32, wanted: Int32) -> npt.NDArray[np.bool_]:
    """Which of `experts` [rows, top_k] are among those that the gate chose, `wanted` [rows, top_k].

    Under the policy "substitute" the others are not computed: they are the resident experts of least weight, in the
    place of what is missing and matters little.
    """
    return (experts[:, :, np.newaxis] == wanted[:, np.newaxis, :]).any(axis=2)


def residual_ratio(arena: _core.Arena, layer: int, residual_norms: Float32, weight_scale: float) -> Float32:
    """How large residuals of these norms are beside the layer's expert outputs times `weight_scale`, the factor on all
    mixing weights: float32 [rows], at most `MAX_RESIDUAL_RATIO`.

    0, which makes routing exact, as long as no output has been seen.
    """
    norm = arena.expert_norm(layer)
    if not norm:
        return np.zeros_like(residual_norms)
    norm *= weight_scale
    if not norm:  # nothing is added
        return np.full_like(residual_norms, MAX_RESIDUAL_RATIO)
    return np.minimum(residual_norms / np.float32(norm), np.float32(MAX_RESIDUAL_RATIO))
