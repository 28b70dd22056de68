"""Every method trains the same whether it is cut off, resumed or split into micro-batches; counts equal the formula."""

import multiprocessing
import os
import signal

import pytest
import torch

from meft_bench.harness import evaluation
from meft_bench.harness.spec import RunSpec
from meft_bench.train import loop, models
from meft_bench.train.checkpoints import newest_checkpoint
from meft_bench.train.methods import find_method, parse_options
from tests.methods import METHODS, short_spec


def prepare(spec: RunSpec):
    """(attached, examples, pad id) of a spec on the embedded model."""
    torch.manual_seed(spec.seed)
    loaded = models.load_model("embedded", None, "float32", "cpu")
    attached = find_method(spec.method).attach(loaded.model, parse_options(spec.method, spec.options), spec.seed)
    task = evaluation.load_task(spec, None)
    return attached, loop.render(task.training_docs(), loaded.tokenizer), loaded.tokenizer.pad_token_id


def train(attached, examples, spec: RunSpec, pad: int, checkpoints=None):
    """(optimizer, log) of examples in the order of the spec's seed."""
    return loop.train(attached, spec, loop.shuffled(attached, examples, spec, pad), checkpoints=checkpoints)


def trained(spec: RunSpec, checkpoints=None, **settings):
    """(parameters after training, losses) of a spec."""
    attached, examples, pad = prepare(spec)
    kept = None if checkpoints is None else loop.Checkpoints(folder=checkpoints, **settings)
    _, log = train(attached, examples, spec, pad, kept)
    return [p.detach().clone() for p in attached.parameters()], log.loss


def _train_and_die(spec: RunSpec, checkpoints) -> None:
    """Train with a checkpoint every second step and kill -9 this process right after step 4's is in place."""
    torch.set_num_threads(1)
    save = loop.save_checkpoint

    def save_then_die(folder, step, *rest):
        save(folder, step, *rest)
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.save_checkpoint = save_then_die
    trained(spec, checkpoints, every_steps=2)


def test_kill_and_resume_is_bitwise(method, tmp_path):
    spec = short_spec(method)
    straight, losses = trained(spec)
    # Not forked from here: torch's thread pool does not survive that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meft_bench.harness.worker"])
    victim = context.Process(target=_train_and_die, args=(spec, tmp_path))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0000004"]
    resumed, resumed_losses = trained(spec, tmp_path)
    assert resumed_losses == losses
    for expected, got in zip(straight, resumed, strict=True):
        assert torch.equal(expected, got)


def test_accumulation_keeps_the_losses(method):
    if method == "meft_union":
        pytest.skip("the union is over the micro-batch: by Algorithm 1 its size changes with it")
    if method == "meft_distinctive":
        pytest.skip("neurons are chosen for each micro-batch: a step updates what any of its micro-batches chose")
    # Losses, not weights: AdamW divides a gradient by its own size, so rounding in a near-zero one may flip its step.
    _, losses = trained(short_spec(method))
    _, part_losses = trained(short_spec(method, accumulation=2))
    assert losses == pytest.approx(part_losses, rel=1e-3)


def test_accumulated_gradient_equals_the_whole(method):
    if method == "meft_union":
        pytest.skip("the union is over the micro-batch: by Algorithm 1 its size changes with it")
    if method == "meft_distinctive":
        pytest.skip("neurons are chosen for each micro-batch: each has gradients of others")
    gradients = []
    for accumulation in (1, 4):
        spec = short_spec(method, accumulation=accumulation)
        attached, examples, pad = prepare(spec)
        with torch.no_grad():  # what starts at zero keeps its partner's gradient at zero
            for parameter in (p for name in ("values", "lora_b", "up") for p in attached.groups.get(name, [])):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        optimizer = attached.make_optimizer(lr=1e-3)
        supervised = sum(len(e.ids) - e.prompt_length for e in examples[:8])
        for i in range(0, 8, 8 // accumulation):
            batch = loop.collate(examples[i : i + 8 // accumulation], pad, torch.device("cpu"))
            (loop.token_loss(attached.model, batch) / supervised).backward()
        gradients.append([p.grad.clone() for p in attached.parameters()])
        optimizer.zero_grad()
    for whole, parts in zip(*gradients, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)


def test_counts_equal_the_closed_formula(method):
    spec = short_spec(method)
    loaded = models.load_model("embedded", None, "float32", "cpu")
    shape, options = models.shape_of(loaded.model), parse_options(spec.method, spec.options)
    module = find_method(spec.method)
    attached = module.attach(loaded.model, options, 0)
    wanted = {name: n for name, n in module.count(options, shape).items() if n}
    assert attached.parameter_groups() == wanted
    trainable = {id(p) for p in attached.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in attached.parameters()}


def test_only_the_groups_move(method):
    spec = short_spec(method, steps=2)
    attached, examples, pad = prepare(spec)
    mine = {id(p) for p in attached.parameters()}
    before = {n: p.detach().clone() for n, p in attached.model.named_parameters() if id(p) not in mine}
    train(attached, examples, spec, pad)
    for name, parameter in attached.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_offload_is_the_parallel_adapter():
    options = {"neurons": 12}
    resident = RunSpec(task="facts", method="parallel_adapter", options=options, steps=4, batch_size=8, train_rows=30)
    offloaded = RunSpec.from_dict({**resident.to_dict(), "method": "parallel_adapter_offload"})
    (_, losses), (_, moved_losses) = trained(resident), trained(offloaded)
    assert losses == pytest.approx(moved_losses, rel=1e-5)


def test_labels_are_shifted_and_prompts_unsupervised():
    example = loop.Example([1, 5, 6, 7, 2], prompt_length=3)
    batch = loop.collate([example, loop.Example([1, 2], 1)], 0, torch.device("cpu"))
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 2], [-100, 2, -100, -100, -100]]
    assert batch["attention_mask"].sum().item() == 7

    class Oracle(torch.nn.Module):
        def forward(self, input_ids, **_):
            logits = torch.full((*input_ids.shape, 9), -30.0)
            nxt = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)
            return type("Out", (), {"logits": logits.scatter(2, nxt[..., None], 30.0)})

    assert loop.token_loss(Oracle(), batch).item() == pytest.approx(0, abs=1e-6)


def test_every_row_is_seen_once_per_epoch():
    seen = [i for step in range(6) for i in loop.batch_indices(step, 5, 10, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert seen[5:10] == loop.batch_indices(1, 5, 10, seed=3)


def test_schedule_warms_up_and_ends_at_zero():
    scales = [loop.learning_rate_scale(s, 100, 0.02) for s in range(101)]
    assert scales[:3] == [0.5, 1.0, 1.0] and scales[100] == 0 and scales[51] == pytest.approx(0.5)


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    spec = short_spec("parallel_adapter", steps=3)
    trained(spec, tmp_path, every_steps=1)
    other = RunSpec.from_dict({**spec.to_dict(), "options": {"neurons": 20, "activation": "silu"}})
    with pytest.raises(ValueError, match=r"has shape \(12, 128\), the model needs \(20, 128\)"):
        trained(other, tmp_path)


def test_truncated_checkpoint_is_refused(tmp_path):
    spec = short_spec("parallel_adapter", steps=3)
    trained(spec, tmp_path, every_steps=1)
    file = newest_checkpoint(tmp_path) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        trained(spec, tmp_path)


def test_overlong_rows_are_refused_or_counted():
    examples = [loop.Example([1] * n, 1) for n in (3, 9, 4)]
    with pytest.raises(ValueError, match="1 of 3 training rows exceed max_length=5"):
        loop.fit_length(examples, 5, "refuse")
    kept, dropped = loop.fit_length(examples, 5, "drop")
    assert (len(kept), dropped) == (2, 1)
    with pytest.raises(ValueError, match="no training row fits"):
        loop.fit_length(examples, 2, "drop")


def test_divergence_is_named():
    spec = short_spec("parallel_adapter")
    attached, examples, pad = prepare(spec)
    attached.groups["keys"][0].data.fill_(float("nan"))
    with pytest.raises(loop.Diverged, match="step 1 of 8"):
        train(attached, examples, spec, pad)


@pytest.mark.parametrize("name", ["meft", "lora", "full"])
def test_a_last_update_that_diverges_is_named(name, overflowing_update):
    # Every loss is finite, for none is computed after the last update.
    spec = short_spec(name, steps=1)
    with pytest.raises(loop.Diverged, match="hold a value that is no finite number after step 1 of 1"):
        trained(spec)


def test_no_checkpoint_holds_what_diverged(tmp_path, overflowing_update):
    spec = short_spec("parallel_adapter")
    with pytest.raises(loop.Diverged, match="the keys hold a value that is no finite number after step 1 of 8"):
        trained(spec, tmp_path, every_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_no_number_is_divergence(monkeypatch):
    spec = short_spec("parallel_adapter")
    attached, examples, pad = prepare(spec)
    monkeypatch.setattr(attached, "clip", lambda norm: torch.tensor(float("inf")))
    with pytest.raises(loop.Diverged, match="the gradient's norm is inf at step 1 of 8"):
        train(attached, examples, spec, pad)


def test_the_seed_decides_the_order_of_the_rows():
    orders = {seed: [loop.batch_indices(s, 8, 100, seed) for s in range(4)] for seed in (0, 1, 2)}
    assert orders[0] != orders[1] != orders[2] != orders[0]
    loop._PERMUTATIONS.clear()
    assert orders[1] == [loop.batch_indices(s, 8, 100, 1) for s in range(4)]


def test_the_loop_trains_on_the_rows_of_its_seed(monkeypatch):
    seen: dict[int, list] = {}
    make, seeds = loop.batch_of, []
    for seed in (0, 1):
        seeds.append(seed)
        spec = short_spec("parallel_adapter", steps=2, seed=seed)
        # The same examples under both seeds: the order alone may differ.
        attached, examples, pad = prepare(short_spec("parallel_adapter"))
        taken = seen[seed] = []

        def note(model, rows, *rest, taken=taken):
            assert torch.initial_seed() == seeds[-1], "dropout, say, draws by the seed too"
            taken.append([row.ids for row in rows])
            return make(model, rows, *rest)

        monkeypatch.setattr(loop, "batch_of", note)
        train(attached, examples, spec, pad)
        wanted = [[examples[i].ids for i in loop.batch_indices(s, 8, len(examples), seed)] for s in range(2)]
        assert taken == wanted
    assert seen[0] != seen[1]


def test_all_methods_are_covered():
    from meft_bench.train.methods import method_names

    assert {m for m, _ in METHODS.values()} | {"base"} == set(method_names())
