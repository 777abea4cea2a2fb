"""What products with stored weights cost: one row against the memory's bandwidth, 32 rows against numpy's BLAS.

One row reads every weight once, so its figure is bytes of weights per second, beside a plain read of the same memory
by the same number of threads. The weights are many experts', in all more than caches hold, and every pass streams
through all of them. For 32 rows the figure is multiply-adds, beside numpy's float32 product. Candidates take turns,
so that what else the machine does reaches all alike; medians over the passes.

usage: scripts/bench compute [--threads N] [--mebibytes 1024] [--json]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from laboratory.arguments import Parser, whole
from plain_read import PlainRead

from hotset.shm.kv_page_format import KvFormat, encode
from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
WIDTH, INTERMEDIATE, TOP_K = 2048, 768, 8  # of Qwen3-30B-A3B
SINGLE_VALUE_TYPES = {
    WeightFormat.FLOAT32: np.dtype(np.float32),
    WeightFormat.FLOAT16: np.dtype(np.float16),
    WeightFormat.BFLOAT16: np.dtype(np.uint16),
}
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Candidate(NamedTuple):
    name: str
    run: Callable[[], object]
    amount: float  # bytes read or multiply-adds done by one run


class Result(NamedTuple):
    name: str
    giga_per_second: float
    share: float  # of the first candidate's


def medians(candidates: list[Candidate], passes: int) -> list[Result]:
    seconds: list[list[float]] = [[] for _ in candidates]
    for candidate in candidates:
        candidate.run()
    for _ in range(passes):
        for candidate, samples in zip(candidates, seconds, strict=True):
            begin = time.perf_counter()
            candidate.run()
            samples.append(time.perf_counter() - begin)
    rates = [c.amount / statistics.median(s) / 1e9 for c, s in zip(candidates, seconds, strict=True)]
    return [Result(c.name, rate, rate / rates[0]) for c, rate in zip(candidates, rates, strict=True)]


# ---- weights


def encode_weights(values: Floats, format: WeightFormat) -> npt.NDArray[Any]:
    """As `_kernels.linear` takes them. MXFP4 gets other values of the same size: nothing here quantises to it."""
    if format in (WeightFormat.MXFP4, WeightFormat.MXFP4_GGML):
        numbers = np.random.default_rng(2).integers(0, 256, (values.size // 32, 16), np.uint8)
        scales = np.full((values.size // 32, 1), 127 - 2, np.uint8)
        if format is WeightFormat.MXFP4:
            blocks = np.concatenate([numbers.reshape(-1), scales.reshape(-1)])
        else:
            blocks = np.concatenate([scales, numbers], axis=1)
        return blocks.reshape(len(values), -1)
    data = encode(values, KvFormat[format.name])
    return data.view(SINGLE_VALUE_TYPES.get(format, np.uint8))


class Pool:
    """Memory filled again and again with one expert's weights in one format, without a gap."""

    def __init__(self, memory: Bytes, format: WeightFormat) -> None:
        random = np.random.default_rng(0)
        matrix = encode_weights(random.standard_normal((INTERMEDIATE, WIDTH), dtype=np.float32), format)
        down = encode_weights(random.standard_normal((WIDTH, INTERMEDIATE), dtype=np.float32), format)
        expert = np.concatenate([part.reshape(-1).view(np.uint8) for part in (matrix, matrix, down)])
        self.format = format
        self.experts = memory[: len(memory) // expert.nbytes * expert.nbytes].reshape(-1, expert.nbytes)
        self.experts[:] = expert
        self.nbytes = self.experts.nbytes
        self.matrices = self.experts.reshape(-1, matrix.nbytes).view(matrix.dtype).reshape(-1, *matrix.shape)


def one_row_products(pool: Pool) -> Candidate:
    """Gate and up of all experts, and down as if it had their shape."""
    x, out = np.ones((1, WIDTH), np.float32), np.empty((1, INTERMEDIATE), np.float32)

    def run() -> None:
        for matrix in pool.matrices:
            _kernels.linear(x, matrix, out, int(pool.format))

    return Candidate(f"hotset {pool.format.name}", run, pool.nbytes)


def one_row_experts(pool: Pool) -> Candidate:
    """As many in one call as a token uses in a layer."""
    hidden, outputs = np.ones((1, WIDTH), np.float32), np.empty((1, TOP_K, WIDTH), np.float32)
    assignments = np.split(np.arange(TOP_K), TOP_K)
    layers = [list(pool.experts[first : first + TOP_K]) for first in range(0, len(pool.experts), TOP_K)]

    def run() -> None:
        for experts in layers:
            formats = [int(pool.format)] * len(experts)
            _kernels.experts(hidden, assignments[: len(experts)], experts, formats, INTERMEDIATE, outputs)

    return Candidate(f"hotset {pool.format.name} expert", run, pool.nbytes)


# ---- what they are compared with


def one_row_of_numpy(pool: Pool) -> Candidate:
    x, out = np.ones((1, WIDTH), np.float32), np.empty((1, INTERMEDIATE), np.float32)

    def run() -> None:
        for matrix in pool.matrices:
            np.matmul(x, matrix.T, out=out)

    return Candidate("numpy FLOAT32", run, pool.nbytes)


def torch_products(
    matrices: npt.NDArray[Any], format: WeightFormat, rows: int, threads: int
) -> Callable[[], None] | None:
    """The same products by torch, which knows no quantised blocks; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    types = {
        WeightFormat.FLOAT32: torch.float32,
        WeightFormat.FLOAT16: torch.float16,
        WeightFormat.BFLOAT16: torch.bfloat16,
    }
    tensors = [torch.from_numpy(matrix.view(np.uint8)).view(types[format]) for matrix in matrices]
    x = torch.ones((rows, matrices.shape[2]), dtype=types[format])

    def run() -> None:
        with torch.inference_mode():
            for tensor in tensors:
                torch.nn.functional.linear(x, tensor)

    return run


# ---- the two measurements


def measure_one_row(memory: Bytes, threads: int, passes: int, read: PlainRead) -> Iterator[list[Result]]:
    """One list for each format; the first of each is the plain read of that format's weights."""
    for format in WeightFormat:
        pool = Pool(memory, format)
        candidates = [
            Candidate(f"plain read, {format.name}", lambda p=pool: read(p.experts), pool.nbytes),
            one_row_products(pool),
            one_row_experts(pool),
        ]
        if format is WeightFormat.FLOAT32:
            candidates.append(one_row_of_numpy(pool))
        if format in SINGLE_VALUE_TYPES and (torch_run := torch_products(pool.matrices, format, 1, threads)):
            candidates.append(Candidate(f"torch {format.name}", torch_run, pool.nbytes))
        yield medians(candidates, passes)


def measure_many_rows(rows: int, threads: int, passes: int) -> list[Result]:
    """The first is numpy's float32 product."""
    random = np.random.default_rng(1)
    values = random.standard_normal((4096, WIDTH), dtype=np.float32)
    x, out = random.standard_normal((rows, WIDTH), dtype=np.float32), np.empty((rows, len(values)), np.float32)
    work = float(rows * values.size)
    candidates = [Candidate("numpy FLOAT32", lambda: np.matmul(x, values.T, out=out), work)]
    for format in WeightFormat:
        weight = encode_weights(values, format)
        run = lambda w=weight, f=int(format): _kernels.linear(x, w, out, f)  # noqa: E731
        candidates.append(Candidate(f"hotset {format.name}", run, work))
        if format in SINGLE_VALUE_TYPES and (torch_run := torch_products(weight[None], format, rows, threads)):
            candidates.append(Candidate(f"torch {format.name}", torch_run, work))
    return medians(candidates, passes)


def print_results(results: list[Result], unit: str, of: str) -> None:
    for result in results:
        print(f"{result.name:<32}{result.giga_per_second:>10.1f} {unit}{100 * result.share:>9.0f} % of {of}")
    print()


def main(argv: list[str]) -> int:
    parser = Parser(prog="scripts/bench compute", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--threads", type=whole(1, 256), default=len(os.sched_getaffinity(0)), help="of every candidate"
    )
    parser.add_argument("--mebibytes", type=whole(1), default=1024, help="of weights that one row streams through")
    parser.add_argument("--rows", type=whole(1), default=32, help="of the second measurement")
    parser.add_argument("--passes", type=whole(1), default=5, help="over the weights; ten times as many of rows")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(argv)
    limits = dict.fromkeys(BLAS_THREADS, str(options.threads))
    if any(os.environ.get(name) != value for name, value in limits.items()):
        # BLAS has counted its threads when numpy was imported.
        os.execve(sys.executable, sys.orig_argv, os.environ | limits)
    load = os.getloadavg()[0]
    _kernels.set_num_threads(options.threads)
    memory = np.empty(options.mebibytes << 20, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        read = PlainRead(folder, options.threads)
        one_row = list(measure_one_row(memory, options.threads, options.passes, read))
    many_rows = measure_many_rows(options.rows, options.threads, 10 * options.passes)
    if options.json:
        document = {
            "threads": options.threads,
            "instruction_set": _kernels.instruction_sets()[-1],
            "load": load,
            "one_row_gigabytes_per_second": [[result._asdict() for result in group] for group in one_row],
            "rows": options.rows,
            "many_rows_giga_multiply_adds_per_second": [result._asdict() for result in many_rows],
        }
        print(json.dumps(document, indent=1))
        return 0
    print(
        f"{options.threads} thread(s), load average {load:.1f}, {_kernels.instruction_sets()[-1]}; matrices of "
        f"{INTERMEDIATE} x {WIDTH}, {options.mebibytes} MiB of them\n\none row:"
    )
    for group in one_row:
        print_results(group, "GB/s", "a plain read")
    print(f"{options.rows} rows, a matrix of 4096 x {WIDTH}:")
    print_results(many_rows, "GMAC/s", "numpy")
    return 0
