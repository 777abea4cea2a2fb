"""The dispatcher under random events: requests, aborts, compaction, steps, deaths, in any order, with every message
delayed at will. Whatever happens, every request ends with the tokens it would have got alone, and all pages come back.

The workers are played. Their model is a hash of all tokens so far, and the KV row of a token is that hash: a wrong
share, a page moved under its writer, or a row that was never written is noticed by the next step. Where layers have
windows, each group's row is another hash, and a step looks at those that it sees.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
from played_instance import END_OF_TEXT, PlayedInstance

from hotset.runtime.completion import completion
from hotset.runtime.dispatcher import MAX_CLIENT_BACKLOG
from hotset.runtime.kv.layer_groups import pages_of_sequence
from hotset.runtime.kv.page_pool import NO_PAGE
from hotset.runtime.messages.client import Defragment, Defragmented, Submit
from hotset.runtime.messages.worker import RowProgress, RunSequence, SequenceFailed, SequenceStopped, StopSequence
from hotset.runtime.sampling_params import SamplingParams
from hotset.runtime.scheduler import RequestState

ROW_NBYTES = 16
WORKERS = 3
MAX_MODEL_LEN = 30  # not a whole number of pages
START = bytes(ROW_NBYTES)
PROMPTS = [[10], [10, 11, 12, 10], [10, 11, 12, 10, 11, 11, 12, 10], [10, 11, 12, 10, 12], [12] * 9, [11] * 17]


def row_of_group(row: bytes, group: int) -> bytes:
    return bytes(byte ^ group for byte in row)


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
        self._asleep = False

    def read(self, count: int) -> None:
        messages, self.inbox[:count] = self.inbox[:count], []
        for message in messages:
            self._asleep = False
            match message:
                case RunSequence(row=row):
                    assert row not in self.sequences, "a row has one owner"
                    self.sequences[row], self.known[row] = message, message.known
                case StopSequence(row, request):
                    if row in self.sequences and self.sequences[row].request == request:
                        del self.sequences[row]
                    self.outbox.append(SequenceStopped(row, request))

    def rows_with_room(self) -> list[int]:
        """Who finds none sleeps until a message comes."""
        rows = [] if self._asleep else [row for row in self.sequences if self._num_computable(row) > 0]
        self._asleep = not rows
        return rows

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
            for group, window in enumerate(instance.cache.windows):
                row_bytes = row_of_group(last, group)
                if position >= committed:
                    instance.kv_row(row, position, group)[:] = np.frombuffer(row_bytes, np.uint8)
                elif not window or position > committed - window:
                    found = instance.kv_row(row, position, group).tobytes()
                    assert found == row_bytes, f"wrong row at {position} of {run.request} in group {group}"
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


class RandomEvents:
    """One random event at a time. `checks` and `finish` say what must hold after each, and in the end."""

    def __init__(self, seed: int, windows: tuple[int, ...] = (0,), max_step: int | None = None) -> None:
        self.random = random.Random(seed)
        least = pages_of_sequence(windows, MAX_MODEL_LEN, 4, max_step)
        self.instance = PlayedInstance(
            num_pages=self.random.randint(least, 2 * least),
            num_workers=WORKERS,
            max_sequences=self.random.randint(1, 5),
            max_model_len=MAX_MODEL_LEN,
            windows=windows,
            max_step=max_step,
        )
        self.dispatcher, self.cache = self.instance.dispatcher, self.instance.cache
        self.workers = [self._start(process) for process in range(WORKERS)]
        self.ready = set(range(WORKERS))
        self.expected: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.questions = 0
        self.kept: dict[tuple[int, int], tuple[int, bytes]] = {}  # a reader's: (page, offset) -> generation, row
        weights = {
            self.submit: 6,
            self.abort: 2,
            self.defragment: 2,
            self.client_stops_reading: 1,
            self.client_reads_on: 1,
            self.worker_reads: 8,
            self.worker_steps: 16,
            self.step_fails: 0.2,
            self.coordinator_reads: 8,
            self.worker_dies: 0.7,
            self.worker_is_ready: 3,
            self.reader_keeps_a_row: 4,
        }
        # Each run has its own mixture, so that some are full of deaths, some never out of requests, ...
        self.events = list(weights)
        self.weights = [weight * self.random.choice([0.1, 0.5, 1, 3]) for weight in weights.values()]

    def _start(self, process: int) -> PlayedWorker:
        worker = PlayedWorker(self.instance, process)
        self.instance.inbox[process] = worker.inbox
        return worker

    def _some_worker(self) -> PlayedWorker:
        return self.random.choice(self.workers)

    def step(self) -> None:
        self.random.choices(self.events, self.weights)[0]()
        self.check()

    # ---- the client

    def submit(self) -> None:
        number, prompt, max_tokens = len(self.expected), self.random.choice(PROMPTS), self.random.randint(1, 29)
        self.expected[number] = answer(prompt, min(len(prompt) + max_tokens, MAX_MODEL_LEN))
        params = SamplingParams(max_tokens=max_tokens)
        self.dispatcher.submit(Submit(number, np.asarray(prompt, np.int32).tobytes(), params))
        self.dispatcher.dispatch(self.ready)

    def abort(self) -> None:
        open_requests = [number for number in self.expected if not self.instance.client.finishes(number)]
        if open_requests:
            number = self.random.choice(open_requests)
            self.aborted.add(number)
            self.dispatcher.abort(number)
            self.dispatcher.dispatch(self.ready)

    def defragment(self) -> None:
        self.questions += 1
        self.dispatcher.defragment(Defragment(-self.questions, self.random.choice([None, 0, 1, 2])))
        self.dispatcher.dispatch(self.ready)

    def client_stops_reading(self) -> None:
        self.instance.client.pending_nbytes = MAX_CLIENT_BACKLOG + 1

    def client_reads_on(self) -> None:
        self.instance.client.pending_nbytes = 0
        self.dispatcher.collect_all()

    # ---- workers

    def worker_reads(self) -> None:
        worker = self._some_worker()
        if worker.process in self.ready:
            worker.read(self.random.choice([1, 99]))

    def worker_steps(self) -> None:
        worker = self._some_worker()
        for _ in range(self.random.choice([1, 1, 4, 12])):
            for row in worker.rows_with_room():
                if self.random.random() < 0.8:
                    worker.step(row, self.random.choice([1, 5, 12]))

    def step_fails(self) -> None:
        worker = self._some_worker()
        if rows := worker.rows_with_room():
            worker.fail(self.random.choice(rows))

    def coordinator_reads(self) -> None:
        self._hear(self._some_worker(), self.random.choice([1, 99]))
        self.dispatcher.dispatch(self.ready)

    def _hear(self, worker: PlayedWorker, count: int) -> None:
        for _ in range(min(count, len(worker.outbox))):
            match message := worker.outbox.popleft():
                case RowProgress():
                    self.dispatcher.progress(worker.process, message)
                case SequenceStopped(row, request):
                    self.dispatcher.stopped(row, request)
                case SequenceFailed(rows, reason):
                    self.dispatcher.failed(worker.process, rows, reason)

    def worker_dies(self) -> None:
        worker = self._some_worker()
        for row in worker.rows_with_room():  # all of them: a step ends with the commit of one sequence after another
            stores = self.random.randint(1, 3)
            worker.step(row, 12, stores)
            if stores == 3:
                worker.outbox.pop()  # committed, but it could not say so any more
        self._hear(worker, 99)
        self.ready.discard(worker.process)
        self.workers[worker.process] = self._start(worker.process)
        self.dispatcher.worker_died(worker.process, "was killed by SIGKILL")
        self.dispatcher.dispatch(self.ready)

    def worker_is_ready(self) -> None:
        self.ready.add(self.random.randrange(WORKERS))
        self.dispatcher.dispatch(self.ready)

    # ---- a reader of pages that it does not serve

    def reader_keeps_a_row(self) -> None:
        for row in self.instance.scheduler.running:
            if committed := self.instance.committed(row):
                position = self.random.randrange(committed)
                index, offset = divmod(position, self.instance.geometry.block_size)
                group = self.random.randrange(len(self.cache.windows))
                page = int(self.instance.block_tables[row, group, index])
                if page == NO_PAGE:  # behind a window
                    continue
                generation = int(self.instance.generations[page])
                self.kept[page, offset] = generation, self.instance.kv_row(row, position, group).tobytes()

    # ---- what must hold

    def check(self) -> None:
        self.cache.check()
        for row in set(range(self.instance.geometry.max_sequences)) - set(self.instance.scheduler.running):
            assert self.instance.room(row) == 0
        for request in self.instance.scheduler.running.values():
            assert request.client not in self.aborted or request.state is RequestState.ABORTING
            blocks = self.cache.num_blocks(request.sequence)
            assert self.instance.room(request.row) == blocks * self.instance.geometry.block_size
            for group in range(len(self.cache.windows)):
                table = self.cache.block_table(request.sequence, group)
                assert self.instance.block_tables[request.row, group, : len(table)].tolist() == table
        for (page, offset), (generation, row) in self.kept.items():
            if int(self.instance.generations[page]) == generation:
                now = self.instance.pages[page, offset * ROW_NBYTES : (offset + 1) * ROW_NBYTES].tobytes()
                assert now == row, f"a reader would take the new bytes of page {page} for the old ones"

    def finish(self) -> None:
        """Lets everything go on until nothing moves any more."""
        self.ready = set(range(WORKERS))
        self.dispatcher.dispatch(self.ready)
        self.client_reads_on()
        moving = True
        while moving:
            moving = False
            for worker in self.workers:
                moving |= bool(worker.inbox or worker.outbox or worker.rows_with_room())
                worker.read(99)
                for row in worker.rows_with_room():
                    worker.step(row, 12)
                self._hear(worker, 99)
                self.dispatcher.dispatch(self.ready)
                self.check()
        client, scheduler = self.instance.client, self.instance.scheduler
        for number, expected in self.expected.items():
            tokens, finishes = client.tokens(number), client.finishes(number)
            assert len(finishes) == 1, f"request {number} ended {len(finishes)} times"
            assert finishes[0] != "abort" or number in self.aborted
            assert tokens == (expected if finishes[0] in ("stop", "length") else expected[: len(tokens)])
        answered = [message.query for message in client.messages if isinstance(message, Defragmented)]
        assert sorted(answered) == list(range(-self.questions, 0))
        assert not scheduler.running and not scheduler.waiting
        assert self.cache.num_used_pages == 0


@pytest.mark.parametrize("seed", range(60))
def test_A13_every_request_ends_with_its_tokens_and_all_pages_come_back(seed: int) -> None:
    events = RandomEvents(seed)
    for _ in range(300):
        events.step()
    events.finish()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("windows", "max_step"), [((0, 6), None), ((0, 6), 8), ((0, 9, 3), 2), ((7,), 8)])
def test_D5_pages_behind_windows_come_back_early_and_no_token_changes(
    seed: int, windows: tuple[int, ...], max_step: int | None
) -> None:
    events = RandomEvents(seed, windows, max_step)
    for _ in range(300):
        events.step()
    events.finish()
