"""Follow the training of Keras models step by step: what is read when, and where it goes.

The observer hears of a model when that makes its train function (`_taps.py`), and puts another one in its place that
picks one of two compiled steps: one that reads gradients, one that reads everything (`_steps.py`). It draws no
conclusions, and changes nothing.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import keras

from isograd._guard import Guard
from isograd._schedule import Schedule
from isograd.frameworks import Recorder, Shield
from isograd.frameworks._names import variable_name
from isograd.frameworks.keras import _guarding as guarding
from isograd.frameworks.keras import _taps as taps
from isograd.frameworks.keras._reading import Tier
from isograd.frameworks.keras._steps import BACKENDS
from isograd.frameworks.keras._subject import Subject

_LAG = 0.25
"""Seconds that readings wait on the device at most: four waits a second cost nothing."""

_FEW = 32
"""Steps that wait there at most: half of a ring."""

_MODELS = 4
"""Models that are kept from being collected until they have been read out: a search makes one after the other."""


class Observer:
    """Watches one process. `models`: only these; empty: every model that trains.

    `make_schedule` gives each model its own deep schedule. `on_step(subject, step, readings)` is called for each step
    once it has been read; `between` around each step, outside of the shield, where it may end the program.
    `on_warning` is told in a sentence what cannot be watched. Nothing else raises into the user's program.
    `guard`: what may be done at a bad step, one whose gradients hold NaN or Inf: leave it out (`_guarding.py`). Raises
    ValueError for a guard that may do more.
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
        self._guard = guard
        self._recorder, self._shield, self._make_schedule = recorder, shield, make_schedule
        self._on_step, self._between, self._on_warning = on_step, between, on_warning
        self._only = [weakref.ref(model) for model in models]
        self._sessions: deque[_Session] = deque(maxlen=_MODELS)
        self._subjects: weakref.WeakKeyDictionary[Any, Subject] = weakref.WeakKeyDictionary()
        self._names: list[str] = []
        self._schedules: dict[str, Schedule] = {}
        self._earlier: Mapping[str, Any] = {}
        self._frame: FrameType | None = None

    # ---- life ---------------------------------------------------------------------------------------------------

    def attach(
        self, models: Sequence[Any] = (), optimizers: Sequence[Any] = (), frame: FrameType | None = None
    ) -> None:
        """Begin to listen. Models that have made their train function already make it again."""
        taps.subscribe(self)
        for model in models:
            if getattr(model, "train_function", None) is not None:
                model.make_train_function(force=True)

    def detach(self, error: BaseException | None = None) -> None:
        """Write what is pending, put everything back and stop listening; idempotent."""
        taps.unsubscribe(self)
        for session in self._sessions:
            self._shield.call(session.drain)
            session.leave()
        self._sessions.clear()

    def release(self) -> None:
        """Stop listening at once without writing, after a failure."""
        taps.unsubscribe(self)
        for session in self._sessions:
            session.leave()
        self._sessions.clear()

    def drain(self) -> None:
        """Write what has been read so far, waiting for what is under way."""
        for session in self._sessions:
            session.drain()

    def settle(self) -> None:
        """Write the steps that have ended, before anything changes of what they were read from."""
        self.drain()

    def redescribe(self) -> None:
        """A model that is traced again is described again."""
        for session in self._sessions:
            session.remake()

    def state_dict(self) -> dict[str, Any]:
        """What is usual so far, by subject."""
        return {name: schedule.state_dict() for name, schedule in self._schedules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; subjects that are not known yet take up what is theirs when they are."""
        self._earlier = state
        for name, schedule in self._schedules.items():
            schedule.load_state_dict(state.get(name, {}))

    @property
    def deep_step(self) -> int | None:
        """The last step of which the deep tier was written, None before the first."""
        return max((s.deep_step for s in self._subjects.values() if s.deep_step is not None), default=None)

    @property
    def taken(self) -> int:
        """Steps that have been taken, of the model that has taken most; some may not have been read yet."""
        return max((session.taken for session in self._sessions), default=0)

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects seen so far."""
        return self._names

    # ---- models ---------------------------------------------------------------------------------------------------

    def before_training(self, model: Any) -> None:
        """A model is about to make its train function."""

    def made_train_function(self, model: Any) -> None:
        """A model has made its train function: another one takes its place."""
        self._shield.call(self._take_over, model)

    def _take_over(self, model: Any) -> None:
        if self._only and not any(ref() is model for ref in self._only):
            return
        refusal = _refusal(model)
        if refusal:
            self._on_warning(refusal)
            return
        if len(self._sessions) == _MODELS:
            self._sessions[0].drain()
        subject = self._subject_of(model)
        session = _Session(
            model,
            subject,
            self._schedules[subject.name],
            self._shield,
            self._on_step,
            self._between,
            self._on_warning,
            self._guard,
        )
        earlier = next((other for other in self._sessions if other.model is model), None)
        if earlier is not None:
            earlier.drain()
            self._sessions.remove(earlier)
        self._sessions.append(session)
        model.train_function = session

    def _subject_of(self, model: Any) -> Subject:
        if model not in self._subjects:
            name = variable_name(model, sys._getframe()) or "model"
            unique, number = name, 2
            while unique in self._names:
                unique, number = f"{name}-{number}", number + 1
            self._names.append(unique)
            self._subjects[model] = Subject(unique, self._recorder)
            self._schedules[unique] = schedule = self._make_schedule()
            schedule.load_state_dict(self._earlier.get(unique, {}))
        return self._subjects[model]


def _refusal(model: Any) -> str:
    """Why a model cannot be watched, in a sentence; "" where it can."""
    if keras.backend.backend() == "tensorflow" and model.distribute_strategy.num_replicas_in_sync > 1:
        return (
            f"the model {model.name} trains on several replicas of a tf.distribute strategy, where gradients are not "
            "those that the update sees; it is not watched. Run it on one device to diagnose it."
        )
    if keras.backend.backend() == "torch" and model.jit_compile:
        return f"the model {model.name} trains in torch.compile; it is not watched. compile(jit_compile=False) lets it."
    return ""


class _Session:
    """The training of one model. It stands where Keras has its train function, and is called in its place."""

    def __init__(
        self,
        model: Any,
        subject: Subject,
        schedule: Schedule,
        shield: Shield,
        on_step: Callable[[str, int, dict[str, float]], None] | None,
        between: Callable[[], None] | None,
        on_warning: Callable[[str], None],
        guard: Guard | None,
    ) -> None:
        self.model, self._subject, self._schedule, self._shield = model, subject, schedule, shield
        self._on_step, self._between, self._on_warning, self._guard = on_step, between, on_warning, guard
        self._steps = BACKENDS[keras.backend.backend()](model, shield, guard)
        self._functions = self._steps.functions()
        self._worked: set[Tier] = set()
        self._broken: set[Tier] = set()
        self._usual: deque[float] = deque(maxlen=32)
        self._waiting: deque[tuple[float, float, bool]] = deque()
        self._begun, self._read = subject.step, time.perf_counter()
        self._mark, self._spent = time.perf_counter(), shield.seconds

    @property
    def taken(self) -> int:
        """Steps that this model has taken."""
        return max(self._begun, self._subject.step)

    def leave(self) -> None:
        """Put Keras's own train function back."""
        if self.model.train_function is self:
            self.model.train_function = self._steps.plain

    def remake(self) -> None:
        """Trace both steps anew: the model has become another one."""
        self.drain()
        if self.model.train_function is self:
            self.model.make_train_function(force=True)

    def __call__(self, *args: Any) -> Any:
        if self._between is not None:
            self._between()
        tier = self._shield.call(self._begin)
        if tier is None:
            return self._steps.plain(*args)
        started = time.perf_counter()
        try:
            with _alone():
                out = self._functions[tier](*args)
        except Exception as error:
            if tier in self._worked or _is_end_of_data(error):
                raise
            try:
                out = self._steps.plain(*args)  # raises by itself what is the program's own
            except Exception as again:
                # The batch may have been taken from the data already, and have been the last.
                raise (error if _is_end_of_data(again) else again) from None
            self._shield.call(self._cannot, tier, error)
            return out
        if self._steps.failed is not None:
            self._shield.call(self._cannot, tier, self._steps.failed)
            self._steps.failed = None
        else:
            self._shield.call(self._end, tier, time.perf_counter() - started)
        if self._between is not None:
            self._between()
        return out

    # ---- around a step --------------------------------------------------------------------------------------------

    def _begin(self) -> Tier | None:
        tier: Tier = "deep" if self._schedule.is_deep(self._begun) else "cheap"
        if tier in self._broken:
            tier = "cheap" if tier == "deep" else "deep"
        if tier in self._broken:
            return None
        if tier == "deep" and self._worked:
            self.drain()  # what a deep step costs is told from others only where nothing else is under way
        return tier

    def _end(self, tier: Tier, seconds: float) -> None:
        now, compiled = time.perf_counter(), tier not in self._worked
        total, own = now - self._mark, self._shield.seconds - self._spent
        if compiled:
            self._subject.note_compiled(tier, seconds, first=not self._worked)
            own = 0.0 if not self._worked else seconds
        elif tier == "deep":
            own += max(0.0, seconds - statistics.median(self._usual)) if self._usual else 0.0
        else:
            self._usual.append(seconds)
        self._worked.add(tier)
        self._shield.seconds += max(0.0, own - (self._shield.seconds - self._spent))
        self._mark, self._spent = now, self._shield.seconds
        # Compiling is done once and says nothing about the next deep step.
        self._waiting.append((total, 0.0 if compiled else own, compiled))
        self._begun += 1
        several = int(getattr(self.model, "steps_per_execution", 1) or 1) > 1
        if tier == "deep" or several or len(self._waiting) >= _FEW or now - self._read > _LAG:
            self.drain()

    def _cannot(self, tier: Tier, error: Exception) -> None:
        self._broken.add(tier)
        self._subject.cannot(tier, f"the step could not be compiled with readings in it: {type(error).__name__}: "
                                   f"{' '.join(str(error).split())[:300]}")  # fmt: skip
        if self._guard is not None and self._guard.skip:
            self._on_warning(f"steps of {self._subject.name} are not guarded: they cannot be compiled with a guard")
        self._begun += 1
        self._subject.step += 1

    def drain(self) -> None:
        """Write the steps that have been taken, waiting for what is under way."""
        self._read = time.perf_counter()
        vectors = self._steps.arrived()
        times = [self._waiting.popleft() for _ in range(min(len(self._waiting), len(vectors)))]
        if len(vectors) > len(times) and times:  # one call has taken several steps
            seconds, own, compiled = times[-1]
            share = len(vectors) - len(times) + 1
            times[-1:] = [(seconds / share, own / share, compiled)] * share
        for vector, (seconds, own, compiled) in zip(vectors, times, strict=False):
            layout = self._steps.layouts[int(vector[0])]
            step, shown = self._subject.write(layout, vector[1:], seconds, own)
            readings = {name: shown[name] for name in ("loss", "global_grad_norm") if not math.isnan(shown[name])}
            if shown["loss_nonfinite"]:
                readings["loss"] = math.inf
            self._schedule.observe(
                step, deep=layout.tier == "deep" and not compiled, seconds=seconds, watch_seconds=own, readings=readings
            )
            if self._guard is not None and self._subject.bad_in_a_row == self._guard.patience + 1:
                self._on_warning(
                    f"the guard has left out {self._subject.bad_in_a_row} steps in a row, up to step {step}: what "
                    "repeats is not the batch, and leaving out more of them does not end it"
                )
            if self._on_step is not None:
                self._on_step(self._subject.name, step, shown)
        self._begun = max(self._begun, self._subject.step)


@contextlib.contextmanager
def _alone() -> Any:
    """On the torch backend, whoever watches PyTorch does not hear of this step: it is counted here."""
    if "isograd.frameworks.torch" not in sys.modules or keras.backend.backend() != "torch":
        yield
        return
    from isograd.frameworks.torch._taps import silenced

    with silenced():
        yield


def _is_end_of_data(error: Exception) -> bool:
    return isinstance(error, StopIteration) or type(error).__name__ == "OutOfRangeError"
