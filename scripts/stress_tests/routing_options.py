"""The options of the routing stress test."""

from __future__ import annotations

import argparse
import os
from typing import get_args

from stress_tests.messages import Planted


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/stress",
        description="Route concurrently on one arena, and check it. scripts/stress kv is the test of the KV cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=4, help="worker processes")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long")
    parser.add_argument("--experts", type=int, default=64, help="per layer")
    parser.add_argument("--top-k", type=int, default=6, help="experts per token")
    parser.add_argument("--layers", type=int, default=4, help="of experts")
    parser.add_argument("--budget", default="35%", help="memory for experts: a share of them, or bytes")
    parser.add_argument("--kill", action="store_true", help="kill workers and the pager at random")
    parser.add_argument("--kills-per-second", type=float, default=5.0, help="on the average, with --kill")
    parser.add_argument("--seed", type=int, default=None, help="of logits, weights and kills")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds after which a waiting worker is lost")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    # For the tests of this test: does it find what it is there for?
    parser.add_argument("--plant", choices=get_args(Planted), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3), "little")
    return options
