"""Options of a request: refused with what was given and what was expected; unchanged by a trip through msgpack."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hotset.runtime.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("routing", "fast"),
        ("stop", ["a", ""]),
        ("stop", ""),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {4: float("nan")}),
    ],
)
def test_values_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        SamplingParams(**{option: value})


def test_positional_arguments_and_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_stop_strings() -> None:
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="\n\n").stop_strings == ("\n\n",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


@pytest.mark.parametrize("stop", [None, "end", ["a", "b"]])
def test_a_trip_through_msgpack(stop: Any) -> None:
    params = SamplingParams(stop=stop, seed=2**64 - 1, logit_bias={5: -1.5}, routing="off", temperature=0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_a_message_with_bad_values_is_refused_on_arrival() -> None:
    message = msgspec.msgpack.encode({"top_p": 7.0})
    with pytest.raises(msgspec.ValidationError, match="top_p is 7"):
        msgspec.msgpack.decode(message, type=SamplingParams)
