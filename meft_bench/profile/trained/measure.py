"""Train MEFT on a real model at several R, and log which neurons its micro-batches need: `make selection`."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import ConfigurableTask
from tqdm import tqdm

from meft_bench.bench.common import threads
from meft_bench.harness import evaluation, smollm2
from meft_bench.harness.numerics import selection_numerics
from meft_bench.harness.room import refuse_without_room
from meft_bench.harness.spec import RunSpec
from meft_bench.meft.layer import MeftAdapter
from meft_bench.profile.trained import log as files
from meft_bench.profile.trained.look import look
from meft_bench.profile.variants import PLAIN, VARIANTS, size_options
from meft_bench.provenance import provenance
from meft_bench.train import loop, models
from meft_bench.train.methods import Attached, complete_options, find_method, parse_options
from meft_bench.write import write_json

SIZES = (384, 1536, 3072, 6144)
"""R; 3072 is what a profile states, with the K that it has there."""
_STEP = 6
"""A training step takes about as long as looking at so many blocks of 128 tokens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained and looked at; every R of a log has the same."""

    model: str
    """As specs call it."""
    task: str
    data: str = "synthetic"
    learning_rate: float
    steps: int = 40
    batch_size: int = 8
    """Rows of a training step."""
    max_length: int = 96
    rows: int
    """Training rows (facts, for a task that makes its own) to draw from."""
    dtype: str = "bfloat16"
    seed: int = 0
    block: int = 128
    """Tokens of the smallest micro-batch that is looked at."""
    before: int = 64
    """Blocks that are looked at before training: 16 micro-batches of 512 tokens."""
    after: int = 256
    """And after it: 16 micro-batches of 2048 tokens."""


def settings_of(model: str, task: str, data: str, steps: int) -> Settings:
    """The suite's own way to train MEFT at its largest size on a task (harness/smollm2.py), for fewer steps."""
    fields = smollm2.TASKS[task]
    rows = round(1.4 * Settings.block * Settings.after / smollm2.TOKENS[task])
    return Settings(
        model=model, task=task, data=data, steps=steps, rows=rows,
        batch_size=fields["batch_size"],
        max_length=fields["max_length"], learning_rate=smollm2.learning_rate(PLAIN, smollm2.UNION_RATE_OF, task),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the model's and the data's files are; never part of a log."""

    model: str | Path
    data: str | None = None


def log_trained(settings: Settings, source: Source, sizes: Sequence[int], path: Path) -> dict[str, Any]:
    """Train and look at every R of sizes that the log at path lacks; returns the log, which is on the disk after each.

    A log of other numbers, or made from changed files where this checkout is clean, is begun anew. Raises ValueError
    for a broken log and one of other settings, for sizes that make no adapter or find no memory, and what loading and
    training raise.
    """
    log = _begun(settings, path)
    missing = [n for n in sizes if n not in {e["neurons"] for e in log["entries"]}]
    for neurons in missing:
        spec = _spec(settings, neurons)
        refuse_without_room(spec.method, spec.options, spec.batch_size, spec.device, source.model)
    print(_plan(settings, source, sizes, missing), flush=True)
    if not missing:
        return log
    total = len(missing) * (settings.before + settings.after + _STEP * settings.steps)
    task = evaluation.load_task(_spec(settings, SIZES[0]), source.data)
    with threads(1), tqdm(total=total, unit="block", mininterval=1) as bar:
        for neurons in missing:
            bar.set_description(f"R = {neurons}")
            entry = _entry(settings, source, neurons, task, bar.update)
            log = _going_on(log, path)  # anew: another command may have added its own
            others = [e for e in log["entries"] if e["neurons"] != neurons]
            log["entries"] = sorted([*others, entry], key=lambda e: e["neurons"])
            write_json(path, log)
    return log


def _begun(settings: Settings, path: Path) -> dict[str, Any]:
    log: dict[str, Any] = {
        "schema": files.SCHEMA,
        "evidence": "measured",
        "settings": dataclasses.asdict(settings),
        "entries": [],
        "numerics": selection_numerics(settings.task, settings.model),
        "provenance": provenance(1),
    }
    return _going_on(log, path)


def _going_on(log: dict[str, Any], path: Path) -> dict[str, Any]:
    """The log with what another one at path holds beside it, if that one counts."""
    if not path.is_file():
        return log
    before = files.read_log(path)
    if not files.counts(before, log["provenance"]):
        return log
    if other := [n for n, value in log["settings"].items() if before["settings"].get(n) != value]:
        said = ", ".join(f"{n} = {before['settings'].get(n)}" for n in other)
        raise ValueError(f"{path} holds a log with {said}: delete it, or name another folder with --output")
    there = {e["neurons"] for e in before["entries"]}
    return {**log, "entries": [*before["entries"], *(e for e in log["entries"] if e["neurons"] not in there)]}


def _plan(settings: Settings, source: Source, sizes: Sequence[int], missing: Sequence[int]) -> str:
    shape = models.model_shape(source.model)
    tokens = settings.block * (settings.before + settings.after)
    trained = settings.steps * settings.batch_size * smollm2.TOKENS.get(settings.task, settings.max_length)
    work = sum(
        (_LOOKED * tokens + _TRAINED * trained) * (shape.parameters + 2 * n * shape.hidden * shape.layers)
        for n in missing
    )
    told = ", ".join(str(n) for n in sizes)
    return (
        f"{files.title_of(settings.model)} on {settings.task}, {settings.steps} steps, R = {told}: "
        f"{len(sizes) - len(missing)} there, {len(missing)} to make, about {work / smollm2.product_rate() / 60:.0f} "
        "minutes on one thread. It may be stopped and given again: every R that is done is kept."
    )


_LOOKED, _TRAINED = 1.0, 4.5
"""Products of a parameter and token, over the share of this machine's fp32 product rate that bfloat16 models reach."""


def _spec(settings: Settings, neurons: int) -> RunSpec:
    """The run that trains at R = neurons, with the profile's own N, P and K."""
    s = settings
    options = complete_options(VARIANTS[PLAIN].method, size_options(VARIANTS[PLAIN], neurons, None))
    return RunSpec(
        task=s.task, method=VARIANTS[PLAIN].method, options=options, model=s.model, data=s.data, train_rows=s.rows,
        eval_rows=1, steps=s.steps, batch_size=s.batch_size, learning_rate=s.learning_rate, max_length=s.max_length,
        overlong="drop", seed=s.seed, dtype=s.dtype,
    )  # fmt: skip


def _entry(
    settings: Settings, source: Source, neurons: int, task: ConfigurableTask, advance: Callable[[int], Any]
) -> dict[str, Any]:
    """One R: what is looked at before and after training, and how that went."""
    spec = _spec(settings, neurons)
    loaded = models.load_model(source.model, None, spec.dtype, "cpu")
    made = loop.render(task.training_docs(), loaded.tokenizer, task.config.target_delimiter)
    examples, _ = loop.fit_length(made, min(settings.max_length, loaded.max_length), spec.overlong)
    method = find_method(spec.method)
    attached = method.attach(loaded.model, parse_options(spec.method, spec.options), spec.seed)
    adapters = [m for m in attached.model.modules() if isinstance(m, MeftAdapter)]
    rows = [e.ids for e in random.Random(spec.seed).sample(examples, len(examples))]

    def looked(blocks: int) -> dict[str, Any]:
        attached.model.eval()
        return look(attached.model, loaded, adapters, rows, settings.block, blocks, advance)

    before = looked(settings.before)
    log = _train(spec, attached, examples, loaded.tokenizer.pad_token_id, advance)
    config = adapters[0].config
    return {
        "neurons": neurons,
        "kept": config.kept,
        "experts": config.experts,
        "probed": config.probed,
        "steps": spec.steps,
        "trained_tokens": sum(log.tokens_real),
        "loss": [round(log.loss[0], 4), round(log.loss[-1], 4)],
        "before": before,
        "after": looked(settings.after),
    }


def _train(
    spec: RunSpec, attached: Attached, examples: Sequence[loop.Example], pad: int, advance: Callable[[int], Any]
) -> loop.StepLog:
    def stepped(done: int, log: loop.StepLog) -> None:
        advance(_STEP * bool(done))

    torch.manual_seed(spec.seed)
    batches = loop.shuffled(attached, examples, spec, pad)
    return loop.train(attached, spec, batches, on_step=stepped)[1]
