"""The profile as a whole: its tables and figures by name, and its part of the page, "What fits, how fast"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from meft_bench.report.figures import profile as profile_figures
from meft_bench.report.page.markdown import to_html
from meft_bench.report.page.parts import inline_svg
from meft_bench.report.records.profiles import COMMAND, Profile, load_profiles
from meft_bench.report.tables import profile as profile_tables
from meft_bench.report.tables import profile_findings
from meft_bench.report.text import Table

_TITLES = {
    "profile": "In short",
    "profile_largest": "The largest size that fits",
    "profile_paper": "The paper's numbers, recomputed",
    "profile_measured": "Predicted against measured",
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

    @property
    def block(self) -> str:
        """The README's."""
        return self.tables["profile"].markdown

    def draw(self) -> dict[str, bytes]:
        """File name -> content of every figure."""
        return profile_figures.draw(self.profiles, self.reported)


def profile_report(folder: Path, reported: dict[str, Any]) -> ProfileReport:
    """Tables of every profile of a folder; without any, one that says what would make them. Raises ValueError naming
    a file that cannot be read."""
    profiles = load_profiles(folder)
    made = [profile_findings.headline(profiles)]
    for profile in profiles:
        made += [profile_tables.profile_table(profile), profile_tables.sweep_table(profile)]
        made.append(profile_tables.memory_table(profile))
    if profiles:
        made += [profile_tables.largest_table(profiles), profile_findings.paper_table(profiles)]
        made += [profile_findings.measured_table(profiles), profile_tables.constants_table(profiles)]
    return ProfileReport(
        profiles=tuple(profiles),
        tables={table.name: table for table in made},
        reported=reported,
        notes=profile_findings.claim_notes(profiles),
    )


def section(report: ProfileReport, drawings: Mapping[str, bytes]) -> str:
    """The section's HTML: figures (name -> SVG), then tables. The sweeps, hundreds of lines each, stay in their files.

    Raises ValueError for Markdown or a drawing that the page cannot take.
    """
    shown = {name: table for name, table in report.tables.items() if not name.endswith("_sweep")}
    text = _part("profile", shown.pop("profile"), report.profiles)
    for name, (title, caption) in profile_figures.FIGURES.items() if report.profiles else ():
        svg = drawings.get(name)
        drawn = "<p>Not drawn.</p>\n" if svg is None else f'<div class="scroll">{inline_svg(name, svg, title)}</div>\n'
        said = f"<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>\n"
        text += f'<figure id="figure-{name}">\n{drawn}{said}</figure>\n'
    text += "".join(_part(name, table, report.profiles) for name, table in shown.items())
    if report.profiles:
        files = ", ".join(f"<code>tables/profile_{escape(p.name)}_sweep.md</code>" for p in report.profiles)
        text += f'<p class="soft">Every R: {files}. Made by <code>{escape(COMMAND)}</code> and its like.</p>\n'
    return text


def _part(name: str, table: Table, profiles: Sequence[Profile]) -> str:
    titles = dict(_TITLES)
    for p in profiles:
        where = f"{p.model}, {p.settings['card_title']}, micro-batch {p.settings['batch']} x {p.settings['seq']}"
        titles[f"profile_{p.name}"] = f"{where}: all methods at R = {p.stated}"
        titles[f"profile_{p.name}_memory"] = f"{where}: memory by category"
    return f'<h3 id="table-{name}">{escape(titles[name])}</h3>\n{to_html(table.markdown)}'
