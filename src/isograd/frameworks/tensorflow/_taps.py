"""Where isograd listens to TensorFlow and to what loops use of Keras: tapes, layers, losses, optimizers, functions."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import keras
import tensorflow as tf
from keras.src.backend import in_stateless_scope
from keras.src.ops.operation import Operation

from isograd.frameworks import Shield
from isograd.frameworks.keras._instrument import Instrument, first_tensor
from isograd.frameworks.keras._reading import Place, Reading, Tier
from isograd.frameworks.keras._steps import TensorFlowSteps
from isograd.frameworks.tensorflow._program import Program, key

_STRANGE = 3
"""Steps at which layers are read of a model that no optimizer has been seen to train."""


class Listener(Protocol):
    """Who is told."""

    def applies(self, optimizer: Any, original: Callable[..., None], gradients: Any, variables: Any) -> None:
        """An optimizer is about to make an update, by `original(gradients, variables)`."""

    def called_function(self) -> None:
        """A `tf.function` has returned."""

    def tiers_of(self, keys: frozenset[Any]) -> list[Tier]:
        """What the loops that train some of these variables read of the step under way."""


class Pass:
    """The calls of one outermost layer under the tapes of a step. `out`: what it returned last."""

    def __init__(self, root: Any, keys: frozenset[Any], backend: Layers, shield: Shield) -> None:
        self.keys = keys
        self.reading, self.program = Reading("deep"), Program([root])
        self.instrument = Instrument(self.program, self.reading, backend, shield)
        self.is_used = self._has_boundaries = False
        self.x: Any = None
        self.out: Any = None

    def read_boundaries(self, y: Any, loss: Any) -> None:
        """Read what went in, what came out and what should have, once."""
        if not self._has_boundaries:
            self._has_boundaries, self.program.loss = True, loss
            self.instrument._read_boundaries(self.x, y, self.out)


class Layers(TensorFlowSteps):
    """Reads what the backward pass brings to layers, of the passes that a tape is asked about."""

    receiving: frozenset[int] = frozenset()

    def _take(self, upstream: Any, index: int, reading: Reading) -> None:
        if id(reading) in self.receiving:
            super()._take(upstream, index, reading)


class Taps:
    """Listens to tapes, optimizers, layers, losses and functions of this process: six methods of their classes."""

    def __init__(self, observer: Listener, shield: Shield) -> None:
        self._observer, self._shield = observer, shield
        self._layers = Layers(Program([]), shield)
        self._passes: dict[int, Pass] = {}
        self._losses: deque[tuple[frozenset[Any], Any]] = deque(maxlen=16)
        self._roots: weakref.WeakSet[Any] = weakref.WeakSet()
        self._keys: weakref.WeakKeyDictionary[Any, frozenset[Any]] = weakref.WeakKeyDictionary()
        self._strange: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._tapes, self._is_foreign, self._is_inside, self._depth = 0, False, False, 0

    # ---- in and out -----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Begin to hear."""
        self._replace(tf.GradientTape, "__enter__", self._enter)
        self._replace(tf.GradientTape, "__exit__", self._exit)
        self._replace(tf.GradientTape, "gradient", self._gradient)
        self._replace(Operation, "__call__", self._called)
        self._replace(keras.losses.Loss, "__call__", self._lost)
        self._replace(type(tf.function(lambda: None)), "__call__", self._function)
        for cls in (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer):
            self._replace(next(c for c in cls.__mro__ if "apply" in vars(c)), "apply", self._apply)

    def remove(self) -> None:
        """Hear no more. What somebody has replaced after us stays, and passes through."""
        for cls, name, original, mine in reversed(self._replaced):
            if vars(cls)[name] is mine:
                setattr(cls, name, original)
        self._replaced.clear()
        self._passes.clear()
        self._losses.clear()

    def _replace(self, cls: Any, name: str, heard: Callable[..., Any]) -> None:
        original = vars(cls)[name]

        @functools.wraps(original)
        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._replaced:
                return original(this, *args, **kwargs)
            return heard(original, this, *args, **kwargs)

        setattr(cls, name, method)
        self._replaced.append((cls, name, original, method))

    # ---- what is heard --------------------------------------------------------------------------------------------

    def _enter(self, original: Any, tape: Any) -> Any:
        if not self._tapes:
            self._is_foreign = _is_in_train_function()
        self._tapes += 1
        return original(tape)

    def _exit(self, original: Any, tape: Any, *args: Any) -> Any:
        self._tapes = max(0, self._tapes - 1)
        return original(tape, *args)

    def _gradient(self, original: Any, tape: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._is_foreign:
            self._shield.call(self.see_loss, target, tf.nest.flatten(sources))
        return original(tape, target, sources, *args, **kwargs)

    def see_loss(self, target: Any, sources: Sequence[Any]) -> None:
        """Gradients of a target are asked for, or known."""
        keys = frozenset(key(source) for source in sources)
        used = [one for one in self._passes.values() if one.keys & keys]
        for one in used:
            one.is_used = True
        self._layers.receiving = frozenset(id(one.reading) for one in used)
        if not any(known <= keys and loss is target for known, loss in self._losses):
            self._losses.append((keys, target))

    def _called(self, original: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
        is_root = self._tapes and not self._is_inside and not self._is_foreign and isinstance(operation, keras.Layer)
        if not is_root or in_stateless_scope():  # Keras asks a layer that is not built yet for its shape
            return original(operation, *args, **kwargs)
        one = self._shield.call(self._begin_pass, operation)
        self._is_inside = True
        try:
            if one is None:
                return original(operation, *args, **kwargs)
            with one.instrument._calling():
                out = Operation.__call__(operation, *args, **kwargs)
        finally:
            self._is_inside = False
        one.x, one.out = first_tensor((args, kwargs)), out
        return out

    def _begin_pass(self, root: Any) -> Pass | None:
        """What the calls of an outermost layer are read into, None where they are not."""
        self._roots.add(root)
        if not tf.executing_eagerly():
            return None
        if id(root) not in self._passes:
            tiers = self._observer.tiers_of(self._keys_of(root))
            self._strange[root] = self._strange.get(root, 0) + (not tiers)
            if not ("deep" in tiers if tiers else self._strange[root] <= _STRANGE):
                return None
            self._passes[id(root)] = Pass(root, self._keys_of(root), self._layers, self._shield)
        return self._passes[id(root)]

    def _lost(self, original: Any, loss: Any, y_true: Any, y_pred: Any, *args: Any, **kwargs: Any) -> Any:
        for one in self._passes.values():
            if y_pred is one.out and tf.executing_eagerly():
                self._shield.call(one.read_boundaries, y_true, loss)
        return original(loss, y_true, y_pred, *args, **kwargs)

    def _apply(self, original: Any, optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
        if self._is_inside or _is_in_train_function():
            original(optimizer, grads, trainable_variables)
            return
        self._is_inside = True
        try:
            self._observer.applies(optimizer, functools.partial(original, optimizer), grads, trainable_variables)
        finally:
            self._is_inside = False

    def _function(self, original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        try:
            out = original(function, *args, **kwargs)
        finally:
            self._depth -= 1
        if not self._depth and tf.executing_eagerly():
            self._shield.call(self._observer.called_function)
        return out

    # ---- what a step is given -------------------------------------------------------------------------------------

    def passes_of(self, keys: frozenset[Any]) -> list[Pass]:
        """The passes of a step that trains these variables. They are forgotten, and so are those without gradients."""
        mine = [one for one in self._passes.values() if one.keys & keys]
        self._passes = {key: one for key, one in self._passes.items() if one.is_used and one not in mine}
        return mine

    def losses_of(self, keys: frozenset[Any]) -> list[Any]:
        """The targets whose gradients such a step is made from."""
        mine = [loss for known, target in self._losses if known & keys for loss in tf.nest.flatten(target)]
        self._losses = deque((pair for pair in self._losses if not pair[0] & keys), maxlen=16)
        return mine

    def roots_with(self, variables: Sequence[Any]) -> list[Any]:
        """The outermost layers that hold some of these variables, in the order of the variables."""
        order = {key(variable): index for index, variable in enumerate(variables)}
        places = [
            (min((order[k] for k in self._keys_of(root) if k in order), default=-1), root) for root in self._roots
        ]
        return [root for place, root in sorted(places, key=lambda pair: pair[0]) if place >= 0]

    def _keys_of(self, root: Any) -> frozenset[Any]:
        """The variables that an outermost layer trains. Looked up once: to walk through a large model takes a while."""
        keys = self._keys.get(root) or frozenset(key(variable) for variable in root.trainable_variables)
        self._keys[root] = keys
        return keys


def merge(passes: Sequence[Pass], reading: Reading) -> None:
    """Join the readings of several passes in one."""
    for one in passes:
        if one.out is not None:
            one.read_boundaries(None, None)
        calls, boundaries, part = len(reading.calls), len(reading.boundaries), one.reading
        by = {"call": calls, "boundary": boundaries}
        reading.forward |= {Place(p.of, p.number + by.get(p.of, 0), p.name): v for p, v in part.forward.items()}
        reading.signals |= {index + calls: signal for index, signal in part.signals.items()}
        reading.calls += part.calls
        reading.boundaries += part.boundaries
        reading.unread += part.unread
        reading.facts = reading.facts or part.facts


def _is_in_train_function() -> bool:
    """Whether a model of Keras makes this step itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "one_step_on_data" and frame.f_globals.get("__name__", "").startswith("keras."):
            return True
        frame = frame.f_back
    return False
