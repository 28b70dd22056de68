"""What `meft-bench profile` was asked for, done in order: calibrate, log a selection, simulate, say what came out."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from meft_bench.profile import shapes
from meft_bench.profile.search import STEP
from meft_bench.profile.variants import SIZES, VARIANTS

_DEFAULTS = (2, 256, (1, 4, 16, 32))


def profile(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code. Raises ValueError on bad input."""
    from meft_bench.simulate import cards

    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be at least 1")
    if args.calibrate:
        from meft_bench.profile.calibrate import calibrate, markdown

        path = args.output / "calibration.json"
        print(markdown(calibrate(path, _device())))
        print(f"constants in {path}: meft-bench profile --constants {path}")
        return 0
    card, host = cards.card(args.gpu), cards.host(args.host)
    if args.constants is not None:
        from meft_bench.profile.calibrate import from_calibration

        measured_card, host = from_calibration(args.constants)
        card = measured_card or card
    _simulate(args, card, host)
    if _device() == "cuda":
        _measure(args, card.name)
    return 0


def _measure(args: argparse.Namespace, card: str) -> None:
    """What the simulation predicted, on the GPU that is here: under the asked card's memory, and with all of it."""
    from meft_bench.profile.planned import run_plan

    accumulations = _numbers("--accumulation", args.accumulation)
    counts = tuple(a for a in accumulations if a <= 8) or accumulations[:1]
    for path in run_plan(args.model, args.output, card=card, batch=args.batch, seq=args.seq, accumulations=counts):
        print(f"measured: {path}")


def _simulate(args: argparse.Namespace, card: Any, host: Any) -> None:
    from meft_bench.profile.command import Request, simulate_profile, trace_of

    accumulations = _numbers("--accumulation", args.accumulation)
    shapes.model_config(args.model)  # a bad name ends here, before anything is logged
    request = Request(
        model=args.model,
        card=card,
        host=host,
        host_gib=args.host_memory or {"server": 256.0}.get(args.host, 64.0),
        batch=args.batch,
        seq=args.seq,
        accumulations=accumulations,
        union=args.union,
        neurons=_numbers("--neurons", args.neurons) if args.neurons else SIZES,
        variants=_names(args.variants) if args.variants else tuple(VARIANTS),
        search=not args.no_search,
    )
    # Everything asked for is checked before anything is logged.
    request = dataclasses.replace(request, selection=_selection(args, request.neurons))
    path = args.output / f"{_name(args, card.name, accumulations)}.json"
    found = simulate_profile(request, path, args.workers)
    print(summary(found))
    if "timeline" in found:
        import json

        from meft_bench.write import write_if_changed

        trace = path.with_suffix(".trace.json")
        write_if_changed(trace, (json.dumps(trace_of(found), sort_keys=True) + "\n").encode())
        print(f"one step as a trace: {trace} (open it in https://ui.perfetto.dev)")
    print(f"everything, simulated: {path}; tables and figures: make report")


def _name(args: argparse.Namespace, card: str, accumulations: tuple[int, ...]) -> str:
    """The result file's name: what differs from the usual profile stands in it, so that none replaces another."""
    parts = [shapes.short_name(args.model), card]
    if (args.batch, args.seq, accumulations) != _DEFAULTS:
        parts.append(f"{args.batch}x{args.seq}-a{'-'.join(map(str, accumulations))}")
    parts += [f"r{args.neurons.replace(',', '-')}"] if args.neurons else []
    parts += [args.variants.replace(",", "-")] if args.variants else []
    return "_".join(parts)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [n for n in names if n not in VARIANTS]:
        raise ValueError(f"unknown variant {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    return names


def _selection(args: argparse.Namespace, neurons: tuple[int, ...]) -> Path:
    """The log that covers this model, T and these R; logged now where it does not."""
    from meft_bench.profile.selection import log_selection, logged_union, read_log

    path = args.output / "selection.json"
    tokens, wanted = args.batch * args.seq, (STEP, *SIZES, 16384, *neurons)
    log = read_log(path) if path.is_file() else None
    if log is not None and all(logged_union(log, args.model, tokens, n, True) is not None for n in wanted):
        return path
    print(f"no logged selection of {tokens} tokens for {shapes.short_name(args.model)}: logging one", flush=True)
    log_selection(args.model, args.batch, args.seq, path, sorted(set(wanted)))
    return path


def summary(profile: dict[str, Any], neurons: int = 3072) -> str:
    """A table for the terminal: every variant at one size, and the largest size that fits."""
    settings = profile["settings"]
    sizes = sorted({r["neurons"] for r in profile["rows"] if r["neurons"]})
    neurons = neurons if neurons in sizes else sizes[-1]
    largest = {(e["variant"], e["checkpointing"], e["union_evidence"]): e for e in profile["largest"]}
    lines = [
        f"{settings['model']} on {settings['card_title']}, host: {settings['host_title']}, micro-batches of "
        f"{settings['batch']} x {settings['seq']}, R = {neurons}. Every number is simulated.",
        f"{'variant':<58}{'ckpt':>5}{'U/R':>6}{'GiB':>7}{'fits':>6}{'host':>7}{'tok/s':>8}{'largest R':>11}",
    ]
    for row in profile["rows"]:
        if row["neurons"] not in (None, neurons):
            continue
        if row["state"] != "ok":
            lines.append(f"{row['title']:<58}{'yes' if row['checkpointing'] else 'no':>5}  not run: {row['reason']}")
            continue
        union = row["union"]
        kind = union["evidence"] if union and union["evidence"] != "simulated" else ""
        said = {"measured": " (logged U)", "assumed": " (assumed U)"}.get(kind, "")
        share = f"{union['union_share']:.2f}" if union else "-"
        best = largest.get((row["variant"], row["checkpointing"], kind))
        speed = next(iter(row["time"]["tokens_per_s_by_accumulation"].values()))
        lines.append(
            f"{row['title'] + said:<58}{'yes' if row['checkpointing'] else 'no':>5}"
            f"{share:>6}"
            f"{row['memory']['device_total_bytes'] / 2**30:>7.1f}{'yes' if row['memory']['fits'] else 'no':>6}"
            f"{row['memory']['host_peak_bytes'] / 2**30:>7.1f}{speed:>8.0f}"
            f"{str(best.get('neurons', 'none')) if best else '-':>11}"
        )
    return "\n".join(lines)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in str(text).split(",")}))
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between, such as 1,4,16") from None
    if not values or values[0] < 1:
        raise ValueError(f"{option} {text!r}: every number must be at least 1")
    return values


def _device() -> str:
    from meft_bench.inputs import device

    return device("auto")
