"""Where experts are, and how long it takes to get at them there."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from model_factory import make_model

from hotset.runtime import Backend, SamplingParams
from hotset.runtime.memory_tiers import MemoryTier, PageCache
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig


def test_every_expert_lies_somewhere_and_every_page_in_came_from_there() -> None:
    with Backend(workers=1, expert_budget="25%", warm_start=False) as backend:
        backend.generate("def", SamplingParams(max_tokens=32, temperature=0, ignore_eos=True))
        stats = backend.stats()
        slots, page_cache, disk = stats.tiers
        assert [tier.name for tier in stats.tiers] == ["slots", "page cache", "disk"]
        assert slots.experts == stats.resident_experts == 32
        if page_cache.experts is None:
            pytest.skip("this kernel has no cachestat")
        assert slots.experts + page_cache.experts + (disk.experts or 0) == 4 * 32
        page_ins = stats.urgent_page_ins + stats.prefetch_page_ins
        assert page_cache.page_ins + disk.page_ins == page_ins > 0
        assert 0 < slots.p50 <= slots.p99
        for tier in (page_cache, disk):
            assert (tier.p50 > 0) == (tier.page_ins > 0)
        backend.reset_stats()
        assert all(tier.page_ins == tier.p99 == 0 for tier in backend.stats().tiers)


def test_the_time_that_workers_wait_for_experts_is_counted() -> None:
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True, routing="off")
    with Backend(workers=1, expert_budget="25%", warm_start=False) as backend:
        began = time.monotonic()
        backend.generate("def", params)
        assert 0 < backend.stats().expert_wait_seconds < time.monotonic() - began
    with Backend(workers=1, expert_budget="100%", warm_start=False) as backend:
        backend.generate("def", params)
        backend.reset_stats()
        backend.generate("def", params)
        assert backend.stats().expert_wait_seconds == 0  # all are there


def test_the_page_cache_is_asked_without_filling_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path, num_layers=2, num_experts=8, hidden_size=256, intermediate_size=256)
    checkpoint = Checkpoint.open(folder, ModelConfig.load(folder))
    fd = os.open(checkpoint.expert(0, 0).parts[0].file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        tiers = [MemoryTier(name, None, 0, 0.0, 0.0) for name in ("slots", "page cache", "disk")]
        cache = PageCache(checkpoint)
        where = [tier.experts for tier in cache.complete(tiers, [])]
        if where[1] is None or where[2] != 16:
            pytest.skip(f"the kernel, or the file system, does not let go of a file: {where}")
        for layer, expert in ((0, 3), (1, 7)):
            for part in checkpoint.expert(layer, expert).parts:
                os.pread(fd, part.nbytes, part.offset)
        where = [tier.experts for tier in cache.complete(tiers, [8 + 7])]
        assert where[1] is not None and where[2] is not None
        assert where[1] >= 1 and where[1] + where[2] == 15  # reading ahead may have brought neighbours
        assert where[2] > 0, "asking has filled it"
        cache.close()
    finally:
        os.close(fd)


def test_requests_are_sent_while_the_page_cache_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, go_on = threading.Event(), threading.Event()
    complete = PageCache.complete

    def slowly(cache: PageCache, tiers: list[MemoryTier], resident: list[int]) -> list[MemoryTier]:
        looking.set()
        assert go_on.wait(60)
        return complete(cache, tiers, resident)

    with Backend(expert_budget="50%", workers=1) as backend, ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(PageCache, "complete", slowly)
        stats = thread.submit(backend.stats)
        assert looking.wait(60)
        try:
            answered = ThreadPoolExecutor(1).submit(backend.generate, "def", SamplingParams(max_tokens=2)).result(60)
        finally:
            go_on.set()
        assert len(answered.token_ids) == 2
        assert len(stats.result(60).tiers) == 3
