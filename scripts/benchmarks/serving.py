"""How fast a model is served with a part of its experts in memory, and what that reads from the disk.

usage: scripts/bench serving --model FOLDER [--budgets 12.5,25,50,100] [--memory 2GiB] [--routing off,range]
                             [--prefetch off,auto] [--rounds 1] [--json]

Each row is an instance of its own, with the model's files dropped from the page cache before it starts. `--memory`
adds a row with that budget for everything, in a control group that allows no byte more (where one can be made), the
page cache of its reads included. Several values of `--prefetch` run in turn, `--rounds` times, and are compared with
the first of them round by round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from laboratory.arguments import Parser, model_path, whole
from memory_cgroup import MemoryCgroup
from serving_run import Report, Request

from hotset.runtime.config import TRAINED_MODEL, BackendConfig, format_nbytes, parse_nbytes
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import InstancePlan, plan_instance

CHILD = Path(__file__).with_name("serving_run.py")


def drop_from_page_cache(model: Path) -> None:
    for file in model.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def measure(request: Request, limit: int | None = None) -> Report:
    drop_from_page_cache(Path(request.model))
    command = [sys.executable, "-P", str(CHILD), msgspec.json.encode(request).decode()]
    if limit is None:
        return _report(command)
    with MemoryCgroup(limit) as group:
        report = _report(group.command(*command))
        if group.oom_kills:
            raise SystemExit(f"{group.oom_kills} processes were killed for memory")
        return report


def _report(command: list[str]) -> Report:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a run ended with status {done.returncode}")
    return msgspec.json.decode(done.stdout, type=Report)


def plan_of(request: Request) -> InstancePlan:
    """Raises what `Backend` would: said before the first run of many."""
    model = ModelConfig.load(request.model)
    config = BackendConfig(model=request.model, **request.settings)
    return plan_instance(config, model, Checkpoint.open(request.model, model))


class Run(msgspec.Struct, frozen=True):
    """`chosen` and `memory` name its row."""

    request: Request
    limit: int | None
    chosen: dict[str, str]
    memory: str


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    runs = list(runs_of(options))
    for run in runs:
        plan_of(run.request)
    return [run.chosen | {"memory": run.memory} | as_row(measure(run.request, run.limit)) for run in runs]


def runs_of(options: argparse.Namespace) -> Iterator[Run]:
    settings = {
        "workers": options.workers,
        "max_num_seqs": max(4, options.prompts),
        "max_model_len": min(2048, ModelConfig.load(options.model).max_position_embeddings),
        "warm_start": False,
    }
    common = {
        "model": str(options.model),
        "prompts": options.prompts,
        "max_tokens": options.tokens,
        "warm_up_tokens": options.warm_up,
        "temperature": 1.0,
    }
    memories = [
        (f"{budget}% of experts", {"expert_budget": f"{budget}%"}) for budget in options.budgets.split(",") if budget
    ]
    if not memories and not options.memory:
        raise ValueError("--budgets is '' and --memory is not given, expected one of them")
    if options.memory:
        memories.append((f"{options.memory} in all", {"memory": options.memory}))
    for routing in options.routing.split(","):
        for name, memory in memories:
            # In turn, so that whatever else changes on the machine changes for all.
            for _, prefetch in itertools.product(range(options.rounds), options.prefetch.split(",")):
                chosen = {"routing": routing, "prefetch": prefetch}
                request = Request(settings=settings | chosen | memory, **common)
                limit = parse_nbytes(memory["memory"], "--memory") if "memory" in memory else None
                yield Run(request, limit, chosen, name)


def step_p99(milliseconds: Sequence[float]) -> float:
    """0 of no steps."""
    return float(np.percentile(milliseconds, 99)) if milliseconds else 0.0


def as_row(report: Report) -> dict[str, Any]:
    row = msgspec.to_builtins(report)
    row["prefetched"] = row.pop("prefetch")
    del row["token_ids"]
    row["step_p99_ms"] = step_p99(row.pop("step_ms"))
    for source, stats in zip(row["prefetched"], report.prefetch, strict=True):
        source |= {"precision": round(stats.precision, 4), "recall": round(stats.recall, 4)}
    return row


def print_table(found: list[dict[str, Any]]) -> None:
    print(
        "routing prefetch   memory            tokens/s (slowest to fastest quarter)   hits  loads  disk/loads"
        "   page-in p50/p99"
    )
    for row in found:
        loaded = max(1, row["loaded_nbytes"])
        print(
            f"{row['routing']:7} {row['prefetch']:10} {row['memory']:16} {row['tokens_per_second']:8.1f}"
            f" ({min(row['quarters']):6.1f} to {max(row['quarters']):6.1f})        {row['hit_rate']:15.1%}"
            f" {row['page_ins']:6} {row['disk_nbytes'] / loaded:8.2f}"
            f"  {row['paging_p50_us'] / 1000:8.2f} / {row['paging_p99_us'] / 1000:.2f} ms"
            f"   PSS {format_nbytes(row['largest_pss'])} of {format_nbytes(row['planned_nbytes'])} planned"
        )
        if row["prefetch_step_time"] is not None:
            print(f"    steps with prefetch took {row['prefetch_step_time']:.3f} of the time of those without, in turn")
        for source in row["prefetched"]:
            print(
                f"    {source['source']}: {source['requests']} asked for, {source['page_ins']} read, "
                f"{source['hits']} used in time and {source['late_hits']} almost: precision {source['precision']:.1%}, "
                f"recall {source['recall']:.1%}"
            )


def compared(found: list[dict[str, Any]]) -> list[str]:
    """Of rows of one routing and memory: each prefetch's tokens/s over those of the first one in the same round."""
    lines: list[str] = []
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in found:
        group = groups.setdefault((row["routing"], row["memory"]), {})
        group.setdefault(row["prefetch"], []).append(row["tokens_per_second"])
    for (routing, memory), group in groups.items():
        first, *others = group
        for other in others:
            rates, base = group[other], group[first]
            ratios = [rate / of_first for rate, of_first in zip(rates, base, strict=True)]
            lines.append(
                f"{routing}, {memory}: prefetch {other} / {first} {statistics.median(ratios):.3f} in the middle of "
                f"{len(ratios)} ({min(ratios):.3f} to {max(ratios):.3f}); "
                f"medians {statistics.median(rates):.1f} and {statistics.median(base):.1f} tokens/s"
            )
    return lines


def main(arguments: list[str]) -> int:
    parser = Parser(prog="scripts/bench serving", description="Serving with few experts in memory.")
    parser.add_argument("--model", type=model_path, default=TRAINED_MODEL)
    parser.add_argument("--budgets", default="12.5,25,50,100", help="percentages of experts resident")
    parser.add_argument("--memory", help="a budget for everything, held by a control group, as one more row")
    parser.add_argument("--routing", default="off,range")
    parser.add_argument("--prefetch", default="off")
    parser.add_argument("--rounds", type=whole(1), default=1, help="of the values of --prefetch, in turn")
    parser.add_argument("--workers", type=whole(1), default=1)
    parser.add_argument("--prompts", type=whole(1), default=1)
    parser.add_argument("--tokens", type=whole(1), default=256)
    parser.add_argument("--warm-up", type=whole(0), default=64, help="tokens generated before the measured ones")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = rows(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_table(found)
        for line in compared(found):
            print(line)
    return 0
