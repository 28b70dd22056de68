"""Machines of several GPUs: what the GPUs of a node share, what joins nodes, and links by name. Each number has its
source, as in cards.py.

Ranks of a node are in step: they ask for the host, for a switch and for the network at the same moment, so that each
gets its share. Where they are not, the time told is an upper bound.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from meft_bench.simulate.cards import Card, Constant, Host


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How the GPUs of a node hang together, and the nodes."""

    switches: Constant
    """PCIe switches of a node; the GPUs behind one share its way to the host. GPUs are spread over switches evenly."""
    fabric: Constant
    """Between GPUs of a node, bytes/s each way of a GPU, as a collective's bus bandwidth counts them."""
    nvlink: bool
    """Whether that is NVLink; else peers cross PCIe, on the way that also leads to the host."""
    network: Constant
    """Between nodes, bytes/s each way of a node."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A host with GPUs of one kind, and what joins it to others."""

    card: Card
    host: Host
    wiring: Wiring

    def sharers(self, gpus: int) -> int:
        """GPUs that share the busiest switch's way to the host when so many of the node work."""
        return math.ceil(gpus / int(self.wiring.switches.value))

    def card_of(self, gpus: int) -> Card:
        """The card as each of so many GPUs sees it: its link is its share of the switch's."""
        return _linked(self.card, 1 / self.sharers(gpus))

    def host_of(self, gpus: int) -> Host:
        """The host as each of so many GPUs sees it: its share of cores and of memory bandwidth."""
        if gpus == 1:
            return self.host
        rates: dict[str, Any] = {
            name: rate._replace(value=rate.value / gpus)
            for name in ("product_rate", "dot_rate", "search_rate", "element_rate", "bandwidth", "fresh_bandwidth")
            if isinstance(rate := getattr(self.host, name), Constant)
        }
        return dataclasses.replace(self.host, **rates)


def node(card: Card, host: Host, across: str = "100gbe", way: "Link | None" = None) -> Node:
    """The usual node of such cards around this host; across: the network between nodes; way: what stands between each
    card and the host memory, in place of the card's own link."""
    nvlink = {"a100": _NVLINK_3, "80gb": _NVLINK_3, "h100": _NVLINK_4, "h200": _NVLINK_4}.get(card.name.lower())
    linked = card if way is None else way.on(card)
    # Cards reach each other through their slots, also where host memory is another machine's, behind a network.
    slot = card if way is not None and way.name in NETWORKS else linked
    fabric = nvlink or Constant(slot.d2h_pinned.value, "B/s", "the card's own PCIe link, no NVLink")
    switches = _DESKTOP if host.name == "desktop" else _SWITCHES
    wiring = Wiring(switches=switches, fabric=fabric, nvlink=nvlink is not None, network=network(across))
    return Node(card=linked, host=host, wiring=wiring)


def usual_host(card: Card) -> str:
    """Name of the host that such cards usually share."""
    return "two-socket-ddr5" if card.name.lower().partition("-")[0] in ("h100", "h200") else "two-socket"


HOST_GIB = {"desktop": 64.0, "server": 256.0, "two-socket": 1024.0, "two-socket-ddr5": 2048.0}
"""Memory of each host where nobody says otherwise: the DGX A100's least and the DGX H100's for two sockets."""


_SWITCHES = Constant(4, "switches", "NVIDIA DGX A100 user guide: eight GPUs on four PCIe switches; assumed elsewhere")
_DESKTOP = Constant(1, "switches", "assumed: a desktop processor has 16 lanes for all of its cards")
_NVLINK_3 = Constant(230e9, "B/s", "reported: bus bandwidth of NCCL's all-gather on 8 A100 (300 GB/s each way)")
_NVLINK_4 = Constant(360e9, "B/s", "reported: bus bandwidth of NCCL's all-gather on 8 H100 (450 GB/s each way)")
_ETHERNET = "assumed: 95 % of the line's rate, the rest is frames and TCP/IP headers"
NETWORKS = {
    "100gbe": Constant(0.95 * 12.5e9, "B/s", _ETHERNET),
    "10gbe": Constant(0.95 * 1.25e9, "B/s", _ETHERNET),
    "1gbe": Constant(0.95 * 0.125e9, "B/s", _ETHERNET),
}
"""Networks by name, bytes/s each way."""


# ---- one card's link to its host, by name ----


@dataclass(frozen=True, kw_only=True)
class Link:
    """What stands between a card and the host memory it trains from."""

    name: str
    title: str
    pinned: Constant
    """Bytes/s of large copies each way, from page-locked memory."""
    pageable: Constant
    latency: Constant
    """Seconds that each copy takes besides its bytes."""

    def on(self, card: Card) -> Card:
        """The card behind this link."""
        title = f"{card.title}, {self.title}"
        return _renamed(card, self.name, title, self.pinned, self.pageable, self.latency)


def link(name: str) -> Link:
    """The link of that name, in any case. Raises ValueError, listing what is known, for any other."""
    found = LINKS.get(str(name).strip().lower())
    if found is None:
        raise ValueError(f"unknown link {name!r}; known: {', '.join(LINKS)}")
    return found


def network(name: str) -> Constant:
    """Bytes/s each way of that network. Raises ValueError, listing what is known, for any other."""
    found = NETWORKS.get(str(name).strip().lower())
    if found is None:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return found


def _pcie(name: str, title: str, pinned: float, pageable: float, source: str) -> Link:
    return Link(name=name, title=title, pinned=Constant(pinned, "B/s", source),
                pageable=Constant(pageable, "B/s", "as cards.py for PCIe 4 and 5; assumed for PCIe 3"),
                latency=Constant(10e-6, "s", "assumed"))  # fmt: skip


def _ethernet(name: str, title: str, latency: float) -> Link:
    line = NETWORKS[name]
    return Link(name=name, title=title, pinned=line, pageable=line,
                latency=Constant(latency, "s", "assumed: one way of a small message"))  # fmt: skip


LINKS = {
    made.name: made
    for made in (
        _pcie("pcie5", "PCIe 5", 55e9, 15e9, "reported for PCIe 5.0 x16 (H200): 55 GB/s"),
        _pcie("pcie4", "PCIe 4", 25e9, 12e9, "reported for PCIe 4.0 x16: 24 to 27 GB/s"),
        _pcie("pcie3", "PCIe 3", 12.5e9, 8e9, "reported for PCIe 3.0 x16: 12 to 13 GB/s"),
        _ethernet("100gbe", "100 GbE", 20e-6),
        _ethernet("10gbe", "10 GbE", 30e-6),
        _ethernet("1gbe", "1 GbE", 50e-6),
    )
}
"""From the fastest to the slowest of their kind. Over a network host memory is another machine's: the same bytes cross
at the network's speed and latency."""


def unlimited(card: Card) -> Card:
    """The card as if its link took no time, against which the others are held."""
    free = Constant(1e18, "B/s", "a link that takes no time")
    none = Constant(0.0, "s", "a link that takes no time")
    title = f"{card.title}, a link that takes no time"
    return _renamed(card, "unlimited", title, free, free, none)


def _renamed(card: Card, name: str, title: str, pinned: Constant, pageable: Constant, latency: Constant) -> Card:
    return dataclasses.replace(
        card, name=f"{card.name}-{name}", title=title, h2d_pinned=pinned, d2h_pinned=pinned, h2d_pageable=pageable,
        d2h_pageable=pageable, copy_latency=latency,
    )  # fmt: skip


def _linked(card: Card, share: float) -> Card:
    if share == 1:
        return card
    rates: dict[str, Any] = {
        name: rate._replace(value=rate.value * share)
        for name in ("h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable")
        if isinstance(rate := getattr(card, name), Constant)
    }
    return dataclasses.replace(card, **rates)
