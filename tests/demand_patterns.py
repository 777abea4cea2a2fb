"""What steps use, made up: [steps, streams, layers, top_k] expert ids with patterns that a policy may find."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def random_ids(seed: int, steps: int, streams: int, layers: int, experts: int, top_k: int) -> Ids:
    random = np.random.default_rng(seed)
    return random.permuted(np.tile(np.arange(experts), (steps, streams, layers, 1)), axis=-1)[..., :top_k]


def follows(seed: int, steps: int, experts: int) -> Ids:
    """Two layers; what layer 1 uses follows from what layer 0 used, and layer 0 walks through a fixed permutation."""
    random = np.random.default_rng(seed)
    successor, image = random.permutation(experts), random.permutation(experts)
    expert, ids = 0, np.empty((steps, 1, 2, 1), np.int64)
    for step in range(steps):
        ids[step, 0, 0, 0], ids[step, 0, 1, 0] = expert, image[expert]
        # Mostly on along the cycle, sometimes anywhere: no policy knows where.
        expert = int(successor[expert]) if random.random() < 0.9 else int(random.integers(experts))
    return ids
