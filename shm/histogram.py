"""Reading the latency histograms that shm/core/histogram.h fills."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def bucket_upper_bound(bucket: int) -> int:
    """Nanoseconds below which every latency in `bucket` lies: eight buckets per power of two."""
    if bucket < 8:
        return bucket + 1
    exponent, eighth = divmod(bucket, 8)
    return (9 + eighth) << (exponent - 1)


def percentile_nanoseconds(buckets: npt.NDArray[np.uint64], share: float) -> int:
    """The latency that `share` of the events do not exceed, at most 12.5 % too high; 0 without events."""
    cumulative = np.cumsum(buckets)
    total = int(cumulative[-1])
    if total == 0:
        return 0
    rank = max(1, int(np.ceil(share * total)))
    return bucket_upper_bound(int(np.searchsorted(cumulative, rank)))
