"""ONE run in ONE process: load, attach, train, evaluate, record."""

import contextlib
import functools
import math
import os
import random
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch

from meft_bench.harness import evaluation
from meft_bench.harness.estimate import refuse_if_too_large
from meft_bench.harness.forgetting import forgetting
from meft_bench.harness.numerics import numerics
from meft_bench.harness.probes import probe
from meft_bench.harness.record import SCHEMA, write_record
from meft_bench.harness.spec import RunSpec
from meft_bench.host_memory import is_out_of_memory
from meft_bench.inputs import NO_CUDA
from meft_bench.named import named_in
from meft_bench.provenance import provenance
from meft_bench.stopping import leave_if_asked, whole_steps
from meft_bench.train import loop, models
from meft_bench.train.methods import Attached, find_method, parse_options
from meft_bench.write import disk_error

_WARMUP_STEPS = 5
_CURVE_POINTS = 50
_BLOCKS = ("parameters", "memory", "traffic", "timing", "quality", "probes", "curve")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where this machine keeps what a spec names; never part of a record."""

    run_dir: Path
    model_dir: str | None = None
    data_dir: str | None = None
    keep_last: bool = False
    """Leave a checkpoint of the last step, so that a job whose time ends while it scores need not train again."""


def run(spec: RunSpec, places: Places, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Do the run and write places.run_dir/record.json; returns the record.

    OOM and divergence are results and are recorded as such; other errors are raised. progress gets the share done.
    """
    options = parse_options(spec.method, spec.options)
    if spec.device == "cuda":
        _start_cuda()
    record = _empty_record(spec)
    phases = Phases(spec.device)
    try:
        with phases("load"):
            _seed(spec.seed)
            task = evaluation.load_task(spec, places.data_dir)
            source, revision = _source(spec, places)
            refuse_if_too_large(spec, models.model_shape(source, revision))
            loaded = models.load_model(source, revision, spec.dtype, spec.device)
            evaluation.check_room(task, loaded.max_length)
        with phases("attach"):
            base_size = sum(p.numel() for p in loaded.model.parameters())
            attached = find_method(spec.method).attach(loaded.model, options, spec.seed)
        record["parameters"] = _parameters(attached, base_size)
        optimizer, log, dropped = None, None, 0
        if spec.steps and attached.groups:
            with phases("train"):
                limit = min(spec.max_length or loaded.max_length, loaded.max_length)
                examples = loop.render(task.training_docs(), loaded.tokenizer, task.config.target_delimiter)
                examples, dropped = loop.fit_length(examples, limit, spec.overlong)
                evaluation.keep_recallable(task, {e.doc_id for e in examples}, spec.splits)
                with whole_steps():
                    optimizer, log = loop.train(
                        attached,
                        spec,
                        loop.shuffled(attached, examples, spec, loaded.tokenizer.pad_token_id),
                        checkpoints=loop.Checkpoints(
                            folder=places.run_dir / "checkpoints", after_last=places.keep_last
                        ),
                        on_step=functools.partial(_stepped, spec.steps, progress),
                    )
            record["curve"] = _curve(log)
        record["traffic"] = _traffic(attached, log, spec.accumulation)
        record["timing"] = _timing(log, dropped)
        with phases("evaluate"):
            attached.model.eval()
            record["quality"] = {"evidence": "measured"}
            for split in spec.splits:
                if long := evaluation.too_long(task, split, loaded.tokenizer):
                    most = task.config.generation_kwargs["max_gen_toks"]
                    rows = len(task.dataset[split])
                    print(f"{split}: {long} of {rows} answers are longer than the {most} tokens that are generated",
                          file=sys.stderr, flush=True)  # fmt: skip
                for mode in spec.modes:
                    scores = evaluation.evaluate_split(
                        attached.model, loaded.tokenizer, task, split, loaded.max_length, mode
                    )
                    record["quality"][split if mode == "ours" else f"{split}_{mode}"] = _quality(scores)
        if "test" in spec.splits:
            with phases("probe"):
                record["probes"] = probe(attached.model, loaded, task, spec)
                if named_in(spec.model):
                    base = models.load_model(source, revision, spec.dtype, spec.device).model.eval()
                    record["probes"]["forgetting"] = forgetting(attached.model, base, loaded.tokenizer)
        else:
            record["probes_reason"] = "only runs that are tested are probed"
        record["memory"] = phases.memory(attached.accounted_bytes(optimizer, spec.accumulation))
        if log is not None and (place := _not_finite(record)) is not None:
            raise loop.Diverged(f"{place} is no finite number")
        record["state"] = "ok"
    except loop.Diverged as error:
        _give_up(record, "diverged", str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _give_up(record, "oom", f"out of memory: {str(error).splitlines()[0] if str(error) else 'host'}")
    for block in _BLOCKS:
        if record[block] is not None:
            del record[f"{block}_reason"]
    write_record(places.run_dir / "record.json", record)
    progress(1.0)
    return record


def _stepped(steps: int, progress: Callable[[float], None], done: int, log: loop.StepLog) -> None:
    """After a step, whose checkpoint is written if one was due."""
    progress(0.9 * done / steps)
    leave_if_asked()


class Phases:
    """Peak memory and seconds of each phase of a run."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.seconds: dict[str, float] = {}
        self.device_peaks: dict[str, dict[str, int]] = {}
        self.host: dict[str, dict[str, int]] = {}

    def __call__(self, name: str) -> "Phases":
        self.name = name
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.start, 3)
        usage = psutil.Process().memory_full_info()
        self.host[self.name] = {"rss_bytes": usage.rss, "uss_bytes": usage.uss}
        if self.cuda:
            torch.cuda.synchronize()
            self.device_peaks[self.name] = {
                "allocated_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }

    def memory(self, accounted: dict[str, int]) -> dict[str, Any]:
        """The record's memory block: after-phase host sizes, per-phase device peaks, exact bytes the method owns."""
        block: dict[str, Any] = {
            "evidence": "measured",
            "accounted": accounted,
            "host_by_phase": self.host,
            "host_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "phase_s": self.seconds,
        }
        if self.cuda:
            return {**block, "device_peak_by_phase": self.device_peaks}
        reason = "ran on the CPU: its device memory is an arena in host memory"
        return {**block, "device_peak_by_phase": None, "device_peak_by_phase_reason": reason}


def _start_cuda() -> None:
    """Before the record says which GPU is in use: until then NVML's numbers may mean other ones than CUDA's. Raises
    ValueError where torch finds none, though NVML may."""
    if not torch.cuda.is_available():
        raise ValueError(NO_CUDA)
    torch.cuda.init()


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _source(spec: RunSpec, places: Places) -> tuple[str | Path, str | None]:
    """(folder, hub id or "embedded", revision); a local folder must be the one the spec was made from."""
    if not spec.model.startswith("local/"):
        return spec.model, spec.revision
    if places.model_dir is None:
        raise ValueError(f"{spec.model} is a local model: give its folder with --model")
    folder = Path(places.model_dir)
    found, wanted = models.weights_digest(folder), spec.model.rsplit("@", 1)[-1]
    if found != wanted:
        raise ValueError(f"the model folder {folder.name} has digest {found}, the spec asks for {wanted}")
    return folder, None


def _empty_record(spec: RunSpec) -> dict[str, Any]:
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run_key": spec.run_key,
        "state": "failed",
        "spec": spec.to_dict(),
        "numerics": numerics(spec.task, spec.method, spec.model),
        "provenance": provenance(torch.get_num_threads()),
    }
    for block in _BLOCKS:
        record[block], record[f"{block}_reason"] = None, "nothing was trained" if block == "curve" else "not reached"
    return record


def _not_finite(value: Any, place: str = "") -> str | None:
    """Where a record holds a number that is none: parameters may be finite and what comes of them not."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_not_finite(part, f"{place}.{name}".lstrip(".")) for name, part in inner)
    return next((name for name in found if name is not None), None)


def _give_up(record: dict[str, Any], state: str, why: str) -> None:
    record["state"], record["state_reason"] = state, why
    for block in _BLOCKS:
        if _not_finite(record[block]) is not None:
            record[block] = None
    if record["quality"] is not None and len(record["quality"]) < 2:
        record["quality"] = None
    for block in _BLOCKS:
        if record[block] is None:
            record[f"{block}_reason"] = why


def _parameters(attached: Attached, base_size: int) -> dict[str, Any]:
    groups = attached.parameter_groups()
    trainable = sum(groups.values())
    return {
        "groups": groups,
        "trainable": trainable,
        "base": base_size,
        "trainable_percent_of_base": round(100 * trainable / base_size, 4),
    }


def _traffic(attached: Attached, log: loop.StepLog | None, accumulation: int) -> dict[str, Any] | None:
    if log is None or attached.link is None:
        return {"evidence": "measured", "note": "nothing crosses: the method lives on the device", "total_bytes": 0}
    link, steps, tokens = attached.link, len(log.step_s), sum(log.tokens_real)
    by_purpose = {f"{way}_{purpose}_bytes": n for (way, purpose), n in sorted(link.bytes.items())}
    total = sum(link.bytes.values())
    micro_batches = len(attached.usage[0]) if attached.usage else steps * accumulation
    return {
        "evidence": "measured",
        "total_bytes": total,
        "by_purpose": by_purpose,
        "per_micro_batch_bytes": round(total / max(1, micro_batches)),
        "per_optimizer_step_bytes": round(total / steps),
        "per_trained_token_bytes": round(total / tokens, 2),
        "rows_moved_by_layer": [
            {
                "mean": round(statistics.fmean(u for _, u in layer), 2),
                "p95": sorted(u for _, u in layer)[math.ceil(0.95 * len(layer)) - 1],
            }
            for layer in attached.usage
        ],
        "tokens_per_micro_batch": round(
            statistics.fmean(t for t, _ in attached.usage[0]) if attached.usage else tokens / micro_batches, 2
        ),
    }


def _timing(log: loop.StepLog | None, dropped: int) -> dict[str, Any]:
    if log is None:
        return {"evidence": "measured", "step_s": [], "note": "nothing was trained"}
    # Warm-up steps are the first ones of the run, whether or not it was resumed later.
    steady = log.step_s[_WARMUP_STEPS:] or log.step_s
    tokens = log.tokens_real[_WARMUP_STEPS:] or log.tokens_real
    return {
        "evidence": "measured",
        "warmup_steps_excluded": min(_WARMUP_STEPS, len(log.step_s) - len(steady)),
        "step_s": [round(s, 5) for s in log.step_s],
        "median_step_s": round(statistics.median(steady), 5),
        "real_tokens_per_s": round(sum(tokens) / sum(steady), 1),
        "tokens_real": sum(log.tokens_real),
        "tokens_padded": sum(log.tokens_padded),
        "tokens_supervised": sum(log.tokens_supervised),
        "rows_dropped": dropped,
    }


def _curve(log: loop.StepLog) -> dict[str, Any]:
    every = max(1, math.ceil(len(log.loss) / _CURVE_POINTS))
    chosen = sorted({*range(every - 1, len(log.loss), every), len(log.loss) - 1})
    return {
        "step": [i + 1 for i in chosen],
        "loss": [round(log.loss[i], 5) for i in chosen],
        "gradient_norm": [round(log.gradient_norm[i], 5) for i in chosen],
    }


def _quality(scores: evaluation.SplitScores) -> dict[str, Any]:
    n = len(scores.ids)
    metrics = {}
    for name, values in scores.scores.items():
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
        metrics[name] = {
            "mean": round(mean, 6),
            "stderr": round(spread, 6),
            "items": [round(v, 4) if v not in (0.0, 1.0) else int(v) for v in values],
        }
    return {"n": n, "ids": scores.ids, "metrics": metrics, "examples": scores.outputs}


def main_process(spec: dict[str, Any], places: dict[str, Any], report: Callable[[tuple[str, Any]], None]) -> None:
    """Entry point of a worker process: output goes to log.txt; report gets ("progress", share) and (state, reason) at
    the end, or ("disk", the system's words) when something could not be written."""
    run_spec = RunSpec.from_dict(spec)
    where = Places(**{**places, "run_dir": Path(places["run_dir"])})
    try:
        log = open(where.run_dir / "log.txt", "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        print(f"run {run_spec.run_key}: {asdict(run_spec)}", flush=True)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        record = run(run_spec, where, progress=lambda share: report(("progress", share)))
        report((record["state"], record.get("state_reason", "")))
    except Exception as error:
        report(_last_words(error))


def _last_words(error: Exception) -> tuple[str, str]:
    if (disk := disk_error(error)) is not None:
        return "disk", disk
    with contextlib.suppress(OSError):
        traceback.print_exc(file=sys.stderr)
    return "failed", str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
