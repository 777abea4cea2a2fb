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

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from expert_files import ExpertFiles
from laboratory.arguments import Parser, whole
from pager_under_test import PagerUnderTest
from rich.console import Console
from rich.table import Table

from hotset.shm.counters import Counter
from hotset.shm.histogram import percentile_nanoseconds

FILE_NBYTES = 512 << 20
HIDDEN_SIZE = 1024
SLOTS = 16
TOP_K = 8  # of the model, and so the least number of experts that a worker asks for at once
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


def measure_rates(experts: ExpertFiles, pager: PagerUnderTest, lanes: int, mib: int, rounds: int) -> Iterator[Rate]:
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


def measure_urgent_latency(experts: ExpertFiles, pager: PagerUnderTest, mib: int) -> UrgentLatency:
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
            experts = ExpertFiles(folder, SLOTS)
            pager = PagerUnderTest(folder, SLOTS, experts.nbytes, read_lanes=lanes)
            try:
                rates += measure_rates(experts, pager, lanes, mib, rounds)
                latencies.append(measure_urgent_latency(experts, pager, mib))
            finally:
                pager.close()
                experts.close()
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


def main(arguments: list[str]) -> int:
    parser = Parser(prog="scripts/bench paging", description="The pager against a plain preadv loop.")
    parser.add_argument("--megabytes", type=whole(1), nargs="+", default=[1, 4, 16], help="sizes of an expert, in MiB")
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rates, latencies = measure(options.megabytes, options.rounds)
    if options.json:
        urgent = [msgspec.to_builtins(row) | {"ratio": row.ratio} for row in latencies]
        print(json.dumps({"rates": msgspec.to_builtins(rates), "urgent": urgent}))
    else:
        print_tables(rates, latencies)
    return 0
