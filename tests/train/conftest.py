"""What the tests here share."""

from tests.methods import method, overflowing_update

__all__ = ["method", "overflowing_update"]
