"""What an eviction policy costs: ns per layer and token, learning included.

The demands are 4,096 distinct steps, "alike": every expert is as likely as any other, so that nothing about them can be
learned by the processor, and the caches that td's guard simulates miss as often as they can; or "half": half of each
layer's experts are never used, so that what is known of those fades away.

usage: scripts/bench eviction [--json]
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
from laboratory.arguments import Parser
from rich.console import Console
from rich.table import Table

from hotset.runtime.eviction import parse_eviction
from hotset.shm.demands import Records, demands_of_steps
from hotset.workers.eviction.replay import make_policy

STEPS = 4096
REPEATS = 7
MODELS = {  # layers, experts, experts per token
    "OLMoE trained here": (4, 32, 4),
    "gpt-oss-20b": (24, 32, 4),
    "DeepSeek-V2-Lite": (26, 64, 6),
    "Qwen3-30B-A3B": (48, 128, 8),
    "256 experts": (48, 256, 8),
}


DEMANDS = ("alike", "half")
POLICIES = ("lru", "affinity", "td")


class Cost(NamedTuple):
    model: str
    demands: str
    policy: str
    batch: int
    nanoseconds: float  # per layer and token, median


def random_demands(demands: str, layers: int, experts: int, top_k: int, batch: int) -> Records:
    random = np.random.default_rng(0)
    steps = STEPS // batch
    used = experts if demands == "alike" else experts // 2
    chosen = np.argpartition(random.random((steps, batch, layers, used), np.float32), top_k, axis=-1)
    return demands_of_steps(chosen[..., :top_k])


def measure() -> list[Cost]:
    costs: list[Cost] = []
    for model, (layers, experts, top_k) in MODELS.items():
        for demands, batch in itertools.product(DEMANDS, (1, 8)):
            records = random_demands(demands, layers, experts, top_k, batch)
            tokens = STEPS // batch * batch
            for name in POLICIES:
                policy = make_policy(
                    parse_eviction(name),
                    num_layers=layers,
                    num_experts=experts,
                    num_streams=batch,
                    slots_per_layer=experts / 4,
                )
                policy.observe(records)  # first touch
                samples: list[float] = []
                for _ in range(REPEATS):
                    began = time.perf_counter_ns()
                    policy.observe(records)
                    samples.append((time.perf_counter_ns() - began) / (tokens * layers))
                costs.append(Cost(model, demands, name, batch, round(statistics.median(samples), 1)))
    return costs


def main(arguments: list[str]) -> int:
    parser = Parser(prog="scripts/bench eviction", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    costs = measure()
    if options.json:
        report: dict[str, Any] = {"costs": [cost._asdict() for cost in costs]}
        print(json.dumps(report))
        return 0
    table = Table(title="ns per layer and token, median", title_justify="left", box=None)
    for name in ("model", "demands", "batch", *POLICIES):
        table.add_column(name, justify="left" if name in ("model", "demands") else "right")
    for row, found in itertools.groupby(costs, lambda cost: (cost.model, cost.demands, cost.batch)):
        model, demands, batch = row
        table.add_row(model, demands, str(batch), *(f"{cost.nanoseconds:.0f}" for cost in found))
    Console(highlight=False).print(table)
    return 0
