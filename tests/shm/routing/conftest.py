"""Every test that takes `kernel` runs once on each routing kernel of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hotset.shm import _core


@pytest.fixture(params=_core.route_kernels())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    previous = _core.use_route_kernel(request.param)
    yield request.param
    _core.use_route_kernel(previous)
