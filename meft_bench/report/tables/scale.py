"""The plan at scale as tables, and what docs/scale.md shows of it. Everything is simulated."""

from collections.abc import Sequence

from meft_bench.profile.scale.words import WALLS
from meft_bench.report.records.scale import COMMAND, OURS, SAME_SIZE, Plan, Point, fastest
from meft_bench.report.text import Table, markdown_table, paragraphs, plain, table

GIB, GB = 2**30, 1e9
NOT_RUN = f"Not run: `{COMMAND}`."
_WHOLE = ("Model", "Card", "GPUs a node", "Nodes", "Method", "State", "Trained, millions", "Base on GPUs",
          "Tokens/s", "Tokens/s a GPU", "Busiest", "Device GiB", "Host GiB a node", "Link GB a GPU and step",
          "Between GPUs, GB a GPU and step", "Between nodes, GB a node and step", "Evidence")  # fmt: skip


def scale_tables(plans: Sequence[Plan]) -> list[Table]:
    """Every point; the largest adapters; the cost model beside the replay."""
    return [_points(plans), _largest(plans), _replayed(plans)]


def _points(plans: Sequence[Plan]) -> Table:
    lines = [[p.settings["model"], p.settings["card"], *_cells(point)] for p in plans for point in p.points]
    told = (
        "Many GPUs and machines, simulated: MEFT by the cost model of a rank's step with its shares of link and host, "
        "the others by published formulas (docs/scale.md). A base lies on as few GPUs as hold it. Link: a GPU's with "
        "its host, both ways. Between GPUs and nodes: what each receives, and sends."
    )
    columns = [(title, title.lower()) for title in _WHOLE]
    return table("scale", columns, lines, left=5, before=[_stale(plans), told], instead=NOT_RUN)


def _cells(point: Point) -> list[str]:
    fits = point["state"] == "ok"
    speed = [f"{point['tokens_per_s']:,.0f}", f"{point['tokens_per_s_per_gpu']:,.0f}", WALLS[point["wall"]]]
    return [
        str(point["gpus"]), str(point["nodes"]), point["title"], "fits" if fits else f"lacks {point['lacks']}",
        f"{point['trainable'] / 1e6:,.0f}", str(point["base_on_gpus"]), *(speed if fits else ["does not fit"] * 3),
        f"{point['device_bytes'] / GIB:,.1f}", f"{point['host_bytes'] / GIB:,.1f}", f"{point['link_bytes'] / GB:,.2f}",
        f"{point['fabric_bytes'] / GB:,.2f}", f"{point['network_bytes'] / GB:,.2f}", point["evidence"],
    ]  # fmt: skip


def _largest(plans: Sequence[Plan]) -> Table:
    header = ("Model", "Card", "GPUs", "Method", "Largest R", "Trained, millions", "Tokens/s", "Busiest", "Evidence")
    lines = [
        [p.settings["model"], p.settings["card"], str(entry["gpus"]), *_largest_cells(entry, method)]
        for p in plans for entry in p.largest for method in ("meft", SAME_SIZE)
    ]  # fmt: skip
    told = "The largest adapter that one node holds, and its speed. Simulated."
    return table("scale_largest", list(header), lines, left=4, before=[_stale(plans), told], instead=NOT_RUN)


def _largest_cells(entry: dict, method: str) -> list[str]:
    most, evidence = entry[method], entry["evidence"]
    title = {"meft": "MEFT", SAME_SIZE: "FSDP + Parallel Adapter"}[method]
    if most is None:
        return [title, *["none fits"] * 4, evidence]
    return [title, f"{most['neurons']:,}", f"{most['trainable'] / 1e6:,.0f}", f"{most['tokens_per_s']:,.0f}",
            WALLS[most["wall"]], evidence]  # fmt: skip


def _replayed(plans: Sequence[Plan]) -> Table:
    header = ("Model", "Card", "Method", "One of so many GPUs", "Cost model or formula, tokens/s",
              "Replay of the code that trains, tokens/s", "Time more", "Evidence")  # fmt: skip
    lines = [
        [p.settings["model"], p.settings["card"], e["title"], str(e["gpus"]),
         f"{e['modelled_tokens_per_s_per_gpu']:,.0f}", f"{e['replayed_tokens_per_s_per_gpu']:,.0f}",
         f"{100 * e['difference']:+.0f} %", e["evidence"]]
        for p in plans for e in p.replayed
    ]  # fmt: skip
    told = (
        "What the plan is compared with: the simulator's replay of the operations of the code that trains, with the "
        "same shares of link and host and a base that is not sharded. The time of every point of the plan is "
        "multiplied by the factor by which the replay takes longer. Both are simulated."
    )
    return table("scale_replayed", list(header), lines, left=3, before=[_stale(plans), told], instead=NOT_RUN)


def _stale(plans: Sequence[Plan]) -> str:
    found = [f"{p.name} was {p.why_not}" for p in plans if p.why_not]
    return f"**Stale:** {plain('; '.join(found))}. Make it again with `{COMMAND}` and its like." if found else ""


# ---- docs/scale.md ----


def page_blocks(plans: Sequence[Plan]) -> dict[str, str]:
    """Block -> its Markdown: the figure, then each plan."""
    if not plans:
        return {"scale": NOT_RUN}
    figure = "![Tokens a second and GPU against GPUs and nodes, simulated](../results/figures/scale.png)"
    files = (
        "Every point, with bytes and what is busiest: `results/tables/scale.md`; the largest sizes: "
        "`results/tables/scale_largest.md`; the check by replay: `results/tables/scale_replayed.md`."
    )
    return {"scale": paragraphs(_stale(plans), figure, *(part for p in plans for part in _section(p)), files)}


def _section(plan: Plan) -> list[str]:
    teams = [team for team in plan.teams if team[1] == 1 or team[0] == plan.settings["gpus"]]
    header = ["GPUs a node", "Nodes", "MEFT", "MEFT, rows kept", "FSDP + adapter of the same R", "Fastest else"]
    return [
        f"**{plain(plan.settings['model'])}, {plan.settings['gpus']} {plain(plan.settings['card_title'])} a node.** "
        f"Simulated, all of it: {plain(plan.about)}. Tokens a second of all GPUs together, and what is busiest.",
        markdown_table(header, [_row(plan, *team) for team in teams], left=2),
        f"{_moved(plan)} {_pick(plan)}",
        "\n".join(f"- {line}" for line in [*_sizes(plan), *_checks(plan)]),
    ]


def _pick(plan: Plan) -> str:
    """What one would take on the largest node."""
    points = plan.of_team(plan.settings["gpus"], 1)
    enough = next(p["trainable"] for p in points if p["method"] == "meft")
    first, large = fastest(points), fastest(p for p in points if p["trainable"] >= 0.9 * enough)
    if first is None:
        return "Nothing fits one node."
    same = "" if large is None else f"; of those that train as many parameters, {large['title']}"
    return f"The fastest on one node is {first['title']}{same} (simulated)."


def _row(plan: Plan, gpus: int, nodes: int) -> list[str]:
    points = {p["method"]: p for p in plan.of_team(gpus, nodes)}
    other = fastest(p for m, p in points.items() if m not in OURS)
    named = [_said(points[m]) for m in (*OURS, SAME_SIZE)]
    return [str(gpus), str(nodes), *named, f"{other['title']}: {_said(other)}" if other else "nothing fits"]


def _said(point: Point) -> str:
    if point["state"] != "ok":
        return "does not fit"
    return f"{point['tokens_per_s']:,.0f} ({WALLS[point['wall']]})"


def _moved(plan: Plan) -> str:
    """Bytes and memory on the largest node, and across the most nodes."""
    gpus = plan.settings["gpus"]
    one, many = (plan.of_team(gpus, n)[0] for n in (1, plan.teams[-1][1]))
    return (
        f"MEFT on {gpus} GPUs of a node holds {one['host_bytes'] / GIB:,.0f} GiB in the host, the same for any number "
        f"of GPUs. A GPU moves {one['link_bytes'] / GB:,.1f} GB over its link in a step; a "
        f"node sends {many['network_bytes'] / GB:,.1f} GB to the other {many['nodes'] - 1}, the router's "
        "gradient included (simulated)."
    )


def _sizes(plan: Plan) -> list[str]:
    lines = []
    for entry in plan.largest:
        parts = []
        for method in ("meft", SAME_SIZE):
            title, neurons, _, speed, _, _ = _largest_cells(entry, method)
            parts.append(f"{title} " + (f"R = {neurons} at {speed} tokens/s" if entry[method] else neurons))
        lines.append(f"Largest on {entry['gpus']} GPU{'s' * (entry['gpus'] > 1)}, simulated: {'; '.join(parts)}.")
    return lines


def _checks(plan: Plan) -> list[str]:
    return [
        f"{e['title']}, one of {e['gpus']} GPU{'s' * (e['gpus'] > 1)}: by cost model or formula "
        f"{e['modelled_tokens_per_s_per_gpu']:,.0f} tokens/s a GPU, by the replay of the code that trains "
        f"{e['replayed_tokens_per_s_per_gpu']:,.0f} (both simulated). So its points above take "
        f"{abs(100 * e['difference']):.0f} % {'longer' if e['difference'] >= 0 else 'shorter'} than that model says."
        for e in plan.replayed
    ]
