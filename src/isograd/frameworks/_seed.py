"""Seed Python's and NumPy's generators, when asked to: what every framework's programs use beside its own."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np

_is_shifted = False


def seed_generators(seed: int) -> None:
    """Seed Python's and NumPy's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what scripts use


def shifted(original: Callable[..., Any], shift: int) -> Callable[..., Any]:
    """`original` with `shift` added to the seed that it is given."""

    @functools.wraps(original)
    def set_seed(seed: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(seed + shift if isinstance(seed, Integral) else seed, *args, **kwargs)

    return set_seed


def shift_seeds(shift: int) -> None:
    """Add `shift` to every seed that the program gives Python's and NumPy's generators from now on, once a process."""
    global _is_shifted
    if not _is_shifted:
        _is_shifted = True
        random.seed = shifted(random.seed, shift)
        np.random.seed = shifted(np.random.seed, shift)
