"""Routing allocates nothing per token: counted by a malloc of our own in front of the C library's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, sys
import numpy as np
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RouterConfig

shim = ctypes.CDLL(None)
counting = ctypes.c_int.in_dll(shim, "counting")
allocations = ctypes.c_long.in_dll(shim, "allocations")
policy = sys.argv[1]
logits = np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)
router = MemoryAwareRouter(RouterConfig(64, 6, policy=policy))
router.update_cache_state(range(0, 64, 2))
bound = router.bind(logits, np.empty((4096, 6), np.int32), np.empty((4096, 6), np.float32))
single = router.bind(logits, np.empty(6, np.int32), np.empty(6, np.float32))

def count(call, *arguments):
    call(*arguments)
    before = allocations.value
    counting.value = 1
    call(*arguments)
    counting.value = 0
    return allocations.value - before

print(count(bound, 1), count(bound, 200), count(bound, 4096), count(single, 5), count(lambda: bytearray(100_000)))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "allocation_counter.so"
    source = Path(__file__).with_name("allocation_counter.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("policy", ["off", "bonus", "range", "mass", "resnorm", "substitute"])
def test_a_token_more_is_no_allocation_more(shim: Path, policy: str) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONMALLOC": "malloc"}
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, policy], env=environment, check=True, capture_output=True, text=True
    ).stdout
    one, some, many, single, control = map(int, output.split())
    # A call may make an integer or two for Python; 4,096 tokens make no more of them than one.
    assert one == some == many and single <= one
    assert many <= 8
    assert control > 0  # the shim does count
