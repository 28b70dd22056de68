"""Processes that simulate have one thread each; those that measure after them have as many as before."""

import multiprocessing
import os

import pytest
import torch

from meft_bench.profile.pool import Pool


def _threads(_: int = 0) -> tuple[str | None, int]:
    return os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()


@pytest.mark.parametrize("given", [None, "2"])
def test_what_is_started_after_a_pool_has_all_threads(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meft-bench profile` simulates, then measures on the GPU in processes of their own (measure_plan.py)."""
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    with Pool({}, 1) as processes:
        ((_, inside),) = list(processes.each(_threads, [(0,)]))
        assert os.environ.get("OMP_NUM_THREADS") == given
    assert inside[1] == 1
    with multiprocessing.get_context("spawn").Pool(1) as measuring:
        assert measuring.apply(os.getenv, ("OMP_NUM_THREADS",)) == given
