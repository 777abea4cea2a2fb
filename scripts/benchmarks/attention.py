"""What attention over KV pages costs: one new token against a long sequence, beside numpy's gather and einsum.

Each call reads another layer's keys and values, as a decode step does, so that they come from memory and not from the
last call's caches; a plain read of as many bytes says what memory gives. Then each candidate reads one layer again and
again: with a large last-level cache that is what it takes where memory is not the limit. Medians of processor time of
the calling thread (so that being pre-empted does not count), or of wall time with several threads; candidates that
read memory take turns, so that what else the machine does reaches all alike.

usage: scripts/bench attention [--tokens 4096] [--threads 1] [--json]
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from laboratory.arguments import Parser, whole
from plain_read import PlainRead

from hotset.shm.kv_page_format import KvFormat, KvPageLayout
from hotset.workers.compute import _kernels

Floats = npt.NDArray[np.float32]
BLOCK, KV_HEADS, HEAD_DIM, LAYERS = 16, 8, 64, 16


class Row(NamedTuple):
    """Medians in microseconds, beside the same call of the numpy version on float32 pages."""

    name: str
    ours: float
    numpy: float | None
    bytes_read: int


class Sequence:
    """Keys and values of one sequence, in shuffled pages of one format."""

    def __init__(self, tokens: int, format: KvFormat) -> None:
        random = np.random.default_rng(0)
        self.layout = KvPageLayout(
            num_layers=LAYERS, block_size=BLOCK, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, format=format
        )
        blocks = -(-tokens // BLOCK)
        self.tokens = tokens
        self.pages = np.zeros((blocks + 1, *self.layout.shape), np.uint8)
        self.table = (1 + random.permutation(blocks)).astype(np.uint32)
        self.kernel_format = getattr(_kernels, f"KV_{format.name}")
        positions = np.arange(tokens, dtype=np.int32)
        starts = np.zeros(tokens, np.int64)
        for layer in range(LAYERS):
            keys, values = random.standard_normal((2, tokens, KV_HEADS, HEAD_DIM), dtype=np.float32)
            refused = _kernels.write_kv(
                keys, values, self.pages, self.kernel_format, layer, self.table, starts, positions
            )
            if refused >= 0:
                raise ValueError(f"token {refused} was refused")
        self.start, self.last = np.zeros(1, np.int64), np.array([tokens - 1], np.int32)

    @property
    def nbytes(self) -> int:
        """Of its keys and values in one layer."""
        return 2 * self.tokens * self.layout.token_nbytes

    def decode(self, queries: Floats, layer: int, window: int = 0) -> Floats:
        out = np.empty_like(queries)
        places = self.pages, self.kernel_format, layer, self.table, self.start, self.last
        _kernels.attention(queries, *places, window, out)
        return out

    def decode_with_numpy(self, queries: Floats, layer: int) -> Floats:
        """The plain version, for float32 pages: gather the rows of the block table, then two products."""
        pages = self.pages.view(np.float32)
        keys = pages[self.table, layer, 0].reshape(-1, KV_HEADS, HEAD_DIM)[: self.tokens]
        values = pages[self.table, layer, 1].reshape(-1, KV_HEADS, HEAD_DIM)[: self.tokens]
        grouped = queries.reshape(KV_HEADS, -1, HEAD_DIM)
        scores = np.einsum("hgd,thd->hgt", grouped, keys) / np.sqrt(np.float32(HEAD_DIM))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hgt,thd->hgd", weights, values).reshape(queries.shape)


def medians_us(calls: list[Callable[[int], object]], repeats: int, clock: Callable[[], int]) -> list[float]:
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(repeats):
        for call, times in zip(calls, samples, strict=True):
            begin = clock()
            call(number % LAYERS)
            times.append((clock() - begin) / 1000)
    return [statistics.median(times) for times in samples]


def measure(tokens: int, repeats: int, clock: Callable[[], int], read: PlainRead) -> list[Row]:
    random = np.random.default_rng(1)
    sequences = {format: Sequence(tokens, format) for format in KvFormat}
    rows: list[Row] = []
    plain = sequences[KvFormat.FLOAT32]
    layers = plain.pages.reshape(-1)[: LAYERS * plain.nbytes].reshape(LAYERS, plain.nbytes)
    (time_us,) = medians_us([lambda layer: read(layers[layer])], repeats, clock)
    rows.append(Row("plain read of as much as float32", time_us, None, plain.nbytes))
    for heads in (KV_HEADS, 4 * KV_HEADS):
        queries = random.standard_normal((1, heads, HEAD_DIM), dtype=np.float32)
        np.testing.assert_allclose(plain.decode(queries, 0), plain.decode_with_numpy(queries, 0), atol=1e-5)
        calls: list[Callable[[int], object]] = [lambda layer, q=queries: plain.decode_with_numpy(q, layer)]
        for sequence in sequences.values():
            calls.append(lambda layer, s=sequence, q=queries: s.decode(q, layer))
        baseline, *ours = medians_us(calls, repeats, clock)
        for (format, sequence), time_us in zip(sequences.items(), ours, strict=True):
            rows.append(Row(f"{heads} query heads, {format.value}", time_us, baseline, sequence.nbytes))
    queries = random.standard_normal((1, KV_HEADS, HEAD_DIM), dtype=np.float32)
    (baseline,) = medians_us([lambda _: plain.decode_with_numpy(queries, 0)], repeats, clock)
    for format in (KvFormat.FLOAT32, KvFormat.Q8_0):
        (time_us,) = medians_us([lambda _, s=sequences[format]: s.decode(queries, 0)], repeats, clock)
        rows.append(Row(f"{KV_HEADS}, {format.value}, one layer", time_us, baseline, sequences[format].nbytes))
    window = 256
    (time_us,) = medians_us([lambda layer: plain.decode(queries, layer, window)], repeats, clock)
    nbytes = plain.nbytes * window // tokens
    rows.append(Row(f"{KV_HEADS} query heads, float32, window {window}", time_us, None, nbytes))
    return rows


def main(argv: list[str]) -> int:
    parser = Parser(prog="scripts/bench attention", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=whole(1), default=4096, help="length of the sequence")
    parser.add_argument("--threads", type=whole(1, 256), default=1, help="of our kernel; numpy's einsum has one")
    parser.add_argument("--repeats", type=whole(1), default=60)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    _kernels.set_num_threads(options.threads)
    clock = time.thread_time_ns if options.threads == 1 else time.perf_counter_ns
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.tokens, options.repeats, clock, PlainRead(folder, options.threads))
    if options.json:
        print(
            json.dumps(
                {
                    "tokens": options.tokens,
                    "kv_heads": KV_HEADS,
                    "head_dim": HEAD_DIM,
                    "threads": options.threads,
                    "load": load,
                    "microseconds": [row._asdict() for row in rows],
                },
                indent=1,
            )
        )
        return 0
    print(
        f"one token against {options.tokens} x {KV_HEADS} key-value heads x {HEAD_DIM}, {options.threads} thread(s), "
        f"load average {load:.1f}, {_kernels.instruction_sets()[-1]}\n"
    )
    print(f"{'':<40}{'ours':>12}{'numpy':>14}{'ratio':>10}{'read':>12}")
    for row in rows:
        line = f"{row.name:<40}{row.ours:>9,.0f} us"
        line += f"{row.numpy:>11,.0f} us{row.numpy / row.ours:>8.1f} x" if row.numpy is not None else " " * 24
        line += f"{row.bytes_read / row.ours / 1000:>7.1f} GB/s"
        print(line)
    return 0
