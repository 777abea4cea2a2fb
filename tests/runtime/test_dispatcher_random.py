"""The dispatcher under random events: requests, aborts, compaction, steps, deaths, in any order, with every message
delayed at will. Whatever happens, every request ends with the tokens it would have got alone, and all pages come back.

The workers are played. Their model is a hash of all tokens so far, and the KV row of a token is that hash: a wrong
share, a page moved under its writer, or a row that was never written is noticed by the next step.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from played_instance import END_OF_TEXT, PlayedInstance

from hotset.runtime.completion import completion
from hotset.runtime.dispatcher import MAX_CLIENT_BACKLOG
from hotset.runtime.messages import (
    Defragment,
    Defragmented,
    RowProgress,
    RunSequence,
    SequenceFailed,
    SequenceStopped,
    StopSequence,
    Submit,
)
from hotset.runtime.sampling_params import SamplingParams

ROW_NBYTES = 16
WORKERS = 3
MAX_MODEL_LEN = 30  # not a whole number of pages
START = bytes(ROW_NBYTES)
PROMPTS = [[10], [10, 11, 12, 10], [10, 11, 12, 10, 11, 11, 12, 10], [10, 11, 12, 10, 12], [12] * 9, [11] * 17]


def kv_row(previous: bytes, token: int) -> bytes:
    """What stands for keys and values of a token: it depends on all tokens before it."""
    return hashlib.blake2b(previous + int(token).to_bytes(4, "little"), digest_size=ROW_NBYTES).digest()


def next_token(row: bytes) -> int:
    """What the model says behind a token; about every thirtieth time that the text ends."""
    return END_OF_TEXT if row[0] < 9 else 10 + row[1] % 3


def answer(prompt: list[int], limit: int) -> list[int]:
    """What a request gets that nothing happens to."""
    row = START
    for token in prompt:
        row = kv_row(row, token)
    tokens: list[int] = []
    while True:
        tokens.append(next_token(row))
        if completion(tokens[-1], len(prompt) + len(tokens), limit, (END_OF_TEXT,)):
            return tokens
        row = kv_row(row, tokens[-1])


class PlayedWorker:
    """Serves sequences as hotset.workers.worker does. What it has said and nobody has read yet is in `outbox`."""

    def __init__(self, instance: PlayedInstance, process: int) -> None:
        self.instance = instance
        self.process = process
        self.inbox: list[Any] = []
        self.outbox: deque[Any] = deque()
        self.sequences: dict[int, RunSequence] = {}
        self.known: dict[int, int] = {}

    def read(self, count: int) -> None:
        messages, self.inbox[:count] = self.inbox[:count], []
        for message in messages:
            match message:
                case RunSequence(row=row):
                    assert row not in self.sequences, "a row has one owner"
                    self.sequences[row], self.known[row] = message, message.known
                case StopSequence(row, request):
                    if row in self.sequences and self.sequences[row].request == request:
                        del self.sequences[row]
                    self.outbox.append(SequenceStopped(row, request))

    def rows_with_room(self) -> list[int]:
        return [row for row in self.sequences if self._num_computable(row) > 0]

    def _num_computable(self, row: int) -> int:
        return min(self.known[row], self.instance.room(row)) - self.instance.committed(row)

    def step(self, row: int, budget: int, stores: int = 3) -> None:
        """Computes up to `budget` tokens of a sequence. The stores are KV rows, token id, committed length; a worker
        that dies meanwhile does fewer.
        """
        instance, run = self.instance, self.sequences[row]
        ids, committed = instance.token_ids[row], instance.committed(row)
        end = committed + min(self._num_computable(row), budget)
        last = START
        for position in range(end):
            last = kv_row(last, ids[position])
            if position < committed:
                assert instance.kv_row(row, position).tobytes() == last, f"wrong row at {position} of {run.request}"
            else:
                instance.kv_row(row, position)[:] = np.frombuffer(last, np.uint8)
        if stores == 1:
            return
        finish = None
        if end == self.known[row]:
            ids[end] = token = next_token(last)
            self.known[row] += 1
            finish = completion(token, self.known[row], run.limit, (END_OF_TEXT,))
        if stores == 2:
            return
        instance.commit(row, end)
        if finish:
            del self.sequences[row]
        self.outbox.append(RowProgress(row, end, finish))

    def fail(self, row: int) -> None:
        del self.sequences[row]
        self.outbox.append(SequenceFailed([row], "no expert"))


class Events(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(8, 20), max_sequences=st.integers(1, 5))
    def begin(self, num_pages: int, max_sequences: int) -> None:
        self.instance = PlayedInstance(num_pages, WORKERS, max_sequences, MAX_MODEL_LEN)
        self.dispatcher, self.cache = self.instance.dispatcher, self.instance.cache
        self.workers = [self._start(process) for process in range(WORKERS)]
        self.ready = set(range(WORKERS))
        self.expected: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.failed: set[int] = set()
        self.questions = 0
        self.kept: dict[tuple[int, int], tuple[int, bytes]] = {}  # a reader's: (page, offset) -> generation, row

    def _start(self, process: int) -> PlayedWorker:
        worker = PlayedWorker(self.instance, process)
        self.instance.inbox[process] = worker.inbox
        return worker

    # ---- the client

    @rule(prompt=st.sampled_from(PROMPTS), max_tokens=st.integers(1, 29))
    def submit(self, prompt: list[int], max_tokens: int) -> None:
        number = len(self.expected)
        self.expected[number] = answer(prompt, min(len(prompt) + max_tokens, MAX_MODEL_LEN))
        params = SamplingParams(max_tokens=max_tokens)
        self.dispatcher.submit(Submit(number, np.asarray(prompt, np.int32).tobytes(), params))
        self.dispatcher.dispatch(self.ready)

    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        if self.expected:
            number = which % len(self.expected)
            self.aborted.add(number)
            self.dispatcher.abort(number)
            self.dispatcher.dispatch(self.ready)

    @rule(max_moves=st.sampled_from([None, 0, 1, 2]))
    def defragment(self, max_moves: int | None) -> None:
        self.questions += 1
        self.dispatcher.defragment(Defragment(-self.questions, max_moves))
        self.dispatcher.dispatch(self.ready)

    @rule()
    def stop_reading(self) -> None:
        self.instance.client.pending_nbytes = MAX_CLIENT_BACKLOG + 1

    @rule()
    def read_on(self) -> None:
        self.instance.client.pending_nbytes = 0
        self.dispatcher.collect_all()

    # ---- workers

    @rule(process=st.integers(0, WORKERS - 1), count=st.sampled_from([1, 99]))
    def worker_reads(self, process: int, count: int) -> None:
        if process in self.ready:
            self.workers[process].read(count)

    @rule(process=st.integers(0, WORKERS - 1), which=st.integers(0, 9), budget=st.integers(1, 12))
    def worker_steps(self, process: int, which: int, budget: int) -> None:
        rows = self.workers[process].rows_with_room()
        if rows:
            self.workers[process].step(rows[which % len(rows)], budget)

    @rule(process=st.integers(0, WORKERS - 1), rounds=st.integers(1, 8))
    def worker_steps_with_all_it_has(self, process: int, rounds: int) -> None:
        for _ in range(rounds):
            for row in self.workers[process].rows_with_room():
                self.workers[process].step(row, 12)

    @rule(process=st.integers(0, WORKERS - 1), which=st.integers(0, 9))
    def step_fails(self, process: int, which: int) -> None:
        rows = self.workers[process].rows_with_room()
        if rows:
            row = rows[which % len(rows)]
            self.failed.add(self.workers[process].sequences[row].request)
            self.workers[process].fail(row)

    @rule(process=st.integers(0, WORKERS - 1), count=st.sampled_from([1, 99]))
    def coordinator_reads(self, process: int, count: int) -> None:
        outbox = self.workers[process].outbox
        for _ in range(min(count, len(outbox))):
            self._hear(process, outbox.popleft())
        self.dispatcher.dispatch(self.ready)

    def _hear(self, process: int, message: Any) -> None:
        match message:
            case RowProgress():
                self.dispatcher.progress(process, message)
            case SequenceStopped(row, request):
                self.dispatcher.stopped(row, request)
            case SequenceFailed(rows, reason):
                self.dispatcher.failed(process, rows, reason)

    @rule(process=st.integers(0, WORKERS - 1), which=st.integers(0, 9), stores=st.integers(0, 3))
    def worker_dies(self, process: int, which: int, stores: int) -> None:
        worker = self.workers[process]
        rows = worker.rows_with_room()
        if stores and rows:
            worker.step(rows[which % len(rows)], 12, stores)
            if stores == 3:
                worker.outbox.pop()  # committed, but it could not say so any more
        self.coordinator_reads(process, 99)
        self.ready.discard(process)
        self.workers[process] = self._start(process)
        self.dispatcher.worker_died(process, "was killed by SIGKILL")
        self.dispatcher.dispatch(self.ready)

    @rule(process=st.integers(0, WORKERS - 1))
    def worker_is_ready(self, process: int) -> None:
        self.ready.add(process)
        self.dispatcher.dispatch(self.ready)

    # ---- a reader of pages that it does not serve

    @rule(which=st.integers(0, 9), position=st.integers(0, MAX_MODEL_LEN))
    def reader_keeps_a_row(self, which: int, position: int) -> None:
        running = list(self.instance.scheduler.running.values())
        if running:
            row = running[which % len(running)].row
            if position < self.instance.committed(row):
                index, offset = divmod(position, self.instance.geometry.block_size)
                page = int(self.instance.block_tables[row, index])
                bytes_now = self.instance.kv_row(row, position).tobytes()
                self.kept[page, offset] = int(self.instance.generations[page]), bytes_now

    # ---- what always holds

    @invariant()
    def the_bookkeeping_is_consistent(self) -> None:
        if not hasattr(self, "instance"):
            return
        self.cache.check()
        for request in self.instance.scheduler.running.values():
            table = self.cache.block_table(request.sequence)
            assert self.instance.room(request.row) == len(table) * self.instance.geometry.block_size
            assert self.instance.block_tables[request.row, : len(table)].tolist() == table

    @invariant()
    def a_reader_never_takes_new_bytes_for_old_ones(self) -> None:
        if not hasattr(self, "instance"):
            return
        for (page, offset), (generation, row) in self.kept.items():
            if int(self.instance.generations[page]) == generation:
                start = offset * ROW_NBYTES
                assert self.instance.pages[page, start : start + ROW_NBYTES].tobytes() == row

    @invariant()
    def nobody_gets_a_wrong_token(self) -> None:
        if not hasattr(self, "instance"):
            return
        for number, expected in self.expected.items():
            tokens = self.instance.client.tokens(number)
            assert tokens == expected[: len(tokens)]

    def teardown(self) -> None:
        """Lets everything go on until nothing moves any more."""
        if not hasattr(self, "instance"):
            return
        for process in range(WORKERS):
            self.worker_is_ready(process)
        self.read_on()
        moving = True
        while moving:
            moving = False
            for process, worker in enumerate(self.workers):
                moving |= bool(worker.inbox or worker.outbox or worker.rows_with_room())
                worker.read(99)
                self.worker_steps_with_all_it_has(process, 1)
                self.coordinator_reads(process, 99)
                self.cache.check()
        client, scheduler = self.instance.client, self.instance.scheduler
        for number, expected in self.expected.items():
            finishes = client.finishes(number)
            assert len(finishes) == 1, f"request {number} ended {len(finishes)} times"
            if finishes[0] in ("stop", "length"):
                assert client.tokens(number) == expected
            elif finishes[0] == "abort":
                assert number in self.aborted
        answered = [message.query for message in client.messages if isinstance(message, Defragmented)]
        assert sorted(answered) == list(range(-self.questions, 0))
        assert not scheduler.running and not scheduler.waiting
        assert self.cache.num_used_pages == 0


Events.TestCase.settings = settings(
    max_examples=60, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEvents = Events.TestCase
