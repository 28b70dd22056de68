"""The part of `meft-bench profile` that has --gpus: the plan at scale, its lines and its file."""

import argparse
from typing import Any

from meft_bench.profile.best import stated_accumulation
from meft_bench.profile.cli import host_gib, unusual
from meft_bench.profile.matrix import PAPER_REASON, PAPER_SHARE
from meft_bench.profile.scale.plan import Request, make_plan
from meft_bench.profile.scale.point import ROWS_KEPT
from meft_bench.profile.scale.words import WALLS
from meft_bench.profile.shapes import short_name
from meft_bench.simulate.cards import Card, Host
from meft_bench.simulate.nodes import link, node, usual_host
from meft_bench.train.contract import OURS
from meft_bench.write import result_bytes, write_if_changed

_ASKED = 3072
"""R where none is named: the paper's 12 % at LLaMA-7B."""
_MICRO_BATCHES = 8
"""Of a rank's step where none are named."""
_OTHERS = ("variants", "rank", "full", "no_search")
"""Options of a card's profile alone."""


def plan(args: argparse.Namespace, card: Card, host: Host) -> int:
    """Write the plan and say it. Raises ValueError on bad input, before anything is simulated."""
    given = [name for name in _OTHERS if getattr(args, name)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is of one card's profile: leave it out with --gpus")
    request = _request(args, card, host)
    card = request.node.card
    print(f"{args.model} on nodes of {card.title}, host: {host.title}. Every number is simulated.", flush=True)
    found = make_plan(request, on_team=lambda rows: print(line(rows), flush=True))
    for text in (*map(largest_line, found["largest"]), *map(check_line, found["replayed"])):
        print(text)
    path = args.output / f"{_name(args, request)}.json"
    write_if_changed(path, result_bytes(found))
    print(f"simulated: {path}; table and figure: make report")
    return 0


def _request(args: argparse.Namespace, card: Card, host: Host) -> Request:
    sizes = [_ASKED] if args.neurons is None else [int(part) for part in args.neurons.split(",")]
    if len(sizes) > 1:
        raise ValueError(f"--neurons {args.neurons}: with --gpus one size at a time")
    accumulation = stated_accumulation({int(part) for part in args.accumulation.split(",")})
    network = (args.network or "100gbe").strip().lower()
    way = None if args.link is None else link(args.link)
    union, why = (PAPER_SHARE, PAPER_REASON) if args.union is None else (args.union, "given with --union")
    return Request(
        model=args.model, node=node(card, host, network, way), network=network, gpus=args.gpus,
        host_gib=host_gib(args), batch=args.batch, seq=args.seq, accumulation=accumulation, neurons=sizes[0],
        union=union, why=why,
    )  # fmt: skip


def _name(args: argparse.Namespace, request: Request) -> str:
    """What differs from the usual plan stands in it, so that none replaces another."""
    card = request.node.card
    parts = ["scale", short_name(args.model), card.name, f"{args.gpus}gpus", *unusual(args, usual_host(card))]
    parts += [f"{args.batch}x{args.seq}"] if (args.batch, args.seq) != (2, 256) else []
    parts += [f"a{request.accumulation}"] if request.accumulation != _MICRO_BATCHES else []
    parts += [f"r{args.neurons}"] if args.neurons else []
    parts += [args.network] if args.network else []
    return "_".join(parts)


def line(rows: list[dict[str, Any]]) -> str:
    """The points of a team on one line: MEFT's, then the fastest of the others that fits."""
    first = rows[0]
    told = [f"{first['gpus']} GPU{'s' * (first['gpus'] > 1)} x {first['nodes']} node{'s' * (first['nodes'] > 1)}:"]
    for row in (r for r in rows if r["method"] in (OURS, ROWS_KEPT)):
        told.append(f"{row['title']} {_said(row)};")
    others = [r for r in rows if r["method"] not in (OURS, ROWS_KEPT) and r["state"] == "ok"]
    best = max(others, key=lambda r: float(r["tokens_per_s"]), default=None)
    told.append(f"instead {best['title']} {_said(best)}" if best else "nothing else fits")
    return " ".join(told)


def _said(row: dict[str, Any]) -> str:
    if row["state"] != "ok":
        return f"does not fit ({row['lacks']})"
    base = "" if row["base_on_gpus"] == 1 else f", base over {row['base_on_gpus']}"
    return f"{row['tokens_per_s']:,.0f} tokens/s (busiest: {WALLS[row['wall']]}{base})"


def largest_line(entry: dict[str, Any]) -> str:
    """The largest adapters on one node."""
    parts = []
    for name, title in ((OURS, "MEFT"), ("fsdp_adapter", "FSDP + Parallel Adapter")):
        most = entry[name]
        told = f"R = {most['neurons']:,} at {most['tokens_per_s']:,.0f} tokens/s" if most else "none fits"
        parts.append(f"{title} {told}")
    return f"largest on {entry['gpus']} GPU{'s' * (entry['gpus'] > 1)}: {'; '.join(parts)}"


def check_line(entry: dict[str, Any]) -> str:
    """The cost model beside the replay."""
    return (
        f"{entry['title']}, one of {entry['gpus']} GPU{'s' * (entry['gpus'] > 1)}, no sharded base: cost model or "
        f"formula {entry['modelled_tokens_per_s_per_gpu']:,.0f} tokens/s, replay of the code that trains "
        f"{entry['replayed_tokens_per_s_per_gpu']:,.0f}; the time of the points above is changed by "
        f"{entry['difference']:+.0%}"
    )
