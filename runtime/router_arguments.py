"""What the calls of a router are given, as its core takes it; one sentence for what it cannot take."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from hotset.runtime.config import STRENGTH_OPTIONS
from hotset.runtime.route_result import Float32
from hotset.runtime.router_config import POLICIES, RESIDUAL_POLICIES, Policy, RouterConfig

_EPOCHS = {None: 0, 1: 1, 0: 2}  # to enum route_epochs


def policy_number(policy: Any) -> int | None:
    """Of enum route_policy; None stays None. Raises `ValueError` for what is no policy."""
    if policy is None:
        return None
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES.index(policy)


def epochs_number(epochs: int | None) -> int:
    """Of enum route_epochs; raises `ValueError` for anything but None, 1 and 0."""
    try:
        return _EPOCHS[epochs]
    except (KeyError, TypeError):  # TypeError: it cannot even be looked up
        raise ValueError(f"epochs is {epochs!r}, expected None (one per token), 1 (one in all) or 0 (none)") from None


def vector(name: str, values: Any, num_experts: int) -> Float32:
    """`values` as float32 [num_experts]; lists are converted, arrays must be right. Raises `ValueError`."""
    try:
        row = cast("Float32", values) if isinstance(values, np.ndarray) else np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {values!r}, expected {num_experts} numbers") from None
    if row.shape != (num_experts,):
        raise ValueError(f"{name} has shape {row.shape}, expected ({num_experts},)")
    return row


def residual_strength(
    config: RouterConfig,
    policy: Policy | None,
    strength: float | Float32 | None,
    current: float,
    residual_ratio: Float32,
) -> Float32:
    """What each token's strength is with `residual_ratio`: float32 [tokens].

    Without `strength` it is that of `policy`: `current`, which may have moved, if that is the router's own policy, and
    otherwise the one in `config`. Raises `ValueError` for a policy that has no use for a residual ratio.
    """
    chosen = config.policy if policy is None else policy
    if chosen not in RESIDUAL_POLICIES:
        raise ValueError(
            f"residual_ratio is given with policy {chosen!r}, expected one of {', '.join(RESIDUAL_POLICIES)}"
        )
    if strength is None:
        is_own = config.policy == chosen and config.memory_aware
        strength = current if is_own else cast("float", getattr(config, STRENGTH_OPTIONS[chosen]))
    try:
        return np.asarray(strength * residual_ratio, np.float32)
    except (TypeError, ValueError):
        raise ValueError(
            f"strength is {strength!r}, expected a number or float32 of shape (tokens,), and residual_ratio is "
            f"{residual_ratio!r}, expected float32 of shape (tokens,)"
        ) from None
