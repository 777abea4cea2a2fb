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


def drawn(random: np.random.Generator, preference: npt.NDArray[np.float64], top_k: int) -> Ids:
    """`top_k` different experts for each row of log-likelihoods, [..., experts] -> [..., top_k]."""
    return np.argpartition(-(preference + random.gumbel(size=preference.shape)), top_k, axis=-1)[..., :top_k]


def drifting(seed: int, steps: int, layers: int, experts: int, top_k: int, speed: float) -> Ids:
    """One stream, whose preferences wander: `speed` 0 not at all, 1 anew in every step."""
    random = np.random.default_rng(seed)
    preference, ids = random.normal(0, 1.5, (layers, experts)), np.empty((steps, 1, layers, top_k), np.int64)
    for step in range(steps):
        preference = np.sqrt(1 - speed**2) * preference + speed * random.normal(0, 1.5, preference.shape)
        ids[step, 0] = drawn(random, preference, top_k)
    return ids


def switching(seed: int, steps: int, layers: int, experts: int, top_k: int, every: int) -> Ids:
    """One stream, whose preferences are others from one step to the next, every so often."""
    random = np.random.default_rng(seed)
    topics = np.repeat(random.normal(0, 2, (-(-steps // every), 1, layers, experts)), every, axis=0)[:steps]
    return drawn(random, topics, top_k)


def uniform(seed: int, steps: int, layers: int, experts: int, top_k: int) -> Ids:
    """One stream, to which all experts are alike."""
    return drawn(np.random.default_rng(seed), np.zeros((steps, 1, layers, experts)), top_k)
