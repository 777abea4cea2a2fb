"""What a generation took: as a table below the text, or as the JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from hotset.runtime.answers import Completion
from hotset.runtime.stats import BackendStats

_PLACES = {"slots": "in slots", "page cache": "in page cache", "disk": "on disk only"}


def generation_report(completions: Sequence[Completion], seconds: float, stats: BackendStats) -> dict[str, Any]:
    """The JSON object. `text`, `token_ids` and `finish_reason` are lists if there were several prompts."""
    tokens = sum(len(completion.token_ids) for completion in completions)
    single = len(completions) == 1
    texts, ids = [c.text for c in completions], [c.token_ids for c in completions]
    reasons = [c.finish_reason for c in completions]
    return {
        "text": texts[0] if single else texts,
        "token_ids": ids[0] if single else ids,
        "finish_reason": reasons[0] if single else reasons,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0,
        "hit_rate": round(stats.decode_hit_rate, 4),
        "prefill_hit_rate": round(stats.prefill_hit_rate, 4),
        "experts_left_out": stats.experts_left_out,
        "expert_wait_seconds": round(stats.expert_wait_seconds, 4),
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


def print_generation_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(report).decode())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(report):
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print()
    console.print(table)


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    page_ins, routing, read_mode = report["page_ins"], report["routing_us"], report["read_mode"]["mode"]
    yield "tokens", f"{report['tokens']} in {report['seconds']:.2f} s, ended by {_ending(report['finish_reason'])}"
    yield "tokens/s", f"{report['tokens_per_second']:.1f}"
    left_out = f"; {report['experts_left_out']} of the hits left out" if report["experts_left_out"] else ""
    yield "expert hit rate", f"decode {report['hit_rate']:.1%}, prefill {report['prefill_hit_rate']:.1%}{left_out}"
    yield "would have hit", _regret_text(report["regret"])
    yield "page-ins", _page_ins_text(page_ins)
    yield "waited for experts", f"{report['expert_wait_seconds']:.2f} s, all workers together"
    for tier in report["tiers"]:
        yield f"experts {_PLACES[tier['name']]}", _tier_text(tier)
    yield "read from disk", f"{report['disk_bytes_read']:,} bytes, {read_mode}"
    yield from _prefetch_lines(report["prefetch"], report["prefetch_step_time"])
    yield "routing", f"{report['preference']['text']}; mean {routing['mean']:.1f} us, p99 {routing['p99']:.1f} us"
    yield "KV pages used", f"{report['kv_pages_used']}"
    yield "experts in memory", f"{report['expert_bytes_resident']:,} of {report['expert_bytes_budget']:,} bytes"
    yield "workers", f"{report['workers']}"


def _ending(reasons: str | list[str]) -> str:
    return reasons if isinstance(reasons, str) else ", ".join(reasons)


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
