"""Where a model's experts are, and what it takes to get at one there: slots, page cache, disk."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import msgspec

from hotset.runtime.metrics import MoeMetrics
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.shm.counters import Counter, Histogram

CACHESTAT = 451  # the system call's number, the same on all processors; since Linux 6.5
SAMPLE = 512  # experts that are looked for in the page cache; of more, the rest are estimated
PRESENT = 0.95  # of an expert's pages, for it to count as being there: the others cost hardly anything


class MemoryTier(msgspec.Struct, frozen=True):
    """`experts` that lie there and in no faster tier; None where the kernel cannot tell. Latencies are microseconds: to
    find one in a slot, or from an urgent request's load to its publication; 0 as long as there was none.

    `page_ins`, urgent or not, were served from there.
    """

    name: str
    experts: int | None
    page_ins: int
    p50: float
    p99: float


def measured_tiers(metrics: MoeMetrics, counts: dict[Counter, int], resident: int) -> list[MemoryTier]:
    """What the arena knows of the tiers: only of the slots how many experts lie there."""
    return [
        MemoryTier("slots", resident, 0, *metrics.percentiles(Histogram.SLOT)),
        MemoryTier("page cache", None, counts[Counter.PAGE_CACHE_PAGE_INS], *metrics.percentiles(Histogram.PAGE_CACHE)),
        MemoryTier("disk", None, counts[Counter.DISK_PAGE_INS], *metrics.percentiles(Histogram.DISK)),
    ]


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


class PageCache:
    """Asks the kernel which experts of a checkpoint the page cache has, without touching them; from any thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._lock = threading.RLock()  # a signal handler may look in its thread again
        self._checkpoint = checkpoint
        self._files: dict[Path, int] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)

    def complete(self, tiers: list[MemoryTier], resident: Iterable[int]) -> list[MemoryTier]:
        """`measured_tiers` with the number of absent experts in the page cache, and of those on disk only."""
        slots, cached, disk = tiers
        num_experts, in_slots = self._checkpoint.config.num_experts, set(resident)
        absent = [ids for ids in self._checkpoint.expert_ids if ids[0] * num_experts + ids[1] not in in_slots]
        try:
            sample = absent[:: -(-len(absent) // SAMPLE)] if absent else []
            with self._lock:
                found = sum(self._has(*ids) for ids in sample)
        except OSError:
            return tiers
        experts = round(len(absent) * found / len(sample)) if sample else 0
        return [
            slots,
            msgspec.structs.replace(cached, experts=experts),
            msgspec.structs.replace(disk, experts=len(absent) - experts),
        ]

    def _has(self, layer: int, expert: int) -> bool:
        pages = present = 0
        for part in self._checkpoint.expert(layer, expert).parts:
            pages += (part.offset + part.nbytes - 1) // mmap.PAGESIZE - part.offset // mmap.PAGESIZE + 1
            present += self._cached_pages(part.file, part.offset, part.nbytes)
        return present >= PRESENT * pages

    def _cached_pages(self, path: Path, offset: int, nbytes: int) -> int:
        fd = self._files.get(path)
        if fd is None:
            fd = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        where, found = _Range(offset, nbytes), _Cachestat()
        if self._libc.syscall(CACHESTAT, fd, ctypes.byref(where), ctypes.byref(found), 0) != 0:
            raise OSError(ctypes.get_errno(), "cachestat")
        return int(found.cache)

    def close(self) -> None:
        with self._lock:
            for fd in self._files.values():
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._files.clear()
