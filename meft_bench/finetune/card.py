"""The model card written beside a saved adapter: what it is and how it was made, facts only.

Names come from whoever made the base and the rows, and are shown as themselves, whatever they hold.
"""

import re
from typing import Any

from meft_bench.finetune.settings import TrainSettings, in_gb
from meft_bench.text import counted, markdown, printable
from meft_bench.train.contract import describe
from meft_bench.train.methods import find_method
from meft_bench.version import __version__

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def render(record: dict[str, Any], settings: TrainSettings) -> str:
    """README.md of an adapter folder, from the run's training.json."""
    base, plan, data, trained = record["base"], record["plan"], record["data"], record["training"]
    count = sum(plan["trainable"].values())
    sizes = {k: v for k, v in plan["options"].items() if v is not None}
    source = markdown(base["source"])
    lines = [
        *_front_matter(base, settings.method),
        f"# {find_method(settings.method).TITLE} on {source}",
        "",
        f"Made by `meft-bench train`, version {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {source}{' at ' + markdown(base['revision']) if base['revision'] else ''}, "
        f"{base['shape']['parameters']:,} parameters, weights {base['fingerprint']} |",
        f"| method | {settings.method}: {', '.join(f'{k} {markdown(v)}' for k, v in sizes.items()) or 'no options'} |",
        f"| trained parameters | {count:,} ({', '.join(f'{k} {v:,}' for k, v in plan['trainable'].items())}) |",
        f"| data | {markdown(data['name'])}, digest {markdown(data['digest'])}: {data['train_rows']:,} rows trained "
        f"on, {data['held_out_rows']:,} held out{_noted(data)}, {data['overlong']} above the length and "
        f"{data['empty']} empty left out |",
        *([f"| behind each prompt | {markdown(data['delimiter'])} |"] if data["delimiter"] else []),
        f"| steps | {trained['steps']} of {counted(settings.batch_size, 'row')} in "
        f"{counted(plan['accumulation'], 'micro-batch')} |",
        f"| learning rate | {plan['learning_rate']:g}, warm-up {settings.warmup_share:g}, then linear to 0 |",
        f"| weight decay, clipping | {settings.weight_decay:g}, {settings.clip:g} |",
        f"| seed, dtype, device | {settings.seed}, {plan['dtype']}, {plan['device']} |",
        f"| training loss | first step {trained['loss_first']:.4f}, last step {trained['loss_last']:.4f} (measured) |",
        f"| memory | device {in_gb(sum(plan['device_bytes'].values()))}, host "
        f"{in_gb(sum(plan['host_bytes'].values()))} (predicted by formula) |",
        "",
        *_scores(record["scores"]),
        *_loading(base, settings.method),
    ]
    return "\n".join(lines) + "\n"


def _noted(data: dict[str, Any]) -> str:
    """What weakens the scores below, if anything does."""
    same, unknown = data["held_out_rows_also_trained"], data["unknown"]
    return (f" ({same:,} of them trained on, too)" if same else "") + (
        f", {unknown:,} with text that the base's tokenizer reads as unknown" if unknown else ""
    )


def _front_matter(base: dict[str, Any], method: str) -> list[str]:
    # Only what a hub id may hold goes into YAML, and no folder that merely reads like one.
    hub = base["source"] if _HUB_ID.fullmatch(base["source"]) and not base.get("local") else None
    lines = ["---", f"library_name: {'peft' if describe(method).saved == 'peft' else 'meft-bench'}"]
    return [*lines, *([f"base_model: {hub}"] if hub else []), "tags:", f"- {method}", "---", ""]


def _scores(scores: dict[str, dict[str, Any]]) -> list[str]:
    if not scores:
        return []
    metrics = [m for m in ("loss", "perplexity", "contains", "exact_match") if m in next(iter(scores.values()))]
    return [
        f"| measured on | rows | {' | '.join(m.replace('_', ' ') for m in metrics)} |",
        f"|---|---|{'---|' * len(metrics)}",
        *(
            f"| {name.replace('_', '-')} rows | {values['rows']} of {values['of']:,} | "
            f"{' | '.join(f'{values[m]:.4f}' for m in metrics)} |"
            for name, values in scores.items()
        ),
        "",
    ]


def _loading(base: dict[str, Any], method: str) -> list[str]:
    lines = ["## Use", "", "    meft-bench generate --adapter THIS_FOLDER --prompt TEXT", ""]
    if describe(method).saved == "peft":
        on_host = ', torch_device="cpu"' if method == "meft" else ""  # where there is a GPU, peft reads rows into it
        lines += [
            "or, with peft,",
            "",
            *(["    import meft_bench.integrations.peft_method"] if method == "meft" else []),
            "    from peft import PeftModel",
            f"    model = PeftModel.from_pretrained(base, THIS_FOLDER{on_host})  # base: {printable(base['source'])}",
            "",
        ]
    if describe(method).saved == "model":
        lines += ["or with transformers: `AutoModelForCausalLM.from_pretrained(THIS_FOLDER)`.", ""]
    return lines
