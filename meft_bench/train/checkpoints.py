"""Checkpoints of a run: a folder per step, complete once renamed into place, checked as a whole before use."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from meft_bench.meft.files import check_tensors, read_safetensors
from meft_bench.ranks import ALONE, Ranks
from meft_bench.stopping import checkpoint_wanted
from meft_bench.train.methods import Attached
from meft_bench.train.own_optimizer import OwnOptimizer
from meft_bench.write import replace, sync, sync_tree

_STATE, _PROGRESS = "state.safetensors", "progress.json"
_WRITING = "writing"


@dataclass
class StepLog:
    """One value per optimizer step; sums over its micro-batches."""

    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    tokens_real: list[int] = field(default_factory=list)
    tokens_padded: list[int] = field(default_factory=list)
    tokens_supervised: list[int] = field(default_factory=list)
    h2d_bytes: list[int] = field(default_factory=list)
    d2h_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where checkpoints go and when they are due."""

    folder: Path
    every_s: float = 30.0
    every_steps: int | None = None
    """Replaces every_s."""
    after_last: bool = False
    """Leave one of the last step too, so that a run cut off while it is scored need not train again."""
    say: Callable[[str], None] = print
    """Is told of a damaged checkpoint."""

    def due(self, done: int, saved_at: float, ranks: Ranks = ALONE) -> bool:
        """Whether one is due after `done` steps, the one before written at saved_at (time.monotonic), by rank 0's
        clock."""
        return ranks.by_first(lambda: checkpoint_wanted() or self._is_time(done, saved_at))

    def _is_time(self, done: int, saved_at: float) -> bool:
        if self.every_steps is not None:
            return done % self.every_steps == 0
        return time.monotonic() - saved_at > self.every_s


def save_checkpoint(
    folder: Path,
    step: int,
    attached: Attached,
    optimizer: torch.optim.Optimizer,
    log: StepLog,
    ranks: Ranks = ALONE,
) -> None:
    """Write parameters, optimizer state, random state and log of a run that has done step steps.

    The older checkpoint goes when all of the new one is on the disk. With several ranks rank 0 copies and writes, and
    the others wait.
    """
    state = _state(attached, optimizer) if ranks.first else {}
    ranks.by_first(lambda: _save(folder, step, attached, state, log))


def _save(folder: Path, step: int, attached: Attached, state: dict[str, Tensor], log: StepLog) -> None:
    final, temporary = folder / f"step-{step:07d}", folder / _WRITING
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, step, attached, state, log)
    except BaseException:  # a full disk gets its space back
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
    temporary.rename(final)
    sync(folder)
    for _, old in _complete(folder):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, step: int, attached: Attached, state: dict[str, Tensor], log: StepLog) -> None:
    folder.mkdir(parents=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    save_file(tensors, folder / _STATE)
    counts = [[way, purpose, n] for (way, purpose), n in attached.link.bytes.items()] if attached.link else []
    about = {
        "step": step,
        "log": asdict(log),
        "link": counts,
        "usage": attached.usage,
        "tensors": {name: list(t.shape) for name, t in tensors.items()},
        "state_sha256": _digest(folder / _STATE),
    }
    replace(folder / _PROGRESS, json.dumps(about).encode())
    sync_tree(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with most steps, or None."""
    return max(_complete(folder), default=(0, None))[1]


def resume(
    folder: Path,
    attached: Attached,
    optimizer: torch.optim.Optimizer,
    steps: int,
    say: Callable[[str], None] = print,
    ranks: Ranks = ALONE,
) -> tuple[int, StepLog]:
    """Put back the newest whole checkpoint of a run of steps steps; returns (steps done, log), (0, empty) for none.

    A damaged one is told through say and the one before it taken. Raises ValueError, naming the damage, when none is
    whole; nothing of a damaged one reaches the model. All ranks put back the same one, or none does.
    """
    found = ranks.on_all(lambda: _newest_whole(folder, attached, optimizer, steps, say))
    ranks.same({"the step to go on from": found[1]["step"] if found else 0})
    if found is None:
        return 0, StepLog()
    _put_back(*found, attached, optimizer)
    return found[1]["step"], StepLog(**found[1]["log"])


def _newest_whole(
    folder: Path, attached: Attached, optimizer: torch.optim.Optimizer, steps: int, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What the newest whole checkpoint holds; None where there is no checkpoint."""
    damage = ""
    for _, path in sorted(_complete(folder), reverse=True):
        try:
            found = _read(path, attached, optimizer, steps)
        except ValueError as error:
            damage = damage or str(error)
            continue
        if damage:
            say(f"{damage}; going on from {path.name}")
        return found
    if damage:
        raise ValueError(f"{damage}; delete {folder} to start the run again")
    return None


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """(steps, checkpoint) of all that were renamed into place."""
    found = [(path.name.removeprefix("step-"), path) for path in folder.glob("step-*")]
    return [(int(step), path) for step, path in found if step.isdecimal()]


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# ---- reading ----


def _read(
    path: Path, attached: Attached, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, progress) of a whole checkpoint that fits the model. Raises ValueError for any other."""
    about = _read_progress(path, attached, steps)
    tensors = read_safetensors(path / _STATE)
    check_tensors(path / _STATE, tensors, _expected(about["tensors"], attached, optimizer))
    random_state = tensors["random_state"]
    if random_state.dtype != torch.uint8 or random_state.shape != torch.get_rng_state().shape:
        raise ValueError(f"{path / _STATE}: random_state is no state of torch's generator")
    if about["state_sha256"] != _digest(path / _STATE):
        raise ValueError(f"{path / _STATE} is not what was written there (its digest differs)")
    return tensors, about


def _expected(
    listed: dict[str, tuple[int, ...]], attached: Attached, optimizer: torch.optim.Optimizer
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor: as listed when it was written, parameters and their moments as the model has them."""
    shapes = {**listed, "random_state": tuple(torch.get_rng_state().shape)}
    for index, parameter in enumerate(attached.parameters()):
        shapes[f"parameters.{index}"] = tuple(parameter.shape)
    for index, shape in enumerate(attached.background.shapes if attached.background else ()):
        shapes[f"background.{index}"] = shape
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(trained):
        # A parameter that no gradient reached has no moments: only the list knows.
        if any(name.startswith(f"moments.{index}.") for name in listed):
            shapes.update({f"moments.{index}.{key}": s for key, s in _state_shapes(optimizer, parameter).items()})
    return shapes


def _state_shapes(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> Mapping[str, tuple[int, ...]]:
    """Of the tensors kept of a parameter: AdamW's, unless the optimizer knows better."""
    if isinstance(optimizer, OwnOptimizer):
        return optimizer.state_shapes(parameter)
    return {key: tuple(parameter.shape) for key in ("exp_avg", "exp_avg_sq")}


def _read_progress(path: Path, attached: Attached, steps: int) -> dict[str, Any]:
    """progress.json, checked against the folder's name and the run. Raises ValueError."""
    file = path / _PROGRESS
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        step, log = about["step"], StepLog(**about["log"])
        lengths = {len(getattr(log, series.name)) for series in fields(StepLog)}
        numbers = all(isinstance(n, int | float) for series in fields(StepLog) for n in getattr(log, series.name))
        link = {(str(way), str(purpose)): int(n) for way, purpose, n in about["link"]}
        usage = [[(int(tokens), int(rows)) for tokens, rows in layer] for layer in about["usage"]]
        listed = {str(name): tuple(int(n) for n in shape) for name, shape in about["tensors"].items()}
        digest = str(about["state_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is broken ({type(error).__name__}: {error})") from None
    if step != int(path.name.removeprefix("step-")) or not 0 < step <= steps:
        raise ValueError(f"{file} says step {step}, in {path.name} of a run of {steps} steps")
    if lengths != {step} or not numbers:
        raise ValueError(f"{file}: its log has not one number for each of {step} steps")
    if len(usage) != len(attached.usage):
        raise ValueError(f"{file} counts rows of {len(usage)} layers, the model has {len(attached.usage)}")
    return {**about, "link": link, "usage": usage, "tensors": listed, "state_sha256": digest}


def _put_back(
    tensors: dict[str, Tensor], about: dict[str, Any], attached: Attached, optimizer: torch.optim.Optimizer
) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for name in [n for n in tensors if n.startswith("moments.")]:
        _, index, key = name.split(".", 2)
        moments.setdefault(int(index), {})[key] = tensors[name]
    with torch.no_grad():
        for number, parameter in enumerate(attached.parameters()):
            parameter.copy_(tensors[f"parameters.{number}"])
    if attached.background is not None:
        attached.background.put_back([tensors[f"background.{n}"] for n in range(len(attached.background.shapes))])
    # torch's own loading puts each moment and step count where the optimizer keeps it.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random_state"])
    if "random_state_cuda" in tensors and _on_gpu(attached):
        torch.cuda.set_rng_state(tensors["random_state_cuda"])
    if attached.link is not None:
        attached.link.bytes.update(about["link"])
    for live, saved in zip(attached.usage, about["usage"], strict=True):
        live[:] = saved


def _state(attached: Attached, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a resumed run needs that the spec does not give; tied tensors appear once, as parameters do."""
    tensors = {"random_state": torch.get_rng_state()}
    if _on_gpu(attached):
        tensors["random_state_cuda"] = torch.cuda.get_rng_state()
    # The optimizer first: its state_dict brings rows up to date that it had deferred.
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"moments.{number}.{key}"] = value
    for index, parameter in enumerate(attached.parameters()):
        tensors[f"parameters.{index}"] = parameter
    for index, counts in enumerate(attached.background.tensors() if attached.background else ()):
        tensors[f"background.{index}"] = counts
    return tensors


def _on_gpu(attached: Attached) -> bool:
    """Whether the run uses the GPU at all: asking an unused one for its random state would take some of its memory, and
    fail where that is full."""
    return next(attached.model.parameters()).is_cuda
