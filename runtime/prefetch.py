"""What a user may ask for as prefetch, as text: "off", "auto", "gate-ahead", "gate-ahead+transitions" ..."""

from __future__ import annotations

import msgspec

from hotset.shm.layout import PrefetchSource

LEAST_PRECISION = 0.6  # a prefetch that is used less often costs more reads than it saves waits

SOURCES = {
    source.name.lower().replace("_", "-"): source
    for source in PrefetchSource
    if source not in (PrefetchSource.NONE, PrefetchSource.ENGINE)
}
AUTO_SOURCES = (PrefetchSource.GATE_AHEAD,)


class PrefetchSettings(msgspec.Struct, frozen=True):
    """Which sources name experts to fetch before they are needed.

    Attributes:
        sources: none: nothing is prefetched.
        guarded: steps with and without are timed in turn, and those with have to be faster ("auto").
    """

    sources: tuple[PrefetchSource, ...] = ()
    guarded: bool = False


def parse_prefetch(text: str) -> PrefetchSettings:
    """Raises `ValueError` naming the text and what is expected."""
    if text == "off":
        return PrefetchSettings()
    if text == "auto":
        return PrefetchSettings(AUTO_SOURCES, guarded=True)
    names = text.split("+")
    if len({*names}) != len(names) or not SOURCES.keys() >= {*names}:
        raise ValueError(f"prefetch is {text!r}, expected off, auto, or {', '.join(SOURCES)}, several with +")
    return PrefetchSettings(tuple(SOURCES[name] for name in names))
