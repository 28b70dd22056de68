"""Which GPU a record names and a plan counts on: those in use, not the machine's first."""

import sys
from types import SimpleNamespace

import pytest
import torch

from meft_bench import provenance

CARDS = {"GPU-aaaa": "RTX 3090", "GPU-bbbb": "H100"}
BYTES = {"GPU-aaaa": 24 * 2**30, "GPU-bbbb": 80 * 2**30}


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: list(CARDS)[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetName=lambda handle: CARDS[handle],
        nvmlDeviceGetCount=lambda: len(CARDS),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=BYTES[handle]),
        nvmlSystemGetDriverVersion=lambda: "570.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("left,name", [(None, "RTX 3090"), ("1,0", "H100"), ("GPU-bbbb", "H100"), ("", None)])
def test_the_first_card_that_the_environment_leaves_is_named(two_cards, monkeypatch, left, name) -> None:
    if left is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", left)
    found = provenance.gpu()
    assert found["gpu"] == name and (name is None) == ("gpu_reason" in found)


def test_the_card_in_use_is_named_however_cuda_numbers_them(two_cards, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="bbbb"))
    assert provenance.gpu() == {"gpu": "H100", "driver": "570.1"}


def test_a_part_of_a_card_is_named(two_cards, monkeypatch) -> None:
    """MIG: CUDA gives its UUID without the prefix that NVML wants."""
    nvml = sys.modules["pynvml"]

    def handle(uuid: str) -> str:
        if uuid != "MIG-cccc":
            raise nvml.NVMLError("Not Found")
        return uuid

    monkeypatch.setattr(nvml, "NVMLError", RuntimeError, raising=False)
    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setitem(CARDS, "MIG-cccc", "H100 MIG 3g.40gb")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="cccc"))
    assert provenance.gpu()["gpu"] == "H100 MIG 3g.40gb"


@pytest.mark.parametrize(
    "left, names, gib",
    [
        (None, ["0", "1"], 24),
        ("1", ["1"], 80),
        ("GPU-bbbb", ["GPU-bbbb"], 80),
        ("GPU-bbbb, 0", ["GPU-bbbb", "0"], 24),
        ("1,-1,0", ["1"], 80),
        ("", [], 0),
    ],
)
def test_runs_are_planned_for_the_cards_that_are_left(two_cards, monkeypatch, left, names, gib) -> None:
    if left is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", left)
    assert provenance.visible_gpus() == names and provenance.gpu_bytes() == gib * 2**30
