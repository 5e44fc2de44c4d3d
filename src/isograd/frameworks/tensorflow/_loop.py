"""The steps of one optimizer: what is read of each, when, and where it goes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from isograd._guard import Guard
from isograd._schedule import Schedule
from isograd.frameworks import Shield
from isograd.frameworks.keras import _kernels as kernels
from isograd.frameworks.keras._instrument import Instrument
from isograd.frameworks.keras._reading import Reading, Tier
from isograd.frameworks.keras._steps import TensorFlowSteps, Vector
from isograd.frameworks.keras._subject import LAYER_STATISTICS, Subject
from isograd.frameworks.tensorflow._program import key, named
from isograd.frameworks.tensorflow._taps import Taps, merge

_LAG = 0.25
"""Seconds that readings wait at most."""

_FEW = 32
"""Steps that wait at most."""

_ROWS = 1024
"""Steps that a ring holds: a `tf.function` of the program's own may take many in one call."""

_COMPILED = "the step runs in a tf.function of the program's own, which is traced once"


class Loop:
    """The steps of one optimizer, or of one call of `step`."""

    def __init__(
        self,
        optimizer: Any,
        subject: Subject,
        schedule: Schedule,
        steps: Steps,
        on_step: Callable[[str, int, dict[str, float]], None] | None,
    ) -> None:
        self.optimizer, self.subject, self.schedule, self._steps, self._on_step = (
            optimizer, subject, schedule, steps, on_step
        )  # fmt: skip
        self.keys: frozenset[Any] = frozenset()
        self.pending: tuple[dict[str, Any], list[Any]] | None = None
        self.taken = subject.step
        self.tier: Tier = "deep" if schedule.is_deep(self.taken) else "cheap"
        self._waiting: deque[tuple[float, float]] = deque()
        self._reading, self._is_compiled = Reading("cheap"), False
        self._known: list[int] = []
        self._names: tuple[tuple[str, str, Any], ...] = ()
        self._calls = 0
        self._mark = self._read = time.perf_counter()
        self._spent = steps.shield.seconds

    def before(self, gradients: Sequence[Any], variables: list[Any], taps: Taps) -> dict[str, Any]:
        """Read gradients, and at deep steps weights; join what has been read of layers."""
        self.keys = frozenset(key(variable) for variable in variables)
        is_eager = tf.executing_eagerly()
        passes = taps.passes_of(self.keys)
        reading = self._reading = Reading(self.tier if is_eager else "cheap")
        reading.where = None if is_eager else tf.compat.v1.get_default_graph()
        if reading.is_deep:
            merge(passes, reading)
            self._cannot(("call_signal_norm",), "time steps are told apart in steps that Keras makes itself")
            if not reading.calls:
                self._cannot(LAYER_STATISTICS, "no layer of Keras was called under the tape, outside of a tf.function")
        if not is_eager and not self._is_compiled:
            self._is_compiled = True
            self.subject.cannot("deep", _COMPILED)
        scale = _scale(self.optimizer)
        losses = [loss for loss in taps.losses_of(self.keys) if self._steps.is_here(loss, reading)]
        for loss in losses:
            reading.put_loss(tf.reduce_sum(tf.cast(loss, tf.float32)) / scale)
        reading.variables = self._named(variables, taps.roots_with(variables))
        instrument = Instrument(self._steps.model, reading, self._steps, self._steps.shield)
        return self._steps._before_apply(instrument, self.optimizer, gradients, variables)

    def _named(self, variables: Sequence[Any], roots: Sequence[Any]) -> tuple[tuple[str, str, Any], ...]:
        known = [id(thing) for thing in (*roots, *variables)]
        if known != self._known:
            self._known, self._names = known, named(variables, roots)
        return self._names

    def after(self, kept: dict[str, Any], variables: Sequence[Any]) -> None:
        """Read how far the weights have moved, and end the step."""
        if not kept:
            return
        reading = self._reading
        instrument = Instrument(self._steps.model, reading, self._steps, self._steps.shield)
        self._steps._after_apply(instrument, kept, variables)
        self._steps._emit(reading)
        if reading.where is not None:
            return  # it is traced, not taken
        self.taken += 1
        now, spent = time.perf_counter(), self._steps.shield.seconds
        self._waiting.append((now - self._mark, spent - self._spent))
        self._mark, self._spent = now, spent
        self.drain_if_due(reading.is_deep)
        self.tier = "deep" if self.schedule.is_deep(self.taken) else "cheap"

    def finish(self) -> None:
        """End a step that waits for the assignments of the program."""
        if self.pending is not None:
            (kept, variables), self.pending = self.pending, None
            self.after(kept, variables)

    def drain_if_due(self, now: bool = False) -> None:
        """Write the steps that have been taken, at times."""
        self._calls += self._is_compiled
        if now or len(self._waiting) >= _FEW or self._calls >= _FEW or time.perf_counter() - self._read > _LAG:
            self.drain()

    def drain(self) -> None:
        """Write the steps that have been taken, waiting for what is under way."""
        vectors = self._steps.arrived()
        lost, self._steps.lost = self._steps.lost, 0
        self.subject.step += lost
        now = time.perf_counter()
        share = (now - self._read) / (len(vectors) + lost) if vectors else 0.0
        self._read, self._calls = now, 0
        for vector in vectors:
            seconds, own = self._waiting.popleft() if self._waiting else (share, 0.0)
            layout = self._steps.layouts[int(vector[0])]
            number, shown = self.subject.write(layout, vector[1:], seconds, own)
            readings = {name: shown[name] for name in ("loss", "global_grad_norm") if not math.isnan(shown[name])}
            if shown["loss_nonfinite"]:
                readings["loss"] = math.inf
            self.schedule.observe(
                number, deep=layout.tier == "deep", seconds=seconds, watch_seconds=own, readings=readings
            )
            if self._on_step is not None:
                self._on_step(self.subject.name, number, shown)
        self.taken = max(self.taken, self.subject.step)

    def _cannot(self, statistics: Iterable[str], why: str) -> None:
        self.subject._unmeasured(dict.fromkeys(statistics, why))


class Steps(TensorFlowSteps):
    """What is read of a step: eagerly it waits in a list, in a `tf.function` in a ring. `lost`: steps that no ring held
    any more when it was read.
    """

    rows = _ROWS

    def __init__(self, model: Any, shield: Shield, guard: Guard | None = None) -> None:
        super().__init__(model, shield, guard)
        self._list: list[tuple[int, Any]] = []
        self._known, self.lost = 0, 0

    def _emit(self, reading: Reading) -> None:
        if reading.where is not None:
            super()._emit(reading)
            reading.where.isograd = [*getattr(reading.where, "isograd", ()), *self._rings.values(), self._count]
            return  # the graph holds its rings: it may outlive whoever watches
        pieces = {**reading.forward, **reading.behind()}
        self._list.append((self.layouts.number(reading.layout(pieces)), kernels.packed([*pieces.values()])))

    def arrived(self) -> list[Vector]:
        eager, self._list = self._list, []
        vectors = super().arrived()
        if self._count is not None:
            count = int(self._count.numpy())
            self.lost = max(0, count - self._known - len(vectors))
            self._known = count
        return [*vectors, *(np.concatenate([[np.float32(number)], vector.numpy()]) for number, vector in eager)]


def _scale(optimizer: Any) -> Any:
    """What a loss has been multiplied by before it was differentiated."""
    return optimizer.scale_loss(1.0) if hasattr(optimizer, "scale_loss") else 1.0
