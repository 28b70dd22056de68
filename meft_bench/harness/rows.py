"""The lines of the comparison: methods with fixed choices, and the options of each at a size.

Written out, with every default filled in, so that a plan needs neither torch nor a model.
"""

from dataclasses import dataclass
from typing import Any

from meft_bench.harness.sizes import SIZES
from meft_bench.meft.config import PRESETS, MeftOptions
from meft_bench.train.contract import describe


@dataclass(frozen=True)
class Row:
    """A line of the comparison: a method with fixed choices; what makes it larger the method tells."""

    title: str
    method: str
    options: dict[str, Any]
    updated: float | None = None
    """Of MEFT with distinctive updates: t, as a share of R."""

    @property
    def size(self) -> str | None:
        """The option that makes it larger; None where it has one size."""
        return describe(self.method).size

    @property
    def only_share(self) -> str | None:
        """The nominal size of a method that has but one."""
        about = describe(self.method)
        return "0%" if about.untrained else "100%" if about.trains_base else None


ROWS = {
    "base": Row("Base model", "base", {}),
    "lora": Row("LoRA, attention q v (alpha 16)", "lora", {"targets": "attention", "alpha": "fixed"}),
    "lora_alpha_rank": Row("LoRA, attention q v (alpha 2r)", "lora", {"targets": "attention", "alpha": "rank"}),
    "lora_ffn": Row("LoRA, FFN (alpha 16)", "lora", {"targets": "ffn", "alpha": "fixed"}),
    "lora_all": Row("LoRA, all linear (alpha 16)", "lora", {"targets": "all", "alpha": "fixed"}),
    "adapter_h": Row("AdapterH", "adapter_h", {"start": "normal"}),
    "adapter_h_identity": Row("AdapterH, identity start", "adapter_h", {"start": "identity"}),
    "parallel_adapter": Row("Parallel Adapter (ReLU)", "parallel_adapter", {"activation": "relu"}),
    "parallel_adapter_silu": Row("Parallel Adapter (SiLU)", "parallel_adapter", {"activation": "silu"}),
    "parallel_adapter_offload": Row(
        "Parallel Adapter, offloaded whole", "parallel_adapter_offload", {"activation": "relu"}
    ),
    "meft": Row("MEFT", "meft", {}),
    "meft_no_ke": Row("MEFT without Key-Experts", "meft", {"key_experts": False}),
    "full": Row("Full fine-tuning", "full", {}),
}
TABLE_ROWS = tuple(ROWS)
"""The rows of the paper's Table 1, and of ours in every suite: they need sizes for each of its models. Below are the
peers and the ablations."""
PEERS = {
    "adapter_h_spread": Row("AdapterH, start as wide as MEFT's", "adapter_h", {"start": "spread"}),
    "galore": Row("Full fine-tuning, GaLore", "galore", {"rank": 32, "every": 50, "scale": 0.25}),
    "lsp_offload": Row(
        "LSP-Offload, d = 64",
        "lsp_offload",
        {"subspace": 64, "nonzeros": 4, "every": 50, "threshold": 0.5, "rounds": 50},
    ),
    "product_keys": Row("Product-key memory", "product_keys", {"heads": 4, "kept": 8, "key_width": 8}),
    "adalomo": Row("Full fine-tuning, AdaLomo", "adalomo", {}),
    "shira": Row("SHiRA, all linear (random mask)", "shira", {"targets": "all", "mask": "random"}),
}
"""Other ways to train much with little, which the paper does not compare with, and AdapterH from a start as wide as
MEFT's and the Parallel Adapter's keys; in Table 1 of the full suite alone, at 10 % of the embedded model where they
have a size."""
ROWS |= PEERS
FIGURE6_KEPT = {"10%": (2, 4, 16, 32, 104), "40%": (4, 12, 64, 416)}
"""K of the sweep without Key-Experts; the last is R: every neuron is used. K = 8 at 10 % and 16 at 40 % are meft_no_ke
itself."""
FIGURE7_EXPERTS = (4, 8, 32, 48, 96)
"""N of the sweep at R = 96; 24 candidates a token throughout, so P = N / 4. N = 16 is meft itself."""
ROWS |= {
    "meft_gate_none": Row("MEFT, router only selects (no gate)", "meft", {"gate": "none"}),
    "meft_gate_no_search": Row("MEFT, gate but no search (P = N)", "meft", {"probed": 16}),
    "meft_softmax": Row("MEFT, softmax gate", "meft", {"gate": "softmax"}),
    "meft_union": Row("MEFT, union reading", "meft", {"reading": "union"}),
    "meft_lazy": Row("MEFT, lazy Adam", "meft", {"adam": "lazy"}),
    "meft_init_x50": Row("MEFT, router init mean key x50", "meft", {"router_init": "mean_key_x50"}),
    "meft_init_normal": Row("MEFT, router init normal", "meft", {"router_init": "normal"}),
    "meft_frozen_keys": Row("MEFT, frozen keys", "meft", {"frozen_keys": True}),
    "meft_released": Row("MEFT, preset released", "meft", PRESETS["released"]),
    "meft_paper": Row("MEFT, preset paper", "meft", PRESETS["paper"]),
}
ENGINE_ROWS = {
    "meft_int8": Row("MEFT, int8 keys for scoring", "meft", {"scoring": "int8"}),
    "meft_lookahead": Row("MEFT, selected one layer early", "meft", {"lookahead": 1}),
    "meft_bf16_moments": Row("MEFT, moments in bf16", "meft", {"moments": "bf16"}),
    "meft_no_ke_device": Row(
        "MEFT without Key-Experts, int8 keys on the device", "meft", {"key_experts": False, "retrieval": "device"}
    ),
}
"""What the engine's options that are not exact cost in quality."""
ROWS |= ENGINE_ROWS
ROWS |= {
    f"meft_no_ke_k{k}": Row(f"MEFT without Key-Experts, K = {k}", "meft", {"key_experts": False, "kept": k})
    for k in sorted({k for ks in FIGURE6_KEPT.values() for k in ks})
}
ROWS |= {f"meft_n{n}": Row(f"MEFT, N = {n}", "meft", {"experts": n, "probed": n // 4}) for n in FIGURE7_EXPERTS}
ROWS |= {
    "meft_few_experts": Row("MEFT, N = 46, P = 1", "meft", {"experts": 46, "probed": 1}),
    "meft_no_ke_all": Row("MEFT without Key-Experts, K = R = 8464", "meft", {"key_experts": False, "kept": 8464}),
}
"""At R = 8464 alone: 184 candidates a token, as with N = 368 and P = 8; and every neuron."""
ROWS |= {
    "meft_distinctive": Row("MEFT, most distinctive quarter updated", "meft", {}, updated=0.25),
    "meft_distinctive_half": Row("MEFT, most distinctive half updated", "meft", {}, updated=0.5),
}
"""Of the suite frontier, which tries several rates of each."""
HEADLINE = ("lora", "adapter_h", "parallel_adapter", "meft")
SAME_SIZES = {
    "lora_alpha_rank": "lora",
    "adapter_h_identity": "adapter_h",
    "adapter_h_spread": "adapter_h",
    "parallel_adapter_silu": "parallel_adapter",
    "parallel_adapter_offload": "parallel_adapter",
}


def row_options(row: str, share: str, model: str) -> dict[str, Any]:
    """Options of a row at a size, complete: its own where its method has no size. Raises ValueError when the size is
    not listed for the model."""
    without_ke = row.startswith("meft_no_ke")
    like = ("meft_no_ke" if without_ke else "meft") if ROWS[row].method == "meft" else SAME_SIZES.get(row, row)
    sizes = SIZES.get(model, {}).get(like, {})
    size = ROWS[row].size
    if ROWS[row].only_share or size is None:
        return dict(ROWS[row].options)
    if share not in sizes:
        raise ValueError(f"no size {share} of {row} for {model}; listed: {', '.join(sizes) or 'none'}")
    if ROWS[row].method == "meft":
        own = dict(zip(("neurons", "kept") if without_ke else ("neurons", "experts", "probed", "kept"), sizes[share],
                       strict=True))  # fmt: skip
        if (updated := ROWS[row].updated) is not None:
            own["distinctive"] = round(updated * own["neurons"])
        return MeftOptions(**{**own, **ROWS[row].options}).to_dict()
    return {size: sizes[share], **ROWS[row].options}


# Rows that take another row's swept rate, and why: the same mathematics (offloaded), the row that they change (the
# engine's options), or, for the sweeps over K and N, one rate for the whole curve as in the paper.
RATE_OF = {"parallel_adapter_offload": "parallel_adapter"}
RATE_OF |= {f"meft_n{n}": "meft" for n in FIGURE7_EXPERTS}
RATE_OF |= {row: "meft_no_ke" for row in ROWS if row.startswith("meft_no_ke_k")}
RATE_OF |= {row: "meft_no_ke" if row.startswith("meft_no_ke") else "meft" for row in ENGINE_ROWS}


def rate_source(row: str) -> str | None:
    """The row whose swept rate this one takes; None for a row with a sweep of its own, or without training."""
    return RATE_OF.get(row)
