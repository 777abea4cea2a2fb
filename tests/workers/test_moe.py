"""What a layer of experts tells whoever keeps the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import cast

import numpy as np
import pytest

from hotset.runtime.config import TRAINED_MODEL, RoutingPolicy
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.router import MemoryAwareRouter
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.layout import WeightFormat
from hotset.shm.segment import Segment
from hotset.workers.expert_access import ExpertAccess
from hotset.workers.moe import MixtureOfExperts, router_config

RESIDENT = range(8)


class Access:
    """Every expert is at hand."""

    def __init__(self) -> None:
        self.demands: list[np.ndarray] = []
        self.used: set[int] = set()
        self.left_out = 0

    def count_left_out(self, count: int) -> None:
        self.left_out += count

    def count_as(self, *, prefill: bool) -> None: ...

    def note_demand(self, layer: int, experts: np.ndarray, streams: np.ndarray | None = None) -> None:
        self.demands.append(experts.copy())

    def resident_together(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        self.used |= {*experts}
        yield [(expert, 0) for expert in experts]


@contextmanager
def arena_of(model: ModelConfig) -> Iterator[Segment]:
    """One layer, of which the experts RESIDENT are in slots."""
    nbytes = 3 * model.hidden_size * model.intermediate_size * 2
    geometry = Geometry(
        num_layers=1,
        num_experts=model.num_experts,
        pins_per_process=model.experts_per_token,
        slot_classes=(SlotClass(len(RESIDENT), nbytes),),
    )
    with closing(Segment.private(geometry)) as segment:
        for expert in RESIDENT:
            segment.arena.load_begin(expert, expert)
            segment.arena.load_publish(expert, 0, nbytes, WeightFormat.BFLOAT16, 0)
        yield segment


@pytest.mark.parametrize(("routing", "exact"), [("bonus", False), ("bonus", True), ("off", False)])
def test_a_decode_step_demands_what_the_gate_chose_whatever_was_used_instead(
    routing: RoutingPolicy, exact: bool
) -> None:
    model = ModelConfig.load(TRAINED_MODEL)
    options = {"cache_bonus": 1.0} if routing == "bonus" else {}
    with arena_of(model) as segment:
        router = MemoryAwareRouter(router_config(model, policy=routing, **options), num_layers=1, segment=segment)
        access = Access()
        layer = MixtureOfExperts(segment, router, model, cast("ExpertAccess", access))
        random = np.random.default_rng(0)
        hidden, logits = (random.normal(size=(3, n)).astype(np.float32) for n in (model.hidden_size, model.num_experts))
        layer.begin_step([exact] * 3, prefill=False, streams=[0, 1, 2])
        layer(0, hidden, logits, hidden)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : model.experts_per_token]
    (demand,) = access.demands
    assert demand.tolist() == chosen.tolist()
    assert (access.used != {*chosen.ravel().tolist()}) == (routing == "bonus" and not exact)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_stands_in_for_what_is_missing_is_not_computed(rows: int) -> None:
    model = ModelConfig.load(TRAINED_MODEL)
    with arena_of(model) as segment:
        for slot in segment.slots():
            slot[:] = 0x3C  # a small number in bfloat16
        segment.arena.note_expert_norm(0, 1.0, 1)
        router = MemoryAwareRouter(
            router_config(model, policy="substitute", substitute_limit=0.1), num_layers=1, segment=segment
        )
        access = Access()
        layer = MixtureOfExperts(segment, router, model, cast("ExpertAccess", access))
        random = np.random.default_rng(5)
        hidden = np.ones((rows, model.hidden_size), np.float32)
        logits = random.normal(size=(rows, model.num_experts)).astype(np.float32)
        routed = router.route_batch(logits, residual_ratio=np.full(rows, 2.0, np.float32))
        chosen = router.true_top_k(logits)
        assert routed.changed
        layer.begin_step([False] * rows, prefill=False, streams=[*range(rows)])
        result = layer(0, hidden, logits, hidden)
    computed = {*chosen.ravel().tolist()} & {*routed.experts.ravel().tolist()}
    assert access.used == computed
    assert access.left_out == len({*routed.experts.ravel().tolist()}) - len(computed)
    # All experts are alike here, so a row is the sum of the weights that are left.
    kept = (routed.experts[:, :, None] == chosen[:, None, :]).any(axis=2)
    one = result[0, 0] / routed.weights[0][kept[0]].sum()
    assert result[:, 0] == pytest.approx(one * (routed.weights * kept).sum(axis=1), rel=1e-5)
