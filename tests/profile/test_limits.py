"""What a profile refuses by arithmetic, at its limits."""

import os

import pytest

from meft_bench.profile import limits
from tests.profile.small import small_config

GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes of host memory that are free."""

    def now(size: int) -> None:
        monkeypatch.setattr(limits.host_memory, "available_bytes", lambda: size)

    return now


def test_workers_must_fit_into_free_memory(free):
    free(6 * 600_000_000)
    limits.check_workers(None)
    limits.check_workers(6)
    with pytest.raises(ValueError, match="--workers 7 do not fit .* at most 6"):
        limits.check_workers(7)
    free(1)
    limits.check_workers(1)


def test_a_selection_must_fit_into_free_memory(free):
    """A million tokens of width 256 against 32,768 neurons are 131 GB of scores."""
    config = small_config()
    free(2 * GIB)
    limits.check_selection(config, 512, (64, 32768))
    with pytest.raises(ValueError, match="logging which neurons 1000000 tokens choose takes about 1"):
        limits.check_selection(config, 10**6, (64, 32768))
    free(200 * GIB)
    limits.check_selection(config, 10**6, (64, 32768))
    with pytest.raises(ValueError, match="GiB of host memory"):
        limits.check_selection(config, 512, (64, 50_000_000))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq": 129}, "--seq 129 is longer than the model's 128 positions"),
        ({"batch": 2**40 // (4 * 128 * 2000) + 1}, "the logits alone"),
        ({"sizes": (2**40 // (8 * 256) + 1,)}, "keys and values"),
        ({"batch": 10**6, "sizes": (2**11 + 100,)}, "activations of a layer alone"),
        ({"ranks": (2**40 // (8 * 256) + 1,)}, "--rank"),
    ],
)
def test_one_more_is_refused(changes, said):
    config = small_config(max_position_embeddings=128)
    usual = {"batch": 2, "seq": 128, "sizes": (64, 32768), "ranks": (8,)}
    limits.check_sizes(config, **usual)
    with pytest.raises(ValueError, match=said):
        limits.check_sizes(config, **{**usual, **changes})


@pytest.mark.parametrize(
    ("option", "value", "most", "fine"),
    [("--union", 1.0, 1.0, True), ("--union", 1.01, 1.0, False), ("--union", 1e-9, 1.0, True),
     ("--union", 0.0, 1.0, False),
     ("--host-memory", 1e9, float("inf"), True), ("--host-memory", float("inf"), float("inf"), False),
     ("--host-memory", float("nan"), float("inf"), False)],
)  # fmt: skip
def test_shares(option, value, most, fine):
    if fine:
        limits.check_share(option, value, most)
        return
    with pytest.raises(ValueError, match=f"{option} .* must be above 0"):
        limits.check_share(option, value, most)


def test_a_folder_is_looked_at_and_not_made(tmp_path, monkeypatch):
    limits.check_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="name another folder"):
        limits.check_folder(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="name another folder"):
        limits.check_folder(tmp_path / "a")
