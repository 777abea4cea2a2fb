"""`hotset calibrate`: how strongly routing may prefer experts in memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from hotset.runtime.calibrator import DEFAULT_TOKENS
from hotset.runtime.stop_signals import stop_signals

if TYPE_CHECKING:
    from hotset.runtime.model.calibration import Calibration


def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint folder or GGUF file; without it the model that ships."),
    ] = None,
    max_ppl: Annotated[
        str | None, typer.Option(metavar="X%", help="Perplexity that the preference may cost, such as 0.25%.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="X", help="Instead, the divergence that it may cost, in nats per token, such as 0.01."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What to decode, best what you serve; without it Python sources."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"How much of it; default: {DEFAULT_TOKENS}, or as much as it has.", min=1),
    ] = None,
    expert_budget: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of the experts in memory for which the limit holds.")
    ] = "25%",
    routing: Annotated[
        str, typer.Option(metavar="POLICY", help="bonus, range, mass, resnorm or substitute.")
    ] = "substitute",
    eviction: Annotated[str, typer.Option(metavar="POLICY", help="As for hotset generate.")] = "td",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Find how strongly routing may prefer experts in memory, and remember it for this model."""
    from rich.console import Console
    from rich.progress import Progress

    from hotset.runtime.calibrator import calibrate as measure
    from hotset.runtime.calibrator import parse_limit, start_message
    from hotset.runtime.config import model_path
    from hotset.runtime.model.calibration import Calibration
    from hotset.runtime.model.gguf_folder import model_folder

    with stop_signals:
        folder = model_folder(model_path(model))
        start = start_message(folder, parse_limit(max_kl, max_ppl), text, tokens, expert_budget, routing, eviction)
        Calibration.check_can_be_kept(folder, routing)
        bar = Progress(console=Console(stderr=True))
        with contextlib.ExitStack() as ending:
            tasks: dict[str, Any] = {}

            def report(progress: Any) -> None:
                if not tasks:
                    ending.enter_context(bar)  # not before: what is wrong with the text is said without a bar
                if progress.phase not in tasks:
                    tasks[progress.phase] = bar.add_task(progress.phase, total=progress.total)
                bar.update(tasks[progress.phase], completed=progress.done)

            calibration = measure(start, report)
    if as_json:
        print(msgspec.json.encode(calibration).decode())
    else:
        _print_calibration(calibration)
    path = calibration.save(folder)
    if not as_json:
        print(f"remembered in {path}")


def _print_calibration(calibration: Calibration) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("experts in memory", "hits", "hits, routing off", "perplexity", "KL"):
        table.add_column(name, justify="right")
    for expected in calibration.expectations:
        table.add_row(
            f"{expected.budget:.1%}",
            f"{expected.hit_rate:.1%}",
            f"{expected.exact_hit_rate:.1%}",
            f"{expected.perplexity_change:+.2%}",
            f"{expected.divergence:.4f}",
        )
    console = Console(highlight=False)
    console.print(
        f"{calibration.routing} {calibration.strength:g} costs {calibration.limit}; "
        f"on {calibration.tokens:,} tokens of {calibration.text}:"
    )
    console.print()
    console.print(table)
    console.print()
