"""OLMoE as it is trained: float32, its experts stacked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training.expert_mixture import ExpertMixture


@dataclass(frozen=True)
class ModelShape:
    """Field names are those of Hugging Face's OlmoeConfig."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    num_experts: int = 32
    num_experts_per_tok: int = 4
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.0005  # half of Mixtral's and Qwen's: runtime/model/trained/README.md says why


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions; queries and keys are normalised over the whole width."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(width, shape.rms_norm_eps), RMSNorm(width, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-second, first), dim=-1) * sin

        query = rotate(heads(self.q_norm(self.q_proj(x))))
        key = rotate(heads(self.k_norm(self.k_proj(x))))
        mixed = F.scaled_dot_product_attention(query, key, heads(self.v_proj(x)), is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class MoE(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.top_k = shape.num_experts_per_tok
        experts, inner, width = shape.num_experts, shape.intermediate_size, shape.hidden_size
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixture output, and the load-balancing loss E * sum_e(share of choices e * mean probability e)
        (Switch Transformer, eq. 4, per layer, top-k choices counted)."""
        flat = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(flat).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        experts = probabilities.shape[1]
        share = torch.bincount(chosen.flatten(), minlength=experts) / len(flat)
        balance = experts * torch.dot(share, probabilities.mean(0))
        return ExpertMixture.apply(flat, weights, chosen, self.gate_up, self.down).view_as(x), balance


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MoE(shape)


class OlmoeModel(nn.Module):
    """OLMoE with a layer's experts stacked in two tensors; the export splits them."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        head_dim = shape.hidden_size // shape.num_attention_heads
        frequencies = shape.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.arange(shape.max_position_embeddings).float()[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            std = 0.02 if name.startswith(("embed", "lm_head")) else 0.5 / math.sqrt(parameter.shape[-1])
            if name.endswith(("o_proj.weight", "down")):
                std /= math.sqrt(2 * self.shape.num_hidden_layers)
            nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, L] -> logits [B, L, vocabulary], mean load-balancing loss of the layers."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        balance = x.new_zeros(())
        for layer in self.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin)
            mixed, layer_balance = layer.mlp(layer.post_attention_layernorm(x))
            x = x + mixed
            balance = balance + layer_balance / len(self.layers)
        return self.lm_head(self.norm(x)), balance


def next_token_loss(model: OlmoeModel, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats per token over windows [B, L + 1], and the load-balancing loss."""
    logits, balance = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), balance
