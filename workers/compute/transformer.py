"""The forward pass of one batch: token ids in, logits out, keys and values into their pages on the way.

Dense weights are used where the checkpoint's mapping has them, in the stored format; activations are float32.
A row's logits do not depend, to the last bit, on the other rows of its batch, on how a prompt is cut into
batches, or on the number of threads: every step works row by row, or in a kernel that promises it
(_kernels.pyi).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.tensors import model_tensors
from hotset.shm.kv_page_format import Bytes, KvFormat
from hotset.workers.compute import _kernels
from hotset.workers.compute.broken_weights import BrokenWeights, FailedRow, NotANumber
from hotset.workers.compute.layer_weights import LayerWeights
from hotset.workers.compute.weights import Embedding, Floats, Projection, as_float32

_KERNEL_FORMATS = {
    KvFormat.FLOAT32: _kernels.KV_FLOAT32,
    KvFormat.FLOAT16: _kernels.KV_FLOAT16,
    KvFormat.BFLOAT16: _kernels.KV_BFLOAT16,
    KvFormat.Q8_0: _kernels.KV_Q8_0,
    KvFormat.Q4_0: _kernels.KV_Q4_0,
}

Experts = Callable[[int, Floats, Floats, Floats], Floats]
"""(layer, hidden [n, hidden_size] after its norm, gate logits [n, num_experts], hidden before its norm, which is not to
be changed) -> mixture [n, hidden_size]."""


class SequenceRows(msgspec.Struct, frozen=True):
    """The rows row_start ... row_start + row_count - 1 of a batch are new positions of one sequence, in
    order.

    block_tables: page ids, uint32 [groups of layers, blocks]; entry i holds the positions i * block_size onwards.
    They must cover the sequence to the last of these rows; entries wholly behind a group's window are not read.
    """

    row_start: int
    row_count: int
    block_tables: NDArray[np.uint32]


class Batch(msgspec.Struct, frozen=True):
    """token_ids and positions are int32 [n]; the sequences' rows follow one another and make up all n."""

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: Sequence[SequenceRows]


def own_block_tables(config: ModelConfig, num_sequences: int, num_blocks: int) -> NDArray[np.uint32]:
    """Block tables [sequences, groups, blocks] without a page in two places, for callers that need no cache: the pages
    1, 2, 3 ...
    """
    shape = num_sequences, config.kv_groups.num_groups, num_blocks
    return 1 + np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)


class UnstorableRow(FailedRow):
    """A row whose keys or values are too large for the KV pages; nothing of its layer has been written."""

    def __init__(self, row: int, position: int, layer: int, largest: float, format: KvFormat) -> None:
        super().__init__(
            row,
            f"the keys and values of position {position} in layer {layer} reach {largest:g} in magnitude, "
            f"which KV pages of {format.value} cannot hold",
        )


class Transformer:
    """One model's forward pass over KV pages that lie in shared memory.

    kv_pages: uint8 [pages, layers of a group, 2 (keys, values) or 1, block_size, num_kv_heads, bytes of a head in
    `kv_format`]: see `ModelConfig.kv_page_layout`. The rows of a batch's positions are written; those of earlier
    positions are read where they are.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, kv_pages: Bytes, kv_format: KvFormat, experts: Experts
    ) -> None:
        layout = config.kv_page_layout(max(1, kv_pages.shape[3] if kv_pages.ndim == 6 else 1), kv_format)
        if kv_pages.shape[1:] != layout.shape:
            layers, planes, _, heads, head_nbytes = layout.shape
            raise ValueError(
                f"kv_pages has shape {kv_pages.shape}, expected [pages, {layers}, {planes}, block_size, "
                f"{heads}, {head_nbytes}] for {kv_format.value}"
            )
        self.config = config
        self.broken = BrokenWeights(checkpoint)
        self._kv_pages = kv_pages
        self._kv_groups = config.kv_groups
        self._kv_format = kv_format
        self._experts = experts
        tensors = model_tensors(config)
        self._embedding = Embedding.of(checkpoint, tensors["embedding"].name)
        self._layers = [LayerWeights.of(checkpoint, layer) for layer in range(config.num_layers)]
        self._norm = as_float32(checkpoint.dense(tensors["norm"].name))
        self._head = Projection.of(checkpoint, tensors["head"].name)
        self._inverse_frequencies = config.rope.inverse_frequencies(config.rotary_dim)

    def forward(self, batch: Batch, *, all_rows: bool = False) -> Floats:
        """Logits [sequences, vocab_size] for the last row of each sequence, or [n, vocab_size] for all rows.

        Raises ValueError for a token id, position or page outside its range, `UnstorableRow` for values that the pages
        cannot hold, `NotANumber` for what broken weights have made of a row.
        """
        config, count = self.config, len(batch.token_ids)
        rows = _Rows(batch, self._kv_groups.num_groups, self._inverse_frequencies, config.rope.magnitude)
        if count and not 0 <= int(batch.token_ids.min()) <= int(batch.token_ids.max()) < config.vocab_size:
            raise ValueError(f"the batch has a token id outside 0 <= id < {config.vocab_size}")
        hidden = self._embedding(batch.token_ids)
        normed = np.empty_like(hidden)
        for index, layer in enumerate(self._layers):
            _kernels.rms_norm(hidden, layer.input_norm, config.rms_norm_eps, normed)
            hidden += self._attention(index, layer, normed, rows, hidden)
            _kernels.rms_norm(hidden, layer.feed_forward_norm, config.rms_norm_eps, normed)
            hidden += self._feed_forward(index, layer, normed, hidden)
        wanted = list(range(count)) if all_rows else [rows.row_start + rows.row_count - 1 for rows in batch.sequences]
        if not all_rows:
            hidden = hidden[wanted]
        finite = np.isfinite(hidden).all(axis=1)
        if not finite.all():
            row = wanted[int(np.argmin(finite))]
            reason = self.broken.before(config.num_layers)
            raise NotANumber(row, int(rows.positions[row]), "the last layer", reason)
        _kernels.rms_norm(hidden, self._norm, config.rms_norm_eps, hidden)
        return self._head(hidden)

    def _feed_forward(self, index: int, layer: LayerWeights, normed: Floats, hidden: Floats) -> Floats:
        if layer.dense is not None:
            return layer.dense(normed)
        mixture = self._experts(index, normed, layer.router(normed), hidden)
        if layer.shared is not None:
            mixture += layer.shared(normed)
        return mixture

    def _attention(self, index: int, layer: LayerWeights, normed: Floats, rows: _Rows, hidden: Floats) -> Floats:
        config = self.config
        queries, keys, values = layer.heads(normed, rows.cos, rows.sin)
        format = _KERNEL_FORMATS[self._kv_format]
        group, layer_of_group = self._kv_groups.places[index]
        places = self._kv_pages, format, layer_of_group, rows.block_tables[group], rows.table_starts, rows.positions
        unstorable = _kernels.write_kv(keys, values, *places)
        if unstorable >= 0:
            stored = [heads[unstorable] for heads in (keys, values) if heads is not None]
            position, largest = int(rows.positions[unstorable]), float(np.abs(stored).max())
            if math.isfinite(largest):
                raise UnstorableRow(unstorable, position, index, largest, self._kv_format)
            entered = np.isfinite(hidden[unstorable]).all()
            reason = self.broken.within(index) if entered else self.broken.before(index)
            raise NotANumber(unstorable, position, f"layer {index}", reason)
        mixed = np.empty((len(normed), config.num_heads, config.mixed_dim), np.float32)
        _kernels.attention(queries, *places, config.windows[index], mixed, layer.sinks, config.attention_scale)
        return layer.output(layer.heads.joined(mixed))


class _Rows:
    """What all layers need to know about the rows of a batch."""

    def __init__(self, batch: Batch, num_groups: int, inverse_frequencies: Floats, magnitude: float) -> None:
        self.positions = np.ascontiguousarray(batch.positions, np.int32)
        tables = [sequence.block_tables for sequence in batch.sequences]
        counts = [sequence.row_count for sequence in batch.sequences]
        if sum(counts) != len(self.positions) or len(self.positions) != len(batch.token_ids):
            raise ValueError(
                f"the batch has {len(batch.token_ids)} token ids, {len(self.positions)} positions and "
                f"{sum(counts)} rows in its sequences"
            )
        if any(table.shape[:-1] != (num_groups,) for table in tables):
            shapes = [table.shape for table in tables]
            raise ValueError(f"the block tables have the shapes {shapes}, expected ({num_groups}, blocks)")
        # Copied: what the coordinator clears behind a window meanwhile shows in no layer.
        self.block_tables = np.concatenate(
            [np.empty((num_groups, 0)), *tables], axis=1, dtype=np.uint32, casting="unsafe"
        )
        blocks = [table.shape[1] for table in tables]
        self.table_starts = np.repeat(np.cumsum(blocks, dtype=np.int64) - blocks, counts).astype(np.int64)
        self.cos = np.empty((len(self.positions), len(inverse_frequencies)), np.float32)
        self.sin = np.empty_like(self.cos)
        _kernels.rotary_angles(self.positions, inverse_frequencies, self.cos, self.sin)
        if magnitude != 1.0:
            self.cos *= np.float32(magnitude)
            self.sin *= np.float32(magnitude)
