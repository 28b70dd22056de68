"""`meft-bench profile`: simulate for a card what was asked for first, then the rest; keep what is done."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from meft_bench.profile import best, jobs, pool, results
from meft_bench.profile.begun import Row, begun
from meft_bench.profile.formula import has_formula
from meft_bench.profile.matrix import PAPER_REASON, PAPER_SHARE, UnionSource, at_more_tokens, matrix
from meft_bench.profile.paper_figures import recomputed
from meft_bench.profile.request import Request, setting_of
from meft_bench.profile.runs import size_if_any
from meft_bench.profile.selection import read_log
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import add_practicality
from meft_bench.profile.spec import ProfileSpec
from meft_bench.profile.trained.log import read_log as read_trained
from meft_bench.profile.variants import FAMILIES, PLAIN, VARIANTS
from meft_bench.provenance import provenance
from meft_bench.simulate.cards import GIB
from meft_bench.simulate.timeline import chrome_trace

_SAVE_EVERY_S = 15.0


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

    on_row gets every row of the sizes asked for as soon as it is known, on_answer the profile when all of them are that
    it rests on. Rows with the assumed U where there is a logged one come after, and what a full profile has beside.
    Returns the profile. Raises ValueError for a model without known FFNs and for sizes that no machine holds, before
    anything runs.
    """
    setting = setting_of(request)
    work = _Work(request, setting, path, kept)
    try:
        with pool.Pool(work.shared(), workers) as processes:
            work.simulate(processes, work.first(), on_row)
            work.simulate(processes, work.with_checkpointing(), on_row)
            work.simulate(processes, work.larger())
            work.save()
            on_answer(work.profile)
            work.simulate(processes, work.first(beside=True), on_row)
            work.simulate(processes, work.with_checkpointing(beside=True), on_row)
            if request.full:
                work.simulate(processes, work.specs, what="sizes")
                for checkpointing in (False, True):
                    work.simulate(processes, work.at_more_tokens(checkpointing), what="tokens", job=jobs.longer_rows)
                work.formulas(processes)
                work.search(processes)
                work.profile["complete"] = True
    finally:
        if work.done:
            work.save()
    return work.profile


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
        asked = [s for s in self.specs if self._asked(s)]
        self.longer = [s for batch, seq in request.longer for s in at_more_tokens(asked, batch, seq)]
        self.profile, rows = begun(request, setting, [path, *kept])
        self.done: dict[str, Row] = {s.key: rows[s.key] for s in (*self.specs, *self.longer) if s.key in rows}
        wanted = {jobs.search_place(s): s for s in jobs.searched(self.specs)}
        largest = {jobs.place_of(entry): entry for entry in self.profile["largest"]}
        self.found = {
            place: largest[place]
            for place, s in wanted.items()
            if place in largest and jobs.still_holds(largest[place], s, self.source)
        }
        self.new, self.saved = False, time.monotonic()

    def shared(self) -> dict[str, Any]:
        """What the processes know."""
        request = self.request
        return {
            "setting": self.setting,
            "host_bytes": round(request.host_gib * GIB),
            "source": self.source,
            "others": request.others,
            "near": {*request.neurons, *request.beyond.values()},
        }

    # ---- what comes next ----

    def first(self, beside: bool = False) -> list[ProfileSpec]:
        """The rows of the sizes asked for without checkpointing, MEFT and the adapters it is compared with first.
        beside: instead, those with the assumed U that have one with a logged U beside them, and no part in an
        answer."""
        unions = [(s.variant, s.union.evidence) for s in self.specs if s.union is not None]
        named = self.request.union is not None  # a share that was asked for is what answers rest on
        logged = {variant for variant, evidence in unions if evidence != "assumed" and not named}
        own = [
            s
            for s in self.specs
            if self._asked(s) and not s.checkpointing and beside == (s.variant in logged and _moved(s) == "assumed")
        ]
        return _in_line(own)

    def with_checkpointing(self, beside: bool = False) -> list[ProfileSpec]:
        """The same with checkpointing, where a row does not fit without; where the full profile has all, too."""
        short = {_without_checkpointing(s) for s in self.first(beside) if not self._fits(self.done[s.key])}
        own = (s for s in self.specs if s.checkpointing and _without_checkpointing(s) in short and self._asked(s))
        return _in_line(own)

    def at_more_tokens(self, checkpointing: bool) -> list[ProfileSpec]:
        """The rows of larger micro-batches; with checkpointing those of what does not fit without."""
        if not checkpointing:
            return [s for s in self.longer if not s.checkpointing]
        short = {_place(s) for s in self.at_more_tokens(False) if not self._fits(self.done[s.key])}
        return [s for s in self.longer if s.checkpointing and _place(s) in short]

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
                        if p.neurons == neurons and p.fits(a) and p.tokens_per_s[a] >= floor > 0
                    }
        beyond = self.request.beyond
        wanted = {(*place, beyond[n]) for *place, n in fast if n in beyond}
        return _in_line(s for s in self.specs if (s.variant, s.checkpointing, _moved(s), s.neurons) in wanted)

    def _asked(self, spec: ProfileSpec) -> bool:
        return VARIANTS[spec.variant].option is None or spec.rank is not None or spec.neurons in self.request.neurons

    def _fits(self, row: Row) -> bool:
        if row["state"] != "ok":
            return True  # with checkpointing it would not run either
        held = best.memory_at(row, max(self.setting.accumulations))
        return held["fits"] and held["host_peak_bytes"] <= round(self.request.host_gib * GIB)

    # ---- doing it ----

    def simulate(
        self,
        processes: pool.Pool,
        specs: Sequence[ProfileSpec],
        on_row: Callable[[Row], None] = lambda row: None,
        what: str = "",
        job: Callable[[Sequence[ProfileSpec]], list[jobs.Made]] = jobs.rows,
    ) -> None:
        """The rows of specs that are missing, made by job; on_row gets all of them, in order. what: of a progress
        bar."""
        groups = [(group,) for group in jobs.grouped(s for s in specs if s.key not in self.done)]
        self._note(bool(groups))
        if groups:
            processes.begin()
        for spec in (s for (group,) in groups for s in group):
            size_if_any(spec, self.setting.counted)  # counted once here, known to every worker
        waiting = deque(specs)
        for group, made in processes.each(job, groups, what):
            for spec, (row, events) in zip(group, made, strict=True):
                self._keep(spec, row, events)
            self._tell(waiting, on_row)
        self._tell(waiting, on_row)

    def _tell(self, waiting: deque[ProfileSpec], on_row: Callable[[Row], None]) -> None:
        """Of the specs that wait in order, those at the head whose rows are there."""
        while waiting and waiting[0].key in self.done:
            on_row(self.done[waiting.popleft().key])

    def formulas(self, processes: pool.Pool) -> None:
        """What formulas say of the rows that have one (formula.py), beside them."""
        ran = [s for s in self.specs if has_formula(s) and self.done[s.key]["state"] == "ok"]
        wanted = [(s, self.done[s.key]) for s in ran if "formula" not in self.done[s.key]]
        self._note(bool(wanted))
        for spec, told in processes.each(jobs.formula, wanted, "formulas"):
            self.done[spec.key]["formula"] = told

    def search(self, processes: pool.Pool) -> None:
        """The largest sizes that are missing."""
        wanted = [
            s for s in jobs.searched(self.specs) if self.request.search and jobs.search_place(s) not in self.found
        ]
        self._note(bool(wanted))
        wanted_jobs = [(s, jobs.known_peaks(s, self.specs, self.done, max(self.setting.accumulations))) for s in wanted]
        for spec, entry in processes.each(jobs.search, wanted_jobs, "largest"):
            self.found[jobs.search_place(spec)] = entry

    def _note(self, new: bool) -> None:
        if new and not self.new:
            self.profile["provenance"] = provenance(1)  # this code makes the kept rows too: their numbers are its own
        self.new = self.new or new
        if new:
            self.profile["complete"] = False  # until all is made: a call that is cut off leaves less than was there

    def _keep(self, spec: ProfileSpec, row: Row, events: list[dict[str, Any]]) -> None:
        self.done[spec.key] = row
        if events:
            self.profile["timeline"] = {"variant": PLAIN, "neurons": spec.neurons, "events": events}
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
        profile["longer"] = [self.done[s.key] for s in self.longer if s.key in self.done]
        places = map(jobs.search_place, jobs.searched(self.specs))
        profile["largest"] = [self.found[place] for place in places if place in self.found]
        tokens = profile["settings"]["batch"] * profile["settings"]["seq"]
        profile["paper"] = recomputed(rows, shape.hidden, shape.layers, tokens)
        results.write_profile(self.path, profile)


def _in_line(specs: Iterable[ProfileSpec]) -> list[ProfileSpec]:
    """Specs in the order in which a reader wants their rows; MEFT's, which take longest, are not the last."""

    def place(spec: ProfileSpec) -> tuple[bool, int, int]:
        variant = VARIANTS[spec.variant]
        family = FAMILIES.index(variant.family) if variant.family in FAMILIES else len(FAMILIES)
        return variant.option is None, spec.neurons, family

    return sorted(specs, key=place)


def _without_checkpointing(spec: ProfileSpec) -> tuple[Any, ...]:
    return spec.variant, spec.neurons, spec.rank, _moved(spec)


def _place(spec: ProfileSpec) -> tuple[Any, ...]:
    return spec.tokens, *_without_checkpointing(spec)


def _moved(spec: ProfileSpec) -> str:
    """The evidence of a row's U, as the row says it."""
    if spec.union is not None:
        return spec.union.evidence
    return "simulated" if VARIANTS[spec.variant].is_meft else ""


def trace_of(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile's timeline as a Chrome trace."""
    return chrome_trace(profile["timeline"]["events"])
