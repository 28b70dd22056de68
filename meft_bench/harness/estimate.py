"""What a run would need, before it starts: bytes and hours by formula. Every number here is "simulated"."""

from pathlib import Path

from meft_bench import host_memory
from meft_bench.harness import suites
from meft_bench.harness.spec import RunSpec
from meft_bench.provenance import gpu_bytes
from meft_bench.train.contract import describe
from meft_bench.train.counts import Counted
from meft_bench.train.methods import ModelShape, find_method, parse_options
from meft_bench.train.models import model_shape
from meft_bench.train.step_bytes import WIDTH, Step, step_bytes

KNOWN_SHAPES = {
    "llama-7b": ModelShape(hidden=4096, layers=32, ffn=11008, query=4096, value=4096, parameters=6_738_415_616),
    "mistral-7b": ModelShape(hidden=4096, layers=32, ffn=14336, query=4096, value=1024, parameters=7_241_732_096),
}
KNOWN_VOCABULARY = 32_000
"""Words of both."""
_UNION_SHARE = 0.26
"""U / R assumed for MEFT: what the paper's 0.56 M per iteration implies when gradients are counted."""
_GPU_FLOPS = {"bfloat16": 71e12, "float32": 35.6e12}
"""Of an RTX 3090, vendor figures."""
_GPU_USE = 0.4
"""The share a training loop commonly reaches."""


def predict(spec: RunSpec, shape: ModelShape, counted: Counted | None = None, vocabulary: int = 0) -> dict[str, int]:
    """{"device_bytes", "host_bytes"} of training one spec (train/step_bytes.py); U is assumed to be _UNION_SHARE of R,
    and logits are counted where the vocabulary is given. On the CPU both are host memory. counted counts parameters on
    the base itself; None takes the methods' closed formulas, which know LLaMA's layers."""
    if spec.steps == 0:
        return {"device_bytes": shape.parameters * WIDTH[spec.dtype], "host_bytes": 0}
    options = parse_options(spec.method, spec.options)
    groups = counted.groups(spec.method, options) if counted else find_method(spec.method).count(options, shape)
    step = Step(
        shape=shape,
        tokens=spec.batch_size // spec.accumulation * (spec.max_length or 64),
        dtype=spec.dtype,
        vocabulary=vocabulary,
        cuda=spec.device == "cuda",
        accumulation=spec.accumulation,
        union_share=_UNION_SHARE,
    )
    need = step_bytes(describe(spec.method), options, sum(groups.values()), step)
    return {"device_bytes": sum(need.device.values()), "host_bytes": sum(need.host.values())}


def refuse_if_too_large(spec: RunSpec, shape: ModelShape, free_host: int | None = None) -> None:
    """Raises ValueError, naming the predicted bytes, for a CPU run that cannot fit into the free memory."""
    need = sum(predict(spec, shape).values())
    free = host_memory.available_bytes() if free_host is None else free_host
    if spec.device == "cpu" and need > free:
        raise ValueError(
            f"this run needs about {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free: choose a "
            "smaller size, model or batch"
        )


def hours(spec: RunSpec, shape: ModelShape) -> float:
    """Hours on one RTX 3090: 4 multiply-adds per parameter and token with a frozen base, 6 when the base is trained."""
    work = (6 if describe(spec.method).trains_base else 4) * shape.parameters
    return spec.steps * spec.batch_size * (spec.max_length or 256) * work / (_GPU_FLOPS[spec.dtype] * _GPU_USE) / 3600


def paper_plan(
    model: str, spec_model: str, source: str | Path, data: str, limits: tuple[float, float] | None = None
) -> tuple[list[suites.Cell], str]:
    """(cells that can run, the plan in words) for the paper's own Table 1.

    model: its name for the reader; spec_model and source: how specs and transformers name it. A known name without
    weights ("llama-7b") gives the plan alone. limits: bytes of (the GPU, the host's memory); None is this machine's.
    """
    shape = KNOWN_SHAPES.get(model) or model_shape(source)
    counted = None if model in KNOWN_SHAPES else Counted.of(source)
    vocabulary = counted.config.get_text_config().vocab_size if counted else KNOWN_VOCABULARY
    memory, host = limits or (gpu_bytes(), host_memory.total_bytes())
    place = "there" if limits else "here"
    able: list[suites.Cell] = []
    lines = [
        f"Table 1 at the paper's settings on {model}, {shape.parameters:,} parameters. Memory and hours come from",
        "formulas (simulated): bf16 base (fp32 where it is trained itself), fp32 Adam, micro-batches of 2 x 256",
        f"tokens, one RTX 3090, each run at seeds {', '.join(map(str, suites.SEEDS))}.",
        f"{'task':<10} {'method':<26} {'size':>5} {'GPU GiB':>8} {'host GiB':>9} {'hours':>7}  state",
    ]
    mistral = shape.value < shape.hidden  # grouped-query attention: the paper's other model
    cells = suites.paper(
        spec_model, "hub" if data == "synthetic" else data, "cuda", "mistral-7b" if mistral else "llama-7b"
    )
    for cell in cells:
        need = predict(cell.spec, shape, counted, vocabulary)
        device_gib, host_gib = need["device_bytes"] / 2**30, need["host_bytes"] / 2**30
        lacking = []
        if need["device_bytes"] > memory:
            lacking.append(f"a CUDA GPU with {device_gib:.1f} GiB; {place} {memory / 2**30:.1f}")
        if need["host_bytes"] > host:
            lacking.append(f"{host_gib:.1f} GiB of host memory; {place} {host / 2**30:.1f}")
        if model in KNOWN_SHAPES:
            lacking.append("weights: MODEL=folder or hub id")
        if data == "synthetic":
            lacking.append("rows: DATA=folder or hub")
        state = f"not run (needs {'; '.join(lacking)})" if lacking else "can run"
        if not lacking:
            able.append(cell)
        if cell.spec.seed != suites.SEEDS[0]:
            continue
        lines.append(
            f"{cell.spec.task:<10} {cell.row:<26} {cell.share:>5} {device_gib:>8.1f} {host_gib:>9.1f} "
            f"{hours(cell.spec, shape):>7.1f}  {state}"
        )
    return able, "\n".join([*lines, f"{len(cells)} cells, {len(able)} can run {place}"])
