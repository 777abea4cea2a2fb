"""ns per token of the router, alone and with two processes on the same slots, beside numpy and scalar C.

A sample is one pass over 4,096 distinct rows. It counts only if its process ran all through it (CPU time against
wall time) and, with two processes, if the other one did too during the whole of it: on virtual cores that take turns,
anything else measures the turns. Reported are medians over all samples that count.

"hotset" prefers resident experts by a constant bonus, "hotset resnorm" and others by the policy of that name.

The rows of scalar C are timed inside of C, without the cost of a call from Python, which all others pay.

usage: scripts/bench routing [--json] [...]
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import msgspec
import numpy as np
from laboratory.arguments import Parser, positive
from rich.console import Console
from rich.table import Table

from hotset.runtime import MemoryAwareRouter, RouterConfig
from hotset.runtime.router_config import Policy
from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.segment import InstanceLock, Segment, new_instance_name, remove_ipc_objects

SHAPES = ((8, 2), (64, 6), (64, 8), (128, 8), (256, 8))
ROWS = 4096
BATCH = 256
RAN = 0.95  # CPU time of a sample against its wall time
BONUS = 0.15
PREFERENCES: tuple[Policy, ...] = ("range", "mass", "resnorm", "substitute")  # beside "bonus", at their usual strengths
ORIGINAL = {(8, 2): 113, (64, 6): 805, (64, 8): 848, (128, 8): 1477, (256, 8): 2740}  # Rust, measured elsewhere

Pass = Callable[[], object]  # routes all rows once


class Sample(msgspec.Struct, array_like=True):
    """Nanoseconds: when it began and ended, and the CPU time in between."""

    began: int
    ended: int
    cpu: int

    @property
    def wall(self) -> int:
        return self.ended - self.began

    @property
    def ran(self) -> bool:
        return self.cpu >= RAN * self.wall


class Result(msgspec.Struct):
    name: str
    experts: int
    top_k: int
    mode: str
    processes: int
    ns_per_token: float
    median_of: int


def make_logits(experts: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, experts)).astype(np.float32)


def make_resident(experts: int) -> np.ndarray:
    """Half of the experts, bool [experts]."""
    return np.isin(np.arange(experts), np.random.default_rng(1).permutation(experts)[: experts // 2])


# ---- what is measured: each returns a pass over ROWS rows


def hotset_pass(
    segment: Segment, process: int, top_k: int, mode: str, *, policy: Policy = "bonus", timing: bool = False
) -> Pass:
    experts = segment.layout.geometry.num_experts
    config = RouterConfig(experts, top_k, policy=policy, cache_bonus=BONUS, timing=timing)
    router = MemoryAwareRouter(config, segment=segment, process=process)
    logits = make_logits(experts, process)
    if mode == "single":
        route = router.bind(logits, np.empty(top_k, np.int32), np.empty(top_k, np.float32))

        def rows_one_by_one() -> None:
            for row in range(ROWS):
                route(row)

        return rows_one_by_one
    ids, weights = np.empty((BATCH, top_k), np.int32), np.empty((BATCH, top_k), np.float32)
    batches = [router.bind(logits[at : at + BATCH], ids, weights) for at in range(0, ROWS, BATCH)]

    def batch_by_batch() -> None:
        for route in batches:
            route()

    return batch_by_batch


def numpy_pass(experts: int, top_k: int, mode: str) -> Pass:
    logits, resident = make_logits(experts, 0), make_resident(experts)
    bonus = np.where(resident, np.float32(BONUS), np.float32(0))
    affinity = np.zeros(experts, np.float32)

    def route(rows: np.ndarray) -> None:
        ids = np.argsort(-(rows + bonus), axis=-1, kind="stable")[..., :top_k]
        shares = np.exp(rows - rows.max(axis=-1, keepdims=True))
        np.take_along_axis(shares, ids, axis=-1) / shares.sum(axis=-1, keepdims=True)
        np.count_nonzero(resident[ids])
        for selected in np.atleast_2d(ids):
            np.multiply(affinity, 31 / 32, out=affinity)
            affinity[selected] += 1 / 32

    parts = list(logits) if mode == "single" else [logits[at : at + BATCH] for at in range(0, ROWS, BATCH)]

    def all_parts() -> None:
        for rows in parts:
            route(rows)

    return all_parts


def scalar_pass(library: ctypes.CDLL, experts: int, top_k: int) -> Pass:
    arrays = (
        make_logits(experts, 0),
        make_resident(experts).view(np.uint8),
        np.zeros(experts, np.float32),
        np.empty((ROWS, top_k), np.int32),
        np.empty((ROWS, top_k), np.float32),
    )
    logits, resident, affinity, ids, weights = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
    real = ctypes.c_float

    def all_rows() -> tuple[np.ndarray, ...]:
        library.route_rows(
            logits,
            ctypes.c_int64(ROWS),
            experts,
            top_k,
            resident,
            real(BONUS),
            real(31 / 32),
            real(1 / 32),
            affinity,
            ids,
            weights,
        )
        return arrays  # which the pointers must not outlive

    return all_rows


def build_scalar_router(folder: str) -> ctypes.CDLL:
    library = Path(folder) / "scalar_router.so"
    source = Path(__file__).with_name("scalar_router.c")
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", library, source, "-lm"], check=True)
    return ctypes.CDLL(str(library))


# ---- measuring


def take_samples(run: Pass, seconds: float) -> list[Sample]:
    run()
    samples: list[Sample] = []
    stop = time.monotonic_ns() + int(seconds * 1e9)
    while not samples or samples[-1].ended < stop or len(samples) < 3:
        cpu, began = time.process_time_ns(), time.monotonic_ns()
        run()
        ended = time.monotonic_ns()
        samples.append(Sample(began, ended, time.process_time_ns() - cpu))
    return samples


def ran_throughout(sample: Sample, other: list[Sample]) -> bool:
    """Whether `other`'s process was measuring during all of `sample` and was not interrupted meanwhile."""
    touching = [o for o in other if o.began < sample.ended and o.ended > sample.began]
    return (
        bool(touching)
        and all(o.ran for o in touching)
        and touching[0].began <= sample.began
        and touching[-1].ended >= sample.ended
    )


def median(name: str, experts: int, top_k: int, mode: str, rows: list[list[Sample]]) -> Result:
    """Of the samples of all processes that count; of all of them if none does, with `median_of` 0."""
    good: list[int] = []
    for process, samples in enumerate(rows):
        others = rows[:process] + rows[process + 1 :]
        good += [s.wall for s in samples if s.ran and all(ran_throughout(s, other) for other in others)]
    walls = good or [s.wall for samples in rows for s in samples]
    return Result(name, experts, top_k, mode, len(rows), round(float(np.median(walls)) / ROWS, 1), len(good))


def make_segment(instance: str, experts: int) -> Segment:
    segment = Segment.create(instance, Geometry(num_layers=1, num_experts=experts, num_processes=2))
    mask = np.zeros(-(-experts // 64) * 64, bool)
    mask[:experts] = make_resident(experts)
    # Before any process routes: afterwards only a pager may.
    segment.view(Section.RESIDENT_MASK)[0, : mask.size // 64] = np.packbits(mask, bitorder="little").view(np.uint64)
    return segment


def measure_in_child(
    instance: str,
    geometry: Geometry,
    process: int,
    start: Barrier,
    out: Connection,
    top_k: int,
    mode: str,
    seconds: float,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[process % len(cores)]})
    segment = Segment.attach(instance, geometry)
    run = hotset_pass(segment, process, top_k, mode)
    start.wait()
    out.send(take_samples(run, seconds))


def measure_two(instance: str, segment: Segment, top_k: int, mode: str, seconds: float) -> list[list[Sample]]:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    geometry = segment.layout.geometry
    children = [
        context.Process(target=measure_in_child, args=(instance, geometry, p, start, pipes[p][1], top_k, mode, seconds))
        for p in range(2)
    ]
    for child in children:
        child.start()
    samples = [receive.recv() for receive, _ in pipes]
    for child in children:
        child.join()
    return samples


def measure_shape(
    experts: int, top_k: int, scalar: ctypes.CDLL, seconds: float, kernels: list[str]
) -> Iterator[Result]:
    instance = new_instance_name()
    lock = InstanceLock(instance)
    segment = make_segment(instance, experts)
    try:
        for mode in ("single", "batch"):
            for kernel in kernels:
                _core.use_route_kernel(kernel)
                name = "hotset" if kernel == kernels[0] else f"hotset {kernel}"
                samples = take_samples(hotset_pass(segment, 0, top_k, mode), seconds)
                yield median(name, experts, top_k, mode, [samples])
            _core.use_route_kernel(kernels[0])
            for policy in PREFERENCES:
                samples = take_samples(hotset_pass(segment, 0, top_k, mode, policy=policy), seconds / 2)
                yield median(f"hotset {policy}", experts, top_k, mode, [samples])
            if mode == "single":
                samples = take_samples(hotset_pass(segment, 0, top_k, mode, timing=True), seconds)
                yield median("hotset timed", experts, top_k, mode, [samples])
            yield median("hotset", experts, top_k, mode, measure_two(instance, segment, top_k, mode, seconds))
            yield median("numpy", experts, top_k, mode, [take_samples(numpy_pass(experts, top_k, mode), 0)])
            samples = take_samples(scalar_pass(scalar, experts, top_k), seconds / 2)
            yield median("scalar C", experts, top_k, mode, [samples])
    finally:
        segment.close()
        remove_ipc_objects(instance)
        lock.release()


def single_route_p99(experts: int, top_k: int, seconds: float) -> float:
    """Microseconds, as the router's own metrics tell it."""
    router = MemoryAwareRouter(RouterConfig(experts, top_k))
    route = router.bind(make_logits(experts, 0), np.empty(top_k, np.int32), np.empty(top_k, np.float32))
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        for row in range(ROWS):
            route(row)
    return router.metrics.summary().routing_latency.p99


def print_table(results: list[Result]) -> None:
    table = Table(title=f"ns per token, medians ({_core.route_kernels()[0]} kernel; half of the experts resident)")
    table.add_column("")
    for experts, top_k in SHAPES:
        table.add_column(f"{experts}, top {top_k}", justify="right")
    rows: dict[tuple[str, str, int], dict[tuple[int, int], str]] = {}
    for r in results:
        text = f"{r.ns_per_token:,.0f}" if r.ns_per_token >= 100 else f"{r.ns_per_token:.1f}"
        cell = text if r.median_of else f"({text})"
        rows.setdefault((r.mode, r.name, r.processes), {})[r.experts, r.top_k] = cell
    for (mode, name, processes), cells in sorted(rows.items(), key=lambda item: item[0][0], reverse=True):
        suffix = ", two processes" if processes == 2 else ""
        table.add_row(f"{mode}: {name}{suffix}", *(cells.get(shape, "") for shape in SHAPES))
    table.add_row("the Rust original, on another machine", *(f"{ORIGINAL[shape]:,}" for shape in SHAPES))
    console = Console(width=110)
    console.print(table)
    if any(not r.median_of for r in results):
        console.print("(in brackets: the machine was busy and no sample counts; medians of all instead)")
    for experts, top_k in (SHAPES[1], SHAPES[-1]):
        p99 = single_route_p99(experts, top_k, 0.5)
        console.print(f"p99 of a single route with timing metrics on, {experts} experts, top {top_k}: {p99:.2f} us")


def main(argv: list[str]) -> None:
    parser = Parser(prog="scripts/bench routing", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a list of results instead of the table")
    parser.add_argument("--seconds", type=positive, default=1.0, help="per measurement")
    arguments = parser.parse_args(argv)
    # The kernel in use, and the one every x86-64 has; the plain one is an oracle, not a contender.
    kernels = [name for name in _core.route_kernels() if name != "plain"] or ["plain"]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        scalar = build_scalar_router(folder)
        for experts, top_k in SHAPES:
            results += measure_shape(experts, top_k, scalar, arguments.seconds, kernels)
    if arguments.json:
        print(msgspec.json.encode(results).decode())
    else:
        print_table(results)


if __name__ == "__main__":
    main(sys.argv[1:])
