"""The experts' part of the model, forward and backward, over tokens sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertMixture(torch.autograd.Function):
    """Weighted sum of the chosen experts' SwiGLU: one pair of GEMMs per expert, over tokens sorted by expert.

    The backward pass is written out so that one expert's rows stay in cache through all of its operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """x [T, H], weights and chosen [T, K], gate_up [E, 2 I, H], down [E, H, I] -> [T, H]."""
        tokens, top_k = chosen.shape
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        token_of_row = order // top_k
        rows = x.index_select(0, token_of_row)
        row_weights = weights.flatten().index_select(0, order).unsqueeze(1)
        inner = rows.new_empty(len(rows), gate_up.shape[1])
        hidden = rows.new_empty(len(rows), down.shape[2])
        result = torch.empty_like(rows)
        start = 0
        for expert, count in enumerate(counts):
            span = slice(start, start + count)
            start += count
            torch.mm(rows[span], gate_up[expert].t(), out=inner[span])
            gate, up = inner[span].chunk(2, dim=1)
            torch.mul(F.silu(gate), up, out=hidden[span])
            torch.mm(hidden[span] * row_weights[span], down[expert].t(), out=result[span])
        ctx.save_for_backward(rows, row_weights, inner, hidden, order, place, token_of_row, gate_up, down)
        ctx.counts = counts
        return result.index_select(0, place).view(tokens, top_k, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, inner, hidden, order, place, token_of_row, gate_up, down = ctx.saved_tensors
        d_result = grads[0].index_select(0, token_of_row)
        d_rows = torch.empty_like(rows)
        d_row_weights = torch.empty_like(row_weights)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        start = 0
        for expert, count in enumerate(ctx.counts):
            span = slice(start, start + count)
            start += count
            weight, gate_and_up, silu_up = row_weights[span], inner[span], hidden[span]
            gate, up = gate_and_up.chunk(2, dim=1)
            torch.mm(d_result[span].t(), silu_up * weight, out=d_down[expert])
            d_hidden = torch.mm(d_result[span], down[expert])
            torch.sum(d_hidden * silu_up, dim=1, keepdim=True, out=d_row_weights[span])
            d_hidden *= weight
            d_inner = torch.empty_like(gate_and_up)
            d_gate, d_up = d_inner.chunk(2, dim=1)
            torch.mul(d_hidden, F.silu(gate), out=d_up)
            d_gate.copy_(torch.ops.aten.silu_backward(d_hidden * up, gate))
            torch.mm(d_inner.t(), rows[span], out=d_gate_up[expert])
            torch.mm(d_inner, gate_up[expert], out=d_rows[span])
        top_k = len(order) // len(grads[0])
        d_x = d_rows.index_select(0, place).view(len(grads[0]), top_k, -1).sum(1)
        d_weights = d_row_weights.flatten().index_select(0, place).view(-1, top_k)
        return d_x, d_weights, None, d_gate_up, d_down
