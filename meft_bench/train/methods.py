"""Methods as code: what an attached one is to training and evaluation, and how one is found (contract.py says what a
method's file defines).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from meft_bench.fields import Choice, Pairs, Plain, Real, Whole, check_table
from meft_bench.ranks import Ranks
from meft_bench.train.contract import check_method, describe, module_name
from meft_bench.train.contract import method_names as method_names
from meft_bench.train.options import check_names, check_needed

if TYPE_CHECKING:  # options are checked before torch is imported
    import torch
    from torch import Tensor, nn

    from meft_bench.meft.background import BackgroundCounts
    from meft_bench.meft.link import Link

OPTIMIZER_FIELDS = {"lr": Real(least=0), "weight_decay": Real(least=0), "eps": Real(least=0)}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that closed formulas need."""

    hidden: int
    layers: int
    ffn: int
    query: int
    """Output width of the query projection (heads x head size)."""
    value: int
    """Output width of the key and value projections."""
    parameters: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of the linear layers of one LLaMA-like layer: attention, then FFN."""
        d, f, q, v = self.hidden, self.ffn, self.query, self.value
        return [(q, d), (v, d), (v, d), (d, q), (f, d), (f, d), (d, f)]

    @property
    def ends(self) -> dict[str, int]:
        """Inputs plus outputs of the adapted matrices of one LLaMA-like layer, by the targets of a low-rank method:
        rank times this are its parameters. "attention" is query and value."""
        qv = (self.hidden + self.query) + (self.hidden + self.value)
        ffn = 3 * (self.hidden + self.ffn)
        return {"attention": qv, "ffn": ffn, "all": 2 * qv + ffn}


def _adamw(parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(parameters, fused=True, **settings)


@dataclass
class Attached:
    """An adapted model as training and evaluation see it."""

    model: nn.Module
    """What is called for logits; parameters not in groups are frozen."""
    groups: dict[str, list[nn.Parameter]]
    """Trainable tensors by name, each in exactly one group."""
    optimizer_factory: Callable[..., torch.optim.Optimizer] | None = None
    """Called with lr, betas, eps, weight_decay; None takes fused AdamW over all groups."""
    link: Link | None = None
    """Counts host-device copies; None for methods that live on the device."""
    usage: list[list[tuple[int, int]]] = field(default_factory=list)
    """Per adapted layer, (real tokens T, rows moved U) of every training micro-batch."""
    save: Callable[[Any], None] | None = None
    """Writes the adapter into a folder; None where the method has no format of its own."""

    clip: Callable[[float], Tensor] | None = None
    """Clips all gradients to a global norm and returns the norm before; None takes torch's over all groups."""
    adds_gradients: bool = False
    """Whether the method itself adds its gradients up over the ranks; else the training loop does."""

    account: Callable[[torch.optim.Optimizer | None], dict[str, int]] | None = None
    """accounted_bytes of a method whose tensors outlive a step otherwise; None counts them as torch's optimizers do."""
    background: BackgroundCounts | None = None
    """What is counted on the base before the first step (MEFT's distinctive updates)."""

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups.values() for p in group]

    def parameter_groups(self) -> dict[str, int]:
        """Trainable counts by name."""
        return {name: sum(p.numel() for p in group) for name, group in self.groups.items()}

    def make_optimizer(self, **settings: Any) -> torch.optim.Optimizer:
        """Raises ValueError for a rate or a weight decay that is negative or no number in float32."""
        check_table({name: kind for name, kind in OPTIMIZER_FIELDS.items() if name in settings}, settings)
        if self.optimizer_factory is not None:
            return self.optimizer_factory(**settings)
        return _adamw(self.parameters(), **settings)

    def add_gradients(self, ranks: Ranks) -> None:
        """Add all gradients up over the ranks, after the last micro-batch of a step."""
        if not self.adds_gradients:
            ranks.add_gradients(self.parameters())

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their global norm is at most max_norm; returns the norm before (scalar)."""
        import torch

        if self.clip is not None:
            return self.clip(max_norm)
        return torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def accounted_bytes(self, optimizer: torch.optim.Optimizer | None, accumulation: int = 1) -> dict[str, int]:
        """Exact bytes owned by the method, as "<device>_<purpose>_bytes": parameters, gradients, moments. accumulation:
        micro-batches of a step; with several, also gradients that are used within backward wait for the last one."""
        from torch import Tensor

        from meft_bench.train.own_optimizer import FusedOptimizer

        if self.account is not None:
            found = self.account(optimizer)
            if accumulation > 1 and isinstance(optimizer, FusedOptimizer):
                found["device_gradients_bytes"] = sum(p.nbytes for p in self.parameters())
            return found
        totals: dict[str, int] = {}

        def add(tensor: Tensor, purpose: str) -> None:
            # Without a GPU the compute device is the CPU too: then only methods with a link have a host side.
            place = "host" if self.link is not None and tensor.device.type == "cpu" else "device"
            key = f"{place}_{purpose}_bytes"
            totals[key] = totals.get(key, 0) + tensor.nbytes

        for parameter in self.parameters():
            add(parameter, "parameters")
            add(parameter.grad if parameter.grad is not None else parameter, "gradients")
            for state in (optimizer.state.get(parameter, {}) if optimizer else {}).values():
                if isinstance(state, Tensor):
                    add(state, "moments")
        return totals


def freeze(model: nn.Module) -> None:
    """Turn gradients off everywhere; a method turns its own parameters on afterwards."""
    model.requires_grad_(False)


def find_method(name: str) -> ModuleType:
    """The method's module. Raises ValueError listing the known names."""
    check_method(name)
    return importlib.import_module(module_name(name))


def options_class(name: str) -> Any:
    """The method's Options; without importing torch where the method's file does not."""
    return (describe(name).light or find_method(name)).Options


def parse_options(name: str, given: Mapping[str, Any]) -> Any:
    """The method's Options with defaults filled in. Raises ValueError naming an unknown or missing option."""
    about = describe(name)
    Pairs(Plain()).check("options", given)
    check_names(name, given, about.kinds)
    check_needed(name, given, about.needed)
    return options_class(name)(**given)


def complete_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """given with every default filled in, as it stands in a canonical spec."""
    return asdict(parse_options(name, given))


def require_positive(**sizes: Any) -> None:
    """Raises ValueError unless every value is a whole number of at least 1, and no more than indices can count."""
    for name, value in sizes.items():
        Whole(1).check(name, value)


def require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless value is allowed."""
    Choice(allowed).check(name, value)
