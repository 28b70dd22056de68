"""The file a profile writes: its settings, a line per row, and what makes a row still valid. No torch here."""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from meft_bench.harness.spec import PACKAGE, package_dir
from meft_bench.reading import JSON_BYTES, read_json
from meft_bench.write import write_if_changed

SCHEMA = 1
_LINES = ("rows", "largest", "paper")
_WITHOUT_EFFECT = ("calibrate.py", "cli.py", "counters.py", "machine_rates.py", "measure_plan.py", "measured.py",
                   "measured_row.py", "paper_figures.py", "results.py", "session.py", "simulate_matrix.py",
                   "watch.py")  # fmt: skip
"""Files of the profile that no simulated number depends on."""


def code_digest() -> str:
    """First 12 hex digits over the code that a simulated number comes from, and the versions of its libraries."""
    files = sorted(
        f
        for folder in ("simulate", "profile", "meft")
        for f in (PACKAGE / folder).glob("*.py")
        if f.name not in _WITHOUT_EFFECT
    )
    files += sorted(package_dir("baselines").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    for package in ("torch", "transformers", "peft"):
        digest.update(metadata.version(package).split("+")[0].encode())
    return digest.hexdigest()[:12]


def write_profile(path: Path, profile: dict[str, Any]) -> bool:
    """Write a profile, one row a line, in one step; True if the file changed."""
    parts = []
    for key in sorted(profile):
        value = profile[key]
        if key in _LINES:
            rows = ",\n  ".join(json.dumps(row, sort_keys=True, allow_nan=False) for row in value)
            parts.append(f' "{key}": [\n  {rows}\n ]' if value else f' "{key}": []')
        elif key == "timeline":
            parts.append(f' "{key}": {json.dumps(value, sort_keys=True, allow_nan=False)}')
        else:
            text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
            parts.append(f' "{key}": ' + text.replace("\n", "\n "))
    return write_if_changed(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def read_profile(path: Path) -> dict[str, Any]:
    """A profile. Raises ValueError naming the file when it is broken or of another schema."""
    try:
        profile = read_json(path, JSON_BYTES, "profile")
        if profile["schema"] != SCHEMA:
            raise ValueError(f"schema {profile['schema']} is not {SCHEMA}")
        for row in [*profile["rows"], *profile["largest"]]:
            row["variant"], row["checkpointing"], row["state"]
        if not isinstance(profile["settings"], dict) or not all(isinstance(r["key"], str) for r in profile["rows"]):
            raise TypeError("settings or keys of other types")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a profile ({error}): delete it and run make profile again") from None
    return profile
