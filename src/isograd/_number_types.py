"""The ranges of number types that are too narrow for deep learning without care. bfloat16 has the range of float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isograd._history import History


@dataclass(frozen=True, kw_only=True)
class NumberType:
    """`smallest`: the smallest positive number; half of it rounds to 0. Below `smallest_normal` bits are lost one by
    one. `largest`: the largest finite number.
    """

    smallest: float
    smallest_normal: float
    largest: float


NARROW = {
    "float16": NumberType(smallest=2.0**-24, smallest_normal=2.0**-14, largest=65504.0),
    "float8_e5m2": NumberType(smallest=2.0**-16, smallest_normal=2.0**-14, largest=57344.0),
    "float8_e4m3fn": NumberType(smallest=2.0**-9, smallest_normal=2.0**-6, largest=448.0),
}
"""IEEE 754-2019 (float16) and Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433."""


def narrow_columns(history: History, columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the layers whose outputs, and the gradients with respect to them, have a narrow range."""
    return np.array([index for index in columns if history.layers[index].dtype in NARROW], dtype=np.int64)
