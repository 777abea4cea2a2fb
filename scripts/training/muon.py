"""The optimiser: its steps over the matrices of a model run in a pool of threads."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from training.model import OlmoeModel


def orthogonalised(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of [..., m, n], by Muon's quintic iteration (Jordan, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Orthogonalised momentum for the matrices inside the layers; AdamW for embeddings, router, head, norms.

    The factor 0.2 sqrt(max(m, n)) gives both kinds of update the same RMS (Liu et al., "Muon is Scalable
    for LLM Training", 2025), so that one learning rate serves both.
    """

    def __init__(self, model: OlmoeModel, weight_decay: float, momentum: float = 0.95) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        self.matrices: list[tuple[nn.Parameter, int]] = []  # parameter, rows of one matrix in it
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if name.endswith((".gate_up", ".down")) or (".self_attn." in name and parameter.ndim == 2):
                stacked = 2 if name.endswith(".gate_up") else 1
                self.matrices.append((parameter, parameter.shape[-2] // stacked))
            else:
                others.append(parameter)
        self.buffers = [torch.zeros_like(parameter) for parameter, _ in self.matrices]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def _step_matrices(self, parameter: nn.Parameter, rows: int, buffer: Tensor, rate: float) -> None:
        gradient = parameter.grad
        if gradient is None:
            raise RuntimeError("a step needs the gradient of every matrix")
        buffer.lerp_(gradient, 1 - self.momentum)
        columns = parameter.shape[-1]
        direction = gradient.lerp(buffer, self.momentum).view(-1, rows, columns)
        parameter.mul_(1 - rate * self.weight_decay)
        parameter.add_(orthogonalised(direction).view_as(parameter), alpha=-rate * 0.2 * math.sqrt(max(rows, columns)))

    def step(self, rate: float, pool: ThreadPoolExecutor) -> None:
        jobs = [
            pool.submit(self._step_matrices, parameter, rows, buffer, rate)
            for (parameter, rows), buffer in zip(self.matrices, self.buffers, strict=True)
        ]
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        for job in jobs:
            job.result()

    def state_dict(self) -> dict[str, Any]:
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)
        self.adam.load_state_dict(state["adam"])
