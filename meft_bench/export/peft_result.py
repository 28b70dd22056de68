"""A record as a result of peft's method_comparison: the same run under the names that its tables read.

What a record does not hold is null, never 0, and "meft_bench" says why. Accelerator memory is CUDA's reserved memory,
as there. Adapters' memory in the host is no column there: "meft_bench" holds it.
"""

from functools import cache
from typing import Any

from meft_bench.export.peft_task import adapter_config
from meft_bench.harness.record import EVIDENCE
from meft_bench.harness.spec import HEADLINE_METRIC
from meft_bench.named import EMBEDDED, named_in
from meft_bench.train.contract import describe

_FULL = "full"
"""The one method without an adapter that peft's tables know: every parameter by AdamW."""
_ON_CPU = "ran on a CPU: no accelerator's memory was used"
_PEAK_ONLY = "a record holds the peak of each phase, not every step's memory"


def exported(record: dict[str, Any], model_dir: str | None = None) -> dict[str, Any]:
    """The result of one record. model_dir: the folder of a base that is one, to name the modules LoRA adapts.

    Raises ValueError for a method that peft does not have, and for a record without a test.
    """
    spec = record["spec"]
    if record["state"] != "ok" or "test" not in record["quality"]:
        raise ValueError(f"run {record['run_key']} ({record['state']}) has no test scores: name a run that was tested")
    config = _peft_config(spec, model_dir)
    why: dict[str, str] = {}
    train_info = _train_info(record, why)
    return {
        "run_info": _run_info(record, config, why),
        "train_info": train_info,
        "meta_info": _meta_info(record, why),
        "meft_bench": _about(record, why),
    }


def file_name(result: dict[str, Any]) -> str:
    """Where method_comparison looks for it, in its folder of results."""
    return f"{result['run_info']['experiment_name'].replace('/', '--')}.json"


def _run_info(record: dict[str, Any], config: dict[str, Any] | None, why: dict[str, str]) -> dict[str, Any]:
    phases = record["memory"].get("phase_s", {})
    why["created_at"] = "records hold no dates"
    return {
        "created_at": None,
        "total_time": round(sum(phases.values()), 3),
        "experiment_name": f"{_method(config)}/{_experiment(record['spec'])}-{record['run_key']}",
        "peft_branch": "meft-bench",
        "peft_worktree_is_dirty": record["provenance"]["dirty"],
        "train_config": _train_config(record["spec"]),
        "peft_config": config,
        "error_msg": "",
    }


def _method(config: dict[str, Any] | None) -> str:
    return "full-finetuning" if config is None else str(config["peft_type"]).lower()


def _experiment(spec: dict[str, Any]) -> str:
    """What a reader looks for in a name. Runs that differ elsewhere share it, so their keys stand behind it."""
    size = "-".join(f"{name}{spec['options'][name]}" for name in describe(spec["method"]).shown[:1])
    parts = [_base(spec), spec["task"], size, f"lr_{spec['learning_rate']:g}", f"seed{spec['seed']}"]
    return "-".join(part for part in parts if part)


def _base(spec: dict[str, Any]) -> str:
    return str(spec["model"]).rsplit("/", 1)[-1].split("@", 1)[0]


def _train_config(spec: dict[str, Any]) -> dict[str, Any]:
    """The fields of method_comparison's TrainConfig. The schedule is this project's: linear, after a warm-up."""
    return {
        "model_id": spec["model"],
        "dtype": spec["dtype"],
        "max_seq_length": spec["max_length"],
        "batch_size": spec["batch_size"],
        "batch_size_eval": None,
        "max_steps": spec["steps"],
        "eval_steps": None,
        "compile": False,
        "use_gc": False,
        "query_template": "{query}",
        "seed": spec["seed"],
        "grad_norm_clip": spec["clip"],
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": spec["learning_rate"], "weight_decay": spec["weight_decay"]},
        "lr_scheduler": "linear",
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _peft_config(spec: dict[str, Any], model_dir: str | None) -> dict[str, Any] | None:
    """What adapter_config.json would hold; None for full fine-tuning."""
    about = describe(spec["method"])
    if about.name == _FULL:
        return None
    if about.saved != "peft":
        raise ValueError(f"peft has no method {about.name}: export takes meft, full, and what peft itself makes")
    from meft_bench.train.methods import parse_options

    options = parse_options(spec["method"], spec["options"])
    if about.place == "host":
        from meft_bench.integrations.peft_method import MeftConfig

        config: Any = MeftConfig.from_core(options, task_type="CAUSAL_LM", seed=spec["seed"])
    else:
        config = _attached_config(spec, options, model_dir)
    config.base_model_name_or_path = spec["model"]
    return adapter_config(config)


def _attached_config(spec: dict[str, Any], options: Any, model_dir: str | None) -> Any:
    """The configuration that peft has after the method was attached to the base without its weights."""
    from meft_bench.train.counts import Counted, empty_model
    from meft_bench.train.methods import find_method

    if spec["model"].startswith("local/") and model_dir is None:
        raise ValueError(
            f"the base {spec['model']} is a folder: give it with --model, for the modules that are adapted"
        )
    base = empty_model(Counted.of(model_dir or spec["model"], spec["revision"]).config)
    model: Any = find_method(spec["method"]).attach(base, options, spec["seed"]).model
    return model.peft_config["default"]


def _train_info(record: dict[str, Any], why: dict[str, str]) -> dict[str, Any]:
    parameters, memory = record["parameters"], record["memory"]
    base, trainable = parameters["base"], parameters["trainable"]
    trains_base = describe(record["spec"]["method"]).trains_base
    why["accelerator_memory_reserved_avg"] = why["accelerator_memory_reserved_99th"] = _PEAK_ONLY
    why["file_size"] = "4 bytes a trainable parameter, without the file's header"
    return {
        "accelerator_memory_reserved_avg": None,
        "accelerator_memory_max": _peak(memory, why),
        "accelerator_memory_reserved_99th": None,
        "train_time": memory.get("phase_s", {}).get("train"),
        "file_size": 4 * trainable,
        "num_trainable_params": trainable,
        "num_total_params": base if trains_base else base + trainable,
        "status": "success",
        "metrics": _metrics(record, why),
    }


def _peak(memory: dict[str, Any], why: dict[str, str]) -> int | None:
    peaks = memory.get("device_peak_by_phase")
    if not peaks:
        why["accelerator_memory_max"] = _ON_CPU
        return None
    return max(peak["reserved_bytes"] for peak in peaks.values())


def _metrics(record: dict[str, Any], why: dict[str, str]) -> list[dict[str, Any]]:
    """The training loss at the curve's points, and last what the test says."""
    spec, curve = record["spec"], record["curve"] or {"step": [], "loss": []}
    points = [
        {"step": step, "train loss": loss, "train samples": step * spec["batch_size"]}
        for step, loss in zip(curve["step"], curve["loss"], strict=True)
    ]
    metric = HEADLINE_METRIC[spec["task"]]
    last = {
        "step": spec["steps"],
        "test accuracy": record["quality"]["test"]["metrics"][metric]["mean"],
        "train loss": curve["loss"][-1] if curve["loss"] else None,
        "train samples": spec["steps"] * spec["batch_size"],
        "train total tokens": (record["timing"] or {}).get("tokens_real"),
        "forgetting": _forgetting(record, why),
    }
    why["test accuracy"] = f"the mean of {metric} over {record['quality']['test']['n']} documents"
    return [*points, last]


def _forgetting(record: dict[str, Any], why: dict[str, str]) -> float | None:
    """Loss a token on text that nothing was trained on, after minus before, in nats."""
    probes = record["probes"] or {}
    if (held := probes.get("forgetting", {}).get("held_out")) is not None:
        why["forgetting"] = "nats a token on held-out text, after minus before"
        return round(held["nats_per_token"] - held["base_nats_per_token"], 6)
    if "base_text" in probes:
        why["forgetting"] = "nats a token on fresh draws of the base's own pretraining text, after minus before"
        return round(probes["base_text"]["nats_per_token"] - _base_nats(), 6)
    why["forgetting"] = "this run was not asked"
    return None


@cache
def _base_nats() -> float:
    """What the base that ships says of the same text before anything is trained."""
    from meft_bench.harness.probes import base_text
    from meft_bench.train.models import load_model

    loaded = load_model(EMBEDDED, None, "float32", "cpu")
    return float(base_text(loaded.model.eval().requires_grad_(False), loaded)["nats_per_token"])


def _meta_info(record: dict[str, Any], why: dict[str, str]) -> dict[str, Any]:
    spec, where = record["spec"], record["provenance"]
    packages = where["packages"]
    system, _, machine = str(where["system"]).partition(" ")
    named = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    why["bitsandbytes-version"] = "not used"
    package_info: dict[str, Any] = {}
    for name in named:
        package_info |= {f"{name}-version": packages.get(name), f"{name}-commit-hash": None}
    return {
        "model_info": {"sha": _sha(spec), "created_at": None},
        "dataset_info": {spec["task"]: {"sha": spec["data"].partition("@")[2] or None, "created_at": None}},
        "package_info": package_info,
        "system_info": {
            "system": system,
            "release": None,
            "version": None,
            "machine": machine,
            "processor": where["cpu"],
            "accelerator": where["gpu"],
        },
        "pytorch_info": f"torch {packages['torch']}",
    }


def _sha(spec: dict[str, Any]) -> str | None:
    return spec["revision"] or spec["model"].partition("@")[2] or None


def _about(record: dict[str, Any], why: dict[str, str]) -> dict[str, Any]:
    """What the other blocks have no name for: where the record is from, why something is null, memory in the host."""
    evidence = record["quality"]["evidence"]
    assert evidence in EVIDENCE
    memory = record["memory"]
    return {
        "run_key": record["run_key"],
        "commit": record["provenance"]["commit"],
        "evidence": evidence,
        "named_base": named_in(record["spec"]["model"]),
        "accounted": memory.get("accounted", {}),
        "host_peak_rss_bytes": memory.get("host_peak_rss_bytes"),
        "traffic_total_bytes": (record["traffic"] or {}).get("total_bytes"),
        "notes": why,
    }
