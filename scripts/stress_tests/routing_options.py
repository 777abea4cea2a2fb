"""The options of the routing stress test."""

from __future__ import annotations

import argparse
import os
from typing import get_args

from laboratory.arguments import Parser, positive, whole
from stress_tests.messages import Planted

from hotset.runtime.router_config import MAX_EXPERTS

KILLS_PER_SECOND = 5.0
MOST_LAYERS = 1024


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "scripts/stress",
        description="Route concurrently on one arena, and check it. scripts/stress kv is the test of the KV cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workers", type=whole(1), default=4, help="worker processes")
    parser.add_argument("--seconds", type=positive, default=30.0, help="how long")
    parser.add_argument("--experts", type=whole(1, MAX_EXPERTS), default=64, help="per layer")
    parser.add_argument("--top-k", type=whole(1), default=6, help="experts per token")
    parser.add_argument("--layers", type=whole(1, MOST_LAYERS), default=4, help="of experts")
    parser.add_argument("--budget", default="35%", help="memory for experts: a share of them, or bytes")
    parser.add_argument("--kill", action="store_true", help="kill workers and the pager at random")
    parser.add_argument("--kills-per-second", type=positive, help=f"with --kill, on the average ({KILLS_PER_SECOND:g})")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=None, help="of logits, weights and kills")
    parser.add_argument("--patience", type=positive, default=5.0, help="seconds after which a waiting worker is lost")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    # For the tests of this test: does it find what it is there for?
    parser.add_argument("--plant", choices=get_args(Planted), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.top_k > options.experts:
        parser.error(f"--top-k is {options.top_k} and --experts is {options.experts}, expected no more than those")
    if options.kills_per_second is None:
        options.kills_per_second = KILLS_PER_SECOND
    elif not options.kill:
        parser.error(f"--kills-per-second is {options.kills_per_second:g}, expected --kill beside it")
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3), "little")
    return options
