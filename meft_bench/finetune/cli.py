"""The commands train, generate and evaluate. No torch at import: help must be light."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from meft_bench import fields, inputs, quiet, ranks
from meft_bench.fields import MOST_ROWS_A_STEP, MOST_SEED, Text, Whole, flag
from meft_bench.finetune.settings import DEVICES, DTYPES, FIELDS, ROWS, SIZES, TrainSettings
from meft_bench.flags import Once, add_flags
from meft_bench.reading import read_yaml
from meft_bench.stopping import ctrl_c_stops

_TRAIN = """\
examples:
  meft-bench train --data example --steps 200 --output my-adapter
  meft-bench train --model meta-llama/Llama-3.1-8B --data facts.jsonl --gpu-memory 24GB --output my-adapter
  meft-bench train --data facts.csv --columns prompt=frage,completion=antwort --method lora --option rank=16 --output d
  meft-bench train job.yaml --learning-rate 2e-4 --output d --resume
  torchrun --nproc-per-node 4 -m meft_bench train --data facts.jsonl --output d     # on 4 GPUs: docs/ranks.md

A row has prompt and completion, question and answer (text, or a list of right answers), text, or chat messages
(the last answer is learned). The YAML file has the same names as the flags, with _ for -; the command line wins."""


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the three commands to the program's parser; command(commands, name, function, about) makes one."""
    p = command(commands, "train", _train, "fine-tune a model on your own rows")
    p.formatter_class, p.epilog = argparse.RawDescriptionHelpFormatter, _TRAIN
    p.add_argument("file", nargs="?", type=fields.path, metavar="YAML", help="settings, one NAME: VALUE a line")
    add_flags(p, TrainSettings)
    p.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")

    p = command(commands, "generate", _generate, "answer prompts with a trained adapter")
    _adapter(p, batch_size=16)
    p.add_argument(
        "--prompt",
        type=flag(Text(empty=True, longest=10**6)),
        action="append",
        default=[],
        help="may be given more than once",
    )
    p.add_argument("--file", type=fields.path, help="one prompt a line, or .jsonl with a prompt or question column")
    p.add_argument("--new-tokens", type=flag(Whole(1)), default=64, help="at most this many per answer (default: 64)")

    p = command(commands, "evaluate", _evaluate, "score a trained adapter on lm-eval tasks, ours and built-in ones")
    _adapter(p, batch_size=8)
    p.add_argument(
        "--tasks",
        type=flag(Text()),
        required=True,
        help="names, comma-separated; lm-eval:NAME where both have a task NAME",
    )
    p.add_argument("--limit", type=flag(Whole(1)), metavar="N", help="documents per task (default: all)")
    p.add_argument("--data", type=flag(Text()), metavar="FOLDER", help="rows of the tasks nq, squad, toolbench, gsm8k")
    p.add_argument("--include", type=fields.path, metavar="FOLDER", help="a folder of your own lm-eval YAML tasks")
    p.add_argument("--seed", type=flag(Whole(0, MOST_SEED)), default=0)


def _adapter(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument(
        "--adapter", action=Once, type=fields.path, required=True, metavar="DIR", help="folder that train wrote"
    )
    parser.add_argument("--model", type=flag(Text()), help="the base, where it is not what the adapter names")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    about = "how MEFT's neurons are held in host memory: as trained (default), or quantised in groups of 32"
    parser.add_argument("--rows", choices=ROWS, default="fp32", help=about)
    about = f"texts at once; fewer need less memory (default: {batch_size})"
    parser.add_argument(
        "--batch-size", type=flag(Whole(1, MOST_ROWS_A_STEP)), default=batch_size, metavar="N", help=about
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """The YAML file's settings with the command line's on top. Raises ValueError for what makes no run."""
    values = read_yaml(args.file, FIELDS) if args.file else {}
    for name in ("options", "columns"):
        values[name] = {} if values.get(name) is None else values[name]
        FIELDS[name].check(name, values[name])
    given = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    if "columns" in given:
        given["columns"] = inputs.texts([pair for text in given["columns"] for pair in text.split(",")])
    options = inputs.assignments(given["options"], _kinds(given, values)) if "options" in given else {}
    for name in SIZES:
        if name in given or name in options:  # in whichever of its two forms the file has it
            values.pop(name, None)
            values["options"].pop(name, None)
    given["options"] = {**values["options"], **options}
    values.update(given)
    if args.steps is not None and args.epochs is None:
        values.pop("epochs", None)
    if args.epochs is not None and args.steps is None:
        values.pop("steps", None)
    return TrainSettings.from_dict(values)


def _kinds(given: dict[str, Any], values: dict[str, Any]) -> dict[str, fields.Kind]:
    """What the options of the method asked for take."""
    from meft_bench.train.options import option_kinds

    return option_kinds(given.get("method", values.get("method", "meft")))


def _train(args: argparse.Namespace) -> int:
    settings = train_settings(args)
    from meft_bench.finetune.early import refuse_training

    started = ranks.launched()
    try:
        refuse_training(settings, args.resume, started)  # before anything heavy is imported
    except (ValueError, FileNotFoundError):
        if started.local_rank:  # the others of this machine see the same, and one of them says so
            return 2
        raise
    if not started.alone:
        quiet.ranks()
    from meft_bench.finetune.train import train

    quiet.loaded_libraries()
    try:
        with ctrl_c_stops():
            train(settings, args.resume, say=lambda line: print(line, flush=True), started=started)
    except ranks.SaidElsewhere:
        return 2
    except KeyboardInterrupt:
        if started.first:
            print("\nmeft-bench: stopped; go on from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


def _generate(args: argparse.Namespace) -> int:
    if not args.prompt and not args.file:
        raise ValueError("no prompt given: give --prompt TEXT or --file FILE")
    from meft_bench.finetune.early import refuse_adapter
    from meft_bench.finetune.user_rows import read_prompts

    # Before anything heavy is imported.
    prompts = [*args.prompt, *(read_prompts(args.file) if args.file else [])]
    refuse_adapter(args.adapter, args.model, args.rows)
    from meft_bench.finetune.generate import answers, load_adapted

    quiet.loaded_libraries()
    adapted = load_adapted(args.adapter, args.model, args.device, args.dtype, args.rows)
    for prompt, answer in zip(prompts, answers(adapted, prompts, args.new_tokens, args.batch_size), strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer}) if args.json else answer, flush=True)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    from meft_bench.finetune.early import refuse_adapter, refuse_tasks

    refuse_tasks(names, args.data, args.include)  # before anything heavy is imported
    refuse_adapter(args.adapter, args.model, args.rows)
    from meft_bench.finetune.evaluate import evaluate, text

    quiet.loaded_libraries()
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
        rows=args.rows,
        batch_size=args.batch_size,
    )
    print(json.dumps(found, indent=1, sort_keys=True) if args.json else text(found))
    return 0
