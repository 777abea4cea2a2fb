"""`hotset pack`: writes a model as the pager reads it best."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from hotset.runtime.stop_signals import Stopped, stop_signals


def pack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or GGUF file.")],
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="Folder for the packed model: new, or of a pack that was interrupted."),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Of the experts: bf16, q8_0, q4_0, or mixed, by how often each was used; default: as they are.",
        ),
    ] = None,
    heat: Annotated[
        str | None,
        typer.Option(
            metavar="PACK",
            help="For mixed: take the record of use of this other pack of the model; default: the model's own.",
        ),
    ] = None,
    hot: Annotated[
        float | None,
        typer.Option(metavar="X", help="For mixed: from this percentile of use on, the finest format; default: 0.9."),
    ] = None,
    cold: Annotated[
        float | None, typer.Option(metavar="X", help="For mixed: below this percentile of use, q4_0; default: 0.3.")
    ] = None,
) -> None:
    """Write a model with each expert in one aligned, checksummed block, which is what the pager reads best."""
    from rich.console import Console
    from rich.progress import Progress

    from hotset.runtime.config import format_nbytes, model_path
    from hotset.runtime.model.expert_formats import PrecisionTiers
    from hotset.runtime.model.gguf_folder import model_folder
    from hotset.runtime.model.pack import CannotWritePack, Packer

    for option, value in (("--heat", heat), ("--hot", hot), ("--cold", cold)):
        if value is not None and format != "mixed":
            stated = f"--format is {format}" if format else "--format is not given"
            raise ValueError(f"{option} is {value} and {stated}, expected --format mixed: {option} is for that")
    if not out:
        raise ValueError("OUT is '', expected a folder: new, or of a pack that was interrupted")
    given = {name: value for name, value in (("hot", hot), ("cold", cold)) if value is not None}
    with stop_signals:
        packer = Packer(
            model_folder(model_path(model)),
            Path(out),
            format,
            heat_of=None if heat is None else model_folder(model_path(heat)),
            tiers=PrecisionTiers(**given) if given else None,
        )
        console, done = Console(stderr=True, highlight=False), 0
        bar = Progress(console=console)
        task = bar.add_task("packing experts", total=packer.count)
        with contextlib.ExitStack() as ending:

            def report(finished: int) -> None:
                nonlocal done
                if not bar.live.is_started:
                    ending.enter_context(bar)  # not before: what is wrong with the folder is said without a bar
                bar.update(task, completed=(done := finished))

            try:
                packer.run(report)
            except (Stopped, CannotWritePack):
                words = f"{out} has {done} of {packer.count} experts; the same command goes on from there"
                console.print(words, soft_wrap=True)
                raise
    formats = ", ".join(f"{count} in {dtype}" for dtype, count in packer.formats.most_common())
    print(f"{packer.count} experts are in {out}, {format_nbytes(packer.nbytes)}: {formats}")
