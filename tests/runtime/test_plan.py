"""Where the memory of an instance goes: never more than was given."""

from __future__ import annotations

import pytest

from hotset.runtime.config import TRAINED_MODEL, BackendConfig
from hotset.runtime.errors import MemoryTooSmall
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import MemorySplit, plan_instance

MODEL = ModelConfig.load(TRAINED_MODEL)
CHECKPOINT = Checkpoint.open(TRAINED_MODEL, MODEL)


def split(memory: int, kv_cache_memory: str | None) -> MemorySplit:
    return plan_instance(BackendConfig(memory=memory, kv_cache_memory=kv_cache_memory), MODEL, CHECKPOINT).memory


@pytest.mark.parametrize("kv_cache_memory", [None, "1MiB", "64MiB", "3GiB"])  # the last: more than all sequences need
def test_the_least_memory_holds_everything_that_is_planned(kv_cache_memory: str | None) -> None:
    with pytest.raises(MemoryTooSmall) as too_small:
        split(1 << 20, kv_cache_memory)
    needed = too_small.value.needed
    assert split(needed, kv_cache_memory).total <= needed
