"""Every test that uses `kernel` runs once on each routing kernel; those of other processors are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hotset.shm import _core


@pytest.fixture(params=["avx512", "avx2", "sse2", "plain"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in _core.route_kernels():
        pytest.skip(f"this processor does not run the {request.param} kernel")
    previous = _core.use_route_kernel(request.param)
    yield request.param
    _core.use_route_kernel(previous)
