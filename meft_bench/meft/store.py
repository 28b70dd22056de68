"""NeuronStore: one layer's neurons (keys, values, router) with their gradients, in the memory the config names."""

import math

import torch
from torch import Tensor, nn

from meft_bench.meft.config import MeftConfig

PAPER_KEY_STD = 0.02
_PAPER_HIDDEN = 4096


def key_std(hidden_size: int, asked: float | None = None) -> float:
    """Standard deviation of fresh keys: as asked, else the paper's 0.02 scaled to spread key . hidden as at 7B."""
    return asked if asked is not None else PAPER_KEY_STD * math.sqrt(_PAPER_HIDDEN / hidden_size)


def fresh_keys(neurons: int, hidden_size: int, generator: torch.Generator, std: float | None = None) -> Tensor:
    """Keys [R, D] fp32 from N(0, std); shared with the Parallel Adapter so that equal seeds start equal."""
    return torch.randn(neurons, hidden_size, generator=generator) * key_std(hidden_size, std)


class NeuronStore(nn.Module):
    """keys [R, D], values [R, D] and, with Key-Experts, router [N, D]; fp32 parameters with dense gradients.

    A neuron's key and value are row i of both matrices. The store stays in its memory and dtype: .to(), .cuda() and
    .half() of the model pass it by. Its parameters are ordinary ones, so optimizers, clipping and state dicts see them.
    """

    def __init__(self, config: MeftConfig, hidden_size: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        keys_RD = fresh_keys(config.neurons, hidden_size, generator, config.key_std)
        # Values start at zero: the model is unchanged at step 0 and the first step moves values only.
        self.keys = nn.Parameter(keys_RD.to(device), requires_grad=not config.frozen_keys)
        self.values = nn.Parameter(torch.zeros(config.neurons, hidden_size, device=device))
        self.router: nn.Parameter | None = None
        if config.key_experts:
            router_ND = _fresh_router(keys_RD, config, generator)
            self.router = nn.Parameter(router_ND.to(device), requires_grad=config.trains_router)
        self.touched_R = torch.zeros(config.neurons, dtype=torch.bool, device=device)

    def _apply(self, fn, recurse=True):
        return self

    def gather(self, union_U: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [U, D] of the union, copied out."""
        return self.keys.detach().index_select(0, union_U), self.values.detach().index_select(0, union_U)

    def add_gradients(self, union_U: Tensor, keys_UD: Tensor | None, values_UD: Tensor) -> None:
        """Accumulate the gradients of the union's rows; keys_UD is None when keys are frozen."""
        self.touched_R[union_U] = True
        if keys_UD is not None:
            _gradient(self.keys).index_add_(0, union_U, keys_UD)
        _gradient(self.values).index_add_(0, union_U, values_UD)

    def add_router_gradient(self, router_ND: Tensor) -> None:
        """Accumulate the router's gradient."""
        assert self.router is not None
        _gradient(self.router).add_(router_ND)

    def prepare_gradients(self) -> None:
        """Give every trainable tensor a gradient: a layer that selected nothing has a zero one, as a resident adapter
        would, so that its moments decay all the same."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                _gradient(parameter)

    def clear_gradients(self) -> None:
        """Zero the gradients in place and forget which rows were touched."""
        self.touched_R.zero_()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _fresh_router(keys_RD: Tensor, config: MeftConfig, generator: torch.Generator) -> Tensor:
    assert config.experts is not None
    if config.router_init == "normal":
        return torch.randn(config.experts, keys_RD.shape[1], generator=generator) * PAPER_KEY_STD
    mean_ND = keys_RD.view(config.experts, config.expert_size, -1).mean(dim=1)
    if config.router_init == "mean_key_x50":
        return mean_ND * 50
    return mean_ND / mean_ND.norm(dim=1, keepdim=True) * keys_RD.norm(dim=1).mean()
