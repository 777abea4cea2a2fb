"""Whether hotset does what it must, measured on a real model: one row per gate, with what was measured and how.

    scripts/gates [--model PATH] [--budget 25%] [--paged-model PATH] [--paged-memory 1GiB] [--tokens 256]
                  [--rounds 5] [--paged-rounds 3] [--quality-tokens 24576] [--wanted NAME=NUMBER] [--json]

Exit status 1 when a gate fails, 2 when none fails but some could not be measured: those never count as passed.

Hits and perplexity come from decoding held-out text step by step (`scripts/hitrate --model`), with the instance's own
routing preference and exact routing beside it. Latency, memory and prefetch come from instances that serve it with that
budget of experts. Throughput and page-ins are those of a model that is far larger than the memory it gets, in a control
group that allows no more, so that a worker waits for experts more than half of the time: one of 6 GB, which is made in
build/ and removed, unless `--paged-model` names another. Each instance starts with the model's files dropped from the
page cache; what is compared with routing off runs in turn with it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec
from laboratory.arguments import Parser, model_path, numbers, slots_per_layer, whole
from laboratory.gate_measurements import (
    Found,
    measure_paging,
    measure_quality,
    measure_routing,
    measure_serving,
    measure_stress,
    serving_request,
    stress_request,
)
from laboratory.hitrate import MODEL_ONLY
from laboratory.quality import HeldOut, held_out
from rich.console import Console
from rich.table import Table
from serving import plan_of
from stress_tests.stop_signals import stop_signals

from hotset.runtime import HotsetError
from hotset.runtime.config import TRAINED_MODEL, BackendConfig, parse_nbytes
from hotset.runtime.model.config import ModelConfig


class Target(msgspec.Struct, frozen=True):
    """What a gate wants: `measured` at least, or at most, `wanted`."""

    name: str
    title: str
    sense: Literal[">=", "<="]
    wanted: float
    unit: str


TARGETS = (
    Target("hit-rate", "G1 hit rate", ">=", 70, "%"),
    Target("perplexity", "G2 perplexity, against exact routing", "<=", 1, "%"),
    Target("step-p99", "G3 p99 of a step, against routing off", "<=", 10, "%"),
    Target("memory", "G4 memory in a stress, of what was planned", "<=", 100, "%"),
    Target("throughput", "throughput, against routing off, where paging is the bottleneck", ">=", 1.5, "x"),
    Target("prefetch", "prefetch accuracy", ">=", 60, "%"),
    Target("page-in-p99", "p99 of a page-in", "<=", 50, "ms"),
    Target("route-mean", "routing, mean", "<=", 10, "us"),
    Target("route-p99", "routing, p99", "<=", 10, "us"),
    Target("routes", "routes per second of one process", ">=", 140_000, "/s"),
)


class Gate(msgspec.Struct, frozen=True):
    """One row. `measured` and `passed` are None where it could not be measured; `how` says why."""

    name: str
    title: str
    measured: float | None
    sense: str
    wanted: float
    unit: str
    passed: bool | None
    how: str


def judge(target: Target, found: Found) -> Gate:
    passed = None
    if found.measured is not None:
        passed = found.measured >= target.wanted if target.sense == ">=" else found.measured <= target.wanted
    return Gate(target.name, target.title, found.measured, target.sense, target.wanted, target.unit, passed, found.how)


def exit_status(gates: Sequence[Gate]) -> int:
    if any(gate.passed is False for gate in gates):
        return 1
    return 2 if any(gate.passed is None for gate in gates) else 0


# ---- the report


def check(options: argparse.Namespace) -> HeldOut:
    """The text that is to be decoded. Raises `ValueError` or `HotsetError` for what cannot be measured as it is asked
    for, before an hour of it."""
    targets(options.wanted)
    [budget] = numbers("--budget", options.budget.removesuffix("%"), float, least=0)
    slots_per_layer(budget, ModelConfig.load(options.model).num_experts)
    plan_of(stress_request(options))
    if options.paged_model is not None:
        plan_of(serving_request(options, options.paged_model, {"memory": options.paged_memory}, limited=True))
    return held_out(
        options.model,
        tokens=options.quality_tokens,
        texts=options.texts,
        window=options.window,
        warm_up=MODEL_ONLY["warm_up"],
    )


def run(options: argparse.Namespace, held: HeldOut) -> list[Gate]:
    config = BackendConfig(model=str(options.model))
    found: dict[str, Found] = {}
    found |= measure_routing(ModelConfig.load(options.model))
    found |= measure_quality(options, config, held)
    found |= measure_serving(options)
    found |= measure_paging(options)
    found |= measure_stress(options)
    return [judge(target, found[target.name]) for target in targets(options.wanted)]


def targets(changes: Sequence[str]) -> list[Target]:
    """`changes`: NAME=NUMBER."""
    numbers: dict[str, float] = {}
    for change in changes:
        name, _, number = change.partition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            numbers[name] = math.nan
        if math.isnan(numbers[name]):
            raise ValueError(f"--wanted is {change!r}, expected NAME=NUMBER")
        if name not in {target.name for target in TARGETS}:
            raise ValueError(f"there is no gate {name!r}, expected one of {', '.join(t.name for t in TARGETS)}")
    return [msgspec.structs.replace(t, wanted=numbers.get(t.name, t.wanted)) for t in TARGETS]


def print_report(gates: Sequence[Gate]) -> None:
    table = Table(box=None, show_header=False)
    console = Console(highlight=False)
    for gate in gates:
        verdict = {True: "[green]passed[/]", False: "[red]FAILED[/]", None: "[yellow]not measured[/]"}[gate.passed]
        measured = "-" if gate.measured is None else f"{gate.measured:,.4g}"
        table.add_row(verdict, gate.title, f"{measured} {gate.unit}", f"{gate.sense} {gate.wanted:,.6g} {gate.unit}")
    console.print(table)
    for gate in gates:
        console.print(f"[bold]{gate.name}[/]: {gate.how}", soft_wrap=True)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts/gates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", type=model_path, default=TRAINED_MODEL, help="folder of a checkpoint (the shipped one)"
    )
    parser.add_argument("--budget", default="25%", help="of the experts, resident (25%%)")
    parser.add_argument("--paged-model", type=model_path, help="for throughput and page-ins (one of 6 GB is made)")
    parser.add_argument("--paged-memory", default="1GiB", help="that it gets for everything (1GiB)")
    parser.add_argument("--tokens", type=whole(1), default=256, help="generated by each serving run (256)")
    parser.add_argument("--rounds", type=whole(1), default=5, help="serving runs of each kind (5)")
    parser.add_argument(
        "--paged-rounds", type=whole(1), default=3, help="those of the paged model, two minutes each (3)"
    )
    parser.add_argument(
        "--quality-tokens", type=whole(1), default=24_576, help="decoded for hits and perplexity (24576)"
    )
    parser.add_argument("--texts", type=whole(1), default=12, help="decoded side by side (12)")
    parser.add_argument("--window", type=whole(1), default=1024, help="tokens of a context (1024)")
    parser.add_argument("--wanted", action="append", default=[], metavar="NAME=NUMBER", help="another threshold")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    if not options.budget.endswith("%"):
        parser.error(f"the budget is {options.budget!r}, expected a percentage of the experts such as 25%")
    try:
        parse_nbytes(options.paged_memory, "--paged-memory")
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    try:
        stop_signals.install()
        gates = run(options, check(options))
    except KeyboardInterrupt:
        print("gates: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, HotsetError) as error:
        print(f"gates: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"model": options.model.name, "gates": msgspec.to_builtins(gates)}))
    else:
        print_report(gates)
    return exit_status(gates)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
