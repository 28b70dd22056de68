"""The profile as a whole: its tables and figures by name, and its part of the page, "What fits, how fast"."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.report.figures import profile as profile_figures
from meft_bench.report.figures import scale as scale_figure
from meft_bench.report.page.page import body, figure, render
from meft_bench.report.records.profiles import COMMAND, Profile, load_profiles
from meft_bench.report.records.scale import Plan, load_plans
from meft_bench.report.tables import profile as profile_tables
from meft_bench.report.tables import profile_best, profile_findings
from meft_bench.report.tables.profile_errors import errors_tables
from meft_bench.report.tables.profile_tokens import tokens_table
from meft_bench.report.tables.scale import scale_tables
from meft_bench.report.text import Table

_TITLES = {
    "profile": "In short",
    "profile_best": "The best that fits, by card",
    "profile_not_meft": "Where MEFT is not the answer",
    "profile_speed": "MEFT's speed beside a resident adapter's",
    "profile_largest": "The largest size that fits",
    "profile_tokens": "Larger micro-batches",
    "profile_errors": "How far predictions are off",
    "profile_measured": "Predicted against measured",
    "scale_largest": "Many GPUs: the largest adapter that a node holds (simulated)",
    "profile_constants": "Constants of the cost model, with their sources",
}


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """Everything that is rendered of the profiles, before any of it is written."""

    profiles: tuple[Profile, ...]
    tables: dict[str, Table]
    reported: dict[str, Any]
    notes: dict[str, str]
    """Claim id -> what the simulation says of it."""
    plans: tuple[Plan, ...] = ()
    """For many GPUs."""

    def draw(self, formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
        """File name -> content of every figure in these formats (png, svg)."""
        return profile_figures.draw(self.profiles, self.reported, formats) | scale_figure.draw(self.plans, formats)


def profile_report(folder: Path, reported: dict[str, Any], records: Iterable[dict[str, Any]] = ()) -> ProfileReport:
    """Tables of every profile of a folder; without any, one that says what would make them. records: the runs, whose
    own counts predictions are held against. Raises ValueError naming a file that cannot be read."""
    profiles, plans = load_profiles(folder), load_plans(folder)
    made = [profile_findings.headline(profiles)]
    if profiles:
        made += [profile_best.best_table(profiles), profile_best.not_the_answer(profiles)]
        made.append(profile_best.speed_table(profiles))
    for profile in profiles:
        made += [profile_tables.profile_table(profile), profile_tables.sweep_table(profile)]
        made.append(profile_tables.memory_table(profile))
    if profiles:
        made += [profile_tables.largest_table(profiles), profile_findings.paper_table(profiles)]
        made += [profile_findings.measured_table(profiles), profile_tables.constants_table(profiles)]
        made += [tokens_table(profiles), *errors_tables(profiles, plans, records)]
    if plans:
        made += scale_tables(plans)
    return ProfileReport(
        profiles=tuple(profiles),
        tables={table.name: table for table in made},
        reported=reported,
        notes=profile_findings.claim_notes(profiles),
        plans=tuple(plans),
    )


def section(report: ProfileReport, drawings: Mapping[str, bytes]) -> str:
    """The section's HTML: figures (name -> PNG), then tables. Long tables stay in their files, which keeps the page
    light: the sweeps, every profile but the first, and the paper's numbers recomputed.

    Raises ValueError for Markdown or a drawing that the page cannot take.
    """
    titles = dict(_TITLES)
    for p in report.profiles[:1]:
        where = f"{p.model}, {p.settings['card_title']}, micro-batch {p.settings['batch']} x {p.settings['seq']}"
        titles[f"profile_{p.name}"] = f"{where}: all methods at R = {p.stated}"
        titles[f"profile_{p.name}_memory"] = f"{where}: memory by category"
    drawn = list(profile_figures.FIGURES.items()) if report.profiles else []
    drawn += [(scale_figure.NAME, scale_figure.FIGURE)] if report.plans else []
    return render(
        "profile.html", tables=[(n, titles[n], body(t)) for n, t in report.tables.items() if n in titles],
        figures=[figure(name, said, drawings) for name, said in drawn], command=COMMAND,
        files=[f"tables/{name}.md" for name in report.tables if name not in titles],
    )  # fmt: skip
