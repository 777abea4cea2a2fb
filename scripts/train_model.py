#!/usr/bin/env python3
"""Train the small OLMoE model that ships in runtime/model/trained.

    python scripts/train_model.py --tokens 40e6 --deadline 09:00      # starts, or resumes after a kill
    python scripts/train_model.py --export-only                       # last checkpoint -> --out
    python scripts/train_model.py --evaluate                          # loss of --out over the held-out files
    python scripts/train_model.py --start-from runtime/model/trained --tokens 8e6 --learning-rate 1e-3
    python scripts/train_model.py --list-heldout

Needs torch, which the package itself does not. The corpus and its held-out files are those of
training_corpus.py. Everything that is not exported (tokens, tokenizer, checkpoint) lives in --work-dir.
The checkpoint is replaced atomically and holds all that the next step depends on, so a killed run
continues where it was.

The exported folder has Hugging Face's OLMoE layout with one tensor per expert matrix, in bfloat16;
`transformers.AutoModelForCausalLM.from_pretrained` loads it as it is.

With glibc, about a tenth of the time goes into page faults unless freed memory is kept:
    export GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296
    GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

# Two threads each differentiate their own half of a batch; a thread's own operations must not fork further.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from training_corpus import heldout_files, read_texts, training_files

END_OF_TEXT = "<|endoftext|>"
TRAINED_DIR = Path(__file__).resolve().parent.parent / "runtime" / "model" / "trained"


# --- Corpus ---------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; the end-of-text token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    token_id = tokenizer.token_to_id(END_OF_TEXT)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token")
    return token_id


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """One int16 stream, each document followed by the end-of-text token."""
    end = end_of_text_id(tokenizer)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int16)


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Tensor
    heldout: Tensor
    heldout_bytes: int


def prepare_corpus(work_dir: Path, vocab_size: int) -> Corpus:
    """Tokenizer and token streams, made once per work folder."""
    tokenizer_path, stream_path = work_dir / "tokenizer.json", work_dir / "corpus.pt"
    if not (tokenizer_path.exists() and stream_path.exists()):
        train_texts = list(read_texts(training_files()))
        heldout_texts = list(read_texts(heldout_files()))
        known = tokenizer_path.exists()
        tokenizer = Tokenizer.from_file(str(tokenizer_path)) if known else train_tokenizer(train_texts, vocab_size)
        streams = {
            "train": encode_documents(tokenizer, train_texts),
            "heldout": encode_documents(tokenizer, heldout_texts),
            "heldout_bytes": sum(len(text.encode()) for text in heldout_texts),
        }
        replace_file(tokenizer_path, lambda temporary: tokenizer.save(str(temporary)))
        replace_file(stream_path, lambda temporary: torch.save(streams, temporary))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    return Corpus(tokenizer, **torch.load(stream_path))


class WindowSampler:
    """Windows of a token stream, every window once per epoch in an order that depends only on (seed, epoch).

    The windows of each epoch begin at another offset, so that no token is always at the same position.
    """

    def __init__(self, stream: Tensor, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = (len(stream) - length - 1) // length
        self._epoch = -1

    def window(self, index: int) -> Tensor:
        """length + 1 token ids: inputs and, shifted by one, targets."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.length * 1009 + epoch)
            self._offset = int(torch.randint(self.length, (1,), generator=generator))
            self._order = torch.randperm(self.per_epoch, generator=generator)
            self._epoch = epoch
        start = self._offset + int(self._order[place]) * self.length
        return self.stream[start : start + self.length + 1].long()

    def batch(self, first: int, count: int) -> Tensor:
        return torch.stack([self.window(index) for index in range(first, first + count)])


# --- Model ----------------------------------------------------------------------------------------


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
    router_aux_loss_coef: float = 0.001  # as in the published configurations of Mixtral, Qwen2-MoE and Qwen3-MoE


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


# --- Optimiser ------------------------------------------------------------------------------------


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


# --- Training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup_tokens: int = 400_000
    short_length: int = 512
    long_length: int = 1024
    long_fraction: float = 0.12
    decay_fraction: float = 0.3
    batch_tokens: int = 8192
    gradient_clip: float = 1.0
    seed: int = 2026
    evaluate_every_tokens: int = 1_000_000
    checkpoint_every_seconds: float = 120.0


@dataclass
class Progress:
    """All of a run that is neither weights nor optimiser state."""

    tokens: int = 0
    steps: int = 0
    windows: dict[int, int] = field(default_factory=dict)  # windows drawn so far, by window length
    decay: float = 1.0  # factor on the learning rate; below 1 once the decay has begun
    decay_began_at: int | None = None
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, then rename, so that a reader or a kill never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.chmod(0o644)
    temporary.replace(path)


def parse_deadline(text: str) -> float:
    """Seconds since the epoch of the next HH:MM (UTC), or of an ISO date and time (UTC unless it says)."""
    if len(text) == 5 and text[2] == ":":
        now = datetime.now(UTC)
        moment = now.replace(hour=int(text[:2]), minute=int(text[3:]), second=0, microsecond=0)
        return (moment if moment > now else moment + timedelta(days=1)).timestamp()
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class Training:
    """Warm-up, constant rate, then a decay to zero that ends at the token budget or at the deadline,
    whichever the measured speed reaches first. The last tokens are trained in longer windows."""

    def __init__(
        self, recipe: Recipe, shape: ModelShape, work_dir: Path, threads: int, start_from: Path | None = None
    ) -> None:
        if start_from is not None and not (work_dir / "tokenizer.json").exists():
            # The weights are worth nothing under other token ids.
            replace_file(work_dir / "tokenizer.json", partial(shutil.copyfile, start_from / "tokenizer.json"))
        self.recipe, self.shape, self.work_dir, self.threads = recipe, shape, work_dir, threads
        self.checkpoint = work_dir / "checkpoint.pt"
        self.corpus = prepare_corpus(work_dir, shape.vocab_size)
        self.model = OlmoeModel(shape)
        self.model.initialise(recipe.seed)
        if start_from is not None:
            self.model.load_state_dict(load_exported(start_from).state_dict())
        self.optimiser = Muon(self.model, recipe.weight_decay)
        self.progress = Progress()
        self.pool = ThreadPoolExecutor(threads)
        self.samplers = {
            length: WindowSampler(self.corpus.train, length, recipe.seed)
            for length in (recipe.short_length, recipe.long_length)
        }
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.progress = Progress(**state["progress"])

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": asdict(self.progress),
            "shape": asdict(self.shape),
        }
        replace_file(self.checkpoint, lambda temporary: torch.save(state, temporary))

    def _gradients(self, windows: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        loss, balance = next_token_loss(self.model, windows)
        total = loss + self.shape.router_aux_loss_coef * balance
        return loss.detach(), torch.autograd.grad(total, list(self.model.parameters()))

    def step(self, length: int, rate: float) -> float:
        """One update; returns the batch's mean loss."""
        count = self.recipe.batch_tokens // length
        first = self.progress.windows.get(length, 0)
        batch = self.samplers[length].batch(first, count)
        self.progress.windows[length] = first + count
        parts = list(self.pool.map(self._gradients, batch.chunk(self.threads)))
        for parameter, *gradients in zip(self.model.parameters(), *(part[1] for part in parts), strict=True):
            for gradient in gradients[1:]:
                gradients[0].add_(gradient)
            parameter.grad = gradients[0].div_(len(parts))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        self.optimiser.step(rate, self.pool)
        self.progress.steps += 1
        self.progress.tokens += count * length
        return sum(float(part[0]) for part in parts) / len(parts)

    def heldout_sample_loss(self, windows: int = 96) -> float:
        """Loss over windows spread evenly over the held-out stream: cheap enough to follow a run with."""
        length = self.recipe.short_length
        starts = torch.linspace(0, len(self.corpus.heldout) - length - 1, windows).long().tolist()
        batch = torch.stack([self.corpus.heldout[start : start + length + 1].long() for start in starts])

        @torch.no_grad()
        def loss_of(part: Tensor) -> float:
            return float(next_token_loss(self.model, part)[0])

        losses = list(self.pool.map(loss_of, batch.split(8)))
        return sum(losses) / len(losses)

    def run(self, budget: int, deadline: float) -> None:
        recipe, progress = self.recipe, self.progress
        began, seconds_before = time.time(), progress.seconds
        speed, last_save = 0.0, time.time()
        recent: list[float] = []
        next_evaluation = (progress.tokens // recipe.evaluate_every_tokens + 1) * recipe.evaluate_every_tokens
        while True:
            now = time.time()
            remaining = float(budget - progress.tokens)
            if speed:
                remaining = min(remaining, speed * (deadline - now))
            finished = remaining < recipe.batch_tokens or now >= deadline
            if progress.tokens >= next_evaluation or finished:
                self._record(recent, speed)
                recent = []
                next_evaluation += recipe.evaluate_every_tokens
            if finished or now - last_save > recipe.checkpoint_every_seconds:
                progress.seconds = seconds_before + time.time() - began
                self.save()
                last_save = time.time()
            if finished:
                return
            whole = progress.tokens + remaining
            if progress.decay_began_at is None and remaining <= recipe.decay_fraction * whole and speed:
                progress.decay_began_at = progress.tokens
            if progress.decay_began_at is not None:
                # Straight to zero at the end as it is foreseen now; a change of speed only bends the line.
                progress.decay *= max(0.0, 1 - recipe.batch_tokens / remaining)
            length = recipe.long_length if remaining <= recipe.long_fraction * whole else recipe.short_length
            warmup = min(1.0, (progress.tokens + recipe.batch_tokens) / recipe.warmup_tokens)
            started = time.time()
            recent.append(self.step(length, recipe.learning_rate * warmup * progress.decay))
            measured = recipe.batch_tokens / (time.time() - started)
            speed = 0.99 * speed + 0.01 * measured if len(recent) > 1 or speed else measured
            progress.seconds = seconds_before + time.time() - began

    def _record(self, recent: list[float], speed: float) -> None:
        point = {
            "tokens": self.progress.tokens,
            "train_loss": sum(recent) / max(1, len(recent)),
            "heldout_loss": self.heldout_sample_loss(),
            "rate": self.recipe.learning_rate * self.progress.decay,
            "tokens_per_second": speed,
            "seconds": self.progress.seconds,
        }
        self.progress.curve.append(point)
        print(json.dumps({key: round(value, 5) for key, value in point.items()}), flush=True)


# --- Export ---------------------------------------------------------------------------------------


def huggingface_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def huggingface_tensors(model: OlmoeModel) -> dict[str, Tensor]:
    """bfloat16 tensors under the names of the published OLMoE checkpoints, one per expert matrix."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("mlp.gate_up"):
            gate, up = value.chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up}
        elif name.endswith("mlp.down"):
            parts = {"down_proj": value}
        else:
            tensors[huggingface_name(name)] = value.bfloat16().contiguous()
            continue
        prefix = "model." + name.rpartition(".")[0]
        for part, stacked in parts.items():
            for expert, matrix in enumerate(stacked):
                tensors[f"{prefix}.experts.{expert}.{part}.weight"] = matrix.bfloat16().contiguous()
    return tensors


def load_exported(folder: Path) -> OlmoeModel:
    """The exported bfloat16 weights, in float32, in this script's model."""
    config = json.loads((folder / "config.json").read_text())
    shape = ModelShape(**{field.name: config[field.name] for field in fields(ModelShape)})
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}

    def stacked(prefix: str, part: str) -> Tensor:
        names = [f"{prefix}.experts.{expert}.{part}.weight" for expert in range(shape.num_experts)]
        return torch.stack([tensors[name] for name in names])

    model = OlmoeModel(shape)
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        prefix = "model." + name.rpartition(".")[0]
        if name.endswith("mlp.gate_up"):
            state[name] = torch.cat((stacked(prefix, "gate_proj"), stacked(prefix, "up_proj")), dim=1)
        elif name.endswith("mlp.down"):
            state[name] = stacked(prefix, "down_proj")
        else:
            state[name] = tensors[huggingface_name(name)]
    model.load_state_dict(state)
    return model


def export(work_dir: Path, out: Path) -> None:
    """Write the last checkpoint of work_dir as a folder that `transformers` and hotset load."""
    state = torch.load(work_dir / "checkpoint.pt")
    model = OlmoeModel(ModelShape(**state["shape"]))
    model.load_state_dict(state["model"])
    tokenizer = Tokenizer.from_file(str(work_dir / "tokenizer.json"))
    end = end_of_text_id(tokenizer)
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **state["shape"],
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": state["shape"]["max_position_embeddings"],
    }
    generation_config = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        replace_file(out / name, partial(Path.write_text, data=json.dumps(content, indent=2) + "\n"))
    replace_file(out / "tokenizer.json", lambda temporary: tokenizer.save(str(temporary)))
    replace_file(
        out / "model.safetensors",
        lambda temporary: save_file(huggingface_tensors(model), temporary, metadata={"format": "pt"}),
    )


@torch.no_grad()
def evaluate(folder: Path, window: int) -> dict[str, float]:
    """Loss of an exported folder over the whole held-out files, in windows that do not overlap: each
    predicts `window` tokens, the first of them from one token of context."""
    model = load_exported(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = list(read_texts(heldout_files()))
    stream = encode_documents(tokenizer, texts).long()
    total, predicted = 0.0, 0
    for start in range(0, len(stream) - 1, window):
        part = stream[start : start + window + 1].unsqueeze(0)
        count = part.shape[1] - 1
        total += float(next_token_loss(model, part)[0]) * count
        predicted += count
    loss = total / predicted
    return {
        "files": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": predicted,
        "window": window,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": total / math.log(2) / sum(len(text.encode()) for text in texts),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train, resume, export or evaluate the small OLMoE model.")
    parser.add_argument("--work-dir", type=Path, default=Path.home() / ".cache" / "hotset" / "train")
    parser.add_argument("--out", type=Path, default=TRAINED_DIR, help="folder of the exported model")
    parser.add_argument("--tokens", type=float, default=40e6, help="token budget of the whole run")
    parser.add_argument("--deadline", default="9999-01-01", help="HH:MM (UTC) or ISO time of the end, if earlier")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of the weights and of the order of windows")
    parser.add_argument("--start-from", type=Path, help="begin with the weights and tokenizer of an exported folder")
    parser.add_argument("--window", type=int, default=1024, help="context of --evaluate")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--export-only", action="store_true", help="write the last checkpoint to --out")
    only.add_argument("--evaluate", action="store_true", help="loss of --out over the held-out files")
    only.add_argument("--list-heldout", action="store_true", help="print the held-out files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.list_heldout:
        print(*heldout_files(), sep="\n")
        return 0
    if options.evaluate:
        torch.set_num_threads(options.threads)
        print(json.dumps(evaluate(options.out, options.window), indent=2))
        return 0
    if options.export_only:
        if not (options.work_dir / "checkpoint.pt").exists():
            print(f"no checkpoint.pt in {options.work_dir}: name the run's --work-dir", file=sys.stderr)
            return 1
        export(options.work_dir, options.out)
        return 0
    options.work_dir.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(learning_rate=options.learning_rate, seed=options.seed)
    training = Training(recipe, ModelShape(), options.work_dir, options.threads, options.start_from)
    training.run(int(options.tokens), parse_deadline(options.deadline))
    export(options.work_dir, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
