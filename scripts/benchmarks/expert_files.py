"""A model's experts on disk, and the plain loop that the pager is compared with."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from pathlib import Path

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig

CHUNK_NBYTES = 4 << 20


def shared_memory(slots: int, nbytes: int) -> list[memoryview]:
    """Of the same kind as the arena, and touched: in fresh memory, or in a core's cache, reading takes another time."""
    stride = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    fd = os.memfd_create("paging")
    os.posix_fallocate(fd, 0, slots * stride)
    memory = mmap.mmap(fd, slots * stride)
    os.close(fd)
    memory[:: mmap.PAGESIZE] = bytes(slots * stride // mmap.PAGESIZE)
    return [memoryview(memory)[slot * stride : slot * stride + nbytes] for slot in range(slots)]


class ExpertFiles:
    """Where the experts of a model of one layer lie, and the plain loop over them, into `slots` places in memory."""

    def __init__(self, folder: Path, slots: int) -> None:
        checkpoint = Checkpoint.open(folder, ModelConfig.load(folder))
        self.count = checkpoint.config.num_experts
        self.nbytes = checkpoint.expert_nbytes
        self.offsets = [min(part.offset for part in checkpoint.expert(0, n).parts) for n in range(self.count)]
        self.fd = os.open(checkpoint.expert(0, 0).parts[0].file, os.O_RDONLY)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        self.slots = shared_memory(slots, self.nbytes)

    def drop_from_page_cache(self) -> None:
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_plainly(self, order: list[int], threads: int) -> float:
        """Seconds for reading all of them once."""
        take = iter(order)
        start = threading.Barrier(threads + 1)

        def read(slots: list[memoryview]) -> None:
            start.wait()
            for expert, buffer in zip(take, itertools.cycle(slots), strict=False):  # `take` is shared by all threads
                for at in range(0, self.nbytes, CHUNK_NBYTES):
                    os.preadv(self.fd, [buffer[at : at + CHUNK_NBYTES]], self.offsets[expert] + at)

        readers = [threading.Thread(target=read, args=(self.slots[thread::threads],)) for thread in range(threads)]
        for reader in readers:
            reader.start()
        start.wait()
        began = time.perf_counter()
        for reader in readers:
            reader.join()
        return time.perf_counter() - began

    def close(self) -> None:
        os.close(self.fd)
