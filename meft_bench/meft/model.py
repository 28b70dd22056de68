"""Attach MEFT to a transformers decoder, save it, load it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.meft import adapter_folder, old_format
from meft_bench.meft.adam import ROW_ADAM
from meft_bench.meft.background import count_background
from meft_bench.meft.batch import BatchInfo
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine.clipping import clip_grad_norm
from meft_bench.meft.engine.config import EngineConfig
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.link import Link, Resident
from meft_bench.meft.sites import add_parallel, free_ffns, hidden_size
from meft_bench.meft.store import NeuronStore


class MeftModel:
    """A decoder with a sparse adapter beside every FFN; the base is frozen. Made by attach or load."""

    def __init__(
        self, model: nn.Module, config: MeftOptions, adapters: list[MeftAdapter], link: Link | Resident
    ) -> None:
        self.model, self.config, self.adapters, self.link = model, config, adapters, link

    @property
    def stores(self) -> list[NeuronStore]:
        return [adapter.store for adapter in self.adapters]

    def make_optimizer(self, lr: float, **settings: Any) -> torch.optim.Optimizer:
        """AdamW over all rows as config.adam says; its moments lie beside the rows."""
        settings.setdefault("moments", self.config.moments)
        return ROW_ADAM[self.config.adam](self.stores, lr=lr, **settings)

    def collect_gradients(self) -> None:
        """Bring home the gradients that wait on the device and wait for the host's work. Using .grad does so too."""
        collect_gradients(self.adapters)
        for store in self.stores:
            store.queue.wait()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ over all trainable tensors; returns the norm before clipping (fp32 scalar).
        Gradients that wait on the device come home first; the cost is next to nothing (engine/clipping.py)."""
        self.collect_gradients()
        return clip_grad_norm(self.stores, max_norm)

    def count_background(self, texts: Iterable[Sequence[int]] | None = None) -> int:
        """What distinctive updates need before training: count in how many texts (lists of token ids; None: texts that
        the base writes by itself) each neuron is used. Returns the number of texts. Raises ValueError for none."""
        return count_background(self.model, self.adapters, texts)

    @property
    def device_bytes(self) -> int:
        """Bytes that stay on the device between micro-batches: kept rows and their gradients, router, key index."""
        return sum(adapter.device_bytes for adapter in self.adapters)

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        """Trainable tensors by name: keys, values, router."""
        groups: dict[str, list[nn.Parameter]] = {}
        for store in self.stores:
            for name, parameter in store.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(name, []).append(parameter)
        return groups

    def save(self, folder: str | Path) -> None:
        """Write the adapter into folder (made if missing), as peft's save_pretrained does; each file is replaced
        whole. peft.PeftModel.from_pretrained reads it too, where the FFN is one module."""
        stores = dict(zip(adapter_folder.ffn_names(self.model), self.stores, strict=True))
        adapter_folder.write(Path(folder), self.config, stores)


def attach(model: nn.Module, config: MeftOptions, seed: int = 0) -> MeftModel:
    """Freeze model and add one sparse adapter per decoder layer (paper section 4).

    The output is unchanged until a step is taken, as values start at zero. Raises ValueError for a model whose FFNs
    cannot be found or that already carries adapters.
    """
    from meft_bench.meft import hooks  # imports the compiler

    sites = free_ffns(model)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    resident = config.placement == "device"
    link, batch = (Resident() if resident else Link()), BatchInfo()
    generator = torch.Generator().manual_seed(seed)
    adapters: list[MeftAdapter] = []
    for site in sites:
        store = NeuronStore(config, hidden_size(model), generator, device if resident else torch.device("cpu"))
        store.queue.name = f"adapter layer {len(adapters)}"
        adapter = MeftAdapter(config, store, link, batch, len(sites))
        adapter.train(model.training)
        site.entry.register_forward_pre_hook(hooks.EarlyHook(adapter).prepare, with_kwargs=True)
        add_parallel(site, adapter)
        adapters.append(adapter)
    look_ahead(adapters, config.lookahead)
    hooks.watch(model, batch)
    return MeftModel(model, config, adapters, link)


def look_ahead(adapters: list[MeftAdapter], layers: int) -> None:
    """Let each adapter's neurons be selected from the hidden states that many layers earlier, where there are any.

    Raises ValueError when the model has no layer so far ahead.
    """
    if not layers:
        return
    if layers >= len(adapters):
        raise ValueError(f"lookahead={layers} reaches past the {len(adapters)} layers: at most {len(adapters) - 1}")
    for early, late in zip(adapters, adapters[layers:], strict=False):
        early.ahead, late.selects_itself = late, False


def collect_gradients(adapters: Iterable[MeftAdapter]) -> None:
    """Send home all gradients that wait on the device."""
    for adapter in adapters:
        adapter.collect()


def load(model: nn.Module, folder: str | Path, placement: str | None = None) -> MeftModel:
    """Attach the adapter saved in folder to a fresh base model; placement overrides where the rows go. At "device" the
    saved device_budget, lookahead and retrieval mean nothing and are left at their defaults. Reads what MeftModel.save,
    peft and `meft-bench train` write, and what earlier versions of save wrote.

    Strict: raises ValueError for a missing, broken or truncated file, another base's shape, and missing or foreign
    tensors, and FileNotFoundError for a missing folder.
    """
    folder, choices = Path(folder), _placed(placement)
    # Everything is read and checked before the model is touched, so a broken file leaves it as it was.
    free_ffns(model)
    names = adapter_folder.ffn_names(model)
    if old_format.is_old(folder) and not (folder / adapter_folder.CONFIG_NAME).is_file():
        config, layers = old_format.read(folder, choices, hidden_size(model), len(names))
    else:
        config, layers = adapter_folder.read(folder, choices, model)
    meft = attach(model, config)
    with torch.no_grad():
        for store, tensors in zip(meft.stores, layers, strict=True):
            for name, parameter in store.named_parameters():
                parameter.copy_(tensors[name])
    return meft


def _placed(placement: str | None) -> dict[str, Any]:
    """The options that a placement of one's own replaces; none for None."""
    if placement is None:
        return {}
    on_the_way = ("device_budget", "lookahead", "retrieval") if placement == "device" else ()
    return {"placement": placement, **{name: getattr(EngineConfig, name) for name in on_the_way}}
