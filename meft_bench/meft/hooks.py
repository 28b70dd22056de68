"""The hooks by which a model calls its adapters.

They are methods of objects, and no closures: a copy of the model, or a pickled one, then has hooks of its own, for its
own adapters. What an adapter does on the host is no graph of tensors, so torch.compile leaves them as they are and
takes the parts of the base between. Saying so imports the compiler: import this module where a model gets its hooks.
"""

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.meft.batch import BatchInfo, token_mask
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.sites import decoder_layers, require_like


class ParallelHooks:
    """Make FFN(h) into FFN(h) + adapter(h), as a forward pre-hook and a forward hook of one FFN."""

    def __init__(self, adapter: nn.Module) -> None:
        self.adapter = adapter
        self._seen: dict[int, Tensor] = {}
        """The input of the FFN that runs, by thread."""

    @torch.compiler.disable
    def remember_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._seen[threading.get_ident()] = first_input(args, kwargs)

    @torch.compiler.disable
    def add_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        h = self._seen.pop(threading.get_ident())
        require_like(module, output, h)
        return output + self.adapter(h)


class EarlyHook:
    """Tells an adapter the input of its FFN before the FFN runs: a forward pre-hook."""

    def __init__(self, adapter: MeftAdapter) -> None:
        self.adapter = adapter

    @torch.compiler.disable
    def prepare(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.adapter.prepare_early(first_input(args, kwargs))


class PassHooks:
    """Tell batch which attention mask its micro-batch has: that of the outermost call, whether it is of the model or of
    a decoder in it, and none after it.

    Activation checkpointing runs layers again in backward, when other forward passes may have begun. What a layer was
    called with is in the same memory then, so the mask is noted there, and read where a layer or a part of it is
    called with that memory.
    """

    def __init__(self, batch: BatchInfo) -> None:
        self.batch = batch
        self._running: dict[int, nn.Module] = {}
        """The outermost module whose forward pass runs, by thread."""

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        if self._running.get(thread, module) is module:
            names = inspect.signature(module.forward).parameters
            given = dict(zip(names, args, strict=False)) | kwargs
            self._running[thread] = module
            self.batch.begin(token_mask(given.get("attention_mask")))

    @torch.compiler.disable
    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._running.get(threading.get_ident()) is module:
            del self._running[threading.get_ident()]
            self.batch.attention_mask = None

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        h = None if torch.compiler.is_compiling() else first_input(args, kwargs)
        if not isinstance(h, Tensor):
            return
        memory: Any = h.untyped_storage()
        if threading.get_ident() in self._running:
            memory._meft_mask = (self.batch.attention_mask,)
        elif hasattr(memory, "_meft_mask"):
            (self.batch.repeated_mask,) = memory._meft_mask


def watch(model: nn.Module, batch: BatchInfo) -> None:
    """Let batch know the attention mask of every forward pass of model and of the decoder in it."""
    hooks, layers = PassHooks(batch), decoder_layers(model)
    for module in model.modules():
        if module is not layers and any(part is layers for part in module.modules()):
            module.register_forward_pre_hook(hooks.begin, with_kwargs=True)
            module.register_forward_hook(hooks.end, always_call=True)
    for layer in layers:
        for part in (layer, *layer.children()):
            part.register_forward_pre_hook(hooks.enter, with_kwargs=True)


def first_input(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a layer or its FFN is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)
