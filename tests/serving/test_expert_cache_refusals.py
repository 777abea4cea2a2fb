"""What an expert cache refuses, each in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_factory import make_model

from hotset.runtime import (
    BudgetTooSmall,
    ExpertCache,
    ExpertUnavailable,
    ModelNotFound,
)
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.pack import Packer


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda cache: cache.pinned(4, [1]), "layer is 4, expected one of 4 that has experts"),
        (lambda cache: cache.pinned(-1, [1]), "layer is -1, expected"),
        (lambda cache: cache.pinned("0", [1]), "layer is '0', expected an integer"),
        (lambda cache: cache.pinned(0, [32]), "expert id is 32, expected 0 <= id < 32"),
        (lambda cache: cache.pinned(0, np.array([[1, -1]])), "expert id is -1, expected"),
        (lambda cache: cache.pinned(0, [2**40]), f"expert id is {2**40}, expected"),
        (lambda cache: cache.pinned(0, [1.5]), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, "12"), "experts is '12', expected integers"),
        (lambda cache: cache.pinned(0, 1), "experts is 1, expected integers"),
        (lambda cache: cache.pinned(0, [[1], [2, 3]]), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, [True]), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, np.zeros((1, 1, 1), int)), "experts is .*, expected integers"),
        (lambda cache: cache.pinned(0, [1], wanted=[40]), "expert id is 40, expected"),
        (lambda cache: cache.pinned(0, [1], streams=[16]), "stream is 16, expected 0 <= stream < 16"),
        (lambda cache: cache.pinned(0, [1], streams=[0, 1]), "expected one for each row"),
        (lambda cache: cache.prefetch(0, [32]), "expert id is 32"),
        (lambda cache: cache.resident(9), "layer is 9"),
        (lambda cache: cache.pin_experts(0, [32]), "expert id is 32"),
        (lambda cache: cache.page_out(0, None), "experts is None, expected integers"),
        (lambda cache: cache.router(cache_bonus=0.1), "expected config=RouterConfig"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(cache: ExpertCache, use: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        use(cache)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expert_budget": "0%"}, "the expert budget is '0%'"),
        ({"expert_budget": "lots"}, "the expert budget is 'lots'"),
        ({"processes": 0}, "processes is 0, expected an integer from 1 to"),
        ({"pins_per_process": 0}, "pins_per_process is 0"),
        ({"streams": 0}, "streams is 0"),
        ({"eviction": "oldest"}, "eviction is 'oldest'"),
        ({"read_mode": "fast"}, "read_mode is 'fast'"),
        ({"workers": 2}, "ExpertCache is given workers=2, expected"),
        ({"name": "a b"}, "the instance name is 'a b'"),
        ({"model": ""}, "model is ''"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ExpertCache(**settings)


def test_a_budget_that_could_deadlock_is_refused_with_what_is_needed() -> None:
    with pytest.raises(BudgetTooSmall, match="processes=4 with 4 experts per token, user_pins=3 and read_lanes=1") as e:
        ExpertCache(expert_budget="10%", processes=4, user_pins=3)
    assert (e.value.slots, e.value.needed) == (12, 20)
    with pytest.raises(BudgetTooSmall, match="processes=1 with pins_per_process=40"):
        ExpertCache(expert_budget="25%", pins_per_process=40)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        ExpertCache(tmp_path / "none")


def test_a_damaged_expert_is_named_and_the_others_can_be_used(tmp_path: Path) -> None:
    Packer(make_model(tmp_path / "model"), tmp_path / "packed", None).run(lambda finished: None)
    location = Checkpoint.open(tmp_path / "packed").expert(1, 3).parts[0]
    with location.file.open("r+b") as file:
        file.seek(location.offset)
        file.write(b"\xff" * 100)
    with ExpertCache(tmp_path / "packed", pins_per_process=3) as cache:
        with cache.pinned(1, [2, 3]) as pinned:
            assert pinned[2]["gate"].shape == (24, 32)
            for _ in range(2):
                with pytest.raises(ExpertUnavailable, match=f"expert 3 of layer 1 .* {location.file} at byte"):
                    pinned[3]
        with pytest.raises(ExpertUnavailable, match=f"expert 3 of layer 1 .* {location.file} at byte"):
            [*cache.in_turn(1, range(8))]
        assert cache.stats().failed_loads >= 1
        with cache.pinned(1, range(3)) as pinned:
            assert len([*pinned.values()]) == 3
