"""Bring the readings that monitors keep on the device to the run file, some steps late, without waiting for them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from isograd._history import Event
from isograd._schedule import Schedule
from isograd._statistics import STATISTICS
from isograd.frameworks import Recorder, Shield
from isograd.frameworks.jax import _kernels as kernels
from isograd.frameworks.jax import _monitor as monitors
from isograd.frameworks.jax import _names as names
from isograd.frameworks.jax import _places as places
from isograd.frameworks.jax._guarded import GuardedState
from isograd.frameworks.jax._monitor import Monitor, MonitorState

_OPTIMIZERS = {
    "ScaleByAdamState": "Adam", "ScaleByRmsState": "RMSprop", "ScaleByRssState": "Adagrad", "ScaleByLionState": "Lion",
    "TraceState": "SGD",
}  # fmt: skip
"""Which optimizer the state of a transformation tells of."""

_HYPERPARAMETERS = {"learning_rate": "lr", "momentum": "momentum", "decay": "momentum", "eps": "eps",
                    "weight_decay": "weight_decay"}  # fmt: skip
"""What `optax.inject_hyperparams` names, as run files name it."""

_NO_LAYERS = "optax hands over gradients and weights, no layers: what a layer returns cannot be read"

_UNMEASURED = {
    **{s.name: _NO_LAYERS for s in STATISTICS.values() if s.axis in ("layer", "call")},
    "clip_factor": "a monitor sees gradients in one place of a chain: what clips them stands elsewhere",
    "carried_grad_norm": "JAX computes every gradient anew: none is carried from step to step",
    "graph_nodes": "a compiled step has no graph that could grow",
    "state_nonfinite": "the optimizer's state is not read",
    "replica_difference": "replicas are one array to JAX",
    "loss_scale": "what scales a loss is part of the step and cannot be told from it",
}

_NO_GUARD = (
    "a compiled step is over before the host hears of it: isograd.frameworks.jax.guarded leaves bad steps out inside"
)

_UNKNOWN_ORDER = (
    "the order of the layers is not known, since pytrees sort their names: monitor(..., order=...) tells it, for which "
    "order_of_use(loss, params, batch) finds it"
)


class Observer:
    """Listens to monitors. `optimizers`: only these; empty: every monitor of the process that is read.

    `make_schedule` gives each subject its own deep schedule. `on_step(subject, step, readings)` is called after each
    step that has arrived, with loss and gradient norm; `between` outside of the shield, where it may end the program.
    `guard` is refused, as an event of each subject: the host hears of a step when it is over.
    """

    def __init__(
        self,
        recorder: Recorder,
        shield: Shield,
        *,
        models: Sequence[Any] = (),
        optimizers: Sequence[Monitor] = (),
        make_schedule: Callable[[], Schedule] = Schedule,
        on_step: Callable[[str, int, dict[str, float]], None] | None = None,
        between: Callable[[], None] | None = None,
        guard: object = None,
    ) -> None:
        self._recorder, self._shield, self._make_schedule = recorder, shield, make_schedule
        self._refuses_guard = guard is not None
        self._on_step, self._between = on_step, between
        self._only = list(optimizers)
        self._followed: list[_Followed] = []
        self._earlier: Mapping[str, Any] = {}
        self._marks = (time.perf_counter(), shield.seconds)

    # ---- life -------------------------------------------------------------------------------------------------------

    def attach(
        self, models: Sequence[Any] = (), optimizers: Sequence[Monitor] = (), frame: FrameType | None = None
    ) -> None:
        """Begin to listen, to these monitors and those of the constructor."""
        self._only += [one for one in optimizers if all(one is not known for known in self._only)]
        if self not in monitors.readers:
            monitors.readers.append(self)

    def detach(self, error: BaseException | None = None) -> None:
        """Write what is pending and stop listening; idempotent."""
        if self in monitors.readers:
            monitors.readers.remove(self)
            self._shield.call(self._finish)

    def _finish(self) -> None:
        for one in self._followed:
            one.finish()

    def release(self) -> None:
        """Stop listening at once without writing, after a failure."""
        if self in monitors.readers:
            monitors.readers.remove(self)
        for one in self._followed:
            one.forget()

    def drain(self) -> None:
        """Write what has been read so far, waiting for what is under way."""
        for one in self._followed:
            one.drain()

    def settle(self) -> None:
        """The same: nothing is read between steps."""
        self.drain()

    def redescribe(self) -> None:
        """Parameters cannot become others in place."""

    def state_dict(self) -> dict[str, Any]:
        """What is usual so far, by subject."""
        return {one.name: one.schedule.state_dict() for one in self._followed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; subjects that are not known yet take up what is theirs when they are."""
        self._earlier = state
        for one in self._followed:
            one.schedule.load_state_dict(state.get(one.name, {}))

    @property
    def deep_step(self) -> int | None:
        """The last step of which the deep tier was written, None before the first."""
        return max((one.deep_step for one in self._followed if one.deep_step is not None), default=None)

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects seen so far."""
        return [one.name for one in self._followed]

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, monitor: Monitor, opt_state: Any, state: MonitorState, loss: Any) -> bool:
        """Steps have been dispatched; whether the next one is to be deep."""
        if self._only and all(monitor is not one for one in self._only):
            return False
        deep = bool(self._shield.call(self._read, monitor, opt_state, state, loss))
        if self._between is not None:
            self._between()
        return deep

    def _read(self, monitor: Monitor, opt_state: Any, state: MonitorState, loss: Any) -> bool:
        followed = next((one for one in self._followed if one.monitor is monitor), None)
        if followed is None:
            followed = self._follow(monitor)
        return followed.read(opt_state, state, loss, self._shield.seconds)

    def _follow(self, monitor: Monitor) -> _Followed:
        taken = set(self.subjects)
        numbered = (monitor.name if n == 1 else f"{monitor.name}-{n}" for n in range(1, len(taken) + 2))
        name = next(candidate for candidate in numbered if candidate not in taken)
        schedule = self._make_schedule()
        schedule.load_state_dict(self._earlier.get(name, {}))
        followed = _Followed(name, monitor, schedule, self._recorder, self._on_step, self._marks)
        self._followed.append(followed)
        if self._refuses_guard:
            self._recorder.write_event(name, Event(step=0, kind="guard-refused", data={"why": _NO_GUARD}))
        return followed


class _Read(NamedTuple):
    """A call of `Monitor.read`. `count`, `skipped`, `rates`: copies on the device."""

    count: Any
    skipped: Any
    rates: Any
    loss: Any
    seconds: float
    watch_seconds: float


@dataclass
class _Reading:
    """What is known of one step besides the monitor's row."""

    losses: list[float]
    rates: list[float]
    seconds: float = math.nan
    watch_seconds: float = math.nan


class _Followed:
    """One monitor and its subject in the run."""

    def __init__(
        self,
        name: str,
        monitor: Monitor,
        schedule: Schedule,
        recorder: Recorder,
        on_step: Callable[[str, int, dict[str, float]], None] | None,
        marks: tuple[float, float],
    ) -> None:
        self.name, self.monitor, self.schedule = name, monitor, schedule
        self.deep_step: int | None = None
        self._recorder, self._on_step = recorder, on_step
        self._reads: deque[_Read] = deque()
        self._snapshots: deque[tuple[int, Any]] = deque()  # (reads before it, copies of the monitor's arrays)
        self._since = 0  # reads since the last snapshot
        self._latest: Any = None
        self._counted = 0  # steps that have been written
        self._told: int | None = None  # steps that the reads taken so far knew of
        self._is_late = monitor.has_been_read  # the rows hold steps from before this watch
        self._skipped = 0
        self._step = 0  # the host's guess of how many steps have been made
        self._readings: dict[int, _Reading] = {}
        self._marks = marks
        self._place: places.Place | None = None
        self._hyperparameters: dict[str, places.Place] = {}
        self._guards: list[places.Place] = []
        self._group: dict[str, Any] = {}
        self._has_loss = self._has_rates = self._has_told_weights = False
        schedule.is_deep(0)

    # ---- while the program runs -------------------------------------------------------------------------------------

    def read(self, opt_state: Any, state: MonitorState, loss: Any, spent: float) -> bool:
        """Keep what this call shows; a snapshot of the rows when they are half full. Whether the next step is deep."""
        if self._latest is None:
            self._describe()
        if self._place != self.monitor.place:
            self._look_around(opt_state)
        now = time.perf_counter()
        seconds, watched = now - self._marks[0], spent - self._marks[1]
        self._marks = (now, spent)
        rates = [monitors.plain(places.at(opt_state, place)) for place in self._hyperparameters.values()]
        skipped = [monitors.plain(places.at(opt_state, place).skipped) for place in self._guards]
        count, skipped, rates = kernels.copies((monitors.plain(state.count), skipped, rates))
        self._reads.append(_Read(count, skipped, rates, loss, seconds, watched))
        self._latest = [monitors.plain(array) for array in state[:3]]  # not what it wraps, which is large
        self._since += 1
        self._step += max(1, _size(loss))
        if self._since * max(1, _size(loss)) >= self._latest[1].shape[0] // 2 or self._step <= _PROMPT:
            self._take_snapshot()
        self._write_arrived(wait=False)
        return self.schedule.is_deep(self._step)

    def _take_snapshot(self) -> None:
        if any(array.is_deleted() for array in self._latest):
            return  # a step that has not been read yet took over its memory
        copied = kernels.copies(self._latest)
        for array in copied:
            array.copy_to_host_async()
        self._snapshots.append((len(self._reads) - sum(number for number, _ in self._snapshots), copied))
        self._since = 0

    def drain(self) -> None:
        """Write every step that was dispatched before the last read."""
        if self._since:
            self._take_snapshot()
        self._write_arrived(wait=True)

    def finish(self) -> None:
        """Write what is left, and say what was never read."""
        self.drain()
        if not self._has_loss:
            why = "read(opt_state, loss=...) was never given a loss"
            self._cannot(("loss", "loss_nonfinite"), why)
        if not self._has_rates:
            why = "the rate is not part of the optimizer's state: optax.inject_hyperparams puts it there"
            self._cannot(("learning_rate",), why)
        self.forget()

    def forget(self) -> None:
        """Let go of everything on the device."""
        self._reads.clear()
        self._snapshots.clear()
        self._since = 0

    # ---- describing -------------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        parameters = self.monitor.parameters
        layers = names.layers_of(parameters, self.monitor.order)
        self._recorder.add_parameters(self.name, parameters)
        self._recorder.add_layers(self.name, layers)
        for statistic, why in _UNMEASURED.items():
            self._cannot((statistic,), why)
        if not layers:
            self._cannot(("signal_norm",), _UNKNOWN_ORDER)
        if not self.monitor.deep:
            self._cannot((*kernels.DEEP, "update_ratio"), "the monitor was made with deep=False")
        elif not self.monitor.wraps:
            why = "a monitor in a chain sees no updates: monitor(optimizer) does"
            self._cannot(("update_norm", "update_ratio"), why)

    def _look_around(self, opt_state: Any) -> None:
        """Find what stands beside the monitor's state: hyperparameters, a guard, what tells the optimizer's kind."""
        self._place = self.monitor.place
        self._guards = places.find(opt_state, lambda node: isinstance(node, GuardedState))
        self._hyperparameters = {
            key: (*place, places.Step("hyperparams", is_attribute=True), places.Step(key, is_attribute=False))
            for place in places.find(opt_state, _has_hyperparameters)[:1]
            for key in places.at(opt_state, place).hyperparams
        }
        found = places.find(opt_state, lambda node: type(node).__name__ in _OPTIMIZERS)
        kinds = {_OPTIMIZERS[type(places.at(opt_state, place)).__name__] for place in found}
        self._group = {"optimizer": kinds.pop()} if len(kinds) == 1 else {}
        self._group["size"] = len(self.monitor.parameters)
        self._recorder.set_groups(self.name, [self._group])

    def _note_hyperparameters(self, known: Mapping[str, float]) -> None:
        plain = {_HYPERPARAMETERS[key]: value for key, value in known.items() if key in _HYPERPARAMETERS}
        pair = {"betas": [known["b1"], known["b2"]]} if "b1" in known and "b2" in known else {}
        self._recorder.set_groups(self.name, [{**self._group, **plain, **pair}])

    def _cannot(self, statistics: Sequence[str], why: str) -> None:
        for statistic in statistics:
            self._recorder.set_unmeasured(self.name, statistic, why)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _write_arrived(self, *, wait: bool) -> None:
        while self._snapshots and (wait or all(array.is_ready() for array in self._snapshots[0][1])):
            number, arrays = self._snapshots.popleft()
            for _ in range(number):
                self._take(self._reads.popleft())
            count, rows, losses = (np.asarray(array) for array in arrays)
            self._write(int(count), rows, losses)

    def _take(self, read: _Read) -> None:
        """Say of which steps a call of `read` told."""
        count = int(read.count)
        losses = _numbers(read.loss)
        if self._told is None or count < self._told:  # the first, or the training went back to an earlier state
            self._told = max(0, count - max(1, len(losses)))
            self._readings = {step: reading for step, reading in self._readings.items() if step < self._told}
            self._counted = self._told if self._is_late else 0
        self._has_loss |= bool(losses)
        made = count - self._told
        skipped = sum(int(number) for number in read.skipped)
        if skipped > self._skipped:
            data = {"skipped": skipped - self._skipped, "loss": losses[-1] if losses else None}
            self._recorder.write_event(self.name, Event(step=count, kind="bad-step-skipped", data=data))
        elif losses and len(losses) == made:
            for step, loss in enumerate(losses, start=count - made):
                self._reading(step).losses.append(loss)
        elif losses:
            # A micro-batch belongs to the step that is not made yet.
            self._reading(count - 1 if made else count).losses.append(float(np.mean(losses)))
        self._skipped = skipped
        for step in range(count - made, count):
            reading = self._reading(step)
            reading.seconds, reading.watch_seconds = read.seconds / made, read.watch_seconds / made
            reading.rates = [float(np.asarray(rate)) for rate in read.rates]
        self._told = count

    def _reading(self, step: int) -> _Reading:
        return self._readings.setdefault(step, _Reading([], []))

    def _write(self, count: int, rows: NDArray[np.float32], losses: NDArray[np.float32]) -> None:
        if count < self._counted:  # gone back to an earlier state: of steps written twice the later reading holds
            self._counted = 0
        self._has_loss |= not np.isnan(losses).all()
        for step in range(max(self._counted, count - len(rows)), count):
            slot, reading = step % len(rows), self._readings.get(step, _Reading([], []))
            if not reading.losses and not math.isnan(losses[slot]):
                reading.losses.append(float(losses[slot]))
            self._write_step(step, rows[slot].astype(np.float64), reading)
        self._counted = count
        self._readings = {step: reading for step, reading in self._readings.items() if step >= count}
        self._step = count + sum(max(1, _size(read.loss)) for read in self._reads)

    def _write_step(self, step: int, row: NDArray[np.float64], reading: _Reading) -> None:
        cheap, deep = _cheap_arrays(row), _deep_arrays(row)
        norm = global_norm(cheap["grad_norm"], cheap["grad_nonfinite"])
        cheap |= {"global_grad_norm": norm, "global_grad_norm_unclipped": norm}
        cheap |= {"step_seconds": reading.seconds, "watch_seconds": reading.watch_seconds, "skipped": 0.0}
        cheap |= self._losses(reading) | self._rates(reading)
        self._recorder.write_row(self.name, step, "cheap", cheap)
        if deep:
            self.deep_step = step
            self._recorder.write_row(self.name, step, "deep", deep)
            if not self.monitor.has_weights and not self._has_told_weights:
                self._has_told_weights = True
                self._cannot(_OF_WEIGHTS, "update() was given no params")
        self._observe(step, cheap, norm, is_deep=bool(deep))

    def _losses(self, reading: _Reading) -> dict[str, Any]:
        values = reading.losses
        if not self._has_loss:
            return {}
        bad = sum(not math.isfinite(value) for value in values)
        loss = sum(values) / len(values) if values and not bad else math.nan
        return {"loss": loss, "loss_nonfinite": float(bad), "micro_batches": float(len(values) or math.nan)}

    def _rates(self, reading: _Reading) -> dict[str, Any]:
        values = dict(zip(self._hyperparameters, reading.rates, strict=False))
        if "learning_rate" not in values:
            return {"learning_rate": [math.nan]} if self._has_rates else {}
        if not self._has_rates:
            self._has_rates = True
            self._note_hyperparameters(values)
        return {"learning_rate": [values["learning_rate"]]}

    def _observe(self, step: int, cheap: Mapping[str, Any], norm: float, *, is_deep: bool) -> None:
        bad = float(np.nansum(cheap["grad_nonfinite"]))
        readings = {} if math.isnan(norm) and not bad else {"global_grad_norm": math.inf if bad else norm}
        if "loss" in cheap and not (math.isnan(cheap["loss"]) and not cheap["loss_nonfinite"]):
            readings["loss"] = math.inf if cheap["loss_nonfinite"] else cheap["loss"]
        seconds, watched = (0.0 if math.isnan(v) else v for v in (cheap["step_seconds"], cheap["watch_seconds"]))
        self.schedule.observe(step, deep=is_deep, seconds=seconds, watch_seconds=watched, readings=readings)
        if self._on_step is not None:
            self._on_step(self.name, step, {"loss": float(cheap.get("loss", math.nan)), "global_grad_norm": norm})


_PROMPT = 8
"""Steps that are looked at as soon as they have arrived: what goes wrong at once is seen at once."""

_OF_WEIGHTS = ("weight_norm", "weight_nonfinite", "update_ratio", "unit_spread")


def _has_hyperparameters(node: Any) -> bool:
    return isinstance(node, tuple) and isinstance(getattr(node, "hyperparams", None), Mapping)


def _size(loss: Any) -> int:
    return int(np.prod(np.shape(loss))) if loss is not None else 0


def _numbers(loss: Any) -> list[float]:
    if loss is None or (isinstance(loss, jax.Array) and loss.is_deleted()):
        return []
    return [float(value) for value in np.asarray(monitors.plain(loss), dtype=np.float64).ravel()]


def _cheap_arrays(row: NDArray[np.float64]) -> dict[str, Any]:
    """NaN where an entry is not finite: those are counted."""
    norms, peaks, counts = row[: len(kernels.CHEAP)]
    lost = counts > 0
    return {
        "grad_norm": np.where(lost, np.nan, norms),
        "grad_max": np.where(lost, np.nan, peaks),
        "grad_nonfinite": counts,
    }


def _deep_arrays(row: NDArray[np.float64]) -> dict[str, Any]:
    """Empty where the step was not deep."""
    if len(row) == len(kernels.CHEAP) or np.isnan(row[len(kernels.CHEAP) :]).all():
        return {}
    deep = dict(zip(kernels.DEEP, row[len(kernels.CHEAP) :], strict=True))
    lost = deep["weight_nonfinite"] > 0
    weights = np.where(lost, np.nan, deep["weight_norm"])
    updates = np.where(np.isfinite(deep["update_norm"]), deep["update_norm"], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = updates / weights
    return {
        **deep,
        "weight_norm": weights,
        "update_norm": updates,
        "update_ratio": np.where(np.isfinite(ratio), ratio, np.nan),
        "unit_spread": np.where(np.isfinite(deep["unit_spread"]), deep["unit_spread"], np.nan),
    }


def global_norm(norms: NDArray[np.float64], nonfinite: NDArray[np.float64]) -> float:
    """L2 norm of all gradients from those of the tensors; NaN where none has one or an entry is not finite."""
    present = norms[~np.isnan(norms)]
    if np.nansum(nonfinite) > 0 or not len(present):
        return math.nan
    return float(np.sqrt(np.dot(present, present)))
