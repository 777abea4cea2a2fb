"""A worker of the routing stress test: routes random tokens and uses the selected experts as a serving worker does."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from stress_tests.affinity_replay import LoggedCall
from stress_tests.checks import Check, Scoreboard
from stress_tests.messages import (
    Burst,
    BurstLog,
    Failed,
    Idle,
    Pause,
    Ready,
    Run,
    StartWorker,
    ToWorker,
    Violation,
)
from stress_tests.selection_check import MaskSnapshot, NotJudged, SelectionCheck
from stress_tests.synthetic_experts import SyntheticExperts, format_of, nbytes_of_expert

from hotset.runtime.channel import Channel, ChannelClosed
from hotset.runtime.errors import HotsetError
from hotset.runtime.expert_pins import ExpertUnavailable
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import Policy, RouterConfig
from hotset.runtime.supervision import enter_child
from hotset.shm.counters import Counter
from hotset.shm.layout import PrefetchSource, Section, SlotState
from hotset.shm.paging_queue import PagingDirection, PagingMessage, PagingPriority, PagingQueue
from hotset.shm.segment import Segment, SegmentError
from hotset.workers.expert_access import ExpertAccess

NUM_ROWS = 4096  # distinct; the branch predictor learns a few hundred
MAX_BATCH = 32
SINGLES_PER_STEP = 4
CHECKED_SINGLES = 4  # one single call of so many is judged; every batch is
DWELL_SHARE = 0.05  # of the uses, during which the worker sleeps a little with the expert pinned
MAX_REPORTS = 20  # of violations in words; all are counted
POLICIES: tuple[Policy, ...] = ("off", "bonus", "range", "mass", "resnorm", "substitute")
SCOREBOARD = "scoreboard"

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


def skewed_logits(num_experts: int, popularity_seed: int, seed: int) -> Float32:
    """Gate logits [NUM_ROWS, num_experts]: some experts are popular with all workers, each row has noise of its own.

    One row in 64 has NaN and -inf, another exact ties.
    """
    popularity = np.random.default_rng(popularity_seed).permutation(np.linspace(2.5, -2.5, num_experts))
    random = np.random.default_rng(seed)
    rows = (popularity + random.standard_normal((NUM_ROWS, num_experts))).astype(np.float32)
    rows[::64][random.random((NUM_ROWS // 64, num_experts)) < 0.1] = np.nan
    rows[::64][random.random((NUM_ROWS // 64, num_experts)) < 0.1] = -np.inf
    rows[32::64] = np.round(rows[32::64])
    return rows


class UnpinnedAccess(ExpertAccess):
    """A planted violation: hands experts out without holding their pins."""

    def resident(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        for expert, slot in super().resident(layer, experts):
            self._arena.unpin_all(self._process)
            yield expert, slot


class RoutingWorker:
    """Steps are: route some tokens on one layer, then use every selected expert."""

    def __init__(self, channel: Channel[ToWorker], start: StartWorker) -> None:
        self._channel = channel
        self._process = start.process
        self._planted = start.planted
        geometry = start.plan.geometry
        self._geometry = geometry
        self._segment = Segment.attach(start.instance, geometry)
        self._arena = self._segment.arena
        self._slots = self._segment.slots()
        self._info = self._segment.view(Section.SLOT_INFO)
        self._experts = SyntheticExperts(Path(start.folder))
        self._scoreboard = Scoreboard(Path(start.folder) / SCOREBOARD, geometry.num_processes, start.process)
        self._queue = PagingQueue.attach(start.instance)
        access = UnpinnedAccess if start.planted == "use-unpinned" else ExpertAccess
        self._access = access(self._segment, self._queue, start.process)
        config = RouterConfig(num_experts=geometry.num_experts, top_k=start.top_k)
        self._router = MemoryAwareRouter(config, segment=self._segment, process=start.process)
        self._selection = SelectionCheck(config)
        self._random = np.random.default_rng(start.seed)
        self._logits = skewed_logits(geometry.num_experts, start.popularity_seed, start.seed)
        self._ids = np.empty(start.top_k, np.int32)
        self._weights = np.empty(start.top_k, np.float32)
        self._singles: dict[tuple[int, Policy], Callable[..., int]] = {
            (layer, policy): self._router.bind(self._logits, self._ids, self._weights, layer, policy=policy)
            for layer in range(geometry.num_layers)
            for policy in POLICIES
        }
        self._reports = 0

    def _report(self, check: Check, text: str) -> None:
        self._scoreboard.violated(check)
        if self._reports < MAX_REPORTS:
            self._reports += 1
            self._channel.send(Violation(check, f"worker {self._process}: {text}"))

    # ---- routing

    def _step(self) -> None:
        layer = int(self._random.integers(self._geometry.num_layers))
        policy = POLICIES[int(self._random.integers(len(POLICIES)))]
        selected: set[int] = set()
        if self._random.random() < 0.5:
            for row in self._random.integers(0, NUM_ROWS, SINGLES_PER_STEP).tolist():
                selected.update(self._route_single(layer, policy, row))
        else:
            selected.update(self._route_batch(layer, policy))
        self._access.note_demand(layer, np.array([sorted(selected)], np.int32))
        for expert, slot in self._access.resident(layer, sorted(selected)):
            self._use(layer * self._geometry.num_experts + expert, slot)
        if self._random.random() < 0.02:
            out = [int(self._random.integers(self._geometry.num_experts))]
            self._queue.send(PagingMessage(layer, out, PagingDirection.OUT, PagingPriority.NORMAL))
        self._arena.count(self._process, Counter.STEPS, 1)

    def _route_single(self, layer: int, policy: Policy, row: int) -> list[int]:
        route = self._singles[layer, policy]
        if self._random.integers(CHECKED_SINGLES):
            route(row)
            return self._ids.tolist()
        before = MaskSnapshot.take(self._arena, layer, self._selection.words)
        route(row)
        after = MaskSnapshot.take(self._arena, layer, self._selection.words)
        self._judge(
            before,
            after,
            self._logits[row : row + 1],
            self._ids[np.newaxis],
            self._weights[np.newaxis],
            policy,
        )
        return self._ids.tolist()

    def _route_batch(self, layer: int, policy: Policy) -> list[int]:
        tokens = int(self._random.integers(2, MAX_BATCH + 1))
        first = int(self._random.integers(0, NUM_ROWS - tokens))
        logits = self._logits[first : first + tokens]
        before = MaskSnapshot.take(self._arena, layer, self._selection.words)
        epochs = 1 if self._random.random() < 0.5 else None
        result = self._router.route_batch(logits, layer, policy=policy, epochs=epochs)
        after = MaskSnapshot.take(self._arena, layer, self._selection.words)
        self._judge(before, after, logits, result.experts, result.weights, policy)
        self._access.prefetch(layer, result.displaced, PrefetchSource.RUNNERS_UP)
        return np.unique(result.experts).tolist()

    def _judge(
        self,
        before: MaskSnapshot,
        after: MaskSnapshot,
        logits: Float32,
        experts: Int32,
        weights: Float32,
        policy: Policy,
    ) -> None:
        if self._planted == "selection":
            experts = np.roll(experts, 1, axis=1)
        try:
            problem = self._selection.problem(before, after, logits, experts, weights, policy)
        except NotJudged:
            return
        self._scoreboard.checked(Check.SELECTION)
        if problem is not None:
            self._report(Check.SELECTION, problem)

    # ---- using

    def _use(self, expert_id: int, slot: int) -> None:
        """While it is pinned: the slot stays the expert's, and its bytes are the expert's."""
        word = self._arena.slot(slot)
        self._check_slot(expert_id, slot)
        if self._random.random() < DWELL_SHARE:
            time.sleep(self._random.random() * 1e-3)
            self._check_slot(expert_id, slot)
        generation, expert, state = self._arena.slot(slot)
        # EVICTING: the pager looks whether the expert is pinned, and will find that it is.
        stays = (generation, expert) == (word[0], expert_id) and state in (
            SlotState.RESIDENT,
            SlotState.EVICTING,
        )
        self._scoreboard.checked(Check.PINS)
        if not stays:
            self._report(
                Check.PINS,
                f"slot {slot} of the pinned expert {expert_id} was {word} and became {(generation, expert, state)}",
            )

    def _check_slot(self, expert_id: int, slot: int) -> None:
        info = self._info[slot, 0]
        memory = self._slots[slot][: nbytes_of_expert(expert_id)]
        checksum, recorded = xxhash.xxh3_64_intdigest(memory), int(info["checksum"])
        self._scoreboard.checked(Check.SLOT_BYTES)
        if not checksum == recorded == self._experts.checksums[expert_id]:
            self._report(
                Check.SLOT_BYTES,
                f"slot {slot} has checksum {checksum:#x}, its record says {recorded:#x}, expert {expert_id} has "
                f"{self._experts.checksums[expert_id]:#x}",
            )
        self._scoreboard.checked(Check.FORMAT)
        if (int(info["nbytes"]), int(info["format"])) != (nbytes_of_expert(expert_id), format_of(expert_id)):
            self._report(
                Check.FORMAT,
                f"slot {slot} of expert {expert_id} has {info['nbytes']} bytes of format {info['format']}",
            )
        self._scoreboard.checked(Check.WHOLE)
        if not np.array_equal(memory.view(np.uint64), self._experts.contents[expert_id].view(np.uint64)):
            self._report(Check.WHOLE, f"slot {slot} has other bytes than expert {expert_id}")

    # ---- the burst

    def _burst(self, calls: int) -> None:
        """Nothing but routing, and the bounds from which the parent finds out which epochs each call took."""
        log: list[LoggedCall] = []
        selections: list[Int32] = []
        layers, rows = self._geometry.num_layers, NUM_ROWS - MAX_BATCH
        plan = self._random.integers(0, (layers, rows, 4, MAX_BATCH - 1), (calls, 4)).tolist()
        for layer, row, kind, more in plan:
            before = self._arena.load_u64(Section.LAYERS, layer, 0)
            if kind < 2:
                self._singles[layer, "bonus"](row)
                experts, epochs = self._ids[np.newaxis].copy(), 1
            else:
                logits = self._logits[row : row + 2 + more]
                experts = self._router.route_batch(logits, layer, epochs=1 if kind == 2 else None).experts
                epochs = 1 if kind == 2 else len(experts)
            after = self._arena.load_u64(Section.LAYERS, layer, 0)
            touched = min(
                self._arena.load_u64(Section.AFFINITY, layer, expert) & ((1 << 40) - 1)
                for expert in set(experts.ravel().tolist())
            )
            log.append(LoggedCall(layer, len(experts), epochs, before, after, touched))
            selections.append(experts)
        self._channel.send(BurstLog.of(self._process, log, np.concatenate(selections)))

    # ---- the loop

    def run(self) -> None:
        """Returns when the parent says so; raises `ChannelClosed` when it is gone."""
        running = False
        self._channel.send(Ready(self._process))
        while True:
            if not running or self._channel.pending_nbytes:
                select.select([self._channel], [self._channel] if self._channel.pending_nbytes else [], [])
                self._channel.flush()
            for message in self._channel.receive():
                match message:
                    case Run():
                        running = True
                    case Pause():
                        running = False
                        self._channel.send(Idle(self._process))
                    case Burst(calls):
                        self._burst(calls)
                    case StopWorking():
                        return
                    case StartWorker():
                        pass
            if running:
                self._step()


def main(arguments: list[str]) -> int:
    channel: Channel[ToWorker] = enter_child(arguments, ToWorker)
    try:
        start = channel.wait()
        if isinstance(start, StartWorker):
            RoutingWorker(channel, start).run()
    except ChannelClosed:
        return 0
    except (HotsetError, ExpertUnavailable, SegmentError, OSError) as error:
        channel.send(Failed(str(error)))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
