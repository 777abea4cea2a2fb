"""What `BackendConfig` refuses, in one sentence that names what was given and what was expected."""

from __future__ import annotations

import pytest

from hotset.runtime.config import BackendConfig


def test_a_prefetch_threshold_is_for_runners_up() -> None:
    assert BackendConfig(prefetch="gate-ahead+runners-up", prefetch_threshold=0.1).prefetch_threshold == 0.1
    for prefetch in ("off", "auto", "gate-ahead"):
        with pytest.raises(ValueError, match=rf"prefetch_threshold is 0\.1 and prefetch is '{prefetch}', expected"):
            BackendConfig(prefetch=prefetch, prefetch_threshold=0.1)
    with pytest.raises(ValueError, match=r"prefetch_threshold is 1\.5, expected a number from 0 to 1"):
        BackendConfig(prefetch="runners-up", prefetch_threshold=1.5)


@pytest.mark.parametrize("length", [0, -1])
def test_a_context_of_no_tokens_is_not_taken_for_the_default(length: int) -> None:
    with pytest.raises(ValueError, match=f"max_model_len is {length}, expected an integer of at least 1"):
        BackendConfig(max_model_len=length)
