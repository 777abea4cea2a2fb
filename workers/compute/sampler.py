"""The choice of the next token from its logits."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hotset.runtime.sampling_params import SamplingParams

TokenIds = NDArray[np.int32]


class LogitsNotNumbers(ValueError):
    """No token can be chosen."""

    def __init__(self, position: int) -> None:
        super().__init__(f"the logits of position {position} are not numbers")


def sample(
    logits: NDArray[np.float32],
    params: SamplingParams,
    *,
    seed: int,
    position: int,
    prompt_ids: TokenIds,
    generated_ids: TokenIds,
) -> int:
    """The token id for `position` of the sequence, from logits [vocab_size]. The logits are left as they are.

    The draw is Philox(seed, position): whoever continues a sequence, and after whatever, draws the same.
    Order as in vLLM: bias, penalties, temperature, min_p, top_k, top_p. Raises `LogitsNotNumbers` if a logit is NaN.
    """
    if params.logit_bias or _penalises(params):
        logits = logits.copy()
        _bias(logits, params)
        _penalise(logits, params, prompt_ids, generated_ids)
    best = int(np.argmax(logits))  # the lowest id of equals; a NaN where there is one
    highest = float(logits[best])
    if math.isnan(highest):
        raise LogitsNotNumbers(position)
    if params.temperature == 0 or params.top_k == 1 or math.isinf(highest):
        return best
    weights = np.exp((logits - highest).astype(np.float64) / params.temperature)  # the best one's is 1
    _truncate(weights, params)
    cumulative: NDArray[np.float64] = np.cumsum(weights)
    return int(np.searchsorted(cumulative, uniform(seed, position) * cumulative[-1], side="right"))


def uniform(seed: int, position: int) -> float:
    """A number of [0, 1) with 53 random bits: the first word of Philox4x64-10, key (seed, position), counter 1."""
    word = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw()
    return (int(word) >> 11) * 2.0**-53


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _bias(logits: NDArray[np.float32], params: SamplingParams) -> None:
    for token_id, bias in (params.logit_bias or {}).items():
        if token_id >= len(logits):
            raise ValueError(f"logit_bias names token {token_id}, the model has {len(logits)}")
        logits[token_id] += bias


def _penalise(
    logits: NDArray[np.float32], params: SamplingParams, prompt_ids: TokenIds, generated_ids: TokenIds
) -> None:
    if params.repetition_penalty != 1:
        seen = np.union1d(prompt_ids, generated_ids)
        values = logits[seen]
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    ids, counts = np.unique(generated_ids, return_counts=True)
    logits[ids] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)


def _truncate(weights: NDArray[np.float64], params: SamplingParams) -> None:
    """Set the weights of all tokens to 0 that min_p, top_k and top_p leave out. The largest weight is 1."""
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    if 0 < params.top_k < len(weights):
        order = np.argsort(-weights, kind="stable")  # of equals the lowest ids stay
        weights[order[params.top_k :]] = 0
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order])
        before = np.concatenate(([0.0], before[:-1])) / before[-1]
        weights[order[before >= params.top_p]] = 0
