"""lm-eval on a saved adapter: this package's own tasks, lm-eval's built-in ones, and a user's own YAML tasks."""

from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from meft_bench.finetune.generate import Adapted, load_adapted
from meft_bench.harness.spec import REAL_TASKS, TASKS, package_dir

BUILT_IN = "lm-eval:"
"""Prefix that asks for lm-eval's task where one of this package has the same name."""
_BATCH = 8


def evaluate(
    adapter: Path,
    tasks: list[str],
    *,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    limit: int | None = None,
    data_dir: str | None = None,
    include: Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Task to {metric: value, metric_stderr: value, "samples": n}; all measured.

    data_dir: rows of this package's real tasks (nq, squad, toolbench, gsm8k). include: a folder of YAML tasks of one's
    own. Raises ValueError for a task that is not there, before the model is loaded.
    """
    ours = [name for name in tasks if name in TASKS]
    needing = [name for name in ours if name in REAL_TASKS]
    if needing and data_dir is None:
        raise ValueError(
            f"{', '.join(needing)} needs rows: give --data FOLDER, or take lm-eval's task of that name with "
            f"{BUILT_IN}{needing[0]}"
        )
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"no data folder {data_dir}")
    other = [name.removeprefix(BUILT_IN) for name in tasks if name not in ours]
    managers = []
    if ours:
        metadata = {"seed": seed, "train_rows": 600, "eval_rows": 600, "data_dir": data_dir}
        own = TaskManager(include_path=str(package_dir("tasks")), include_defaults=False, metadata=metadata)
        managers.append((own, ours))
    if other:
        managers.append((_other_tasks(other, include), other))
    adapted = load_adapted(adapter, model, device, dtype)
    found: dict[str, dict[str, Any]] = {}
    for manager, names in managers:
        found |= _run(adapted, manager, names, limit, seed)
    return {name.removeprefix(BUILT_IN): found[name.removeprefix(BUILT_IN)] for name in tasks}


def _other_tasks(names: list[str], include: Path | None) -> TaskManager:
    if include is not None and not include.is_dir():
        raise ValueError(f"no folder of tasks {include}")
    if include is not None:
        # Reading lm-eval's own thousands of files takes seconds: only when a name is not in the folder.
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=str(include) if include else None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"no task {', '.join(unknown)}: this package has {', '.join(TASKS)}; lm-eval's own are listed by "
            "`lm-eval ls tasks`"
        )
    return manager


def _run(
    adapted: Adapted, manager: TaskManager, names: list[str], limit: int | None, seed: int
) -> dict[str, dict[str, Any]]:
    lm = HFLM(
        pretrained=adapted.model,
        tokenizer=adapted.tokenizer,
        batch_size=_BATCH,
        max_length=adapted.max_length,
        device=str(next(adapted.model.parameters()).device),
    )
    try:
        with torch.no_grad():
            # One resampling: no bootstrap's seconds, and means keep their closed-form standard error.
            result = evaluator.simple_evaluate(
                lm,
                tasks=names,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # lm-eval, datasets and the hub raise many kinds; the user needs one line
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"lm-eval cannot run {', '.join(names)} ({type(error).__name__}: {first})") from None
    return {name: _metrics(values) for name, values in result["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's "metric,filter" keys; the filter is named only when it is not the default."""
    found = {}
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            name, _, filtered = key.partition(",")
            found[name if filtered in ("", "none") else f"{name} ({filtered})"] = value
    return found


def text(found: dict[str, dict[str, Any]]) -> str:
    """The scores for a reader, one metric a line."""
    lines = []
    for task, metrics in found.items():
        for name, value in metrics.items():
            if "_stderr" in name or name in ("sample_len", "name", "sample_count"):
                continue
            error = metrics.get(f"{name}_stderr")
            lines.append(f"{task:<20} {name:<24} {value:.4f}{f' ± {error:.4f}' if error is not None else ''}")
    return "\n".join(lines)
