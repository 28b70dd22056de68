"""The matrix: every method that is profiled, as data, and how one becomes a trained model.

VARIANTS are simulated and measured, ON_A_GPU are measured alone (`meft-bench gpu`).

A nominal R gives each variant the size whose trainable parameters come nearest to a Parallel Adapter of R neurons, so
that lines of one table are equal in what they train.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meft_bench.bench.timed_step import move_all_rows
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import budget
from meft_bench.meft.sites import ADAPTER_NAME, decoder_layers
from meft_bench.profile.host_adamw import HostAdamW
from meft_bench.profile.optimizers import EightBitAdam
from meft_bench.profile.peers import CpuAdam, adam8bit, torchao_offload
from meft_bench.profile.quantised import quantise_base
from meft_bench.profile.shira import densely
from meft_bench.train.contract import OURS, describe
from meft_bench.train.counts import Counted
from meft_bench.train.methods import Attached, find_method

SIZES = (256, 1024, 3072, 6144, 8464, 32768)
"""R of the sweep; 3072, 6144 and 8464 are the paper's own."""
KEPT = 64
"""K of the paper; fewer where Key-Experts offer fewer candidates."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A line of the matrix."""

    name: str
    title: str
    family: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "own"
    """"own" (the method's), "adam8bit", "host", "host_gradients", "host_cpu_adam" or "torchao"."""
    budget: float = 0.0
    """MEFT: its device_budget, as a share of what a resident adapter takes (engine/budget.py)."""
    quantised: bool = False
    """A 4-bit base."""
    sparse: bool = True
    """MEFT: move the union's rows only; False moves all R."""
    engine: str = ""
    """An engine whose C++ hides its work: modelled by formula from the variant "parallel_adapter"."""
    modelled: str = ""
    """What stands for the real thing in the simulation; empty where the code that runs is the code that trains."""

    @property
    def option(self) -> str | None:
        """The method's option that sets its size; None where there is none."""
        return describe(self.method).size

    @property
    def untrained(self) -> bool:
        return describe(self.method).untrained

    @property
    def trains_base(self) -> bool:
        return describe(self.method).trains_base

    @property
    def on_host(self) -> bool:
        """Whether the method's state lies in host memory by itself, whatever the optimizer."""
        return describe(self.method).place == "host"

    @property
    def is_meft(self) -> bool:
        return self.method == OURS

    @property
    def exact(self) -> bool:
        """Whether it is dense AdamW with fp32 moments on a base that is not quantised."""
        own = self.options.get("adam", "dense") == "dense" and self.options.get("moments", "fp32") == "fp32"
        other = self.optimizer == "adam8bit" or describe(self.method).own_state
        return own and not self.quantised and not other

    @property
    def needs_union(self) -> bool:
        """Whether its numbers depend on U."""
        return self.is_meft and self.sparse


_BITSANDBYTES = "bitsandbytes' state layout and bytes; its kernel is not run"
_NF4 = "NF4 storage and one dequantised weight at a time, as bitsandbytes; its kernels are not run"
_GALORE = "a step that makes no projectors (by an SVD), as 199 of 200 are"
_LSP = "a step that learns no projectors, as 99 of 100 are at the least"
_DENSE = "the sum of matrix and entries without sparse tensors, which do not run there; its bytes are peft's"
_PA: dict[str, Any] = {"family": "adapter", "method": "parallel_adapter"}
_MEFT: dict[str, Any] = {"family": "meft", "method": "meft"}
_WITHOUT_KE: dict[str, Any] = {"key_experts": False}
_UNION: dict[str, Any] = {"reading": "union"}

VARIANTS = {
    v.name: v
    for v in (
        Variant(name="base", title="Base model, inference only", family="none", method="base"),
        Variant(name="lora_attention", title="LoRA, attention q v", family="lora", method="lora",
                options={"targets": "attention"}),
        Variant(name="lora_all", title="LoRA, all linear", family="lora", method="lora",
                options={"targets": "all"}),
        Variant(name="adapter_h", title="AdapterH", family="adapter", method="adapter_h"),
        Variant(name="parallel_adapter", title="Parallel Adapter", **_PA),
        Variant(name="parallel_adapter_adam8bit", title="Parallel Adapter, 8-bit Adam", optimizer="adam8bit",
                modelled=_BITSANDBYTES, **_PA),
        Variant(name="parallel_adapter_host_optimizer", title="Parallel Adapter, optimizer on the host",
                optimizer="host", **{**_PA, "family": "offload"}),
        Variant(name="parallel_adapter_host_optimizer_gradients",
                title="Parallel Adapter, optimizer and gradients on the host", optimizer="host_gradients",
                **{**_PA, "family": "offload"}),
        Variant(name="parallel_adapter_zero2", title="Parallel Adapter, ZeRO-2 offload", engine="zero2",
                **{**_PA, "family": "offload"}),
        Variant(name="parallel_adapter_zero3", title="Parallel Adapter, ZeRO-3 with parameter offload",
                engine="zero3", **{**_PA, "family": "offload"}),
        Variant(name="parallel_adapter_streamed", title="Parallel Adapter, streamed whole",
                **{**_PA, "family": "offload", "method": "parallel_adapter_offload"}),
        Variant(name="qlora", title="4-bit base, LoRA on all linear", family="quantised", method="lora",
                options={"targets": "all"}, quantised=True, modelled=_NF4),
        Variant(name="q4_parallel_adapter", title="4-bit base, Parallel Adapter", quantised=True, modelled=_NF4,
                **{**_PA, "family": "quantised"}),
        Variant(name="full", title="Full fine-tuning, AdamW", family="full", method="full"),
        Variant(name="full_lomo", title="Full fine-tuning, LOMO clipped by value", family="full", method="lomo",
                options={"clipping": "value"}),
        Variant(name="full_adalomo", title="Full fine-tuning, AdaLomo", family="full", method="adalomo"),
        Variant(name="full_galore", title="Full fine-tuning, GaLore", family="full", method="galore",
                options={"rank": 1024}, modelled=_GALORE),
        Variant(name="full_lsp_offload", title="LSP-Offload, d = 2048", family="offload", method="lsp_offload",
                options={"subspace": 2048, "rounds": 1}, modelled=_LSP),
        Variant(name="product_keys", title="Product-key memory", family="adapter", method="product_keys",
                options={"heads": 4, "kept": 32, "key_width": 64}),
        Variant(name="shira", title="SHiRA, all linear", family="adapter", method="shira", options={"targets": "all"},
                modelled=_DENSE),
        Variant(name="meft", title="MEFT", **_MEFT),
        *(Variant(name=f"meft_budget_{share}", title=f"MEFT, {share} % of a resident adapter's memory",
                  budget=share / 100, **_MEFT) for share in (10, 25, 50, 100)),
        Variant(name="meft_lazy", title="MEFT, lazy AdamW", options={"adam": "lazy"}, **_MEFT),
        Variant(name="meft_fast", title="MEFT, lazy AdamW, bf16 moments", options={"adam": "lazy", "moments": "bf16"},
                **_MEFT),
        Variant(name="meft_no_ke", title="MEFT without Key-Experts", options=_WITHOUT_KE, **_MEFT),
        Variant(name="meft_no_sparse", title="MEFT without sparse transfer", sparse=False, **_MEFT),
        Variant(name="meft_neither", title="MEFT without both", options=_WITHOUT_KE, sparse=False, **_MEFT),
        Variant(name="meft_union", title="MEFT, union reading", options=_UNION, **_MEFT),
        Variant(name="meft_union_no_ke", title="MEFT without Key-Experts, union reading",
                options={**_UNION, **_WITHOUT_KE}, **_MEFT),
        Variant(name="meft_union_no_sparse", title="MEFT without sparse transfer, union reading", options=_UNION,
                sparse=False, **_MEFT),
        Variant(name="meft_union_neither", title="MEFT without both, union reading",
                options={**_UNION, **_WITHOUT_KE}, sparse=False, **_MEFT),
    )
}  # fmt: skip
FAMILIES = ("adapter", "meft", "offload", "quantised", "lora", "full", "none")
"""Of the variants, in the order in which a profile makes them."""
PLAIN, WITHOUT_KE = "meft", "meft_no_ke"
"""MEFT as the paper has it, whose U is logged on a trained model, and with a search of all keys."""
_HOST = "Parallel Adapter, optimizer and gradients on the host"
ON_A_GPU = {
    v.name: v
    for v in (
        Variant(name="meft_serial", title="MEFT, nothing overlaps", options={"overlap": False}, **_MEFT),
        Variant(name="meft_keys_on_device", title="MEFT, keys searched on the device",
                options={"retrieval": "device"}, **_MEFT),
        Variant(name="meft_no_ke_on_device", title="MEFT without Key-Experts, keys searched on the device",
                options={"retrieval": "device", **_WITHOUT_KE}, **_MEFT),
        Variant(name="parallel_adapter_torchao", title="Parallel Adapter, optimizer on the host (torchao)",
                optimizer="torchao", **{**_PA, "family": "offload"}),
        Variant(name="parallel_adapter_cpu_adam", title=f"{_HOST} (DeepSpeed's CPUAdam)", optimizer="host_cpu_adam",
                **{**_PA, "family": "offload"}),
    )
}  # fmt: skip
KNOWN = {**VARIANTS, **ON_A_GPU}
LATENCY_FIVE = ("parallel_adapter", "meft", "meft_no_ke", "meft_no_sparse", "meft_neither")
"""The bars of the paper's Figure 5."""


def size_options(variant: Variant, neurons: int, counted: Counted | None, rank: int | None = None) -> dict[str, Any]:
    """The method's options at nominal R; counted, the base's, is needed only where the size is not R itself. rank
    names LoRA's own size instead.

    Raises ValueError where the method does not attach to the base.
    """
    if variant.is_meft:
        kept = KEPT
        if variant.options.get("key_experts", True):
            probe = MeftOptions(neurons=neurons, kept=1)
            kept = min(KEPT, probe.candidates)
        options = {"neurons": neurons, "kept": min(kept, neurons), **variant.options}
        if variant.budget and counted is not None:
            there = counted.ffns
            options["device_budget"] = budget.at(
                variant.budget, MeftOptions(**options), there.layers, there.hidden, torch.bfloat16, router_there=True
            )  # fmt: skip
        return options
    option = variant.option
    if option is None:
        return dict(variant.options)
    if option == "neurons":
        return {"neurons": neurons, **variant.options}
    if option == "rank" and rank is not None:
        return {"rank": rank, **variant.options}
    assert counted is not None

    def trained(name: str, **options: Any) -> int:
        return counted.trainable(name, find_method(name).Options(**options))

    def at(size: int) -> int:
        return trained(variant.method, **{option: size}, **variant.options)

    wanted = trained("parallel_adapter", neurons=neurons)
    if at(3) - at(2) != at(2) - at(1):  # a product of keys
        sizes = itertools.takewhile(lambda size: at(size - 1) < wanted, itertools.count(2))
        return {option: min(sizes, key=lambda size: abs(at(size) - wanted), default=1), **variant.options}
    fixed = 2 * at(1) - at(2)
    size = max(1, round((wanted - fixed) / (at(2) - at(1))))
    return {option: size, **variant.options}


def attach(variant: Variant, options: dict[str, Any], model: nn.Module, simulated: bool) -> Attached:
    """The variant's modules in model, the rest frozen. Raises ValueError for options that do not fit."""
    method = find_method(variant.method)
    layers = decoder_layers(model)
    # peft wraps no stand-in for a quantised layer; an adapter with hooks on the FFN must find the layers that stay.
    afterwards = simulated and variant.method == "lora"
    if variant.quantised and not afterwards:
        model.requires_grad_(False)
        quantise_base(model, layers, simulated)
    attached = method.attach(model, method.Options(**options), 0)
    if variant.quantised and afterwards:
        quantise_base(model, layers, simulated)
    if simulated and variant.method == "shira":
        densely(attached.model)
    if variant.optimizer.startswith("host"):
        for parameter in attached.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if variant.is_meft and not variant.sparse:
        for layer in layers:
            move_all_rows(getattr(layer, ADAPTER_NAME))
    return attached


def make_optimizer(variant: Variant, attached: Attached, simulated: bool, lr: float = 1e-4) -> torch.optim.Optimizer:
    """The variant's optimizer. Raises ValueError when the package it needs on a GPU is missing."""

    def returning(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return HostAdamW(parameters, return_gradients=True, lr=lr, weight_decay=0.0)

    made: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
        "host": lambda p: HostAdamW(p, return_gradients=False, lr=lr, weight_decay=0.0),
        "host_gradients": returning,
        "host_cpu_adam": lambda p: returning(p) if simulated else CpuAdam(p, lr=lr, weight_decay=0.0),
        "torchao": lambda p: returning(p) if simulated else torchao_offload(p, lr=lr, weight_decay=0.0),
        "adam8bit": lambda p: EightBitAdam(p, lr=lr) if simulated else adam8bit(p, lr),
    }
    if variant.optimizer in made:
        return made[variant.optimizer](attached.parameters())
    return attached.make_optimizer(lr=lr, weight_decay=0.0)
