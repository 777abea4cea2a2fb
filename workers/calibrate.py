"""The process that measures for `hotset calibrate`: how strong a preference for resident experts a model bears.

Two runs of workers/simulation.py over one text. The first decodes it under a ladder of strengths with the budget that
was asked for; what they cost, as a function of the strength, says which one costs the limit. The second decodes it with
that strength under several budgets: what to expect.
"""

from __future__ import annotations

import itertools
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.calibrator import DEFAULT_TOKENS, CalibrationFailed
from hotset.runtime.channel import Channel
from hotset.runtime.config import RoutingPolicy
from hotset.runtime.messages.calibration import CalibrationDone, CalibrationProgress, StartCalibration, ToCalibrator
from hotset.runtime.model.calibration import Calibration, Expectation
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.runtime.supervision import run_child
from hotset.shm.kv_page_format import KvFormat
from hotset.workers.compute import _kernels
from hotset.workers.simulated_instance import Setting
from hotset.workers.simulation import Outcome, Simulation, windows_of

Doubles = npt.NDArray[np.float64]

LADDERS: dict[RoutingPolicy, tuple[float, ...]] = {
    "bonus": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    "range": (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3),
    "mass": (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12),
    "resnorm": (0.03, 0.06, 0.09, 0.12, 0.16, 0.22, 0.3, 0.45),
    "substitute": (0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.12),
}
POWERS = (1, 2, 3, 4)
BUDGETS = (0.125, 0.25, 0.375, 0.5, 0.75)
TEXTS = 12
LONGEST_WINDOW = 1024
SHORTEST_WINDOW = 64
WARM_UP = 1  # windows in which the caches fill
SAMPLE_PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest", "xml")


def sample_text() -> str:
    """Something to read for a model when the user gives nothing."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for package in SAMPLE_PACKAGES for path in (root / package).rglob("*.py"))
    return "\n".join(path.read_text("utf-8", errors="replace") for path in files)


def windows_within_memory(model: ModelConfig, kinds: int, available: int) -> tuple[int, int]:
    """(texts, tokens of a window) whose KV rows, `kinds` times, take at most a quarter of `available` bytes."""
    row = model.kv_nbytes_per_token(KvFormat.FLOAT32)
    texts, window = TEXTS, min(LONGEST_WINDOW, model.max_position_embeddings)
    while kinds * texts * window * row > available // 4 and (texts > 2 or window > SHORTEST_WINDOW):
        if texts > 2:
            texts //= 2
        else:
            window //= 2
    return texts, window


def cut(stream: npt.NDArray[np.int32], tokens: int | None, texts: int, window: int, name: str) -> npt.NDArray[np.int32]:
    """The text as `windows_of` gives it, with at least `tokens` that are counted; None is `DEFAULT_TOKENS`, or as many
    as there are. Raises `CalibrationFailed`, by the text's name."""
    span = (len(stream) - 1) // texts
    window = min(window, span // (WARM_UP + 1))
    if window < SHORTEST_WINDOW:
        least = texts * SHORTEST_WINDOW * (WARM_UP + 1) + 1
        raise CalibrationFailed(f"{name} has {len(stream):,} tokens, expected at least {least:,}")
    windows = WARM_UP + -(-(tokens or DEFAULT_TOKENS) // (texts * window))
    if windows > span // window:
        if tokens is not None:
            raise CalibrationFailed(
                f"{name} has {len(stream):,} tokens, expected at least {texts * windows * window + 1:,} to measure on "
                f"{tokens:,} of them: the caches fill on {texts * WARM_UP * window:,}"
            )
        windows = span // window
    return windows_of(stream, texts=texts, windows=windows, length=window)


class Cost(msgspec.Struct, frozen=True):
    """Per token: relative change of perplexity with its standard error over the windows, and mean divergence."""

    perplexity_change: float
    perplexity_error: float
    divergence: float

    @classmethod
    def of(cls, outcome: Outcome, exact: Outcome, window: int) -> Cost:
        paired = (outcome.loss - exact.loss)[:, WARM_UP:].ravel() / window
        error = float(paired.std(ddof=1) / np.sqrt(paired.size)) if paired.size > 1 else 0.0
        divergence = float(outcome.divergence[:, WARM_UP:].mean() / window)
        return cls(float(np.expm1(paired.mean())), error, divergence)


def hit_rate(hits: npt.NDArray[np.int64], misses: npt.NDArray[np.int64]) -> float:
    found, missed = int(hits[:, WARM_UP:].sum()), int(misses[:, WARM_UP:].sum())
    return found / (found + missed) if found + missed else 0.0


def strength_within(strengths: Sequence[float], costs: Sequence[float], errors: Sequence[float], limit: float) -> float:
    """The strength at which a smooth curve through the measured costs reaches `limit`, at most the largest measured.

    The curve is a sum of the powers 1 to 4 of the strength with coefficients >= 0, by least squares in units of the
    errors: no preference costs nothing, and more of it costs more. One strength's perplexity alone is hardly known
    better than what is usually allowed.
    """
    s = np.array(strengths)
    weights = 1 / np.maximum(np.array(errors), 1e-12)
    wanted = np.array(costs) * weights
    best, curve = np.inf, np.zeros(len(POWERS))  # costs less than nothing
    for used in itertools.chain.from_iterable(
        itertools.combinations(range(len(POWERS)), n + 1) for n in range(len(POWERS))
    ):
        design = np.stack([s ** POWERS[index] * weights for index in used], axis=1)
        solved, *_ = np.linalg.lstsq(design, wanted, rcond=None)
        rest = float(np.sum((design @ solved - wanted) ** 2))
        if (solved >= 0).all() and rest < best:
            best, curve = rest, np.zeros(len(POWERS))
            curve[list(used)] = solved

    def cost(strength: float) -> float:
        return float(curve @ strength ** np.array(POWERS))

    low, high = 0.0, float(s[-1])
    if cost(high) <= limit:
        return high
    for _ in range(50):  # it rises
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


class Calibrator:
    def __init__(self, channel: Channel[ToCalibrator], start: StartCalibration) -> None:
        self._channel = channel
        self._start = start
        self._path = Path(start.model)
        self._model = ModelConfig.load(start.model)
        if start.text is None:
            text = sample_text()
        else:
            try:
                text = Path(start.text).read_text("utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationFailed(f"{start.text} is not text in UTF-8: {error}") from None
        stream = Tokenizer(start.model).encode(text)
        self._text_name = start.text or "Python sources of the installation"
        kinds = max(len(LADDERS[start.routing]), len(BUDGETS)) + 1
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._texts = cut(stream, start.tokens, *windows_within_memory(self._model, kinds, available), self._text_name)
        self._window = self._texts.shape[2] - 1

    def run(self) -> None:
        start = self._start
        _kernels.set_num_threads(min(_kernels.MAX_THREADS, len(os.sched_getaffinity(0))))
        ladder = [self._setting(strength, start.budget) for strength in LADDERS[start.routing]]
        _, exact, outcomes = self._measure("which strength", ladder)
        costs = [Cost.of(outcome, exact, self._window) for outcome in outcomes]
        if start.measure == "perplexity":
            spent, errors = [c.perplexity_change for c in costs], [c.perplexity_error for c in costs]
        else:
            spent = [c.divergence for c in costs]
            errors = spent  # what differs is the shape of the curve, not chance: equal relative weights
        strength = strength_within(LADDERS[start.routing], spent, errors, start.limit)
        budgets = [self._setting(strength, budget) for budget in BUDGETS]
        simulation, exact, outcomes = self._measure("what to expect", budgets)
        expectations: list[Expectation] = []
        for budget, setting, outcome in zip(BUDGETS, budgets, outcomes, strict=True):
            cost = Cost.of(outcome, exact, self._window)
            expectations.append(
                Expectation(
                    budget,
                    hit_rate(outcome.hits, outcome.misses),
                    hit_rate(*simulation.exact_hits(setting)),
                    cost.perplexity_change,
                    cost.divergence,
                )
            )
        self._channel.send(
            CalibrationDone(
                Calibration(
                    routing=start.routing,
                    strength=round(strength, 5),
                    limit=f"{start.limit_text} with {start.budget:.3%} of the experts in memory".replace(".000%", "%"),
                    text=self._text_name,
                    tokens=int(self._texts[:, WARM_UP:, 1:].size),
                    eviction=start.eviction,
                    expectations=expectations,
                )
            )
        )

    def _setting(self, strength: float, budget: float) -> Setting:
        slots = max(1, int(self._model.num_experts * budget))
        return Setting(self._start.routing, strength, self._start.eviction, slots, shared=True)

    def _measure(self, phase: str, settings: Sequence[Setting]) -> tuple[Simulation, Outcome, list[Outcome]]:
        simulation = Simulation(self._path, self._texts, settings)
        exact, *outcomes = simulation.run(lambda done, total: self._report(phase, done, total))
        return simulation, exact, outcomes

    def _report(self, phase: str, done: int, total: int) -> None:
        self._channel.send(CalibrationProgress(phase, done, total))


def main(arguments: list[str]) -> int:
    return run_child(arguments, ToCalibrator, StartCalibration, lambda channel, start: Calibrator(channel, start).run())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
