"""The FFN that peft puts in place of a decoder's own: the base FFN plus one MEFT adapter per adapter name.

The adapters are those of meft_bench.meft; what is added here is what life inside peft asks for: rows that stay where
they are whoever assigns them, frozen parts that stay frozen when peft turns gradients on, and how experts are used.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from meft_bench.meft import routing
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.files import named
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.sites import require_like
from meft_bench.meft.store import NeuronStore

_USAGE_KEPT = 4096
NO_MERGE = (
    "MEFT cannot be merged: which neurons act depends on the token, so no weight of the base model equals it; "
    "keep the adapter beside the base, or call unload() to take it off"
)


class _Recent(list):
    """A list that forgets its older half when full, as a plain training loop never empties it."""

    def append(self, item: Any) -> None:
        if len(self) >= _USAGE_KEPT:
            del self[: _USAGE_KEPT // 2]
        super().append(item)


class HostStore(NeuronStore):
    """A NeuronStore whose tensors go to its own memory and fp32 whoever assigns them: loaders and dtype casts of peft
    and transformers replace parameters instead of moving them."""

    def __init__(self, config: MeftOptions, hidden_size: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__(config, hidden_size, generator, device)
        self.home = device

    def __setattr__(self, name: str, value: Any) -> None:
        home = self.__dict__.get("home")
        if isinstance(value, nn.Parameter) and home is not None and value.device.type != "meta":
            if value.device != home or value.dtype != torch.float32:
                value = nn.Parameter(value.detach().to(home, torch.float32), requires_grad=value.requires_grad)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Every way of loading ends here, also those that see no folder and those that take what is missing for meant.
        name = prefix.removesuffix(".").rsplit(".", 1)[-1]
        if any(f".meft_store.{name}." in f".{key}" for key in state_dict):
            self._check_loaded(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        parts = [f"{prefix}{name}" for name, parameter in self._parameters.items() if parameter is not None]
        if lacking := [part for part in parts if part not in state_dict]:
            raise ValueError(f"the adapter to be loaded lacks {named(lacking)}: take the whole of it")
        for part in parts:
            if state_dict[part].device.type != "meta" and not bool(state_dict[part].isfinite().all()):
                raise ValueError(f"{part} of the adapter to be loaded holds NaN or infinity: take another adapter")


class HostAdapter(MeftAdapter):
    """A MeftAdapter that counts which experts its kept neurons belong to while training (expert_use [N], int64)."""

    store: HostStore

    def __init__(
        self, config: MeftOptions, store: HostStore, link: Link | Resident, batch: BatchInfo, layers: int = 1
    ) -> None:
        super().__init__(config, store, link, batch, layers)
        self.usage = _Recent()
        self.expert_use = torch.zeros(config.experts or 1, dtype=torch.int64) if config.key_experts else None

    @torch.compiler.disable
    def forward(self, h: Tensor) -> Tensor:
        values = self.store.handle("values")
        if values.device.type == "meta":
            raise ValueError("this MEFT adapter has no weights yet: load them first")
        if self.config.placement == "device" and values.device != h.device:
            raise ValueError(
                f"placement='device' keeps the rows on {values.device}, where the base was when the adapter "
                f"was added; the base is on {h.device} now: move it before get_peft_model"
            )
        return super().forward(h)

    def select(self, h_TD: Tensor, valid_T: Tensor | None, routed: routing.Routed | None = None) -> routing.Selection:
        chosen = super().select(h_TD, valid_T, routed)
        if not self.selects_on_device:
            numbers = torch.cat([chosen.union_U, chosen.union_U.new_tensor([-1])])
            self._count_experts(numbers[chosen.local_TK])
        return chosen

    def keep(self, h_TD: Tensor, valid_T: Tensor | None) -> routing.Kept:
        kept = super().keep(h_TD, valid_T)
        self._count_experts(kept.neuron_TK)
        return kept

    def _count_experts(self, neuron_TK: Tensor) -> None:
        """Where the neurons were found, so that nobody waits."""
        if self.training and self.expert_use is not None:
            if self.expert_use.device != neuron_TK.device:
                self.expert_use = self.expert_use.to(neuron_TK.device)
            experts = neuron_TK.clamp(min=0).flatten() // self.config.expert_size
            self.expert_use.scatter_add_(0, experts, (neuron_TK >= 0).flatten().long())

    @torch.compiler.disable
    def prepare_early(self, h: Tensor) -> None:
        super().prepare_early(h)

    def keep_frozen(self) -> None:
        """Turn gradients off again for what the configuration does not train."""
        if self.config.frozen_keys:
            self.store.keys.requires_grad_(False)
        if self.store.router is not None and not self.config.trains_router:
            self.store.router.requires_grad_(False)


class MeftLayer(nn.Module, BaseTunerLayer):
    """FFN(h) + the sum of the active adapters' outputs (paper section 4); h [..., D] in the model's dtype."""

    adapter_layer_names = ("meft_store",)
    other_param_names = ("adapters",)

    def __init__(self, base_layer: nn.Module, batch: BatchInfo) -> None:
        super().__init__()
        self.base_layer, self.batch = base_layer, batch
        # peft takes an adapter's name out of saved keys only where it is the last part but one: hence the stores are
        # registered, and the adapters that use them are not.
        self.meft_store = nn.ModuleDict()
        self.adapters: dict[str, HostAdapter] = {}
        self._disable_adapters, self.merged_adapters = False, []

    def add(self, name: str, adapter: HostAdapter) -> None:
        """Register one more adapter under its name; peft decides which is active."""
        self.training = self.base_layer.training
        self.meft_store[name], self.adapters[name] = adapter.store, adapter

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(h, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.adapters:
                self.adapters[name].train(self.training).prepare_early(h)
        output = self.base_layer(h, *args, **kwargs)
        require_like(self.base_layer, output, h)
        for name in self.active_adapters:
            if name in self.adapters:
                output = output + self.adapters[name].train(self.training)(h)
        return output

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self._keep_frozen()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for adapter in self.adapters.values():
            adapter.keep_frozen()

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_MERGE)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ValueError(
            "MEFT keeps one set of rows in host memory, which torch.nn.DataParallel's copies of the model would not "
            "share: use one GPU (CUDA_VISIBLE_DEVICES=0) and gradient accumulation"
        )
