"""The suites whose records are kept in the repository, and the records that a report is made from."""

from pathlib import Path
from typing import Any

from meft_bench.harness import suites
from meft_bench.harness.record import read_records

RECORDS = Path("results/records")


def known_records(runs: Path, published: bool = True) -> list[dict[str, Any]]:
    """Published records, with this machine's own in their place where it has them."""
    records = {r["run_key"]: r for r in read_records(RECORDS)} if published else {}
    records.update({r["run_key"]: r for r in read_records(runs)})
    return sorted(records.values(), key=lambda r: r["run_key"])


def published_cells(records: list[dict[str, Any]] | None = None) -> dict[str, list[Any]]:
    """The suites whose records are kept in the repository: the full one (the default one is its first seed), and the
    real and the paper's one on whatever models and data the records (by default the published ones) were made with."""
    records = read_records(RECORDS) if records is None else records
    sources = sorted({(r["spec"]["model"], r["spec"]["data"]) for r in records if r["spec"]["data"] != "synthetic"})
    known = {r["run_key"] for r in records}
    made = {
        "full": suites.full(),
        "real": [c for model, data in sources for c in suites.real(model, data) if c.spec.run_key in known],
        "paper": _at_scale(sources, known, "llama-7b"),
        "paper_mistral": _at_scale(sources, known, "mistral-7b"),
    }
    return {name: cells for name, cells in made.items() if cells}


def _at_scale(sources: list[tuple[str, str]], known: set[str], shape: str) -> list[Any]:
    """The paper's suite on the model and data that most records were made with, whole, so that what is missing shows;
    empty without any record."""
    counted = []
    for model, data in sources:
        cells = suites.paper(model, data, "cuda", shape)
        # Rows without a size (the base, full fine-tuning) are the same at every shape.
        own = sum(c.spec.run_key in known for c in cells if not suites.ROWS[c.row].only_share)
        counted.append((own, cells))
    best = max(counted, key=lambda pair: pair[0], default=(0, []))
    return best[1] if best[0] else []
