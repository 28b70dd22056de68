"""A base made smaller without training: FFN neurons that matter least go, and what is left makes up for them.

After arXiv 2409.17372, in its smallest form. Neurons are ranked within each layer by importance; there, importance
starts an evolutionary search over layers and heads, which is left out here. The matrix that writes the FFN's output is
reformed so that the outputs on calibration text change least, by least squares on the activations of the whole base;
there, by ADMM. Calibration text is what the base itself writes. F neurons, k of them kept, T tokens, D hidden size.
"""

import torch
from torch import Tensor, nn

from meft_bench.meft import background
from meft_bench.meft.sites import find_ffns, text_config
from meft_bench.train.projections import ffn_projections

_TEXTS, _TOKENS, _SEED = 32, 48, 20417
_RIDGE = 1e-3
"""Of the mean square of an activation: in the least squares, it keeps what the text does not tell as it was."""


def removed_neurons(parameters: int, layers: int, per_neuron: int, share: float) -> int:
    """FFN neurons to take out of each layer so that a base of that many parameters keeps about this share of them;
    per_neuron: parameters of one neuron."""
    return round((1 - share) * parameters / (layers * per_neuron))


@torch.no_grad()
def shrink_ffns(model: nn.Module, share: float) -> int:
    """Take FFN neurons out of model, in place, until it has about this share of its parameters; returns how many
    parameters are gone. The same for the same weights and torch.

    Raises ValueError for an FFN that is not made of nn.Linear, and where it has not that many neurons.
    """
    pairs = ffn_projections(model)
    linears = [module for into, out in pairs for module in (*into, out)]
    if not all(isinstance(module, nn.Linear) for module in linears):
        raise ValueError(f"the FFN of {type(model).__name__} is not made of nn.Linear: its neurons cannot be taken out")
    before = sum(p.numel() for p in model.parameters())
    neurons = _features(pairs[0][1])
    per_neuron = sum(p.numel() for m in (*pairs[0][0], pairs[0][1]) for p in m.parameters()) // neurons
    removed = removed_neurons(before, len(pairs), per_neuron, share)
    if not 0 <= removed < neurons:
        raise ValueError(f"share={share:g} takes {removed} of {neurons} FFN neurons of every layer: keep more")
    if removed and next(model.parameters()).is_meta:  # only sizes are asked for: which neurons stay is not
        for into, out in pairs:
            assert isinstance(out, nn.Linear)
            kept_k = torch.arange(neurons - removed, device="meta")
            _keep(into, out, kept_k, out.weight[:, kept_k])
    elif removed:
        seen = activations(model, own_text(model))
        for (into, out), a_TF in zip(pairs, seen, strict=True):
            assert isinstance(out, nn.Linear)
            kept_k = kept_neurons(a_TF, out.weight, neurons - removed)
            _keep(into, out, kept_k, reformed(a_TF, out.weight, kept_k))
    return before - sum(p.numel() for p in model.parameters())


def importance(a_TF: Tensor, out_DF: Tensor) -> Tensor:
    """[F]: the root mean square of what a neuron adds to the FFN's output, |activation| times the norm of its row."""
    return a_TF.double().square().mean(0).sqrt() * out_DF.double().norm(dim=0)


def kept_neurons(a_TF: Tensor, out_DF: Tensor, kept: int) -> Tensor:
    """The numbers of the `kept` most important neurons, ascending."""
    return importance(a_TF, out_DF).topk(kept).indices.sort().values


def reformed(a_TF: Tensor, out_DF: Tensor, kept_k: Tensor) -> Tensor:
    """[D, k]: the matrix whose outputs from the kept activations are nearest to out's from all of them, and near to
    out's own columns where the text does not tell."""
    a_Tk, lost_TD = a_TF[:, kept_k].double(), a_TF.double() @ out_DF.double().T
    own_Dk = out_DF[:, kept_k].double()
    lost_TD -= a_Tk @ own_Dk.T
    gram_kk = a_Tk.T @ a_Tk
    gram_kk.diagonal().add_(_RIDGE * gram_kk.diagonal().mean())
    return (own_Dk + torch.linalg.solve(gram_kk, a_Tk.T @ lost_TD).T).to(out_DF.dtype)


def own_text(model: nn.Module, seed: int = _SEED) -> Tensor:
    """Token ids [B, T], int64, that the base writes by itself at temperature 1 from its start token, or its end token,
    or 0."""
    config = text_config(model)
    starts = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    start = next((s for s in starts if isinstance(s, int)), 0)
    training = model.training
    model.eval()
    written = background.own_text(model, start, _TEXTS, _TOKENS, seed)
    model.train(training)
    return torch.tensor(written, device=next(model.parameters()).device)


def activations(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """What the neurons of each layer's FFN give on these tokens [B, T]: [B T, F], fp32."""
    seen: list[Tensor] = []

    def remember(module: nn.Module, args: tuple) -> None:
        seen.append(args[0].detach().float().flatten(0, -2))

    hooks = [out.register_forward_pre_hook(remember) for _, out in ffn_projections(model)]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(find_ffns(model))
    return seen


def _features(out: nn.Module) -> int:
    assert isinstance(out, nn.Linear)
    return out.in_features


def _keep(into: list[nn.Module], out: nn.Linear, kept_k: Tensor, out_Dk: Tensor) -> None:
    neurons = out.in_features
    for linear in into:
        assert isinstance(linear, nn.Linear)
        # Gate and up projections may be one matrix, one above the other.
        parts = linear.out_features // neurons
        rows = torch.cat([kept_k + part * neurons for part in range(parts)])
        linear.weight = nn.Parameter(linear.weight[rows], requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows], requires_grad=linear.bias.requires_grad)
        linear.out_features = rows.shape[0]
    out.weight = nn.Parameter(out_Dk.contiguous(), requires_grad=out.weight.requires_grad)
    out.in_features = kept_k.shape[0]
