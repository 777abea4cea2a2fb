"""The worker process: the serving loop. It computes the sequences that the coordinator gives it, step by step.

A step is either a prefill, of known tokens whose KV rows are missing, or a decode, of one token for every sequence
that has room. What it writes, per sequence and in this order: KV rows, the sampled token's id, then `committed`.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hotset.runtime.channel import Channel
from hotset.runtime.completion import completion
from hotset.runtime.expert_pins import ExpertUnavailable
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.messages.worker import (
    PagesGranted,
    Progress,
    RowProgress,
    RunSequence,
    SequenceFailed,
    SequenceStopped,
    StartWorker,
    StopSequence,
    ToWorker,
    WorkerReady,
)
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.prefetch import parse_prefetch
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.supervision import run_child
from hotset.shm.counters import Counter
from hotset.shm.kv_page_format import KvFormat
from hotset.shm.layout import PrefetchSource, Section
from hotset.shm.paging_queue import PagingQueue
from hotset.shm.segment import Segment
from hotset.workers.compute.broken_weights import FailedRow
from hotset.workers.compute.gates import selection_bias
from hotset.workers.compute.sampler import LogitsNotNumbers, sample
from hotset.workers.compute.transformer import Batch, SequenceRows, Transformer
from hotset.workers.core_share import CoreShare
from hotset.workers.expert_access import ExpertAccess
from hotset.workers.moe import MixtureOfExperts, router_config
from hotset.workers.prefetch.kept_table import KeptTable
from hotset.workers.prefetch.prefetcher import Prefetcher
from hotset.workers.prefetch.sources import make_sources
from hotset.workers.prefetch.transitions import Transitions
from hotset.workers.prefetch.trial import Trial


class Sequence:
    """A sequence that this worker serves. KV rows below `committed` are written; `known` token ids are."""

    __slots__ = ("block_tables", "committed", "eos_token_ids", "exact_routing", "known", "run", "token_ids")

    def __init__(
        self,
        run: RunSequence,
        committed: int,
        token_ids: np.ndarray,
        block_tables: np.ndarray,
        eos_token_ids: tuple[int, ...],
        exact_routing: bool,
    ) -> None:
        self.run = run
        self.committed = committed
        self.known = run.known
        self.token_ids = token_ids
        self.block_tables = block_tables
        self.eos_token_ids = () if run.params.ignore_eos else eos_token_ids
        self.exact_routing = exact_routing

    @property
    def is_prefilling(self) -> bool:
        return self.known - self.committed > 1


class Worker:
    def __init__(self, channel: Channel[ToWorker], start: StartWorker) -> None:
        self._channel = channel
        self._process = start.process
        self._config = start.config
        self._plan = start.plan
        geometry = start.plan.geometry
        model = ModelConfig.load(start.config.model)
        self._checkpoint = checkpoint = Checkpoint.open(start.config.model, model)
        self._segment = Segment.attach(start.instance, geometry)
        self._arena = self._segment.arena
        self._cores = CoreShare(self._arena, start.process, start.plan.num_workers)
        self._token_ids = self._segment.view(Section.TOKEN_IDS)
        self._block_tables = self._segment.block_tables()
        router = MemoryAwareRouter(
            router_config(
                model,
                policy=start.plan.routing.policy,
                **start.plan.routing.router_options(),
            ),
            num_layers=model.num_layers,
            segment=self._segment,
            process=start.process,
            selection_bias=selection_bias(checkpoint),
        )
        access = ExpertAccess(self._segment, PagingQueue.attach(start.instance), start.process)
        prefetch = parse_prefetch(start.config.prefetch)
        prefetcher = None
        self._kept_table: KeptTable | None = None
        if prefetch.sources:
            sources = make_sources(prefetch.sources, start.config, checkpoint, router)
            table = sources.get(PrefetchSource.TRANSITIONS)
            if isinstance(table, Transitions) and start.process == 0 and start.config.warm_start:
                self._kept_table = KeptTable(table, Path(start.config.model))
            prefetcher = Prefetcher(sources, access, model.experts_per_token, Trial() if prefetch.guarded else None)
        self._experts = MixtureOfExperts(self._segment, router, model, access, prefetcher)
        kv_format = KvFormat(start.config.kv_cache_dtype)
        page = model.kv_page_layout(geometry.block_size, kv_format)
        kv_pages = self._segment.view(Section.KV_PAGES)[:, : page.page_nbytes].reshape(-1, *page.shape)
        self._transformer = Transformer(model, checkpoint, kv_pages, kv_format, self._experts)
        self._sequences: dict[int, Sequence] = {}

    # ---- messages

    def _handle(self, message: ToWorker) -> bool:
        """False when the worker is to leave."""
        match message:
            case RunSequence(row=row):
                self._sequences[row] = Sequence(
                    message,
                    self._arena.load_u64(Section.SEQUENCES, row, 0),
                    self._token_ids[row],
                    self._block_tables[row],
                    self._plan.eos_token_ids,
                    message.params.routing == "off" or self._config.routing == "off",
                )
            case StopSequence(row, request):
                sequence = self._sequences.get(row)
                if sequence is not None and sequence.run.request == request:
                    del self._sequences[row]
                self._channel.send(SequenceStopped(row, request))
            case StopWorking():
                return False
            case PagesGranted() | StartWorker():
                pass  # the granted pages are read from the arena before every step
        return True

    # ---- steps

    def _next_step(self) -> tuple[bool, list[tuple[Sequence, int]]]:
        """Whether the step is a prefill, and how many rows of which sequences it computes; none: nothing has room."""
        budget = self._config.max_num_batched_tokens
        block_size = self._plan.geometry.block_size
        prefill: list[tuple[Sequence, int]] = []
        decode: list[tuple[Sequence, int]] = []
        for sequence in self._sequences.values():
            room = self._arena.load_u32(Section.SEQUENCES, sequence.run.row, 2) * block_size
            rows = min(sequence.known, room) - sequence.committed
            if rows <= 0:
                continue
            if sequence.is_prefilling:
                rows = min(rows, budget)
                if rows:
                    prefill.append((sequence, rows))
                    budget -= rows
            else:
                decode.append((sequence, 1))
        if prefill:
            return True, prefill
        return False, decode[: self._config.max_num_batched_tokens]

    def _step(self, prefill: bool, parts: list[tuple[Sequence, int]]) -> None:
        total = sum(rows for _, rows in parts)
        token_ids = np.empty(total, np.int32)
        positions = np.empty(total, np.int32)
        members: list[SequenceRows] = []
        exact: list[bool] = []
        start = 0
        for sequence, rows in parts:
            first = sequence.committed
            token_ids[start : start + rows] = sequence.token_ids[first : first + rows]
            positions[start : start + rows] = np.arange(first, first + rows)
            blocks = -(-(first + rows) // self._plan.geometry.block_size)
            members.append(SequenceRows(start, rows, sequence.block_tables[:, :blocks]))
            exact.extend([sequence.exact_routing] * rows)
            start += rows
        self._experts.begin_step(exact, prefill=prefill, streams=[sequence.run.row for sequence, _ in parts])
        logits = self._transformer.forward(Batch(token_ids, positions, members))
        self._experts.end_step()
        self._arena.count(self._process, Counter.STEPS, 1)
        self._arena.count(self._process, Counter.PREFILL_TOKENS if prefill else Counter.DECODE_TOKENS, total)

        progress: list[RowProgress] = []
        for index, (sequence, rows) in enumerate(parts):
            row = sequence.run.row
            committed = sequence.committed + rows
            finish = None
            if committed == sequence.known:
                try:
                    token = self._sample(sequence, logits[index])
                except LogitsNotNumbers as error:
                    self._fail([row], f"{error}, {self._transformer.broken.of_logits()}")
                    continue
                except ValueError as error:
                    self._fail([row], str(error))
                    continue
                sequence.token_ids[sequence.known] = token
                sequence.known += 1
                finish = completion(token, sequence.known, sequence.run.limit, sequence.eos_token_ids)
            # Release: who reads the new length reads the KV rows and the token id below it.
            self._arena.store_u64(Section.SEQUENCES, row, 0, committed)
            sequence.committed = committed
            if finish is not None:
                del self._sequences[row]
            progress.append(RowProgress(row, committed, finish))
        self._channel.send(Progress(progress))

    def _sample(self, sequence: Sequence, logits: npt.NDArray[np.float32]) -> int:
        """The token at position `known`. Raises `ValueError` if the logits are not numbers."""
        run = sequence.run
        return sample(
            logits,
            run.params,
            seed=run.params.seed or 0,
            position=sequence.known,
            prompt_ids=sequence.token_ids[: run.prompt_length],
            generated_ids=sequence.token_ids[run.prompt_length : sequence.known],
        )

    def _fail(self, rows: list[int], reason: str) -> None:
        """Lets go of sequences that cannot be computed; the others go on."""
        for row in rows:
            del self._sequences[row]
        self._channel.send(SequenceFailed(rows, reason))

    # ---- the loop

    def run(self) -> None:
        """Returns when the coordinator says so; raises `ChannelClosed` when it is gone."""
        self._channel.send(WorkerReady(self._process))
        while True:
            for message in self._channel.receive():
                if not self._handle(message):
                    if self._kept_table is not None:
                        self._kept_table.save()
                    return
            prefill, parts = self._next_step()
            if not parts:
                self._cores.rest()
                select.select([self._channel], [self._channel] if self._channel.pending_nbytes else [], [])
                self._channel.flush()
                continue
            if self._kept_table is not None:
                self._kept_table.save_if_due()
            self._cores.take()
            try:
                self._step(prefill, parts)
            except ExpertUnavailable as error:
                self._arena.unpin_all(self._process)
                first = self._checkpoint.expert(error.layer, error.expert).parts[0]
                reason = f"{error}: {first.file} at byte {first.offset}"
                self._fail([sequence.run.row for sequence, _ in parts], reason)
            except FailedRow as error:
                # The next step takes the others from where they are: nothing of this one has been committed.
                owners = [sequence.run.row for sequence, rows in parts for _ in range(rows)]
                self._fail([owners[error.row]], str(error))


def main(arguments: list[str]) -> int:
    return run_child(arguments, ToWorker, StartWorker, lambda channel, start: Worker(channel, start).run())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
