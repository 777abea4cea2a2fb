"""Which pages to move so that the used ones lie together at the front of the arena."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


class PageMove(NamedTuple):
    """The rows of `source` go to `destination`, which is free at that time."""

    source: int
    destination: int


def plan_moves(
    num_pages: int,
    free: Collection[int],
    pinned: Collection[int],
    runs: Iterable[Sequence[int]],
    max_moves: int | None = None,
) -> list[PageMove]:
    """Fills the free pages among the first ones, in one ascending pass; linear in the pages.

    A hole gets the page that follows its left neighbour in some run, if that page is itself out of place;
    else the first used page beyond the compact area. Each page moves at most once, pinned ones never; without
    pinned pages the used ones are 1 ... used afterwards, and a second call moves nothing.

    Args:
        num_pages: pages 1 ... num_pages exist.
        free: numbers of the free pages.
        pinned: pages that must stay.
        runs: pages that should follow each other: block tables, and runs of the prefix tree.
        max_moves: stop after so many; calling again continues.
    """
    content = list(range(num_pages + 1))  # which page's rows lie in a place, 0 for none
    for page in free:
        content[page] = 0
    following: dict[int, int] = {}
    for run in runs:
        for page, successor in itertools.pairwise(run):
            if page:
                following.setdefault(page, successor)
    used = num_pages - len(free)
    moves: list[PageMove] = []
    beyond = used + 1  # the first place beyond the compact area that may still have to be emptied
    place = 0
    while max_moves is None or len(moves) < max_moves:
        try:
            place = content.index(0, place + 1, used + 1)
        except ValueError:
            break
        source = following.get(content[place - 1], 0)
        misplaced = source > used or content[min(source + 1, num_pages)] != following.get(source)
        if source <= place or content[source] != source or source in pinned or not misplaced:
            while beyond <= num_pages and (not content[beyond] or beyond in pinned):
                beyond += 1
            if beyond > num_pages:
                continue
            source = beyond
        moves.append(PageMove(source, place))
        content[place] = source
        content[source] = 0
    return moves
