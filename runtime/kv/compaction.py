"""Which pages to move so that the used ones lie together at the front of the arena."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from hotset.runtime.kv.page_pool import NO_PAGE


def plan_moves(
    num_pages: int,
    free: Collection[int],
    pinned: Collection[int],
    runs: Sequence[Sequence[int]],
    max_moves: int | None = None,
) -> dict[int, int]:
    """Fills the free pages among the first ones, in one ascending pass; linear in the pages.

    A hole gets the page that follows its left neighbour in some run, if that page is itself out of place; else the
    first used page beyond the compact area. Each page moves at most once, pinned ones never; without pinned pages the
    used ones are 1 ... used afterwards, and a second call moves nothing.

    Args:
        num_pages: pages 1 ... num_pages exist.
        free: numbers of the free pages.
        pinned: pages that must stay.
        runs: pages that should follow each other: block tables, and runs of the prefix tree.
        max_moves: stop after so many; calling again continues.

    Returns:
        Source -> destination, in the order in which the rows have to be copied: each destination is free by then.
    """
    occupied = bytearray(b"\x01") * (num_pages + 1)
    for page in free:
        occupied[page] = 0
    following: dict[int, int] = {}
    for run in reversed(runs):  # where two runs disagree, the first one counts
        following.update(itertools.pairwise(run))
    following.pop(NO_PAGE, None)
    used = num_pages - len(free)
    moves: dict[int, int] = {}
    beyond = used + 1  # the first place beyond the compact area that may still have to be emptied
    place = source = NO_PAGE
    while max_moves is None or len(moves) < max_moves:
        left, moved_there = place, source
        place = occupied.find(0, place + 1, used + 1)
        if place < 0:
            break
        source = following.get(moved_there if place == left + 1 else place - 1, NO_PAGE)
        in_place = source <= place or not occupied[source] or source in pinned
        if not in_place and source <= used:  # a run that lies together is not torn up for the one before it
            in_place = bool(occupied[source + 1]) and following.get(source) == source + 1
        if in_place:
            while beyond <= num_pages and (not occupied[beyond] or beyond in pinned):
                beyond += 1
            if beyond > num_pages:
                source = NO_PAGE
                continue
            source = beyond
        moves[source] = place
        occupied[place] = 1
        occupied[source] = 0
    return moves
