"""One fine-tuning job: read the rows, plan, train with checkpoints, score, save. Start reading at train()."""

import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from meft_bench import host_memory, inputs
from meft_bench.finetune import adapters, card, data, scores, workplace
from meft_bench.finetune.background import background_texts
from meft_bench.finetune.base_model import base_source, device_and_dtype, length_limit, load_config, load_tokenizer
from meft_bench.finetune.early import check_hub_options
from meft_bench.finetune.plan import Job, Plan, check_options, make_plan
from meft_bench.finetune.row_files import file_digest, source_name
from meft_bench.finetune.settings import TrainSettings
from meft_bench.harness.runner import locked
from meft_bench.meft.engine import cores
from meft_bench.provenance import provenance
from meft_bench.ranks import ALONE, Ranks, together
from meft_bench.stopping import stop_if_asked
from meft_bench.text import printable
from meft_bench.train import loop, models
from meft_bench.train.counts import Counted
from meft_bench.train.methods import Attached
from meft_bench.train.tokens import padding_id, text_ids
from meft_bench.version import __version__


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The part of a run's specification that a training step reads."""

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    warmup_share: float
    weight_decay: float
    clip: float
    seed: int


def train(
    settings: TrainSettings,
    resume: bool = False,
    say: Callable[[str], None] = print,
    started: Ranks = ALONE,
) -> Path:
    """Fine-tune as the settings say; returns the output folder, which appears once everything in it is whole.

    resume goes on from the last complete checkpoint of an unfinished run. started: the ranks that call this together
    (meft_bench.ranks.launched()); rank 0 alone speaks and writes. Raises ValueError, before memory is taken, for input
    that makes no run, and Diverged (a ValueError's text) when the loss is no number; SaidElsewhere where another rank
    raises.

    Example: train(TrainSettings(data="example", output="facts-adapter", steps=50))
    """
    check_options(settings)  # before any row is read, so that a slip costs nothing
    check_hub_options(settings)
    cores.given()  # so does one in the environment
    say = say if started.first else _quiet
    gpu = inputs.device(settings.device) == "cuda" and torch.cuda.is_available()
    with together(started, settings.wait_minutes, gpu=gpu, go_on="go on from the last checkpoint with --resume"):
        source = base_source(settings.model)
        rows_source = source_name(settings.data)
        digest = file_digest(rows_source) if isinstance(rows_source, Path) else f"{rows_source} {settings.split}"
        deciding = {**settings.deciding(), "output": settings.output}
        started.same({**deciding, "the rows' digest": digest, "meft-bench": __version__})
        if started.by_first(lambda: workplace.finished(settings, digest, resume)):
            say(f"already finished: {_closing(settings.destination)}")
            return settings.destination
        folder = workplace.partial_folder(settings)
        with ExitStack() as held:
            if started.first:
                for guard in (workplace.full_disk_said, workplace.no_memory_said):
                    held.enter_context(guard(settings))
                held.enter_context(workplace.nothing_left_behind(folder))
            started.by_first(lambda: held.enter_context(locked(folder)))
            about = started.by_first(lambda: workplace.claim(settings, digest, resume))
            _train(settings, source, folder, about, started, say)
    if started.first:
        say(_closing(settings.destination))
    return settings.destination


def _quiet(line: str) -> None:
    """What another rank than the first says."""


def _train(
    settings: TrainSettings,
    source: str | Path,
    folder: Path,
    about: dict[str, Any],
    ranks: Ranks,
    say: Callable[[str], None],
) -> None:
    start = time.perf_counter()
    ranks.on_all(lambda: workplace.check_shared(folder, about))
    tokenizer, limit = load_tokenizer(source, settings.revision), length_limit(source, settings)
    vocabulary = load_config(source, settings.revision).vocab_size
    ranks.on_all(lambda: adapters.check_attaches(settings.method, models.without_weights(source, settings.revision)))
    rows = ranks.in_turn(lambda: data.prepare(settings, tokenizer, limit, folder / "rows", vocabulary))
    say(_rows_text(rows))
    about = ranks.by_first(lambda: _planned(settings, source, rows, folder, about, ranks))
    plan = Plan.from_dict(about["plan"])
    say(plan.text())
    if odd := _dealt(settings.batch_size, plan.accumulation, ranks.count):
        say(odd)
    loaded = models.load_model(source, settings.revision, plan.dtype, plan.device)
    base = adapters.base_of(loaded.model, settings.model, settings.revision)
    about.setdefault("fingerprint", ranks.by_first(lambda: base.fingerprint))
    ranks.on_all(lambda: _check_base(base, settings, about, folder))
    if ranks.first:
        workplace.write_json(folder / workplace.RUN, about)
    attached = adapters.attach(loaded.model, settings.method, plan.options, settings.seed)
    if attached.link is not None and (bound := cores.text()):
        say(bound)
    texts = background_texts(settings)
    if texts is not None and attached.background is not None:
        attached.background.texts = [ids[:limit] for ids in text_ids(tokenizer, texts)]
    pad = padding_id(tokenizer, vocabulary)
    log = fit(attached, rows.train, schedule(settings, plan), pad, folder / "checkpoints", settings, say, ranks)
    if ranks.first:  # the others have done their part
        _finish(settings, attached, plan, base, loaded.tokenizer, rows, limit, log, about, start, folder, say)


def _planned(
    settings: TrainSettings,
    source: str | Path,
    rows: data.TrainingData,
    folder: Path,
    about: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """What run.json holds, with the plan that it had, or that is made now and written there."""
    if "plan" not in about:
        about["plan"] = _plan(settings, source, rows, ranks).to_dict()
        workplace.write_json(folder / workplace.RUN, about)
    return about


def _dealt(rows: int, accumulation: int, ranks: int) -> str:
    """What a reader should know of a run's micro-batches on so many ranks; empty where each gets as many as planned.
    Raises ValueError for more ranks than rows."""
    count = loop.micro_batches(rows, accumulation, ranks)
    notes = []
    if count != accumulation:
        notes.append(f"each of the plan's {accumulation} micro-batches is cut into {count // accumulation}")
    if count % ranks:
        notes.append(f"{count} micro-batches do not go into {ranks} ranks: some run one more than others")
    return f"ranks  {'; '.join(notes)}" if notes else ""


def _check_base(base: adapters.Base, settings: TrainSettings, about: dict[str, Any], folder: Path) -> None:
    if about["fingerprint"] != base.fingerprint:
        raise ValueError(
            f"the base {settings.model} has the weights {base.fingerprint}, the unfinished run was on "
            f"{about['fingerprint']}: put those back, or delete {folder} to start anew"
        )


def _finish(
    settings: TrainSettings,
    attached: Attached,
    plan: Plan,
    base: adapters.Base,
    tokenizer: PreTrainedTokenizerBase,
    rows: data.TrainingData,
    limit: int,
    log: loop.StepLog,
    about: dict[str, Any],
    start: float,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Score what was trained and publish it."""
    micro_batch = settings.batch_size // plan.accumulation
    scored = scores.score(attached.model, tokenizer, rows, settings, limit, micro_batch)
    say(scores.text(scored))
    record = {
        **about,
        "data": {"name": rows.name, "digest": rows.digest, **asdict(rows.findings), "train_rows": len(rows.train),
                 "held_out_rows": len(rows.held_out), "held_out_rows_also_trained": rows.repeated},
        "base": asdict(base),
        "training": {"loss_first": log.loss[0], "loss_last": log.loss[-1], "steps": len(log.loss),
                     "step_s_sum": round(sum(log.step_s), 2), "tokens": sum(log.tokens_real)},
        "scores": scored,
        "provenance": provenance(torch.get_num_threads()),
        "seconds_of_last_process": round(time.perf_counter() - start, 2),
    }  # fmt: skip
    _save(settings, attached, plan, base, tokenizer, record, folder / "adapter")
    workplace.publish(settings, folder / "adapter")


def _save(
    settings: TrainSettings,
    attached: Attached,
    plan: Plan,
    base: adapters.Base,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    folder: Path,
) -> None:
    """Everything the output holds, in a folder that is renamed afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    adapters.save(folder, attached, settings.method, plan.options, base, tokenizer)
    workplace.write_json(folder / workplace.TRAINING, record)
    if settings.chat_template:
        shutil.copyfile(settings.chat_template, folder / adapters.CHAT_TEMPLATE)
    (folder / "README.md").write_text(card.render(record, settings), encoding="utf-8")


def fit(
    attached: Attached,
    examples: data.Sequences,
    spec: Schedule,
    pad_id: int,
    checkpoints: Path,
    settings: TrainSettings,
    say: Callable[[str], None] = print,
    ranks: Ranks = ALONE,
) -> loop.StepLog:
    """Train by the one loop, rows and schedule as the suites'; rank 0's bar shows the loss and the time left.

    Leaves a checkpoint of the last step too, so that a run cut off while it is scored need not train again. Raises
    ValueError when the loss, or a parameter that would be saved, is no finite number.
    """
    kept = loop.Checkpoints(
        folder=checkpoints,
        every_s=60 * settings.checkpoint_minutes,
        every_steps=settings.checkpoint_steps,
        after_last=True,
        say=say,
    )
    bar: tqdm | None = None
    with ExitStack() as stack:

        def on_step(done: int, log: loop.StepLog) -> None:
            nonlocal bar
            if bar is None:  # what an earlier process did is no part of this one's pace
                name = f"training {settings.method}"
                made = tqdm(
                    total=spec.steps, initial=done, desc=name, unit="step", mininterval=0.5, disable=not ranks.first
                )
                bar = stack.enter_context(made)
            else:
                bar.set_postfix(loss=f"{log.loss[-1]:.3f}", refresh=False)
                bar.update()
            if done < spec.steps:
                stop_if_asked()

        batches = loop.shuffled(attached, examples, spec, pad_id, ranks)
        try:
            return loop.train(attached, spec, batches, on_step=on_step, checkpoints=kept, ranks=ranks)[1]
        except loop.Diverged as error:
            smaller = f"start anew with a smaller --learning-rate than {spec.learning_rate:g}"
            raise ValueError(f"{error}: {smaller}") from None


def schedule(settings: TrainSettings, plan: Plan) -> Schedule:
    """What each step reads of the settings and the plan."""
    return Schedule(
        steps=plan.steps,
        batch_size=settings.batch_size,
        accumulation=plan.accumulation,
        learning_rate=plan.learning_rate,
        warmup_share=settings.warmup_share,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        seed=settings.seed,
    )


def _plan(settings: TrainSettings, source: str | Path, rows: data.TrainingData, ranks: Ranks) -> Plan:
    device, dtype = device_and_dtype(settings.device, settings.dtype)
    return make_plan(
        Job(
            settings=settings,
            shape=models.model_shape(source, settings.revision),
            vocabulary=load_config(source, settings.revision).vocab_size,
            rows=len(rows.train),
            longest=rows.findings.longest,
            dtype=dtype,
            device=device,
            free_host=host_memory.available_bytes(),
            free_device=torch.cuda.mem_get_info()[0] if device == "cuda" else None,
            ranks=ranks,
            counted=Counted.of(source, settings.revision),
        )
    )


def _rows_text(rows: data.TrainingData) -> str:
    found = rows.findings
    notes = [
        f"{count} {what} ({found.lines(kind)})"
        for kind, count, what in (
            ("overlong", found.overlong, "above the length dropped"),
            ("empty", found.empty, "empty ones dropped"),
            ("merged", found.merged, "learned from a token that merges prompt and answer"),
            (
                "unknown",
                found.unknown,
                "with text unknown to the base's tokenizer: another --model may know it",
            ),
        )
        if count
    ]
    if rows.repeated:
        notes.append(f"{rows.repeated:,} of those held out stand among those to train on, too")
    if found.unused:
        notes.append(f"not used: {', '.join(found.unused)}")
    said = "".join(f"; {note}" for note in notes)
    return (
        f"rows {printable(rows.name)}: {found.rows:,} ({found.kind}), {len(rows.train):,} to train on, "
        f"{len(rows.held_out):,} held out; longest {found.longest} tokens, mean {found.tokens / found.rows:.1f}{said}"
    )


def _closing(output: Path) -> str:
    folder = printable(os.fspath(output))
    return f"adapter in {folder}; next: meft-bench generate --adapter {shlex.quote(folder)} --prompt TEXT"
