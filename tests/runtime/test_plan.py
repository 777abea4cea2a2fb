"""Where the memory of an instance goes: never more than was given."""

from __future__ import annotations

import msgspec
import pytest

from hotset.runtime.config import TRAINED_MODEL, BackendConfig
from hotset.runtime.errors import MemoryTooSmall
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import MemorySplit, plan_instance

MODEL = ModelConfig.load(TRAINED_MODEL)
CHECKPOINT = Checkpoint.open(TRAINED_MODEL, MODEL)


LONG = msgspec.structs.replace(MODEL, max_position_embeddings=1 << 20)  # the pages of 16 such sequences take 64 GiB


def split(memory: int, kv_cache_memory: str | None, block_size: int = 16, model: ModelConfig = MODEL) -> MemorySplit:
    config = BackendConfig(memory=memory, kv_cache_memory=kv_cache_memory, block_size=block_size)
    return plan_instance(config, model, CHECKPOINT).memory


# The last two: pages for more than all sequences need, and pages so small that a quarter of what is free is many.
@pytest.mark.parametrize("model", [MODEL, LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    ("kv_cache_memory", "block_size"), [(None, 16), ("1MiB", 16), ("64MiB", 16), ("3GiB", 16), (None, 1)]
)
def test_the_least_memory_holds_everything_that_is_planned(
    kv_cache_memory: str | None, block_size: int, model: ModelConfig
) -> None:
    with pytest.raises(MemoryTooSmall) as too_small:
        split(1 << 20, kv_cache_memory, block_size, model)
    needed = too_small.value.needed
    assert split(needed, kv_cache_memory, block_size, model).total <= needed
    with pytest.raises(MemoryTooSmall):
        split(needed - 1, kv_cache_memory, block_size, model)


@pytest.mark.parametrize("memory", [300 << 20, 1 << 30, 12 << 30])
def test_all_of_the_memory_is_used_however_long_the_context(memory: int) -> None:
    """Nothing is set aside for the page tables of an arena that the memory could never hold."""
    assert 0 <= memory - split(memory, None, model=LONG).total <= memory // 100
