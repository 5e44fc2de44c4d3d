"""Where the first NaN or Inf stood, in time and in the order in which a training step computes its values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isograd._history import Event, Floats, History, Series

READS = (
    "loss_nonfinite",
    "grad_nonfinite",
    "output_nonfinite",
    "input_nonfinite",
    "signal_nonfinite",
    "weight_nonfinite",
    "state_nonfinite",
    "skipped",
)
"""The statistics that this module reads."""

# Within a step: weights are read before it, then data enters, the forward pass runs, the backward pass, the update.
_ORDER = {"weight": 0, "input": 1, "output": 2, "loss": 3, "gradient": 4, "state": 5}


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place that held a non-finite value. `kind`: weight, input, output, loss, gradient or state."""

    step: int
    kind: str
    statistic: str
    count: float
    name: str = ""

    def cites(self, history: History) -> bool:
        """Whether `name` is one of the history's layers or parameters."""
        return self.name in {layer.name for layer in history.layers} | {p.name for p in history.parameters}

    def layers(self, history: History) -> tuple[str, ...]:
        """The layer or parameter that held it, where the history has one of this name."""
        return (self.name,) if self.cites(history) else ()

    def reading(self, history: History) -> dict[str, Any]:
        """The count as evidence: one entry is the limit."""
        layer = self.name if self.cites(history) else None
        return {
            "statistic": self.statistic, "observed": self.count, "limit": 1.0, "step": self.step, "layer": layer,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.kind} of {self.name}" if self.name else self.kind

    @property
    def entries(self) -> str:
        """How many there were, in words."""
        return entries(self.count)


def entries(count: float) -> str:
    """A number of entries in words."""
    return f"{count:.0f} {'entry' if count == 1 else 'entries'}"


def first_place(history: History) -> Place | None:
    """The first non-finite value of the run, or None. Steps that a gradient scaler skipped do not count.

    Nor does what entered or left a layer at a step whose loss and gradients were finite: a masked similarity of -inf
    and a NaN for a missing value are meant, and the program coped with them.
    """
    return min(_places(history), key=lambda place: (place.step, _ORDER[place.kind]), default=None)


def _places(history: History) -> Iterator[Place]:
    skipped = skipped_steps(history)
    roles = np.array([layer.role for layer in history.layers], dtype=object)
    names = [layer.name for layer in history.layers]
    outputs, inputs = history.series.get("output_nonfinite"), history.series.get("input_nonfinite")
    fed = np.flatnonzero(roles == "input")
    computed = np.array(
        [i for i in _by_position(history) if roles[i] not in ("input", "target", "term")], dtype=np.int64
    )
    harmless = skipped | _sound_steps(history)
    yield from _first(outputs, "input", "output_nonfinite", names, fed, harmless)
    yield from _first(_born(outputs, inputs), "output", "output_nonfinite", names, computed, harmless)
    yield from _first(
        history.series.get("signal_nonfinite"), "gradient", "signal_nonfinite", names, computed[::-1], skipped
    )
    yield from _first(history.series.get("loss_nonfinite"), "loss", "loss_nonfinite", [""], np.arange(1), skipped)
    names = [parameter.name for parameter in history.parameters]
    every = np.arange(len(names))
    yield from _first(history.series.get("weight_nonfinite"), "weight", "weight_nonfinite", names, every, skipped)
    # Behind the signal, which names a layer: of equals the first one yielded is kept.
    yield from _first(history.series.get("grad_nonfinite"), "gradient", "grad_nonfinite", names, every[::-1], skipped)
    yield from _first(history.series.get("state_nonfinite"), "state", "state_nonfinite", names, every, skipped)
    yield from _told(history, skipped, harmless)


def _by_position(history: History) -> NDArray[np.int64]:
    return np.argsort([layer.position for layer in history.layers], kind="stable")


def _born(outputs: Series | None, inputs: Series | None) -> Series | None:
    """Output counts of the layers whose own inputs were finite; all of them where inputs were not read."""
    if outputs is None or inputs is None or inputs.values.shape != outputs.values.shape:
        return outputs
    counts = np.where(np.nan_to_num(inputs.values) > 0, 0.0, outputs.values)
    # A step on which no layer had finite inputs keeps its counts: the values came in with the weights or the data.
    return Series(outputs.steps, np.where((counts > 0).any(axis=1, keepdims=True), counts, outputs.values))


def _first(
    series: Series | None,
    kind: str,
    statistic: str,
    names: list[str],
    order: NDArray[np.int64],
    skipped: frozenset[int],
) -> Iterator[Place]:
    """The first row of `series` that counts something, and in it the first column in `order`."""
    if series is None or not len(order):
        return
    counts = np.atleast_2d(series.values.T).T
    for row in np.flatnonzero((counts > 0).any(axis=1)):
        step, counted = int(series.steps[row]), counts[row, order] > 0
        if step not in skipped and counted.any():
            column = int(order[np.argmax(counted)])
            count = float(counts[row, column])
            yield Place(step=step, kind=kind, statistic=statistic, count=count, name=names[column])
            return


def _told(history: History, skipped: frozenset[int], harmless: frozenset[int]) -> Iterator[Place]:
    """What the observer reported by itself: it looks closer than the schedule where something turned non-finite."""
    for event in history.events_of("nonfinite"):
        place = str(event.data.get("place", ""))
        kind = "output" if place == "operation" else place
        if kind in _ORDER and event.step not in (harmless if kind in ("input", "output") else skipped):
            count = event.data.get("count", 1)
            name = event.layer or str(event.data.get("name", ""))
            known = float(count) if isinstance(count, (int, float)) else 1.0
            yield Place(step=event.step, kind=kind, statistic=f"{kind}_nonfinite", count=max(known, 1.0), name=name)


def told(history: History, step: int, *places: str) -> Event | None:
    """What the observer reported of one of `places` (operation, input, gradient, weight) at `step`."""
    events = (event for event in history.events_of("nonfinite") if event.step == step)
    return next((event for event in events if event.data.get("place") in places), None)


CODE = 60
"""Characters of a source line that are shown."""


def source(event: Event) -> str:
    """Where in the user's program it was: " at train.py:42 (`loss = torch.log(p)`)", "" where that is not known."""
    file, line, code = event.data.get("file"), event.data.get("line"), str(event.data.get("code") or "")
    if not file or not line:
        return ""
    shown = code if len(code) <= CODE else f"{code[: CODE - 1]}…"
    return f" at {file}:{line}" + (f" (`{shown}`)" if shown else "")


def rows(event: Event) -> str:
    """In how much of the operand it was: "3 of 64 rows", "1 entry"."""
    count, total = event.data.get("rows"), event.data.get("num_rows")
    if isinstance(count, int) and isinstance(total, int) and total:
        return f"{count} of {total} rows"
    number = event.data.get("count", 1)
    return entries(float(number) if isinstance(number, (int, float)) else 1.0)


def operation(event: Event) -> str:
    """What was computed, where and of how much: "log of 0 at train.py:42 (`loss = torch.log(p)`), 3 of 64 rows"."""
    name, reason = str(event.data.get("operation") or "an operation"), str(event.data.get("reason") or "")
    what = {"": name, "overflow": f"overflow in {name}"}.get(reason, reason)
    return f"{what}{source(event)}, {rows(event)}"


def skipped_steps(history: History) -> frozenset[int]:
    """Steps that a gradient scaler left out because its scaled gradients overflowed."""
    series = history.series.get("skipped")
    counted = [] if series is None else series.steps[_any(series.values)].tolist()
    return frozenset(counted) | {event.step for event in history.events_of("step-skipped")}


def bad_steps(history: History) -> NDArray[np.int64]:
    """Steps on which the loss, a gradient or a weight was not finite, those that a gradient scaler skipped left out."""
    found: set[int] = set()
    for statistic in ("loss_nonfinite", "grad_nonfinite", "weight_nonfinite"):
        series = history.series.get(statistic)
        if series is not None:
            found.update(series.steps[_any(series.values)].tolist())
    return np.array(sorted(found - skipped_steps(history)), dtype=np.int64)


def _sound_steps(history: History) -> frozenset[int]:
    """Steps whose loss and gradients were read and finite, and whose weights were where they were read."""
    loss, gradients = history.series.get("loss_nonfinite"), history.series.get("grad_nonfinite")
    if loss is None or gradients is None:
        return frozenset()
    return frozenset(loss.steps.tolist()).intersection(gradients.steps.tolist()).difference(bad_steps(history).tolist())


def last_bad_step(history: History) -> int:
    """The last of `bad_steps`, -1 when there are none."""
    steps = bad_steps(history)
    return int(steps[-1]) if len(steps) else -1


def ran_away(history: History, step: int, factor: float) -> bool:
    """Whether loss or gradient had left their own median by `factor`, or weights their start by ten, before `step`."""
    loss, gradient = history.series.get("loss"), history.series.get("global_grad_norm")
    grown = any(_grew(series, step, factor) for series in (loss, gradient) if series is not None)
    weights = history.series.get("weight_norm")
    row = None if weights is None else weights.at(step)
    if weights is None or row is None:
        return grown
    # Weights ten times their start were thrown there by an update: no forward pass would have been safe.
    before, now = (float(np.sqrt(np.sum(np.square(values)))) for values in (weights.values[0], row))
    return grown or not now < 10 * before


def _grew(series: Series, step: int, factor: float) -> bool:
    before = np.abs(series.values[(series.steps < step) & np.isfinite(series.values)])
    return len(before) >= 2 and bool(before[-1] >= factor * float(np.median(before)) > 0)


def damaged(history: History) -> bool:
    """Whether the weights were left non-finite: read so, or gradients or losses non-finite to the last step seen."""
    weights = history.series.get("weight_nonfinite")
    if weights is not None and len(weights) and bool(_any(weights.values[-1:])[0]):
        return True
    gradients = history.series.get("grad_nonfinite")
    if gradients is None or not len(gradients) or int(gradients.steps[-1]) in skipped_steps(history):
        return False
    # Non-finite gradients that reached the last step either have poisoned the weights or come from weights that are.
    return bool(_any(gradients.values[-1:])[0])


def _any(values: Floats) -> NDArray[np.bool_]:
    return np.asarray((values > 0).any(axis=tuple(range(1, values.ndim))))
