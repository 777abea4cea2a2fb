"""The forward pass against OLMoE written down once more, in float64 numpy without pages, kernels or batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_model import InProcessModel
from model_factory import make_model
from numpy.typing import NDArray

from hotset.shm.kv_page_format import KvFormat
from hotset.workers.compute.experts import group_by_expert
from hotset.workers.compute.transformer import Batch, SequenceRows
from hotset.workers.compute.weights import as_float32

Float64 = NDArray[np.float64]


class Olmoe:
    def __init__(self, model: InProcessModel) -> None:
        self.config = model.config
        self.checkpoint = model.checkpoint

    def weight(self, name: str) -> Float64:
        return as_float32(self.checkpoint.dense(f"{name}.weight")).astype(np.float64)

    def norm(self, x: Float64, name: str) -> Float64:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.weight(name)

    def rotate(self, x: Float64) -> Float64:
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * self.config.rope.theta ** -(np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, x: Float64, prefix: str) -> Float64:
        config, count = self.config, len(x)
        queries = self.norm(x @ self.weight(f"{prefix}.q_proj").T, f"{prefix}.q_norm")
        keys = self.norm(x @ self.weight(f"{prefix}.k_proj").T, f"{prefix}.k_norm")
        values = x @ self.weight(f"{prefix}.v_proj").T
        if config.clip_qkv is not None:
            queries, keys, values = (np.clip(y, -config.clip_qkv, config.clip_qkv) for y in (queries, keys, values))
        group = config.num_heads // config.num_kv_heads
        queries = self.rotate(queries.reshape(count, config.num_heads, -1))
        keys = np.repeat(self.rotate(keys.reshape(count, config.num_kv_heads, -1)), group, axis=1)
        values = np.repeat(values.reshape(count, config.num_kv_heads, -1), group, axis=1)
        scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(config.head_dim)
        scores[:, ~np.tri(count, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, values).reshape(count, -1) @ self.weight(f"{prefix}.o_proj").T

    def experts(self, x: Float64, layer: int) -> Float64:
        gate_logits = x @ self.weight(f"model.layers.{layer}.mlp.gate").T
        probabilities = np.exp(gate_logits) / np.exp(gate_logits).sum(-1, keepdims=True)
        result = np.zeros_like(x)
        for row in range(len(x)):
            chosen = np.argsort(-probabilities[row], kind="stable")[: self.config.experts_per_token]
            weights = probabilities[row, chosen]
            if self.config.normalize_top_k:
                weights = weights / weights.sum()
            for expert, weight in zip(chosen, weights, strict=True):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}"
                gate, up = self.weight(f"{prefix}.gate_proj") @ x[row], self.weight(f"{prefix}.up_proj") @ x[row]
                result[row] += weight * (self.weight(f"{prefix}.down_proj") @ (gate / (1 + np.exp(-gate)) * up))
        return result

    def logits(self, token_ids: NDArray[np.int32]) -> Float64:
        x = self.weight("model.embed_tokens")[token_ids]
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn")
            x = x + self.experts(self.norm(x, f"{prefix}.post_attention_layernorm"), layer)
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.norm(x, "model.norm") @ self.weight(head).T


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"num_kv_heads": 1},
        {"norm_topk_prob": True},
        {"tie_word_embeddings": True},
        {"clip_qkv": 0.5},
        {"rope_theta": 500.0, "rms_norm_eps": 1e-3},
        {"shards": 3, "experts_per_token": 8},
    ],
    ids=str,
)
def test_logits_of_all_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    model = InProcessModel(make_model(tmp_path / "model", **options))
    token_ids = np.random.default_rng(5).integers(0, 260, 60).astype(np.int32)
    np.testing.assert_allclose(model.logits(token_ids), Olmoe(model).logits(token_ids), atol=1e-4)


@pytest.fixture
def model(tmp_path: Path) -> InProcessModel:
    return InProcessModel(make_model(tmp_path / "model"), num_pages=8, block_size=4)


def test_only_the_last_row_of_each_sequence_by_default(model: InProcessModel) -> None:
    token_ids = np.arange(7, dtype=np.int32)
    positions = np.array([0, 1, 2, 3, 0, 1, 2], np.int32)
    batch = Batch(token_ids, positions, [model.sequence(0, 4, [1]), model.sequence(4, 3, [2])])
    every_row = model.transformer.forward(batch, all_rows=True)
    assert every_row.shape == (7, 260)
    np.testing.assert_array_equal(model.transformer.forward(batch), every_row[[3, 6]])


def test_rows_are_written_in_place_and_nowhere_else(model: InProcessModel) -> None:
    token_ids = np.array([5], np.int32)
    model.kv_pages[3, :, :, :2] = 0
    model.transformer.forward(Batch(token_ids, np.array([2], np.int32), [model.sequence(0, 1, [3])]))
    written = ~np.isnan(model.kv_pages.view(np.float32))
    assert written[3, :, :, :3].all()
    written[3, :, :, :3] = False
    assert not written.any()


def test_wrong_batches_are_refused(model: InProcessModel) -> None:
    table = np.array([[1]], np.uint32)
    ids, positions = np.array([1, 2], np.int32), np.array([0, 1], np.int32)
    with pytest.raises(ValueError, match="outside 0 <= id < 260"):
        model.transformer.forward(Batch(np.array([1, 260], np.int32), positions, [SequenceRows(0, 2, table)]))
    with pytest.raises(ValueError, match="outside 0 <= id < 260"):
        model.transformer.forward(Batch(np.array([-1, 2], np.int32), positions, [SequenceRows(0, 2, table)]))
    with pytest.raises(ValueError, match="2 token ids, 2 positions and 1 rows"):
        model.transformer.forward(Batch(ids, positions, [SequenceRows(0, 1, table)]))
    with pytest.raises(ValueError, match="page 8, expected less than 8"):
        model.transformer.forward(Batch(ids, positions, [SequenceRows(0, 2, table + 7)]))
    with pytest.raises(ValueError, match="shapes \\[\\(1,\\)\\], expected \\(1, blocks\\)"):
        model.transformer.forward(Batch(ids, positions, [SequenceRows(0, 2, table[0])]))


def test_kv_pages_of_another_model_are_refused(model: InProcessModel) -> None:
    from hotset.workers.compute.transformer import Transformer

    pages = np.zeros((8, 2, 2, 4, 4, 32), np.uint8)
    with pytest.raises(ValueError, match="expected \\[pages, 2, 2, block_size, 4, 34\\] for q8_0"):
        Transformer(model.config, model.checkpoint, pages, KvFormat.Q8_0, lambda layer, hidden, gate, residual: hidden)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[3, 1], [1, 7], [3, 7], [0, 3]], {0: [6], 1: [1, 2], 3: [0, 4, 7], 7: [3, 5]}),
        ([[5, 2, 9]], {2: [1], 5: [0], 9: [2]}),
    ],
)
def test_grouping_gives_every_assignment_to_its_expert_once(
    ids: list[list[int]], expected: dict[int, list[int]]
) -> None:
    groups = group_by_expert(np.array(ids, np.int32))
    assert {expert: assignments.tolist() for expert, assignments in groups.items()} == expected
    assert list(groups) == sorted(groups)


@pytest.mark.parametrize("ids", [[[3, 1], [1, 7], [3, 7], [0, 3]], [[5, 2, 9]]])
def test_grouping_leaves_out_what_is_not_kept(ids: list[list[int]]) -> None:
    experts = np.array(ids, np.int32)
    for seed in range(20):
        kept = np.random.default_rng(seed).random(experts.shape) < 0.5
        groups = {expert: assignments.tolist() for expert, assignments in group_by_expert(experts, kept).items()}
        everything = group_by_expert(experts)
        expected = {e: [a for a in assignments.tolist() if kept.flat[a]] for e, assignments in everything.items()}
        assert groups == {expert: assignments for expert, assignments in expected.items() if assignments}
    assert group_by_expert(experts, np.zeros(experts.shape, np.bool_)) == {}
