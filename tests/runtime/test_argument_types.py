"""Settings of a wrong type are refused where they are given, in a sentence that names them."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from hotset.runtime import (
    AffinityConfig,
    BackendConfig,
    ExpertCacheConfig,
    KvPageMemory,
    PagedKvCache,
    RouterConfig,
    SamplingParams,
    UnknownSequence,
)
from hotset.runtime.kv.config import CacheConfig
from hotset.shm.kv_page_format import KvPageLayout

CONFIGS: list[type[msgspec.Struct]] = [
    BackendConfig,
    ExpertCacheConfig,
    SamplingParams,
    RouterConfig,
    AffinityConfig,
    CacheConfig,
]
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


@pytest.mark.parametrize("config", CONFIGS)
def test_a_setting_that_there_is_not_is_named(config: type[msgspec.Struct]) -> None:
    with pytest.raises(ValueError) as caught:
        config(**NEEDED.get(config, {}) | {"temprature": 1, "size": "x"})
    fields = ", ".join(config.__struct_fields__)
    assert str(caught.value) == f"{config.__name__} is given temprature=1, size='x', expected {fields}"
    assert isinstance(caught.value, TypeError)  # as Python's own


@pytest.mark.parametrize("name", ["n", "best_of", "logprobs", "response_format"])
def test_what_vllm_and_openai_have_beyond_is_said_not_to_be_there(name: str) -> None:
    params: Any = SamplingParams
    with pytest.raises(ValueError) as caught:
        params(**{"temperature": 0, name: 2})
    expected = ", ".join(SamplingParams.__struct_fields__)
    assert str(caught.value) == f"SamplingParams is given {name}=2 (which hotset does not have), expected {expected}"


def test_settings_are_given_as_they_are_declared() -> None:
    config: Any
    for config, args, sentence in (
        (SamplingParams, (0.5,), "SamplingParams: too many positional arguments, expected temperature, top_p"),
        (RouterConfig, range(40), "RouterConfig: too many positional arguments, expected num_experts, top_k"),
        (CacheConfig, (), "CacheConfig is given no num_pages, expected num_pages, block_size"),
    ):
        with pytest.raises(ValueError, match=sentence):
            config(*args)
    with pytest.raises(ValueError, match=r"^PagedKvCache is given num_blocks=3, expected num_pages, block_size, "):
        PagedKvCache(8, num_blocks=3)
    assert RouterConfig(4, 1) == RouterConfig(num_experts=4, top_k=1)


def test_the_parameters_of_settings_are_to_be_seen() -> None:
    assert [*inspect.signature(SamplingParams).parameters] == [*SamplingParams.__struct_fields__]


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


WRONG_CACHE_CALLS: list[tuple[str, Callable[[Any, int], object], str]] = [
    ("append", lambda cache, own: cache.append(own, "x"), "token is 'x', expected an integer"),
    ("append at a page's end", lambda cache, own: cache.append(own, None), "token is None, expected an integer"),
    ("commit", lambda cache, own: cache.commit(own, "x"), "length is 'x', expected an integer"),
    ("truncate", lambda cache, own: cache.truncate(own, 1.5), "length is 1.5, expected an integer"),
    ("reserve", lambda cache, own: cache.reserve(own, None), "num_tokens is None, expected an integer of at least 0"),
    ("written", lambda cache, own: cache.reserve(own, 9, written="x"), "written is 'x', expected an integer"),
    ("release_before", lambda cache, own: cache.release_before(own, [1]), "position is [1], expected an integer"),
    ("slot", lambda cache, own: cache.slot(own, "x"), "position is 'x', expected an integer"),
    ("page_for", lambda cache, own: cache.page_for(own, 1.5), "position is 1.5, expected an integer"),
    ("writable_page", lambda cache, own: cache.writable_page(own, None), "position is None, expected an integer"),
    ("slot_mapping", lambda cache, own: cache.slot_mapping(own, 0, 1.5), "stop is 1.5, expected an integer"),
    ("group", lambda cache, own: cache.block_table(own, "x"), "group is 'x', expected an integer from 0 to 0"),
    ("another group", lambda cache, own: cache.slot(own, 0, 1), "group is 1, expected an integer from 0 to 0"),
    ("num_released", lambda cache, own: cache.num_released(own, None), "group is None, expected an integer"),
    ("pin", lambda cache, own: cache.pin("x"), "pages is 'x', expected several integers"),
    ("pin one", lambda cache, own: cache.pin(1), "pages is 1, expected several integers"),
    ("pin no number", lambda cache, own: cache.pin(["x"]), "one of pages is 'x', expected an integer"),
    ("unpin", lambda cache, own: cache.unpin(None), "pages is None, expected several integers"),
    ("references", lambda cache, own: cache.references("x"), "page is 'x', expected an integer from 0 to 8"),
    ("generation", lambda cache, own: cache.generation(10**9), "page is 1000000000, expected an integer from 0 to 8"),
    ("pages_for", lambda cache, own: cache.pages_for(None), "num_tokens is None, expected an integer of at least 0"),
    ("should_defragment", lambda cache, own: cache.should_defragment("x"), "threshold is 'x', expected a number"),
    ("match", lambda cache, own: cache.match([1], salt=[]), "salt is [], expected something that can be hashed"),
    ("admit", lambda cache, own: cache.admit([1], salt={}), "salt is {}, expected something that can be hashed"),
    ("priority", lambda cache, own: cache.admit([1], priority="x"), "priority is 'x', expected an integer"),
    ("retention", lambda cache, own: cache.admit([1], retention="x"), "retention is 'x', expected a number or None"),
    ("an unhashable sequence", lambda cache, own: cache.free([own]), "there is no sequence [1]"),
    ("append to one", lambda cache, own: cache.append([own]), "there is no sequence [1]"),
]


@pytest.mark.parametrize(
    ("call", "sentence"), [case[1:] for case in WRONG_CACHE_CALLS], ids=[case[0] for case in WRONG_CACHE_CALLS]
)
@pytest.mark.parametrize("length", [20, 31, 32], ids=["within a page", "filling a page", "at a page's end"])
def test_the_cache_names_what_is_wrong_and_has_changed_nothing(
    call: Callable[[Any, int], object], sentence: str, length: int
) -> None:
    cache = PagedKvCache(8, 16)
    own = cache.admit(list(range(length))).sequence
    cache.commit(own, length)
    before = cache.stats(), cache.block_table(own), cache.length(own), cache.capacity_tokens
    with pytest.raises((ValueError, UnknownSequence)) as caught:
        call(cache, own)
    assert sentence in str(caught.value)
    assert before == (cache.stats(), cache.block_table(own), cache.length(own), cache.capacity_tokens)
    cache.check()
    cache.append(own, 7)
    assert cache.match(list(range(length))) == length // 16 * 16


def test_rows_name_what_is_wrong_of_them() -> None:
    layout = KvPageLayout(num_layers=2, block_size=16, num_kv_heads=1, head_dim=2)
    cache: Any = PagedKvCache(4, 16, memory=KvPageMemory(layout, 4))
    own, rows = cache.allocate(20), np.zeros((1, 1, 2))
    for call, sentence in (
        (lambda: cache.write(own, "x", rows, rows), "position is 'x', expected an integer"),
        (lambda: cache.write(own, 0, "x", rows), "keys is 'x', expected numbers"),
        (lambda: cache.write(own, 0, rows, None), "values have the shape (), expected (tokens, (1, 2))"),
        (lambda: cache.write(own, 0, rows, np.zeros((2, 1, 2))), "values have the shape (2, 1, 2), expected"),
        (lambda: cache.write(own, 0, rows, rows, layer="x"), "layer is 'x', expected an integer from 0 to 1"),
        (lambda: cache.write(own, 0, rows, rows, layer=2), "layer is 2, expected an integer from 0 to 1"),
        (lambda: cache.read(own, None, 3), "start is None, expected an integer"),
        (lambda: cache.read(own, 0, 1.5), "stop is 1.5, expected an integer"),
        (lambda: cache.read(own, 0, 3, layer=None), "layer is None, expected an integer from 0 to 1"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert sentence in str(caught.value)
    assert not cache.read(own, 0, 20).any()
