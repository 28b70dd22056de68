"""Cards, classes and hosts: complete, plausible, sourced; unknown names say what is known."""

import dataclasses
import math

import pytest

from meft_bench.simulate.cards import CARDS, GIB, HOSTS, Card, Constant, Host, card, constants, host, nearest

EVERY = [*CARDS.values(), *HOSTS.values()]


@pytest.mark.parametrize("owner", EVERY, ids=lambda o: o.name)
def test_every_constant_is_positive_and_has_a_source(owner: Card | Host) -> None:
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if field.name not in ("name", "title"):
            assert isinstance(value, Constant) and 0 < value.value < math.inf and value.unit and value.source


@pytest.mark.parametrize("one", CARDS.values(), ids=lambda c: c.name)
def test_a_card_offers_less_than_its_nominal_memory(one: Card) -> None:
    assert 0.92 < one.usable_bytes.value / one.memory_bytes.value < 1
    assert one.context_bytes.value < GIB
    assert max(one.half_share.value, one.full_share.value, one.bandwidth_share.value) < 1
    assert one.half_rate.value > one.full_rate.value
    for way in ("h2d", "d2h"):
        assert getattr(one, f"{way}_pageable").value < getattr(one, f"{way}_pinned").value < one.bandwidth.value


@pytest.mark.parametrize("one", [c for c in CARDS.values() if c.name.endswith("GB")], ids=lambda c: c.name)
def test_a_class_has_its_nominal_size_and_names_whose_speeds_it_takes(one: Card) -> None:
    assert one.memory_bytes.value == int(one.name.removesuffix("GB")) * GIB
    assert "speeds" in one.title


def test_the_24gb_class_offers_what_such_cards_report() -> None:
    assert card("24GB").usable_bytes.value / GIB == pytest.approx(23.64)
    assert card("24GB").half_rate == card("rtx3090").half_rate


@pytest.mark.parametrize("name", ["24gb", "24GB", " 24Gb ", "RTX3090", "h200"])
def test_names_in_any_case(name: str) -> None:
    assert card(name).name.lower() == name.strip().lower()


@pytest.mark.parametrize("name", ["24", "0GB", "25GB", "-24GB", "", "rtx5090", "24 GB"])
def test_an_unknown_card_lists_what_is_known(name: str) -> None:
    with pytest.raises(ValueError, match="unknown card .*known: 12GB, 16GB, 24GB, 48GB, 80GB, rtx3090, .*h200"):
        card(name)


def test_an_unknown_host_lists_what_is_known() -> None:
    assert host("Desktop").name == "desktop"
    with pytest.raises(ValueError, match="unknown host 'laptop'; known: desktop, server"):
        host("laptop")


def test_constants_list_every_number_of_card_and_host() -> None:
    listed = constants(card("a40"), host("server"))
    assert listed["card.bandwidth"] == {"value": 696e9, "unit": "B/s", "source": "NVIDIA A40 data sheet"}
    assert listed["host.overhead"]["unit"] == "s"
    assert len(listed) == len(dataclasses.fields(Card)) + len(dataclasses.fields(Host)) - 4


def test_a_gpus_name_says_its_card_and_else_its_memory_the_class() -> None:
    gib = 2**30
    found = {
        ("NVIDIA GeForce RTX 3090", 24): "rtx3090", ("NVIDIA H100 80GB HBM3", 80): "h100", ("NVIDIA A40", 45): "a40",
        ("NVIDIA A100-SXM4-80GB", 80): "a100", ("NVIDIA H200", 140): "h200", ("NVIDIA GeForce RTX 4090", 24): "rtx4090",
        ("NVIDIA RTX A4000", 16): "16GB", ("NVIDIA GeForce RTX 4090 Laptop GPU", 16): "16GB", ("", 23): "24GB",
        ("NVIDIA GeForce RTX 4090 D", 24): "24GB", ("NVIDIA GeForce RTX 3090 Ti", 24): "24GB",
        ("NVIDIA A100-PCIE-40GB", 40): "48GB", ("NVIDIA A100-SXM4-40GB", 40): "48GB", ("NVIDIA H100 PCIe", 80): "80GB",
        ("NVIDIA H100 NVL", 94): "80GB", ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10): "12GB",
        ("NVIDIA A40-8Q", 8): "12GB", ("", 13): "16GB", ("", 20): "24GB", ("", 30): "48GB", ("", 900): "80GB",
    }  # fmt: skip
    for (name, size), wanted in found.items():
        assert nearest(name, size * gib).name == wanted, name
