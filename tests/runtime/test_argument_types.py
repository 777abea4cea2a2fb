"""Settings of a wrong type are refused where they are given, in a sentence that names them."""

from __future__ import annotations

import math
import typing
from typing import Any

import msgspec
import numpy as np
import pytest

from hotset.runtime import AffinityConfig, BackendConfig, PagedKvCache, RouterConfig, SamplingParams
from hotset.runtime.kv.config import CacheConfig

CONFIGS: list[type[msgspec.Struct]] = [BackendConfig, SamplingParams, RouterConfig, AffinityConfig, CacheConfig]
NEEDED = {CacheConfig: {"num_pages": 4}}
FIELDS = [(config, name) for config in CONFIGS for name in config.__struct_fields__]


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("given", [object(), b"x", {"a": "b"}, [None]], ids=repr)
def test_every_setting_refuses_what_is_no_number_text_or_list_of_them(
    config: type[msgspec.Struct], name: str, given: Any
) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        config(**NEEDED.get(config, {}) | {name: given})


def kinds(config: type[msgspec.Struct], name: str) -> list[Any]:
    declared = typing.get_type_hints(config)[name]
    return [declared, *typing.get_args(declared)]


def declared_as(wanted: Any) -> list[tuple[type[msgspec.Struct], str]]:
    return [(config, name) for config, name in FIELDS if wanted in kinds(config, name)]


@pytest.mark.parametrize(("config", "name"), declared_as(bool))
@pytest.mark.parametrize("given", ["no", 0, None, math.nan])
def test_switches_take_True_and_False_only(config: type[msgspec.Struct], name: str, given: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {given!r}, expected True or False"):
        config(**NEEDED.get(config, {}) | {name: given})


@pytest.mark.parametrize(("config", "name"), [*declared_as(int), *declared_as(float)])
@pytest.mark.parametrize("given", ["3", True, math.nan, 10**400], ids=["text", "a bool", "nan", "huge"])
def test_numbers_are_numbers_and_not_nan_nor_without_end(config: type[msgspec.Struct], name: str, given: Any) -> None:
    if given == "3" and str in kinds(config, name):
        pytest.skip("sizes may be text")
    if given == 10**400 and int in kinds(config, name):
        pytest.skip("integers have limits of their own")
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        config(**NEEDED.get(config, {}) | {name: given})


def test_numpy_numbers_are_taken_as_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), logit_bias={np.int64(1): np.float64(2)})
    assert msgspec.msgpack.encode(params) == msgspec.msgpack.encode(
        SamplingParams(temperature=0.5, top_k=3, logit_bias={1: 2.0})
    )


@pytest.mark.parametrize(
    ("setting", "given", "expected"),
    [
        ("eviction", None, "eviction is None, expected text"),
        ("warm_start", "no", "warm_start is 'no', expected True or False"),
        ("memory", "lots", "memory is 'lots', expected bytes such as 500000000, '500MB' or '4GiB'"),
        ("kv_cache_memory", -1, "kv_cache_memory is -1, expected a number of bytes >= 0"),
        ("read_mode", "fast", "read_mode is 'fast', expected one of auto, buffered, direct"),
        ("max_model_len", 1.5, "max_model_len is 1.5, expected an integer or None"),
    ],
)
def test_the_sentence_says_what_would_do(setting: str, given: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        BackendConfig(**{setting: given})
    assert str(caught.value) == expected


def test_the_cache_refuses_wrong_numbers_of_tokens_and_wrong_ids() -> None:
    cache = PagedKvCache(8, 16)
    sequence = cache.allocate(20)
    for given in ("x", None, 1.5, -1, math.nan):
        for refused in (cache.allocate, lambda given: cache.extend(sequence, given), cache.evict):
            with pytest.raises(ValueError, match="expected an integer of at least 0"):
                refused(given)
    for tokens in ("abc", None, [1.5], [2**40], 5, np.array([0.5])):
        with pytest.raises(ValueError, match=r"the token ids are .*, expected integers of 32 bits"):
            cache.admit(tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_blocks"):
        PagedKvCache(8, num_blocks=3)
