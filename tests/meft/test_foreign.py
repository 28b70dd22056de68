"""Other people's code around the model: whoever reads or writes parameters and gradients finds them as in torch."""

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import meft_bench
from meft_bench.meft.adam import ROW_ADAM, DenseRowAdamW
from meft_bench.meft.engine.handle import RowsParameter
from meft_bench.meft.model import MeftModel
from meft_bench.meft.store import NeuronStore
from meft_bench.train.models import embedded_dir
from tests.integrations.small import with_meft
from tests.meft.test_engine import EVERYTHING, micro_batch, tiny_meft
from tests.meft.tiny_models import D, small_config, tokens

ENGINES = [
    {},
    {"device_budget": EVERYTHING},
    {"overlap": True},
    {"lookahead": 1, "probed": 6, "kept": 24},
    {"scoring": "int8", "kept": 24, "probed": 6},
]


def named(options: dict) -> str:
    return "-".join(options) or "default"


def steps(meft: MeftModel, optimizer: torch.optim.Optimizer, numbers: range, settle: bool = False) -> list[float]:
    losses = []
    for step in numbers:
        losses.append(micro_batch(meft, step))
        optimizer.step()
        optimizer.zero_grad()
        if settle:
            optimizer.settle()
    return losses


def rows_as_they_are(meft: MeftModel) -> list[Tensor]:
    """Every trained tensor after all steps, past any parameter."""
    for store in meft.stores:
        store.settle()
    return [t.clone() for s in meft.stores for t in (s.rows_R2D[:, 0], s.rows_R2D[:, 1], s.router_ND)]


def trained(meft: MeftModel, how: str, captured: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the trained parameters, got at in one of many ways."""
    model = meft.model
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    if how == "named_parameters":
        return [p.detach().clone() for _, p in model.named_parameters() if p.requires_grad]
    if how == "parameters":
        return [p.clone().detach() for p in model.parameters() if p.requires_grad]
    if how == "data":
        return [p.data.clone() for p in model.parameters() if p.requires_grad]
    if how == "captured before":
        return [p.detach().clone() for p in captured]
    if how == "arithmetic":
        return [(p * 1).detach() for p in captured]
    if how == "foreach":
        return list(torch._foreach_mul(captured, 1.0))
    if how == "get_parameter":
        return [model.get_parameter(n).detach().clone() for n in names]
    if how == "state_dict":
        state = model.state_dict()
        return [state[n].clone() for n in names]
    if how == "deepcopy":
        return [p.detach().clone() for p in copy.deepcopy(model).parameters() if p.requires_grad]
    assert how == "pickle"
    return [pickle.loads(pickle.dumps(p)).detach() for p in captured]


WAYS = [
    "named_parameters",
    "parameters",
    "data",
    "captured before",
    "arithmetic",
    "foreach",
    "get_parameter",
    "state_dict",
    "deepcopy",
    "pickle",
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_parameters_are_current_however_they_are_read(how: str, overlap: bool) -> None:
    meft, eager = tiny_meft(overlap=overlap, neurons=96, experts=12, kept=2), tiny_meft(neurons=96, experts=12, kept=2)
    captured = [p for p in meft.model.parameters() if p.requires_grad]
    steps(meft, meft.make_optimizer(lr=1e-2), range(8))
    steps(eager, eager.make_optimizer(lr=1e-2), range(8), settle=True)
    wanted = [p.detach().clone() for store in eager.stores for p in store.parameters()]
    got = trained(meft, how, captured)
    assert len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_parameters_of_a_peft_model_are_current() -> None:
    model = with_meft()
    optimizer = meft_bench.make_optimizer(model, lr=1e-2)
    captured = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    for seed in range(8):
        ids = tokens(1, 4, seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = {n: p.detach().clone() for n, p in captured.items()}
    state = model.state_dict()
    optimizer.settle()
    assert all(torch.equal(seen[n], state[n]) for n in seen)


WRITES: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "copy_": lambda p, t: p.copy_(t),
    "data.copy_": lambda p, t: p.data.copy_(t),
    "data =": lambda p, t: setattr(p, "data", t.clone()),
    "add_": lambda p, t: p.sub_(p).add_(t),
    "[...] =": lambda p, t: p.__setitem__(..., t),
    "foreach": lambda p, t: torch._foreach_copy_([p], [t]),
    "detach().copy_": lambda p, t: p.detach().copy_(t),
}


@pytest.mark.parametrize("options", ENGINES, ids=named)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_stays_and_is_trained_on(write: str, options: dict) -> None:
    """Values written between steps through parameters captured before the first, as a resident adapter takes them."""

    def run(meft: MeftModel, settle: bool) -> tuple[list[float], list[Tensor]]:
        optimizer = meft.make_optimizer(lr=1e-2)
        captured = [p for p in meft.model.parameters() if p.requires_grad]
        losses = steps(meft, optimizer, range(4), settle)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in captured:
                WRITES[write](parameter, 0.2 * torch.randn(parameter.shape, generator=generator))
        losses += steps(meft, optimizer, range(4, 8), settle)
        return losses, rows_as_they_are(meft)

    got = run(tiny_meft(**options), settle=False)
    wanted = run(tiny_meft(**{**options, "device_budget": 0, "overlap": False}), settle=True)
    assert got[0] == wanted[0] and all(torch.equal(a, b) for a, b in zip(got[1], wanted[1], strict=True))


def test_what_stood_still_moves_on_from_what_is_written() -> None:
    """Steps that are too small to change a row are not too small for what somebody writes there."""

    def run(settle: bool, loaded: bool) -> Tensor:
        store = NeuronStore(small_config(), D, torch.Generator().manual_seed(0), torch.device("cpu"))
        with torch.no_grad():
            store.values.fill_(1.0)
        optimizer = DenseRowAdamW([store], lr=1e-2)
        for step in range(8):
            rows_U = torch.arange(4) if step == 0 else torch.tensor([5])
            store.add_gradients(rows_U, torch.full((len(rows_U), 2, D), 1e-15))
            optimizer.step()
            optimizer.zero_grad()
            if settle:
                optimizer.settle()
            if step == 3 and loaded:
                store.load_state_dict({name: 0 * p for name, p in store.state_dict().items()})
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                assert not store.rows_R2D.any()
            elif step == 3:
                with torch.no_grad():
                    store.values.zero_()
        store.settle()
        return store.rows_R2D.clone()

    for loaded in (False, True):
        wanted = run(settle=True, loaded=loaded)
        assert wanted[:4, 1].ne(0).all() and torch.equal(run(settle=False, loaded=loaded), wanted)


@pytest.mark.parametrize("options", ENGINES, ids=named)
def test_load_state_dict_in_the_middle(options: dict) -> None:
    def run(meft: MeftModel, settle: bool) -> list[float]:
        optimizer = meft.make_optimizer(lr=1e-2)
        early = {n: t.clone() for n, t in meft.model.state_dict().items()}
        steps(meft, optimizer, range(4), settle)
        meft.model.load_state_dict(early)
        return steps(meft, optimizer, range(4, 8), settle)

    assert run(tiny_meft(**options), False) == run(tiny_meft(**{**options, "device_budget": 0}), True)


def test_an_average_of_the_weights_is_that_of_all_steps() -> None:
    """EMA with torch's own helper, and by hand over parameters captured once."""

    def run(settle: bool) -> tuple[list[Tensor], list[Tensor]]:
        meft = tiny_meft()
        optimizer = meft.make_optimizer(lr=1e-2)
        average = AveragedModel(meft.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        captured = [p for p in meft.model.parameters() if p.requires_grad]
        shadow = [p.detach().clone() for p in captured]
        for step in range(6):
            steps(meft, optimizer, range(step, step + 1), settle)
            average.update_parameters(meft.model)
            for mean, parameter in zip(shadow, captured, strict=True):
                mean.lerp_(parameter.detach(), 0.1)
        return [p.detach().clone() for p in average.module.parameters() if p.requires_grad], shadow

    for got, wanted in zip(run(False), run(True), strict=True):
        assert len(got) == len(wanted) == 6 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# ---- several optimizers ----


@pytest.mark.parametrize("turns", ["first alone", "in turns", "in turns, each with its own zero_grad"])
@pytest.mark.parametrize("options", [*ENGINES, {"device_budget": 12000}, {"moments": "bf16"}], ids=named)
def test_optimizers_of_the_same_rows_take_turns(options: dict, turns: str) -> None:
    """A second one that is only made changes nothing; two that step in turn are as two that put off no step."""

    def run(eager: bool) -> list[Tensor]:
        meft = tiny_meft(**options)
        given = [{"lr": 1e-2, "eps": 1e-4}, {"lr": 3e-2, "eps": 1e-4}]
        both = [meft.make_optimizer(**g) for g in (given[:1] if eager and turns == "first alone" else given)]
        for step in range(12):
            optimizer = both[0] if turns == "first alone" else both[step // 2 % 2]
            micro_batch(meft, step)
            meft.clip_grad_norm_(0.5)
            optimizer.step()
            (optimizer if turns.endswith("zero_grad") else both[0]).zero_grad()
            for one in both if eager else ():
                one.settle()
        return rows_as_they_are(meft)

    exact = "device_budget" not in options  # rows that were looked at stay on the host, which rounds otherwise
    for got, wanted in zip(run(False), run(True), strict=True):
        if exact:
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_lazy_optimizer_takes_over_from_a_dense_one() -> None:
    def run(eager: bool) -> list[Tensor]:
        meft = tiny_meft()
        dense, lazy = (ROW_ADAM[kind](meft.stores, lr=1e-2, eps=1e-4) for kind in ("dense", "lazy"))
        for step in range(8):
            micro_batch(meft, step)
            (dense, lazy)[step % 2].step()
            dense.zero_grad()
            if eager:
                dense.settle()
        return rows_as_they_are(meft)

    assert all(map(torch.equal, run(False), run(True)))


# ---- torch's optimizers ----


@pytest.mark.parametrize(
    "options", [*ENGINES, {"device_budget": 3000}, {"key_experts": False, "kept": 24, "retrieval": "device"}], ids=named
)
@pytest.mark.parametrize("to_none", [True, False])
def test_torch_adamw_trains_as_ours(options: dict, to_none: bool) -> None:
    """Over parameters captured once, with clipping and accumulation; losses equal to 1e-5."""

    def run(meft: MeftModel, ours: bool) -> list[float]:
        parameters = [p for p in meft.model.parameters() if p.requires_grad]
        optimizer = meft.make_optimizer(lr=1e-2) if ours else torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        losses = []
        for step in range(6):
            losses += [micro_batch(meft, 2 * step + i, 2) for i in range(2)]
            if ours:
                meft.clip_grad_norm_(0.5)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        return losses

    assert run(tiny_meft(**options), ours=False) == pytest.approx(run(tiny_meft(**options), ours=True), rel=1e-5)


def test_torch_optimizers_of_one_half_leave_the_other_alone() -> None:
    """Setting keys.grad to None is no word about values.grad."""
    meft = tiny_meft(gate="none")
    micro_batch(meft, 0)
    store = meft.stores[0]
    values = store.values.grad.clone()
    store.keys.grad = None
    store.prepare_gradients()
    assert values.any() and torch.equal(store.values.grad, values) and not store.keys.grad.any()


@pytest.mark.parametrize("options", [{}, {"device_budget": EVERYTHING}, {"overlap": True}], ids=named)
@pytest.mark.parametrize("clear", ["optimizer", "model", "None"])
def test_gradients_of_a_skipped_step_are_gone(clear: str, options: dict) -> None:
    def run(skipped: bool) -> list[Tensor]:
        meft = tiny_meft(**options)
        optimizer = meft.make_optimizer(lr=1e-2)
        if skipped:
            micro_batch(meft, 5)
            if clear == "optimizer":
                optimizer.zero_grad()
            elif clear == "model":
                meft.model.zero_grad()
            else:
                for store in meft.stores:
                    for parameter in store.parameters():
                        parameter.grad = None
        steps(meft, optimizer, range(2))
        return rows_as_they_are(meft)

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("adam", ["dense", "lazy"])
@pytest.mark.parametrize("native", [True, False])
def test_gradients_that_others_add_count(native: bool, adam: str, monkeypatch) -> None:
    """Noise on every row's gradient, as differential privacy adds: every row moves, and the noise is gone after."""
    if not native:
        monkeypatch.setattr("meft_bench.meft.engine.native.fits", lambda *tensors: False)
    meft = tiny_meft(neurons=96, experts=12, kept=2, gate="none", adam=adam)
    optimizer = meft.make_optimizer(lr=1e-2)
    micro_batch(meft, 0)
    before = rows_as_they_are(meft)
    assert not meft.stores[0].keys.grad.any(1).all(), "some row must have none of its own"
    for store in meft.stores:
        for parameter in (store.keys, store.values):
            parameter.grad.add_(torch.ones(96, D))
    optimizer.step()
    optimizer.zero_grad()
    after = rows_as_they_are(meft)
    for a, b, router in zip(before, after, [False, False, True] * 2, strict=True):
        assert router or (a != b).any(1).all()
    assert not any(p.grad.any() for store in meft.stores for p in (store.keys, store.values))


def test_reading_weights_between_passes_stops_no_checkpointed_backward() -> None:
    """Only what was written makes rows of a forward pass invalid, not a look at them."""
    meft = tiny_meft(device_budget=EVERYTHING)
    ids = tokens()
    loss = meft.model(ids).square().mean()
    loss.backward(retain_graph=True)
    assert all(p.isfinite().all() for p in meft.model.parameters())
    loss.backward()


def test_parameters_stay_ordinary_ones() -> None:
    meft = tiny_meft()
    store = meft.stores[0]
    for parameter in store.parameters():
        assert isinstance(parameter, RowsParameter) and isinstance(parameter, nn.Parameter) and parameter.is_leaf
        copied = copy.deepcopy(parameter)
        assert torch.equal(copied, parameter) and copied.data_ptr() != parameter.data_ptr()
    other = copy.deepcopy(store)
    assert other.keys.owner() is other and store.keys.owner() is store
    store.keys = nn.Parameter(torch.zeros_like(store.keys))
    assert store.keys.owner() is store
    store._parameters["values"] = nn.Parameter(torch.ones_like(store.keys))  # as some loaders do
    assert store.rows_R2D[:, 1].eq(1).all() and store.values.owner() is store
    parameter = store.values
    del meft, store, other
    gc.collect()
    assert parameter.sum() == parameter.numel(), "a parameter that outlives its model is a tensor"


# ---- the embedded model under Trainer ----


def trainer_losses(folder, ours: bool) -> list[float]:
    base = AutoModelForCausalLM.from_pretrained(embedded_dir(), dtype=torch.float32)
    model = get_peft_model(base, meft_bench.MeftConfig(r=96, k=4, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": (ids := torch.randint(4, 800, (8,), generator=generator).tolist()), "labels": ids}
        for _ in range(10)
    ]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=1, learning_rate=1e-2, warmup_steps=5,
        logging_steps=1, save_strategy="no", report_to=[], optim="adamw_torch", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    if ours:
        trainer = meft_bench.prepare(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_embedded_model_under_trainer_learns_as_with_torch_adamw(tmp_path) -> None:
    """Warm-up from rate 0 over 5 of 10 steps: losses equal to 2e-4 (they are logged with four digits), from 5 to 2."""
    ours, theirs = (trainer_losses(tmp_path / str(kind), kind) for kind in (True, False))
    assert len(ours) == 10 and ours == pytest.approx(theirs, abs=2e-4)
