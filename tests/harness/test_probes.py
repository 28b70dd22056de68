"""Probes measure what they say, against hand-made models, and leave the model as it was."""

import math

import pytest
import torch

from meft_bench.harness import evaluation, probes
from meft_bench.meft.layer import MeftAdapter
from meft_bench.train import loop, models
from meft_bench.train.methods import find_method, parse_options
from tests.methods import short_spec


def trained(name: str, steps: int = 6):
    """(model, loaded, task, spec) of a few steps of one of conftest.METHODS."""
    spec = short_spec(name, steps=steps)
    loaded = models.load_model("embedded", None, "float32", "cpu")
    task = evaluation.load_task(spec, None)
    attached = find_method(spec.method).attach(loaded.model, parse_options(spec.method, spec.options), spec.seed)
    examples = loop.render(task.training_docs(), loaded.tokenizer)
    loop.train(attached, spec, loop.shuffled(attached, examples, spec, loaded.tokenizer.pad_token_id))
    attached.model.eval()
    return attached.model, loaded, task, spec


@pytest.fixture(scope="module")
def meft():
    return trained("meft")


def adapters_of(model) -> list[MeftAdapter]:
    return [m for m in model.modules() if isinstance(m, MeftAdapter)]


def sequences(loaded, task) -> list[list[int]]:
    return [e.ids for e in loop.render(task.training_docs(), loaded.tokenizer)]


def test_a_probed_model_is_what_it_was(meft):
    model, loaded, task, spec = meft
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    configs = [a.config for a in adapters_of(model)]
    usage = [list(a.usage) for a in adapters_of(model)]
    first, second = (probes.probe(model, loaded, task, spec) for _ in range(2))
    assert first == second
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [a.config for a in adapters_of(model)] == configs
    assert [list(a.usage) for a in adapters_of(model)] == usage, "usage counts training alone"
    assert all("select" not in vars(a) for a in adapters_of(model))
    assert set(first) == {"evidence", "base_text", "union_grid", "neurons", "lookahead", "other_reading"}


def test_methods_without_neurons_have_the_base_text_alone():
    assert set(probes.probe(*trained("lora"))) == {"evidence", "base_text"}
    assert set(probes.probe(*trained("parallel_adapter"))) == {"evidence", "base_text", "activation"}


@torch.no_grad()
def test_the_base_text_is_the_loss_on_it():
    loaded = models.load_model("embedded", None, "float32", "cpu")
    found = probes.base_text(loaded.model, loaded)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]), rel=1e-4)
    # The base knows its text: far from a uniform guess over a thousand words, and worse once its weights are hurt.
    assert 0.3 < found["nats_per_token"] < 2
    loaded.model.lm_head.weight.mul_(0)
    hurt = probes.base_text(loaded.model, loaded)
    assert hurt["nats_per_token"] == pytest.approx(math.log(loaded.model.config.vocab_size), abs=1e-4)
    assert hurt["tokens"] == found["tokens"]


def test_the_union_grid_grows_and_equals_the_union_of_what_tokens_keep(meft):
    model, loaded, task, _ = meft
    adapters, rows = adapters_of(model), sequences(loaded, task)
    grid = {(p["batch"], p["length"]): p["share_by_layer"] for p in probes.union_grid(model, loaded, adapters, rows)}
    assert (1, 8) in grid and all(0 < s <= 1 for shares in grid.values() for s in shares)
    for batch, length in grid:
        if (batch * 2, length) in grid:  # twice the sequences hold the first half
            assert all(a <= b for a, b in zip(grid[batch, length], grid[batch * 2, length], strict=True))
    stream = [token for row in rows for token in row]
    seen: list[torch.Tensor] = []
    hook = adapters[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=torch.tensor(stream[:32]).view(4, 8), use_cache=False)
    hook.remove()
    kept = set()
    for h_D in seen[0].reshape(-1, seen[0].shape[-1]):  # token by token
        kept |= set(adapters[0].select(h_D[None], None).union_U.tolist())
    assert grid[4, 8][0] == pytest.approx(len(kept) / adapters[0].config.neurons, abs=1e-5)


def test_neurons_in_use_are_counted_by_token(meft):
    model, loaded, task, _ = meft
    adapters, rows = adapters_of(model), sequences(loaded, task)[:5]
    found = probes.neurons_in_use(model, loaded, adapters, rows)
    assert found["tokens"] == sum(map(len, rows))
    assert all(0 < k <= adapters[0].config.kept for k in found["kept_per_token"])
    assert all(0 <= e <= 1 for name in ("neuron_entropy", "expert_entropy") for e in found[name])
    # With all neurons in reach of every token and all kept, none is dead and all are used alike.
    model, loaded, task, _ = trained("meft_no_ke")
    for adapter in adapters_of(model):
        config = adapter.config
        adapter.config = type(config)(
            neurons=config.neurons, kept=config.neurons, key_experts=False, selection="signed"
        )
    whole = probes.neurons_in_use(model, loaded, adapters_of(model), rows)
    assert whole["dead_share"] == [0.0] * 4 and whole["neuron_entropy"] == pytest.approx([1.0] * 4, abs=1e-4)
    assert "expert_entropy" not in whole


def test_lookahead_finds_all_where_layers_see_the_same(meft):
    """Attention and FFN that write nothing, equal norms and equal stores: the layer before selects the same neurons."""
    model, loaded, task, _ = trained("meft", steps=2)
    adapters = adapters_of(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.post_attention_layernorm.weight.fill_(1)
        for adapter in adapters:
            adapter.store.values.zero_()
            for name, parameter in adapter.store.named_parameters():
                parameter.copy_(dict(adapters[0].store.named_parameters())[name])
    rows = sequences(loaded, task)[:8]
    same = probes.lookahead(model, loaded, adapters, rows)
    assert same["recall_per_token"] == same["recall_of_union"] == [1.0] * 3
    with torch.no_grad():
        adapters[1].store.keys.neg_()
        adapters[1].store.router.neg_()
        model.model.layers[0].mlp.down_proj.weight.normal_()
    other = probes.lookahead(model, loaded, adapters, rows)
    assert other["recall_per_token"][0] < 1


@torch.no_grad()
def test_activation_shares_of_a_hand_made_adapter():
    """Keys of which exactly one in ten can fire."""
    spec = short_spec("parallel_adapter")
    loaded = models.load_model("embedded", None, "float32", "cpu")
    task = evaluation.load_task(spec, None)
    attached = find_method("parallel_adapter").attach(
        loaded.model, parse_options("parallel_adapter", {"neurons": 20}), 0
    )
    dense = [m for m in attached.model.modules() if isinstance(m, probes.ParallelAdapter)]
    for adapter in dense:
        adapter.keys.zero_()
        adapter.keys[3, 0], adapter.keys[7, 0] = 1.0, -1.0  # for any token one of the two fires, or neither
    found = probes.activation(attached.model, loaded, dense, sequences(loaded, task)[:10])
    assert all(0 < share <= 1 / 20 + 1e-6 for share in found["active_share"])
    assert found["top5_share_of_token"] == pytest.approx([1.0] * 4, abs=1e-4)
    for curve in found["cumulative_by_layer"]:
        assert len(curve) == probes.CURVE_POINTS and curve[0] == 0
        assert curve == sorted(curve) and curve[2:] == pytest.approx([1.0] * 19, abs=1e-4)


def test_the_other_reading_is_scored(meft):
    model, loaded, task, _ = meft
    found = probes.other_reading(model, loaded, task, adapters_of(model))
    assert found["reading"] == "union" and found["n"] == len(task.dataset["test"])
    assert set(found["metrics"]) == {"contains", "exact_match", "f1"}


def test_entropy_by_hand():
    """Over its maximum: 1 for all alike, 0 for one alone, and 0 where there is nothing to share."""
    assert probes.entropy(torch.tensor([2.0, 2.0, 2.0, 2.0])) == 1.0
    assert probes.entropy(torch.tensor([7.0, 0.0, 0.0])) == 0.0
    assert probes.entropy(torch.tensor([5.0])) == probes.entropy(torch.zeros(4)) == 0.0
    p, rest = 0.75, 0.25
    expected = -(p * math.log(p) + rest * math.log(rest)) / math.log(2)
    assert probes.entropy(torch.tensor([3.0, 1.0])) == pytest.approx(expected, abs=1e-5)


def test_counts_look_at_256_training_rows_and_the_grid_at_all(meft, monkeypatch):
    """As the tables' captions say."""
    model, loaded, task, spec = meft
    seen = {}
    for name in ("neurons_in_use", "lookahead", "union_grid"):
        monkeypatch.setattr(probes, name, lambda *args, name=name: seen.update({name: len(args[3])}) or {})
    monkeypatch.setattr(probes, "other_reading", lambda *_: {})
    monkeypatch.setattr(probes, "base_text", lambda *_: {})
    monkeypatch.setattr(probes, "WHOLE", probes.Extent(sequences=5, ahead=3))
    probes.probe(model, loaded, task, spec)
    assert seen == {"neurons_in_use": 5, "lookahead": 3, "union_grid": len(task.dataset["train"])}
    monkeypatch.undo()
    assert (probes.WHOLE.sequences, probes.WHOLE.ahead) == (256, 64)
