"""SHiRA is Adam on a few fixed entries of the base's own matrices, and nothing else moves."""

import json
import shutil

import pytest
import torch
from meft_bench.baselines import shira
from safetensors.torch import load_file, save_file
from torch import nn

from meft_bench.finetune.generate import load_adapted
from meft_bench.train.models import load_model


def base() -> nn.Module:
    return load_model("embedded", None, "float32", "cpu").model


def places(attached) -> dict[str, torch.Tensor]:
    return {n: m.shira_indices["default"] for n, m in attached.model.named_modules() if hasattr(m, "shira_indices")}


def test_every_step_is_adam_on_the_masked_gradient_of_the_whole_matrix():
    """The paper's update: the gradient of W is multiplied by the mask, and W is trained."""
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (2, 9))
    attached, plain = shira.attach(base(), shira.Options(rank=2), seed=5), base()
    weights, masks = [], []
    for name, found in places(attached).items():
        weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight
        mask = torch.zeros_like(weight)
        mask[found[0].long(), found[1].long()] = 1
        weights.append(weight)
        masks.append(mask)
    ours, theirs = attached.make_optimizer(lr=1e-2, weight_decay=0.0), torch.optim.Adam(weights, lr=1e-2)
    start = [w.detach().clone() for w in weights]
    for _ in range(4):
        losses = [model(input_ids=ids, labels=ids).loss for model in (attached.model, plain)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for loss in losses:
            loss.backward()
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad *= mask
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for entries, weight, before, mask in zip(attached.parameters(), weights, start, masks, strict=True):
        assert not torch.equal(weight[mask == 1], before[mask == 1])
        torch.testing.assert_close(entries.detach(), (weight - before)[mask == 1], atol=2e-5, rtol=1e-3)


def test_places_are_drawn_for_every_matrix_from_the_seed():
    once, again, other = (places(shira.attach(base(), shira.Options(rank=2), seed)) for seed in (1, 1, 2))
    for name, found in once.items():
        assert torch.equal(found, again[name]) and not torch.equal(found, other[name])
        assert len(set(map(tuple, found.T.tolist()))) == found.shape[1], "no entry twice"
    drawn = list(once.values())
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_by_magnitude_the_largest_entries_are_trained():
    weight = torch.tensor([[0.1, -5.0, 2.0], [3.0, 0.0, -0.2]])
    found = shira.places(weight, 3, "magnitude", torch.Generator())
    assert found.tolist() == [[0, 0, 1], [1, 2, 0]]


def test_a_rank_beyond_the_matrix_and_a_matrix_that_is_no_linear_layer_are_refused():
    with pytest.raises(ValueError, match="rank=200 trains more entries than model.layers.0.* has: take a smaller rank"):
        shira.attach(base(), shira.Options(rank=200), 0)
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match=r"nn\.Linear alone; .* is a Conv1D: take lora"):
        shira.attach(gpt2, shira.Options(rank=1), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(10**6), "names places outside of its matrix"),
        (lambda t: t.neg_().sub_(1), "names places outside of its matrix"),
        (lambda t: t.long(), "is I64, places are I32"),
        (lambda t: t[:, 1:].contiguous(), "has shape"),
    ],
)
def test_a_strangers_places_are_refused(tmp_path, change, message):
    folder = shutil.copytree(_saved(tmp_path), tmp_path / "copy")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("indices"))
    save_file({**tensors, name: change(tensors[name])}, file)
    with pytest.raises(ValueError, match=message):
        load_adapted(folder, device="cpu")


def _saved(folder):
    """An adapter as train leaves it, without training."""
    from meft_bench.finetune import adapters
    from meft_bench.train.models import load_model

    loaded = load_model("embedded", None, "float32", "cpu")
    about = adapters.base_of(loaded.model, "embedded", None)
    options = {"rank": 1, "targets": "attention", "mask": "random"}
    attached = adapters.attach(loaded.model, "shira", options, seed=3)
    adapters.save(folder / "saved", attached, "shira", options, about, loaded.tokenizer)
    (folder / "saved" / "training.json").write_text(json.dumps({}))
    return folder / "saved"
