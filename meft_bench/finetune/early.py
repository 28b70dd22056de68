"""What makes no run, told within a second: everything that can be looked at before torch and transformers are imported.

Who does the work looks again, and at more.
"""

from dataclasses import fields
from pathlib import Path

from meft_bench.finetune.adapter_about import check_rows, find_base, read_about
from meft_bench.finetune.background import background_texts
from meft_bench.finetune.chat import read_template
from meft_bench.finetune.plan import check_options
from meft_bench.finetune.row_files import source_name
from meft_bench.finetune.settings import TrainSettings
from meft_bench.finetune.user_rows import read_rows
from meft_bench.finetune.workplace import check_place, made_before
from meft_bench.harness.spec import REAL_TASKS
from meft_bench.inputs import named_model
from meft_bench.named import EMBEDDED
from meft_bench.ranks import ALONE, Ranks
from meft_bench.train import model_folder
from meft_bench.train.contract import describe

BUILT_IN = "lm-eval:"
"""Prefix that asks for lm-eval's task where one of this package has the same name."""


def refuse_training(settings: TrainSettings, resume: bool = False, ranks: Ranks = ALONE) -> None:
    """Raises ValueError for options, a base, rows, a template or an output folder that make no run, and for a step that
    the ranks cannot share; a run that is gone on with need not come out even."""
    check_options(settings)
    if not resume:
        _refuse_uneven(settings, ranks)
    check_hub_options(settings)
    if isinstance(base := named_model(settings.model), Path):
        model_folder.check_files(base)
        model_folder.check_tokenizer(base)
    read_template(settings.chat_template)
    background_texts(settings)
    if made_before(settings.destination) is None:
        check_place(settings)
    if isinstance(source := source_name(settings.data), Path):
        next(read_rows(source, settings.columns), None)


def check_hub_options(settings: TrainSettings) -> None:
    """Raises ValueError for a revision, a subset or a split of what is not of the hub and has none."""
    base = named_model(settings.model)
    if settings.revision is not None and (isinstance(base, Path) or base == EMBEDDED):
        raise ValueError(f"revision={settings.revision} is for a model of the hub, which {settings.model} is not")
    if not isinstance(source_name(settings.data), Path):
        return
    usual = {f.name: f.default for f in fields(settings)}
    for name in ("subset", "split"):
        if (given := getattr(settings, name)) != usual[name]:
            raise ValueError(f"{name}={given} is for a data set of the hub, which {settings.data} is not: leave it out")


def _refuse_uneven(settings: TrainSettings, ranks: Ranks) -> None:
    for name, what in (("batch_size", "rows"), ("accumulation", "micro-batches")):
        number, count = getattr(settings, name), ranks.count
        if number and number % count:
            nearest = -(-number // count) * count
            raise ValueError(
                f"{name}={number}: so many {what} a step cannot be dealt evenly to {count} ranks: "
                f"--{name.replace('_', '-')} {nearest}"
            )


def refuse_adapter(folder: Path, model: str | None, rows: str = "fp32") -> None:
    """Raises ValueError or FileNotFoundError for a folder that holds no adapter, for a base that is not there, and for
    rows that the adapter does not have."""
    about = read_about(folder)
    check_rows(about, rows)
    if describe(about["method"]).saved == "model":
        model_folder.check_files(folder)
    elif isinstance(base := find_base(about, model)[0], Path):
        model_folder.check_files(base)


def refuse_tasks(tasks: list[str], data: str | None, include: Path | None) -> None:
    """Raises ValueError for a task of this package whose rows are not given, and for folders that are not there."""
    if (needing := [name for name in tasks if name in REAL_TASKS]) and data is None:
        raise ValueError(
            f"{', '.join(needing)} needs rows: give --data FOLDER, or take lm-eval's task of that name with "
            f"{BUILT_IN}{needing[0]}"
        )
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"no data folder {data}")
    if include is not None and not include.is_dir():
        raise ValueError(f"no folder of tasks {include}")
