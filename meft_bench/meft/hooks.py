"""The hooks by which a model calls its adapters.

They are methods of objects, and no closures: a copy of the model, or a pickled one, then has hooks of its own, for its
own adapters. What an adapter does on the host is no graph of tensors, so torch.compile leaves them as they are and
takes the parts of the base between. Saying so imports the compiler: import this module where a model gets its hooks.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from meft_bench.meft.batch import BatchInfo, token_mask
from meft_bench.meft.layer import MeftAdapter
from meft_bench.meft.sites import require_like


class ParallelHooks:
    """Make FFN(h) into FFN(h) + adapter(h), as a forward pre-hook and a forward hook of one FFN."""

    def __init__(self, adapter: nn.Module) -> None:
        self.adapter = adapter
        self._seen: list[Tensor] = []

    @torch.compiler.disable
    def remember_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._seen[:] = [first_input(args, kwargs)]

    @torch.compiler.disable
    def add_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        h = self._seen.pop()
        require_like(module, output, h)
        return output + self.adapter(h)


class EarlyHook:
    """Tells an adapter the input of its FFN before the FFN runs: a forward pre-hook."""

    def __init__(self, adapter: MeftAdapter) -> None:
        self.adapter = adapter

    @torch.compiler.disable
    def prepare(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.adapter.prepare_early(first_input(args, kwargs))


class MaskHook:
    """Remembers the attention mask of the running micro-batch: a forward pre-hook of the model."""

    def __init__(self, batch: BatchInfo) -> None:
        self.batch = batch

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = inspect.signature(module.forward).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        self.batch.attention_mask = token_mask(given.get("attention_mask"))


def watch(model: nn.Module, batch: BatchInfo) -> None:
    """Let batch know of every forward pass of model."""
    model.register_forward_pre_hook(MaskHook(batch).begin, with_kwargs=True)


def first_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What an FFN is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))
