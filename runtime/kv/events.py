"""What the prefix cache tells others about its content, for routers that send a request to where its prefix is."""

from __future__ import annotations

from collections.abc import Hashable

import msgspec
import xxhash


class PagesStored(msgspec.Struct, frozen=True):
    """Pages became findable. `parent` is the key of the page in front of the first, None at the start."""

    keys: list[bytes]
    parent: bytes | None
    salt: Hashable


class PagesRemoved(msgspec.Struct, frozen=True):
    """Pages are not findable any more."""

    keys: list[bytes]


class CacheCleared(msgspec.Struct, frozen=True):
    """No page is findable any more."""


CacheEvent = PagesStored | PagesRemoved | CacheCleared


def page_keys(tokens: bytes, page_nbytes: int, salt: Hashable = (), parent: bytes | None = None) -> list[bytes]:
    """Names of full pages for use outside this process: 16 bytes, chained, so that a page's key stands for all tokens
    up to its end. Inside the process nothing is looked up by key.

    Args:
        tokens: packed int32 ids; a last page that is not full gets no key.
        page_nbytes: bytes of one page's ids.
        salt: of the prefix tree. It must have the same `repr` wherever keys are compared.
        parent: key of the page in front of `tokens`.
    """
    keys: list[bytes] = []
    key = parent or xxhash.xxh3_128_digest(repr(salt).encode())
    for at in range(0, len(tokens) - page_nbytes + 1, page_nbytes):
        key = xxhash.xxh3_128_digest(key + tokens[at : at + page_nbytes])
        keys.append(key)
    return keys
