"""Native kernels for rows.py."""

from typing import Any


def fits(*tensors: Any) -> bool:
    return False
