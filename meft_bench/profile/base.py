"""A base model that is built once: what is attached is taken off again, and the next method finds it as it was."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meft_bench.profile import shapes
from meft_bench.train.counts import Counted
from meft_bench.train.models import shape_of

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""What methods hang on modules, by torch.nn.Module's own names."""


class Base:
    """A random model of a config on a device, in bfloat16. Raises ValueError for a config that makes no such model."""

    def __init__(self, config: Any, device: str) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names it will change
            self.model = shapes.build(config, device, torch.bfloat16, random=True)
        self.device = device
        self.vocabulary = config.get_text_config().vocab_size
        self.shape, self.counted = shape_of(self.model), Counted(config)
        self.drawn = Remembered()
        """Within, methods that draw the same keys as one before get a copy of them."""

    @contextmanager
    def lent(self) -> Iterator["Base"]:
        """Within, methods may be attached; afterwards modules, hooks, modes and what is trained are as before. What
        changes the base's weights must not be attached."""
        free_memory(self.device)  # what an error before this one held
        before = [(module, _state(module)) for module in self.model.modules()]
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            yield self
        finally:
            if getattr(self.model, "is_gradient_checkpointing", False):
                self.model.gradient_checkpointing_disable()
            for module, state in before:
                _restore(module, state)
            for parameter, was in trained:
                parameter.requires_grad_(was)
                parameter.grad = None
            free_memory(self.device)


class Remembered(TorchFunctionMode):
    """torch.randn with a generator draws a large tensor once: from the same state it is the same again. Drawing the
    keys of a 7B model takes longer than a row's steps; remembering them takes their bytes of host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are remembered."""
        return sum(made.nbytes for made, _ in self.known.values())

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if function is not torch.randn or generator is None or set(kwargs) != {"generator"}:
            return function(*args, **kwargs)
        key = args, generator.get_state().numpy().tobytes()
        if key not in self.known:
            made = function(*args, **kwargs)
            self.known[key] = made, generator.get_state()
        made, after = self.known[key]
        generator.set_state(after)
        return made.clone()


def free_memory(device: str) -> None:
    """Give back what nobody holds any more, so that the next method's peak is its own."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        release = getattr(torch._C, "_host_emptyCache", None)  # page-locked blocks; torch has no public name for it
        if release is not None:
            release()


def _state(module: nn.Module) -> dict[str, Any]:
    return {"training": module.training, **{name: getattr(module, name).copy() for name in ("_modules", *_HOOKS)}}


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    module.training = state["training"]
    for name in ("_modules", *_HOOKS):
        own = getattr(module, name)
        own.clear()
        own.update(state[name])
