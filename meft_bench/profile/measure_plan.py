"""What a machine with a GPU is asked to measure, as data, and how it is carried out: each row in a process of its own,
kept in its result file as soon as it is there, so that a killed plan goes on where it stopped.
"""

import json
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.harness.numerics import goes_on, methods_in, profile_numerics
from meft_bench.profile import results, shapes
from meft_bench.profile.best import RESIDENT
from meft_bench.profile.measured import OutOfMemory, check_device, counted_by_run, measure
from meft_bench.profile.measured_row import measured_row, skipped_row
from meft_bench.profile.runs import size_if_any
from meft_bench.profile.simulated_row import add_practicality
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import KNOWN, PLAIN
from meft_bench.provenance import cpu_model, provenance
from meft_bench.simulate import cards
from meft_bench.train.counts import Counted
from meft_bench.train.methods import ModelShape
from meft_bench.train.models import shape_of
from meft_bench.write import write_json

ACCUMULATIONS = (1, 8)
NEURONS = (1024, 3072, 6144, 8464)
STEPS, WARMUP = 10, 3
CAPPED = "24GB"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One row to measure."""

    variant: str
    neurons: int
    capped: bool
    """Under the allocator cap of the 24 GB class, else with the whole card."""
    checkpointing: bool = False


PLAN = tuple(
    Planned(variant=variant, neurons=neurons, capped=capped)
    for capped in (True, False)
    for neurons in NEURONS
    for variant in (RESIDENT, PLAIN)
)


def run_plan(
    model: str,
    folder: Path,
    *,
    device: str = "cuda",
    card: str = CAPPED,
    plan: Iterable[Planned] = PLAN,
    batch: int = 2,
    seq: int = 256,
    accumulations: Iterable[int] = ACCUMULATIONS,
    steps: int = STEPS,
    warmup: int = WARMUP,
    config: Any = None,
    host_bytes: int | None = None,
    about: str = "",
) -> list[Path]:
    """Measure every row of plan that its file in folder lacks; returns the files, one capped and one uncapped.

    Capped rows hold the allocator to card's memory. Rows that were measured, or did not fit, are kept; rows that were
    not run are tried again. config replaces the one that model names, host_bytes what the system says the host has
    free. about: what the files' names say besides model and card, of settings that are not the usual ones. Raises
    ValueError without a GPU, for an unknown model, and for a file of other settings, and OSError for a folder that
    cannot be written.
    """
    check_device(device)
    config = config if config is not None else shapes.model_config(model)
    shape = shape_of(shapes.build(config, "meta", torch.bfloat16, random=False))
    machine: dict[str, Any] = _in_process("machine", {}) if device == "cuda" else {"gpu": "none", "memory_bytes": 0}
    if "gpu" not in machine:
        raise ValueError(f"the GPU does not answer: {machine['reason']}")
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # fails now rather than after the first row
    plan, accumulations, files = list(plan), sorted({1, *accumulations}), {}
    for capped in (True, False):
        wanted = [p for p in plan if p.capped is capped]
        if not wanted:
            continue
        arguments = {"device": device, "steps": steps, "warmup": warmup, "accumulations": accumulations}
        arguments["host_bytes"] = host_bytes
        arguments["cap_bytes"] = _cap_bytes(card) if capped and device == "cuda" else None
        label = f"capped-{card.lower()}" if capped else "measured"
        settings = settings_of(model, config, shape, machine, arguments, batch, seq, card if capped else None)
        path = folder / f"{shapes.short_name(model)}_{card_name(machine['gpu'])}-{label}{about}.json"
        methods = [KNOWN[p.variant].method for p in wanted]
        files[path] = (wanted, arguments, opened(path, settings, methods))
    for path, (wanted, arguments, result) in files.items():
        _fill(path, result, [(_spec(p, model, batch, seq), arguments) for p in wanted], config)
    return list(files)


def _fill(
    path: Path,
    result: dict[str, Any],
    wanted: list[tuple[ProfileSpec, dict[str, Any]]],
    config: Any,
) -> None:
    counted = Counted(config)
    done = {r["key"] for r in result["rows"] if r["state"] != "not-run"}
    with tqdm(wanted, desc=path.stem, unit="row") as bar:
        for spec, arguments in bar:
            bar.set_postfix_str(f"{spec.variant} R={spec.neurons}")
            if spec.key in done:
                continue
            answer = _in_process("measure", {"spec": spec, "config": config, "arguments": arguments})
            if answer["state"] == "ok":
                row = answer["row"]
            else:
                row = skipped_row(
                    spec, size_if_any(spec, counted), answer["state"], answer["reason"], result["evidence"]
                )
            result["rows"] = [r for r in result["rows"] if r["key"] != spec.key] + [row]
            add_practicality(result["rows"])
            result["provenance"] = provenance(torch.get_num_threads())
            results.write_profile(path, result)


def _spec(planned: Planned, model: str, batch: int, seq: int) -> ProfileSpec:
    return ProfileSpec(
        model=shapes.short_name(model),
        variant=planned.variant,
        neurons=planned.neurons,
        checkpointing=planned.checkpointing,
        batch=batch,
        seq=seq,
        union=counted_by_run(planned.neurons) if KNOWN[planned.variant].needs_union else None,
    )


# ---- a process of its own ----


def _in_process(task: str, job: dict[str, Any]) -> dict[str, Any]:
    """What task answers in a fresh process, which takes its memory, device context and cap with it when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        process = multiprocessing.get_context("spawn").Process(target=_answer, args=(task, job, path))
        process.start()
        try:
            process.join()
        finally:
            if process.is_alive():
                process.terminate()
                process.join()
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        if process.exitcode == -9:
            return {"state": "oom", "reason": "the system killed the process, as it does when host memory runs out"}
        return {"state": "not-run", "reason": f"the process ended with code {process.exitcode} and left no result"}


def _answer(task: str, job: dict[str, Any], path: Path) -> None:
    write_json(path, _TASKS[task](**job))


def _measure(spec: ProfileSpec, config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"state": "ok", "row": measured_row(measure(spec, config, **arguments))}
    except Exception as error:  # one variant's failure is no reason to lose the others
        state, reason = why_not_measured(error)
        return {"state": state, "reason": reason}


def why_not_measured(error: Exception) -> tuple[str, str]:
    """(state, reason) of a row that ended so. What nobody foresaw is printed whole."""
    if isinstance(error, OutOfMemory):
        return "oom", str(error)
    if isinstance(error, ImportError):
        return "not-run", f"needs {error.name}: pip install {error.name}"
    if isinstance(error, ValueError):
        return "not-run", str(error)
    traceback.print_exception(error, file=sys.stderr)
    return "not-run", f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _machine() -> dict[str, Any]:
    """In a process of its own: asking starts a context, which would stay on the card."""
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "memory_bytes": properties.total_memory}


_TASKS: dict[str, Callable[..., dict[str, Any]]] = {"measure": _measure, "machine": _machine}


# ---- the file ----


def _cap_bytes(name: str) -> int:
    """What the allocator may hold so that it and a context fit the card or class of that name."""
    card = cards.card(name)
    return round(card.usable_bytes.value - card.context_bytes.value)


def card_name(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100": a known card's name if the marketing name holds one."""
    known = cards.named(name)
    words = re.findall(r"[a-z0-9]+", name.lower())
    return known.name.lower() if known else "-".join(w for w in words if w not in ("nvidia", "geforce"))


def settings_of(
    model: str,
    config: Any,
    shape: ModelShape,
    machine: dict[str, Any],
    arguments: dict[str, Any],
    batch: int,
    seq: int,
    capped: str | None,
) -> dict[str, Any]:
    """capped: the card whose memory the allocator is held to; None: the whole card that is here."""
    text = config.get_text_config()
    card = cards.card(capped or CAPPED)
    memory = card.memory_bytes.value if capped else machine["memory_bytes"]
    return {
        "model": shapes.short_name(model),
        "shape": {
            "hidden": shape.hidden,
            "layers": shape.layers,
            "ffn": shape.ffn,
            "heads": text.num_attention_heads,
            "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            "vocabulary": text.vocab_size,
            "parameters": shape.parameters,
        },
        "card": capped or card_name(machine["gpu"]),
        "card_title": f"{capped} cap on {machine['gpu']}" if capped else machine["gpu"],
        "memory_bytes": memory,
        "usable_bytes": card.usable_bytes.value if capped else machine["memory_bytes"],
        "context_bytes": card.context_bytes.value,
        "context_source": card.context_bytes.source if capped else "assumed; each row has its own, measured",
        "host": "this machine",
        "host_title": cpu_model(),
        "batch": batch,
        "seq": seq,
        "accumulations": arguments["accumulations"],
        "steps": arguments["steps"],
        "warmup": arguments["warmup"],
        "constants": {},
    }


def opened(path: Path, settings: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """The result file's content, or an empty result. Raises ValueError for a file that is broken, of other settings or
    of other code, which is left as it is."""
    if not path.is_file():
        evidence = "capped" if "capped" in path.stem else "measured"
        lists: dict[str, Any] = {"rows": [], "largest": [], "paper": []}
        return {
            "schema": results.SCHEMA, "evidence": evidence, "settings": settings,
            "numerics": profile_numerics(methods, simulated=False), **lists
        }  # fmt: skip
    found = results.read_profile(path)
    if found["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{path.name} was measured with other settings: move it away to measure again")
    numerics = profile_numerics([*methods, *methods_in(found)], simulated=False)
    if found["rows"] and not goes_on(found, numerics, provenance(torch.get_num_threads())):
        raise ValueError(
            f"{path.name} was measured with an earlier version of the code or from changed files: move it away to "
            "measure again"
        )
    return {**found, "numerics": numerics}
