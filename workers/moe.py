"""The mixture-of-experts layer of a worker: route, pin, compute what is there, wait for the rest, combine.

The worker's side of the residency protocol (shm/core/residency.h): an expert's id is in this worker's pin row from
before its slot is looked up until its result is computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.router import MemoryAwareRouter
from hotset.shm.counters import Counter
from hotset.shm.layout import Section
from hotset.shm.paging_queue import PagingMessage, PagingQueue
from hotset.shm.segment import Segment
from hotset.workers.compute.experts import combine_in_rank_order, expert_forward, group_by_expert

WAIT_MICROSECONDS = 50_000

Float32 = npt.NDArray[np.float32]


class ExpertUnavailable(HotsetError):
    """The pager has given an expert up: its bytes cannot be loaded."""

    def __init__(self, layer: int, expert: int) -> None:
        super().__init__(f"expert {expert} of layer {layer} cannot be loaded: the checkpoint's bytes are damaged")
        self.layer = layer
        self.expert = expert


class MixtureOfExperts:
    """Computes the expert part of each layer; called by the transformer once per layer and step.

    Args:
        segment: the arena.
        queue: for urgent requests.
        router: on the same arena.
        process: this worker's row of pins and counters.
        config: of the model.
    """

    def __init__(
        self,
        segment: Segment,
        queue: PagingQueue,
        router: MemoryAwareRouter,
        process: int,
        config: ModelConfig,
    ) -> None:
        self._arena = segment.arena
        self._slots = segment.view(Section.EXPERT_SLOTS)
        self._slot_info = segment.view(Section.SLOT_INFO)
        self._queue = queue
        self._router = router
        self._process = process
        self._config = config
        self._num_experts = config.num_experts
        self._exact = np.zeros(0, np.bool_)
        self._pins = segment.layout.geometry.pins_per_process
        self._hit_counter = Counter.DECODE_EXPERT_HITS
        self._miss_counter = Counter.DECODE_EXPERT_MISSES

    def begin_step(self, exact: Sequence[bool], *, prefill: bool) -> None:
        """Before each forward step: which rows take exactly the experts that the gate chooses, whatever is resident,
        and under which counters the hits fall."""
        self._exact = np.asarray(exact, np.bool_)
        self._hit_counter = Counter.PREFILL_EXPERT_HITS if prefill else Counter.DECODE_EXPERT_HITS
        self._miss_counter = Counter.PREFILL_EXPERT_MISSES if prefill else Counter.DECODE_EXPERT_MISSES

    def __call__(self, layer: int, hidden: Float32, gate_logits: Float32) -> Float32:
        """hidden [rows, hidden_size] and gate logits [rows, num_experts] -> weighted sum of the experts' outputs.

        An expert's rows are computed together, once, wherever in the batch they are. Raises `ExpertUnavailable`.
        """
        experts, weights = self._route(layer, gate_logits)
        selections = dict(group_by_expert(experts))
        outputs = np.empty((*experts.shape, hidden.shape[1]), np.float32)
        for expert, slot in self._resident(layer, list(selections)):
            info = self._slot_info[slot, 0]
            expert_forward(
                hidden,
                selections[expert],
                self._slots[slot, : info["nbytes"]],
                int(info["format"]),
                self._config,
                outputs,
            )
        # In rank order, so that the sum does not depend on which expert arrived first.
        return combine_in_rank_order(outputs, weights)

    def _route(self, layer: int, gate_logits: Float32) -> tuple[npt.NDArray[np.int32], Float32]:
        """Ids and mixing weights [rows, top_k]. A step is one epoch of affinity, however many rows it has."""
        if self._exact.all():
            result = self._router.route_batch(gate_logits, layer, policy="off", epochs=1)
        elif not self._exact.any():
            result = self._router.route_batch(gate_logits, layer, epochs=1)
        else:
            strength = np.where(self._exact, 0, self._router.strength).astype(np.float32)  # 0 is "off" for a row
            result = self._router.route_batch(gate_logits, layer, strength=strength, epochs=1)
        return result.experts, result.weights

    def _resident(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yields (expert, slot) of every expert, resident ones first; each is pinned until the next is asked for."""
        arena, process, first = self._arena, self._process, layer * self._num_experts
        free_pins = list(range(self._pins))
        waiting: dict[int, int] = {}  # expert -> pin
        remaining = list(reversed(experts))
        while remaining or waiting:
            missed: list[int] = []
            while remaining and free_pins:
                expert, pin = remaining.pop(), free_pins.pop()
                slot = arena.want(process, pin, first + expert)
                if slot < 0:
                    waiting[expert] = pin
                    missed.append(expert)
                    continue
                self._note_hit(first + expert)
                yield expert, slot
                arena.unpin(process, pin)
                free_pins.append(pin)
            if missed:
                arena.count(process, self._miss_counter, len(missed))
                self._request(layer, missed)
            if waiting:
                for expert, slot in self._wait(layer, waiting):
                    yield expert, slot
                    pin = waiting.pop(expert)
                    arena.unpin(process, pin)
                    free_pins.append(pin)

    def _note_hit(self, expert_id: int) -> None:
        self._arena.count(self._process, self._hit_counter, 1)
        if self._arena.take_prefetched(expert_id):
            self._arena.count(self._process, Counter.PREFETCH_HITS, 1)

    def _request(self, layer: int, experts: Sequence[int]) -> None:
        """Sets the urgent bits and sends one message for those that nobody had asked for yet."""
        first = layer * self._num_experts
        unasked = [expert for expert in experts if self._arena.request_urgent(first + expert)]
        if unasked:
            self._queue.send(PagingMessage(layer, unasked))  # if it does not fit, the bits are found by a rescan

    def _wait(self, layer: int, experts: Iterable[int]) -> list[tuple[int, int]]:
        """Sleeps until at least one of the pinned `experts` is resident; returns those that are, with their slots."""
        arena, first = self._arena, layer * self._num_experts
        began = time.monotonic_ns()
        while True:
            # Read before the check: an arrival between check and sleep changes it, and the sleep does not begin.
            generation = arena.generation(layer)
            found = [(expert, slot) for expert in experts if (slot := arena.find(first + expert)) >= 0]
            if found:
                arena.count(self._process, Counter.EXPERT_WAIT_NANOSECONDS, time.monotonic_ns() - began)
                return found
            for expert in experts:
                if arena.failed(first + expert):
                    raise ExpertUnavailable(layer, expert)
            self._request(layer, list(experts))
            arena.wait(layer, generation, WAIT_MICROSECONDS)
