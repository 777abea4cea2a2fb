"""One training run: its recipe, how far it has come, its steps and its checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from training.corpus import WindowSampler, prepare_corpus
from training.exported_model import load_exported
from training.model import ModelShape, OlmoeModel, next_token_loss
from training.muon import Muon
from training.replaced_file import replace_file


@dataclass(frozen=True)
class Recipe:
    """How a run trains. Lengths, budgets and the batch count tokens; fractions are of the whole run's tokens.

    Attributes:
        learning_rate: the highest, after `warmup_tokens`; for the last `decay_fraction` it falls to zero.
        long_fraction: at the end, in windows of `long_length` and no more of `short_length`.
        gradient_clip: the largest norm of all gradients together.
        seed: of the weights and of the order of windows.
    """

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
        """Trains until `budget` tokens, those before a kill included, or `deadline`, in seconds since the epoch."""
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
