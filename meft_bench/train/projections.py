"""Where methods find their matrices in a text decoder: the linear layers of its attention and of its FFN."""

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from meft_bench.meft.sites import FfnSite, find_ffns, hidden_size

ATTENTION_QV = "attention_qv"
_QUERY = ("q_proj", "q_b_proj", "project_q", "Wq")  # q_b_proj, kv_b_proj: what latent attention (DeepSeek) ends in
_VALUE = ("v_proj", "kv_b_proj", "project_v", "Wv", "kv_proj")
_FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv")  # query, key and value in one matrix
_FFN_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out")
# Parts that choose experts or past tokens: what they give is not what the layer computes with.
_CHOOSERS = ("router", "gate", "shared_expert_gate", "indexer", "compressor")
# Attention to an encoder's output, which a causal language model does not run.
_UNUSED = ("encoder_attn", "crossattention")


def projections(model: nn.Module) -> dict[str, list[str]]:
    """Names (relative to the model) of the decoder's linear layers: "attention_qv" (query and value), "attention"
    (all of it), "ffn".

    Raises ValueError for a model whose query and value projections have none of the known names.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, list[str]] = {ATTENTION_QV: [], "attention": [], "ffn": []}
    last_names = set()
    for site in find_ffns(model):
        ffn = [module for part in _parts(site) for _, module in _linears(part)]
        found["ffn"] += [names[id(module)] for module in ffn]
        for name, module in _attention_linears(site):
            found["attention"].append(names[id(module)])
            last = name.rsplit(".", 1)[-1]
            last_names.add(last)
            if last in (*_QUERY, *_VALUE, *_FUSED):
                found[ATTENTION_QV].append(names[id(module)])
    if not last_names & set(_FUSED) and not (last_names & set(_QUERY) and last_names & set(_VALUE)):
        raise ValueError(
            f"{type(model).__name__}: no query and value projections among {', '.join(sorted(last_names)) or 'none'} "
            f"(known: {', '.join((*_QUERY, *_VALUE, *_FUSED))}); LoRA cannot attach"
        )
    return found


def targeted(model: nn.Module, targets: str) -> list[str]:
    """Names of the linear layers that low-rank methods call "attention" (query and value), "ffn" or "all" (attention
    and FFN). Raises as projections()."""
    found = projections(model)
    return {"attention": found[ATTENTION_QV], "ffn": found["ffn"], "all": found["attention"] + found["ffn"]}[targets]


def expert_matrices(model: nn.Module) -> list[str]:
    """Names of the parameters that hold one matrix per expert [N, ., .] in the FFNs of a mixture of experts."""
    names = {id(module): name for name, module in model.named_modules()}
    return [
        f"{names[id(module)]}.{name}"
        for site in find_ffns(model)
        for part in _parts(site)
        for module in part.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d)
    ]


def refuse_experts(model: nn.Module, why: str) -> None:
    """Raises ValueError, saying why, for a mixture of experts, whose FFNs are mostly no linear layers."""
    if experts := expert_matrices(model):
        raise ValueError(
            f"the FFN of {type(model).__name__} is a mixture of experts ({experts[0]}): {why}; use another method, "
            "such as lora"
        )


def ffn_projections(model: nn.Module) -> list[tuple[list[nn.Module], nn.Module]]:
    """Per layer, the FFN's linear layers that read the hidden state, and the one that writes it back.

    Raises ValueError for a mixture of experts, where there are many of each, and for an FFN of another form.
    """
    refuse_experts(model, "no one projection reads its input or writes its output")
    return [_ffn_pair(site, hidden_size(model)) for site in find_ffns(model)]


def _parts(site: FfnSite) -> list[nn.Module]:
    return [site.exit] if site.entry is site.exit else [site.entry, site.exit]


def _linears(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in part.named_modules():
        # A grouped one (DeepSeek-V4) computes with its weight otherwise than a linear layer.
        if isinstance(module, nn.Linear | Conv1D) and "Grouped" not in type(module).__name__:
            if not set(name.split(".")) & set(_CHOOSERS):
                yield name, module


def _attention_linears(site: FfnSite) -> Iterator[tuple[str, nn.Module]]:
    for name, child in site.layer.named_children():
        if child in _parts(site) or name in _UNUSED:
            continue
        linears = list(_linears(child))
        known = any(part.rsplit(".", 1)[-1] in (*_QUERY, *_FUSED) for part, _ in linears)
        if known or name.endswith(("attn", "attention", "_att")):
            yield from linears


def _ffn_pair(site: FfnSite, width: int) -> tuple[list[nn.Module], nn.Module]:
    if site.entry is not site.exit:
        return [site.entry], site.exit
    parts = list(_linears(site.exit))
    out = [module for name, module in parts if name.rsplit(".", 1)[-1] in _FFN_OUT]
    if not out:  # an unknown name: the one that narrows to the hidden size
        out = [module for _, module in parts if _sizes(module)[0] != width and _sizes(module)[1] == width]
    into = [module for _, module in parts if module not in out and _feeds(module, width, out)]
    if len(out) != 1 or not into or len(into) + 1 != len(parts):
        raise ValueError(
            f"the FFN of {type(site.layer).__name__} ({', '.join(name for name, _ in parts) or 'no linear layer'}) is "
            f"not made of projections that read the hidden state and one that writes it ({', '.join(_FFN_OUT)})"
        )
    return into, out[0]


def _feeds(module: nn.Module, width: int, out: list[nn.Module]) -> bool:
    """Whether module reads the hidden state and makes what out reads (twice that where gate and up are one)."""
    read, made = _sizes(module)
    return read == width and len(out) == 1 and made % _sizes(out[0])[0] == 0


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return module.nx, module.nf
