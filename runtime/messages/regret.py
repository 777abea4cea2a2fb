"""What the coordinator and the process that measures regret say to each other."""

from __future__ import annotations

from hotset.runtime.messages.message import Message, ProcessFailed, StopWorking
from hotset.runtime.plan import InstancePlan
from hotset.runtime.stats import Regret


class StartRegret(Message, frozen=True, tag=True):
    instance: str
    plan: InstancePlan


class ForgetDemands(Message, frozen=True, tag=True):
    """The counts begin anew, and so does the replay."""


ToRegret = StartRegret | ForgetDemands | StopWorking


class RegretMeasured(Message, frozen=True, tag=True):
    regret: Regret


FromRegret = RegretMeasured | ProcessFailed
