"""Keras 3 on the TensorFlow, JAX and torch backends: observe a training program."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import keras

from isograd.frameworks import _seed as seeds
from isograd.frameworks.keras._apply import Applier as Applier
from isograd.frameworks.keras._guarding import check as check_guard
from isograd.frameworks.keras._initialization import initialize as initialize
from isograd.frameworks.keras._observe import Observer as Observer

__all__ = ["Applier", "Observer", "check_guard", "describe_run", "seed_generators", "shift_seeds", "sort"]


def describe_run() -> dict[str, Any]:
    """Facts about this process that a run file keeps: Keras, its backend, and that backend's version."""
    backend = keras.backend.backend()
    version = str(import_module(backend).__version__)
    return {"framework": "keras", "keras": keras.__version__, "backend": backend, backend: version}


def sort(things: Iterable[object]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[object, ...]]:
    """(models, optimizers, others) among `things`: models only. Raises ValueError for anything else."""
    models = tuple(things)
    for thing in models:
        if not isinstance(thing, keras.Model):
            raise ValueError(f"watch() takes Keras models, with the optimizers they are compiled with; not {thing!r}")
    return models, (), ()


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and Keras's generators, and its backend's."""
    keras.utils.set_random_seed(seed)


def shift_seeds(shift: int) -> None:
    """Seed the generators with `shift`, and from now on add it to every seed that the program sets globally.

    For processes of their own: nothing is put back.
    """
    seed_generators(shift)
    seeds.shift_seeds(shift)
    original = keras.utils.set_random_seed

    def set_random_seed(seed: int) -> None:
        original(seed + shift)
        # Below it Python's and NumPy's generators have got the shift a second time.
        seeds.seed_generators(seed)

    keras.utils.set_random_seed = set_random_seed
