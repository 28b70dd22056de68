"""A shrunk base: what is taken out, what is left, and how what is left makes up for it."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from meft_bench.train import models, shrink
from meft_bench.train.methods import find_method, parse_options
from meft_bench.train.projections import ffn_projections
from tests.meft.tiny_models import tiny_llama, tokens


def test_importance_by_hand() -> None:
    a_TF = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 1.0]])
    out_DF = torch.tensor([[1.0, 9.0, 3.0], [0.0, 0.0, 4.0]])
    found = shrink.importance(a_TF, out_DF)
    torch.testing.assert_close(found, torch.tensor([12.5**0.5, 0.0, 5.0], dtype=torch.float64))
    assert shrink.kept_neurons(a_TF, out_DF, 2).tolist() == [0, 2]


def test_reforming_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    a_TF, out_DF = torch.randn(200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    a_TF[:, 5] = a_TF[:, :5] @ torch.tensor([0.5, 0.0, -1.0, 2.0, 0.0])  # can be made up for
    kept = torch.arange(5)
    wanted = torch.linalg.lstsq(a_TF[:, :5], a_TF @ out_DF.T).solution.T
    found = shrink.reformed(a_TF, out_DF, kept)
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.01)  # the ridge
    kept = torch.tensor([0, 1, 2, 3])
    a_Tk, whole = a_TF[:, kept], a_TF @ out_DF.T
    reformed = (a_Tk @ shrink.reformed(a_TF, out_DF, kept).T - whole).square().sum()
    assert reformed < 0.9 * (a_Tk @ out_DF[:, kept].T - whole).square().sum()


def test_a_neuron_that_adds_nothing_goes_first_and_is_not_missed() -> None:
    model = tiny_llama().eval()
    into, out = ffn_projections(model)[0]
    silent = [1, 4]
    with torch.no_grad():
        for _, last in ffn_projections(model):
            last.weight[:, silent] = 0.0
    before, whole = model(input_ids=tokens(seed=1)).logits, sum(p.numel() for p in model.parameters())
    width, neurons = out.weight.shape
    share = 1 - len(ffn_projections(model)) * 2 * 3 * width / whole
    gone = shrink.shrink_ffns(model, share)
    assert gone == 2 * len(ffn_projections(model)) * 3 * width == whole - sum(p.numel() for p in model.parameters())
    assert out.in_features == neurons - 2 and all(m.out_features == neurons - 2 for m in into)
    torch.testing.assert_close(model(input_ids=tokens(seed=1)).logits, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.9, 0.8])
def test_the_embedded_base_keeps_about_that_share_and_most_of_what_it_knows(share: float) -> None:
    base = models.load_model("embedded", None, "float32", "cpu").model.eval()
    small, cut = copy.deepcopy(base), copy.deepcopy(base)
    whole = sum(p.numel() for p in base.parameters())
    gone = shrink.shrink_ffns(small, share)
    assert gone / whole == pytest.approx(1 - share, abs=0.002)
    ids = shrink.own_text(base, seed=1)
    for into, out in ffn_projections(cut):  # any neurons, and nothing makes up for them
        kept = torch.arange(ffn_projections(small)[0][1].in_features)
        shrink._keep(into, out, kept, out.weight[:, kept].detach())

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    assert loss(base) < loss(small) < loss(base) + (loss(cut) - loss(base)) / 3


def test_the_method_trains_as_many_neurons_as_asked_and_refuses_what_cannot_be() -> None:
    module, options = find_method("parallel_adapter_shrunk"), {"neurons": 3, "share": 0.9}
    model = tiny_llama()
    twin = copy.deepcopy(model)
    shape = models.shape_of(model)
    attached = module.attach(model, parse_options("parallel_adapter_shrunk", options), 0)
    assert attached.parameter_groups() == module.count(parse_options("parallel_adapter_shrunk", options), shape)
    module.attach(twin, parse_options("parallel_adapter_shrunk", options), 1)
    for (_, mine), (_, theirs) in zip(ffn_projections(model), ffn_projections(twin), strict=True):
        assert torch.equal(mine.weight, theirs.weight), "the same base whatever the seed"
    with pytest.raises(ValueError, match="keep more"):
        shrink.shrink_ffns(tiny_llama(), 0.1)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=1))
    with pytest.raises(ValueError, match=r"not made of nn\.Linear"):
        shrink.shrink_ffns(gpt2, 0.9)
