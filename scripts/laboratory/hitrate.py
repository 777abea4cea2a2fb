"""Hit rates of eviction policies on recorded expert demands, or of a model that decodes text (quality.py).

    scripts/hitrate --model FOLDER ...
    scripts/hitrate --trace FILE [--budgets 12.5,25,37.5,50] [--policies lru,affinity,td,min] [--batch 1,4,8]

Replay is event-atomic: a layer's whole set is looked up against one snapshot of the cache. An expert that several
tokens of a step want counts once. Caches start empty, and policies learn on the way, from zero.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from laboratory import quality
from laboratory.arguments import (
    Parser,
    image_file,
    model_path,
    numbers,
    slots_per_layer,
    trace_path,
    whole,
    written_file,
)
from laboratory.traces import FORMAT, Trace, load_trace
from rich.console import Console
from rich.table import Table
from stress_tests.stop_signals import stop_signals

from hotset.runtime.errors import HotsetError
from hotset.runtime.eviction import check_pool, parse_eviction
from hotset.workers.eviction.replay import MIN, replay

POLICIES = "lru,lfu,adaptive,affinity@always,affinity@bypass,td,min"
BUDGETS = "12.5,25,37.5,50"


class Row(msgspec.Struct, frozen=True):
    """One replay."""

    batch: int
    policy: str
    budget: float  # percent of the experts
    slots: int  # per layer
    hits: int
    misses: int
    hit_rate: float  # percent


def measure(trace: Trace, policies: list[str], budgets: list[float], batches: list[int], *, shared: bool) -> list[Row]:
    """Every combination, with slots of each layer's own or in a shared pool."""
    rows: list[Row] = []
    with ThreadPoolExecutor(2) as threads:  # replay lets go of the interpreter's lock
        for batch in batches:
            records = trace.records(batch)

            def one(policy: str, budget: float, batch: int = batch, records: Any = records) -> Row:
                slots = slots_per_layer(budget, trace.num_experts)
                result = replay(
                    records,
                    policy,
                    num_layers=trace.num_layers,
                    num_experts=trace.num_experts,
                    slots=slots * trace.num_layers if shared else slots,
                    num_streams=batch,
                    shared=shared,
                )
                return Row(batch, policy, budget, slots, result.hits, result.misses, round(100 * result.hit_rate, 2))

            rows += threads.map(lambda pair: one(*pair), [(p, b) for p in policies for b in budgets])
    return rows


def tables(rows: list[Row]) -> Iterator[Table]:
    for batch in dict.fromkeys(row.batch for row in rows):
        table = Table(title=f"hit rate in %, batch {batch}", title_justify="left", box=None)
        own = [row for row in rows if row.batch == batch]
        budgets = list(dict.fromkeys(row.budget for row in own))
        table.add_column("policy")
        for budget in budgets:
            table.add_column(f"{budget:g} %", justify="right")
        for policy in dict.fromkeys(row.policy for row in own):
            found = {row.budget: f"{row.hit_rate:.2f}" for row in own if row.policy == policy}
            table.add_row(policy, *(found[budget] for budget in budgets))
        yield table


def plot(rows: list[Row], name: str, path: Path) -> None:
    """Hit rate against budget, one panel per batch size."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: scripts/setup plots") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = list(dict.fromkeys(row.batch for row in rows))
    figure, panels = plt.subplots(1, len(batches), figsize=(1.2 + 3.6 * len(batches), 4.2), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        for policy in dict.fromkeys(row.policy for row in rows):
            own = sorted((row.budget, row.hit_rate) for row in rows if (row.batch, row.policy) == (batch, policy))
            ceiling = policy == MIN
            panel.plot(
                *zip(*own, strict=True),
                label="Belady's MIN" if ceiling else policy,
                color="black" if ceiling else None,
                linestyle="--" if ceiling else "-",
                linewidth=2.2 if policy == "td" else 1.3,
                marker="o",
                markersize=3.5,
            )
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("experts in memory, %")
        panel.set_xticks(sorted({row.budget for row in rows}))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("hit rate, %")
    panels[0][-1].legend(fontsize=8, loc="lower right")
    figure.suptitle(name, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


TRACE_ONLY = {"experts": None}
MODEL_ONLY = {
    "routing": quality.ROUTING,
    "strengths": [],
    "tokens": 73_728,
    "texts": 12,
    "window": 1024,
    "warm_up": 2,
    "results": None,
    "threads": 2,
}
"""Options of one mode and their defaults; the other refuses them."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="scripts/hitrate",
        description=(__doc__ or "").split("\n")[0],
        epilog=FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the epilog is a list
        argument_default=argparse.SUPPRESS,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=trace_path, help="replay this one; what a trace is, is said below")
    source.add_argument("--model", type=model_path, help="folder of a checkpoint: decode held-out text with it")
    parser.add_argument("--budgets", default=BUDGETS, help=f"percent of the experts that are resident ({BUDGETS})")
    parser.add_argument(
        "--policies", help=f"what serving takes, and, with a trace, min ({POLICIES}; {quality.POLICIES})"
    )
    parser.add_argument("--batch", default="1", help="tokens per step (1)")
    parser.add_argument(
        "--pool", choices=("layer", "shared"), default="layer", help="slots of each layer's own, or one pool"
    )
    parser.add_argument("--json", action="store_true", default=False, help="one JSON object")
    parser.add_argument("--plot", type=image_file, default=None, help="draw it into this .png")
    trace = parser.add_argument_group("with --trace")
    trace.add_argument("--experts", type=int, help="per layer, if the trace does not say (the largest id + 1)")
    model = parser.add_argument_group("with --model")
    model.add_argument("--routing", help=f"policies ({quality.ROUTING})")
    model.add_argument("--strengths", action="append", metavar="ROUTING=S,S,...", help="instead of the usual ones")
    model.add_argument("--tokens", type=whole(1), help="at least so many are counted (73728)")
    model.add_argument("--texts", type=whole(1), help="decoded side by side, a multiple of the batch (12)")
    model.add_argument("--window", type=whole(1), help="tokens of a context, at most as many as the model has (1024)")
    model.add_argument("--warm-up", type=whole(0), help="windows of each text that are not counted (2)")
    model.add_argument("--results", type=written_file, help="keep what was measured in this file, and go on from it")
    model.add_argument("--threads", type=whole(1, 256), help="(2)")
    options = parser.parse_args(arguments)
    mode, other = (MODEL_ONLY, TRACE_ONLY) if "model" in options else (TRACE_ONLY, MODEL_ONLY)
    for name in other:
        if name in options:
            parser.error(f"--{name.replace('_', '-')} is for --{'trace' if 'model' in options else 'model'}")
    for name, value in mode.items():
        vars(options).setdefault(name, value)
    vars(options).setdefault("policies", quality.POLICIES if "model" in options else POLICIES)
    return options


def run(options: argparse.Namespace) -> None:
    if "model" in options:
        quality.run(options)
    else:
        run_trace(options)


def run_trace(options: argparse.Namespace) -> None:
    budgets = numbers("--budgets", options.budgets, float, least=0)
    batches = numbers("--batch", options.batch, int, least=1)
    policies = options.policies.split(",")
    for policy in policies:
        if policy != MIN:
            parse_eviction(policy)
    trace = load_trace(options.trace, num_experts=options.experts)
    shared = options.pool == "shared"
    if shared and trace.ids is not None:
        cycle = trace.num_layers * trace.ids.shape[2]
        for policy in policies:
            for budget in budgets:
                if policy != MIN:
                    check_pool(policy, slots=slots_per_layer(budget, trace.num_experts) * trace.num_layers, cycle=cycle)
    began = time.monotonic()
    rows = measure(trace, policies, budgets, batches, shared=shared)
    seconds = time.monotonic() - began
    if options.plot:
        plot(rows, trace.name, options.plot)
    if options.json:
        report = {"trace": trace.name, "pool": options.pool, "seconds": round(seconds, 2), "rows": rows}
        print(json.dumps(msgspec.to_builtins(report)))
        return
    console = Console(highlight=False)
    for table in tables(rows):
        console.print(table)
        console.print()
    console.print(f"{len(rows)} replays of {trace.name} in {seconds:.1f} s")


def main() -> int:
    options = parse_arguments(sys.argv[1:])
    try:
        stop_signals.install()
        run(options)
    except KeyboardInterrupt:
        print("hitrate: stopped", file=sys.stderr)
        return 130
    except (HotsetError, ValueError, OSError) as error:
        print(f"hitrate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
