"""What is measured of routing: each function returns a pass over the same `ROWS` distinct rows of logits."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hotset.runtime import MemoryAwareRouter, RouterConfig
from hotset.runtime.router_config import Policy
from hotset.shm.segment import Segment

ROWS = 4096
BATCH = 256
BONUS = 0.15

Pass = Callable[[], object]  # routes all rows once


def make_logits(experts: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, experts)).astype(np.float32)


def make_resident(experts: int) -> np.ndarray:
    """Half of the experts, bool [experts]."""
    return np.isin(np.arange(experts), np.random.default_rng(1).permutation(experts)[: experts // 2])


def hotset_pass(
    segment: Segment, process: int, top_k: int, mode: str, *, policy: Policy = "bonus", timing: bool = False
) -> Pass:
    experts = segment.layout.geometry.num_experts
    config = RouterConfig(experts, top_k, policy=policy, cache_bonus=BONUS, timing=timing)
    router = MemoryAwareRouter(config, segment=segment, process=process)
    logits = make_logits(experts, process)
    if mode == "single":
        route = router.bind(logits, np.empty(top_k, np.int32), np.empty(top_k, np.float32))

        def rows_one_by_one() -> None:
            for row in range(ROWS):
                route(row)

        return rows_one_by_one
    ids, weights = np.empty((BATCH, top_k), np.int32), np.empty((BATCH, top_k), np.float32)
    batches = [router.bind(logits[at : at + BATCH], ids, weights) for at in range(0, ROWS, BATCH)]

    def batch_by_batch() -> None:
        for route in batches:
            route()

    return batch_by_batch


def numpy_pass(experts: int, top_k: int, mode: str) -> Pass:
    logits, resident = make_logits(experts, 0), make_resident(experts)
    bonus = np.where(resident, np.float32(BONUS), np.float32(0))
    affinity = np.zeros(experts, np.float32)

    def route(rows: np.ndarray) -> None:
        ids = np.argsort(-(rows + bonus), axis=-1, kind="stable")[..., :top_k]
        shares = np.exp(rows - rows.max(axis=-1, keepdims=True))
        np.take_along_axis(shares, ids, axis=-1) / shares.sum(axis=-1, keepdims=True)
        np.count_nonzero(resident[ids])
        for selected in np.atleast_2d(ids):
            np.multiply(affinity, 31 / 32, out=affinity)
            affinity[selected] += 1 / 32

    parts = list(logits) if mode == "single" else [logits[at : at + BATCH] for at in range(0, ROWS, BATCH)]

    def all_parts() -> None:
        for rows in parts:
            route(rows)

    return all_parts


def scalar_pass(library: ctypes.CDLL, experts: int, top_k: int) -> Pass:
    arrays = (
        make_logits(experts, 0),
        make_resident(experts).view(np.uint8),
        np.zeros(experts, np.float32),
        np.empty((ROWS, top_k), np.int32),
        np.empty((ROWS, top_k), np.float32),
    )
    logits, resident, affinity, ids, weights = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
    real = ctypes.c_float

    def all_rows() -> tuple[np.ndarray, ...]:
        library.route_rows(
            logits,
            ctypes.c_int64(ROWS),
            experts,
            top_k,
            resident,
            real(BONUS),
            real(31 / 32),
            real(1 / 32),
            affinity,
            ids,
            weights,
        )
        return arrays  # which the pointers must not outlive

    return all_rows


def build_scalar_router(folder: str) -> ctypes.CDLL:
    library = Path(folder) / "scalar_router.so"
    source = Path(__file__).with_name("scalar_router.c")
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", library, source, "-lm"], check=True)
    return ctypes.CDLL(str(library))
