"""The task of learning new facts, in the layout of a task of peft's method_comparison: parameters, one folder for each
experiment, and rows. docs/peft.md says how it is run there."""

import enum
import json
from pathlib import Path
from typing import Any

from meft_bench.tasks import docs

MODEL = "meta-llama/Llama-3.2-3B"
"""The base that method_comparison's tasks use."""
FACTS, VALID_ROWS, BATCH, EPOCHS = 600, 50, 4, 8
_WORDINGS = 4
"""In which a fact is asked in training."""
TEMPLATE = "Question: {query}\nAnswer:"
SAYS = " The answer is: "
"""What method_comparison looks for an answer behind."""
_NEURONS, _RANK = 3136, 32
_README = """\
# Learning new facts

Questions about invented people in several wordings, so that no base can know the answers. The test asks for what was
trained in wordings that training never used. Accuracy is what was learned, forgetting is what the base lost on other
text.

This folder has the layout of a task of peft's method_comparison. It is run by run.py and utils.py of its MetaMathQA,
put here unchanged:

    python run.py -v experiments/lora/llama-3.2-3B-rank32

peft knows MEFT once `meft_bench.MeftConfig` was imported: until MEFT is a method of peft, put that import into run.py.

Written by `meft-bench export --task`.
"""


def task_files() -> dict[str, bytes]:
    """The task: the path of each of its files in its folder, in order, and the file's content."""
    rows = _rows()
    files = {"default_training_params.json": _json(_parameters(len(rows["train"])))}
    files |= {f"data/{name}.jsonl": "".join(json.dumps(row) + "\n" for row in some) for name, some in rows.items()}
    files |= {**_experiments(), "README.md": _README}
    files["data.py"] = Path(__file__).with_name("task_data.py").read_text(encoding="utf-8")
    return {name: files[name].encode() for name in sorted(files)}


def _rows() -> dict[str, list[dict[str, str]]]:
    made = docs.people(seed=0, train_rows=FACTS, eval_rows=FACTS)
    splits = {"train": made["train"], "valid": made["validation"].select(range(VALID_ROWS)), "test": made["test"]}
    return {name: [_row(doc) for doc in split] for name, split in splits.items()}


def _row(doc: dict[str, Any]) -> dict[str, str]:
    before, after = TEMPLATE.split("{query}")
    prompt = doc["prompt"]
    assert prompt.startswith(before) and prompt.endswith(after), "the template is that of the task people"
    return {"query": prompt[len(before) : -len(after)], "response": SAYS + doc["target"]}


def _parameters(train_rows: int) -> dict[str, Any]:
    """default_training_params.json: the fields of method_comparison's TrainConfig."""
    steps = train_rows * EPOCHS // BATCH
    return {
        "model_id": MODEL,
        "dtype": "bfloat16",
        "max_seq_length": 128,
        "batch_size": BATCH,
        "batch_size_eval": VALID_ROWS,
        "max_steps": steps,
        "eval_steps": steps // EPOCHS,
        "compile": False,
        "use_gc": False,
        "seed": 0,
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.0},
        "lr_scheduler": "cosine",
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "attn_implementation": None,
        "generation_kwargs": {"max_length": 160, "max_new_tokens": 32},
        "query_template": TEMPLATE,
        "init_kv_cache_prefix": None,
    }


def _experiments() -> dict[str, str]:
    """experiments/<method>/<name>/<file> -> text: MEFT, LoRA of two sizes, and full fine-tuning, which has no adapter
    configuration."""
    from peft import LoraConfig

    from meft_bench.integrations.peft_method import MeftConfig
    from meft_bench.meft.config import MeftOptions
    from meft_bench.train.meft import options_at

    meft = MeftConfig.from_core(MeftOptions(**options_at(_NEURONS, {})), task_type="CAUSAL_LM")
    lora = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, task_type="CAUSAL_LM")
    rates = {"optimizer_kwargs": {"lr": 1e-5, "weight_decay": 0.0}}
    return {
        f"experiments/meft/llama-3.2-3B-r{_NEURONS}/adapter_config.json": _json(adapter_config(meft)),
        f"experiments/lora/llama-3.2-3B-rank{_RANK}/adapter_config.json": _json(adapter_config(lora)),
        "experiments/full-finetuning/llama-3.2-3B-lr_0.00001/training_params.json": _json(rates),
    }


def adapter_config(config: Any) -> dict[str, Any]:
    """A peft configuration as its adapter_config.json holds it: sets as lists, members of enumerations as texts."""
    found = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in found.items()}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
