"""JAX with optax: measure a training program from inside its optimizer.

JAX runs a training step as one compiled program, so what is to be known of it must leave it with its result. `monitor`
wraps an optimizer (or stands in a chain of transformations) and keeps readings of the last steps in its state, on the
device; `Monitor.read` brings them to the host some steps later, without making the step wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import optax

from isograd.frameworks.jax._guarded import Guarded as Guarded
from isograd.frameworks.jax._guarded import GuardedState as GuardedState
from isograd.frameworks.jax._guarded import guarded as guarded
from isograd.frameworks.jax._monitor import CheapState as CheapState
from isograd.frameworks.jax._monitor import DeepState as DeepState
from isograd.frameworks.jax._monitor import Monitor as Monitor
from isograd.frameworks.jax._monitor import monitor as monitor
from isograd.frameworks.jax._names import order_of_use as order_of_use
from isograd.frameworks.jax._observe import Observer as Observer


def describe_run() -> dict[str, Any]:
    """Facts about this process that a run file keeps: versions, device, rank and number of processes."""
    return {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": jax.default_backend(),
        "rank": jax.process_index(),
        "world_size": jax.process_count(),
    }


def sort(things: Iterable[object]) -> tuple[tuple[()], tuple[Monitor, ...], tuple[()]]:
    """((), monitors, ()) of `things`, as `watch` asks for models, optimizers and others. Raises ValueError."""
    monitors = []
    for thing in things:
        if not isinstance(thing, Monitor):
            raise ValueError(
                "watch() takes monitors of optax optimizers, as isograd.frameworks.jax.monitor(optimizer) makes them, "
                f"not {type(thing).__name__}"
            )
        monitors.append(thing)
    return (), tuple(monitors), ()
