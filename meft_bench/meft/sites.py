"""Where a parallel adapter attaches in a transformers decoder: beside the FFN of every layer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_FFN_NAMES = ("mlp", "feed_forward", "ffn")
_FFN_PAIRS = (("fc1", "fc2"),)  # OPT keeps its two FFN matrices in the layer itself
ADAPTER_NAME = "parallel_adapter"


@dataclass(frozen=True)
class FfnSite:
    """One layer's FFN: the adapter reads what goes into entry and adds to what comes out of exit."""

    layer: nn.Module
    entry: nn.Module
    exit: nn.Module


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers. Raises ValueError when the model has none that can be found."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of decoder layers: need a transformers causal language model "
        "(Llama, Mistral, Qwen, Gemma, GPT-NeoX, OPT, GPT-2 are known to work)"
    )


def hidden_size(model: nn.Module) -> int:
    """D of a transformers model."""
    return text_config(model).hidden_size


def text_config(model: nn.Module) -> Any:
    """The part of a model's config that describes its decoder; None for a module without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_ffns(model: nn.Module) -> list[FfnSite]:
    """The FFN of every decoder layer, in order. Raises ValueError naming the layer type that has none."""
    return [_find_ffn(layer) for layer in decoder_layers(model)]


def free_ffns(model: nn.Module) -> list[FfnSite]:
    """find_ffns, for a model that has no parallel adapter yet. Raises ValueError, before any change, if it has."""
    sites = find_ffns(model)
    if any(hasattr(site.layer, ADAPTER_NAME) for site in sites):
        raise ValueError(f"{type(model).__name__} already has a parallel adapter: attach once per model")
    return sites


def _find_ffn(layer: nn.Module) -> FfnSite:
    children = dict(layer.named_children())
    for name in _FFN_NAMES:
        if name in children:
            return FfnSite(layer, children[name], children[name])
    for first, second in _FFN_PAIRS:
        if first in children and second in children:
            return FfnSite(layer, children[first], children[second])
    raise ValueError(
        f"no FFN found in {type(layer).__name__} (it has {', '.join(children) or 'no parts'}): "
        f"looked for {', '.join(_FFN_NAMES)} and fc1 with fc2"
    )


def add_parallel(site: FfnSite, adapter: nn.Module) -> None:
    """Make FFN(h) into FFN(h) + adapter(h). The adapter is registered in the layer, not in the FFN, whose own forward
    might run over its children."""
    site.layer.add_module(ADAPTER_NAME, adapter)
    seen: list[Tensor] = []

    def remember_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen[:] = [args[0] if args else next(iter(kwargs.values()))]

    def add_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{type(site.exit).__name__} returns {type(output).__name__}, not one tensor: not supported"
            )
        return output + adapter(seen.pop())

    site.entry.register_forward_pre_hook(remember_input, with_kwargs=True)
    site.exit.register_forward_hook(add_output)
