"""What only a GPU can show: the three counts agree, the cap holds, the simulation's peak is the allocator's.

Not beside the profile's other tests: in their process the simulated GPU is the accelerator, which page-locked memory
and the streams of backward passes would be asked of. The simulation runs in a process of its own here.
"""

import concurrent.futures
import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from meft_bench.profile import measure_plan, shapes
from meft_bench.profile.calibrate import calibrate, from_calibration
from meft_bench.profile.machine_rates import Scale
from meft_bench.profile.measured import counted_by_run
from meft_bench.profile.spec import ProfileSpec, Union
from meft_bench.profile.step import random_batch, training_step
from meft_bench.profile.variants import VARIANTS
from meft_bench.train.loop import token_loss
from meft_bench.train.methods import find_method
from tests.profile.tiny import SMALL

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Large enough that what the simulation leaves out, a context's few small blocks, is below 1 % of the peak.
MIDDLE = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
NEURONS = 4096


def spec(variant: str, **changes: Any) -> ProfileSpec:
    fields: dict[str, Any] = {"model": "middle", "neurons": NEURONS, "batch": 8, "seq": 256, **changes}
    if VARIANTS[variant].needs_union:
        fields.setdefault("union", counted_by_run(fields["neurons"]))
    return ProfileSpec(variant=variant, **fields)


def measured(wanted: ProfileSpec, cap_bytes: int | None = None) -> dict[str, Any]:
    """The answer of a process of its own, as a plan gets it."""
    arguments = {"device": "cuda", "steps": 2, "warmup": 2, "accumulations": (1,), "cap_bytes": cap_bytes}
    return measure_plan._in_process("measure", {"spec": wanted, "config": MIDDLE, "arguments": arguments})


def measured_row(wanted: ProfileSpec, cap_bytes: int | None = None) -> dict[str, Any]:
    answer = measured(wanted, cap_bytes)
    assert answer["state"] == "ok", answer
    return answer["row"]


def simulated_peak(wanted: ProfileSpec, config: LlamaConfig = MIDDLE) -> int:
    """Device bytes. In a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(_simulated_peak, wanted, config).result()


def _simulated_peak(wanted: ProfileSpec, config: LlamaConfig) -> int:
    from meft_bench.profile import simulated

    return simulated.largest(simulated.simulate(wanted, config)[0], "device").bytes


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("variant", ["meft", "meft_union", "parallel_adapter_streamed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_link_kineto_and_nvml_agree(variant: str, checkpointing: bool) -> None:
    transfers = measured_row(spec(variant, checkpointing=checkpointing))["traffic"]["transfers"]
    if transfers["kineto"] is None:
        pytest.skip(transfers["kineto_reason"])
    for direction in ("h2d", "d2h"):
        assert transfers["link_and_kineto"][direction]["agrees"], transfers
        if transfers["nvml"] is not None:  # not every driver has the counters; the row holds the reason
            assert transfers["nvml"][direction]["within"], transfers


@pytest.mark.gpu
@on_gpu
def test_the_cap_holds_and_the_next_row_runs() -> None:
    wanted, gib = spec("parallel_adapter"), 2**30
    roomy = measured_row(wanted, cap_bytes=12 * gib)
    assert roomy["evidence"] == "capped" and roomy["memory"]["device_peak_bytes"] > 3 * gib
    assert all(p["reserved_bytes"] <= 12 * gib for p in roomy["memory"]["by_phase_seen"].values())
    tight = measured(wanted, cap_bytes=2 * gib)
    assert tight["state"] == "oom" and "CUDA out of memory" in tight["reason"]
    assert measured(wanted)["state"] == "ok"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("variant", ["parallel_adapter", "parallel_adapter_host_optimizer", "full", "meft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_simulated_peak_is_the_allocators(
    variant: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On Hopper torch gives each thread's cuBLAS 32 MiB, 3 % of the smaller peaks, which the simulation leaves out.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "128")
    wanted = spec(variant, checkpointing=checkpointing)
    row = measured_row(wanted)
    if row["union"] is not None:
        union = Union(rows=row["union"]["union"], source="measured here", evidence="measured")
        wanted = dataclasses.replace(wanted, union=union)
    assert simulated_peak(wanted) == pytest.approx(row["memory"]["device_peak_bytes"], rel=0.03)


def test_the_simulations_process_leaves_no_simulated_gpu_here() -> None:
    """Which would take the place of the real one in everything that torch asks of the machine's accelerator."""
    before = torch.accelerator.current_accelerator()
    small = spec("meft", model="small", neurons=64, batch=2, seq=16)
    assert simulated_peak(small, SMALL) > 0
    assert torch.accelerator.current_accelerator() == before and str(before) != "simgpu"


@pytest.mark.gpu
@on_gpu
def test_a_measured_card(tmp_path: Path) -> None:
    tiny = Scale(stream_elements=1000, hidden=32, neurons=256, kept=8, tokens=16, device_elements=1000, product=64,
                 copy_bytes=(256, 4096), repeats=1)  # fmt: skip
    result = calibrate(tmp_path / "c.json", "cuda", tiny)
    made, _ = from_calibration(tmp_path / "c.json")
    assert made is not None and made.usable_bytes.value == torch.cuda.get_device_properties(0).total_memory
    assert len(result["copies"]) == 8


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])
@pytest.mark.parametrize(
    ("resident", "offloaded"),
    [
        (("parallel_adapter", {}), ("parallel_adapter_offload", {})),
        (("meft", {"kept": 16, "placement": "device"}), ("meft", {"kept": 16})),
        (("meft", {"kept": 16, "placement": "device", "reading": "union"}), ("meft", {"kept": 16, "reading": "union"})),
    ],
    ids=["streamed", "meft", "meft union"],
)
def test_offloaded_training_is_resident_training(resident: Any, offloaded: Any, device: str) -> None:
    losses = [_losses(*method, device=device) for method in (resident, offloaded)]
    assert losses[0][0] - losses[0][-1] > 0.1  # it does learn
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def _losses(name: str, options: dict[str, Any], device: str) -> list[float]:
    """Loss on one batch of a random fp32 model, before and after each of four steps on it."""
    torch.manual_seed(0)
    model = shapes.build(SMALL, device, torch.float32, random=True)
    with torch.no_grad():  # the same weights whatever device drew them
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    method = find_method(name)
    attached = method.attach(model, method.Options(neurons=256, **options), 0)
    optimizer = attached.make_optimizer(lr=0.02)
    wanted = ProfileSpec(model="small", variant="parallel_adapter", neurons=256, batch=2, seq=16)
    model.train()
    found = []
    for _ in range(5):
        torch.manual_seed(2)
        with torch.no_grad():
            found.append(token_loss(attached.model, random_batch(wanted, SMALL.vocab_size, device)).item() / 30)
        torch.manual_seed(2)
        training_step(attached, optimizer, wanted, SMALL.vocab_size, device)
    return found
