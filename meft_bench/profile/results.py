"""The file a profile writes: its settings, a line per row, and what makes a row still valid. No torch here."""

from pathlib import Path
from typing import Any

from meft_bench.reading import JSON_BYTES, read_json
from meft_bench.write import result_bytes, write_if_changed

SCHEMA = 1


def write_profile(path: Path, profile: dict[str, Any]) -> bool:
    """Write a profile, one row a line, in one step; True if the file changed."""
    return write_if_changed(path, result_bytes(profile))


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
