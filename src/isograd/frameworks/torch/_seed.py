"""Seed the user's generators, when asked to, or put them back: the only place in isograd that touches them."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what scripts use
    torch.manual_seed(seed)


def shift_seeds(shift: int) -> None:
    """Seed the generators with `shift`, and from now on add it to every seed that the program sets globally.

    A program that sets its own seed would otherwise run the same way however often it is repeated. Generators that it
    makes for itself, for its data say, stay as they are. For processes of their own: nothing is put back.
    """
    seed_generators(shift)

    def shifted(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_seed(seed: Any = None, *args: Any, **kwargs: Any) -> Any:
            return original(seed + shift if isinstance(seed, Integral) else seed, *args, **kwargs)

        return set_seed

    random.seed = shifted(random.seed)
    np.random.seed = shifted(np.random.seed)
    torch.manual_seed = torch.random.manual_seed = shifted(torch.manual_seed)


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Whatever is drawn inside, Python's, NumPy's and torch's generators stand afterwards where they stood."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - as above
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002 - as above
