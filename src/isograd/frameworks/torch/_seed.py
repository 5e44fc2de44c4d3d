"""Seed the user's generators, when asked to, or put them back: the only place in isograd that touches torch's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from isograd.frameworks import _seed as seeds


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    seeds.seed_generators(seed)
    torch.manual_seed(seed)


def shift_seeds(shift: int) -> None:
    """Seed the generators with `shift`, and from now on add it to every seed that the program sets globally.

    A program that sets its own seed would otherwise run the same way however often it is repeated. Generators that it
    makes for itself, for its data say, stay as they are. For processes of their own: nothing is put back.
    """
    seed_generators(shift)
    seeds.shift_seeds(shift)
    torch.manual_seed = torch.random.manual_seed = seeds.shifted(torch.manual_seed, shift)


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
