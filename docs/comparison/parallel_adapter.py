"""A dense Parallel Adapter, which peft does not have: what an engine below needs to train what MEFT trains."""

import torch
from torch import nn


class ParallelAdapter(nn.Module):
    def __init__(self, ffn, neurons):
        super().__init__()
        width = ffn.down_proj.out_features
        self.ffn = ffn
        self.keys = nn.Parameter(torch.randn(neurons, width) * 0.02 * (4096 / width) ** 0.5)
        self.values = nn.Parameter(torch.zeros(neurons, width))

    def forward(self, h):
        return self.ffn(h) + torch.relu(h @ self.keys.T) @ self.values


def add_parallel_adapters(model, neurons):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp = ParallelAdapter(layer.mlp, neurons)
    return model
