"""lm-eval on a saved adapter: this package's own tasks, lm-eval's built-in ones, and a user's own YAML tasks."""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from meft_bench import hub
from meft_bench.finetune import adapters
from meft_bench.finetune.adapter_about import check_rows
from meft_bench.finetune.chat import Renderer, TemplateFault
from meft_bench.finetune.early import BUILT_IN, refuse_tasks
from meft_bench.finetune.generate import Adapted, load_adapted
from meft_bench.harness.evaluation import PlainLM, check_room, quiet, vocabulary_of
from meft_bench.harness.spec import REAL_TASKS, TASKS, package_dir
from meft_bench.train import tokens

_RESAMPLINGS = 100
"""Bootstrap draws for the standard error of a metric that has no formula for it."""
_NO_SCORES = ("alias", "name", "sample_len", "sample_count")


class AdapterLM(PlainLM):
    """A saved adapter for lm-eval; conversations go through its chat template as in generate."""

    renderer: Renderer

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it, without system messages where it refuses those."""
        opened = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.renderer.write([{"conversation": chat_history, **opened}])[0]
        except TemplateFault:
            rest = [message for message in chat_history if message["role"] != "system"]
            if rest == chat_history:
                raise
            return self.renderer.write([{"conversation": rest, **opened}])[0]


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
    rows: str = "fp32",
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Task to {metric: value, metric_stderr: value, "sample_len": n}; all measured.

    A group or tag stands with what it aggregates, if anything, before its tasks. data_dir: rows of this package's real
    tasks (nq, squad, toolbench, gsm8k). include: a folder of YAML tasks of one's own. rows: see load_adapted.
    batch_size: texts at once. Raises ValueError for an adapter or a task that is not there or cannot be made, before
    the model is loaded, and for answers longer than the model's limit before any task is run. Where a task fails,
    what was scored before is printed to stderr.
    """
    names = list(dict.fromkeys(tasks))
    refuse_tasks(names, data_dir, include)
    check_rows(adapters.read_about(adapter), rows)
    metadata = {"seed": seed, "eval_rows": 600, "data_dir": data_dir}
    other = [name.removeprefix(BUILT_IN) for name in names if name not in TASKS]
    others = _other_tasks(other, include) if other else None
    loaded = {name: _load(_own_task(name, metadata) if name in TASKS else others, name) for name in names}
    adapted = load_adapted(adapter, model, device, dtype, rows)
    for task in (task for some in loaded.values() for task in some["tasks"].values()):
        check_room(task, adapted.max_length)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            scored = _run(adapted, loaded[name], name, limit, seed, batch_size)
        except ValueError:
            if found:  # which may have taken hours
                print(text(found), file=sys.stderr)
            raise
        for task, metrics in scored.items():
            # The same name twice: ours and lm-eval's, in whichever order.
            found[f"{BUILT_IN}{task}" if name not in TASKS and task in TASKS and task in names else task] = metrics
    return found


def _own_task(name: str, metadata: dict[str, Any]) -> TaskManager:
    # Only the test is scored. Training rows decide what a synthetic one asks, and nothing of a real one: a folder may
    # have any number of them.
    metadata = {**metadata, "train_rows": 1 if name in REAL_TASKS else 600}
    return TaskManager(include_path=str(package_dir("tasks")), include_defaults=False, metadata=metadata)


def _other_tasks(names: list[str], include: Path | None) -> TaskManager:
    if include is not None:
        # Reading lm-eval's own thousands of files takes seconds: only when a name is not in the folder.
        manager = _task_manager(include, defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = _task_manager(include, defaults=True)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"no task {', '.join(unknown)}: this package has {', '.join(TASKS)}; lm-eval's own are listed by "
            "`lm-eval ls tasks`"
        )
    hub.check_data(names[0])  # where lm-eval's own tasks have their documents
    return manager


def _task_manager(include: Path | None, defaults: bool) -> TaskManager:
    """lm-eval's list of tasks. Raises ValueError with one line where a folder holds what it cannot list."""
    try:
        return TaskManager(include_path=str(include) if include else None, include_defaults=defaults)
    except Exception as error:  # of a task whose name is a number, for one
        raise ValueError(
            f"lm-eval cannot list the tasks of {include} ({_first_line(error)}): their names and tags must be texts"
        ) from None


def _load(manager: Any, name: str) -> Any:
    """lm-eval's task objects of a task, group or tag, with their documents. Raises ValueError with one line."""
    name = name.removeprefix(BUILT_IN)
    try:
        loaded = manager.load([name])
    except Exception as error:  # lm-eval, datasets and the hub raise many kinds; the user needs one line
        raise ValueError(f"lm-eval cannot load {name} ({_first_line(error)})") from None
    if not loaded["tasks"]:
        raise ValueError(f"{name} holds no tasks")
    return loaded


def _run(
    adapted: Adapted, loaded: Any, name: str, limit: int | None, seed: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Scores of the tasks of one name, and of the groups that aggregate some."""
    lm = AdapterLM(
        pretrained=adapted.model,
        tokenizer=adapted.tokenizer,
        batch_size=batch_size,
        max_length=adapted.max_length,
        device=str(next(adapted.model.parameters()).device),
    )
    lm.special = not adapted.chat
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    pad = tokens.padding_id(adapted.tokenizer, vocabulary_of(adapted.model))
    try:
        with torch.no_grad(), tokens.plain_generation(adapted.model, adapted.stops, pad), quiet(), _in_one_process():
            if adapted.chat:
                lm.renderer = Renderer(adapted.tokenizer)
            result = evaluator.evaluate(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=_RESAMPLINGS,
                log_samples=False,
                apply_chat_template=adapted.chat,
                fewshot_as_multiturn=adapted.chat,
            )
    except Exception as error:  # lm-eval, datasets and the hub raise many kinds; the user needs one line
        raise ValueError(f"lm-eval cannot run {name} ({_first_line(error)})") from None
    finally:
        if adapted.chat and hasattr(lm, "renderer"):
            lm.renderer.__exit__()
    if lm.cut_prompts:
        room = f"the model takes {adapted.max_length} tokens with the answer"
        print(f"meft-bench: {name}: {lm.cut_prompts} prompts lost their beginning: {room}", file=sys.stderr)
    found = {task: _metrics(values) for task, values in {**(result.get("groups") or {}), **result["results"]}.items()}
    return {task: metrics for task, metrics in found.items() if set(metrics) - set(_NO_SCORES)}


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Bootstrap without a pool of processes, and without lm-eval's word of it among the scores."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's "metric,filter" keys; the filter is named only when it is not the default."""
    found = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if "_stderr" in name and value != value:
                continue  # of one document, or of draws that have no score
            found[name if filtered in ("", "none") else f"{name} ({filtered})"] = value
    return found


def text(found: dict[str, dict[str, Any]]) -> str:
    """The scores for a reader, one metric a line."""
    lines = []
    for task, metrics in found.items():
        for name, value in metrics.items():
            if "_stderr" in name or name in _NO_SCORES:
                continue
            metric, _, filtered = name.partition(" ")
            error = metrics.get(f"{metric}_stderr {filtered}".strip())
            lines.append(f"{task:<20} {name:<24} {value:.4f}{f' ± {error:.4f}' if error is not None else ''}")
    return "\n".join(lines)
