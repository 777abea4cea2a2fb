"""What `hotset calibrate` and its measuring process say to each other."""

from __future__ import annotations

from typing import Literal

from hotset.runtime.config import RoutingPolicy
from hotset.runtime.messages.message import Message, ProcessFailed, StopWorking
from hotset.runtime.model.calibration import Calibration


class StartCalibration(Message, frozen=True, tag=True):
    """Find the strength at which `routing` costs `limit` of `measure` with `budget` of the experts (0 to 1) in memory.

    `tokens` of the file `text` are counted, and it is refused if it has fewer; None is `DEFAULT_TOKENS`, or as many as
    it has. Without a file, it is Python sources of this installation.
    """

    model: str
    routing: RoutingPolicy
    eviction: str
    budget: float
    measure: Literal["perplexity", "divergence"]
    limit: float
    limit_text: str
    text: str | None
    tokens: int | None


ToCalibrator = StartCalibration | StopWorking


class CalibrationProgress(Message, frozen=True, tag=True):
    """Steps of the whole calibration; `phase` says what they are for."""

    phase: str
    done: int
    total: int


class CalibrationDone(Message, frozen=True, tag=True):
    calibration: Calibration


FromCalibrator = CalibrationProgress | CalibrationDone | ProcessFailed
