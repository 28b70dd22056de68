"""What `meft-bench run` is asked for, turned into a spec: a flag stands before the spec, the spec before the
environment. What makes no run is refused before torch is imported."""

import argparse
from typing import Any

from meft_bench import inputs
from meft_bench.harness.room import refuse_without_room
from meft_bench.harness.spec import DATA_SETS, FIELDS, RunSpec, check_fields
from meft_bench.reading import read_yaml
from meft_bench.train.contract import check_method, describe
from meft_bench.train.options import check_options, option_kinds


def asked_run(args: argparse.Namespace) -> tuple[RunSpec, dict[str, Any]]:
    """(the spec, where its folders are). Raises ValueError for what makes no run or has no room here."""
    from meft_bench.train.methods import complete_options

    asked = _named(args)
    places: dict[str, Any] = {}
    if args.model is not None or not asked.get("model", "embedded").startswith("local/"):
        asked["model"] = inputs.model(args.model if args.model is not None else asked.get("model"), places)
    if asked["task"] in DATA_SETS:
        asked["data"] = _data(args.data, asked.get("data"), places, asked["task"])
    elif args.data is not None:
        asked["data"] = args.data  # refused with the spec
    if args.device != "auto" or "device" not in asked:
        asked["device"] = inputs.device(args.device)
    spec = RunSpec.from_dict(asked)
    rows = spec.batch_size // spec.accumulation
    source = places.get("model_dir", spec.model)
    refuse_without_room(spec.method, spec.options, rows if spec.steps else 1, spec.device, source)
    asked["options"] = complete_options(spec.method, spec.options)
    rates = describe(spec.method).learning_rates
    asked.setdefault("learning_rate", rates[len(rates) // 2] if rates else 1e-3)
    if not rates:
        asked["steps"] = 0
    return RunSpec.from_dict(asked), places


def _data(flag: str | None, named: str | None, places: dict[str, Any], task: str) -> str:
    """The flag's rows, else those that the spec names, else $MEFT_DATA's. A digest in the spec, of the task's rows or
    of a suite's, says which ones a folder must have. Raises ValueError for others."""
    if named is None or not named.startswith("local@"):
        return inputs.data(named if flag is None else flag, places, DATA_SETS[task])
    for sets in (DATA_SETS[task], sum(DATA_SETS.values(), ())):
        if (data := inputs.data(flag, places, sets)) == named:
            return named
    raise ValueError(f"the spec asks for the rows {named}, not {data}: give their folder with --data")


def _named(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that the spec file and the command line name, checked one by one."""
    asked = read_yaml(args.spec, FIELDS) if args.spec else {}
    asked.update({name: value for name in ("task", "method") if (value := getattr(args, name)) is not None})
    asked.update(inputs.assignments(args.fields, FIELDS))
    if asked.get("options") is None:
        asked["options"] = {}
    check_fields(asked)
    for name in ("task", "method"):
        if name not in asked:
            raise ValueError(f"no {name} given: name it in the spec file or with --{name}")
    check_method(asked["method"])
    asked["options"] = {**asked["options"], **inputs.assignments(args.option, option_kinds(asked["method"]))}
    check_options(asked["method"], asked["options"])
    return asked
