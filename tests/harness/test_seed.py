"""A seed decides the order of the batches and where every method starts, in the loop and in a whole run."""

import pytest
import torch

from meft_bench.harness import worker
from meft_bench.harness.spec import RunSpec
from meft_bench.train import loop, models
from meft_bench.train.methods import find_method, parse_options
from tests.methods import METHODS, short_spec

DRAWN = sorted(set(METHODS) - {"full", "lomo", "adalomo", "galore", "lsp_offload", "shira"})
"""What trains the base starts where the base is; SHiRA at zeros, whose places its own test draws."""


def start(spec: RunSpec, seed: int) -> list[torch.Tensor]:
    """The trainable tensors of a method as it attaches them."""
    torch.manual_seed(99)  # a start that is drawn from torch's own state would not depend on the seed handed over
    loaded = models.load_model("embedded", None, "float32", "cpu")
    attached = find_method(spec.method).attach(loaded.model, parse_options(spec.method, spec.options), seed)
    return [p.detach().clone() for p in attached.parameters()]


@pytest.mark.parametrize("name", DRAWN)
def test_a_method_starts_from_its_seed_in_every_layer(name: str) -> None:
    spec = short_spec(name)
    once, again, other = (start(spec, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    drawn = [(a, b) for a, b in zip(once, other, strict=True) if a.unique().numel() > 1]  # zeros and ones are fixed
    assert drawn and not any(torch.equal(a, b) for a, b in drawn)
    # No two layers share a draw.
    for i, (first, _) in enumerate(drawn):
        assert not any(first.shape == later.shape and torch.equal(first, later) for later, _ in drawn[i + 1 :])


@pytest.mark.parametrize("name", ["lora", "adapter_h", "parallel_adapter", "parallel_adapter_offload", "meft"])
def test_a_run_starts_its_method_from_the_specs_seed(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[torch.Tensor]] = []

    def stop(attached, *rest, **settings):
        started.append([p.detach().clone() for p in attached.parameters()])
        raise loop.Diverged("looked at")

    monkeypatch.setattr(loop, "train", stop)
    for seed in (0, 5):
        spec = short_spec(name, seed=seed)
        worker.run(spec, worker.Places(run_dir=tmp_path / str(seed)))
        wanted = start(spec, seed)
        assert all(torch.equal(a, b) for a, b in zip(started[-1], wanted, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*started, strict=True))


def test_batches_come_in_an_order_that_the_seed_decides() -> None:
    orders = {seed: [loop.batch_indices(step, 4, 12, seed) for step in range(6)] for seed in range(4)}
    assert len({str(order) for order in orders.values()}) == 4
    epochs = [[i for batch in order[e : e + 3] for i in batch] for order in orders.values() for e in (0, 3)]
    assert len({str(epoch) for epoch in epochs}) == 8, "every epoch of every seed is shuffled anew"
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_training_takes_its_rows_in_the_order_of_the_specs_seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are the same for every seed, so that only their order can differ."""
    seen: list[list[int]] = []

    make = loop.batch_of

    def note(model, rows, *rest):
        seen.append([row.ids[1] for row in rows])
        return make(model, rows, *rest)

    monkeypatch.setattr(loop, "batch_of", note)
    monkeypatch.setattr(loop, "one_step", lambda *_: (1.0, torch.ones(())))
    spec = short_spec("parallel_adapter", seed=seed, steps=5, batch_size=4)
    loaded = models.load_model("embedded", None, "float32", "cpu")
    attached = find_method(spec.method).attach(loaded.model, parse_options(spec.method, spec.options), seed)
    examples = [loop.Example([1, i, 2], 1) for i in range(10)]
    loop.train(attached, spec, loop.shuffled(attached, examples, spec, 0))
    assert seen == [loop.batch_indices(i, 4, 10, seed) for i in range(5)]
    others = [[loop.batch_indices(i, 4, 10, other) for i in range(5)] for other in {0, 1, 7} - {seed}]
    assert seen not in others
