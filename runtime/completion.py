"""When a sequence is complete. Asked by the worker after every token, and by the coordinator for a dead worker."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


def completion(token: int, known: int, limit: int, eos_token_ids: Collection[int]) -> FinishReason | None:
    """Why a sequence of `known` tokens ends with `token`: "stop" or "length"; None if it goes on."""
    if token in eos_token_ids:
        return "stop"
    return "length" if known >= limit else None
