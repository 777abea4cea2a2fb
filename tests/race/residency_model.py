"""The whole residency protocol as a model for the explorer: two workers, one pager with read lanes, its restart.

Kept in step with the code by hand. Each routine names what it mirrors; all C functions are in shm/core/residency.h:

    want, check         pin_set(), residency_find()
    request, wait       runtime/expert_pins.py `wait`: generation, find again, request_set(), send, futex_wait()
    use, unpin          reading the slot's bytes, pin_clear()
    serve               workers/pager.py `_serve_urgent`, `_serve_prefetch`, `_receive_messages`, `_rescan`
    evict               Arena.load_first(), for workers/slots.py `take`: evict_begin(), is_pinned()
    load_begin          Arena.load_first(): load_begin(); ReadLanes.begin()
    read_lane           workers/reading/core/read.h lane_read(), publish.h lanes_finish(): load_publish() and
                        futex_bump_and_wake() by the lane (R5)
    finish              workers/loads.py `finish`: nothing to do for what was published, else slot_release()
    overtake            workers/loads.py `overtake`, ReadLanes.promote()
    cancel              ReadLanes.cancel()
    recover             residency_recover()
    reclaim             Arena.unpin_all() by the coordinator

Left out, because no decision of the protocol depends on them: the residency, loading and prefetched masks (R4),
checksums. A lane reads one load at a time; that the real ones share a load's chunks changes nothing for the slot,
which is finished by one of them. What main thread and lanes do under their lock is one step, but for a lane's decision
to publish and the slot word: what the main thread could do in between is only more than it can. The slot's bytes are
two cells, so that a load can be seen half done. A generation is compared for equality only, so it is a flag for each
worker: something changed since it looked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from race.explorer import Await, Cell, Choose, Killable, Load, Next, Result, Routine, Store, Update, Value, explore

EMPTY, LOADING, RESIDENT, EVICTING = "EMPTY", "LOADING", "RESIDENT", "EVICTING"
URGENT, PREFETCH, CANCELLED, PUBLISHED = "URGENT", "PREFETCH", "CANCELLED", "PUBLISHED"  # what a load is
NOBODY = -1

Memory = Callable[[Cell], Value]


class Variant(NamedTuple):
    """The protocol as built, or with one mistake planted."""

    clear_bit_before_loading: bool = False
    check_before_pin: bool = False
    evict_without_reading_pins: bool = False
    recover_without_request: bool = False
    generation_after_request: bool = False
    no_wake_for_what_is_resident: bool = False
    prefetch_clears_urgent_bit: bool = False
    overtake_what_was_cancelled: bool = False
    free_slot_before_the_lane_stops: bool = False
    publish_what_was_cancelled: bool = False
    decide_before_the_lock: bool = False
    publish_without_wake: bool = False
    finish_before_resident: bool = False


AS_BUILT = Variant()


class Scenario(NamedTuple):
    """`wants`: the experts that each worker uses, one after the other. `resident`: what lies in the slots at first.
    `prefetches`: what was asked for by a worker that went on without it.

    The smallest legal pool for two workers with one pin and one read lane is 2 * 1 + 0 + 1 = 3 slots.
    """

    wants: tuple[tuple[int, ...], ...]
    resident: tuple[int, ...]
    lanes: int = 1
    prefetches: tuple[int, ...] = ()
    queue_length: int = 1
    kill_worker: bool = False
    kills_of_pager: int = 0
    timeout: bool = False  # whether a sleeping worker looks again by itself, as it does after 50 ms

    @property
    def experts(self) -> range:
        return range(1 + max(*self.resident, *self.prefetches, *(max(wants) for wants in self.wants)))

    def layer(self, expert: int) -> int:
        """Two layers, each with a futex of its own."""
        return expert % 2

    @property
    def slots(self) -> range:
        return range(len(self.resident))


class Residency:
    """The processes, over cells named ("slot", 0), ("urgent", 3) and so on."""

    def __init__(self, scenario: Scenario, variant: Variant) -> None:
        self.scenario = scenario
        self.variant = variant
        self.lanes = range(scenario.lanes)

    # ---- worker

    def want(self, worker: int, wants: tuple[int, ...]) -> Routine:
        if not wants:
            return None
        expert = wants[0]
        if self.variant.check_before_pin:
            slot = yield from self.find(expert)
            yield Store(("pin", worker), expert)
            return (self.use, worker, wants, slot) if slot != NOBODY else (self.request, worker, wants)
        yield Store(("pin", worker), expert)
        return self.check, worker, wants

    def find(self, expert: int) -> Any:
        slot = yield Load(("directory", expert))
        if slot == NOBODY:
            return NOBODY
        word = yield Load(("slot", slot))
        return slot if word == (expert, RESIDENT) else NOBODY

    def check(self, worker: int, wants: tuple[int, ...]) -> Routine:
        slot = yield from self.find(wants[0])
        return (self.use, worker, wants, slot) if slot != NOBODY else (self.request, worker, wants)

    def request(self, worker: int, wants: tuple[int, ...]) -> Routine:
        expert = wants[0]
        if not self.variant.generation_after_request:
            yield from self.read_generation(worker, expert)
        slot = yield from self.find(expert)
        if slot != NOBODY:
            return self.use, worker, wants, slot
        was_set = yield Update(("urgent", expert), lambda _: True, also=(("waiting", worker), expert))
        if self.variant.generation_after_request:
            yield from self.read_generation(worker, expert)
        return (self.wait if was_set else self.send), worker, wants

    def read_generation(self, worker: int, expert: int) -> Any:
        if not self.scenario.timeout:  # else nothing depends on it
            yield Update(("up to date", self.scenario.layer(expert)), lambda workers: workers | {worker})

    def send(self, worker: int, wants: tuple[int, ...]) -> Routine:
        def push(queue: tuple[int, ...]) -> tuple[int, ...]:
            full = len(queue) == self.scenario.queue_length  # then it is lost, and the bit alone says it
            return queue if full else (*queue, wants[0])

        yield Update("queue", push)
        return self.wait, worker, wants

    def wait(self, worker: int, wants: tuple[int, ...]) -> Routine:
        """Asleep while the generation is the one that was read."""
        if not self.scenario.timeout:
            generation = ("up to date", self.scenario.layer(wants[0]))
            yield Choose(lambda memory: [] if worker in memory(generation) else [True])
        return self.check, worker, wants

    def use(self, worker: int, wants: tuple[int, ...], slot: int) -> Routine:
        for half in ("first", "second"):
            weights = yield Load((half, slot), also=(("waiting", worker), NOBODY))
            assert weights == wants[0], f"computed with weights of {weights} for expert {wants[0]}"
        yield Store(("pin", worker), NOBODY)
        return self.want, worker, wants[1:]

    # ---- coordinator

    def reclaim(self, worker: int) -> Routine:
        yield Await(("dead", worker), True)
        yield Store(("pin", worker), NOBODY)
        return None

    # ---- pager

    def serve(self) -> Routine:
        """The slot words and the directory are this thread's own, so it reads them in one step."""

        def options(memory: Memory) -> list[tuple[Any, ...]]:
            jobs = [memory(("job", lane)) for lane in self.lanes]
            found: list[tuple[Any, ...]] = [
                ("finished", job[1], lane, job[0], memory(("kind", lane)))
                for lane, job in enumerate(jobs)
                if job is not None and job[2]
            ]
            # A rescan may come at any time, messages waiting or not.
            urgent = [("message", expert) for expert in memory("queue")[:1]]
            urgent += [("bit", expert) for expert in self.scenario.experts if memory(("urgent", expert))]
            found += [(what, expert, *self.load_of(expert, memory)) for what, expert in urgent]
            if not any(jobs):
                prefetches = [expert for expert in self.scenario.experts if memory(("prefetch", expert))]
                found += [("prefetch", expert, *self.load_of(expert, memory)) for expert in prefetches]
            return found

        what, expert, *where = yield Choose(options)
        if what == "finished":
            return self.finish, expert, *where
        state, lane = where
        if what == "message":
            yield Update("queue", lambda queue: queue[1:])
            if not (yield Load(("urgent", expert))):
                return (self.serve,)
        if state == LOADING and what != "prefetch":
            return self.overtake, expert, lane
        if state == EMPTY:
            # As a lane's job is its own until the main thread takes it, what is free now stays free.
            free = yield Choose(lambda memory: [*[n for n in self.lanes if memory(("job", n)) is None], NOBODY][:1])
            kind = PREFETCH if what == "prefetch" else URGENT
            return (self.evict, expert, kind, free, 0) if free != NOBODY else (self.cancel,)
        yield from self.withdraw(expert)
        if state == RESIDENT and not self.variant.no_wake_for_what_is_resident:
            yield from self.wake(expert)
        return (self.serve,)

    def load_of(self, expert: int, memory: Memory) -> tuple[str, int]:
        """The state of the expert, and the lane that loads it."""
        slot = memory(("directory", expert))
        held, state = memory(("slot", slot)) if slot != NOBODY else (NOBODY, EMPTY)
        jobs = [memory(("job", lane)) for lane in self.lanes]
        lanes = [lane for lane, job in enumerate(jobs) if job is not None and job[1] == expert]
        return (state if held == expert else EMPTY), (lanes[0] if lanes else NOBODY)

    def state_of(self, expert: int, memory: Memory) -> str:
        return self.load_of(expert, memory)[0]

    def withdraw(self, expert: int, kind: str = URGENT) -> Any:
        """A prefetch may yet be given up, so it does not answer an urgent request."""
        if kind == URGENT or self.variant.prefetch_clears_urgent_bit:
            yield Store(("urgent", expert), False)
        if expert in self.scenario.prefetches:
            yield Store(("prefetch", expert), False)

    def overtake(self, expert: int, lane: int) -> Routine:
        def promote(kind: str) -> str:
            return URGENT if kind == PREFETCH else kind

        kind = yield Update(("kind", lane), promote)
        if kind != CANCELLED or self.variant.overtake_what_was_cancelled:
            yield from self.withdraw(expert)
        return (self.serve,)

    def cancel(self) -> Routine:
        """Of the prefetch that may be under way; its lane reports the end of it."""

        def prefetches(memory: Memory) -> list[int]:
            return [*[lane for lane in self.lanes if self.is_prefetch(memory, lane)], NOBODY][:1]

        lane = yield Choose(prefetches)
        if lane != NOBODY:
            # It may be finished by now.
            kind = yield Update(("kind", lane), lambda kind: CANCELLED if kind == PREFETCH else kind)
            if kind == PREFETCH and self.variant.free_slot_before_the_lane_stops:
                slot, expert, _ = yield Load(("job", lane))
                yield Store(("directory", expert), NOBODY)
                yield Store(("slot", slot), (NOBODY, EMPTY))
        return (self.serve,)

    def is_prefetch(self, memory: Memory, lane: int) -> bool:
        return memory(("job", lane)) is not None and memory(("kind", lane)) == PREFETCH

    def evict(self, expert: int, kind: str, lane: int, first: int) -> Routine:
        """The first slot that can be had, so that all contend for one; else the bit stays, for the next rescan."""

        def victims(memory: Memory) -> list[Any]:
            words = ((slot, *memory(("slot", slot))) for slot in self.scenario.slots[first:])
            return [*[word for word in words if word[2] in (EMPTY, RESIDENT)][:1], *[None]][:1]

        victim = yield Choose(victims)
        if victim is None:
            if kind == PREFETCH:
                yield Store(("prefetch", expert), False)
                return (self.serve,)
            return (self.cancel,)
        slot, held, state = victim
        if state == EMPTY:
            return self.load_begin, expert, kind, lane, slot, NOBODY
        yield Store(("slot", slot), (held, EVICTING))
        if not self.variant.evict_without_reading_pins:
            for worker in range(len(self.scenario.wants)):
                if (yield Load(("pin", worker))) == held:
                    yield Store(("slot", slot), (held, RESIDENT))
                    return self.evict, expert, kind, lane, slot + 1
        return self.load_begin, expert, kind, lane, slot, held

    def load_begin(self, expert: int, kind: str, lane: int, slot: int, previous: int) -> Routine:
        if self.variant.clear_bit_before_loading:
            yield from self.withdraw(expert, kind)
        if previous != NOBODY:
            yield Store(("directory", previous), NOBODY)
        yield Store(("slot", slot), (expert, LOADING))
        yield Store(("directory", expert), slot)
        if not self.variant.clear_bit_before_loading:
            yield from self.withdraw(expert, kind)
        yield Store(("job", lane), (slot, expert, False), also=(("kind", lane), kind))
        return (self.serve,)

    def read_lane(self, lane: int) -> Routine:
        def unfinished(memory: Memory) -> list[Any]:
            job = memory(("job", lane))
            return [job] if job is not None and not job[2] else []

        (slot, expert, _) = yield Choose(unfinished)
        yield Store(("first", slot), expert)
        kind = yield Load(("kind", lane))
        if kind != CANCELLED:
            yield Store(("second", slot), expert)
        if not self.variant.decide_before_the_lock:
            kind = yield Update(("kind", lane), lambda kind: kind if kind == CANCELLED else PUBLISHED)
        finished = ("job", lane), (slot, expert, True)
        if kind != CANCELLED or self.variant.publish_what_was_cancelled:
            if self.variant.finish_before_resident:
                yield Store(*finished)
            # One step: the lock is held, and only the main thread looks at the job.
            yield Store(("slot", slot), (expert, RESIDENT), also=finished)
            if not self.variant.publish_without_wake:
                yield from self.wake(expert)
        else:
            yield Store(*finished)
        return self.read_lane, lane

    def finish(self, expert: int, lane: int, slot: int, kind: str) -> Routine:
        if kind == CANCELLED and not self.variant.free_slot_before_the_lane_stops:
            yield Store(("directory", expert), NOBODY)
            yield Store(("slot", slot), (NOBODY, EMPTY))
        yield Store(("job", lane), None)
        return (self.serve,)

    def wake(self, expert: int) -> Any:
        if not self.scenario.timeout:
            yield Store(("up to date", self.scenario.layer(expert)), frozenset())

    def recover(self) -> Routine:
        """What it reads is its own, and nobody else's after the kill, so it is read in one step."""

        def repairs(memory: Memory) -> list[tuple[tuple[Cell, Value], ...]]:
            stores: list[tuple[Cell, Value]] = []
            for expert in self.scenario.experts:
                if self.state_of(expert, memory) != RESIDENT:
                    stores.append((("directory", expert), NOBODY))
            for slot in self.scenario.slots:
                expert, state = memory(("slot", slot))
                if state == LOADING:
                    if not self.variant.recover_without_request:
                        stores.append((("urgent", expert), True))
                    stores.append((("slot", slot), (NOBODY, EMPTY)))
                elif state in (EVICTING, RESIDENT):
                    stores += [(("slot", slot), (expert, RESIDENT)), (("directory", expert), slot)]
            now = {cell: memory(cell) for cell, _ in stores}
            visible: list[tuple[Cell, Value]] = []
            for cell, value in stores:
                if now[cell] != value:  # a store of what is there already is seen by nobody: not a step
                    visible.append((cell, value))
                    now[cell] = value
            return [tuple(visible)]

        for cell, value in (yield Choose(repairs)):
            yield Store(cell, value)
        return (self.serve,)

    # ---- what must hold

    def invariant(self, memory: Memory) -> str | None:
        words = [memory(("slot", slot)) for slot in self.scenario.slots]
        held = [expert for expert, state in words if state != EMPTY]
        if len(held) != len(set(held)):
            return "an expert is in two slots"
        for slot, (expert, state) in enumerate(words):
            whole = (memory(("first", slot)), memory(("second", slot))) == (expert, expert)
            if state in (RESIDENT, EVICTING) and not whole:
                return f"slot {slot} says {state} over bytes that are not expert {expert}'s (R1)"
        for worker in range(len(self.scenario.wants)):
            expert = memory(("waiting", worker))
            if expert == NOBODY or memory(("dead", worker)):
                continue
            if not memory(("urgent", expert)) and expert not in held:
                return f"worker {worker} waits for expert {expert}, which nobody knows of (R3)"
        return None


def explore_residency(scenario: Scenario, variant: Variant = AS_BUILT, *, limit: int = 2_000_000) -> Result:
    model = Residency(scenario, variant)
    workers = range(len(scenario.wants))
    memory: dict[Cell, Value] = {"queue": ()}
    for lane in model.lanes:
        memory[("job", lane)] = None  # (slot, expert, finished)
        memory[("kind", lane)] = URGENT
    for worker in workers:
        memory[("pin", worker)] = NOBODY
        memory[("waiting", worker)] = NOBODY
        memory[("dead", worker)] = False
    for layer in range(2):
        memory[("up to date", layer)] = frozenset()
    for expert in scenario.experts:
        memory[("urgent", expert)] = False
        memory[("prefetch", expert)] = expert in scenario.prefetches
        memory[("directory", expert)] = scenario.resident.index(expert) if expert in scenario.resident else NOBODY
    for slot, expert in enumerate(scenario.resident):
        memory[("slot", slot)] = (expert, RESIDENT)
        memory[("first", slot)] = memory[("second", slot)] = expert
    processes: list[Next] = [(model.want, worker, scenario.wants[worker]) for worker in workers]
    serving = len(processes)
    processes += [(model.serve,), *((model.read_lane, lane) for lane in model.lanes)]
    killable: list[Killable] = []
    if scenario.kills_of_pager:
        restart: dict[int, Next] = {serving: (model.recover,)}
        restart |= {serving + 1 + lane: (model.read_lane, lane) for lane in model.lanes}
        jobs = tuple((("job", lane), None) for lane in model.lanes)
        killable.append(Killable(restart, scenario.kills_of_pager, also=jobs))
    if scenario.kill_worker:
        processes.append((model.reclaim, 0))
        killable.append(Killable({0: None}, also=((("dead", 0), True),)))
    return explore(memory, processes, model.invariant, killable=killable, must_end=workers, limit=limit)
