"""Routing in plain numpy, one row at a time: what the kernels must agree with."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
RANGE_RATE = np.float32(0.05)


def ranking(scores: npt.NDArray[np.floating]) -> list[int]:
    """All ids by (score descending, id ascending), NaN last."""
    nan = np.isnan(scores)
    return np.lexsort((np.arange(scores.size), -np.where(nan, 0, scores), nan)).tolist()


def rank_of(scores: Float32) -> npt.NDArray[np.int64]:
    """Of each id, its place in `ranking(scores)`."""
    return np.argsort(ranking(scores))


def group_limited(
    scores: npt.NDArray[np.floating], groups: int, top_groups: int, *, by_two: bool
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """Scores with NaN outside of the best groups, and what each group is worth: its best score, or the sum of two."""
    of_groups = np.sort(scores.reshape(groups, -1), axis=1)[:, ::-1]
    worth = of_groups[:, : 2 if by_two else 1].sum(axis=1)
    best = np.isin(np.arange(groups), ranking(worth)[:top_groups])
    return np.where(np.repeat(best, of_groups.shape[1]), scores, np.nan), worth


def shares_of_largest(logits: Float32) -> npt.NDArray[np.float64]:
    """Probabilities divided by the largest."""
    shares = probabilities(logits)
    return shares / shares.max()


def probabilities(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Softmax in float64; NaN has none, and beside +inf nothing else has."""
    wide = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    if np.isposinf(wide).any():
        return np.isposinf(wide) / np.isposinf(wide).sum()
    shares = np.exp(wide - wide.max())
    return shares / shares.sum()


def select(
    logits: Float32,
    k: int,
    resident: Collection[int],
    policy: str,
    strength: float,
    *,
    keep_top: int = 1,
    mean_range: np.float32 | None = None,
) -> list[int]:
    """The experts of a row with at least one finite logit, best first."""
    truth = ranking(logits)[:k]
    mask = np.zeros(logits.size, bool)
    mask[list(resident)] = True
    with np.errstate(over="ignore", invalid="ignore"):
        if policy == "bonus":
            return ranking(logits + np.where(mask, np.float32(strength), np.float32(0)))[:k]
        if policy == "range":
            assert mean_range is not None
            mask[truth[:keep_top]] = True
            bonus = np.float32(strength) * mean_range
            return ranking(logits + np.where(mask, bonus, np.float32(0)))[:k]
    if policy == "resnorm":
        scores = shares_of_largest(logits) + np.where(mask & (logits > -np.inf), strength, 0)
        return np.lexsort((np.arange(logits.size), rank_of(logits), -scores)).tolist()[:k]
    if policy == "mass":
        return exchange_within_mass(logits, truth, mask, strength)[0]
    if policy == "substitute":
        return substitute(logits, truth, mask, strength, probabilities(logits))[0]
    return truth


def exchange_within_mass(
    logits: npt.NDArray[np.floating],
    truth: list[int],
    mask: npt.NDArray[np.bool_],
    budget: float,
    share: npt.NDArray[np.float64] | None = None,
) -> tuple[list[int], list[float]]:
    """The selection of policy "mass", and the mass lost after each exchange that was considered.

    With `share`, experts are ranked by `logits` but these are their probabilities.
    """
    share = probabilities(logits) if share is None else share
    substitutes = [e for e in ranking(logits) if mask[e] and e not in truth and logits[e] > -np.inf]
    removed: list[int] = []
    taken: list[int] = []
    lost: list[float] = []
    for expert in reversed(truth):
        if mask[expert]:
            continue
        if not substitutes:
            break
        lost.append((lost[-1] if lost else 0.0) + share[expert] - share[substitutes[0]])
        if lost[-1] > budget:
            break
        removed.append(expert)
        taken.append(substitutes.pop(0))
    return [e for e in truth if e not in removed] + taken, lost


def substitute(
    scores: npt.NDArray[np.floating],
    truth: list[int],
    mask: npt.NDArray[np.bool_],
    limit: float,
    weights: npt.NDArray[np.float64],
    logits: npt.NDArray[np.floating] | None = None,
) -> tuple[list[int], list[float]]:
    """The selection of policy "substitute", and how much each replacement that was considered changes the output.

    With `logits`, weights rise with them, and the gate has chosen by `scores`, which are NaN where it may not choose.
    """
    lightest = ranking(scores if logits is None else logits)[::-1]
    out = [e for e in lightest if e in truth and not mask[e]]
    into = [e for e in lightest if mask[e] and e not in truth and scores[e] > -np.inf]
    changes = [float(np.hypot(weights[p], weights[q])) for p, q in zip(out, into, strict=False)]
    count = next((i for i, change in enumerate(changes) if not change < limit), len(changes))
    return [e for e in truth if e not in out[:count]] + into[:count][::-1], changes[: count + 1]


def next_mean_range(mean: np.float32, logits: Float32) -> np.float32:
    """The running mean of max - min after one more row; 0 is "no row yet"."""
    finite = logits[np.isfinite(logits)]
    with np.errstate(over="ignore"):
        spread = finite.max() - finite.min()
    if not np.isfinite(spread):
        return mean
    return spread if mean == 0 else np.float32(mean + RANGE_RATE * np.float32(spread - mean))
