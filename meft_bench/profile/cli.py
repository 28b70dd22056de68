"""`meft-bench profile`: its options, and what was asked for done in order: calibrate, log a selection, simulate, say
what came out. torch is imported when work begins, since every command reads the options.
"""

import argparse
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meft_bench import fields
from meft_bench.fields import Kind, Maybe, Real, Text, Whole
from meft_bench.profile.results import read_profile
from meft_bench.write import write_if_changed

FOLDER = Path("results/profile")
_DEFAULTS = (2, 256, (1, 4, 8, 16, 32))
ANSWER = "_answer"
"""How the file of a profile ends that is not full."""
_LONGEST_NAME = 150
"""Characters of a result file's name; longer ones end in a digest, since file systems allow 255 bytes."""
_MOST_MICRO_BATCHES = 10**9


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the program's parser; command(commands, name, function, about) makes one."""
    add_arguments(command(commands, "profile", _profile, "what fits on a card, how fast and at what traffic"))


def _profile(args: argparse.Namespace) -> int:
    check(args)
    return profile(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `meft-bench profile`."""
    add = parser.add_argument
    add("--gpu", default="24GB", help="a memory size (12GB, 16GB, 24GB, 48GB, 80GB) or a card (rtx3090, a100, ...)")
    add(
        "--model",
        default="llama-7b",
        help="llama-7b, llama-13b, llama-70b, mistral-7b, a folder or a hub id; only its config is read",
    )
    add("--batch", type=int, default=2, help="sequences per micro-batch (default: 2)")
    add("--seq", type=int, default=256, help="tokens per sequence (default: 256)")
    add("--accumulation", default="1,4,8,16,32", help="micro-batches per optimizer step, a list (default: 1,4,8,16,32)")
    add("--neurons", help="R to profile, a list (default: 3072)")
    add("--variants", help="which methods, a list such as meft,parallel_adapter (default: all)")
    add("--rank", help="LoRA's ranks, a list (default: the rank that trains as much as R neurons)")
    add(
        "--host",
        help="the machine around a simulated card: desktop (default), server, two-socket or two-socket-ddr5 "
        "(default with --gpus, by the card)",
    )
    add("--link", help="between card and host: pcie5, pcie4, pcie3, 100gbe, 10gbe or 1gbe (default: the card's own)")
    add(
        "--gpus",
        type=int,
        help="up to so many GPUs of a node, and 1 to 16 nodes: the plan at scale, instead of a card's "
        "profile (docs/scale.md)",
    )
    add("--network", help="between nodes, with --gpus: 100gbe (default), 10gbe or 1gbe")
    add(
        "--host-memory",
        type=float,
        metavar="GIB",
        help="the host's memory in GiB (default: 64 desktop, 256 server, 1024 and 2048 of two sockets; what measures "
        "asks the system)",
    )
    add(
        "--union",
        type=float,
        metavar="SHARE",
        help="assume this U/R for MEFT (default: what the paper's 0.56 M implies)",
    )
    add("--constants", type=fields.path, metavar="FILE", help="use the constants that --calibrate measured")
    add("--calibrate", action="store_true", help="measure this machine's constants and stop")
    add("--full", action="store_true", help="also every R from 256 to 32768 and the largest that fits (minutes)")
    add("--no-search", action="store_true", help="with --full: leave out the search for the largest R")
    add("--output", type=fields.path, default=FOLDER, help=f"folder of results (default: {FOLDER})")
    add("--workers", type=int, help="simulations at a time (default: one per core, at most 8)")


_MOST_TOKENS = 2**24
_NUMBERS: dict[str, Kind] = {
    "model": Text(),
    "batch": Whole(1, _MOST_TOKENS),
    "seq": Whole(2, _MOST_TOKENS),
    "host_memory": Maybe(Real(above=0, most=2**32)),
    "union": Maybe(Real(above=0, most=1)),
    "workers": Maybe(Whole(1, 1024)),
    "gpus": Maybe(Whole(1, 64)),
}
_LISTS: dict[str, Kind] = {"accumulation": Whole(1), "neurons": Whole(1)}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what makes no profile on any machine, before torch is imported."""
    from meft_bench.simulate import cards, nodes

    for name, kind in _NUMBERS.items():
        value = getattr(args, name)
        if wrong := kind.must(value):
            said = f"{value:g}" if isinstance(value, float) else fields.shown(value)
            raise ValueError(f"--{name.replace('_', '-')} {said} {wrong}")
    for name, kind in _LISTS.items():
        given = getattr(args, name)
        for part in given.split(",") if given is not None else ():
            kind.check(f"--{name}", _whole(name, part))
    card = cards.card(args.gpu)
    if args.host is None:
        args.host = "desktop" if args.gpus is None else nodes.usual_host(card)
    cards.host(args.host)
    if args.link is not None:
        nodes.link(args.link)
    if args.network is not None:
        nodes.network(args.network)
        if args.gpus is None:
            raise ValueError("--network is of several nodes: give --gpus too")


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        said = fields.shown(text)
        raise ValueError(f"--{name} {said} must be whole numbers with commas between, such as 1,4,16") from None


def profile(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code. Raises ValueError on bad input, before anything is simulated."""
    from meft_bench.profile.limits import check_folder, check_workers
    from meft_bench.simulate import cards, nodes

    check_workers(args.workers)
    check_folder(args.output)
    if args.calibrate:
        from meft_bench.profile.calibrate import calibrate, markdown

        path = args.output / "calibration.json"
        print(markdown(calibrate(path, _device())))
        print(f"constants in {path}: meft-bench profile --constants {shlex.quote(str(path))}")
        return 0
    asked, host = cards.card(args.gpu), cards.host(args.host)
    card = asked
    if args.constants is not None:
        from meft_bench.profile.calibrate import from_calibration

        calibrated, host = from_calibration(args.constants)
        card = calibrated or asked
    if args.gpus is not None:
        from meft_bench.profile.scale.cli import plan

        return plan(args, card, host)
    if args.link is not None:
        card = nodes.link(args.link).on(card)
    _simulate(args, card, host)
    if _device() == "cuda" and args.link is None:
        _measure(args, asked.name)
    return 0


def _measure(args: argparse.Namespace, card: str) -> None:
    """What the simulation predicted, on the GPU that is here: under the asked card's memory, and with all of it."""
    from meft_bench.profile.measure_plan import run_plan

    accumulations = _numbers("--accumulation", args.accumulation)
    counts = tuple(a for a in accumulations if a <= 8) or accumulations[:1]
    said = None if args.host_memory is None else round(args.host_memory * 2**30)
    sizes = {"batch": args.batch, "seq": args.seq, "accumulations": counts}
    sized = _sized(args, accumulations)
    for path in run_plan(
        args.model, args.output, card=card, host_bytes=said, about=f"_{sized}" if sized else "", **sizes
    ):
        print(f"measured: {path}")


def host_gib(args: argparse.Namespace) -> float:
    """The host's memory: as said, else the usual one."""
    from meft_bench.simulate.nodes import HOST_GIB

    return HOST_GIB[str(args.host).strip().lower()] if args.host_memory is None else args.host_memory


def _request(args: argparse.Namespace, card: Any, host: Any) -> Any:
    """What was asked for, checked; without a selection log."""
    import torch

    from meft_bench.meft.sites import find_ffns
    from meft_bench.profile import shapes
    from meft_bench.profile.limits import check_selection, check_share, check_sizes
    from meft_bench.profile.matrix import LONGER
    from meft_bench.profile.request import ASKED, Request
    from meft_bench.profile.trained.use import usable_log
    from meft_bench.profile.variants import SIZES, VARIANTS
    from meft_bench.provenance import provenance
    from meft_bench.simulate import nodes

    accumulations = _numbers("--accumulation", args.accumulation)
    if accumulations[-1] > _MOST_MICRO_BATCHES:
        raise ValueError(f"--accumulation {accumulations[-1]} is more micro-batches than a step has: give less")
    check_share("--host-memory", args.host_memory)
    check_share("--union", args.union, most=1.0)
    whole = args.full and args.neurons is None
    trained, why_not = usable_log(args.output, provenance(1))
    if why_not:
        print(f"{why_not}: U from random weights instead", flush=True)
    request = Request(
        model=args.model,
        card=card,
        host=host,
        host_gib=host_gib(args),
        batch=args.batch,
        seq=args.seq,
        accumulations=accumulations,
        union=args.union,
        trained=trained,
        neurons=_numbers("--neurons", args.neurons) if args.neurons is not None else (ASKED,),
        variants=_names(args.variants) if args.variants is not None else tuple(VARIANTS),
        ranks=_numbers("--rank", args.rank) if args.rank is not None else (),
        full=args.full,
        sweep=SIZES if whole else (),
        longer=LONGER if whole and (args.batch, args.seq) == _DEFAULTS[:2] else (),
        search=not args.no_search,
        link=None if args.link is None else nodes.link(args.link),
    )
    if request.ranks and not any(VARIANTS[name].option == "rank" for name in request.variants):
        raise ValueError("--rank is LoRA's: name lora_attention, lora_all or qlora in --variants too")
    config = shapes.model_config(args.model)
    if (positions := shapes.longest(config)) is not None:
        request = dataclasses.replace(request, longer=tuple(p for p in request.longer if p[1] <= positions))
    check_sizes(config, request.batch, request.seq, request.sizes, request.ranks)
    if wanted := _selected(request):
        check_selection(config, request.batch * request.seq, wanted)
    find_ffns(shapes.build(config, "meta", torch.bfloat16, random=False))
    return request


def _simulate(args: argparse.Namespace, card: Any, host: Any) -> None:
    from meft_bench.profile import screen
    from meft_bench.profile.simulate_matrix import simulate_profile, trace_of

    request = _request(args, card, host)
    name = _name(args, card.name, request.accumulations)
    whole, asked = args.output / f"{name}.json", args.output / f"{name}{ANSWER}.json"
    path, kept = (whole, asked) if args.full else (asked, whole)
    for file in (whole, asked):
        if file.is_file():
            read_profile(file)  # a broken one ends here, before minutes of work
    if wanted := _selected(request):
        request = dataclasses.replace(request, selection=_selection(args, wanted))
    about = (
        f"{args.model} on {card.title}, host: {host.title} with {request.host_gib:g} GiB, micro-batches of "
        f"{args.batch} x {args.seq}. Every number is simulated."
    )

    rows = screen.Rows(about, round(request.host_gib * screen.GIB))

    def answer(profile: dict[str, Any]) -> None:
        print("\n".join(screen.answer_lines(profile)), flush=True)
        rows.begin("Beside these, with the U that is assumed:")

    found = simulate_profile(request, path, args.workers, kept=(kept,), on_row=rows, on_answer=answer)
    if not args.full:
        more = "meft-bench profile with --full, or make profile FULL=1"
        print(f"simulated: {path}; every size, the largest that fits, tables and figures: {more} (minutes)")
        return
    for line in (*screen.longer_lines(found), *screen.largest_lines(found)):
        print(line)
    if request.sweep:
        answer(found)
    if "timeline" in found:
        trace = path.with_suffix(".trace.json")
        write_if_changed(trace, (json.dumps(trace_of(found), sort_keys=True) + "\n").encode())
        print(f"one step as a trace: {trace} (open it in https://ui.perfetto.dev)")
    print(f"everything, simulated: {path}; tables and figures: make report")


def _name(args: argparse.Namespace, card: str, accumulations: tuple[int, ...]) -> str:
    """The result file's name: what differs from the usual profile stands in it, so that none replaces another."""
    from meft_bench.profile.shapes import short_name

    parts = [short_name(args.model), card]
    parts += [sized] if (sized := _sized(args, accumulations)) else []
    parts += [f"r{args.neurons.replace(',', '-')}"] if args.neurons else []
    parts += [f"rank{args.rank.replace(',', '-')}"] if args.rank else []
    parts += [args.variants.replace(",", "-")] if args.variants else []
    name = "_".join([*parts, *unusual(args, "desktop")])
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _sized(args: argparse.Namespace, accumulations: tuple[int, ...]) -> str:
    """What a result file's name says of micro-batches, where they are not the usual ones."""
    if (args.batch, args.seq, accumulations) == _DEFAULTS:
        return ""
    return f"{args.batch}x{args.seq}-a{'-'.join(map(str, accumulations))}"


def unusual(args: argparse.Namespace, host: str) -> list[str]:
    """What a result file's name says of the host, its memory, U and measured constants, where they are not the usual
    ones. host: the usual one."""
    from meft_bench.profile.limits import read_small
    from meft_bench.simulate.nodes import HOST_GIB

    name, gib = str(args.host).strip().lower(), host_gib(args)
    parts = [name] if name != host else []
    parts += [f"{gib:.12g}gib"] if gib != HOST_GIB[name] else []
    parts += [f"u{args.union:.12g}"] if args.union is not None else []
    parts += [f"constants-{hashlib.sha256(read_small(args.constants)).hexdigest()[:8]}"] if args.constants else []
    return parts


def _names(text: str) -> tuple[str, ...]:
    from meft_bench.profile.variants import VARIANTS

    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [n for n in names if n not in VARIANTS]:
        raise ValueError(f"unknown variant {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    return names


def _selected(request: Any) -> tuple[int, ...]:
    """Every R whose U a profile asks the log of random weights for; none where a trained model's stands, or no variant
    depends on U."""
    from meft_bench.profile.search import STEP
    from meft_bench.profile.variants import SIZES, VARIANTS

    if request.trained is not None or not any(VARIANTS[name].needs_union for name in request.variants):
        return ()
    searched = (STEP, *SIZES, 16384) if request.full and request.search else ()
    return tuple(sorted({*searched, *request.sizes}))


def _selection(args: argparse.Namespace, wanted: tuple[int, ...]) -> Path:
    """The log that covers this model, T and these R; what it lacks is logged now."""
    from meft_bench.profile import shapes
    from meft_bench.profile.selection import begun_log, log_selection, logged_union

    path = args.output / "selection.json"
    tokens = args.batch * args.seq
    log = begun_log(path)
    missing = [n for n in wanted if any(logged_union(log, args.model, tokens, n, ke) is None for ke in (True, False))]
    if missing:
        print(f"no logged selection of {tokens} tokens for {shapes.short_name(args.model)}: logging one", flush=True)
        log_selection(args.model, args.batch, args.seq, path, missing)
    return path


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in str(text).split(",")}))
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between, such as 1,4,16") from None
    if not values or values[0] < 1:
        raise ValueError(f"{option} {text!r}: every number must be at least 1")
    return values


def _device() -> str:
    """What is measured on. A GPU that the driver knows is of no use to a torch built without CUDA, or for a newer
    driver: then there is nothing but the simulation."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
