"""What one writes first: the bookkeeping of a KV cache in plain Python, to compare ours with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class PlainPagePool:
    """Page objects, a deque of free ones, a set of used ones."""

    class Page:
        def __init__(self, number: int) -> None:
            self.number = number
            self.references = 0

    def __init__(self, num_pages: int) -> None:
        self.pages = [self.Page(number) for number in range(num_pages)]
        self.free = deque(range(num_pages))
        self.used: set[int] = set()

    def allocate(self) -> int:
        page = self.pages[self.free.popleft()]
        page.references = 1
        self.used.add(page.number)
        return page.number

    def take_over(self, number: int) -> None:
        self.free.remove(number)
        self.used.add(number)
        self.pages[number].references = 1


class PlainPrefixCache:
    """A dictionary of hashes, each of a page's tokens and the hash before.

    Args:
        block_size: tokens of a page; prompts are int32, packed.
        digest: the hash.
    """

    def __init__(self, block_size: int, digest: Callable[[bytes], bytes]) -> None:
        self._page_nbytes = 4 * block_size
        self._block_size = block_size
        self._digest = digest
        self._known: dict[bytes, int] = {}

    def store(self, prompt: bytes) -> None:
        key = b""
        for index, at in enumerate(range(0, len(prompt), self._page_nbytes)):
            key = self._digest(key + prompt[at : at + self._page_nbytes])
            self._known[key] = index

    def match(self, prompt: bytes) -> int:
        """How many tokens of its beginning are known."""
        key, hit = b"", 0
        for at in range(0, len(prompt), self._page_nbytes):
            key = self._digest(key + prompt[at : at + self._page_nbytes])
            if key not in self._known:
                break
            hit += self._block_size
        return hit
