"""ns per token of the router, alone and with two processes on the same slots, beside numpy and scalar C.

A sample is one pass over 4,096 distinct rows. It counts only if its process ran all through it (CPU time against
wall time) and, with two processes, if the other one did too during the whole of it: on virtual cores that take turns,
anything else measures the turns. Reported are medians over all samples that count.

"hotset" prefers resident experts by a constant bonus, "hotset resnorm" and others by the policy of that name.

The rows of scalar C are timed inside of C, without the cost of a call from Python, which all others pay.

usage: scripts/bench routing [--json] [...]
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import msgspec
import numpy as np
from laboratory.arguments import Parser, positive
from rich.console import Console
from rich.table import Table
from routing_passes import ROWS, build_scalar_router, hotset_pass, make_logits, make_resident, numpy_pass, scalar_pass
from routing_samples import Result, Sample, median, take_samples
from stress_tests.stop_signals import ignore_stops, stop_signals

from hotset.runtime import MemoryAwareRouter, RouterConfig
from hotset.runtime.router_config import Policy
from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.segment import InstanceLock, Segment, new_instance_name, remove_ipc_objects

SHAPES = ((8, 2), (64, 6), (64, 8), (128, 8), (256, 8))
PREFERENCES: tuple[Policy, ...] = ("range", "mass", "resnorm", "substitute")  # beside "bonus", at their usual strengths
ORIGINAL = {(8, 2): 113, (64, 6): 805, (64, 8): 848, (128, 8): 1477, (256, 8): 2740}  # Rust, measured elsewhere


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
    ignore_stops()
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
        context.Process(
            target=measure_in_child,
            args=(instance, geometry, p, start, pipes[p][1], top_k, mode, seconds),
            daemon=True,
        )
        for p in range(2)
    ]
    try:
        with stop_signals.deferred():
            for child in children:
                child.start()
        return [receive.recv() for receive, _ in pipes]
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()  # where it has not ended by itself
                child.join()


def measure_shape(
    experts: int, top_k: int, scalar: ctypes.CDLL, seconds: float, kernels: list[str]
) -> Iterator[Result]:
    instance = new_instance_name()
    with contextlib.ExitStack() as ending:
        ending.callback(InstanceLock(instance).release)
        ending.callback(remove_ipc_objects, instance)
        segment = make_segment(instance, experts)
        ending.callback(segment.close)
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


def main(argv: list[str]) -> int:
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
    return 0
