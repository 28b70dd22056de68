"""The commands train, generate and evaluate. No torch at import: help must be light."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from meft_bench import inputs
from meft_bench.finetune.settings import DEVICES, DTYPES, TrainSettings

_TRAIN = """\
examples:
  meft-bench train --data example --steps 200 --output my-adapter
  meft-bench train --model meta-llama/Llama-3.1-8B --data facts.jsonl --gpu-memory 24GB --output my-adapter
  meft-bench train --data facts.csv --columns prompt=frage,completion=antwort --method lora --option rank=16 --output d
  meft-bench train job.yaml --learning-rate 2e-4 --output d --resume

A row has prompt and completion, question and answer (text, or a list of right answers), text, or chat messages
(the last answer is learned). The YAML file has the same names as the flags, with _ for -; the command line wins."""


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the three commands to the door's parser; command(commands, name, function, about) makes one."""
    p = command(commands, "train", _train, "fine-tune a model on your own rows")
    p.formatter_class, p.epilog = argparse.RawDescriptionHelpFormatter, _TRAIN
    p.add_argument("file", nargs="?", type=Path, metavar="YAML", help="settings, one NAME: VALUE a line")
    p.add_argument("--model", help="folder, hub id or embedded (default: embedded)")
    p.add_argument("--revision", help="commit of a hub model")
    p.add_argument("--data", help=".jsonl, .csv or .parquet file, hub id, or example (200 rows that ship here)")
    p.add_argument("--method", help="meft, lora, parallel_adapter, adapter_h, full, ... (default: meft)")
    p.add_argument("--output", help="folder for the adapter; it appears when the run is whole")
    p.add_argument("--gpu-memory", metavar="SIZE", help="what the plan may use of the GPU, such as 24GB")
    p.add_argument("--host-memory", metavar="SIZE", help="what it may use of host memory (default: what is free)")
    p.add_argument("--neurons", type=int, metavar="R", help="key-value pairs per layer (default: chosen by the plan)")
    p.add_argument("--kept", type=int, metavar="K", help="neurons kept per token (default: chosen by the plan)")
    p.add_argument("--option", action="append", metavar="NAME=VALUE", dest="options", help="a setting of the method")
    p.add_argument("--columns", metavar="ROLE=NAME,...", help="roles prompt and completion, text, or messages")
    p.add_argument("--subset", help="configuration of a hub data set")
    p.add_argument("--split", help="split of a hub data set (default: train)")
    p.add_argument("--delimiter", help="between prompt and completion (default: one space)")
    p.add_argument("--chat-template", metavar="FILE", help="Jinja template for messages rows")
    p.add_argument("--max-length", type=int, metavar="TOKENS", help="per row (default: the model's limit)")
    p.add_argument("--drop-overlong", action="store_true", default=None, help="leave longer rows out, counted")
    p.add_argument("--drop-empty", action="store_true", default=None, help="leave empty rows out, counted")
    p.add_argument("--eval-share", type=float, metavar="SHARE", help="of the rows held out and scored (default: 0.05)")
    p.add_argument("--eval-rows", type=int, metavar="N", help="rows scored of each set (default: 200)")
    p.add_argument("--epochs", type=float, help="passes over the rows (default: 3)")
    p.add_argument("--steps", type=int, help="optimizer steps, instead of epochs")
    p.add_argument("--batch-size", type=int, metavar="ROWS", help="per optimizer step (default: 16)")
    p.add_argument("--accumulation", type=int, metavar="N", help="micro-batches per step (default: chosen by the plan)")
    p.add_argument("--learning-rate", type=float, metavar="RATE", help="peak (default: by method and model width)")
    p.add_argument("--warmup-share", type=float, metavar="SHARE", help="of the steps (default: 0.02)")
    p.add_argument("--weight-decay", type=float)
    p.add_argument("--clip", type=float, metavar="NORM", help="global gradient norm (default: 1)")
    p.add_argument("--seed", type=int)
    p.add_argument("--dtype", choices=DTYPES, help="of the base (default: bfloat16 on a GPU, float32 on the CPU)")
    p.add_argument("--device", choices=DEVICES)
    p.add_argument("--checkpoint-minutes", type=float, metavar="M", help="between checkpoints (default: 10)")
    p.add_argument("--checkpoint-steps", type=int, metavar="N", help="between checkpoints, instead of minutes")
    p.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")

    p = command(commands, "generate", _generate, "answer prompts with a trained adapter")
    _adapter(p)
    p.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    p.add_argument("--file", type=Path, help="one prompt a line, or .jsonl with a prompt or question column")
    p.add_argument("--new-tokens", type=int, default=64, help="at most this many per answer (default: 64)")

    p = command(commands, "evaluate", _evaluate, "score a trained adapter on lm-eval tasks, ours and built-in ones")
    _adapter(p)
    p.add_argument("--tasks", required=True, help="names, comma-separated; lm-eval:NAME where both have a task NAME")
    p.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    p.add_argument("--data", metavar="FOLDER", help="rows of the tasks nq, squad, toolbench, gsm8k")
    p.add_argument("--include", type=Path, metavar="FOLDER", help="a folder of your own lm-eval YAML tasks")
    p.add_argument("--seed", type=int, default=0)


def _adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="folder that train wrote")
    parser.add_argument("--model", help="the base, where it is not what the adapter names")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON")


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """The YAML file's settings with the command line's on top. Raises ValueError for what makes no run."""
    values = inputs.read_yaml(args.file) if args.file else {}
    for name in ("learning_rate", "weight_decay", "warmup_share"):
        if isinstance(values.get(name), str):  # YAML reads 1e-3 as text
            values[name] = inputs.assignments([f"{name}={values[name]}"])[name]
    for field in fields(TrainSettings):
        given = getattr(args, field.name)
        if given is None:
            continue
        if field.name == "options":
            given = {**(values.get("options") or {}), **inputs.assignments(given)}
        if field.name == "columns":
            from meft_bench.finetune.rows import columns_from

            given = columns_from(given)
        values[field.name] = given
    if args.steps is not None and args.epochs is None:
        values.pop("epochs", None)
    if args.epochs is not None and args.steps is None:
        values.pop("steps", None)
    return TrainSettings.from_dict(values)


def _train(args: argparse.Namespace) -> int:
    settings = train_settings(args)
    from meft_bench.finetune.train import train

    try:
        train(settings, args.resume, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("\nmeft-bench: stopped; go on from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


def _generate(args: argparse.Namespace) -> int:
    if args.new_tokens < 1:
        raise ValueError(f"--new-tokens {args.new_tokens} must be at least 1")
    if not args.prompt and not args.file:
        raise ValueError("no prompt given: give --prompt TEXT or --file FILE")
    from meft_bench.finetune.generate import answers, load_adapted, read_prompts

    prompts = [*args.prompt, *(read_prompts(args.file) if args.file else [])]
    adapted = load_adapted(args.adapter, args.model, args.device, args.dtype)
    for prompt, answer in zip(prompts, answers(adapted, prompts, args.new_tokens), strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer}) if args.json else answer, flush=True)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    from meft_bench.finetune.evaluate import evaluate, text

    found = evaluate(
        args.adapter,
        names,
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        limit=args.limit,
        data_dir=args.data,
        include=args.include,
        seed=args.seed,
    )
    print(json.dumps(found, indent=1, sort_keys=True) if args.json else text(found))
    return 0
