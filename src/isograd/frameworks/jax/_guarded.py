"""Leave out steps whose gradients are not finite, exactly: weights, moments and counters stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from isograd.frameworks.jax._kernels import barrier


class GuardedState(NamedTuple):
    """`skipped`: steps left out so far, [] int32. `inner`: the optimizer's state."""

    skipped: Any
    inner: Any


class Guarded(NamedTuple):
    """An optimizer that makes its steps itself. `init(params)` gives its state; `step` is for inside `jax.jit`:

    params, state = optimizer.step(gradients, state, params)
    """

    init: Callable[[Any], GuardedState]
    step: Callable[..., tuple[Any, GuardedState]]


def guarded(optimizer: optax.GradientTransformation) -> Guarded:
    """An optimizer that leaves out every step whose gradients hold NaN or Inf.

    Update and its application stand together in one conditional, so that the weights can still be changed in place:
    choosing between old and new weights afterwards would take twice the time. Further arguments of `step` go to the
    optimizer's `update`. A monitor inside of it does not see the steps that are left out; `Monitor.read` records them
    as events.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> GuardedState:
        return GuardedState(jnp.zeros((), jnp.int32), inner.init(params))

    def step(gradients: Any, state: GuardedState, params: Any, **extra: Any) -> tuple[Any, GuardedState]:
        def take(operands: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            params, below, gradients = operands
            updates, below = inner.update(gradients, below, params, **extra)
            return optax.apply_updates(params, updates), below

        is_finite = _is_finite(gradients)
        made, below = lax.cond(is_finite, take, lambda kept: kept[:2], (params, state.inner, gradients))
        return made, GuardedState(state.skipped + jnp.where(is_finite, 0, 1), below)

    return Guarded(init, step)


def _is_finite(tree: Any) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in barrier(leaves)], dtype=bool))
