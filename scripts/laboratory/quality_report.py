"""Tables and a picture of what preferences cost and save."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from laboratory.quality_curves import ALLOWED, Estimate, Reached, Row
from rich.table import Table

COLORS = {"bonus": "#888888", "range": "#1f77b4", "mass": "#2ca02c", "resnorm": "#d62728", "substitute": "#9467bd"}


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
