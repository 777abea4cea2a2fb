"""Rotary position embeddings: the frequencies of each variant, as transformers computes them.

"dynamic" (the frequencies change with the length of the whole sequence, so that keys already in the cache would be
wrong) and "longrope" are refused by name.
"""

from __future__ import annotations

import math
from typing import Final, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.config_file import ConfigFile

ROPE_TYPES: Final = ("default", "linear", "yarn", "llama3")


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """How positions turn queries and keys.

    Attributes:
        theta: base of the frequencies.
        factor: by how much the trained context is stretched; 1 for "default".
        trained_positions: of the context before it was stretched ("yarn", "llama3").
        magnitude: factor on the rotated vectors; other than 1 only for "yarn".
        score_magnitude: factor on the products of whole queries and keys, which DeepSeek's models take from the same
            options (mscale_all_dim).
        fast_turns, slow_turns: "yarn" leaves frequencies alone that turn more than `fast_turns` times within the
            trained context, stretches those that turn less than `slow_turns` times, and blends between.
        whole_dimensions: "yarn" rounds the two bounds outwards.
        low_factor, high_factor: the bounds of "llama3", as shares of the trained context.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    trained_positions: int = 1
    magnitude: float = 1.0
    score_magnitude: float = 1.0
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    whole_dimensions: bool = True
    low_factor: float = 1.0
    high_factor: float = 4.0

    @classmethod
    def of(cls, file: ConfigFile, default_theta: float) -> Self:
        """transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling held the rest."""
        options = file.section("rope_parameters", "rope_scaling")
        kind = options.get("rope_type", options.get("type", "default"))
        file.refuse_unless("rope_scaling", kind, ROPE_TYPES)
        for holder in (file, options):
            file.refuse_unless("partial_rotary_factor", holder.get("partial_rotary_factor", 1.0), (1.0,))
        theta = options.number("rope_theta", default=file.number("rope_theta", default=default_theta))
        if kind == "default":
            return cls(theta=theta)
        if kind == "linear":
            factor = options.number("factor")
            return cls(type="linear", theta=theta, factor=factor, score_magnitude=_score_magnitude(options, factor))
        trained = options.count(
            "original_max_position_embeddings",
            default=file.count(
                "original_max_position_embeddings", default=file.count("max_position_embeddings", default=4096)
            ),
        )
        if kind == "llama3":
            low, high = options.number("low_freq_factor"), options.number("high_freq_factor")
            if high <= low:
                raise file.corrupt(f"high_freq_factor is {high}, expected more than low_freq_factor, {low}")
            factor = options.number("factor")
            return cls(
                type="llama3",
                theta=theta,
                factor=factor,
                trained_positions=trained,
                score_magnitude=_score_magnitude(options, factor),
                low_factor=low,
                high_factor=high,
            )
        factor = options.number("factor", default=file.count("max_position_embeddings", default=4096) / trained)
        return cls(
            type="yarn",
            theta=theta,
            factor=factor,
            trained_positions=trained,
            magnitude=_yarn_magnitude(options, factor),
            score_magnitude=_score_magnitude(options, factor),
            fast_turns=options.number("beta_fast", default=32.0),
            slow_turns=options.number("beta_slow", default=1.0),
            whole_dimensions=options.flag("truncate", default=True),
        )

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float32]:
        """Radians per position, float32 [head_dim / 2], fastest first."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (np.float32(1) / np.float32(self.theta) ** exponents).astype(np.float32)
        stretched = plain / np.float32(self.factor)
        if self.type == "yarn":
            kept = self._yarn_kept(head_dim)
        elif self.type == "llama3":
            kept = self._llama3_kept(plain)
        else:
            return stretched
        return (stretched * (1 - kept) + plain * kept).astype(np.float32)

    def _yarn_kept(self, head_dim: int) -> NDArray[np.float32]:
        """The share of each frequency that is not stretched."""

        def dimension(turns: float) -> float:
            return head_dim * math.log(self.trained_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.fast_turns), dimension(self.slow_turns)
        if self.whole_dimensions:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        return (1 - np.clip(ramp, 0, 1)).astype(np.float32)

    def _llama3_kept(self, plain: NDArray[np.float32]) -> NDArray[np.float32]:
        turns = np.float32(self.trained_positions) * plain / np.float32(2 * math.pi)
        blend = (turns - np.float32(self.low_factor)) / np.float32(self.high_factor - self.low_factor)
        return np.clip(blend, 0, 1).astype(np.float32)


def _stretched_magnitude(factor: float, scale: float) -> float:
    """Attention over a stretched context is flatter; its logits are scaled up, half by queries and half by keys."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _score_magnitude(options: ConfigFile, factor: float) -> float:
    scale = options.optional_number("mscale_all_dim")
    return 1.0 if scale is None else _stretched_magnitude(factor, scale) ** 2


def _yarn_magnitude(options: ConfigFile, factor: float) -> float:
    given = options.optional_number("attention_factor")
    if given is not None:
        return given
    scale, scale_all = options.optional_number("mscale"), options.optional_number("mscale_all_dim")
    if scale and scale_all:
        return _stretched_magnitude(factor, scale) / _stretched_magnitude(factor, scale_all)
    return _stretched_magnitude(factor, 1.0)
