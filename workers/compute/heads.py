"""From hidden states to the heads of attention, and from what they mixed to the rows that the output projection takes.

There are two kinds: heads whose queries, keys and values are projected one by one, and those of latent attention
(runtime/model/latent_attention.py). Both give keys as they are stored, rotated by their positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.latent_attention import LATENT_NORM_EPS, LatentAttention
from hotset.workers.compute import _kernels
from hotset.workers.compute.weights import Floats, Projection


class Heads(ABC):
    """The projections of one layer."""

    @abstractmethod
    def __call__(self, normed: Floats, cos: Floats, sin: Floats) -> tuple[Floats, Floats, Floats | None]:
        """Queries [n, num_heads, head_dim], keys [n, num_kv_heads, head_dim] and values like keys, or None where the
        first numbers of keys are the values.

        normed [n, hidden_size]; cos and sin [n, rotary_dim / 2] of the rows' positions.
        """

    @abstractmethod
    def joined(self, mixed: Floats) -> Floats:
        """[n, inputs of the output projection] of what each head mixed, [n, num_heads, mixed_dim]."""


class SeparateHeads(Heads):
    """`query_norm` and `key_norm` are as long as all heads, or as one and then every head is normalised."""

    def __init__(
        self,
        config: ModelConfig,
        query: Projection,
        key: Projection,
        value: Projection,
        query_norm: Floats | None,
        key_norm: Floats | None,
    ) -> None:
        self._config = config
        self._query, self._key, self._value = query, key, value
        self._query_norm, self._key_norm = query_norm, key_norm

    def __call__(self, normed: Floats, cos: Floats, sin: Floats) -> tuple[Floats, Floats, Floats | None]:
        config, count = self._config, len(normed)
        queries, keys, values = self._query(normed), self._key(normed), self._value(normed)
        self._normalize(queries, self._query_norm)
        self._normalize(keys, self._key_norm)
        if config.clip_qkv is not None:
            for array in (queries, keys, values):
                np.clip(array, -config.clip_qkv, config.clip_qkv, out=array)
        query_heads = queries.reshape(count, config.num_heads, config.head_dim)
        key_heads = keys.reshape(count, config.num_kv_heads, config.head_dim)
        value_heads = values.reshape(count, config.num_kv_heads, config.head_dim)
        if config.rope_interleaved:
            query_heads, key_heads = _halves(query_heads), _halves(key_heads)
        _kernels.rotate(query_heads, cos, sin)
        _kernels.rotate(key_heads, cos, sin)
        return query_heads, key_heads, value_heads

    def joined(self, mixed: Floats) -> Floats:
        return mixed.reshape(len(mixed), -1)

    def _normalize(self, rows: Floats, weight: Floats | None) -> None:
        """Queries or keys in place."""
        if weight is not None:
            parts = rows.reshape(-1, len(weight))
            _kernels.rms_norm(parts, weight, self._config.rms_norm_eps, parts)


class LatentHeads(Heads):
    """Keys are latent vectors and what is rotated; queries are projected to meet them, and mixtures of latent vectors
    to values.

    Args:
        config, latent: of the model.
        query_down, query_norm: where queries have a latent vector of their own.
        query: of all heads, plain and rotated part of each.
        down, norm: to the latent vector and the rotated part of keys; the norm is the vector's.
        from_latent: of each head, the rows of its keys and those of its values.
    """

    def __init__(
        self,
        config: ModelConfig,
        latent: LatentAttention,
        query_down: Projection | None,
        query_norm: Floats | None,
        query: Projection,
        down: Projection,
        norm: Floats,
        from_latent: Projection,
    ) -> None:
        self._config, self._latent = config, latent
        self._query_down, self._query_norm, self._query = query_down, query_norm, query
        self._down, self._norm = down, norm
        starts = range(0, len(from_latent.weight), latent.plain_dim + latent.value_dim)
        self._keys = [from_latent.of_outputs(start, latent.plain_dim) for start in starts]
        self._values = [from_latent.of_outputs(start + latent.plain_dim, latent.value_dim) for start in starts]

    def __call__(self, normed: Floats, cos: Floats, sin: Floats) -> tuple[Floats, Floats, Floats | None]:
        latent, count = self._latent, len(normed)
        rows = self._down(normed)
        vectors = np.ascontiguousarray(rows[:, : latent.rank])
        _kernels.rms_norm(vectors, self._norm, LATENT_NORM_EPS, vectors)
        keys = np.concatenate([vectors[:, None], self._rotated(rows[:, None, latent.rank :], cos, sin)], axis=2)

        if self._query_down is not None and self._query_norm is not None:
            normed = self._query_down(normed)
            _kernels.rms_norm(normed, self._query_norm, LATENT_NORM_EPS, normed)
        heads = self._query(normed).reshape(count, self._config.num_heads, latent.query_dim)
        plain = _of_each_head(heads[:, :, : latent.plain_dim])
        absorbed = np.stack([key.transposed(rows) for key, rows in zip(self._keys, plain, strict=True)], axis=1)
        queries = np.concatenate([absorbed, self._rotated(heads[:, :, latent.plain_dim :], cos, sin)], axis=2)
        return queries, keys, None

    def joined(self, mixed: Floats) -> Floats:
        values = [value(rows) for value, rows in zip(self._values, _of_each_head(mixed), strict=True)]
        return np.concatenate(values, axis=1)

    def _rotated(self, heads: Floats, cos: Floats, sin: Floats) -> Floats:
        """A copy of [n, heads, rotary_dim]."""
        heads = _halves(heads) if self._config.rope_interleaved else heads.copy()
        _kernels.rotate(heads, cos, sin)
        return heads


def _of_each_head(heads: Floats) -> Sequence[Floats]:
    """[n, heads, dim] as contiguous [n, dim] of each head."""
    return list(np.ascontiguousarray(heads.swapaxes(0, 1)))


def _halves(heads: Floats) -> Floats:
    """Heads [n, heads, dim] whose rotated pairs are neighbours, with each pair's members half a head apart."""
    pairs = heads.reshape(*heads.shape[:2], -1, 2)
    return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(heads.shape)
