"""Where changes act inside an optimizer's update, on every backend and in compiled steps: methods of the instance.

`Stepping` replaces what the update calls on its way: for the learning rate, for clipping, and the update as a whole.
What they do is decided by lists of plain functions over tensors; with all lists empty, the optimizer is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import keras
from keras import ops

Rate = Callable[[Any, Any], Any]
"""(the program's own learning rate, updates since the change as float32) -> the rate of this update."""

GradientChange = Callable[[list[Any], Sequence[Any]], list[Any]]
"""(gradients, their variables) -> gradients."""

_steppings: WeakKeyDictionary[Any, Stepping] = WeakKeyDictionary()


def stepping_of(optimizer: Any) -> Stepping:
    """The one of an optimizer, made where there is none."""
    if optimizer not in _steppings:
        _steppings[optimizer] = Stepping()
    return _steppings[optimizer]


def acting_rate(optimizer: Any) -> Any:
    """The learning rate of the next update, with what changes make of the program's own; a tensor or a variable."""
    stepping = _steppings.get(optimizer)
    own = optimizer.learning_rate
    return own if stepping is None else stepping.rate(optimizer, own)


class Stepping:
    """What is changed of the updates of one optimizer.

    `rates` act on the learning rate, in their order. `penalties`, then `clips`, act on the gradients that the update
    is made from: of the whole accumulated step, unscaled, after the program's own clipping. `after` sees the variables.
    """

    def __init__(self) -> None:
        self.rates: list[tuple[Rate, int]] = []
        self.penalties: list[GradientChange] = []
        self.clips: list[GradientChange] = []
        self.after: list[Callable[[Sequence[Any]], None]] = []
        self._variables: Sequence[Any] | None = None

    def install(self, optimizer: Any) -> None:
        """Let the optimizer's update come by here. Not by assignment: Keras and TensorFlow track what is assigned."""
        vars(optimizer).update(
            _backend_apply_gradients=lambda grads, variables: self._apply(optimizer, grads, variables),
            _clip_gradients=lambda grads: self._clip(optimizer, grads),
            _get_current_learning_rate=lambda: self._current_rate(optimizer),
        )

    def release(self, optimizer: Any) -> None:
        """Let it go again where nothing is left to do."""
        if not (self.rates or self.penalties or self.clips or self.after):
            for name in ("_backend_apply_gradients", "_clip_gradients", "_get_current_learning_rate"):
                vars(optimizer).pop(name, None)

    def rate(self, optimizer: Any, own: Any) -> Any:
        """What becomes of the program's own learning rate."""
        for change, start in self.rates:
            own = change(own, ops.cast(optimizer.iterations - start, "float32"))
        return own

    def _apply(self, optimizer: Any, grads: Any, variables: Any) -> None:
        self._variables = list(variables)
        try:
            type(optimizer)._backend_apply_gradients(optimizer, grads, variables)
        finally:
            self._variables = None
        for change in self.after:
            change(variables)

    def _clip(self, optimizer: Any, grads: Any) -> Any:
        grads = list(type(optimizer)._clip_gradients(optimizer, grads))
        for change in (*self.penalties, *self.clips):
            grads = change(grads, self._variables or ())
        return grads

    def _current_rate(self, optimizer: Any) -> Any:
        own = type(optimizer)._get_current_learning_rate(optimizer)
        # Outside of an update it is the program's own: a callback that halves it must not halve what is changed.
        return own if self._variables is None else self.rate(optimizer, own)


def rebuild(optimizer: Any, variables: Sequence[Any], outer: Any = None) -> None:
    """Build an optimizer that has been built anew, for these variables and its present hyperparameters: what it holds
    of variables that stay keeps its values. `outer`: the `LossScaleOptimizer` around it.
    """
    if not optimizer.built:
        return
    held = {(slot.path, tuple(slot.shape)): slot for slot in slots_of(optimizer)}
    for slot in held.values():
        optimizer._untrack_variable(slot)
    optimizer.built = False
    optimizer._trainable_variables_indices = {}
    with keras.name_scope(optimizer.name, caller=optimizer):
        optimizer.build(list(variables))
    for slot in slots_of(optimizer):
        before = held.get((slot.path, tuple(slot.shape)))
        if before is not None:
            slot.assign(before)
    if outer is not None and outer is not optimizer:
        vars(outer)["_trainable_variables"] = list(variables)
        outer._trainable_variables_indices = {outer._var_key(v): index for index, v in enumerate(variables)}


def slots_of(optimizer: Any) -> list[Any]:
    """The variables of an optimizer but for its counter and its learning rate."""
    own = {id(optimizer._iterations), id(optimizer._learning_rate)}
    return [variable for variable in optimizer._variables if id(variable) not in own]
