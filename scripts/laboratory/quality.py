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
import sys
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from laboratory.arguments import numbers, slots_per_layer
from laboratory.quality_curves import ALLOWED, Reached, Row, curves
from laboratory.quality_report import plot, tables
from laboratory.quality_results import Text, measure
from rich.console import Console
from training_corpus import heldout_stream

from hotset.runtime.eviction import parse_eviction
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.model_cache import model_identity
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.workers.compute import _kernels
from hotset.workers.simulated_instance import Setting
from hotset.workers.simulation import windows_of

STRENGTHS: dict[str, tuple[float, ...]] = {
    "bonus": (0.1, 0.2, 0.4, 0.6),
    "range": (0.025, 0.05, 0.1, 0.15),
    "mass": (0.004, 0.01, 0.02, 0.04),
    "resnorm": (0.04, 0.08, 0.12, 0.16, 0.2, 0.26, 0.32, 0.4),
    "substitute": (0.03, 0.045, 0.06, 0.075, 0.09, 0.11),
}
POLICIES = "affinity,td"
ROUTING = ",".join(("off", *STRENGTHS))


def settings_of(options: argparse.Namespace, num_experts: int) -> dict[Setting, float]:
    """All combinations, each with its budget in percent. Raises `ValueError` for any that cannot be."""
    given = dict(strengths_of(text) for text in options.strengths)
    if unused := given.keys() - {*options.routing.split(",")}:
        raise ValueError(f"--strengths are given for {min(unused)}, expected policies of --routing {options.routing}")
    strengths = STRENGTHS | given
    found: dict[Setting, float] = {}
    for policy in options.policies.split(","):
        parse_eviction(policy)
    for batch in numbers("--batch", options.batch, int, least=1):
        if options.texts % batch:
            raise ValueError(f"{options.texts} texts cannot be decoded {batch} at a time, expected a multiple")
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
    """Of an option as `resnorm=0.1,0.2`; raises `ValueError` for anything else."""
    routing, equals, listed = text.partition("=")
    if routing not in STRENGTHS or not equals:
        raise ValueError(f"--strengths is {text!r}, expected a routing policy and strengths, as resnorm=0.1,0.2")
    return routing, tuple(numbers("--strengths", listed, float, least=0))


class HeldOut(NamedTuple):
    """What is decoded, and its tokens as `windows_of` gives them."""

    text: Text
    tokens: npt.NDArray[np.int32]


def held_out(model: Path, *, tokens: int, texts: int, window: int, warm_up: int) -> HeldOut:
    """At least so many `tokens` that are counted. Raises `ValueError` if there is not as much text."""
    config = ModelConfig.load(model)
    length = min(config.max_position_embeddings, window)
    windows = warm_up + -(-tokens // (texts * length))
    stream = heldout_stream(Tokenizer(model).encode, config.eos_token_ids[0])
    text = Text(model_identity(model), texts, windows, length, warm_up)
    return HeldOut(text, windows_of(stream, texts=texts, windows=windows, length=length))


class Study(NamedTuple):
    rows: list[Row]
    reached: list[Reached]


def study(
    model: Path, held: HeldOut, settings: dict[Setting, float], results: Path | None = None, threads: int = 2
) -> Study:
    """Decodes the text under the settings, of which each has its budget in percent; says how far it is on the terminal.
    `results`: see `measure`."""
    _kernels.set_num_threads(threads)
    progress = Console(file=sys.stderr, highlight=False)
    with progress.status(f"decoding {held.tokens[:, :, 1:].size:,} tokens under {len(settings)} settings") as status:
        found = measure(
            model,
            *held,
            list(settings),
            results,
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
    return Study(list(dict.fromkeys(rows)), reached)


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    settings = settings_of(options, ModelConfig.load(options.model).num_experts)
    held = held_out(
        options.model, tokens=options.tokens, texts=options.texts, window=options.window, warm_up=options.warm_up
    )
    rows, reached = study(options.model, held, settings, options.results, options.threads)
    console = Console(highlight=False)
    name = f"{options.model.name}: {held.text.counted_tokens:,} held-out tokens, step by step"
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
