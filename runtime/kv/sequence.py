"""The state of one sequence in the KV cache."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

from hotset.runtime.kv.prefix_eviction import DEFAULT_PRIORITY

_NO_TOKENS = array("i")


class CachedSequence:
    """Block tables and what is known about their tokens.

    Every table has pages for `length` tokens; those of groups without a window have them for `reserved` ones.

    Attributes:
        tables: per group of layers page numbers in the order of the tokens; `NO_PAGE` where a sliding window gave the
            page back.
        length: tokens whose rows are written.
        reserved: tokens that room was asked for; appending beyond them takes pages as needed.
        append_limit: below this length a token goes into the tail page without any further look: the page exists, is
            named by this sequence alone, and this token does not fill it up to be published.
        released: per group, leading pages that a sliding window gave back.
        publishable: whether the ids of all tokens are known, so that full pages go into the prefix tree.
        tokens: their ids if so, possibly beyond `length` (a prompt that is not computed yet); empty if not.
        published: leading pages that the prefix tree was offered.
        salt: names the prefix tree; sequences of different salts never share.
        priority, retention: of its published pages, see `EvictionOrder`.
    """

    __slots__ = (
        "append_limit",
        "length",
        "priority",
        "publishable",
        "published",
        "released",
        "reserved",
        "retention",
        "salt",
        "tables",
        "tokens",
    )

    def __init__(self, tables: list[list[int]], length: int, reserved: int) -> None:
        self.tables = tables
        self.length = length
        self.reserved = reserved
        self.append_limit = 0
        self.released = [0] * len(tables)
        self.tokens = _NO_TOKENS
        self.published = 0
        self.publishable = False
        self.salt: Hashable = ()
        self.priority = DEFAULT_PRIORITY
        self.retention: float | None = None

    @property
    def table(self) -> list[int]:
        """That of the first group."""
        return self.tables[0]
