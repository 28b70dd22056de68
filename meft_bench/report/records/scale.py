"""The results of `make profile GPUS=...` (results/profile/scale_*.json), checked on reading."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.harness.numerics import scale_why_not
from meft_bench.reading import read_json
from meft_bench.report.text import visible

COMMAND = "make profile GPU=a100 GPUS=8 MODEL=llama-70b"
OURS = ("meft", "meft_rows_kept")
"""Methods that are MEFT."""
SAME_SIZE = "fsdp_adapter"
"""The other method that trains as many neurons."""
_POINT = ("method", "title", "gpus", "nodes", "state", "lacks", "evidence", "base_on_gpus", "trainable", "device_bytes",
          "host_bytes", "tokens_per_s", "tokens_per_s_per_gpu", "wall", "link_bytes", "fabric_bytes",
          "network_bytes")  # fmt: skip
Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One checked file; name is its stem. Everything in it is simulated."""

    name: str
    settings: dict[str, Any]
    points: tuple[Point, ...]
    largest: tuple[dict[str, Any], ...]
    replayed: tuple[dict[str, Any], ...]
    why_not: str
    """Why it does not count; "" when it does."""

    @property
    def teams(self) -> list[tuple[int, int]]:
        """(GPUs of a node, nodes), in the file's order."""
        return list(dict.fromkeys((p["gpus"], p["nodes"]) for p in self.points))

    def of_team(self, gpus: int, nodes: int) -> list[Point]:
        """Every method on a team."""
        return [p for p in self.points if (p["gpus"], p["nodes"]) == (gpus, nodes)]

    def series(self, method: str, *, gpus: int | None = None, nodes: int | None = None) -> list[Point]:
        """The points of a method that fit, with so many GPUs a node or so many nodes."""
        return [p for p in self.points if p["method"] == method and p["state"] == "ok"
                and gpus in (None, p["gpus"]) and nodes in (None, p["nodes"])]  # fmt: skip

    @property
    def methods(self) -> dict[str, str]:
        """Method -> its title."""
        return {p["method"]: p["title"] for p in self.points}

    @property
    def about(self) -> str:
        """Model, nodes and step in words."""
        s = self.settings
        return (
            f"{s['model']} on nodes of up to {s['gpus']} {s['card_title']}, host: {s['host_title']}, "
            f"{s['host_memory_bytes'] / 2**30:,.0f} GiB; R = {s['neurons']:,}, U/R = {s['union_share']:g} "
            f"({s['union_source']}); {s['network']} between nodes; a rank's step is "
            f"{s['accumulation']} micro-batches of {s['batch']} x {s['seq']} tokens"
        )


def fastest(points: Iterable[Point]) -> Point | None:
    """Of those that fit."""
    return max((p for p in points if p["state"] == "ok"), key=lambda p: float(p["tokens_per_s"]), default=None)


def load_plans(folder: Path) -> list[Plan]:
    """Every plan of a folder, those that count first, then the largest base. Raises ValueError naming a file that is
    broken."""
    plans = [_load(path) for path in sorted(folder.glob("scale_*.json"))]
    return sorted(plans, key=lambda p: (bool(p.why_not), -p.settings["shape"]["parameters"], p.name))


def _load(path: Path) -> Plan:
    try:
        content = visible(read_json(path))
        if content["schema"] != 1 or content["evidence"] != "simulated":
            raise ValueError("another schema, or not simulated")
        missing = [f for p in content["points"] for f in _POINT if f not in p]
        if missing:
            raise ValueError(f"a point lacks {missing[0]}")
        return Plan(
            name=path.stem, settings=content["settings"], points=tuple(content["points"]),
            largest=tuple(content["largest"]), replayed=tuple(content["replayed"]), why_not=scale_why_not(content),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"cannot read the plan {path.name} ({why}): run {COMMAND} again") from None
