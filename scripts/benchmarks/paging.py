"""The pager against a plain loop on the same files: read rate, and what a full prefetch queue costs an urgent request.

The plain loop is as many threads as the pager has read lanes, each reading whole experts in a random order with preadv
into shared memory, as much as the pager has and touched before as its own; it does nothing with them, where the pager
takes their checksums. The pager runs as its own process on an arena of its own; this process asks for experts as a
worker does. Both take turns; medians are reported, and the median of the turns' ratios. `cold` drops the files from the
page cache before each pass (the host under a virtual machine may still have them); `warm` reads what is there.

An expert is paged in from its request to its publication. The 99th percentile is given for cold experts that are asked
for one at a time, and for passes over all of them that always have eight under way (top-8, all of a step's missing at
once, again and again): then each waits for most of the others.

usage: scripts/bench paging [--megabytes 1 4 16] [--rounds 5] [--json]
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from laboratory.arguments import Parser, whole
from rich.console import Console
from rich.table import Table

from hotset.runtime.config import BackendConfig
from hotset.runtime.instance import Instance
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.messages.pager import FromPager, PagerReady, StartPager
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.runtime.supervision import Child
from hotset.shm.counters import Counter, Histogram
from hotset.shm.histogram import percentile_nanoseconds
from hotset.shm.layout import COUNTERS_PER_PROCESS, HISTOGRAM_BUCKETS
from hotset.shm.paging_queue import PagingMessage, PagingPriority, PagingQueue
from hotset.shm.segment import new_instance_name
from hotset.workers.expert_access import ExpertAccess

FILE_NBYTES = 512 << 20
HIDDEN_SIZE = 1024
SLOTS = 16
TOP_K = 8  # of the model, and so the least number of experts that a worker asks for at once
CHUNK_NBYTES = 4 << 20
WORKER = 0
LATENCY_SAMPLES = 60


class Rate(msgspec.Struct):
    """Medians of passes over all experts, rates in MB/s."""

    expert_mib: int
    cache: str
    plain: float
    pager: float
    ratio: float
    page_in_p99: float  # milliseconds, eight at a time


class UrgentLatency(msgspec.Struct):
    """Milliseconds from the request to the wake, cold, one expert at a time; medians, and the 99th percentile."""

    expert_mib: int
    empty_queue: float
    full_queue: float
    p99: float

    @property
    def ratio(self) -> float:
        return self.full_queue / self.empty_queue


def write_model(folder: Path, expert_mib: int) -> None:
    """One layer of random experts; the dense tensors are there because a checkpoint needs them."""
    inner = round(expert_mib * 2**20 / (3 * 2 * HIDDEN_SIZE))
    num_experts = FILE_NBYTES // (3 * 2 * inner * HIDDEN_SIZE)
    sizes = {"layers": 1, "experts": num_experts, "top-k": TOP_K, "hidden-size": HIDDEN_SIZE, "expert-size": inner}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    script = Path(__file__).parents[1] / "make_model.py"
    subprocess.run([sys.executable, "-P", script, folder, "--family", "olmoe", *options], check=True)
    os.sync()  # pages that are still to be written cannot be dropped from the page cache


def shared_memory(slots: int, nbytes: int) -> list[memoryview]:
    """Of the same kind as the arena, and touched: in fresh memory, or in a core's cache, reading takes another time."""
    stride = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    fd = os.memfd_create("paging")
    os.posix_fallocate(fd, 0, slots * stride)
    memory = mmap.mmap(fd, slots * stride)
    os.close(fd)
    memory[:: mmap.PAGESIZE] = bytes(slots * stride // mmap.PAGESIZE)
    return [memoryview(memory)[slot * stride : slot * stride + nbytes] for slot in range(slots)]


class Experts:
    """Where they lie, and the plain loop over them."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder, ModelConfig.load(folder))
        self.count = checkpoint.config.num_experts
        self.nbytes = checkpoint.expert_nbytes
        self.offsets = [min(part.offset for part in checkpoint.expert(0, n).parts) for n in range(self.count)]
        self.fd = os.open(checkpoint.expert(0, 0).parts[0].file, os.O_RDONLY)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        self.slots = shared_memory(SLOTS, self.nbytes)

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


class PagerUnderTest:
    """A pager process on an arena of its own, and this process in the place of its only worker."""

    def __init__(self, folder: Path, expert_nbytes: int, **settings: Any) -> None:
        config = BackendConfig(
            model=str(folder),
            workers=1,
            expert_budget=SLOTS * (expert_nbytes + 4096),
            max_num_seqs=1,
            warm_start=False,
            eviction="affinity",  # with which `fill_prefetch_queue` makes what it asks for worth a slot
            **settings,
        )
        model = ModelConfig.load(folder)
        plan = plan_instance(config, model, Checkpoint.open(folder, model))
        self.instance = Instance(new_instance_name(), plan)
        self.arena = self.instance.arena
        self.queue = PagingQueue.attach(self.instance.name)
        self.access = ExpertAccess(self.instance.segment, self.queue, WORKER)
        self._child: Child[FromPager] = Child("hotset.workers.pager", FromPager)
        self._child.channel.send(StartPager.of(self.instance.name, plan, config))
        answer = self._child.channel.wait()
        if not isinstance(answer, PagerReady):
            raise RuntimeError(f"the pager did not start: {answer}")

    def close(self) -> None:
        self._child.channel.send(StopWorking())
        self._child.reap(5.0)
        self.queue.close()
        self.instance.remove()

    def counter(self, counter: Counter) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self.arena.counter_totals(totals)
        return int(totals[counter])

    def page_in_times(self) -> npt.NDArray[np.uint64]:
        """The histogram of all page-ins so far."""
        buckets = np.empty(HISTOGRAM_BUCKETS, np.uint64)
        self.arena.histogram_totals(Histogram.PAGING, buckets)
        return buckets

    def page_in(self, order: list[int]) -> float:
        """Seconds per expert that was read, when a worker takes one after the other, several requested ahead."""
        before, began = self.counter(Counter.URGENT_PAGE_INS), time.perf_counter()
        for _ in self.access.resident(0, order):
            pass
        return (time.perf_counter() - began) / (self.counter(Counter.URGENT_PAGE_INS) - before)

    def fill_prefetch_queue(self, candidates: list[int]) -> None:
        """All that are absent, each worth more than what is resident."""
        absent = [expert for expert in candidates if self.arena.find(expert) < 0]
        # What the eviction policy knows of an expert is how often steps used it.
        self.access.note_demand(0, np.array([absent], np.int32))
        asked = [expert for expert in absent if self.arena.request_prefetch(expert)]
        if asked:
            self.queue.send(PagingMessage(0, asked, priority=PagingPriority.PREFETCH))

    def forget_prefetches(self) -> None:
        while self.arena.prefetch_requests():
            for expert in self.arena.prefetch_requests():
                self.arena.withdraw_prefetch(expert)
            time.sleep(0.01)


def measure_rates(experts: Experts, pager: PagerUnderTest, lanes: int, mib: int, rounds: int) -> Iterator[Rate]:
    chance = random.Random(0)
    for cache in ("cold", "warm"):
        plain: list[float] = []
        ours: list[float] = []
        if cache == "warm":
            pager.page_in(list(range(experts.count)))  # fills the page cache
        times = pager.page_in_times()
        for _ in range(rounds):
            order = chance.sample(range(experts.count), experts.count)
            if cache == "cold":
                experts.drop_from_page_cache()
            plain.append(experts.read_plainly(order, lanes) / experts.count)
            if cache == "cold":
                experts.drop_from_page_cache()
            ours.append(pager.page_in(order))
        plain_rate, our_rate = (experts.nbytes / statistics.median(seconds) / 1e6 for seconds in (plain, ours))
        ratio = statistics.median(loop / seconds for loop, seconds in zip(plain, ours, strict=True))
        p99 = percentile_nanoseconds(pager.page_in_times() - times, 0.99) / 1e6
        yield Rate(mib, cache, plain_rate, our_rate, ratio, p99)


def measure_urgent_latency(experts: Experts, pager: PagerUnderTest, mib: int) -> UrgentLatency:
    chance = random.Random(1)
    targets, candidates = list(range(experts.count // 4)), list(range(experts.count // 4, experts.count))
    samples: dict[bool, list[float]] = {False: [], True: []}
    for full in [False, True] * LATENCY_SAMPLES:
        experts.drop_from_page_cache()
        if full:
            pager.fill_prefetch_queue(candidates)
        time.sleep(chance.uniform(0.002, 0.012))  # in the middle of whatever the pager does with the prefetches
        target = chance.choice([expert for expert in targets if pager.arena.find(expert) < 0])
        began = time.perf_counter()
        for _ in pager.access.resident(0, [target]):
            samples[full].append(time.perf_counter() - began)
        pager.forget_prefetches()
    if not pager.counter(Counter.PREFETCH_PAGE_INS):
        raise RuntimeError("the pager has served no prefetch: the queue was not what it was meant to be")
    empty, queued = (1e3 * statistics.median(samples[full]) for full in (False, True))
    p99 = 1e3 * statistics.quantiles(samples[False], n=100)[-1]
    return UrgentLatency(mib, empty, queued, p99)


@contextmanager
def model_of(expert_mib: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hotset-paging-") as folder:
        write_model(Path(folder), expert_mib)
        yield Path(folder)


def measure(megabytes: list[int], rounds: int) -> tuple[list[Rate], list[UrgentLatency]]:
    rates: list[Rate] = []
    latencies: list[UrgentLatency] = []
    lanes = 4
    for mib in megabytes:
        with model_of(mib) as folder:
            experts = Experts(folder)
            pager = PagerUnderTest(folder, experts.nbytes, read_lanes=lanes)
            try:
                rates += measure_rates(experts, pager, lanes, mib, rounds)
                latencies.append(measure_urgent_latency(experts, pager, mib))
            finally:
                pager.close()
                os.close(experts.fd)
    return rates, latencies


def print_tables(rates: list[Rate], latencies: list[UrgentLatency]) -> None:
    console = Console(highlight=False)
    table = Table("expert, MiB", "page cache", "plain loop, MB/s", "pager, MB/s", "of plain", "p99, 8 at a time, ms")
    for rate in rates:
        numbers = (f"{rate.plain:.0f}", f"{rate.pager:.0f}", f"{rate.ratio:.0%}", f"{rate.page_in_p99:.1f}")
        table.add_row(str(rate.expert_mib), rate.cache, *numbers)
    console.print(table)
    table = Table("expert, MiB", "urgent, ms", "with a full prefetch queue, ms", "ratio", "p99 alone, ms")
    for row in latencies:
        times = (f"{row.empty_queue:.2f}", f"{row.full_queue:.2f}", f"{row.ratio:.2f}", f"{row.p99:.1f}")
        table.add_row(str(row.expert_mib), *times)
    console.print(table)


def main() -> None:
    parser = Parser(prog="scripts/bench paging", description="The pager against a plain preadv loop.")
    parser.add_argument("--megabytes", type=whole(1), nargs="+", default=[1, 4, 16], help="sizes of an expert, in MiB")
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates, latencies = measure(options.megabytes, options.rounds)
    if not options.json:
        return print_tables(rates, latencies)
    urgent = [msgspec.to_builtins(row) | {"ratio": row.ratio} for row in latencies]
    print(json.dumps({"rates": msgspec.to_builtins(rates), "urgent": urgent}))


if __name__ == "__main__":
    main()
