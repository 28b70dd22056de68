"""What makes no run, told within a second: everything that can be looked at before torch and transformers are imported.

Who does the work looks again, and at more.
"""

import os
from pathlib import Path

from meft_bench.finetune.chat import read_template
from meft_bench.finetune.plan import check_options
from meft_bench.finetune.row_files import source_name
from meft_bench.finetune.settings import TrainSettings
from meft_bench.finetune.user_rows import read_rows
from meft_bench.finetune.workplace import made_before
from meft_bench.harness.spec import REAL_TASKS
from meft_bench.meft.files import read_json
from meft_bench.text import printable
from meft_bench.train import model_folder

BUILT_IN = "lm-eval:"
"""Prefix that asks for lm-eval's task where one of this package has the same name."""
ABOUT = "adapter.json"


def refuse_training(settings: TrainSettings) -> None:
    """Raises ValueError for options, a base, rows, a template or an output folder that make no run."""
    check_options(settings)
    if isinstance(base := named_base(settings.model), Path):
        model_folder.check_files(base)
        model_folder.check_tokenizer(base)
    read_template(settings.chat_template)
    made_before(settings.destination)
    if isinstance(source := source_name(settings.data), Path):
        next(read_rows(source, settings.columns), None)


def named_base(model: str) -> str | Path:
    """The base's folder, hub id or "embedded". Raises ValueError for a folder that is not there."""
    if os.path.isdir(model):
        return Path(model)
    if model != "embedded" and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise ValueError(f"no model folder {printable(model)}, and it is no hub id (owner/name)")
    return model


def refuse_adapter(folder: Path, model: str | None) -> None:
    """Raises ValueError or FileNotFoundError for a folder that holds no adapter, and for a base that is not there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {printable(folder)}")
    if not (folder / ABOUT).exists():
        raise FileNotFoundError(f"no {ABOUT} in {printable(folder)}: give the folder that meft-bench train wrote")
    read_json(folder / ABOUT, what="adapter description")
    if model is not None and isinstance(base := named_base(model), Path):
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
