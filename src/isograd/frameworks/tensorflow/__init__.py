"""Follow training loops that a program writes itself with TensorFlow: tapes, and an optimizer of Keras or none.

A step is an `apply` or `apply_gradients` of a Keras optimizer outside of a model's own train function (`fit` is for
`isograd.frameworks.keras`), or a call of `step` where the program assigns to its variables by hand. Each optimizer is a
subject. Loops that run eagerly are read like models: gradients at every step, weights and layers at deep steps. A loop
in the program's own `tf.function` is traced once: its gradients and its loss are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from isograd.frameworks.keras import check_guard as check_guard
from isograd.frameworks.keras import seed_generators as seed_generators
from isograd.frameworks.keras import shift_seeds as shift_seeds
from isograd.frameworks.tensorflow._observe import Observer as Observer
from isograd.frameworks.tensorflow._observe import observers


def step(
    loss: Any, gradients: Sequence[Any], variables: Sequence[Any], *, learning_rate: Any = math.nan, name: str = "model"
) -> None:
    """Tell of a step that the program is about to make by hand: between the gradients and the assignments.

    `gradients`: of `loss` with respect to `variables`, None where there is none. `name`: of what is trained, where a
    program trains several things. Eagerly or inside a `tf.function`; nothing happens where nobody watches.

        gradients = tape.gradient(loss, variables)
        step(loss, gradients, variables, learning_rate=0.1)
        for variable, gradient in zip(variables, gradients):
            variable.assign_sub(0.1 * gradient)
    """
    for observer in tuple(observers):
        observer.note_step(loss, list(gradients), list(variables), learning_rate, name)


def describe_run() -> dict[str, Any]:
    """Facts about this process that a run file keeps."""
    return {"framework": "tensorflow", "tensorflow": str(tf.__version__), "keras": keras.__version__}


def sort(things: Iterable[object]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[object, ...]]:
    """(models, optimizers, others) among `things`. Raises ValueError for anything else."""
    several = tuple(things)
    optimizers = tuple(thing for thing in several if isinstance(thing, keras.optimizers.Optimizer))
    models = tuple(thing for thing in several if isinstance(thing, (tf.Module, keras.Layer)))
    for thing in several:
        if not isinstance(thing, (tf.Module, keras.Layer, keras.optimizers.Optimizer)):
            raise ValueError(f"watch() takes models and optimizers of TensorFlow programs; not {thing!r}")
    return models, optimizers, ()
