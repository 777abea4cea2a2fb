"""How one request's tokens are chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from hotset.runtime.argument_types import check_field_types
from hotset.runtime.settings import Settings


class SamplingParams(Settings, frozen=True, kw_only=True):
    """Names, meanings and defaults are vLLM's and OpenAI's, but for `max_tokens`: 128 (vLLM: 16, which cuts
    most answers).

    temperature: 0 always takes the likeliest token. top_k: only the k likeliest (0 or -1: all). top_p: only
    the smallest set of likeliest tokens with at least this probability. min_p: only tokens at least this
    fraction as likely as the likeliest. stop: the text ends before any of these strings. seed: repeats the
    draws; None draws a new one. presence_penalty is taken once, frequency_penalty per occurrence, off the
    logits of tokens already generated; repetition_penalty divides positive and multiplies negative logits of
    tokens in prompt or output. logit_bias is added to the logits of the given token ids. ignore_eos: go on
    after the end-of-text token. routing: None is the backend's policy; "off" takes exactly the experts that
    the model's gate chooses.
    """

    elsewhere: ClassVar[frozenset[str]] = frozenset({
        "n", "best_of", "use_beam_search", "logprobs", "prompt_logprobs", "top_logprobs", "min_tokens", "bad_words",
        "stop_token_ids", "logits_processors", "structured_outputs", "guided_decoding", "response_format", "echo",
    })  # fmt: skip

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool = False
    routing: Literal["off"] | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        _in_range("temperature", self.temperature, 0, math.inf, "a number of at least 0")
        _in_range("min_p", self.min_p, 0, 1, "a number from 0 to 1")
        _in_range("presence_penalty", self.presence_penalty, -2, 2, "a number from -2 to 2")
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2, "a number from -2 to 2")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected a positive number")
        if not -1 <= self.top_k < 1 << 31:
            raise ValueError(f"top_k is {self.top_k}, expected a number below 2**31, or 0 or -1 for all tokens")
        if not 1 <= self.max_tokens < 1 << 31:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected at least 1, and less than 2**31")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}, expected 0 <= seed < 2**64")
        if "" in self.stop_strings:
            raise ValueError("stop holds an empty string, which would end every text before its first character")
        for token_id, bias in (self.logit_bias or {}).items():
            if token_id < 0 or not math.isfinite(bias):
                raise ValueError(
                    f"logit_bias[{token_id}] is {bias}, expected a finite number for a token id of at least 0"
                )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _in_range(name: str, value: float, low: float, high: float, expected: str) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name} is {value}, expected {expected}")
