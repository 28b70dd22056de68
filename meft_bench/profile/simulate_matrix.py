"""`meft-bench profile`: simulate the whole matrix for a card, keep what is done, say what came out."""

import concurrent.futures
import concurrent.futures.process
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from meft_bench.harness.numerics import changed, goes_on, methods_in, profile_numerics
from meft_bench.meft.sites import find_ffns
from meft_bench.profile import results, shapes
from meft_bench.profile.limits import check_share, check_sizes
from meft_bench.profile.matrix import PAPER_REASON, PAPER_SHARE, UnionSource, matrix
from meft_bench.profile.paper_figures import recomputed
from meft_bench.profile.search import largest_fitting
from meft_bench.profile.selection import read_log
from meft_bench.profile.simulated_row import Setting, add_practicality, not_run, simulated_row, size_if_any
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.variants import SIZES, VARIANTS
from meft_bench.provenance import provenance
from meft_bench.simulate.cards import GIB, Card, Host, constants
from meft_bench.simulate.timeline import chrome_trace
from meft_bench.stopping import end_with
from meft_bench.train.methods import require_positive
from meft_bench.train.models import shape_of

_SAVE_EVERY_S = 15.0
DRAWN = "meft"
"""The variant whose step is kept as a timeline, at the paper's R = 3072 with the assumed U."""
_DRAWN_NEURONS = 3072


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for. Raises ValueError for values that make no profile."""

    model: str
    card: Card
    host: Host
    host_gib: float
    batch: int = 2
    seq: int = 256
    accumulations: tuple[int, ...] = (1, 4, 16, 32)
    union: float | None = None
    """U / R assumed by the user; None takes the share that the paper's traffic implies."""
    selection: Path | None = None
    """The selection log; None uses the assumed share alone."""
    neurons: tuple[int, ...] = SIZES
    variants: tuple[str, ...] = tuple(VARIANTS)
    ranks: tuple[int, ...] = ()
    """LoRA's ranks; empty takes those that train as much as R neurons."""
    search: bool = True

    def __post_init__(self) -> None:
        require_positive(batch=self.batch, seq=self.seq, **{f"accumulation {a}": a for a in self.accumulations})
        require_positive(**{f"neurons {n}": n for n in self.neurons}, **{f"rank {r}": r for r in self.ranks})
        if self.seq < 2:
            raise ValueError(f"seq={self.seq} must be at least 2: the loss is on the next token")
        check_share("host memory", self.host_gib)
        check_share("union share", self.union, most=1.0)

    @property
    def accumulation(self) -> int:
        """Micro-batches of the simulated step: the least asked for."""
        return min(self.accumulations)


def simulate_profile(request: Request, path: Path, workers: int | None = None) -> dict[str, Any]:
    """Simulate what is missing at path and write it; rows made with the same numbers and settings are kept. A call
    that is cut off has written what it had.

    Returns the profile. Raises ValueError for a model without known FFNs and for sizes that no machine holds, before
    anything runs.
    """
    config = shapes.model_config(request.model)
    check_sizes(config, request.batch, request.seq, request.neurons, request.ranks)
    model = shapes.build(config, "meta", torch.bfloat16, random=False)
    find_ffns(model)
    setting = Setting(
        config=config,
        shape=shape_of(model),
        card=request.card,
        host=request.host,
        accumulations=tuple(sorted(set(request.accumulations))),
    )
    log = read_log(request.selection) if request.selection is not None else None
    why = PAPER_REASON if request.union is None else "given on the command line"
    source = UnionSource(log=log, share=request.union or PAPER_SHARE, why=why)
    specs = [
        s
        for s in matrix(
            request.model,
            source,
            request.batch,
            request.seq,
            request.accumulation,
            sorted(set(request.neurons)),
            sorted(set(request.ranks)),
        )
        if s.variant in request.variants
    ]
    profile = _begun(request, setting, path)
    done = {r["key"]: r for r in profile["rows"]}
    found = {_search_key(entry): entry for entry in profile["largest"]}
    missing = [(s,) for s in specs if s.key not in done]
    wanted = [s for s in _searched(specs) if request.search and _search_place(s) not in found]
    if (missing or wanted) and changed(now := provenance(1)):
        profile["provenance"] = now  # kept rows may be of a clean tree, those made now are not
    for (spec,) in missing:
        size_if_any(spec, setting.counted)  # counted once here, known to every worker
    saved = time.monotonic()
    try:
        with _Pool(setting, round(request.host_gib * GIB), source, workers) as pool:
            for spec, (row, events) in pool.each(_row, missing, "sizes"):
                done[spec.key] = row
                if events:
                    layers = min(2, setting.shape.layers)
                    drawn = {"variant": DRAWN, "neurons": spec.neurons, "layers": layers, "events": events}
                    profile["timeline"] = drawn
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    _save(path, profile, specs, done, found, setting)
                    saved = time.monotonic()
            jobs = [(s, _known_peaks(s, specs, done)) for s in wanted]
            for spec, entry in pool.each(_search, jobs, "largest"):
                found[_search_place(spec)] = entry
    finally:
        if any(s.key in done for s in specs):
            _save(path, profile, specs, done, found, setting)
    return profile


def trace_of(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile's timeline as a Chrome trace."""
    return chrome_trace(profile["timeline"]["events"])


def _begun(request: Request, setting: Setting, path: Path) -> dict[str, Any]:
    """The profile at path if the same numbers and settings made it, else a new one."""
    config, text = setting.config, setting.config.get_text_config()
    settings = {
        "model": shapes.short_name(request.model),
        "shape": {
            "hidden": setting.shape.hidden,
            "layers": setting.shape.layers,
            "ffn": setting.shape.ffn,
            "heads": text.num_attention_heads,
            "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            "vocabulary": text.vocab_size,
            "parameters": setting.shape.parameters,
            "architecture": (config.architectures or [type(config).__name__.removesuffix("Config")])[0],
        },
        "card": request.card.name,
        "card_title": request.card.title,
        "memory_bytes": int(request.card.memory_bytes.value),
        "usable_bytes": int(request.card.usable_bytes.value),
        "context_bytes": int(request.card.context_bytes.value),
        "host": request.host.name,
        "host_title": request.host.title,
        "host_memory_bytes": round(request.host_gib * GIB),
        "batch": request.batch,
        "seq": request.seq,
        "accumulations": list(setting.accumulations),
        "constants": constants(request.card, request.host),
    }
    methods, now = {VARIANTS[name].method for name in request.variants}, provenance(1)
    if path.is_file():
        before = results.read_profile(path)
        today = profile_numerics(methods.union(methods_in(before)))
        if before["settings"] == settings and goes_on(before, today, now):
            return {**before, "numerics": profile_numerics(methods)}
    return {
        "schema": results.SCHEMA,
        "evidence": "simulated",
        "settings": settings,
        "numerics": profile_numerics(methods),
        "rows": [],
        "largest": [],
        "paper": [],
        "provenance": now,
    }


def _save(
    path: Path,
    profile: dict[str, Any],
    specs: list[ProfileSpec],
    done: dict[str, Any],
    found: dict[tuple, Any],
    setting: Setting,
) -> None:
    rows = [done[s.key] for s in specs if s.key in done]
    add_practicality(rows)
    profile["rows"] = rows
    profile["largest"] = [found[_search_place(s)] for s in _searched(specs) if _search_place(s) in found]
    tokens = profile["settings"]["batch"] * profile["settings"]["seq"]
    profile["paper"] = recomputed(rows, setting.shape.hidden, setting.shape.layers, tokens)
    results.write_profile(path, profile)


def _is_drawn(spec: ProfileSpec) -> bool:
    assumed = spec.union is not None and spec.union.evidence == "assumed"
    return spec.variant == DRAWN and spec.neurons == _DRAWN_NEURONS and not spec.checkpointing and assumed


# ---- the largest R ----


def _searched(specs: list[ProfileSpec]) -> list[ProfileSpec]:
    """One spec per variant with a size, checkpointing and kind of U."""
    first: dict[tuple, ProfileSpec] = {}
    for spec in specs:
        if VARIANTS[spec.variant].option is not None and spec.rank is None:
            first.setdefault(_search_place(spec), spec)
    return list(first.values())


def _search_place(spec: ProfileSpec) -> tuple:
    return spec.variant, spec.checkpointing, spec.union.evidence if spec.union is not None else ""


def _search_key(entry: dict[str, Any]) -> tuple:
    return entry["variant"], entry["checkpointing"], entry["union_evidence"]


def _known_peaks(
    spec: ProfileSpec, specs: list[ProfileSpec], done: dict[str, dict[str, Any]]
) -> dict[int, tuple[int, int]]:
    """R -> (device, host) peaks of the rows that the search for spec can begin from."""
    rows = {s.neurons: done[s.key] for s in specs if _search_place(s) == _search_place(spec)}
    return {
        n: (r["memory"]["device_peak_bytes"], r["memory"]["host_peak_bytes"])
        for n, r in rows.items()
        if r["state"] == "ok"
    }


# ---- in the workers ----

_shared: dict[str, Any] = {}


class _Pool:
    """Worker processes that know the setting. They start only when there is work."""

    def __init__(self, setting: Setting, host_bytes: int, source: UnionSource, workers: int | None) -> None:
        self.shared = {"setting": setting, "host_bytes": host_bytes, "source": source}
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def each(self, function: Any, jobs: list[tuple], what: str) -> Iterator[tuple[ProfileSpec, Any]]:
        """(the job's spec, function's result) of every job as they end, with a progress bar."""
        if not jobs:
            return
        if self.pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["meft_bench.profile.simulate_matrix", "meft_bench.baselines.lora"])
            os.environ["OMP_NUM_THREADS"] = "1"  # for the fork server: simulated operations are small
            self.pool = concurrent.futures.ProcessPoolExecutor(
                self.workers, context, _begin, (self.shared, os.getpid())
            )
        waiting = {self.pool.submit(function, *job): job[0] for job in jobs}
        ended = concurrent.futures.as_completed(waiting)
        try:
            for future in tqdm(ended, total=len(waiting), unit="run", desc=what):
                yield waiting[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ValueError(
                "the system ended a simulating process, as it does when memory runs out: give fewer --workers; the "
                "same command goes on with what is done"
            ) from None


def _begin(shared: dict[str, Any], owner: int) -> None:
    end_with(owner)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer: it saves and ends the pool
    gc.collect()
    gc.freeze()  # what the imports made is never garbage: looking through it takes a tenth of the time
    _shared.update(shared)


def _row(spec: ProfileSpec) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    setting: Setting = _shared["setting"]
    try:
        row, timeline = simulated_row(spec, setting)
    except ValueError as error:
        return not_run(spec, size_if_any(spec, setting.counted), str(error)), []
    except ImportError as error:
        reason = f"needs {error.name}: pip install {error.name}"
        return not_run(spec, size_if_any(spec, setting.counted), reason), []
    except Exception as error:  # one variant's failure is no reason to lose the others
        reason = f"failed: {shapes.first_line(error)}"
        return not_run(spec, size_if_any(spec, setting.counted), reason), []
    return row, timeline.events if _is_drawn(spec) else []


def _search(spec: ProfileSpec, known: dict[int, tuple[int, int]]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "variant": spec.variant,
        "title": VARIANTS[spec.variant].title,
        "checkpointing": spec.checkpointing,
        "union_evidence": _search_place(spec)[2],
    }
    setting, source = _shared["setting"], _shared["source"]
    try:
        found, row = largest_fitting(spec, setting, _shared["host_bytes"], source, known)
        if row is None:
            reason = f"not even R=64: {found.limit} is short"
            return {**entry, "evidence": "simulated", "state": "does-not-fit", "reason": reason}
    except ValueError as error:
        return {**entry, "evidence": "not-run", "state": "not-run", "reason": str(error)}
    return {
        **entry,
        "evidence": "simulated",
        "state": "ok",
        "limit": found.limit,
        "neurons": found.neurons,
        "size": row["size"],
        "union": row["union"],
        "union_reason": row.get("union_reason", ""),
        "trainable": row["parameters"]["trainable"],
        "percent_of_base": row["parameters"]["percent_of_base"],
        "device_total_bytes": row["memory"]["device_total_bytes"],
        "host_peak_bytes": row["memory"]["host_peak_bytes"],
        "tokens_per_s": row["time"]["tokens_per_s_by_accumulation"][str(setting.accumulations[0])],
    }
