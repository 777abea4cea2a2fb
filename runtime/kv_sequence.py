"""The state of one sequence in the KV cache."""

from __future__ import annotations

from array import array
from collections.abc import Hashable


class CachedSequence:
    """A block table and what is known about its tokens.

    `0 <= length <= reserved <= len(table) * block_size` (reserved grows with length).

    Attributes:
        table: page numbers in the order of the tokens; `NO_PAGE` where a sliding window gave the page back.
        length: tokens whose rows are written.
        reserved: tokens that there is room for; pages are held for all of them.
        append_limit: below this length a token goes into the tail page without any further look: the page
            exists, is named by this sequence alone, and this token does not fill it up to be published.
        tokens: ids of the tokens, possibly beyond `length` (a prompt that is not computed yet).
        published: leading pages that the prefix tree was offered.
        publishable: whether the ids of all tokens are known, so that full pages go into the prefix tree.
        salt: names the prefix tree's root; sequences of different salts never share.
        priority, priority_until: retention of published pages against eviction.
    """

    __slots__ = (
        "append_limit",
        "length",
        "priority",
        "priority_until",
        "publishable",
        "published",
        "reserved",
        "salt",
        "table",
        "tokens",
    )

    def __init__(self, table: list[int], length: int, reserved: int) -> None:
        self.table = table
        self.length = length
        self.reserved = reserved
        self.append_limit = 0
        self.tokens = array("i")
        self.published = 0
        self.publishable = False
        self.salt: Hashable = ()
        self.priority = 0
        self.priority_until = 0.0
