"""Fixtures of the tests of hotset.shm: small arenas, private ones and ones with a name of their own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from hotset.shm import segment as segment_module
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.segment import InstanceLock, Segment, remove_ipc_objects

GEOMETRY = Geometry(
    num_layers=3,
    num_experts=70,  # more than one mask word, the second one partly used
    num_processes=3,
    pins_per_process=4,
    slot_classes=(SlotClass(5, 100),),
    num_pages=4,
    page_nbytes=128,
    max_sequences=2,
    max_model_len=40,
)


@pytest.fixture
def geometry() -> Geometry:
    return GEOMETRY


@pytest.fixture
def private() -> Iterator[Segment]:
    segment = Segment.private(GEOMETRY)
    yield segment
    segment.close()


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Names of objects and lock files that no other instance on this machine shares; all are gone afterwards."""
    prefix = f"hotset-test-{secrets.token_hex(4)}."
    monkeypatch.setattr(segment_module, "PREFIX", prefix)
    yield prefix
    for path in segment_module.SHM_FOLDER.glob(prefix + "*"):
        remove_ipc_objects(path.name.removeprefix(prefix))
        path.unlink(missing_ok=True)


@pytest.fixture
def instance(namespace: str) -> Iterator[str]:
    """The name of an instance that this process holds the lock of."""
    lock = InstanceLock("mine")
    yield "mine"
    lock.release()
