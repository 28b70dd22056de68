"""Settings of the method's tests."""

import pytest

from meft_bench.meft.engine.slots import Slots


@pytest.fixture(autouse=True, scope="module")
def rows_are_held_early():
    """After one micro-batch, so that a few steps see rows whose optimizer is on the device."""
    before, Slots.known_after = Slots.known_after, 1
    yield
    Slots.known_after = before
