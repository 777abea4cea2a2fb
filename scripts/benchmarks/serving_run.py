"""One run of a whole instance in a process of its own, so that a memory limit can be laid on it.

usage: serving_run.py REQUEST       a JSON object of `Request`; prints one of `Report`
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hotset.runtime import Backend, HotsetError, SamplingParams
from hotset.runtime.stats import PrefetchStats


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """`settings` are fields of `BackendConfig`. Prompts are random token ids; answers go on after the end of text."""

    model: str
    settings: dict[str, Any]
    prompts: int = 1
    prompt_tokens: int = 32
    max_tokens: int = 256
    warm_up_tokens: int = 0  # of an answer before the measured ones
    temperature: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Rates are of decoding: tokens over the time from a first to a last token, of one answer's quarters and of all.

    `io_nbytes` is what the pager asked of the kernel, `disk_nbytes` what came from the disk for it; both from
    /proc/PID/io. `largest_pss` is of all processes together, this one included. `step_ms` are the times between the
    first answer's tokens; `waiting` the share of the workers' time, prefill included, in which they waited for experts;
    `paging` the share in which urgent page-ins were under way, from above, for they may overlap.
    """

    token_ids: list[list[int]]
    tokens_per_second: float
    quarters: list[float]
    step_ms: list[float]
    waiting: float
    paging: float
    hit_rate: float
    prefill_hit_rate: float
    lost_mass: float
    misses: int
    page_ins: int
    evictions: int
    loaded_nbytes: int
    io_nbytes: int
    disk_nbytes: int
    paging_p50_us: float
    paging_p99_us: float
    planned_nbytes: int
    largest_pss: int
    slots: int
    restarts: int
    prefetch: list[PrefetchStats]
    prefetch_step_time: float | None


def proportional_nbytes(pid: int) -> int:
    """A process's share of the memory that it maps (PSS): summed over processes, nothing counts twice."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M))


def io_nbytes(pid: int) -> tuple[int, int]:
    """(asked for, read from disk) by a process so far."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["read_bytes"])


class Scales:
    """Weighs processes every 50 ms, in a thread, and keeps the largest sum."""

    def __init__(self, pids: list[int]) -> None:
        self.largest = 0
        self._pids = pids
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._weigh)
        self._thread.start()

    def _weigh(self) -> None:
        while not self._done.wait(0.05):
            self.largest = max(self.largest, sum(map(proportional_nbytes, self._pids)))

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def run(request: Request) -> Report:
    random = np.random.default_rng(0)
    with Backend(request.model, **request.settings) as backend:
        vocabulary = 2000 if backend.tokenizer.vocab_size > 2000 else backend.tokenizer.vocab_size
        prompts = [random.integers(1, vocabulary, request.prompt_tokens).tolist() for _ in range(request.prompts)]
        if request.warm_up_tokens:
            backend.generate(prompts[0], _sampling(request, request.warm_up_tokens))
            backend.reset_stats()
        asked_before, disk_before = io_nbytes(backend.pager_pid)
        scales = Scales([os.getpid(), backend.coordinator_pid, backend.pager_pid, *backend.worker_pids])
        try:
            submitted = time.monotonic()
            streams = [backend.stream(prompt, _sampling(request, request.max_tokens)) for prompt in prompts]
            answers: list[list[int]] = [[] for _ in streams]
            times: list[float] = []
            for answer, stream in zip(answers, streams, strict=True):
                for piece in stream:
                    answer.extend(piece.token_ids)
                    times.extend([time.monotonic()] * len(piece.token_ids) if answer is answers[0] else [])
            ended = time.monotonic()
        finally:
            scales.stop()
        asked, disk = io_nbytes(backend.pager_pid)
        stats = backend.stats()
        edges = np.linspace(0, len(times) - 1, 5).astype(int).tolist()
        quarters = [(b - a) / (times[b] - times[a]) for a, b in itertools.pairwise(edges) if b > a]
        return Report(
            token_ids=answers,
            tokens_per_second=(sum(map(len, answers)) - len(answers)) / (ended - times[0]),
            quarters=quarters,
            step_ms=[1000 * (b - a) for a, b in itertools.pairwise(times)],
            waiting=stats.expert_wait_seconds / (ended - submitted) / stats.workers,
            paging=min(1.0, stats.urgent_page_ins * stats.paging.mean / 1e6 / (ended - submitted)),
            hit_rate=stats.decode_hit_rate,
            prefill_hit_rate=stats.prefill_hit_rate,
            lost_mass=stats.lost_mass,
            misses=stats.decode_expert_misses + stats.prefill_expert_misses,
            page_ins=stats.urgent_page_ins + stats.prefetch_page_ins,
            evictions=stats.evictions,
            loaded_nbytes=stats.bytes_read,
            io_nbytes=asked - asked_before,
            disk_nbytes=disk - disk_before,
            paging_p50_us=stats.paging.p50,
            paging_p99_us=stats.paging.p99,
            planned_nbytes=backend.plan.memory.total,
            largest_pss=scales.largest,
            slots=backend.plan.geometry.num_slots,
            restarts=stats.worker_restarts + stats.pager_restarts,
            prefetch=stats.prefetch,
            prefetch_step_time=stats.prefetch_step_time,
        )


def _sampling(request: Request, tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=request.temperature, seed=0)


if __name__ == "__main__":
    try:
        print(msgspec.json.encode(run(msgspec.json.decode(sys.argv[1], type=Request))).decode())
    except (HotsetError, ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:  # whoever started this says so
        raise SystemExit(130) from None
