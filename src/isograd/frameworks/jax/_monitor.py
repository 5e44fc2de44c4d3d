"""The transformation that measures: readings of the last steps travel in the optimizer's state.

Which steps are deep is the host's decision, and costs nothing inside the step: the state has two types with the same
fields, and JAX compiles the user's step once for each. A choice inside the compiled step would make all of them slow.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from isograd._history import Parameter
from isograd.frameworks.jax import _kernels as kernels
from isograd.frameworks.jax import _names as names
from isograd.frameworks.jax import _places as places

ROWS = 32
"""Steps whose readings the state holds unless told otherwise."""


_PATIENCE = 3
"""Deep steps in a row that nobody asked for: a state that was made anew begins with one."""


class CheapState(NamedTuple):
    """Readings of the last R steps, of K statistics of P parameters each. The step that gets it takes cheap ones.

    `count`: steps measured, [] int32. `rows`: [R, K, P] float32, the row of step s at s modulo R: `kernels.CHEAP`,
    then `kernels.DEEP` unless the monitor leaves them out; NaN where they were not read. `losses`: [R] float32, the
    `value` that `update` was given, NaN without one. `inner`: the state of the optimizer that is wrapped.
    """

    count: Any
    rows: Any
    losses: Any
    inner: Any


class DeepState(CheapState):
    """The same; the step that gets it takes deep readings, too."""

    __slots__ = ()


MonitorState: TypeAlias = CheapState
"""Either of the two."""


class Reader(Protocol):
    """Who takes the readings. May not raise."""

    def read(self, monitor: Monitor, opt_state: Any, state: MonitorState, loss: Any) -> bool:
        """A step has been dispatched, perhaps several; whether the next one is to be deep."""


readers: list[Reader] = []
"""Those that listen to every monitor of the process."""


class Monitor(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # optax ships no types
    """An optax transformation that measures what passes through it and leaves it as it is. Made by `monitor`."""

    name: str
    order: tuple[str, ...]
    wraps: bool
    deep: bool
    parameters: tuple[Parameter, ...]
    has_weights: bool
    has_been_read: bool
    place: places.Place
    _asked: bool
    _unused: int
    _has_told: bool

    def read(self, opt_state: Any, *, loss: Any = None) -> Any:
        """Take the readings of the steps since the last call. Returns the state to go on with:

            params, opt_state, loss = step(params, opt_state, batch)
            opt_state = watcher.read(opt_state, loss=loss)

        `opt_state`: what this monitor's state stands in: an optax state however nested, a Flax `TrainState`, an
        `nnx.Optimizer`. `loss`: of this step; of k steps that ran in one call (`jax.lax.scan`), an array [k]. Of
        micro-batches (`optax.MultiSteps`) the mean over a step is recorded. Nothing here waits for the device: a loss
        that is not there yet is looked at later.

        Raises ValueError where `opt_state` holds no state of a monitor, or several, side by side or batched.
        """
        state = self._state_in(opt_state)
        if np.ndim(plain(state.count)):
            raise ValueError(
                "read() was given several states in one, of a vmap: hand over one of them, or give each its own step"
            )
        self._note_use(isinstance(state, DeepState))
        wanted = [reader.read(self, opt_state, state, loss) for reader in tuple(readers)]
        deep = self._asked = self.deep and any(wanted)
        self.has_been_read = True
        if deep is isinstance(state, DeepState):
            return opt_state
        return places.replaced(opt_state, self.place, (DeepState if deep else CheapState)(*state))

    def _state_in(self, opt_state: Any) -> MonitorState:
        try:
            state = places.at(opt_state, self.place)
            if isinstance(state, CheapState):
                return state
        except (AttributeError, KeyError, IndexError, TypeError):
            pass
        found = places.find(opt_state, lambda node: isinstance(node, CheapState))
        if len(found) != 1:
            what = "no state of a monitor" if not found else f"the states of {len(found)} monitors"
            do = (
                "make it with the init() of the optimizer that the monitor is in"
                if not found
                else "hand over the part that belongs to this one"
            )
            raise ValueError(f"read() was given a {type(opt_state).__name__} that holds {what}: {do}")
        self.place = found[0]
        state = places.at(opt_state, self.place)
        assert isinstance(state, CheapState)
        return state

    def _note_use(self, is_deep: bool) -> None:
        """Say once where a loop does not go on with what it was given."""
        self._unused = self._unused + 1 if is_deep and not self._asked else 0
        if self._unused == _PATIENCE and not self._has_told:
            self._has_told = True
            print(
                "isograd: every step is measured in full, because what read() returns is not used: "
                "write opt_state = watcher.read(opt_state, ...), or monitor(..., deep=False)",
                file=sys.stderr,
            )


def monitor(
    optimizer: optax.GradientTransformation | None = None,
    *,
    name: str = "model",
    order: Sequence[str] = (),
    deep: bool = True,
    rows: int = ROWS,
) -> Monitor:
    """Measure an optimizer: `monitor(optax.adam(1e-3))` is used as `optax.adam(1e-3)` is.

    Every step reads norm, largest entry and non-finite entries of each gradient as it comes in; deep steps also weights
    and updates. Without `optimizer` it is a transformation for a place in a chain, before or after clipping, which sees
    no updates. Training is the same with and without it, up to the rounding of sums that XLA arranges in another way.

    `name`: of the subject in the run. `order`: names of layers or parameters from the input to the loss, as
    `order_of_use` finds them; needed where the names do not tell (see `layers_of`), and nothing is said about depth
    without. `deep`: False leaves the deep readings out, and with them the second compilation of the step. `rows`: how
    many steps the state keeps; of more steps in a call (`jax.lax.scan`) the first are lost.

    A state that is never handed to `Monitor.read` has every step measured in full. Raises ValueError for fewer than 4
    rows.
    """
    if rows < 4:
        raise ValueError(f"rows must be at least 4 steps, not {rows}")
    inner = optax.with_extra_args_support(optax.identity() if optimizer is None else optimizer)

    def init(params: Any) -> MonitorState:
        made.parameters = names.parameters_of(params)
        names.layers_of(made.parameters, made.order)  # a wrong order is told here, where the user can see it
        statistics = len(kernels.CHEAP) + len(kernels.DEEP) * deep
        kept = jnp.full((rows, statistics, len(made.parameters)), jnp.nan, jnp.float32)
        losses = jnp.full(rows, jnp.nan, jnp.float32)
        return (DeepState if deep else CheapState)(jnp.zeros((), jnp.int32), kept, losses, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, MonitorState]:
        if not isinstance(state, CheapState):
            raise ValueError(f"monitor() was given the state of {type(state).__name__}: make it with its own init()")
        changed, below = inner.update(updates, state.inner, params, **extra)
        row = _measured(made, updates, params, changed, state)
        slot = state.count % state.rows.shape[0]
        value = extra.get("value")
        loss = jnp.nan if value is None else jnp.mean(jnp.asarray(value)).astype(jnp.float32)
        return changed, type(state)(
            state.count + 1, state.rows.at[slot].set(row), state.losses.at[slot].set(loss), below
        )

    made = Monitor(init, update)
    made.name, made.order, made.wraps, made.deep = name, tuple(order), optimizer is not None, deep
    made.parameters, made.has_weights, made.has_been_read = (), False, False
    made.place, made._asked, made._unused, made._has_told = (), True, 0, False
    return made


def _measured(made: Monitor, updates: Any, params: Any, changed: Any, state: MonitorState) -> Array:
    """The row of a step, [K, P]; NaN for parameters that have no gradient."""
    gradients, width = names.leaves_of(updates), state.rows.shape[2]
    if len(made.parameters) != width or not gradients.keys() <= {p.name for p in made.parameters}:
        made.parameters = names.parameters_of(updates)  # the state was made in another process
    if len(made.parameters) != width:
        raise ValueError(
            f"this monitor's state is of {width} parameters, but the gradients of {len(gradients)} came in: "
            "use one monitor() for each model"
        )
    known = [parameter.name for parameter in made.parameters]
    present = [name for name in known if name in gradients]
    columns = jnp.array([known.index(name) for name in present], jnp.int32)
    row = jnp.full(state.rows.shape[1:], jnp.nan, jnp.float32)
    of_gradients = [gradients[name] for name in present]
    if not isinstance(state, DeepState):
        return row.at[: len(kernels.CHEAP), columns].set(kernels.cheap(of_gradients))
    weights = _among(names.leaves_of(params), present)
    made.has_weights = bool(weights)
    moved = _among(names.leaves_of(changed), present) if made.wraps else []
    cheap, deep = kernels.deep(of_gradients, weights, moved)
    return row.at[:, columns].set(jnp.concatenate([cheap, deep]))


def _among(leaves: Mapping[str, Any], present: Sequence[str]) -> list[Any]:
    return [leaves[name] for name in present] if all(name in leaves for name in present) else []


def plain(value: Any) -> Any:
    """The array in a Flax variable; anything else as it is."""
    return value[...] if not isinstance(value, (jax.Array, int, float)) and hasattr(value, "get_value") else value
