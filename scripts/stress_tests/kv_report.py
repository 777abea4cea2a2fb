"""What the KV stress test has checked, and how it prints that."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any


class Report:
    """How often each thing was checked, and what was wrong."""

    def __init__(self) -> None:
        self.checks: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.words: list[str] = []
        self._lock = threading.Lock()

    def check(self, name: str, fine: bool, words: str = "", times: int = 1) -> None:
        with self._lock:
            self.checks[name] += times
            if not fine:
                self.violations[name] += 1
                self.words.append(f"{name}: {words}")


def print_report(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column()
    facts.add_column(justify="right")
    for name, value in result.items():
        words = name.replace("_", " ")
        if name in ("checks", "violations"):
            continue
        if isinstance(value, dict):
            facts.add_row(words, f"{sum(value.values()):,}")
            for kind, count in value.items():
                facts.add_row(f"  {kind}", f"{count:,}")
        else:
            facts.add_row(words, f"{value:,}" if name != "seed" else str(value))
    checks = Table("checked", box=None, pad_edge=False)
    for heading in ("times", "violations"):
        checks.add_column(heading, justify="right")
    for name, count in result["checks"].items():
        checks.add_row(name, f"{count:,}", f"{result['violations'].get(name, 0):,}")
    console = Console(highlight=False)
    console.print(facts)
    console.print()
    console.print(checks)
