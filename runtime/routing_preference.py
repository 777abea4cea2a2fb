"""How strongly an instance's routing prefers experts in memory, and where that number comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from hotset.runtime.config import STRENGTH_OPTIONS, BackendConfig, RoutingPolicy
from hotset.runtime.model.calibration import Calibration

DEFAULT_STRENGTHS: dict[RoutingPolicy, float] = {
    "off": 0.0,
    "bonus": 0.15,
    "range": 0.05,
    "mass": 0.004,
    "resnorm": 0.06,
    "substitute": 0.045,
}
"""For models that have not been calibrated."""


class RoutingPreference(msgspec.Struct, frozen=True):
    """A routing policy and its strength; `source`: the user gave it, `hotset calibrate` found it, or nobody did."""

    policy: RoutingPolicy
    strength: float
    source: Literal["given", "calibrated", "default"]

    def router_options(self) -> dict[str, float]:
        """Fields of `RouterConfig`."""
        return {} if self.policy == "off" else {STRENGTH_OPTIONS[self.policy]: self.strength}

    def __str__(self) -> str:
        if self.policy == "off":
            return "off"
        where = {
            "given": "as given",
            "calibrated": "from this model's calibration",
            "default": "default: the model is not calibrated",
        }
        return f"{self.policy} {self.strength:.3g} ({where[self.source]})"


def routing_preference(config: BackendConfig) -> RoutingPreference:
    """What the user gave, else what the model's calibration says, else a cautious default.

    Raises `UnusableCalibration`.
    """
    policy = config.routing
    if policy == "off":
        return RoutingPreference("off", 0.0, "given")
    given: float | None = getattr(config, STRENGTH_OPTIONS[policy])
    if given is not None:
        return RoutingPreference(policy, given, "given")
    calibration = Calibration.load(Path(config.model), policy)
    if calibration is not None:
        return RoutingPreference(policy, calibration.strength, "calibrated")
    return RoutingPreference(policy, DEFAULT_STRENGTHS[policy], "default")
