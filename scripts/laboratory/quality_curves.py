"""What a preference costs and saves, with intervals of 95 %, from the sums that were measured in every window.

All settings decode the same windows, so that differences are paired; intervals come from resampling whole windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from laboratory.quality_results import Line

Doubles = npt.NDArray[np.float64]

ALLOWED = (0.25, 0.5, 1.0)
"""Percent of perplexity that a preference may cost."""
RESAMPLES = 2000


class Estimate(msgspec.Struct, frozen=True):
    """With its interval of 95 %."""

    value: float
    low: float
    high: float

    def text(self, digits: int, sign: str = "") -> str:
        return f"{self.value:{sign}.{digits}f} ± {(self.high - self.low) / 2:.{digits}f}"


class Row(msgspec.Struct, frozen=True):
    """One setting. Percent, but for the divergence: mean KL(exact || this) per token, in nats."""

    budget: float
    batch: int
    eviction: str
    routing: str
    strength: float
    hit_rate: Estimate
    perplexity_change: Estimate
    divergence: Estimate


class Reached(msgspec.Struct, frozen=True):
    """The hit rate at the largest strength that costs at most `allowed` percent of perplexity, between the strengths
    that were measured by interpolation; `strength` is None where even the largest costs less."""

    budget: float
    batch: int
    eviction: str
    routing: str
    allowed: float
    strength: float | None
    hit_rate: Estimate


class Resamples:
    """Sums over the windows of a text, and over as many windows drawn with replacement, [1 + RESAMPLES]."""

    def __init__(self, windows: int) -> None:
        random = np.random.default_rng(0)
        drawn = random.multinomial(windows, np.full(windows, 1 / windows), RESAMPLES)
        self._counts = np.vstack([np.ones(windows), drawn])

    def __call__(self, values: Doubles) -> Doubles:
        return self._counts @ values


def estimate(values: Doubles) -> Estimate:
    """Of resampled values, the first being the one of the text itself."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return Estimate(float(values[0]), float(low), float(high))


class Curve:
    """Lines of one kind of instance, strengths ascending, the first being exact routing."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = sorted(lines, key=lambda line: line.setting.strength)
        exact = self.lines[0].of_instances("loss")
        resamples = Resamples(len(exact))
        tokens = resamples(np.full(len(exact), float(lines[0].text.tokens * lines[0].setting.batch)))
        hits = np.array([resamples(line.of_instances("hits")) for line in self.lines])
        misses = np.array([resamples(line.of_instances("misses")) for line in self.lines])
        losses = np.array([resamples(line.of_instances("loss") - exact) for line in self.lines])
        self.hit_rate = 100 * hits / (hits + misses)
        self.change = 100 * np.expm1(losses / tokens)
        self.divergence = np.array([resamples(line.of_instances("divergence")) for line in self.lines]) / tokens

    def rows(self, budget: float) -> Iterator[Row]:
        for index, line in enumerate(self.lines):
            of = line.setting
            yield Row(
                budget,
                of.batch,
                of.eviction,
                of.routing,
                of.strength,
                estimate(self.hit_rate[index]),
                estimate(self.change[index]),
                estimate(self.divergence[index]),
            )

    def reached(self, budget: float, allowed: float) -> Reached:
        strengths = np.array([line.setting.strength for line in self.lines])
        found = [_within(strengths, *columns, allowed) for columns in zip(self.change.T, self.hit_rate.T, strict=True)]
        of = self.lines[-1].setting
        strength = found[0][0]
        return Reached(
            budget,
            of.batch,
            of.eviction,
            of.routing,
            allowed,
            None if math.isinf(strength) else float(strength),
            estimate(np.array([hit_rate for _, hit_rate in found])),
        )


def _within(strengths: Doubles, change: Doubles, hit_rate: Doubles, allowed: float) -> tuple[float, float]:
    """(strength, hit rate) where the cost first exceeds what is allowed; (inf, ...) if it does not."""
    over = np.flatnonzero(change > allowed)
    if not len(over):
        return math.inf, float(hit_rate[-1])
    at = int(over[0])
    share = (allowed - change[at - 1]) / (change[at] - change[at - 1])
    return (
        float(strengths[at - 1] + share * (strengths[at] - strengths[at - 1])),
        float(hit_rate[at - 1] + share * (hit_rate[at] - hit_rate[at - 1])),
    )


def curves(lines: Sequence[Line]) -> dict[tuple[int, int, str, str], Curve]:
    """By slots, batch, eviction and routing; those of routing "off" are each curve's first line."""
    exact = {(of.slots, of.batch, of.eviction): line for line in lines if (of := line.setting).routing == "off"}
    groups: dict[tuple[int, int, str, str], list[Line]] = {}
    for line in lines:
        of = line.setting
        if of.routing != "off":
            first = exact[of.slots, of.batch, of.eviction]
            groups.setdefault((of.slots, of.batch, of.eviction, of.routing), [first]).append(line)
        else:
            groups.setdefault((of.slots, of.batch, of.eviction, "off"), [line])
    return {key: Curve(group) for key, group in groups.items()}
