"""The `hotset` command."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from hotset.runtime.calibrator import DEFAULT_TOKENS
from hotset.runtime.errors import HotsetError

INTERRUPTED = 130
DEFAULT_MEMORIES = ["4GiB", "8GiB", "16GiB"]
_PLACES = {"slots": "in slots", "page cache": "in page cache", "disk": "on disk only"}

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def hotset() -> None:
    """Serve mixture-of-experts models whose experts do not fit in memory."""


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option(help="Text to continue; several run at once, spread over the workers.")],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or GGUF file; without it the shipped model.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens of this probability in all.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only so many of the likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Repeats the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="The text ends before this string.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of text.")] = False,
    workers: Annotated[int | None, typer.Option(help="Serving processes.")] = None,
    memory: Annotated[str | None, typer.Option(help="For everything: 4GiB ...; as many experts as fit.")] = None,
    expert_budget: Annotated[str | None, typer.Option(help="For experts alone: 50%, 500MB ...; default 50%.")] = None,
    routing: Annotated[
        str | None, typer.Option(help="off (the model's own choice), bonus, range, mass, resnorm or substitute.")
    ] = None,
    eviction: Annotated[
        str | None,
        typer.Option(help="Which expert goes: affinity, td, lru, lfu, adaptive, lru+affinity."),
    ] = None,
    prefetch: Annotated[str | None, typer.Option(help="off, auto, or sources: gate-ahead, transitions ...")] = None,
    cold_start: Annotated[
        bool, typer.Option("--cold-start", help="Neither begin with the last run's experts nor remember this one's.")
    ] = False,
    read_mode: Annotated[str | None, typer.Option(help="How experts are read: auto, buffered or direct.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help="Memory for KV pages: 64MiB ...")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16, q8_0 or q4_0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text and table.")] = False,
) -> None:
    """Continue the prompts, streaming the text as it comes, and say what it took."""
    from hotset.runtime.answers import Completion, Piece, join_pieces
    from hotset.runtime.backend import Backend
    from hotset.runtime.sampling_params import SamplingParams

    settings: dict[str, Any] = {
        "memory": memory,
        "expert_budget": expert_budget,
        "workers": workers,
        "routing": routing,
        "eviction": eviction,
        "prefetch": prefetch,
        "warm_start": not cold_start,
        "read_mode": read_mode,
        "max_model_len": max_model_len,
        "kv_cache_memory": kv_cache_memory,
        "kv_cache_dtype": kv_cache_dtype,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    with Backend(model, **settings) as backend:
        if memory is not None:
            print(f"hotset: {backend.plan.memory}", file=sys.stderr)
        began = time.monotonic()
        streams = [backend.stream(text, params) for text in prompt]
        completions: list[Completion] = []
        for number, stream in enumerate(streams):
            if not as_json and len(streams) > 1:
                print(f"{'' if number == 0 else chr(10)}--- {prompt[number]}", flush=True)
            pieces: list[Piece] = []
            for piece in stream:
                pieces.append(piece)
                if not as_json:
                    print(piece.text, end="", flush=True)
            completions.append(join_pieces(0, pieces))
        seconds = time.monotonic() - began
        stats = backend.stats()
    report = _report(completions, seconds, stats)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        print()
        _print_table(report)


@app.command()
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or GGUF file; without it the shipped one.")
    ] = None,
    memory: Annotated[list[str], typer.Option(help="For everything: what fits in so much?")] = DEFAULT_MEMORIES,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Say what a model is and what of it fits in which memory, or why it cannot run, without loading it."""
    from hotset.runtime.config import TRAINED_MODEL
    from hotset.runtime.inspection import inspect_model

    inspection = inspect_model(Path(model or TRAINED_MODEL), memory)
    if as_json:
        print(msgspec.json.encode(inspection).decode())
    else:
        _print_inspection(inspection)


def _print_inspection(inspection: Any) -> None:
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


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed model: new, or of a pack that was interrupted.")],
    format: Annotated[
        str | None,
        typer.Option(help="Of the experts: bf16, q8_0, q4_0, or mixed, by how often each was used; default: as is."),
    ] = None,
    heat: Annotated[
        str | None, typer.Option(help="For mixed: the pack of this model that was served; default: the model itself.")
    ] = None,
    hot: Annotated[
        float | None, typer.Option(help="For mixed: from this percentile of use on, the finest format; default 0.9.")
    ] = None,
    cold: Annotated[
        float | None, typer.Option(help="For mixed: below this percentile of use, q4_0; default 0.3.")
    ] = None,
) -> None:
    """Write a model with each expert in one aligned, checksummed block, which is what the pager reads best."""
    from rich.console import Console
    from rich.progress import Progress

    from hotset.runtime.config import format_nbytes
    from hotset.runtime.model.expert_formats import PrecisionTiers
    from hotset.runtime.model.gguf_folder import model_folder
    from hotset.runtime.model.pack import Packer

    given = {name: value for name, value in (("hot", hot), ("cold", cold)) if value is not None}
    packer = Packer(
        model_folder(Path(model)),
        out,
        format,
        heat_of=model_folder(Path(heat)) if heat else None,
        tiers=PrecisionTiers(**given) if given else None,
    )
    packer.prepare_folder()  # what is wrong with it is said without a bar
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("packing experts", total=packer.count)
        packer.run(lambda finished: bar.update(task, completed=finished))
    formats = ", ".join(f"{count} in {dtype}" for dtype, count in packer.formats.most_common())
    print(f"{packer.count} experts are in {out}, {format_nbytes(packer.nbytes)}: {formats}")


@app.command()
def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or GGUF file; without it the shipped model.")
    ] = None,
    max_ppl: Annotated[str | None, typer.Option(help="Perplexity that it may cost: 0.25% ...")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Divergence that it may cost, in nats per token: 0.01 ...")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="What to decode, best what you serve; without it Python sources.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How much of it.", min=1)] = DEFAULT_TOKENS,
    expert_budget: Annotated[str, typer.Option(help="Share of the experts for which the limit holds.")] = "25%",
    routing: Annotated[str, typer.Option(help="bonus, range, mass, resnorm or substitute.")] = "resnorm",
    eviction: Annotated[str, typer.Option(help="See generate.")] = "td",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Find how strongly routing may prefer experts in memory, and remember it for this model."""
    from rich.console import Console
    from rich.progress import Progress

    from hotset.runtime.calibrator import calibrate as measure
    from hotset.runtime.calibrator import parse_limit, start_message
    from hotset.runtime.config import TRAINED_MODEL
    from hotset.runtime.model.gguf_folder import model_folder

    folder = model_folder(Path(model or TRAINED_MODEL))
    start = start_message(folder, parse_limit(max_kl, max_ppl), text, tokens, expert_budget, routing, eviction)
    with Progress(console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def report(progress: Any) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(progress.phase, total=progress.total)
            bar.update(tasks[progress.phase], completed=progress.done)

        calibration = measure(start, report)
    path = calibration.save(folder)
    if as_json:
        print(msgspec.json.encode(calibration).decode())
        return
    _print_calibration(calibration)
    print(f"remembered in {path}")


def _print_calibration(calibration: Any) -> None:
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
    console.print(f"{calibration.routing} {calibration.strength:g} costs {calibration.limit}; on {calibration.text}:")
    console.print()
    console.print(table)
    console.print()


def _report(completions: list[Any], seconds: float, stats: Any) -> dict[str, Any]:
    """The JSON object: lists for text and token_ids where there were several prompts."""
    tokens = sum(len(completion.token_ids) for completion in completions)
    single = len(completions) == 1
    texts, ids = [c.text for c in completions], [c.token_ids for c in completions]
    return {
        "text": texts[0] if single else texts,
        "token_ids": ids[0] if single else ids,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0,
        "hit_rate": round(stats.decode_hit_rate, 4),
        "prefill_hit_rate": round(stats.prefill_hit_rate, 4),
        "regret": msgspec.to_builtins(stats.regret),
        "page_ins": {
            "urgent": stats.urgent_page_ins,
            "prefetch": stats.prefetch_page_ins,
            "warm_start": stats.warm_page_ins,
        },
        "preference": {**msgspec.to_builtins(stats.preference), "text": str(stats.preference)},
        "prefetch": [
            msgspec.to_builtins(source) | {"precision": round(source.precision, 4), "recall": round(source.recall, 4)}
            for source in stats.prefetch
        ],
        "read_mode": {"mode": stats.read_mode, "reason": stats.read_mode_reason},
        "disk_bytes_read": stats.disk_bytes_read,
        "tiers": msgspec.to_builtins(stats.tiers),
        "prefetch_step_time": stats.prefetch_step_time,
        "routing_us": {"mean": round(stats.routing.mean, 3), "p99": round(stats.routing.p99, 3)},
        "kv_pages_used": stats.kv_pages_peak,
        "expert_bytes_resident": stats.resident_expert_bytes,
        "expert_bytes_budget": stats.expert_budget_bytes,
        "workers": stats.workers,
    }


def _regret_text(regret: dict[str, Any] | None) -> str:
    if regret is None:
        return "not known yet"
    rates = f"LRU {regret['lru_hit_rate']:.1%}, Belady's MIN {regret['min_hit_rate']:.1%}"
    crowd = f"{regret['crowd']:.2f} of a layer's slots"
    return f"{rates} with exact routing, on {regret['demands']} layer steps that want {crowd} each"


def _tier_text(tier: dict[str, Any]) -> str:
    experts = "an unknown number" if tier["experts"] is None else f"{tier['experts']:,}"
    if not tier["p50"]:
        return experts
    if tier["name"] == "slots":
        return f"{experts}, found in {tier['p50']:.1f} us (p99 {tier['p99']:.1f})"
    page_ins = f"{tier['page_ins']:,} loaded from there"
    return f"{experts}; {page_ins} in {tier['p50'] / 1000:.2f} ms (p99 {tier['p99'] / 1000:.2f})"


def _page_ins_text(page_ins: dict[str, int]) -> str:
    return f"{page_ins['urgent']} urgent, {page_ins['prefetch']} prefetch, {page_ins['warm_start']} for a warm start"


def _prefetch_lines(prefetch: list[dict[str, Any]], step_time: float | None) -> Iterator[tuple[str, str]]:
    for source in prefetch:
        used = source["hits"] + source["late_hits"]
        yield (
            f"prefetch {source['source']}",
            f"{source['page_ins']} of {source['requests']} read, {used} used ({source['precision']:.1%}), "
            f"{source['recall']:.1%} of {source['misses']} misses foreseen",
        )
    if step_time is not None:
        yield "a step with prefetch", f"took {step_time:.3f} of the time of one without"


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    page_ins, routing = report["page_ins"], report["routing_us"]
    for name, value in (
        ("tokens", f"{report['tokens']} in {report['seconds']:.2f} s"),
        ("tokens/s", f"{report['tokens_per_second']:.1f}"),
        ("expert hit rate", f"decode {report['hit_rate']:.1%}, prefill {report['prefill_hit_rate']:.1%}"),
        ("would have hit", _regret_text(report["regret"])),
        ("page-ins", _page_ins_text(page_ins)),
        *((f"experts {_PLACES[tier['name']]}", _tier_text(tier)) for tier in report["tiers"]),
        ("read from disk", f"{report['disk_bytes_read']:,} bytes, {report['read_mode']['mode']}"),
        *_prefetch_lines(report["prefetch"], report["prefetch_step_time"]),
        ("routing", f"{report['preference']['text']}; mean {routing['mean']:.1f} us, p99 {routing['p99']:.1f} us"),
        ("KV pages used", f"{report['kv_pages_used']}"),
        (
            "experts in memory",
            f"{report['expert_bytes_resident']:,} of {report['expert_bytes_budget']:,} bytes",
        ),
        ("workers", f"{report['workers']}"),
    ):
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print()
    console.print(table)


def main() -> None:
    """Runs the command; what goes wrong ends as one sentence and a non-zero status."""
    try:
        app()
    except SystemExit as done:
        if done.code == INTERRUPTED:  # what typer makes of Ctrl-C
            print("hotset: interrupted", file=sys.stderr)
        raise
    except (HotsetError, ValueError, OSError) as error:
        print(f"hotset: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
