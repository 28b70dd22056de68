"""Distinctive updates: they choose the paper's neurons, and everything else keeps its bits."""

import pytest
import torch
from torch import Tensor, nn

from meft_bench.meft import background
from meft_bench.meft.background import background_of, count_background
from meft_bench.meft.config import MeftOptions
from meft_bench.meft.engine import native
from meft_bench.meft.engine.budget import whole
from meft_bench.meft.engine.distinctive import Background, best, scores, uses_of
from meft_bench.meft.model import MeftModel, attach
from tests.meft.distinctive_reference import NotingAdapter, Reference
from tests.meft.tiny_models import LAYERS, VOCAB, D, fill_values, small_config, tiny_llama, tiny_stack, tokens

ADAMW = {"lr": 2e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
MAX_NORM, STEPS = 0.5, 4
BACKGROUND = [tokens(1, 4 + i % 3, seed=90 + i)[0] for i in range(5)]


def config_of(**changes) -> MeftOptions:
    return small_config(**{"distinctive": 5, **changes})


def meft_of(config: MeftOptions) -> MeftModel:
    meft = attach(tiny_stack(), config, seed=3)
    meft.count_background([text.tolist() for text in BACKGROUND])  # as before training: values are zero
    fill_values(meft)
    meft.model.train()
    return meft


def losses(model: nn.Module, step: int, parts: int):
    def loss(part: int) -> Tensor:
        ids = tokens(2, 5, seed=10 * step + part)
        logits = model(ids)[:, :-1]
        return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1)) / parts

    return [lambda part=part: loss(part) for part in range(parts)]


def trained(meft: MeftModel) -> list[nn.Parameter]:
    return [p for store in meft.stores for p in store.parameters() if p.requires_grad]


def train(meft: MeftModel, parts: int = 1, steps: int = STEPS):
    """Norms, and all weights after every step; the optimizer."""
    optimizer, path = meft.make_optimizer(**ADAMW), []
    for step in range(steps):
        for loss in losses(meft.model, step, parts):
            loss().backward()
        norm = float(meft.clip_grad_norm_(MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
        path.append((norm, [p.detach().clone() for p in trained(meft)]))
    return path, optimizer


def reference_of(config: MeftOptions) -> Reference:
    model = tiny_stack().requires_grad_(False)
    for layer, store in zip(model.layers, meft_of(config).stores, strict=True):
        layer.mlp = NotingAdapter(layer.mlp, store.keys, store.values, store.router, config)
    reference = Reference(model, [layer.mlp for layer in model.layers], config, **ADAMW)
    reference.count_background(BACKGROUND)
    return reference


VARIANTS = [
    {},
    {"adam": "lazy"},
    {"adam": "lazy", "gate": "softmax"},
    {"distinctive": None, "distinctive_above": 0.03},
    {"reading": "union"},
    {"frozen_keys": True, "gate": "none"},
    {"key_experts": False},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_are_those_of_plain_torch(variant: dict, parts: int) -> None:
    config = config_of(**variant)
    path, _ = train(meft_of(config), parts)
    reference = reference_of(config)
    rows_moved = 0
    for step, (norm, weights) in enumerate(path):
        before = [p.detach().clone() for a in reference.adapters for p in reference.parts(a)]
        wanted = reference.step(losses(reference.model, step, parts), MAX_NORM)
        assert norm == pytest.approx(wanted, rel=1e-4)
        theirs = [p for a in reference.adapters for p in reference.parts(a)]
        for number, (ours, other, old) in enumerate(zip(weights, theirs, before, strict=True)):
            torch.testing.assert_close(ours, other.detach(), rtol=2e-5, atol=2e-6)
            still = (other.detach() == old).all(1)
            rows_moved += int((~still).sum())
            if step:
                assert torch.equal(ours[still], path[step - 1][1][number][still]), "a row not chosen lost its bits"
    all_rows = STEPS * sum(w.shape[0] for w in path[0][1])
    assert 0 < rows_moved < 0.7 * all_rows, "the test is about some rows and not all"


@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_moments_are_those_of_plain_torch_when_asked_for(adam: str) -> None:
    config = config_of(adam=adam)
    meft = meft_of(config)
    _, optimizer = train(meft)
    reference = reference_of(config)
    for step in range(STEPS):
        reference.step(losses(reference.model, step, 1), MAX_NORM)
    optimizer.settle()
    theirs = [p for a in reference.adapters for p in reference.parts(a)]
    for ours, other in zip(trained(meft), theirs, strict=True):
        first, second = reference.moments[other]
        torch.testing.assert_close(optimizer.state[ours]["exp_avg"], first, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(optimizer.state[ours]["exp_avg_sq"], second, rtol=2e-4, atol=1e-8)


ENGINES = [
    {"device_budget": 0.3},
    {"device_budget": 0.3, "retrieval": "host"},
    {"device_budget": 1.0},
    {"device_budget": 1.0, "retrieval": "host"},
    {"retrieval": "device"},
    {"overlap": True},
    {"placement": "device"},
]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_every_way_through_the_engine_gives_the_same(engine: dict, adam: str) -> None:
    plain = config_of(adam=adam)
    if "device_budget" in engine:
        share = engine["device_budget"]
        engine = {**engine, "device_budget": int(share * whole(plain, LAYERS, D, torch.float32))}
    expected, _ = train(meft_of(plain), parts=3)
    found, _ = train(meft_of(config_of(adam=adam, **engine)), parts=3)
    for (norm, weights), (norm_, weights_) in zip(expected, found, strict=True):
        assert norm == pytest.approx(norm_, rel=1e-5)
        for one, other in zip(weights, weights_, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_kernels_and_torch_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.fits(torch.zeros(1)):
        pytest.skip("no kernels here")
    fast, _ = train(meft_of(config_of()))
    monkeypatch.setattr(native, "fits", lambda *tensors: False)
    slow, _ = train(meft_of(config_of()))
    for (_, ours), (_, theirs) in zip(fast, slow, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_only_the_chosen_rows_gradients_cross() -> None:
    meft, every = meft_of(config_of(distinctive=3)), attach(tiny_stack(), small_config(), seed=3)
    fill_values(every)
    every.model.train()
    meft.link.reset()
    for one in (meft, every):
        losses(one.model, 0, 1)[0]().backward()
        one.collect_gradients()
    row = 2 * D * 4
    assert meft.link.bytes["d2h", "grads"] == LAYERS * 3 * row
    assert every.link.bytes["d2h", "grads"] == sum(u for a in every.adapters for _, u in a.usage) * row
    assert meft.link.bytes["h2d", "rows"] == every.link.bytes["h2d", "rows"]
    assert [int(store.touched_R.sum()) for store in meft.stores] == [3] * LAYERS


@pytest.mark.parametrize(
    "engine", [{}, {"device_budget": 10**4}, {"device_budget": 10**8}, {"retrieval": "device"}], ids=str
)
def test_a_model_in_eval_mode_trains_alike(engine: dict) -> None:
    """As from_pretrained gives it: what is updated, kept on the device and sent is the same."""
    (wanted, _), crossed = train(alone := meft_of(config_of(**engine))), alone.link.bytes
    meft = meft_of(config_of(**engine))
    meft.model.eval()
    found, _ = train(meft)
    for (norm, weights), (their_norm, theirs) in zip(found, wanted, strict=True):
        assert norm == their_norm and all(map(torch.equal, weights, theirs))
    assert meft.link.bytes == crossed and [a.usage for a in meft.adapters] == [a.usage for a in alone.adapters]


def test_scores_are_the_papers() -> None:
    """By hand: 4 uses, 2 texts; neurons used by 0, 1 and 2 of them."""
    background = Background(torch.tensor([0, 1, 2]), 2)
    found = scores(torch.tensor([1, 2, 1]), background.weights())
    assert found.tolist() == pytest.approx([0.25 * 1.0986123, 0.5 * 0.4054651, 0.0])
    assert best(found, config_of(distinctive=1)).tolist() == [True, False, False]
    assert best(found, config_of(distinctive=3)).tolist() == [True, True, False], "a score of 0 is never chosen"
    assert uses_of(torch.tensor([[0, 2], [2, -1]]), 3).tolist() == [1, 0, 2]


def test_the_background_is_counted_text_by_text() -> None:
    config = config_of()
    meft, reference = meft_of(config), reference_of(config)
    for adapter, using in zip(meft.adapters, reference.using, strict=True):
        background = adapter.distinctive.background
        assert background.texts == len(BACKGROUND)
        assert background.used_R.tolist() == using.int().tolist()
        assert 0 < int(background.used_R.max()) and background.used_R.unique().numel() > 2


@pytest.mark.parametrize("training", [True, False])
def test_training_without_a_background_says_what_to_call(training: bool) -> None:
    meft = attach(tiny_stack(), config_of(), seed=3)
    meft.model.train(training)
    with torch.no_grad():
        meft.model(tokens())
    with pytest.raises(ValueError, match="count_background"):
        meft.model(tokens())
    meft.count_background([[1, 2, 3]])
    losses(meft.model, 0, 1)[0]().backward()  # what was refused left nothing behind
    with pytest.raises(ValueError, match="no background text"):
        count_background(meft.model, meft.adapters, [])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"distinctive": 3, "distinctive_above": 0.1}, "give one"),
        ({"distinctive": 0}, "distinctive"),
        ({"distinctive": None, "distinctive_above": -1.0}, "distinctive_above"),
    ],
)
def test_choices_that_make_no_sense_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(**given)


def test_eight_steps_are_four_saved_and_four_more(tmp_path) -> None:
    """The checkpoint brings the counts back: nothing is counted again, and every bit is as if nothing had stopped."""
    from meft_bench.train.checkpoints import StepLog, resume, save_checkpoint
    from meft_bench.train.methods import Attached

    def attached(meft: MeftModel) -> Attached:
        return Attached(meft.model, meft.parameters_by_group(), link=meft.link,
                        background=background_of(meft.model, meft.adapters))  # fmt: skip

    def some_steps(meft: MeftModel, optimizer, numbers) -> None:
        for step in numbers:
            losses(meft.model, step, 1)[0]().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole_run, half = meft_of(config_of()), meft_of(config_of())
    optimizer = whole_run.make_optimizer(**ADAMW)
    some_steps(whole_run, optimizer, range(8))
    first = half.make_optimizer(**ADAMW)
    some_steps(half, first, range(4))
    log = StepLog(*([1.0] * 4 for _ in range(8)))
    save_checkpoint(tmp_path, 4, attached(half), first, log)
    fresh = attach(tiny_stack(), config_of(), seed=3)
    second = fresh.make_optimizer(**ADAMW)
    assert resume(tmp_path, attached(fresh), second, 8)[0] == 4
    fresh.model.train()
    some_steps(fresh, second, range(4, 8))
    optimizer.settle(), second.settle()
    for ours, theirs in zip(trained(whole_run), trained(fresh), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(optimizer.state[ours]["exp_avg"], second.state[theirs]["exp_avg"])


def test_a_base_writes_its_own_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts twice, and the harness's own way of training collects them before the first step."""
    monkeypatch.setattr(background, "OWN_TEXTS", 20)
    meft = attach(tiny_llama(), config_of(), seed=3)
    meft.link.reset()
    counts = background_of(meft.model, meft.adapters)
    assert counts.collect() == 20 and not meft.link.bytes, "the background is no part of training"
    once = counts.tensors()
    counts.collect()
    assert all(torch.equal(a, b) for a, b in zip(once, counts.tensors(), strict=True))
    assert all(0 < int(t[:-1].max()) <= int(t[-1]) == 20 for t in once)
    assert background_of(meft.model, attach(tiny_llama(), small_config()).adapters) is None
