"""How strongly a model's routing may prefer experts in memory: what `hotset calibrate` found.

There is a file for each routing policy, in the model's cache. It holds for the weights that were measured: others have
another cache. A model that is passed on can bring such files in its own folder; the user's own go first.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.model_cache import NoCacheFolder, check_replaceable, model_cache, replace_file

CALIBRATION = "calibration-"
"""What the names of such files begin with."""


class UnusableCalibration(HotsetError):
    """There is a calibration at `path`, but it cannot be read."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"the calibration {path} cannot be used ({problem}): delete it, or calibrate again")
        self.path = path


class CannotKeepCalibration(HotsetError):
    """The file at `path` cannot be written."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"the calibration cannot be kept in {path}: {problem}")
        self.path = path


class Expectation(msgspec.Struct, frozen=True):
    """What to expect with a share `budget` of the experts in memory; all numbers but the divergence from 0 to 1.

    Attributes:
        hit_rate, exact_hit_rate: with the calibrated preference, and with routing "off".
        perplexity_change: relative to exact routing, so 0.0025 is +0.25 %.
        divergence: mean KL(exact || this) of the next token's distribution, in nats.
    """

    budget: float
    hit_rate: float
    exact_hit_rate: float
    perplexity_change: float
    divergence: float


class Calibration(msgspec.Struct, frozen=True):
    """The strength of a routing policy for one model.

    Attributes:
        routing, strength: the policy, and the strongest preference within `limit`.
        limit: what was allowed, in words.
        text, tokens: what it was measured on.
        eviction: with which policy.
        expectations: by ascending budget.
    """

    routing: str
    strength: float
    limit: str
    text: str
    tokens: int
    eviction: str
    expectations: list[Expectation]

    @staticmethod
    def path(model: Path, routing: str) -> Path:
        """In the model's cache."""
        return model_cache(model) / _file_name(routing)

    @classmethod
    def load(cls, model: Path, routing: str) -> Calibration | None:
        """Of the model folder or file; None if it has not been calibrated. Raises `UnusableCalibration`."""
        try:
            found = _read(cls.path(model, routing))
        except NoCacheFolder:
            found = None
        return found or _read(model / _file_name(routing))

    @classmethod
    def check_can_be_kept(cls, model: Path, routing: str) -> None:
        """Raises `NoCacheFolder` or `CannotKeepCalibration` as `save` would now."""
        path = cls.path(model, routing)
        try:
            check_replaceable(path)
        except OSError as error:
            raise CannotKeepCalibration(path, error.strerror or str(error)) from None

    def save(self, model: Path) -> Path:
        """Replaces the file. Raises `NoCacheFolder` or `CannotKeepCalibration`."""
        path = self.path(model, self.routing)
        try:
            replace_file(path, msgspec.json.format(msgspec.json.encode(self)))
        except OSError as error:
            raise CannotKeepCalibration(path, error.strerror or str(error)) from None
        return path


def _file_name(routing: str) -> str:
    return f"{CALIBRATION}{routing}.json"


def _read(path: Path) -> Calibration | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (FileNotFoundError, NotADirectoryError):  # the latter where a folder cannot be
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise UnusableCalibration(path, str(error)) from None
    if path.name != _file_name(found.routing) or not 0 <= found.strength <= 1:  # as what the user gives
        raise UnusableCalibration(path, f"it is for {found.routing} with strength {found.strength}")
    return found
