"""Where a parallel adapter attaches in a transformers decoder: beside the FFN of every layer."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
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
    """The layers of the text decoder, also where the model has a vision or audio tower beside it.

    Raises ValueError for a model with an encoder of text, and when no such layers can be found or several could be
    meant.
    """
    _refuse_encoder(model)
    found = _lists_of_layers(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers: need a transformers causal language model "
            "(Llama, Mistral, Qwen, Gemma, GPT-NeoX, OPT, GPT-2 are known to work)"
        )
    likely = [layers for layers in found if all(_ffn_of(layer) is not None for layer in layers)]
    if len(likely) > 1:
        kinds = ", ".join(type(layers[0]).__name__ for layers in likely)
        raise ValueError(
            f"{type(model).__name__} has several lists of layers ({kinds}): cannot tell the text decoder's"
        )
    return (likely or found)[0]


def _refuse_encoder(model: nn.Module) -> None:
    configs = (getattr(model, "config", None), text_config(model))
    if any(getattr(config, "is_encoder_decoder", False) is True for config in configs):
        raise ValueError(
            f"{type(model).__name__} has an encoder beside its decoder: need a causal language model, as "
            "AutoModelForCausalLM loads it (for BART, mBART, Marian and Pegasus that is the decoder alone)"
        )


def _lists_of_layers(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists as long as the decoder is deep: inside what the model itself calls its decoder, if any."""
    text = text_config(model)
    count = getattr(text, "num_hidden_layers", None)
    for root in (_text_decoder(model), model):
        if root is not None and (found := list(_outermost_lists(root, count, text))):
            return found
    return []


def _text_decoder(model: nn.Module) -> nn.Module | None:
    ask = getattr(model, "get_decoder", None)
    decoder = ask() if callable(ask) else None
    return decoder if isinstance(decoder, nn.Module) else None


def _outermost_lists(module: nn.Module, count: int | None, text: Any) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            yield child
        elif not _other_modality(child, text):
            yield from _outermost_lists(child, count, text)


def _other_modality(module: nn.Module, text: Any) -> bool:
    """Whether a part has a configuration of its own that is not the text's, as vision and audio towers do."""
    own: Any = getattr(module, "config", None)
    if not hasattr(own, "get_text_config") or type(own) is type(text):
        return False
    # What holds the decoder has the whole model's configuration, and names the text's as a part of it.
    return own.get_text_config(decoder=True) is own


def hidden_size(model: nn.Module) -> int:
    """D of a transformers model."""
    return text_config(model).hidden_size


def text_config(model: nn.Module) -> Any:
    """The part of a model's config that describes its decoder; None for a module without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def find_ffns(model: nn.Module) -> list[FfnSite]:
    """The FFN of every decoder layer, in order. Raises ValueError naming the layer type that has none."""
    return [_find_ffn(layer) for layer in decoder_layers(model)]


def parallel_ffns(model: nn.Module) -> list[FfnSite]:
    """find_ffns, where something can be added to what each FFN returns. Raises ValueError for an FFN that returns more
    than one tensor."""
    sites = find_ffns(model)
    for site in sites:
        if _returns_tuple(type(site.exit)):
            raise ValueError(
                f"{type(site.exit).__name__} of {type(model).__name__} returns several tensors: no adapter can "
                "stand beside it; use another method, such as lora or full"
            )
    return sites


def free_ffns(model: nn.Module) -> list[FfnSite]:
    """parallel_ffns, for a model that has no parallel adapter yet. Raises ValueError, before any change, if it has."""
    sites = parallel_ffns(model)
    if any(hasattr(site.layer, ADAPTER_NAME) for site in sites):
        raise ValueError(f"{type(model).__name__} already has a parallel adapter: attach once per model")
    return sites


def _find_ffn(layer: nn.Module) -> FfnSite:
    site = _ffn_of(layer)
    if site is None:
        children = ", ".join(name for name, _ in layer.named_children())
        raise ValueError(
            f"no FFN found in {type(layer).__name__} (it has {children or 'no parts'}): "
            f"looked for {', '.join(_FFN_NAMES)} and fc1 with fc2"
        )
    return site


def _ffn_of(layer: nn.Module) -> FfnSite | None:
    children = dict(layer.named_children())
    for name in _FFN_NAMES:
        if name in children:
            ffn = children[name]
            # CPM-Ant calls the FFN with its norm and residual by the name of the FFN inside.
            ffn = getattr(ffn, name, ffn)
            return FfnSite(layer, ffn, ffn)
    for first, second in _FFN_PAIRS:
        if first in children and second in children:
            return FfnSite(layer, children[first], children[second])
    return None


def _returns_tuple(kind: type[nn.Module]) -> bool:
    """Whether every return of a module's forward is a tuple, by its source: asked before the model is changed, and
    without running a module that may lie on no device yet. What the source does not tell is checked when it runs."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    values = [node.value for node in _own_nodes(tree.body[0]) if isinstance(node, ast.Return)]
    return bool(values) and all(isinstance(value, ast.Tuple) for value in values)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from _own_nodes(child)


def require_like(ffn: nn.Module, output: Any, h: Tensor) -> None:
    """Raises ValueError unless an FFN returned one tensor of the shape of its input h."""
    if not isinstance(output, Tensor) or output.shape != h.shape:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{type(ffn).__name__} returns {what}, not one tensor {tuple(h.shape)}: not supported")


def add_parallel(site: FfnSite, adapter: nn.Module) -> None:
    """Make FFN(h) into FFN(h) + adapter(h). The adapter is registered in the layer, not in the FFN, whose own forward
    might run over its children."""
    from meft_bench.meft.hooks import ParallelHooks  # imports the compiler

    site.layer.add_module(ADAPTER_NAME, adapter)
    hooks = ParallelHooks(adapter)
    site.entry.register_forward_pre_hook(hooks.remember_input, with_kwargs=True)
    site.exit.register_forward_hook(hooks.add_output)
