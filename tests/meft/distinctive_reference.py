"""Distinctive updates (arXiv 2510.15103) in plain torch: autograd over all rows, then masks, AdamW over all rows, and
what was not chosen put back. Nothing of the engine is used."""

import math

import torch
from torch import Tensor, nn

from meft_bench.meft.config import MeftOptions
from meft_bench.meft.reference import ReferenceAdapter, kept_neurons, neuron_outputs


class NotingAdapter(ReferenceAdapter):
    """A ReferenceAdapter that keeps which neurons each token of its last input used, bool [B, L, R]."""

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            h_TD = h.reshape(-1, h.shape[-1])
            output_TR, candidates_TR = neuron_outputs(h_TD, self.keys, self.router, self.config)
            self.kept = kept_neurons(output_TR, candidates_TR, self.config).view(*h.shape[:-1], -1)
        return super().forward(h)


def chosen(kept: Tensor, texts_using: Tensor, texts: int, config: MeftOptions) -> list[int]:
    """The neurons that one micro-batch updates, by the paper's formula and Python's own arithmetic."""
    uses = kept.flatten(0, -2).sum(0).tolist()
    total = max(1, sum(uses))
    score = [c / total * math.log((texts + 1) / (int(df) + 1)) for c, df in zip(uses, texts_using, strict=True)]
    ranked = sorted((i for i in range(len(score)) if score[i] > 0), key=lambda i: -score[i])
    if config.distinctive is None:
        return [i for i in ranked if score[i] > config.distinctive_above]
    return ranked[: config.distinctive]


class Reference:
    """A stack whose FFNs carry NotingAdapters, trained by distinctive updates."""

    def __init__(self, model: nn.Module, adapters: list[NotingAdapter], config: MeftOptions, **adamw: float) -> None:
        self.model, self.adapters, self.config, self.adamw = model, adapters, config, adamw
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for a in adapters for p in self.parts(a)}
        self.counts = {p: torch.zeros(p.shape[0]) for p in self.moments}
        self.steps = 0

    def parts(self, adapter: NotingAdapter) -> list[nn.Parameter]:
        return [p for p in (adapter.keys, adapter.values, adapter.router) if p is not None and p.requires_grad]

    def count_background(self, texts: list[Tensor]) -> None:
        """As before training: values are zero."""
        self.texts, self.using = len(texts), [torch.zeros(self.config.neurons) for _ in self.adapters]
        values = [a.values.detach().clone() for a in self.adapters]
        for adapter in self.adapters:
            adapter.values.data.zero_()
        for ids in texts:
            self.model(ids[None])
            for using, adapter in zip(self.using, self.adapters, strict=True):
                using += adapter.kept[0].any(0)
        for adapter, own in zip(self.adapters, values, strict=True):
            adapter.values.data.copy_(own)

    def step(self, losses, max_norm: float) -> float:
        """One step over the micro-batches of losses; returns the norm before clipping."""
        sums = {p: torch.zeros_like(p) for p in self.moments}
        marks = {p: torch.zeros(p.shape[0], dtype=torch.bool) for p in self.moments}
        for loss in losses:
            self.model.zero_grad(set_to_none=True)
            loss().backward()
            for adapter, using in zip(self.adapters, self.using, strict=True):
                rows = torch.tensor(chosen(adapter.kept, using, self.texts, self.config), dtype=torch.int64)
                for p in self.parts(adapter):
                    mine = rows if p is not adapter.router else (rows // self.config.expert_size).unique()
                    sums[p][mine] += p.grad[mine]
                    marks[p][mine] = True
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in sums.values()))
        factor = min(1.0, max_norm / (norm + 1e-6))
        self.steps += 1
        for p, grad in sums.items():
            self._adamw(
                p, grad * factor, marks[p], lazy=self.config.adam == "lazy" and p.shape[0] == self.config.neurons
            )
        return norm

    @torch.no_grad()
    def _adamw(self, p: nn.Parameter, grad: Tensor, marked: Tensor, lazy: bool) -> None:
        """Rows that are not marked keep their weights; with lazy also their moments and their count of steps."""
        (b1, b2), lr, decay = self.adamw["betas"], self.adamw["lr"], self.adamw["weight_decay"]
        m, v = self.moments[p]
        self.counts[p][marked] += 1
        t = self.counts[p].clamp(min=1)[:, None] if lazy else torch.full((p.shape[0], 1), float(self.steps))
        new_m, new_v = m * b1 + grad * (1 - b1), v * b2 + grad * grad * (1 - b2)
        divisor = (new_v / (1 - b2**t)).sqrt() + self.adamw["eps"]
        moved = p * (1 - lr * decay) - lr / (1 - b1**t) * new_m / divisor
        p.copy_(torch.where(marked[:, None], moved, p))
        held = marked[:, None] if lazy else torch.ones(p.shape[0], 1, dtype=torch.bool)
        m.copy_(torch.where(held, new_m, m))
        v.copy_(torch.where(held, new_v, v))
