"""`hotset calibrate`: how strong a preference for experts in memory a model bears.

The measuring is a process of its own (workers/calibrate.py); here it is described, started and followed.
"""

from __future__ import annotations

import re
import select
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from hotset.runtime.channel import ChannelClosed
from hotset.runtime.config import STRENGTH_OPTIONS
from hotset.runtime.errors import HotsetError
from hotset.runtime.eviction import parse_eviction
from hotset.runtime.messages.calibration import CalibrationDone, CalibrationProgress, FromCalibrator, StartCalibration
from hotset.runtime.messages.message import ProcessFailed
from hotset.runtime.model.calibration import Calibration
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.supervision import Child

CALIBRATOR_MODULE = "hotset.workers.calibrate"
DEFAULT_TOKENS = 49_152
"""That are counted, of a text that has as many."""


class CalibrationFailed(HotsetError):
    """The model could not be calibrated."""


class Limit(msgspec.Struct, frozen=True):
    """What a preference may cost: `value` of perplexity, relative to exact routing's (0.0025 is +0.25 %), or of the
    mean KL divergence of the next token's distribution from exact routing's, in nats."""

    measure: Literal["perplexity", "divergence"]
    value: float

    def __str__(self) -> str:
        return f"perplexity +{100 * self.value:g} %" if self.measure == "perplexity" else f"KL {self.value:g}"


def parse_limit(max_kl: float | None, max_ppl: str | None) -> Limit:
    """Exactly one of the two. Raises `ValueError`."""
    if (max_kl is None) == (max_ppl is None):
        given = "neither of --max-kl and --max-ppl is" if max_kl is None else "both --max-kl and --max-ppl are"
        raise ValueError(f"{given} given, expected one of the two")
    if max_kl is not None:
        if not 0 < max_kl < 1:
            raise ValueError(f"--max-kl is {max_kl}, expected nats over 0 and under 1, such as 0.005")
        return Limit("divergence", max_kl)
    assert max_ppl is not None
    percent = _percentage(max_ppl)
    if not 0 < percent <= 10:
        raise ValueError(f"--max-ppl is {max_ppl!r}, expected a percentage over 0 and up to 10, such as 0.25%")
    return Limit("perplexity", percent / 100)


def _percentage(text: str) -> float:
    """The number before the sign; -1 for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    return float(match[1]) if match else -1.0


def start_message(
    model: Path, limit: Limit, text: Path | None, tokens: int | None, expert_budget: str, routing: str, eviction: str
) -> StartCalibration:
    """Raises `ValueError` or `OSError` for what cannot be measured, before anything is started."""
    if routing not in STRENGTH_OPTIONS:
        raise ValueError(f"--routing is {routing!r}, expected one of {', '.join(STRENGTH_OPTIONS)}")
    parse_eviction(eviction)
    budget = _percentage(expert_budget) / 100
    if not 0 < budget <= 1:
        raise ValueError(f"--expert-budget is {expert_budget!r}, expected a percentage of the experts, such as 25%")
    experts = ModelConfig.load(model).num_experts
    if int(budget * experts) < 1:
        raise ValueError(f"--expert-budget is {expert_budget!r}, expected at least one of a layer's {experts} experts")
    if text is not None and not text.is_file():
        raise ValueError(f"--text is {str(text)!r}, expected a file")
    return StartCalibration(
        model=str(model),
        routing=routing,
        eviction=eviction,
        budget=budget,
        measure=limit.measure,
        limit=limit.value,
        limit_text=str(limit),
        text=None if text is None else str(text.resolve()),
        tokens=tokens,
    )


def calibrate(start: StartCalibration, report: Callable[[CalibrationProgress], None]) -> Calibration:
    """Measures; writes nothing. Leaving it by any exception ends the process. Raises `CalibrationFailed`.

    To be called from the main thread: the process dies with the thread that started it.
    """
    child: Child[FromCalibrator] = Child(CALIBRATOR_MODULE, FromCalibrator, own_session=True)
    try:
        child.channel.send(start)
        while True:
            select.select([child.channel], [], [])
            for message in child.channel.receive():
                match message:
                    case CalibrationProgress():
                        report(message)
                    case CalibrationDone(calibration):
                        return calibration
                    case ProcessFailed(reason):
                        raise CalibrationFailed(reason)
    except ChannelClosed:
        child.kill()
        raise CalibrationFailed(f"the measuring process {child.reap()}") from None
    finally:
        child.kill()
        child.reap()
