"""What a preference for resident experts saves and costs on a real model, decoding held-out text step by step.

    scripts/hitrate --model PATH [--budgets 12.5,25,37.5,50] [--policies affinity,td] [--routing off,bonus,resnorm] ...

Texts are held-out files of the standard library (training_corpus.py), cut into contexts of the model's length. Every
setting decodes the same tokens as exact routing does (workers/simulation.py), so that all differences are paired;
intervals are of 95 %, from resampling whole windows. Each text begins with windows that are not counted: there the
cache fills and its policy learns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from laboratory.arguments import numbers, slots_per_layer
from laboratory.quality_results import Line, Text, measure
from rich.console import Console
from rich.table import Table
from training_corpus import heldout_stream

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.model_cache import model_identity
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.workers.compute import _kernels
from hotset.workers.simulation import Setting, windows_of

Doubles = npt.NDArray[np.float64]

STRENGTHS: dict[str, tuple[float, ...]] = {
    "bonus": (0.1, 0.2, 0.4, 0.6),
    "range": (0.025, 0.05, 0.1, 0.15),
    "mass": (0.004, 0.01, 0.02, 0.04),
    "resnorm": (0.04, 0.08, 0.12, 0.16, 0.2, 0.26, 0.32, 0.4),
    "substitute": (0.03, 0.045, 0.06, 0.075, 0.09, 0.11),
}
POLICIES = "affinity,td"
ROUTING = ",".join(("off", *STRENGTHS))
COLORS = {"bonus": "#888888", "range": "#1f77b4", "mass": "#2ca02c", "resnorm": "#d62728", "substitute": "#9467bd"}
ALLOWED = (0.25, 0.5, 1.0)
"""Percent of perplexity that a preference may cost."""
RESAMPLES = 2000


class Estimate(msgspec.Struct, frozen=True):
    """With its interval of 95 %."""

    value: float
    low: float
    high: float

    def text(self, digits: int, sign: str = "") -> str:
        return f"{self.value:{sign}.{digits}f} ± {(self.high - self.low) / 2:.{digits}f}"


class Row(msgspec.Struct, frozen=True):
    """One setting. Percent, but for the divergence: mean KL(exact || this) per token, in nats."""

    budget: float
    batch: int
    eviction: str
    routing: str
    strength: float
    hit_rate: Estimate
    perplexity_change: Estimate
    divergence: Estimate


class Reached(msgspec.Struct, frozen=True):
    """The hit rate at the largest strength that costs at most `allowed` percent of perplexity, between the strengths
    that were measured by interpolation; `strength` is None where even the largest costs less."""

    budget: float
    batch: int
    eviction: str
    routing: str
    allowed: float
    strength: float | None
    hit_rate: Estimate


class Resamples:
    """Sums over the windows of a text, and over as many windows drawn with replacement, [1 + RESAMPLES]."""

    def __init__(self, windows: int) -> None:
        random = np.random.default_rng(0)
        drawn = random.multinomial(windows, np.full(windows, 1 / windows), RESAMPLES)
        self._counts = np.vstack([np.ones(windows), drawn])

    def __call__(self, values: Doubles) -> Doubles:
        return self._counts @ values


def estimate(values: Doubles) -> Estimate:
    """Of resampled values, the first being the one of the text itself."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return Estimate(float(values[0]), float(low), float(high))


class Curve:
    """Lines of one kind of instance, strengths ascending, the first being exact routing."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = sorted(lines, key=lambda line: line.setting.strength)
        exact = self.lines[0].of_instances("loss")
        resamples = Resamples(len(exact))
        tokens = resamples(np.full(len(exact), float(lines[0].text.tokens * lines[0].setting.batch)))
        hits = np.array([resamples(line.of_instances("hits")) for line in self.lines])
        misses = np.array([resamples(line.of_instances("misses")) for line in self.lines])
        losses = np.array([resamples(line.of_instances("loss") - exact) for line in self.lines])
        self.hit_rate = 100 * hits / (hits + misses)
        self.change = 100 * np.expm1(losses / tokens)
        self.divergence = np.array([resamples(line.of_instances("divergence")) for line in self.lines]) / tokens

    def rows(self, budget: float) -> Iterator[Row]:
        for index, line in enumerate(self.lines):
            of = line.setting
            yield Row(
                budget,
                of.batch,
                of.eviction,
                of.routing,
                of.strength,
                estimate(self.hit_rate[index]),
                estimate(self.change[index]),
                estimate(self.divergence[index]),
            )

    def reached(self, budget: float, allowed: float) -> Reached:
        strengths = np.array([line.setting.strength for line in self.lines])
        found = [_within(strengths, *columns, allowed) for columns in zip(self.change.T, self.hit_rate.T, strict=True)]
        of = self.lines[-1].setting
        strength = found[0][0]
        return Reached(
            budget,
            of.batch,
            of.eviction,
            of.routing,
            allowed,
            None if math.isinf(strength) else float(strength),
            estimate(np.array([hit_rate for _, hit_rate in found])),
        )


def _within(strengths: Doubles, change: Doubles, hit_rate: Doubles, allowed: float) -> tuple[float, float]:
    """(strength, hit rate) where the cost first exceeds what is allowed; (inf, ...) if it does not."""
    over = np.flatnonzero(change > allowed)
    if not len(over):
        return math.inf, float(hit_rate[-1])
    at = int(over[0])
    share = (allowed - change[at - 1]) / (change[at] - change[at - 1])
    return (
        float(strengths[at - 1] + share * (strengths[at] - strengths[at - 1])),
        float(hit_rate[at - 1] + share * (hit_rate[at] - hit_rate[at - 1])),
    )


def curves(lines: Sequence[Line]) -> dict[tuple[int, int, str, str], Curve]:
    """By slots, batch, eviction and routing; those of routing "off" are each curve's first line."""
    exact = {(of.slots, of.batch, of.eviction): line for line in lines if (of := line.setting).routing == "off"}
    groups: dict[tuple[int, int, str, str], list[Line]] = {}
    for line in lines:
        of = line.setting
        if of.routing != "off":
            first = exact[of.slots, of.batch, of.eviction]
            groups.setdefault((of.slots, of.batch, of.eviction, of.routing), [first]).append(line)
        else:
            groups.setdefault((of.slots, of.batch, of.eviction, "off"), [line])
    return {key: Curve(group) for key, group in groups.items()}


# ---- output


def tables(rows: Sequence[Row], reached: Sequence[Reached]) -> Iterator[Table]:
    kinds = dict.fromkeys((row.budget, row.batch) for row in rows)
    for budget, batch in kinds:
        title = f"{budget:g} % of the experts in memory, batch {batch}"
        table = Table(title=title, title_justify="left", box=None)
        for name in ("eviction", "routing", "strength", "hit rate, %", "perplexity, %", "KL, millinats"):
            table.add_column(name, justify="left" if name in ("eviction", "routing") else "right")
        for row in dict.fromkeys(row for row in rows if (row.budget, row.batch) == (budget, batch)):
            kl = row.divergence
            exact = row.routing == "off"
            table.add_row(
                row.eviction,
                row.routing,
                f"{row.strength:g}" if row.strength else "",
                row.hit_rate.text(2),
                "" if exact else row.perplexity_change.text(3, "+"),
                "" if exact else Estimate(1e3 * kl.value, 1e3 * kl.low, 1e3 * kl.high).text(2),
            )
        yield table
        table = Table(title=f"hit rate within a budget of perplexity, {title}", title_justify="left", box=None)
        table.add_column("eviction")
        table.add_column("routing")
        for allowed in ALLOWED:
            table.add_column(f"+{allowed:g} %", justify="right")
        own = [one for one in reached if (one.budget, one.batch) == (budget, batch)]
        for eviction, routing in dict.fromkeys((one.eviction, one.routing) for one in own):
            cells = [one for one in own if (one.eviction, one.routing) == (eviction, routing)]
            table.add_row(eviction, routing, *(_reached_text(one) for one in cells))
        yield table


def _reached_text(one: Reached) -> str:
    if one.strength is None:
        return f"above {one.hit_rate.value:.2f}"
    return f"{one.hit_rate.text(2)} at {one.strength:.3f}"


def plot(rows: Sequence[Row], name: str, path: Path) -> None:
    """Misses against the perplexity that avoiding them costs, one panel per budget and batch."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: scripts/setup plots") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((row.budget, row.batch) for row in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(1.2 + 4.2 * len(kinds), 4.4), squeeze=False)
    names = list(dict.fromkeys((row.routing, row.eviction) for row in rows if row.routing != "off"))
    evictions = list(dict.fromkeys(eviction for _, eviction in names))
    dashes = dict(zip(evictions, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    for panel, (budget, batch) in zip(panels[0], kinds, strict=True):
        own = [row for row in rows if (row.budget, row.batch) == (budget, batch)]
        for routing, eviction in names:
            points = [row for row in own if row.eviction == eviction and row.routing in (routing, "off")]
            points = sorted(dict.fromkeys(points), key=lambda row: row.strength)
            if len(points) < 2:
                continue
            panel.errorbar(
                [row.perplexity_change.value for row in points],
                [100 - row.hit_rate.value for row in points],
                xerr=np.array([
                    (row.perplexity_change.value - row.perplexity_change.low,
                     row.perplexity_change.high - row.perplexity_change.value) for row in points
                ]).T,
                label=f"{routing}, {eviction}",
                color=COLORS[routing],
                linestyle=dashes[eviction],
                marker="o",
                markersize=3.5,
                elinewidth=0.6,
            )  # fmt: skip
        panel.set_xlim(-0.15, 1.6)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{budget:g} % in memory, batch {batch}", fontsize=10)
        panel.set_xlabel("perplexity, % above exact routing")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("miss rate, %")
    panels[0][0].legend(fontsize=8, loc="lower left")
    figure.suptitle(name, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ---- the command


def settings_of(options: argparse.Namespace, num_experts: int) -> dict[Setting, float]:
    """All combinations, each with its budget in percent."""
    given = dict(strengths_of(text) for text in options.strengths)
    if unused := given.keys() - {*options.routing.split(",")}:
        raise ValueError(f"--strengths are given for {min(unused)}, expected policies of --routing {options.routing}")
    strengths = STRENGTHS | given
    found: dict[Setting, float] = {}
    for batch in numbers("--batch", options.batch, int, least=1):
        for budget, eviction in itertools.product(
            numbers("--budgets", options.budgets, float, least=0), options.policies.split(",")
        ):
            slots = slots_per_layer(budget, num_experts)
            shared = options.pool == "shared"
            found[Setting("off", 0.0, eviction, slots, batch, shared)] = budget
            for routing in options.routing.split(","):
                if routing != "off" and routing not in STRENGTHS:
                    raise ValueError(f"--routing has {routing!r}, expected some of {ROUTING}")
                for strength in strengths.get(routing, ()):
                    found[Setting(routing, strength, eviction, slots, batch, shared)] = budget  # type: ignore[arg-type]
    return found


def strengths_of(text: str) -> tuple[str, tuple[float, ...]]:
    routing, equals, listed = text.partition("=")
    if routing not in STRENGTHS or not equals:
        raise ValueError(f"--strengths is {text!r}, expected a routing policy and strengths, as resnorm=0.1,0.2")
    return routing, tuple(numbers("--strengths", listed, float, least=0))


def held_out(model: Path, *, tokens: int, texts: int, window: int, warm_up: int) -> tuple[Text, npt.NDArray[np.int32]]:
    """What is decoded, and its tokens as `windows_of` gives them. Raises `ValueError` if there is not as much text."""
    config = ModelConfig.load(model)
    length = min(config.max_position_embeddings, window)
    windows = warm_up + -(-tokens // (texts * length))
    stream = heldout_stream(Tokenizer(model).encode, config.eos_token_ids[0])
    text = Text(model_identity(model), texts, windows, length, warm_up)
    return text, windows_of(stream, texts=texts, windows=windows, length=length)


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    settings = settings_of(options, ModelConfig.load(options.model).num_experts)
    text, tokens = held_out(
        options.model, tokens=options.tokens, texts=options.texts, window=options.window, warm_up=options.warm_up
    )
    _kernels.set_num_threads(options.threads)
    console = Console(highlight=False)
    progress = Console(file=sys.stderr, highlight=False)
    with progress.status(f"decoding {tokens[:, :, 1:].size:,} tokens under {len(settings)} settings") as status:
        found = measure(
            options.model,
            text,
            tokens,
            list(settings),
            options.results,
            lambda done, of: status.update(f"{done} of {of} settings"),
        )
    drawn = curves(list(found.values()))
    rows = [row for (slots, *_), curve in drawn.items() for row in curve.rows(_budget(settings, slots))]
    reached = [
        curve.reached(_budget(settings, slots), allowed)
        for (slots, _, _, routing), curve in drawn.items()
        if routing != "off"
        for allowed in ALLOWED
    ]
    rows = list(dict.fromkeys(rows))
    name = f"{options.model.name}: {text.counted_tokens:,} held-out tokens, step by step"
    if options.plot:
        plot(rows, name, options.plot)
    if options.json:
        report = {"name": name, "pool": options.pool, "rows": rows, "reached": reached}
        print(json.dumps(msgspec.to_builtins(report)))
        return
    for table in tables(rows, reached):
        console.print(table)
        console.print()
    console.print(f"{name}, in {time.monotonic() - began:.0f} s")


def _budget(settings: dict[Setting, float], slots: int) -> float:
    return next(budget for setting, budget in settings.items() if setting.slots == slots)
