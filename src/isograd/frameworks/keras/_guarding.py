"""Leave out steps whose gradients are not finite, inside the compiled step and exactly: what the update would change
stays as it was, weights, moments, counters, accumulated gradients and averages alike.

A conditional stands around the whole update. No host waits for its answer on TensorFlow and JAX; on PyTorch the step is
no graph, and the host has to ask. What the forward pass changes is put back as well: moving statistics of normalization
layers, seeds of dropout. Metrics are not: they tell what the program computed. Nor is the data: the batch is gone. An
optimizer that finds its loss scale by itself leaves out such steps by itself; there, only the update is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

from keras import ops

from isograd import _changes
from isograd._changes import CannotApply
from isograd._guard import Guard
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras._site import Effect, Site

_skipping: WeakSet[Any] = WeakSet()
"""Optimizers that a `SkipBadSteps` is in effect for. Asked while a step is traced, or run where nothing is compiled."""


def check(guard: Guard | None) -> None:
    """Raises ValueError, a sentence, for a guard that may do more than can be done inside a compiled step."""
    if guard is None:
        return
    asked = [name for name in ("clip", "rewind", "stop") if getattr(guard, name)]
    asked += ["lower_learning_rate"] if guard.factor < 1 else []
    if asked:
        raise ValueError(f"a Keras program can be guarded with skip alone, not with {', '.join(asked)}")


class Skipping(Effect):
    """`SkipBadSteps`: from the next train function of the model on, as long as the model is watched."""

    def __init__(self, change: _changes.SkipBadSteps, site: Site, back: ExitStack) -> None:
        if site.outer is not site.optimizer:
            raise CannotApply("The optimizer scales the loss, and leaves out steps that are not finite by itself.")
        if site.optimizer not in _skipping:
            _skipping.add(site.optimizer)
            back.callback(_skipping.discard, site.optimizer)


def skips(guard: Guard | None, optimizer: Any) -> bool:
    """Whether bad steps of an optimizer are left out, by a guard or by a change, where it does not do so itself."""
    return ((guard is not None and guard.skip) or optimizer in _skipping) and describe.inner(optimizer) is optimizer


def state_of(model: Any) -> list[Any]:
    """The variables that a forward pass changes: made not to be trained, which frozen weights are not, and seeds."""
    found: dict[int, Any] = {}
    for layer in model._flatten_layers(include_self=True):
        seeds = [generator.state for generator in getattr(layer, "_seed_generators", ())]
        found |= {id(variable): variable for variable in (*getattr(layer, "_non_trainable_variables", ()), *seeds)}
    return [*found.values()]


def is_finite(squares: Sequence[Any], gradients: Sequence[Any], cond: Callable[..., Any]) -> Any:
    """Whether every entry of every gradient is finite, a Boolean tensor []. `squares`: their sums of squares; `cond`:
    what the backend has for `if`.

    Sums of squares are at hand, and finite in all but few steps. They overflow before entries do: then each is looked
    at.
    """
    total = ops.sum(ops.stack(list(squares)))

    def looked_at() -> Any:
        return ops.all(ops.stack([ops.all(ops.isfinite(gradient)) for gradient in gradients]))

    return cond(ops.isfinite(total), lambda: ops.ones((), dtype="bool"), looked_at)


# ---- TensorFlow -----------------------------------------------------------------------------------------------------


def tensorflow_cond(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`tf.cond`, in a graph and outside of one."""
    import tensorflow as tf

    return tf.cond(predicate, then, otherwise)


def tensorflow_apply(is_good: Any, apply: Callable[[], Any]) -> None:
    """Make the update if the step is good."""
    import tensorflow as tf

    def update() -> Any:
        apply()
        return tf.constant(True)

    tf.cond(is_good, update, lambda: tf.constant(False))


# ---- JAX ------------------------------------------------------------------------------------------------------------


def jax_cond(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`jax.lax.cond` in a trace, `if` outside of one, where each call would compile both branches anew."""
    import jax

    if not isinstance(predicate, jax.core.Tracer):
        return then() if predicate else otherwise()
    return jax.lax.cond(predicate, then, otherwise)


def jax_apply(is_good: Any, apply: Callable[..., Any], state: Any, gradients: Any, variables: Any) -> Any:
    """(variables, state) after `stateless_apply` if the step is good, else as they are.

    What it works on is handed over, so that it can be changed in place: choosing between old and new afterwards would
    take twice the time.
    """
    import jax

    def update(operands: Any) -> Any:
        state, gradients, variables = operands
        new, state = apply(state, gradients, variables)
        return list(new), list(state)

    operands = list(state), list(gradients), list(variables)
    if not isinstance(is_good, jax.core.Tracer):
        return update(operands) if is_good else (operands[2], operands[0])
    return jax.lax.cond(is_good, update, lambda kept: (kept[2], kept[0]), operands)


# ---- PyTorch --------------------------------------------------------------------------------------------------------


def torch_cond(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`if`: waits for the device."""
    return then() if bool(predicate) else otherwise()
