"""The figure of the plan at scale: what another GPU, and another node, is worth to each method. All of it simulated."""

from collections.abc import Sequence
from typing import Any

from meft_bench.report.figures import output, panel
from meft_bench.report.figures.panel import Panel, Sheet, line_style
from meft_bench.report.records.scale import Plan

NAME = "scale"
FIGURE = (
    "Many GPUs: what another one is worth",
    "Tokens a second of each GPU, against the GPUs of one node (above) and against nodes (below), for MEFT and for "
    "what one would pick instead. All of it is simulated. A level line is perfect scaling; where a line falls, GPUs "
    "wait for what they share. A method is missing where its weights and state do not fit.",
)
_LOOKS = {
    "meft": (panel.RED, "D"),
    "meft_rows_kept": (panel.PURPLE, "d"),
    "fsdp_lora": (panel.BLUE, "o"),
    "fsdp_adapter": (panel.GREEN, "^"),
    "zero3": (panel.BLACK, "*"),
    "zero3_offload": (panel.GREY, "x"),
}
_SHORT = {
    "meft": "MEFT",
    "meft_rows_kept": "MEFT, rows kept",
    "fsdp_lora": "FSDP + LoRA",
    "fsdp_adapter": "FSDP + adapter, same R",
    "zero3": "ZeRO-3, all trained",
    "zero3_offload": "ZeRO-3, offloaded",
}


def draw(plans: Sequence[Plan], formats: Sequence[str] = ("png",)) -> dict[str, bytes]:
    """File name -> content in these formats; empty without plans."""
    if not plans:
        return {}
    with output.settings():
        return output.save(NAME, _figure(plans[:_MOST]), formats)


_NETWORKS = {"100gbe": "100 GbE", "10gbe": "10 GbE", "1gbe": "1 GbE"}


_MOST = 2
"""Plans that are drawn, the first ones."""


def _figure(plans: Sequence[Plan]) -> Any:
    sheet = Sheet("What is another GPU worth, and another node?", 2 * len(plans), 1, 1.4 + 6.4 * len(plans))
    panels = iter(sheet.panels)
    for plan in plans:
        s = plan.settings
        counts, nodes = sorted({g for g, n in plan.teams if n == 1}), sorted({n for _, n in plan.teams})
        between = f"{s['model']}: nodes of {s['gpus']} GPUs, {_NETWORKS[s['network']]} between them"
        _panel(next(panels), plan, "gpus", counts, {"nodes": 1}, f"{s['model']}: one node", "GPUs of the node")
        _panel(next(panels), plan, "nodes", nodes, {"gpus": s["gpus"]}, between, "nodes")
    told = "\n".join(f"{plan.about}." for plan in plans)
    sheet.note(
        f"{told}\nDashed: simulated, MEFT by the cost model, the others by formula; the time of both is multiplied by "
        "the factor by which the replay of the code that trains takes longer (docs/scale.md)."
    )
    return sheet.done()


def _panel(
    own: Panel, plan: Plan, along: str, ticks: Sequence[int], fixed: dict[str, int], name: str, axis: str
) -> None:
    own.heading(name, "simulated; a level line is perfect scaling")
    every = [p for method in _LOOKS for p in plan.series(method, **fixed)]
    for method, (colour, marker) in _LOOKS.items():
        found = plan.series(method, **fixed)
        own.line([p[along] for p in found], [p["tokens_per_s_per_gpu"] for p in found], colour, _SHORT[method],
                 linestyle=line_style("simulated"), marker=marker, markersize=6)  # fmt: skip
    own.axes.set_xlim(min(ticks) * 0.9, max(ticks) * 1.1)
    own.log_x(ticks, base=2)
    own.axes.set_ylim(0, 1.1 * max((p["tokens_per_s_per_gpu"] for p in every), default=1))
    _say_what_lacks(own, ticks, {p[along] for p in every}, along)
    own.name_axes(f"{axis} (log)", "tokens/s, each GPU")
    own.grid("both")


def _say_what_lacks(own: Panel, ticks: Sequence[int], there: set[int], along: str) -> None:
    """In the empty part of a panel."""
    missing = [t for t in ticks if t not in there]
    if missing:
        words = f"nothing fits {' or '.join(map(str, missing))} {along.upper() if along == 'gpus' else along}"
        own.axes.text(missing[0], own.axes.get_ylim()[1] / 2, words.replace("GPUS", "GPUs"), color="#333333")
