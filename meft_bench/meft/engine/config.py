"""EngineConfig: where rows live, how they cross and what is done beside what. Each option is documented here once."""

from dataclasses import dataclass

from meft_bench.fields import Choice, Flag, Maybe, Whole, check_table
from meft_bench.flags import kinds, setting


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one MEFT adapter is computed (docs/engine.md). The defaults are exact: they change speed and bytes, and no
    number. Raises ValueError for choices that do not go together."""

    placement: str = setting(
        Choice(("host", "device")),
        '"host": rows, gradients and moments in host memory. "device": all resident, for reference.',
        "host",
    )
    device_budget: int = setting(
        Whole(0, 2**62),
        "Bytes of device memory for what stays there, over all layers. It buys, in this order, the router, keys to "
        "select with (retrieval), and rows with their gradients, moments and AdamW, those used most (without moments "
        "and AdamW where there are several ranks). 0 sends S in every micro-batch, as the paper does; enough for "
        "everything makes a resident adapter (docs/engine.md).",
        0,
    )
    overlap: bool | None = setting(
        Maybe(Flag()),
        "Do the host's work in background threads, beside the device's and beside the next micro-batch; the same bits. "
        "None means on CUDA only: on a CPU both would share the cores.",
        None,
    )
    lookahead: int = setting(
        Whole(0),
        "Select a layer's neurons from the FFN input this many layers earlier (paper appendix A, pre-retrieval), so "
        "that the host works ahead. 0 is exact.",
        0,
    )
    scoring: str = setting(
        Choice(("fp32", "bf16", "int8")),
        'Keys that are scored: "fp32", or a "bf16" or "int8" (scaled per row) copy of them. Rows that move are exact. '
        'With "bf16" and Key-Experts the host rounds hidden states to bf16 too.',
        "fp32",
    )
    retrieval: str = setting(
        Choice(("auto", "host", "device")),
        'Where neurons are selected. "device": there, from a copy of all keys in the format of the wire (int8 with '
        'scoring="int8" or without Key-Experts), so that no hidden states cross. "auto": there where device_budget '
        'holds the keys (int8 with scoring="int8" alone), else on the "host".',
        "auto",
    )
    wire: str = setting(
        Choice(("model", "bf16")),
        'Number format of rows and gradients that cross: the "model"\'s own, or "bf16".',
        "model",
    )
    moments: str = setting(
        Choice(("fp32", "bf16")), 'Adam\'s moments: "fp32" or "bf16" (with stochastic rounding).', "fp32"
    )

    def __post_init__(self) -> None:
        check_table(kinds(type(self)), self)  # with the fields of MeftOptions, where it is one
        if self.placement == "device":
            for name in ("device_budget", "lookahead"):
                if getattr(self, name):
                    raise ValueError(f"placement='device' keeps every row on the device: leave {name} at 0")
            if self.retrieval == "device":
                raise ValueError("placement='device' searches where the rows are: leave retrieval at 'auto'")
