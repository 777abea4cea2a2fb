"""`hotset inspect`: what a model is, and how much of it fits in which memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from hotset.runtime.stop_signals import stop_signals

if TYPE_CHECKING:
    from hotset.runtime.inspection import Inspection

DEFAULT_MEMORIES = ["4GiB", "8GiB", "16GiB"]


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint folder or GGUF file; without it the model that ships."),
    ] = None,
    memory: Annotated[
        list[str],
        typer.Option(metavar="SIZE", help="What fits in so much memory for everything? May be repeated."),
    ] = DEFAULT_MEMORIES,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what a model is and what of it fits in which memory, or why it cannot run, without loading it."""
    from hotset.runtime.config import model_path
    from hotset.runtime.inspection import inspect_model

    with stop_signals:
        inspection = inspect_model(model_path(model), memory)
    if as_json:
        print(msgspec.json.encode(inspection).decode())
    else:
        _print_inspection(inspection)


def _print_inspection(inspection: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    from hotset.runtime.config import format_nbytes

    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in inspection.lines():
        facts.add_row(name, value)
    fits = Table(box=None, pad_edge=False)
    for heading in ("memory", "experts resident", "of all", "KV tokens"):
        fits.add_column(heading, justify="right")
    for fit in inspection.fits:
        if fit.needed is None:
            fits.add_row(fit.memory, f"{fit.resident:,}", f"{fit.share:.1%}", f"{fit.kv_tokens:,}")
        else:
            fits.add_row(fit.memory, f"needs {format_nbytes(fit.needed)}", "", "")
    console = Console(highlight=False)
    console.print(facts)
    console.print()
    console.print(fits)
