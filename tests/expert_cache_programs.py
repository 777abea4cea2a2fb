"""Programs that use an expert cache, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from shipped_experts import EXPERTS, LAYERS, PARTS, bits

from hotset.runtime import (
    ExpertCache,
)

QUARTER = {"expert_budget": "25%", "warm_start": False}


def use(cache: ExpertCache, steps: int, seed: int) -> None:
    """Compares every byte of what it pins, while it is pinned."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        layer, experts = int(rng.integers(LAYERS)), rng.choice(EXPERTS, 4, replace=False)
        with cache.pinned(layer, experts) as pinned:
            for expert, weights in pinned.items():
                for part in PARTS:
                    assert np.array_equal(weights[part], bits(layer, expert, part))


@contextmanager
def program(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program; it is killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from hotset.runtime import ExpertCache\n" + text, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLDS = """
import sys, time
cache = ExpertCache.attach(sys.argv[1])
with cache.pinned(0, [1, 2, 3]) as pinned:
    sums = [int(weights.bytes.sum()) for weights in pinned.values()]
    print("holds", flush=True)
    sys.stdin.readline()
    assert sums == [int(pinned[expert].bytes.sum()) for expert in pinned]
    print("held", flush=True)
cache.close()
print("left", flush=True)
sys.stdin.readline()
"""
