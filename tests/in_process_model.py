"""A whole model in one process, its experts read straight from the checkpoint: no arena, no pager."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.router import MemoryAwareRouter
from hotset.shm.kv_page_format import KvFormat
from hotset.shm.layout import WeightFormat
from hotset.workers.compute.experts import combine_in_rank_order, experts_forward, group_by_expert
from hotset.workers.compute.gates import selection_bias
from hotset.workers.compute.transformer import Batch, SequenceRows, Transformer
from hotset.workers.expert_store import read_expert
from hotset.workers.moe import router_config

FloatRows = NDArray[np.float32]

NEVER_WRITTEN = 0xFF  # reads as NaN in all page formats, so a row that was never written shows


class InProcessModel:
    def __init__(
        self, folder: Path, num_pages: int = 64, block_size: int = 16, kv_format: KvFormat = KvFormat.FLOAT32
    ) -> None:
        self.config = ModelConfig.load(folder)
        self.checkpoint = Checkpoint.open(folder, self.config)
        page = self.config.kv_page_layout(block_size, kv_format)
        self.kv_pages = np.full((num_pages, *page.shape), NEVER_WRITTEN, np.uint8)
        self.transformer = Transformer(self.config, self.checkpoint, self.kv_pages, kv_format, self._experts)
        self._router = MemoryAwareRouter(
            router_config(self.config, policy="off"),
            num_layers=self.config.num_layers,
            selection_bias=selection_bias(self.checkpoint),
        )
        self._slots: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._gates: list[FloatRows] | None = None  # of the layers, while `clear_choices` wants them

    def sequence(self, row_start: int, row_count: int, pages: Sequence[int]) -> SequenceRows:
        """With the pages of its block table, divided evenly among the groups of layers."""
        groups = self.config.kv_groups.num_groups
        tables = np.array(pages[: len(pages) // groups * groups], np.uint32).reshape(groups, -1)
        return SequenceRows(row_start, row_count, tables)

    def logits(self, token_ids: NDArray[np.int32], chunks: Sequence[int] | None = None) -> FloatRows:
        """Logits [n, vocab_size] of one sequence, prefilled in chunks of the given lengths (None: all at once)."""
        table = range(1, len(self.kv_pages))
        results = []
        start = 0
        for length in chunks or [len(token_ids)]:
            positions = np.arange(start, start + length, dtype=np.int32)
            batch = Batch(token_ids[start : start + length], positions, [self.sequence(0, length, table)])
            results.append(self.transformer.forward(batch, all_rows=True))
            start += length
        return np.concatenate(results)

    def greedy(self, token_ids: NDArray[np.int32], count: int) -> list[int]:
        """The `count` token ids that follow, whatever ends the text."""
        chosen: list[int] = []
        new = np.asarray(token_ids, np.int32)
        table = range(1, len(self.kv_pages))
        position = 0
        for _ in range(count):
            positions = np.arange(position, position + len(new), dtype=np.int32)
            logits = self.transformer.forward(Batch(new, positions, [self.sequence(0, len(new), table)]))
            position += len(new)
            chosen.append(int(np.argmax(logits[0])))
            new = np.array(chosen[-1:], np.int32)
        return chosen

    def clear_choices(self, token_ids: NDArray[np.int32], share: float) -> tuple[FloatRows, NDArray[np.bool_]]:
        """Logits [n, vocab_size] of one sequence, and [n] whether up to there, in every layer, the gate tells the last
        chosen expert from the best of the others, and the last chosen group likewise, by more than a share of its
        largest logit makes of what it ranks them by.
        """
        self._gates = []
        logits = self.logits(token_ids)
        gates, self._gates = np.stack(self._gates), None
        config = self.config
        doubt = share * np.abs(gates).max(axis=2)
        scores = gates
        if config.family.gating == "sigmoid":
            bias = selection_bias(self.checkpoint)
            assert bias is not None
            scores = 1 / (1 + np.exp(-gates)) + bias[config.expert_layers][:, None]
            doubt = doubt / 4  # nowhere is a sigmoid steeper
        clear = np.ones(doubt.shape, np.bool_)
        if config.expert_groups > config.top_expert_groups:
            of_groups = np.sort(scores.reshape(*scores.shape[:2], config.expert_groups, -1), axis=3)
            worth = of_groups[..., -2 if config.family.gating == "sigmoid" else -1 :].sum(axis=3)
            clear = _is_clear(worth, config.top_expert_groups, 2 * doubt)
            last = np.sort(worth, axis=2)[:, :, -config.top_expert_groups, None]
            scores = np.where(np.repeat(worth >= last, of_groups.shape[3], axis=2), scores, -np.inf)
        clear &= _is_clear(scores, config.experts_per_token, doubt)
        return logits, np.logical_and.accumulate(clear.all(axis=0))

    def _experts(self, layer: int, hidden: FloatRows, gate_logits: FloatRows, residual: FloatRows) -> FloatRows:
        if self._gates is not None:
            self._gates.append(gate_logits.copy())
        ids, weights, _ = self._router.route_batch(gate_logits, layer)
        outputs = np.empty((*ids.shape, self.config.hidden_size), np.float32)
        selections = group_by_expert(ids)
        slots = [self._slot(layer, expert) for expert in selections]
        formats = [WeightFormat[self.checkpoint.expert_dtype(layer, expert).upper()] for expert in selections]
        experts_forward(hidden, list(selections.values()), slots, formats, self.config, outputs)
        return combine_in_rank_order(outputs, weights)

    def _slot(self, layer: int, expert: int) -> NDArray[np.uint8]:
        slot = self._slots.get((layer, expert))
        if slot is None:
            slot = self._slots[layer, expert] = read_expert(self.checkpoint, layer, expert)
        return slot


def _is_clear(scores: FloatRows, count: int, doubt: FloatRows) -> NDArray[np.bool_]:
    """[layers, n]: whether the best `count` of [layers, n, choices] are the best by more than `doubt` [layers, n]."""
    ranked = np.sort(scores, axis=2)[:, :, ::-1]
    return ranked[:, :, count - 1] - ranked[:, :, count] > doubt
