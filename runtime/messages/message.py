"""What all messages are, and the two that every child process has."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages: each travels with its class name as tag."""


class StopWorking(Message, frozen=True, tag=True):
    """Leave the serving loop and exit."""


class ProcessFailed(Message, frozen=True, tag=True):
    """A child cannot start or go on; it exits after this."""

    reason: str
