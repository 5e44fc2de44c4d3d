"""What is watched of a process, and under which names: the loops of its optimizers, and of what it does by hand."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import keras
import tensorflow as tf

from isograd._guard import Guard
from isograd._schedule import Schedule
from isograd.frameworks import Recorder, Shield
from isograd.frameworks._names import variable_name
from isograd.frameworks.keras import _guarding as guarding
from isograd.frameworks.keras import _taps as taps
from isograd.frameworks.keras._reading import Tier
from isograd.frameworks.keras._subject import Subject
from isograd.frameworks.tensorflow._loop import Loop, Steps
from isograd.frameworks.tensorflow._program import Program, key
from isograd.frameworks.tensorflow._taps import Taps

observers: list[Observer] = []
"""Those that listen now."""


class Observer:
    """Watches the loops of one process. `models`, `optimizers`: only what trains these; empty: every optimizer.

    The other arguments are those of the observer of Keras models. A guard leaves out the updates of Keras's optimizers;
    what the forward pass has changed stays. Raises ValueError where Keras does not compute on TensorFlow.
    """

    def __init__(
        self,
        recorder: Recorder,
        shield: Shield,
        *,
        models: Sequence[Any] = (),
        optimizers: Sequence[Any] = (),
        make_schedule: Callable[[], Schedule] = Schedule,
        on_step: Callable[[str, int, dict[str, float]], None] | None = None,
        between: Callable[[], None] | None = None,
        on_warning: Callable[[str], None] = lambda _: None,
        guard: Guard | None = None,
    ) -> None:
        guarding.check(guard)
        backend = keras.backend.backend()
        if backend != "tensorflow":
            raise ValueError(f"Keras computes on {backend} here; loops of TensorFlow need KERAS_BACKEND=tensorflow")
        self._recorder, self._shield, self._make_schedule = recorder, shield, make_schedule
        self._on_step, self._between, self._on_warning, self._guard = on_step, between, on_warning, guard
        self._models = [weakref.ref(model) for model in models]
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._loops: dict[Any, Loop] = {}
        self._earlier: Mapping[str, Any] = {}
        self._taps = Taps(self, shield)
        self._said: set[str] = set()

    # ---- life ---------------------------------------------------------------------------------------------------

    def attach(
        self, models: Sequence[Any] = (), optimizers: Sequence[Any] = (), frame: FrameType | None = None
    ) -> None:
        """Begin to listen. What a `tf.function` has been traced with before is not seen."""
        if self not in observers:
            observers.append(self)
            self._taps.install()

    def detach(self, error: BaseException | None = None) -> None:
        """Write what is pending and stop listening; idempotent. Functions that were traced keep what they read with."""
        self._shield.call(self.drain)
        self.release()

    def release(self) -> None:
        """Stop listening at once without writing, after a failure."""
        self._taps.remove()
        if self in observers:
            observers.remove(self)

    def drain(self) -> None:
        """Write what has been read so far, waiting for what is under way."""
        for loop in tuple(self._loops.values()):
            loop.finish()
            loop.drain()

    settle = drain

    def redescribe(self) -> None:
        """Nothing to do: each step describes itself."""

    def state_dict(self) -> dict[str, Any]:
        """What is usual so far, by subject."""
        return {loop.subject.name: loop.schedule.state_dict() for loop in self._loops.values()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; subjects that are not known yet take up what is theirs when they are."""
        self._earlier = state
        for loop in self._loops.values():
            loop.schedule.load_state_dict(state.get(loop.subject.name, {}))

    @property
    def deep_step(self) -> int | None:
        """The last step of which the deep tier was written, None before the first."""
        steps = [loop.subject.deep_step for loop in self._loops.values()]
        return max((number for number in steps if number is not None), default=None)

    @property
    def taken(self) -> int:
        """Steps that have been taken, by the optimizer that has taken most; some may not have been read yet."""
        return max((loop.taken for loop in self._loops.values()), default=0)

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects seen so far."""
        return [loop.subject.name for loop in self._loops.values()]

    # ---- steps ----------------------------------------------------------------------------------------------------

    def applies(self, optimizer: Any, original: Callable[..., None], gradients: Any, variables: Any) -> None:
        """A Keras optimizer makes an update, by `original(gradients, variables)`."""
        if self._between is not None:
            self._between()
        gradients = list(gradients)
        held = list(variables or getattr(optimizer, "_trainable_variables", ()))
        loop = self._shield.call(self._loop_of, optimizer, held)
        if loop is None or not gradients:
            original(gradients, variables)
            return
        if not optimizer.built:
            with tf.init_scope():
                optimizer.build(held)
        kept = self._shield.call(loop.before, gradients, held, self._taps) or {}
        if "is_good" in kept:
            guarding.tensorflow_apply(kept["is_good"], lambda: original(gradients, variables))
        else:
            original(gradients, variables)
        self._shield.call(loop.after, kept, held)
        if self._between is not None:
            self._between()

    def note_step(self, loss: Any, gradients: list[Any], variables: list[Any], rate: Any, name: str) -> None:
        """The program is about to assign to its variables."""
        if self._between is not None:
            self._between()
        self._shield.call(self._note_step, loss, gradients, variables, rate, name)

    def _note_step(self, loss: Any, gradients: list[Any], variables: list[Any], rate: Any, name: str) -> None:
        if self._guard is not None and self._guard.skip:
            self._warn("the guard cannot leave out steps that the program makes by hand: check them before assigning")
        if name not in self._loops:
            self._loops[name] = self._made(Assignment(), name)
        loop = self._loops[name]
        loop.finish()
        loop.optimizer.learning_rate = rate
        self._taps.see_loss(loss, variables)
        kept = loop.before(gradients, variables, self._taps)
        if tf.executing_eagerly():
            loop.pending = kept, variables  # the weights afterwards are those of the next step
        else:
            loop.after(kept, variables)

    def called_function(self) -> None:
        """A `tf.function` of the program has returned; it may have taken steps."""
        for loop in self._loops.values():
            loop.drain_if_due()

    def tiers_of(self, keys: frozenset[Any]) -> list[Tier]:
        """What the loops that train some of these variables read of the step under way."""
        return [loop.tier for loop in self._loops.values() if loop.keys & keys]

    def _loop_of(self, optimizer: Any, variables: Sequence[Any]) -> Loop | None:
        if optimizer in self._loops:
            return self._loops[optimizer]
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            self._warn("a loop that trains on several replicas of a tf.distribute strategy is not watched")
            return None
        models = [model for ref in self._models if (model := ref()) is not None]
        wanted = {key(variable) for model in models for variable in model.trainable_variables}
        is_ours = any(ref() is optimizer for ref in self._optimizers) or bool(wanted & {key(v) for v in variables})
        if (self._models or self._optimizers) and not is_ours:
            return None
        self._loops[optimizer] = self._made(optimizer, self._name_of(optimizer, variables))
        return self._loops[optimizer]

    def _name_of(self, optimizer: Any, variables: Sequence[Any]) -> str:
        """That of the model, where it is one, else that of the optimizer."""
        frame, roots = sys._getframe(), self._taps.roots_with(variables)
        thing = roots[0] if len(roots) == 1 else optimizer
        return variable_name(thing, frame) or str(getattr(thing, "name", "model"))

    def _made(self, optimizer: Any, name: str) -> Loop:
        # `fit` may have trained the same model in this run, under the same name.
        taken = {*self.subjects, *(subject for one in taps._listeners for subject in getattr(one, "subjects", ()))}
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}-{number}", number + 1
        schedule = self._make_schedule()
        schedule.load_state_dict(self._earlier.get(unique, {}))
        steps = Steps(Program([]), self._shield, self._guard)
        return Loop(optimizer, Subject(unique, self._recorder), schedule, steps, self._on_step)

    def _warn(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._on_warning(sentence)


class Assignment:
    """In the place of an optimizer where the program assigns to its variables by hand."""

    clipvalue = clipnorm = global_clipnorm = None

    def __init__(self) -> None:
        self.learning_rate: Any = math.nan
