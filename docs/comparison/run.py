"""Run the comparison's scripts, keep what they measured, and render docs/comparison.md from it.

python docs/comparison/run.py                        all scripts, seeds 0, 1, 2; records that count are kept
python docs/comparison/run.py --only lomo --again    some of them, anew
python docs/comparison/run.py --rates                LOMO's learning rates alone, which are chosen before its rows run
python docs/comparison/run.py --render               the page alone

It may be stopped and given again. The peers come with pip install 'meft-bench[peers,deepspeed]'. What cannot run here
is recorded with what it said.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from render import page, script_of

from meft_bench.harness.numerics import comparison_numerics, goes_on
from meft_bench.provenance import git_commit, provenance
from meft_bench.write import write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORDS = ROOT / "results" / "comparison"
SEEDS, STEPS = (0, 1, 2), 200
# First far apart, then a factor of 2.5 from the best of those, as the sweep tries the rates of every other row.
LOMO_RATES = {"adapter": (0.1, 0.5, 2.0, 8.0, 32.0, 3.2, 20.0), "full": (0.1, 0.5, 2.0, 8.0, 0.8, 5.0)}
ROWS = {
    "peft_lora-qv": "peft LoRA, q and v (peft's default)",
    "peft_lora-all": "peft LoRA, all linear layers",
    "peft_lora-ffn": "peft LoRA, FFN",
    "peft_shira": "peft SHiRA, all linear layers",
    "zero_offload": "DeepSpeed ZeRO-Offload, Parallel Adapter",
    "torchao_offload": "torchao CPUOffloadOptimizer, Parallel Adapter",
    "lomo-adapter": "LOMO, Parallel Adapter",
    "lomo-full": "LOMO, all weights (its usual use)",
    "adalomo": "AdaLomo, Parallel Adapter",
    "baseline-adalomo": "AdaLomo, all weights (our code)",
    "galore": "GaLore (galore-torch), all weights",
    "baseline-lsp_offload": "LSP-Offload, all matrices (our code)",
    "baseline-product_keys": "Product-key memory (our code)",
    "meft_loop": "MEFT, plain loop",
    "meft_trainer": "MEFT, transformers.Trainer",
    "meft_command": "MEFT, meft-bench train",
}
# What a launcher (deepspeed, torchrun) would set.
_ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that begin so, comma-separated")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--again", action="store_true", help="also where a record is there")
    parser.add_argument("--rates", action="store_true", help="choose LOMO's learning rates and stop")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args()
    wanted = [name for name in ROWS if any(name.startswith(part) for part in args.only.split(","))]
    if args.rates or (not args.render and any(name.startswith("lomo") for name in wanted)):
        choose_rates()
    if args.rates:
        return 0
    for seed in [] if args.render else map(int, args.seeds.split(",")):
        for name in wanted:
            path = RECORDS / f"{name}-{seed}.json"
            if args.again or not _counts(path, name):
                record = one(name, seed)
                write_json(path, record)
                print(f"{name} seed {seed}: {record.get('score', record.get('reason'))}", flush=True)
    (ROOT / "docs" / "comparison.md").write_text(rendered(), encoding="utf-8")
    return 0


def rendered() -> str:
    """docs/comparison.md as the records give it."""
    return page(read_records(), ROWS, json.loads((RECORDS / "lomo_rates.json").read_text(encoding="utf-8")))


def read_records() -> list[dict[str, Any]]:
    """Every record, in the table's order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("*-[0-9].json")]
    return sorted(found, key=lambda r: (list(ROWS).index(r["name"]), r["seed"]))


def one(name: str, seed: int, **more: str) -> dict[str, Any]:
    """Run one script in an empty folder; its record, also when it could not run."""
    variant = name.partition("-")[2]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        environment = {
            **os.environ, **_ALONE, "COMPARISON_SEED": str(seed), "COMPARISON_VARIANT": variant,
            "COMPARISON_STEPS": str(STEPS), "COMPARISON_OUT": str(out), "PYTHONPATH": _path(), "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more,
        }  # fmt: skip
        failed = None
        for command in _commands(script_of(name)):
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                failed = _reason(done.stderr)
                break
        record = {
            "name": name, "seed": seed, "task": "facts", "model": "embedded", "script": script_of(name).name,
            "numerics": comparison_numerics(name), "provenance": {**provenance(1), "peers": _peers()},
        }  # fmt: skip
        if failed or not out.is_file():
            return {**record, "evidence": "not-run", "reason": failed or "it wrote nothing"}
        return {**record, "evidence": "measured", **json.loads(out.read_text(encoding="utf-8"))}


def _path() -> str:
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


def _counts(path: Path, name: str) -> bool:
    """Whether the file at path is there and need not be made again."""
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return goes_on(found, comparison_numerics(name), git_commit(ROOT))


def _commands(file: Path) -> list[list[str]]:
    if file.suffix == ".py":
        return [[sys.executable, str(file)]]
    python = [sys.executable, "-c"]
    before, after = "job.write_rows(Path('facts.jsonl'))", "job.finish_adapter(Path('adapter'))"
    start = "from pathlib import Path; import job; "
    return [[*python, start + before], ["bash", "-e", str(file)], [*python, start + after]]


def _reason(stderr: str) -> str:
    """The error's own line: the last one that names a kind of error, or the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or ["no message"])[-1][:200]


def _peers() -> dict[str, str]:
    found = {}
    for package in ("accelerate", "bitsandbytes", "deepspeed", "galore-torch", "lomo-optim", "torchao"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def choose_rates() -> None:
    """Try the rates of LOMO that were not tried yet with seed 0 on the development split; keep scores and choice."""
    path = RECORDS / "lomo_rates.json"
    tried: dict[str, dict[str, Any]] = {}
    if _counts(path, "lomo_rates"):
        tried = json.loads(path.read_text(encoding="utf-8"))["tried"]
    for variant, rates in LOMO_RATES.items():
        for rate in rates:
            if str(rate) in tried.get(variant, {}):
                continue
            record = one(f"lomo-{variant}", 0, COMPARISON_RATE=str(rate), COMPARISON_SPLIT="validation")
            tried.setdefault(variant, {})[str(rate)] = record.get("score", record.get("reason"))
            print(f"lomo-{variant} at {rate}: {tried[variant][str(rate)]}", flush=True)
            _keep_rates(path, tried)


def _keep_rates(path: Path, tried: dict[str, dict[str, Any]]) -> None:
    numbers = {v: {r: s for r, s in scores.items() if isinstance(s, float)} for v, scores in tried.items()}
    chosen = {v: float(max(scores, key=lambda r: scores[r])) for v, scores in numbers.items() if scores}
    about = {"evidence": "measured", "split": "validation", "metric": "contains", "seed": 0, "items": 600}
    made = {"numerics": comparison_numerics("lomo_rates"), "provenance": {**provenance(1), "peers": _peers()}}
    write_json(path, {**about, **made, "tried": tried, "chosen": chosen})


if __name__ == "__main__":
    sys.exit(main())
