"""`meft-bench profile`: simulate for a card what was asked for first, then the rest; keep what is done."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft_bench.harness.numerics import changed, goes_on, methods_in, profile_numerics
from meft_bench.meft.sites import find_ffns
from meft_bench.profile import best, pool, results, shapes
from meft_bench.profile.limits import check_share, check_sizes
from meft_bench.profile.matrix import PAPER_REASON, PAPER_SHARE, UnionSource, matrix
from meft_bench.profile.paper_figures import recomputed
from meft_bench.profile.search import largest_fitting
from meft_bench.profile.selection import read_log
from meft_bench.profile.simulated_row import Setting, add_practicality, not_run, simulated_row, size_if_any
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.trained.log import read_log as read_trained
from meft_bench.profile.variants import SIZES, VARIANTS
from meft_bench.provenance import provenance
from meft_bench.simulate.cards import CLASSES, GIB, Card, Host, constants
from meft_bench.simulate.timeline import chrome_trace
from meft_bench.train.methods import require_positive
from meft_bench.train.models import shape_of

_SAVE_EVERY_S = 15.0
DRAWN = "meft"
"""The variant whose step is kept as a timeline, at the paper's R = 3072 with the assumed U."""
ASKED = 3072
"""R that is profiled first where none is asked for: the paper's 12 % at LLaMA-7B."""
_FAMILIES_FIRST = ("adapter", "meft", "offload", "quantised", "lora", "full", "none")
Row = dict[str, Any]


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
    """The selection log of random weights; None uses the assumed share alone."""
    trained: Path | None = None
    """A trained model's log, in place of that one."""
    neurons: tuple[int, ...] = (ASKED,)
    """The sizes asked for: they come first, and the answer is theirs."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    ranks: tuple[int, ...] = ()
    """LoRA's ranks; empty takes those that train as much as R neurons."""
    full: bool = False
    """Every row of every size, and the largest sizes by search; else what the answer needs."""
    sweep: tuple[int, ...] = ()
    """Further sizes of a full profile."""
    search: bool = True
    """Whether a full profile searches for the largest sizes."""

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

    @property
    def beyond(self) -> dict[int, int]:
        """R asked for -> the next size of the sweep that is at least twice as large: what the answer to "how large at
        this speed" is drawn towards. Of a full profile only sizes that it has anyway."""
        pairs = ((r, min((n for n in SIZES if n >= 2 * r), default=2 * r)) for r in self.neurons)
        return {r: n for r, n in pairs if not self.full or n in self.sweep}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every R that may have a row, ascending."""
        return tuple(sorted({*self.neurons, *self.sweep, *self.beyond.values()}))


def simulate_profile(
    request: Request,
    path: Path,
    workers: int | None = None,
    *,
    kept: Sequence[Path] = (),
    on_row: Callable[[Row], None] = lambda row: None,
    on_answer: Callable[[dict[str, Any]], None] = lambda profile: None,
) -> dict[str, Any]:
    """Simulate what is missing at path and write it; rows made with the same numbers and settings, there or in the
    files of kept, are taken over. A call that is cut off has written what it had.

    on_row gets every row of the sizes asked for as soon as it is known, on_answer the profile when all of them are;
    what a full profile has beside them comes after. Returns the profile. Raises ValueError for a model without known
    FFNs and for sizes that no machine holds, before anything runs.
    """
    setting = _setting(request)
    work = _Work(request, setting, path, kept)
    try:
        with pool.Pool(work.shared(), workers) as processes:
            work.simulate(processes, work.first(), on_row)
            work.simulate(processes, work.with_checkpointing(), on_row)
            work.simulate(processes, work.larger())
            work.save()
            on_answer(work.profile)
            if request.full:
                work.simulate(processes, work.specs, what="sizes")
                work.search(processes)
                work.profile["complete"] = True
    finally:
        if work.done:
            work.save()
    return work.profile


def _setting(request: Request) -> Setting:
    config = shapes.model_config(request.model)
    check_sizes(config, request.batch, request.seq, request.sizes, request.ranks)
    model = shapes.build(config, "meta", torch.bfloat16, random=False)
    find_ffns(model)
    return Setting(
        config=config,
        shape=shape_of(model),
        card=request.card,
        host=request.host,
        accumulations=tuple(sorted(set(request.accumulations))),
    )


class _Work:
    """A profile that grows: which rows it has, which come next, and its file."""

    def __init__(self, request: Request, setting: Setting, path: Path, kept: Sequence[Path]) -> None:
        self.request, self.setting, self.path = request, setting, path
        log = read_log(request.selection) if request.selection is not None else None
        why = PAPER_REASON if request.union is None else "given on the command line"
        trained = read_trained(request.trained) if request.trained is not None else None
        self.source = UnionSource(log=log, share=request.union or PAPER_SHARE, why=why, trained=trained)
        self.specs = [
            s
            for s in matrix(
                request.model,
                self.source,
                request.batch,
                request.seq,
                request.accumulation,
                request.sizes,
                sorted(set(request.ranks)),
            )
            if s.variant in request.variants
        ]
        self.profile, rows = _begun(request, setting, [path, *kept])
        self.done: dict[str, Row] = {s.key: rows[s.key] for s in self.specs if s.key in rows}
        self.found = {_search_key(entry): entry for entry in self.profile["largest"]}
        self.new, self.saved = False, time.monotonic()

    def shared(self) -> dict[str, Any]:
        """What the processes know."""
        request = self.request
        return {
            "setting": self.setting,
            "host_bytes": round(request.host_gib * GIB),
            "source": self.source,
            "others": _others(request.card),
            "near": {*request.neurons, *request.beyond.values()},
        }

    # ---- what comes next ----

    def first(self) -> list[ProfileSpec]:
        """The rows of the sizes asked for without checkpointing, MEFT and the adapters it is compared with first."""
        own = [s for s in self.specs if self._asked(s) and not s.checkpointing]
        return sorted(own, key=lambda s: (VARIANTS[s.variant].option is None, s.neurons, _place_in_line(s)))

    def with_checkpointing(self) -> list[ProfileSpec]:
        """The same with checkpointing, where a row does not fit without; where the full profile has all, too."""
        short = {_without_checkpointing(s) for s in self.first() if not self._fits(self.done[s.key])}
        return [s for s in self.specs if s.checkpointing and _without_checkpointing(s) in short and self._asked(s)]

    def larger(self) -> list[ProfileSpec]:
        """The next larger size of what is fast enough on some card to be the largest at the resident adapter's
        speed."""
        fast = set()
        for card in best.cards_of(self.profile):
            found = best.points(self.profile | {"rows": self._rows()}, card)
            for neurons in self.request.neurons:
                for a in best.accumulations_on(self.profile, card):
                    floor = best.answer(found, card, neurons, a).floor
                    fast |= {
                        (p.variant, p.checkpointing, p.union, neurons)
                        for p in found
                        if p.neurons == neurons and p.fits and p.tokens_per_s[a] >= floor > 0
                    }
        beyond = self.request.beyond
        wanted = {(*place, beyond[n]) for *place, n in fast if n in beyond}
        return [s for s in self.specs if (s.variant, s.checkpointing, _moved(s), s.neurons) in wanted]

    def _asked(self, spec: ProfileSpec) -> bool:
        return VARIANTS[spec.variant].option is None or spec.rank is not None or spec.neurons in self.request.neurons

    def _fits(self, row: Row) -> bool:
        if row["state"] != "ok":
            return True  # with checkpointing it would not run either
        return row["memory"]["fits"] and row["memory"]["host_peak_bytes"] <= round(self.request.host_gib * GIB)

    # ---- doing it ----

    def simulate(
        self,
        processes: pool.Pool,
        specs: Sequence[ProfileSpec],
        on_row: Callable[[Row], None] = lambda row: None,
        what: str = "",
    ) -> None:
        """The rows of specs that are missing; on_row gets all of them, in order. what: of a progress bar."""
        missing = [(s,) for s in specs if s.key not in self.done]
        self._note(bool(missing))
        for (spec,) in missing:
            size_if_any(spec, self.setting.counted)  # counted once here, known to every worker
        made = processes.each(_row, missing, what)
        if what:
            for spec, (row, events) in made:
                self._keep(spec, row, events)
            return
        for spec in specs:
            if spec.key not in self.done:
                self._keep(spec, *next(made)[1])
            on_row(self.done[spec.key])

    def search(self, processes: pool.Pool) -> None:
        """The largest sizes that are missing."""
        wanted = [s for s in _searched(self.specs) if self.request.search and _search_place(s) not in self.found]
        self._note(bool(wanted))
        jobs = [(s, _known_peaks(s, self.specs, self.done)) for s in wanted]
        for spec, entry in processes.each(_search, jobs, "largest"):
            self.found[_search_place(spec)] = entry

    def _note(self, new: bool) -> None:
        if new and not self.new and changed(now := provenance(1)):
            self.profile["provenance"] = now  # kept rows may be of a clean tree, those made now are not
        self.new = self.new or new

    def _keep(self, spec: ProfileSpec, row: Row, events: list[dict[str, Any]]) -> None:
        self.done[spec.key] = row
        if events:
            layers = min(2, self.setting.shape.layers)
            drawn = {"variant": DRAWN, "neurons": spec.neurons, "layers": layers, "events": events}
            self.profile["timeline"] = drawn
        if time.monotonic() - self.saved > _SAVE_EVERY_S:
            self.save()
            self.saved = time.monotonic()

    def _rows(self) -> list[Row]:
        return [self.done[s.key] for s in self.specs if s.key in self.done]

    def save(self) -> None:
        """Write what there is."""
        profile, rows, shape = self.profile, self._rows(), self.setting.shape
        add_practicality(rows)
        profile["rows"] = rows
        places = map(_search_place, _searched(self.specs))
        profile["largest"] = [self.found[place] for place in places if place in self.found]
        tokens = profile["settings"]["batch"] * profile["settings"]["seq"]
        profile["paper"] = recomputed(rows, shape.hidden, shape.layers, tokens)
        results.write_profile(self.path, profile)


def _place_in_line(spec: ProfileSpec) -> int:
    family = VARIANTS[spec.variant].family
    return _FAMILIES_FIRST.index(family) if family in _FAMILIES_FIRST else len(_FAMILIES_FIRST)


def _without_checkpointing(spec: ProfileSpec) -> tuple[Any, ...]:
    return spec.variant, spec.neurons, spec.rank, _moved(spec)


def _moved(spec: ProfileSpec) -> str:
    """The evidence of a row's U, as the row says it."""
    if spec.union is not None:
        return spec.union.evidence
    return "simulated" if VARIANTS[spec.variant].is_meft else ""


def _others(card: Card) -> tuple[Card, ...]:
    """The classes of other memory than the profiled card's."""
    return tuple(c for c in CLASSES if c.memory_bytes.value != card.memory_bytes.value)


def trace_of(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile's timeline as a Chrome trace."""
    return chrome_trace(profile["timeline"]["events"])


def _begun(request: Request, setting: Setting, paths: Iterable[Path]) -> tuple[dict[str, Any], dict[str, Row]]:
    """(the profile at the first path if the same numbers and settings made it, else a new one; key -> row of all files
    of which that is so)."""
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
        "asked": sorted(set(request.neurons)),
        "accumulations": list(setting.accumulations),
        "union": request.union,
        "elsewhere": {c.name: _about(c) for c in _others(request.card)},
        "constants": constants(request.card, request.host),
    }
    methods, now = {VARIANTS[name].method for name in request.variants}, provenance(1)
    numerics = profile_numerics(methods)
    profile = {
        "schema": results.SCHEMA,
        "evidence": "simulated",
        "complete": False,
        "settings": settings,
        "numerics": numerics,
        "rows": [],
        "largest": [],
        "paper": [],
        "provenance": now,
    }
    rows: dict[str, Row] = {}
    for i, path in enumerate(paths):
        before = results.read_profile(path) if path.is_file() else None
        if before is None or before["settings"] != settings:
            continue
        if goes_on(before, profile_numerics(methods.union(methods_in(before))), now):
            if i == 0:
                profile = {**before, "numerics": numerics}
            elif changed(before["provenance"]):
                profile["provenance"] = now
            rows |= {r["key"]: r for r in before["rows"] if r["key"] not in rows}
            if "timeline" in before:
                profile.setdefault("timeline", before["timeline"])
    return profile, rows


def _about(card: Card) -> dict[str, Any]:
    return {"title": card.title, "usable_bytes": int(card.usable_bytes.value)}


def _is_drawn(spec: ProfileSpec) -> bool:
    assumed = spec.union is not None and spec.union.evidence == "assumed"
    return spec.variant == DRAWN and spec.neurons == ASKED and not spec.checkpointing and assumed


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


def _row(spec: ProfileSpec) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    setting: Setting = pool.shared["setting"]
    try:
        others = pool.shared["others"] if spec.neurons in pool.shared["near"] else ()
        row, timeline = simulated_row(spec, setting, others)
    except ValueError as error:
        return not_run(spec, size_if_any(spec, setting.counted), str(error)), []
    except ImportError as error:
        reason = f"needs {error.name}: pip install {error.name}"
        return not_run(spec, size_if_any(spec, setting.counted), reason), []
    except Exception as error:  # one variant's failure is no reason to lose the others
        reason = f"failed: {shapes.first_line(error)}"
        return not_run(spec, size_if_any(spec, setting.counted), reason), []
    row["exact"] = VARIANTS[spec.variant].exact
    return row, timeline.events if _is_drawn(spec) else []


def _search(spec: ProfileSpec, known: dict[int, tuple[int, int]]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "variant": spec.variant,
        "title": VARIANTS[spec.variant].title,
        "checkpointing": spec.checkpointing,
        "union_evidence": _search_place(spec)[2],
    }
    setting, source = pool.shared["setting"], pool.shared["source"]
    try:
        found, row = largest_fitting(spec, setting, pool.shared["host_bytes"], source, known)
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
        "tokens_per_s_by_accumulation": row["time"]["tokens_per_s_by_accumulation"],
    }
