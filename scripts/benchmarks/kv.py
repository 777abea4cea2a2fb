"""What the KV cache's bookkeeping and its row formats cost: section H of the acceptance cases, and the KV rows of the
table "figures to beat", beside plain Python and numpy versions of the same.

Medians of many repetitions, in processor time of this thread (so that being pre-empted does not count), garbage
collection off, prompts of random ids. Other programs still take turns on shared caches and execution units; the empty
Python call and the load average say how much of a figure is the machine.

usage: scripts/bench kv [--json]
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import xxhash
from laboratory.arguments import Parser
from plain_kv_cache import PlainPagePool, PlainPrefixCache
from thread_times import median_ns, medians_ns, medians_of_fresh_ns

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.page_pool import PagePool
from hotset.shm import _core
from hotset.shm.kv_page_format import Bytes, Floats, KvFormat, encode

BLOCK = 16
TOKENS = 4096
PAGES = TOKENS // BLOCK


class Row(NamedTuple):
    """One measurement in nanoseconds. `bound` is what section H or the issue asks for; None where nothing does."""

    name: str
    ours: float
    baseline: float | None = None
    baseline_name: str = ""
    bound: float | None = None


def random_prompt(generate: random.Random, tokens: int = TOKENS) -> bytes:
    return array("i", [generate.randrange(50_000) for _ in range(tokens)]).tobytes()


def store(cache: PagedKvCache, prompt: bytes) -> None:
    """Admits, commits and frees a prompt: its pages are idle afterwards."""
    sequence = cache.admit(prompt).sequence
    cache.commit(sequence, len(prompt) // 4)
    cache.free(sequence)


def idle_cache(num_pages: int) -> tuple[PagedKvCache, bytes]:
    """A cache with `num_pages` idle pages of prompts of 4,096 tokens, and the last of the prompts."""
    generate = random.Random(num_pages)
    cache = PagedKvCache(num_pages + 64, BLOCK)
    prompt = b""
    for _ in range(num_pages // PAGES):
        prompt = random_prompt(generate)
        store(cache, prompt)
    return cache, prompt


def pages() -> Iterator[Row]:
    num_pages = 200_000
    pool, plain = PagePool(num_pages), PlainPagePool(num_pages)
    yield Row(
        "allocate one page",
        median_ns(pool.take_one, 2000),
        median_ns(plain.allocate, 2000),
        "page objects and a deque",
    )
    cache = PagedKvCache(num_pages, BLOCK)
    yield Row("allocate and free a sequence of one page", median_ns(lambda: cache.free(cache.allocate(BLOCK)), 500))


def append() -> Iterator[Row]:
    calls = []
    for length in (16, 32_768):
        cache = PagedKvCache(8192, BLOCK)
        calls.append(partial(cache.append, cache.allocate(length), 7))
    short, long = medians_ns(calls, 128)
    table = np.arange(32_768 // BLOCK)
    yield Row("append one token at length 16", short)
    yield Row(
        "append one token at length 32,768 (H1)",
        long,
        median_ns(lambda: np.append(np.repeat(table, BLOCK), table[-1]), 10),
        "numpy slot mapping, grown",
        bound=min(460.0, 1.2 * short),
    )


def lookups() -> Iterator[Row]:
    generate = random.Random(2)
    prompt, other = random_prompt(generate), random_prompt(generate)
    one = PagedKvCache(1024, BLOCK)
    store(one, prompt)
    many = PagedKvCache(1024, BLOCK)
    for count in range(1, PAGES):  # a branch behind each page, so that each page is a node of its own
        store(many, prompt[: count * 4 * BLOCK] + array("i", [60_000] * BLOCK).tobytes())
    store(many, prompt)
    sha = PlainPrefixCache(BLOCK, lambda data: hashlib.sha256(data).digest())
    xxh = PlainPrefixCache(BLOCK, xxhash.xxh3_128_digest)
    sha.store(prompt)
    xxh.store(prompt)
    yield Row(
        "look up 4,096 cached tokens, one node (H2)",
        median_ns(partial(one.match, prompt), 100),
        median_ns(partial(sha.match, prompt), 2),
        "chain of SHA-256",
        bound=1_000,
    )
    yield Row(
        "look up 4,096 cached tokens, 256 nodes (H2)",
        median_ns(partial(many.match, prompt), 20),
        median_ns(partial(xxh.match, prompt), 4),
        "chain of xxh3",
        bound=40_000,
    )
    yield Row(
        "look up 4,096 tokens that miss (H3)",
        median_ns(partial(one.match, other), 500),
        median_ns(partial(sha.match, other), 200),
        "chain of SHA-256",
        bound=500,
    )


def idle_pages() -> Iterator[Row]:
    cache, prompt = idle_cache(8192)
    longer = prompt + bytes(4)

    admitted: list[int] = []

    def admit() -> Callable[[], object]:
        for sequence in admitted:
            cache.free(sequence)
        admitted.clear()
        return lambda: admitted.append(cache.admit(longer).sequence)

    def plain_take_over() -> Callable[[], object]:
        plain = PlainPagePool(8192)
        return lambda: [plain.take_over(number) for number in range(8192 - PAGES, 8192)]

    yield Row(
        "take over 256 idle cached pages of 8,192 (H4)",
        *medians_of_fresh_ns([admit]),
        *medians_of_fresh_ns([plain_take_over]),
        "removal from a deque",
        bound=50_000,
    )

    last_use = {page: page for page in range(8192)}
    searched = median_ns(lambda: last_use.pop(min(last_use, key=last_use.__getitem__)), 2)
    long, short = PagedKvCache(8192, BLOCK), PagedKvCache(8192, BLOCK)
    generate = random.Random(7)
    for _ in range(8192 // PAGES):
        store(long, random_prompt(generate))
    for token in range(8192):
        store(short, array("i", [token] * BLOCK).tobytes())
    for name, full in (("prompts of 256 pages", long), ("prompts of one page", short)):
        pool = full._pool  # nothing is free, so each page handed out is evicted first
        evicted = median_ns(pool.take_one, 20)
        yield Row(f"evict one page of 8,192 idle, {name} (H5)", evicted, searched, "search for the oldest", bound=1_000)


def forks() -> Iterator[Row]:
    cache = PagedKvCache(1024, BLOCK)
    parent = cache.allocate(TOKENS)
    references = np.zeros(1024, np.int64)
    table = np.arange(PAGES)

    def plain() -> None:
        references[table.copy()] += 1

    yield Row(
        "fork 4,096 tokens", median_ns(partial(cache.fork, parent), 20), median_ns(plain, 50), "numpy reference counts"
    )


def compaction() -> Iterator[Row]:
    def interleaved(num_pages: int) -> Callable[[], object]:
        cache = PagedKvCache(num_pages, BLOCK)
        kept, freed = cache.allocate(0), cache.allocate(0)
        for _ in range(num_pages // 2):
            cache.extend(kept, BLOCK)
            cache.extend(freed, BLOCK)
        cache.free(freed)
        return cache.defragment

    small, large = medians_of_fresh_ns([partial(interleaved, 2048), partial(interleaved, 8192)])
    yield Row("compact 2,048 interleaved pages", small)
    yield Row("compact 8,192 interleaved pages (F2)", large, bound=6 * small)


def row_formats() -> Iterator[Row]:
    """One token of 512 values; 4,096 distinct rows, so that nothing is learnt by heart, 64 tokens at once as in a step
    of many sequences. The calls from Python count too.
    """
    rows = np.random.default_rng(3).standard_normal((4096, 8, 64)).astype(np.float32)
    bounds = {KvFormat.Q8_0: 300.0, KvFormat.Q4_0: 400.0}
    for index, format in enumerate(KvFormat):
        out = np.empty((64 * 8, format.nbytes(64)), np.uint8)
        steps = rows.reshape(64, 64 * 8, 64)

        def ours_of_all(index: int = index, out: Bytes = out, steps: Floats = steps) -> None:
            for step in steps:
                _core.encode_kv_rows(index, step, out)

        ours = median_ns(ours_of_all, 1) / 4096
        numpy = median_ns(partial(encode, rows[:64], format), 1) / 64
        yield Row(
            f"encode one token of 512 values, {format.value}",
            ours,
            numpy,
            "numpy, 64 tokens at once",
            bounds.get(format),
        )


def machine() -> Iterator[Row]:
    def empty() -> None:
        pass

    yield Row("an empty Python call, for scale", median_ns(empty, 10_000))


SECTIONS = (machine, pages, append, lookups, idle_pages, forks, compaction, row_formats)


def show(row: Row) -> str:
    line = f"{row.name:<58}{row.ours:>12,.0f} ns"
    line += f"{row.baseline:>14,.0f} ns {row.baseline / row.ours:>8,.1f} x  {row.baseline_name}" if row.baseline else ""
    if row.bound is not None:
        line = f"{line:<125}<= {row.bound:,.0f} {'ok' if row.ours <= row.bound else 'MISSED'}"
    return line


def main(argv: list[str]) -> int:
    parser = Parser(prog="scripts/bench kv", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    rows: list[Row] = []
    if not options.json:
        print(f"{os.cpu_count()} cores, load average {load:.1f} at the start\n")
        print(f"{'':<58}{'ours':>15}{'plain version':>17}{'ratio':>11}")
    for section in SECTIONS:
        for row in section():
            rows.append(row)
            if not options.json:
                print(show(row), flush=True)
    if options.json:
        print(
            json.dumps(
                {"cores": os.cpu_count(), "load": load, "nanoseconds": [row._asdict() for row in rows]}, indent=1
            )
        )
    return 0
