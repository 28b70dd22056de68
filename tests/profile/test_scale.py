"""Many GPUs and machines, simulated: shares, bytes and seconds against values computed by hand, and what must hold."""

import dataclasses
import json

import pytest
import torch

from meft_bench.cli import main
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.sites import decoder_layers
from meft_bench.profile import cli, shapes
from meft_bench.profile.scale import cli as scale_cli
from meft_bench.profile.scale import plan
from meft_bench.profile.scale.peers import fsdp_lora, zero3, zero3_offload
from meft_bench.profile.scale.point import Job, meft, rows_budget
from meft_bench.profile.scale.rank import Rank, Team, wire_bytes
from meft_bench.profile.scale.replay import replayed_rank
from meft_bench.profile.scale.sharding import Sharding, Units, shardings, step_memory, units_of
from meft_bench.profile.setting import Setting
from meft_bench.profile.simulated_row import simulated_row
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.report.records.profiles import load_profiles
from meft_bench.simulate import cards, nodes
from meft_bench.simulate.cards import Constant
from meft_bench.simulate.machine import Operation
from meft_bench.simulate.timeline import Timeline
from meft_bench.train import policy
from meft_bench.train.methods import ModelShape
from tests.families import FAMILIES
from tests.profile.small import shape_of_config, small_config

SHAPE = ModelShape(hidden=100, layers=2, ffn=300, query=100, value=20, parameters=400_000)
UNITS = Units(layer=114_000, outside=172_000)
LORA = 64 * 2 * (2 * 200 + 2 * 120 + 3 * 400)
"""Rank 64 times inputs and outputs of the seven matrices of two layers."""
OPTIONS = {"kept": 4, "experts": 4}
R, T, U = 16, 20, 16


def number(value: float) -> Constant:
    return Constant(value, "1", "round, for a test")


def job(**changes) -> Job:
    """A node whose numbers are round: links of 1 GB/s on one switch, a host of 10 GB/s, a fabric of 2 and a network of
    .5 GB/s. Nothing else takes time on the host."""
    free = {name: number(0.0) for name in ("copy_latency", "launch", "kernel")}
    link = {name: number(1e9) for name in ("h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable")}
    card = dataclasses.replace(
        cards.card("a100"), half_rate=number(1e12), half_share=number(1.0), bandwidth=number(1e15),
        bandwidth_share=number(1.0), **free, **link,
    )  # fmt: skip
    rates = {name: number(1e30) for name in ("product_rate", "dot_rate", "search_rate", "element_rate")}
    host = dataclasses.replace(cards.host("server"), bandwidth=number(10e9), overhead=number(0.0), **rates)
    wiring = nodes.Wiring(switches=number(1), fabric=number(2e9), nvlink=True, network=number(0.5e9))
    node = nodes.Node(card=card, host=host, wiring=wiring)
    work = policy.Workload(shape=SHAPE, vocabulary=50, length=T, batch=1, card=card, host=host)
    return dataclasses.replace(
        Job(work=work, units=UNITS, lora=LORA, rows=1, node=node, host_room=2**34, neurons=R, options=OPTIONS),
        **changes,
    )


def rank(team: Team, **options) -> Rank:
    made = job()
    return Rank(MeftOptions(neurons=R, **OPTIONS, **options), made.share(team), 1, SHAPE.layers, team)


def moved(entries, name: str) -> int:
    return sum(e.bytes for e in entries if isinstance(e, Operation) and e.name.startswith(name))


def test_gpus_share_their_switch_and_their_host() -> None:
    node = job().node
    assert [node.sharers(g) for g in (1, 2, 4)] == [1, 2, 4]
    assert node.card_of(2).h2d_pinned.value == 0.5e9 and node.card_of(1) == node.card
    assert node.host_of(4).bandwidth.value == 2.5e9 and node.host_of(1) == node.host
    usual = nodes.node(cards.card("a100"), cards.host("two-socket"))
    assert [usual.sharers(g) for g in (1, 4, 5, 8)] == [1, 1, 2, 2], "eight GPUs on four switches"
    assert nodes.node(cards.card("24GB"), cards.host("desktop")).sharers(2) == 2, "sixteen lanes for all"
    assert nodes.node(cards.card("24GB"), cards.host("desktop"), "10gbe").wiring.network.value == 0.95 * 1.25e9


@pytest.mark.parametrize(
    ("card", "link", "pinned", "fabric"),
    [("24GB", None, 25e9, 25e9), ("24GB", "1gbe", 0.95 * 0.125e9, 25e9), ("24GB", "pcie3", 12.5e9, 12.5e9),
     ("a100", "pcie3", 12.5e9, 230e9), ("h100", "10gbe", 0.95 * 1.25e9, 360e9)],
)  # fmt: skip
def test_a_network_to_the_host_does_not_slow_the_cards_among_themselves(card, link, pinned, fabric) -> None:
    """Those with NVLink keep it; those without cross their slots, whose PCIe a link may name."""
    made = nodes.node(cards.card(card), cards.host("two-socket"), way=link and nodes.link(link))
    assert (made.card.d2h_pinned.value, made.wiring.fabric.value) == (pinned, fabric)
    assert made.wiring.nvlink == (fabric > 100e9) and made.card.name == (f"{card}-{link}" if link else card)


def test_a_busy_link_is_not_called_pcie_as_it_may_be_a_network() -> None:
    row = {"gpus": 2, "nodes": 1, "method": "meft", "title": "MEFT", "state": "ok", "tokens_per_s": 39.0,
           "base_on_gpus": 1, "wall": "link"}  # fmt: skip
    assert "39 tokens/s (busiest: the link to the host)" in scale_cli.line([row])


@pytest.mark.parametrize(("name", "parameters"), [("llama-13b", 13_015_864_320), ("llama-70b", 68_976_648_192)])
def test_known_shapes_have_the_published_parameters(name: str, parameters: int) -> None:
    """And they are gathered as the seven matrices of a layer, and the rest."""
    c = shapes.model_config(name)
    value = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    layer = 2 * c.hidden_size * (c.hidden_size + value) + 3 * c.hidden_size * c.intermediate_size
    norms = (2 * c.num_hidden_layers + 1) * c.hidden_size
    units = units_of(shapes.build(c, "meta", torch.bfloat16, random=False))
    assert units == Units(layer=layer, outside=2 * c.vocab_size * c.hidden_size + norms)
    assert c.num_hidden_layers * units.layer + units.outside == parameters


def job_on(config, folder) -> Job:
    config.save_pretrained(folder)
    node = nodes.node(cards.card("12GB"), cards.host("desktop"))
    return plan.job_of(plan.Request(
        model=str(folder), node=node, network="100gbe", gpus=2, host_gib=64, batch=1, seq=8, accumulation=2,
        neurons=64, union=0.5, why="for a test",
    ))[0]  # fmt: skip


# Two attention matrices of 32 x 32 a layer and two of 16 x 32 where heads share keys; three FFN matrices of 32 x 48 in
# each of four experts, and their router; two of 32 x 48 where there is no gate.
@pytest.mark.parametrize(
    ("family", "layer", "adapted"),
    [
        ("llama", 2 * 1024 + 2 * 512 + 3 * 1536, 2 * 64 + 2 * 48 + 3 * 80),
        ("opt", 4 * 1024 + 2 * 1536, 4 * 64 + 2 * 80),
        ("gpt_neox", 4 * 1024 + 2 * 1536, 128 + 64 + 2 * 80),
        ("mixtral", 2 * 1024 + 2 * 512 + 4 * (3 * 1536 + 32), 2 * 64 + 2 * 48 + 4 * (128 + 80)),
    ],
)
def test_a_base_of_any_family_is_gathered_by_its_own_layers(family, layer, adapted, tmp_path) -> None:
    """peft has one pair of matrices for the fused gate of each expert, 32 x 96."""
    made = job_on(FAMILIES[family].config(), tmp_path)
    shape = made.work.shape
    assert made.units.layer == layer and made.units.outside == shape.parameters - 2 * layer > 0
    assert made.lora == 64 * 2 * adapted
    gathered = step_memory(made.work, made.units, 1, Sharding(gpus=2))["gathered weights"]
    assert gathered == 2 * shape.parameters // 2, "both layers and the rest, of which a GPU lacks half"


def test_a_base_beside_whose_ffns_nothing_attaches_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match="returns several tensors: no adapter can stand beside it") as refused:
        job_on(FAMILIES["gpt_oss"].config(), tmp_path)
    assert "\n" not in str(refused.value)


def test_the_largest_layer_is_gathered_where_layers_differ(tmp_path) -> None:
    """The first layer of two has one FFN, the other has experts."""
    config = FAMILIES["deepseek_v3"].config()
    layers = decoder_layers(shapes.build(config, "meta", torch.bfloat16, random=False))
    first, second = (sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers)
    made = job_on(config, tmp_path)
    assert made.units.layer == max(first, second) > min(first, second)
    assert made.units.outside == made.work.shape.parameters - first - second


def test_a_link_replaces_the_cards_own(monkeypatch, tmp_path) -> None:
    asked = []
    monkeypatch.setattr(cli, "_simulate", lambda args, card, host: asked.append((card, host)))
    monkeypatch.setattr(cli, "_measure", None)
    assert main(["profile", "--gpu", "24GB", "--link", "PCIe3", "--output", str(tmp_path)]) == 0
    ((card, host),) = asked
    assert card.name == "24GB-pcie3" and card.h2d_pinned.value == 12.5e9 and host.name == "desktop"


def test_the_other_classes_of_card_are_behind_the_named_link_too(monkeypatch, tmp_path) -> None:
    asked = []
    monkeypatch.setattr(
        "meft_bench.profile.simulate_matrix.simulate_profile", lambda request, *_, **__: asked.append(request) or {}
    )
    small = ["profile", "--gpu", "24GB", "--variants", "parallel_adapter", "--output", str(tmp_path)]
    assert main(small) == main([*small, "--link", "1gbe"]) == 0
    own, linked = ({c.name: c.d2h_pinned.value for c in request.others} for request in asked)
    assert own == dict.fromkeys(["12GB", "16GB", "48GB", "80GB"], 25e9)
    assert linked == {f"{name}-1gbe": 0.95 * 0.125e9 for name in own}


def test_two_gpus_of_a_node_by_hand() -> None:
    """U = R = 16 rows of D = 100, keys and values, two layers, bf16 on the link and fp32 on the host."""
    team = Team(gpus=2, nodes=1)
    point = meft(job(), team, kept=False)
    down, up = 2 * U * 200 * 2, 2 * (T * 100 * 2 + U * 200 * 2)
    assert point.link_bytes == down + up
    assert point.busy_s["link"] == pytest.approx(up / 0.5e9)
    update = list(rank(team).update())
    # 24 bytes of value and moments and 4 of the gradient, for half of the rows.
    assert moved(update, "advance") == 2 * (8 * 200 * 28) and moved(update, "reduce") == 0
    # A gradient arrives in bf16 and is added to the node's sums: read and written, but for each row's first.
    gathered, added = 2 * U * 200 * (4 + 2), 2 * U * 200 * (2 + 6)
    searched = 2 * R * 100 * 4
    host = moved(update, "advance") + gathered + added + searched
    assert point.busy_s["host"] == pytest.approx(host / 5e9)
    assert point.busy_s["host memory"] == pytest.approx(2 * (host + down + up) / 10e9)
    assert point.step_s >= max(point.busy_s.values())


def test_a_team_of_one_is_one_gpu() -> None:
    made, alone = job(), Team(gpus=1, nodes=1)
    one = meft(made, alone, kept=False)
    assert one.step_s == policy.timeline(MeftOptions(neurons=R, **OPTIONS), made.work, 1).step_s
    assert one.network_bytes == one.fabric_bytes == 0 and one.sharding == Sharding(gpus=1)


@pytest.mark.parametrize("count", [2, 4, 16])
def test_bytes_between_nodes_are_the_formula(count: int) -> None:
    expected = 2 * U * 2 * 100 * 2 * 4 * (count - 1) // count
    assert wire_bytes(U, 100, 2, 4, count) == expected == rank(Team(gpus=2, nodes=count)).network_bytes
    assert rank(Team(gpus=2, nodes=count), wire="bf16").network_bytes == expected // 2
    router = 2 * 4 * 100 * 2 * 4 * (count - 1) // count
    point = meft(job(), Team(gpus=2, nodes=count), kept=False)
    assert point.network_bytes == expected + router
    assert point.busy_s["network"] == pytest.approx((expected + router) / 0.5e9)
    update = list(rank(Team(gpus=2, nodes=count)).update())
    assert moved(update, "reduce") == 2 * (3 * expected // 2 // 2), "each of two ranks half, in two layers"
    assert wire_bytes(U, 100, 2, 4, 1) == 0


@pytest.mark.parametrize("kept", [False, True])
def test_more_sharers_and_more_nodes_are_never_faster_for_a_gpu(kept: bool) -> None:
    made = job()
    of = [[meft(made, Team(gpus=g, nodes=w), kept) for g in (1, 2, 4, 8)] for w in (1, 2, 8)]
    each = [[p.tokens_per_s / p.team.ranks for p in row] for row in of]
    assert all(row == sorted(row, reverse=True) for row in each)
    assert all(list(column) == sorted(column, reverse=True) for column in zip(*each, strict=True))
    assert len({p.host_bytes for row in of for p in row}) == 1, "one set a node"


def test_more_ranks_touch_more_rows_and_each_owner_moves_its_part() -> None:
    small = dataclasses.replace(job().work, union_share=0.25)
    of = {g: Rank(MeftOptions(neurons=R, **OPTIONS), small, 1, 2, Team(gpus=g, nodes=1)) for g in (1, 2, 4)}
    assert [r.touched for r in of.values()] == [4, 7, 11]  # 16 (1 - .75^g)
    for g, one in of.items():
        if g == 1:
            continue  # test_one_gpu_alone_is_the_planner_s
        late = (R - one.touched) * (1 + one.passing / R)  # the other keys, and values that come to be used
        wanted = 200 * (2 * one.touched * 28 + late * 24) / g
        assert moved(one.update(), "advance") == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"adam": "lazy"}, {"moments": "bf16"}, {"frozen_keys": True}])
def test_one_gpu_alone_is_the_planner_s(options: dict) -> None:
    """Step for step, so that a plan at scale begins where the plan for one card ends."""
    small = dataclasses.replace(job().work, union_share=0.25)
    chosen = MeftOptions(neurons=R, **OPTIONS, **options)
    alone = Rank(chosen, small, 1, small.shape.layers, Team(gpus=1, nodes=1))
    assert policy.steady(alone).step_s == policy.timeline(chosen, small, 1).step_s


def test_kept_rows_go_home_and_come_back_once_a_step() -> None:
    options = MeftOptions(neurons=R, **OPTIONS)
    kept = dataclasses.replace(options, device_budget=rows_budget(options, job().work))
    one = Rank(kept, job().work, 1, 2, Team(gpus=2, nodes=1))
    assert one.split.rows == R and one.split.moments == 0
    copies = [e for e in one.update() if isinstance(e, Operation) and e.place in ("h2d", "d2h")]
    assert sum(e.bytes for e in copies) == 2 * 2 * U * 200 * 2
    assert not [e for e in one.micro_batch() if isinstance(e, Operation) and e.place in ("h2d", "d2h")]
    whole = dataclasses.replace(options, device_budget=2**30)
    assert Rank(whole, job().work, 1, 2, Team(gpus=2, nodes=1)).split == one.split, "AdamW is the owners', on the host"
    assert Rank(whole, job().work, 1, 2, Team(gpus=1, nodes=1)).split.moments == R


def test_a_base_lies_on_as_few_gpus_as_hold_it() -> None:
    assert [(s.gpus, s.nodes) for s in shardings(Team(gpus=4, nodes=2))] == [(1, 1), (2, 1), (4, 1), (8, 2)]
    deep = dataclasses.replace(SHAPE, layers=16, parameters=2_000_000)
    made = job(work=dataclasses.replace(job().work, shape=deep))
    need = meft(made, Team(gpus=1, nodes=1), kept=False).device_bytes

    def of(room: int, team: Team):
        card = dataclasses.replace(made.node.card, usable_bytes=number(room))
        return meft(dataclasses.replace(made, node=dataclasses.replace(made.node, card=card)), team, kept=False)

    assert of(need, Team(gpus=4, nodes=1)).sharding.gpus == 1
    spread = of(need - 1, Team(gpus=4, nodes=1))
    assert spread.sharding.gpus == 2 and not spread.lacks
    assert spread.fabric_bytes == 2 * 2_000_000 * 2 // 2, "half of the base, in forward and in backward"
    assert spread.busy_s["fabric"] == pytest.approx(spread.fabric_bytes / 2e9)
    across = of(need - 1, Team(gpus=1, nodes=2))
    assert across.sharding.nodes == 2 and across.network_bytes > 2 * 2_000_000 * 2 // 2
    assert across.fabric_bytes == 0 == across.busy_s["fabric"], "a node of one GPU has none that it could ask"
    assert "on a GPU of" in of(10, Team(gpus=2, nodes=1)).lacks
    assert "in a host of" in meft(job(host_room=1000), Team(gpus=1, nodes=1), kept=False).lacks


def test_the_others_by_their_published_formulas() -> None:
    made, team = job(), Team(gpus=2, nodes=2)
    point = fsdp_lora(made, team, Sharding(gpus=2))
    assert point.fabric_bytes == 2 * 2 * (400_000 + LORA) / 2 + 2 * 2 * LORA * 3 / 4
    assert point.network_bytes == 2 * 2 * LORA / 2
    assert zero3(made, Team(gpus=1, nodes=4)).fabric_bytes == 0
    whole = zero3(made, team)
    assert whole.network_bytes == 3 * 2 * 400_000 / 2, "3 Psi, of which a node lacks half"
    state = zero3(made, Team(gpus=4, nodes=4)).device_bytes - zero3(made, Team(gpus=8, nodes=4)).device_bytes
    gathered = 2 * (2 * UNITS.layer + UNITS.outside)
    assert state == 16 * 400_000 / 16 - 16 * 400_000 / 32 - gathered / 32
    host = zero3_offload(made, team)
    assert host.host_bytes == 16 * 400_000 / 2 and host.link_bytes == 2 * 2 * 400_000 / 4
    assert host.busy_s["host memory"] == pytest.approx(30 * 400_000 / 2 / 10e9)


def test_points_take_what_the_replay_takes_more() -> None:
    alone, plain = Team(gpus=1, nodes=1), job()
    slower = dataclasses.replace(plain, ratios={"meft 1": 3.0, "fsdp_lora": 2.0, "zero3": 1.5})
    assert meft(slower, alone, kept=False).step_s == pytest.approx(3 * meft(plain, alone, kept=False).step_s)
    for make, factor in ((lambda j: fsdp_lora(j, alone, Sharding(gpus=1)), 2.0), (lambda j: zero3(j, alone), 1.5)):
        assert make(slower).step_s == pytest.approx(factor * make(plain).step_s)


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_counts(most: int, expected: list[int]) -> None:
    assert plan.counts(most) == expected


def test_a_rank_alone_replays_as_its_profile_and_one_of_several_slower() -> None:
    config = small_config(layers=2)
    shape = shape_of_config(config)
    made = job(neurons=64, rows=1, options={}, work=policy.Workload(
        shape=shape, vocabulary=config.vocab_size, length=16, batch=3, card=job().node.card, host=job().node.host,
        union_share=0.5))  # fmt: skip
    union = Union(rows=32, source="assumed", evidence="assumed")
    spec = ProfileSpec(model="small", variant="meft", neurons=64, batch=1, seq=16, union=union)
    setting = Setting(config=config, shape=shape, card=made.node.card, host=made.node.host, accumulations=(3,))
    row, _ = simulated_row(spec, setting)
    steps = [replayed_rank("small", config, made, Team(gpus=g, nodes=1)).step_s for g in (1, 4)]
    alone, shared = (3 * 16 / step_s for step_s in steps)
    assert alone == pytest.approx(row["time"]["tokens_per_s_by_accumulation"]["3"], rel=1e-3)
    assert 4 * shared > alone > shared, "the ranks' work on the host is not four times one rank's"


def test_the_command_labels_every_number_and_lies_beside_profiles(tmp_path, capsys, monkeypatch) -> None:
    step = Timeline(step_s=9.0, busy_s={"gpu": 1.0}, components_s={})
    monkeypatch.setattr(plan, "replayed_rank", lambda *_: step)
    monkeypatch.setattr(plan, "replayed_peer", lambda *_: step)
    small_config(layers=2).save_pretrained(tmp_path / "Small")
    out = tmp_path / "out"
    assert main(["profile", "--gpus", "2", "--gpu", "12GB", "--model", str(tmp_path / "Small"), "--neurons", "64",
                 "--batch", "1", "--seq", "16", "--accumulation", "2", "--output", str(out)]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    (file,) = out.iterdir()
    assert file.name == "scale_small_12GB_2gpus_1x16_a2_r64.json" and "Every number is simulated." in printed
    found = json.loads(file.read_text())
    assert {(p["gpus"], p["nodes"]) for p in found["points"]} == {(g, w) for g in (1, 2) for w in (1, 2, 4, 8, 16)}
    assert all(p["evidence"] == "simulated" for kind in ("points", "largest", "replayed") for p in found[kind])
    assert all(c["source"] for c in found["settings"]["constants"].values())
    assert [c["title"] for c in found["replayed"]][:2] == ["MEFT", "MEFT"]
    alone = {p["method"]: p for p in found["points"] if (p["gpus"], p["nodes"]) == (1, 1)}
    assert [alone[m]["step_s"] for m in ("meft", "fsdp_lora", "fsdp_adapter", "zero3")] == pytest.approx([9.0] * 4)
    assert load_profiles(out) == []


OTHER_PLANS = {
    (): "scale_llama-7b_a100_2gpus",
    ("--accumulation", "1,4"): "scale_llama-7b_a100_2gpus_a4",
    ("--union", "0.3"): "scale_llama-7b_a100_2gpus_u0.3",
    ("--host-memory", "96"): "scale_llama-7b_a100_2gpus_96gib",
    ("--host", "Two-Socket"): "scale_llama-7b_a100_2gpus",
    ("--host", "two-socket-ddr5"): "scale_llama-7b_a100_2gpus_two-socket-ddr5",
    ("--host", "desktop", "--batch", "1", "--link", "pcie3", "--network", "1gbe"):
        "scale_llama-7b_a100-pcie3_2gpus_desktop_1x256_1gbe",
}  # fmt: skip


@pytest.mark.parametrize(("asked", "name"), OTHER_PLANS.items(), ids=lambda v: " ".join(v) if v else "usual")
def test_plans_of_other_settings_have_other_names(asked, name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(scale_cli, "make_plan", lambda *_, **__: {"largest": [], "replayed": []})
    assert main(["profile", "--gpu", "a100", "--gpus", "2", "--output", str(tmp_path), *asked]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus 0 must be a whole number of at least 1"),
        (["--gpus", "3000"], "at most 64"),
        (["--gpus", "text"], "--gpus invalid int value: 'text'"),
        (["--gpus", "2", "--full"], "--full is of one card's profile"),
        (["--gpus", "2", "--neurons", "64,128"], "one size at a time"),
        (["--gpus", "2", "--network", "5g"], "unknown network '5g'; known: 100gbe, 10gbe, 1gbe"),
        (["--network", "1gbe"], "give --gpus too"),
        (["--link", "usb"], "unknown link 'usb'; known: pcie5, pcie4, pcie3, 100gbe, 10gbe, 1gbe"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys) -> None:
    assert main(["profile", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
