"""A checksum of pieces that come in any order, from one thread or several."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash

from hotset.workers.running_checksum import RunningChecksum

SLOT = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
WHOLE = xxhash.xxh3_64_intdigest(SLOT.tobytes())


def pieces(seed: int) -> list[tuple[int, int]]:
    """The slot cut at random places, in a random order."""
    chance = random.Random(seed)
    cuts = [0, *sorted(chance.sample(range(1, len(SLOT)), 30)), len(SLOT)]
    return chance.sample([(a, b - a) for a, b in itertools.pairwise(cuts)], 31)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_pieces_does_not_matter(seed: int) -> None:
    checksum = RunningChecksum(SLOT)
    for piece in pieces(seed):
        checksum.add([piece])
    assert checksum.digest() == WHOLE


def test_several_threads_bring_pieces() -> None:
    with ThreadPoolExecutor(4) as threads:
        for seed in range(50):
            checksum = RunningChecksum(SLOT)
            list(threads.map(lambda piece, checksum=checksum: checksum.add([piece]), pieces(seed)))
            assert checksum.digest() == WHOLE


def test_what_comes_after_a_gap_waits() -> None:
    checksum = RunningChecksum(SLOT)
    checksum.add([(100, 50), (0, 60)])
    assert checksum.digest() == xxhash.xxh3_64_intdigest(SLOT[:60].tobytes())
    checksum.add([(60, 40)])
    assert checksum.digest() == xxhash.xxh3_64_intdigest(SLOT[:150].tobytes())
