"""GPU cards, card classes and hosts: what they hold and how fast they are, each number with where it is from.

A card class ("24GB") is every card of that nominal size; its speeds are those of one representative, which its title
names. Sources: a vendor's data sheet, "reported" (published by others), "measured" (by `profile --calibrate`), or
"assumed".
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

GIB = 2**30
_USABLE_SHARE = 0.985
_MAKERS_WORDS = {"nvidia", "geforce", "sxm", "sxm4", "sxm5", "hbm2e", "hbm3", "hbm3e"}
"""Words of a GPU's name that the known cards have beside their own and their memory's size."""


class Constant(NamedTuple):
    """A number with its unit and where it is from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU with its link to the host. Rates are peaks; the shares say how much of a peak real kernels reach."""

    name: str
    title: str
    memory_bytes: Constant
    """Nominal."""
    usable_bytes: Constant
    """What the driver reports as total."""
    context_bytes: Constant
    """Taken by the CUDA context and library handles before the first tensor."""
    half_rate: Constant
    """Dense bf16 products with fp32 sums, FLOP/s."""
    full_rate: Constant
    """fp32 products without TF32 (torch's default), FLOP/s; also the rate of element-wise arithmetic."""
    bandwidth: Constant
    """Device memory, bytes/s."""
    h2d_pinned: Constant
    d2h_pinned: Constant
    h2d_pageable: Constant
    d2h_pageable: Constant
    """Link, bytes/s of large copies."""
    copy_latency: Constant
    """Seconds that each copy takes besides its bytes."""
    launch: Constant
    """Host seconds to issue one operation (torch's dispatch and the kernel launch)."""
    kernel: Constant
    """Least device seconds of one operation."""
    half_share: Constant
    full_share: Constant
    bandwidth_share: Constant


@dataclass(frozen=True, kw_only=True)
class Host:
    """The CPU and its memory. Rates are what torch reaches, not peaks."""

    name: str
    title: str
    product_rate: Constant
    """fp32 matrix products, FLOP/s, all cores."""
    dot_rate: Constant
    """fp32 products of hidden states and chosen rows (the search over candidates), FLOP/s. Rows that many tokens share
    come from cache, the others from memory."""
    search_rate: Constant
    """MEFT's search kernel: fp32 products of hidden states with the keys of probed experts, FLOP/s, all cores."""
    element_rate: Constant
    """Elements/s of operations that look at one element at a time: topk, marking, masking."""
    bandwidth: Constant
    """Streaming reads and writes, bytes/s."""
    fresh_bandwidth: Constant
    """Copies into pages fresh from the kernel, bytes/s read and written: results above 32 MiB, which malloc does not
    reuse."""
    overhead: Constant
    """Seconds that each operation takes besides its work."""


def card(name: str) -> Card:
    """The card or class of that name, in any case. Raises ValueError, listing what is known, for any other."""
    return _find(name, CARDS, "card")


def host(name: str) -> Host:
    """The host of that name, in any case. Raises ValueError, listing what is known, for any other."""
    return _find(name, HOSTS, "host")


def named(gpu: str) -> Card | None:
    """The card that a GPU's name says ("NVIDIA GeForce RTX 3090"); None for one that is not known."""
    # Whole words: an A4000 is no A40. Any other word tells another chip, or a part of one (Laptop, Ti, D, PCIe, NVL,
    # MIG), which has neither the speed nor the memory of the card whose name it bears.
    words = set(gpu.lower().replace("rtx ", "rtx").replace("-", " ").split()) - _MAKERS_WORDS
    for name, known in CARDS.items():
        size = f"{known.memory_bytes.value / GIB:.0f}gb"
        if not name.endswith("gb") and name in words and words <= {name, size}:
            return known
    return None


def nearest(gpu: str, nbytes: int) -> Card:
    """named(gpu), else the smallest class that has nbytes of memory, and beyond all of them the largest."""
    classes = sorted((c for name, c in CARDS.items() if name.endswith("gb")), key=lambda c: c.memory_bytes.value)
    return named(gpu) or next((c for c in classes if c.memory_bytes.value >= nbytes), classes[-1])


def constants(card: Card, host: Host) -> dict[str, dict[str, Any]]:
    """{"card.bandwidth": {"value", "unit", "source"}, ...}: every number that a simulated time or fit rests on."""
    return {
        f"{kind}.{field.name}": getattr(owner, field.name)._asdict()
        for kind, owner in (("card", card), ("host", host))
        for field in dataclasses.fields(owner)
        if isinstance(getattr(owner, field.name), Constant)
    }


def _find(name: str, known: dict[str, Any], what: str) -> Any:
    found = known.get(str(name).strip().lower())
    if found is None:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(v.name for v in known.values())}")
    return found


# ---- what all cards share ----

_ASSUMED = "assumed"
_CONTEXT = Constant(
    512 * 2**20, "bytes", "assumed: context 300 to 500 MB by driver and card, and cuBLAS's handle and workspace"
)
_SHARES = {
    "half_share": Constant(0.75, "1", "assumed: large products usually reach 0.65 to 0.9 of the dense peak"),
    "full_share": Constant(0.8, "1", _ASSUMED),
    "bandwidth_share": Constant(0.85, "1", "assumed: streaming kernels usually reach 0.8 to 0.92 of the peak"),
}
_HOPPER_SHARES = {
    **_SHARES,
    "half_share": Constant(0.8, "1", "reported: torch multiplies 8192 x 8192 bf16 matrices at 788 to 798 TFLOP/s"),
    "bandwidth_share": Constant(0.9, "1", "reported: torch copies at 3.0 TB/s on H100 and 4.3 TB/s on H200"),
}
_OVERHEADS = {
    "context_bytes": _CONTEXT,
    "copy_latency": Constant(10e-6, "s", _ASSUMED),
    "launch": Constant(6e-6, "s", "assumed: torch's dispatcher and one kernel launch from Python"),
    "kernel": Constant(2e-6, "s", _ASSUMED),
}
_PCIE = {
    4: {
        "h2d_pinned": Constant(25e9, "B/s", "reported for PCIe 4.0 x16: 24 to 27 GB/s"),
        "d2h_pinned": Constant(25e9, "B/s", "reported for PCIe 4.0 x16: 24 to 27 GB/s"),
        "h2d_pageable": Constant(12e9, "B/s", "reported for PCIe 4.0 x16: 9 to 18 GB/s, by the host's memory"),
        "d2h_pageable": Constant(12e9, "B/s", "reported for PCIe 4.0 x16: 9 to 18 GB/s, by the host's memory"),
    },
    5: {
        "h2d_pinned": Constant(55e9, "B/s", "reported for PCIe 5.0 x16 (H200): 55 GB/s"),
        "d2h_pinned": Constant(55e9, "B/s", "reported for PCIe 5.0 x16 (H200): 55 GB/s"),
        "h2d_pageable": Constant(15e9, "B/s", "assumed: the host's staging copy is the limit, as on PCIe 4.0"),
        "d2h_pageable": Constant(15e9, "B/s", "assumed: the host's staging copy is the limit, as on PCIe 4.0"),
    },
}


class _Chip(NamedTuple):
    """Vendor figures of one GPU."""

    half_rate: float
    full_rate: float
    bandwidth: float
    pcie: int
    source: str


_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper"
_ADA = "NVIDIA Ada GPU architecture whitepaper"
_RTX3060 = _Chip(
    25.5e12,
    12.7e12,
    360e9,
    4,
    "NVIDIA GeForce RTX 3060 specifications (3584 cores, 1.78 GHz, 192-bit GDDR6); "
    "bf16 with fp32 sums is twice fp32 on GeForce Ampere",
)
_RTX4080 = _Chip(97.5e12, 48.7e12, 716.8e9, 4, _ADA)
_RTX3090 = _Chip(71e12, 35.6e12, 936e9, 4, _AMPERE)
_RTX4090 = _Chip(165.2e12, 82.6e12, 1008e9, 4, _ADA)
_A40 = _Chip(149.7e12, 37.4e12, 696e9, 4, "NVIDIA A40 data sheet")
_A100 = _Chip(312e12, 19.5e12, 2039e9, 4, "NVIDIA A100 data sheet, 80 GB SXM")
_H100 = _Chip(989.4e12, 66.9e12, 3350e9, 5, "NVIDIA H100 data sheet, SXM, dense")
_H200 = _Chip(989.4e12, 66.9e12, 4800e9, 5, "NVIDIA H200 data sheet, SXM, dense")

_REPORTED_TOTAL = "reported: total capacity in torch's out-of-memory messages on such cards"
_CLASS_TOTAL = "assumed: 98.5 % of nominal, as cards without ECC report (24 GiB cards: 23.6 to 23.7 GiB)"


def _card(name: str, title: str, gib: float, usable_gib: float | None, chip: _Chip) -> Card:
    usable = gib * _USABLE_SHARE if usable_gib is None else usable_gib
    return Card(
        name=name,
        title=title,
        memory_bytes=Constant(round(gib * GIB), "bytes", chip.source if usable_gib else "nominal size of the class"),
        usable_bytes=Constant(round(usable * GIB), "bytes", _CLASS_TOTAL if usable_gib is None else _REPORTED_TOTAL),
        half_rate=Constant(chip.half_rate, "FLOP/s", chip.source),
        full_rate=Constant(chip.full_rate, "FLOP/s", chip.source),
        bandwidth=Constant(chip.bandwidth, "B/s", chip.source),
        **_PCIE[chip.pcie],
        **_OVERHEADS,
        **(_HOPPER_SHARES if chip.pcie == 5 else _SHARES),
    )


# Representatives: the 12 GB card most people have, the 16 GB one with bf16 and all 16 PCIe lanes (T4 has no bf16, RTX
# 4060 Ti 8 lanes), the paper's own RTX 3090 and the data-centre cards of their size.
CARDS = {
    c.name.lower(): c
    for c in (
        _card("12GB", "12 GB class (RTX 3060 speeds)", 12, None, _RTX3060),
        _card("16GB", "16 GB class (RTX 4080 speeds)", 16, None, _RTX4080),
        _card("24GB", "24 GB class (RTX 3090 speeds)", 24, None, _RTX3090),
        _card("48GB", "48 GB class (A40 speeds)", 48, None, _A40),
        _card("80GB", "80 GB class (A100 SXM speeds)", 80, None, _A100),
        _card("rtx3090", "GeForce RTX 3090", 24, 23.69, _RTX3090),
        _card("rtx4090", "GeForce RTX 4090", 24, 23.64, _RTX4090),
        _card("a40", "A40, ECC on", 48, 44.56, _A40),
        _card("a100", "A100 80 GB SXM", 80, 79.15, _A100),
        _card("h100", "H100 80 GB SXM", 80, 79.1, _H100),
        _card("h200", "H200 141 GB SXM", 141, 139.8, _H200),
    )
}

CLASSES = tuple(c for c in CARDS.values() if c.title.endswith("speeds)"))
"""A card for each memory size."""

_PER_CORE = "assumed: for each core what `profile --calibrate` measured on one of an AMD EPYC"
_SEARCH = "assumed: the rate of products; measured, the search is faster than products of the library by expert"
_DOTS = "assumed: bound by memory (2 FLOP for 4 bytes), half of the rows from cache"
HOSTS = {
    h.name: h
    for h in (
        Host(
            name="desktop",
            title="desktop, 8 cores, two channels of DDR4-3200",
            product_rate=Constant(400e9, "FLOP/s", "assumed: 8 AVX2 cores at 4 GHz reach 40 % of 1 TFLOP/s"),
            dot_rate=Constant(46e9, "FLOP/s", _DOTS),
            search_rate=Constant(400e9, "FLOP/s", _SEARCH),
            element_rate=Constant(8 * 0.1e9, "1/s", _PER_CORE),
            bandwidth=Constant(46e9, "B/s", "reported for two channels of DDR4-3200: 46 GB/s (peak 51.2)"),
            fresh_bandwidth=Constant(12e9, "B/s", "assumed: a page fault of 0.25 us per 4 KiB beside the copy"),
            overhead=Constant(3e-6, "s", _ASSUMED),
        ),
        Host(
            name="server",
            title="server, 32 cores, eight channels of DDR4-3200",
            product_rate=Constant(1.2e12, "FLOP/s", "assumed: 32 AVX2 cores at 2.9 GHz reach 40 % of 3 TFLOP/s"),
            dot_rate=Constant(164e9, "FLOP/s", _DOTS),
            search_rate=Constant(1.2e12, "FLOP/s", _SEARCH),
            element_rate=Constant(32 * 0.1e9, "1/s", _PER_CORE),
            bandwidth=Constant(164e9, "B/s", "assumed: 80 % of the 204.8 GB/s peak of eight channels"),
            fresh_bandwidth=Constant(24e9, "B/s", "assumed: as the desktop, and faults of two threads at a time"),
            overhead=Constant(3e-6, "s", _ASSUMED),
        ),
        Host(
            name="two-socket",
            title="two sockets, 128 cores, 16 channels of DDR4-3200",
            product_rate=Constant(3.7e12, "FLOP/s", "assumed: 128 AVX2 cores at 2.25 GHz reach 40 % of 9.2 TFLOP/s"),
            dot_rate=Constant(328e9, "FLOP/s", _DOTS),
            search_rate=Constant(3.7e12, "FLOP/s", _SEARCH),
            element_rate=Constant(128 * 0.1e9, "1/s", _PER_CORE),
            bandwidth=Constant(
                328e9, "B/s", "assumed: 80 % of the 409.6 GB/s peak of sixteen channels, rows spread over both sockets"
            ),
            fresh_bandwidth=Constant(48e9, "B/s", "assumed: twice the server, one socket each"),
            overhead=Constant(3e-6, "s", _ASSUMED),
        ),
        Host(
            name="two-socket-ddr5",
            title="two sockets, 112 cores, 16 channels of DDR5-4800",
            product_rate=Constant(5.7e12, "FLOP/s", "assumed: 112 AVX-512 cores at 2.0 GHz reach 40 % of 14.3 TFLOP/s"),
            dot_rate=Constant(491e9, "FLOP/s", _DOTS),
            search_rate=Constant(5.7e12, "FLOP/s", _SEARCH),
            element_rate=Constant(112 * 0.1e9, "1/s", _PER_CORE),
            bandwidth=Constant(
                491e9, "B/s", "assumed: 80 % of the 614.4 GB/s peak of sixteen channels, rows spread over both sockets"
            ),
            fresh_bandwidth=Constant(48e9, "B/s", "assumed: twice the server, one socket each"),
            overhead=Constant(3e-6, "s", _ASSUMED),
        ),
    )
}
