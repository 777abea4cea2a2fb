"""A13: whatever is done in whatever order, the bookkeeping stays consistent, and a hit never lies.

A plain model keeps what the cache must not change: the tokens of every sequence. Each page is marked with
the tokens that were written into it, and with the group of layers, so that a wrong share, a missing copy or an
early reuse shows as wrong content.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.errors import OutOfBounds, OutOfPages

BLOCK = 4
MARK = 1000  # of a group, so that its rows are not another group's


class TokenMemory:
    """Keeps a token id in place of each row."""

    page_nbytes = 4 * BLOCK

    def __init__(self, num_pages: int) -> None:
        self.rows = [[-1] * BLOCK for _ in range(num_pages + 1)]

    def copy_page(self, source: int, destination: int) -> None:
        self.rows[destination] = self.rows[source].copy()

    def clear_pages(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.rows[page] = [-1] * BLOCK


class Exerciser:
    """Does one random operation at a time to a cache and to the model."""

    def __init__(self, seed: int, num_pages: int, windows: Sequence[int] = (0,), max_step: int | None = None) -> None:
        self.random = random.Random(seed)
        self.windows = windows
        self.memory = TokenMemory(num_pages)
        self.cache = PagedKvCache(num_pages, BLOCK, windows=windows, max_step=max_step, memory=self.memory)
        self.sequences: dict[int, list[int]] = {}
        self.pinned: list[list[int]] = []
        self.prompts = [self._tokens(self.random.randrange(1, 40)) for _ in range(12)]
        self.refused = 0
        self.released: dict[int, int] = {}  # tokens that a sliding window gave back, per sequence

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(3) for _ in range(count)]

    def _write(self, sequence: int, position: int, token: int) -> None:
        if position // BLOCK >= self.cache.num_released(sequence):
            self.cache.writable_page(sequence, position)
        self._mark(sequence, position, token)

    def _mark(self, sequence: int, position: int, token: int) -> None:
        for group in range(len(self.windows)):
            if position // BLOCK >= self.cache.num_released(sequence, group):
                page, offset = self.cache.slot(sequence, position, group)
                self.memory.rows[page][offset] = group * MARK + token

    def step(self) -> None:
        operations = ["admit", "allocate", "lookup", "evict", "defragment", "pin", "unpin", "reset"]
        if self.sequences:
            operations += ["append"] * 4 + ["fork", "free", "free", "truncate", "write", "extend", "rebuild", "slide"]
        name = self.random.choice(operations)
        sequence = self.random.choice(list(self.sequences)) if self.sequences else 0
        try:
            getattr(self, name)(sequence)
        except OutOfPages:
            self.refused += 1

    def admit(self, _: int) -> None:
        prompt = self.random.choice(self.prompts) + self._tokens(self.random.randrange(6))
        sequence, hit = self.cache.admit(prompt, salt=self.random.choice("ab"))
        self.sequences[sequence] = prompt[:hit]
        self._verify_sequence(sequence)
        try:
            self._compute(sequence, hit, prompt)
        except OutOfPages:
            self.free(sequence)
            raise

    def _compute(self, sequence: int, hit: int, prompt: list[int]) -> None:
        for position in range(hit, len(prompt)):
            if self.cache.num_blocks(sequence) * BLOCK <= position:
                self.cache.commit(sequence, position)
                self.sequences[sequence] = prompt[:position]
                self._verify_sequence(sequence)
                self.cache.reserve(sequence, 0)
            self._write(sequence, position, prompt[position])
        self.cache.commit(sequence, len(prompt))
        self.sequences[sequence] = prompt

    def allocate(self, _: int) -> None:
        tokens = self._tokens(self.random.randrange(30))
        sequence = self.cache.allocate(len(tokens))
        self.sequences[sequence] = tokens
        for position, token in enumerate(tokens):
            self._write(sequence, position, token)

    def append(self, sequence: int) -> None:
        for token in self._tokens(self.random.randrange(1, 6)):
            self.cache.append(sequence, token)
            self.sequences[sequence].append(token)
            self._mark(sequence, len(self.sequences[sequence]) - 1, token)

    def fork(self, sequence: int) -> None:
        child = self.cache.fork(sequence)
        self.sequences[child] = self.sequences[sequence].copy()
        self.released[child] = self.released.get(sequence, 0)

    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        del self.sequences[sequence]

    def truncate(self, sequence: int) -> None:
        length = self.random.randint(self.released.get(sequence, 0), len(self.sequences[sequence]))
        try:
            self.cache.truncate(sequence, length)
        except OutOfBounds:
            assert any(self.windows), "only what lies behind a window may be missing"
        else:
            del self.sequences[sequence][length:]

    def write(self, sequence: int) -> None:
        """Writes the value that is there already: no content changes, but shared and published pages are
        copied.
        """
        tokens = self.sequences[sequence]
        first = self.released.get(sequence, 0)
        if len(tokens) > first:
            position = self.random.randrange(first, len(tokens))
            self._write(sequence, position, tokens[position])

    def extend(self, sequence: int) -> None:
        self.cache.extend(sequence, self.random.randrange(10))

    def rebuild(self, sequence: int) -> None:
        """Preemption: free and admit the same tokens again."""
        tokens = self.sequences[sequence]
        self.free(sequence)
        if tokens:
            self.prompts[self.random.randrange(len(self.prompts))] = tokens[:40]

    def slide(self, sequence: int) -> None:
        length = len(self.sequences[sequence])
        if self.random.random() < 0.3:
            position = self.random.randint(0, length)
            self.cache.release_before(sequence, position)
            self.released[sequence] = max(self.released.get(sequence, 0), position // BLOCK * BLOCK)

    def lookup(self, _: int) -> None:
        self.cache.match(self.random.choice(self.prompts), self.random.choice("ab"))

    def evict(self, _: int) -> None:
        self.cache.evict(self.random.randrange(4))

    def defragment(self, _: int) -> None:
        self.cache.defragment(self.random.choice([None, 1, 3]))

    def pin(self, _: int) -> None:
        pages = self.cache.match_pages(self.random.choice(self.prompts), self.random.choice("ab"))
        if len(pages) > 1 and self.random.random() < 0.3:
            pages = pages[1:]
        self.cache.pin(pages)
        self.pinned.append(pages)

    def unpin(self, _: int) -> None:
        if self.pinned:
            self.cache.unpin(self.pinned.pop(self.random.randrange(len(self.pinned))))

    def reset(self, _: int) -> None:
        if self.random.random() < 0.1:
            assert self.cache.reset_prefix_cache() == (self.cache.num_used_pages == 0)

    def verify(self) -> None:
        self.cache.check()
        stats = self.cache.stats()
        assert stats.pages_free + stats.pages_idle + stats.pages_used == self.cache.num_pages
        for sequence in self.sequences:
            self._verify_sequence(sequence)
        for prompt in self.prompts[:3]:
            pages = self.cache.match_pages(prompt, "a")
            held = [token for page in pages for token in self.memory.rows[page]]
            assert held == prompt[: len(held)]

    def _verify_sequence(self, sequence: int) -> None:
        """Every group has the rows that the next token sees."""
        tokens = self.sequences[sequence]
        for group, window in enumerate(self.windows):
            table = self.cache.block_table(sequence, group)
            first = max(self.released.get(sequence, 0) if group == 0 else 0, len(tokens) + 1 - window if window else 0)
            rows = [self.memory.rows[table[at // BLOCK]][at % BLOCK] for at in range(first, len(tokens))]
            assert rows == [group * MARK + token for token in tokens[first:]]


@pytest.mark.parametrize(
    ("seed", "num_pages", "windows", "max_step"),
    [
        (1, 40, (0,), None),
        (2, 12, (0,), None),
        (3, 200, (0,), None),
        (4, 3, (0,), None),
        (5, 40, (0, 9), None),
        (6, 80, (0, 12, 1), 5),
        (7, 200, (0, 9), 3),
        (8, 20, (9,), 4),
        (9, 30, (16, 7), 8),
    ],
)
def test_A13_the_bookkeeping_survives_random_operations(
    seed: int, num_pages: int, windows: tuple[int, ...], max_step: int | None
) -> None:
    exerciser = Exerciser(seed, num_pages, windows, max_step)
    for _ in range(2500):
        exerciser.step()
        exerciser.verify()
    assert exerciser.refused or num_pages == 200
    assert exerciser.cache.stats().evictions
    for sequence in list(exerciser.sequences):
        exerciser.free(sequence)
    for pages in exerciser.pinned:
        exerciser.cache.unpin(pages)
    assert exerciser.cache.num_free_pages == num_pages
    assert exerciser.cache.reset_prefix_cache()
    exerciser.verify()
