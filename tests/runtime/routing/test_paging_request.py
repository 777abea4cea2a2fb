from __future__ import annotations

from hotset.runtime import PagingDirection, PagingPriority, PagingRequest


def test_constructors() -> None:
    urgent, prefetch, out = PagingRequest.page_in_urgent(3, 1), PagingRequest.prefetch(4), PagingRequest.page_out(5, 2)
    assert urgent == PagingRequest(3, 1, PagingDirection.IN, PagingPriority.URGENT)
    assert prefetch == PagingRequest(4, 0, PagingDirection.IN, PagingPriority.PREFETCH)
    assert out == PagingRequest(5, 2, PagingDirection.OUT, PagingPriority.NORMAL)


def test_urgent_sorts_above_prefetch() -> None:
    assert PagingPriority.URGENT > PagingPriority.NORMAL > PagingPriority.PREFETCH
