"""What of a run is exported, and under which names: tables for who reads files, keyed numbers for who reads dashboards.

Every recorded statistic is exported under its own name, but for two, which have the names that every tracker uses:

    global_grad_norm            -> grad_norm
    global_grad_norm_unclipped  -> grad_norm_unclipped

**Tables** (csv, parquet), one row per observation, in order of subject, step and layer; one without rows is left out:

    steps       subject, step, loss, grad_norm, …, learning_rate/0, …       a column per parameter group
    parameters  subject, step, parameter, grad_norm, weight_norm, update_ratio, …
    layers      subject, step, layer, signal_norm, saturation, dead_fraction, …
    calls       subject, step, layer, call, call_signal_norm                the calls of one layer in a step
    events      subject, step, kind, layer, data (JSON)

**Keys** (tensorboard, wandb, mlflow), one number per key and step: `loss`, `grad_norm`, `learning_rate/<group>`,
`grad_norm/<parameter>`, `saturation/<layer>`, `call_signal_norm/<layer>/<call>`. Where a run has several subjects, each
key begins with `<subject>/`.

A reading that does not exist is an empty cell, a null, or no point at all. NaN stands only where the value itself was
not finite, which is where the `*_nonfinite` count of the same place is above 0. Steps that were rolled up have one row,
at the last step of their span: the median, of `*_nonfinite` the largest count, of `skipped` the sum.
"""

from __future__ import annotations

import abc
import heapq
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from isograd._history import Floats, History, Integers, Series
from isograd._runs import Run
from isograd._statistics import STATISTICS, Axis, Statistic

_RENAMED = {"global_grad_norm": "grad_norm", "global_grad_norm_unclipped": "grad_norm_unclipped"}
_TABLES: tuple[tuple[str, tuple[Axis, ...], dict[str, str]], ...] = (
    ("steps", ("step", "group"), {}),
    ("parameters", ("parameter",), {"parameter": "text"}),
    ("layers", ("layer",), {"layer": "text"}),
)
_BLOCK = 65_536  # rows, or keyed numbers, that are in memory at once beside the run itself

Block = dict[str, Any]
"""Column -> cells: a list of strings or integers, or a masked float64 array whose masked entries do not exist."""


class Format(abc.ABC):
    """A format that runs are exported to: a final frozen dataclass in a file of its own, known by the file's name."""

    needs: ClassVar[str] = ""
    """The package that it is written with, which the extra of the same name installs; "" for none."""

    @abc.abstractmethod
    def write(self, run: Run, folder: Path, *, place: Path) -> None:
        """Write `run` into the empty `folder`, which becomes `place` when all of it is there.

        Memory is bounded whatever the run's length. Raises OSError where the disk does.
        """

    @abc.abstractmethod
    def reading(self, place: Path) -> str:
        """How one reads what was written to `place`, as a command or a line of code."""


def export_name(statistic: str) -> str:
    """The name under which a statistic is exported."""
    return _RENAMED.get(statistic, statistic)


def is_empty(run: Run) -> bool:
    """Whether nothing was recorded that could be exported."""
    return not any(len(series) for history in run.histories for series in history.series.values())


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one kind. `columns`: their names in order, with "text", "integer" or "number"; `blocks` makes rows."""

    name: str
    columns: Mapping[str, str]
    blocks: Callable[[], Iterator[Block]]


def tables(run: Run) -> Iterator[Table]:
    """The tables of a run that have rows."""
    for name, axes, place in _TABLES:
        columns = list(dict.fromkeys(column for h in run.histories for column in _columns(h, axes)))
        if columns:
            typed = {"subject": "text", "step": "integer", **place, **dict.fromkeys(_ordered(columns), "number")}
            yield Table(name=name, columns=typed, blocks=_Rows(run, axes, typed))
    if any(history.profiles for history in run.histories):
        statistics = _ordered(list(dict.fromkeys(s for history in run.histories for s in history.profiles)))
        typed = {"subject": "text", "step": "integer", "layer": "text", "call": "integer"}
        yield Table(
            name="calls",
            columns={**typed, **dict.fromkeys(map(export_name, statistics), "number")},
            blocks=lambda: _call_blocks(run, statistics),
        )
    if any(history.events for history in run.histories):
        typed = {"subject": "text", "step": "integer", "kind": "text", "layer": "text", "data": "text"}
        yield Table(name="events", columns=typed, blocks=lambda: _event_blocks(run))


def statistic_of(table: str, column: str) -> Statistic | None:
    """The statistic that a table's column holds; None for what is none, as `step`."""
    name = column.partition("/")[0]
    given = {new: old for old, new in _RENAMED.items()} if table == "steps" else {}
    return STATISTICS.get(given.get(name, name))


def _columns(history: History, axes: Sequence[Axis]) -> Iterator[str]:
    for statistic, series in history.series.items():
        axis = STATISTICS[statistic].axis
        if axis in axes and len(series):
            groups = range(series.values.shape[1]) if axis == "group" else ()
            yield from (f"{export_name(statistic)}/{group}" for group in groups)
            yield from () if axis == "group" else (export_name(statistic),)


def _ordered(columns: Sequence[str]) -> list[str]:
    """In the order of the catalogue of statistics, groups in theirs."""
    ranks = {export_name(name): rank for rank, name in reversed(list(enumerate(STATISTICS)))}
    parts = [(column.partition("/")[0], column.partition("/")[2]) for column in columns]
    keys = [(ranks[name], int(group or 0)) for name, group in parts]
    return [column for _, column in sorted(zip(keys, columns, strict=True), key=lambda pair: pair[0])]


class _Rows:
    """Makes the rows of the tables `steps`, `parameters` and `layers`."""

    def __init__(self, run: Run, axes: Sequence[Axis], columns: Mapping[str, str]) -> None:
        self._run, self._axes, self._columns = run, axes, columns

    def __call__(self) -> Iterator[Block]:
        for history in self._run.histories:
            names = _names(history, self._axes[0])
            for steps in _portions(_steps(history, self._axes), len(names)):
                block = self._block(history, steps, names)
                if block["step"]:
                    yield block

    def _block(self, history: History, steps: Integers, names: Sequence[str]) -> Block:
        readings = dict(_readings(history, self._axes, steps))
        numbers = [column for column, kind in self._columns.items() if kind == "number"]
        nothing = _existing(np.full((len(steps), len(names)), np.nan))
        cells = {column: readings.get(column, nothing).reshape(-1) for column in numbers}
        kept = np.flatnonzero(~np.all([np.ma.getmaskarray(column) for column in cells.values()], axis=0))
        block: Block = {"subject": [history.subject] * len(kept), "step": steps[kept // len(names)].tolist()}
        if self._axes[0] != "step":
            block[self._axes[0]] = [names[i] for i in (kept % len(names)).tolist()]
        return block | {column: values[kept] for column, values in cells.items()}


def _call_blocks(run: Run, statistics: Sequence[str]) -> Iterator[Block]:
    for history in run.histories:
        for layer in dict.fromkeys(layer for layers in history.profiles.values() for layer in layers):
            found = {s: history.profiles[s][layer] for s in statistics if layer in history.profiles.get(s, {})}
            width = max(series.values.shape[1] for series in found.values())
            for steps in _portions(np.unique(np.concatenate([s.steps for s in found.values()])), width):
                cells = {}
                for statistic in statistics:
                    wide = np.full((len(steps), width), np.nan)
                    if statistic in found:
                        wide[:, : found[statistic].values.shape[1]] = _rows_at(found[statistic], steps)
                    cells[export_name(statistic)] = _existing(wide.reshape(-1))
                kept = np.flatnonzero(~np.all([np.ma.getmaskarray(c) for c in cells.values()], axis=0))
                yield {
                    "subject": [history.subject] * len(kept),
                    "step": steps[kept // width].tolist(),
                    "layer": [layer] * len(kept),
                    "call": (kept % width).tolist(),
                    **{column: values[kept] for column, values in cells.items()},
                }


def _event_blocks(run: Run) -> Iterator[Block]:
    for history in run.histories:
        for start in range(0, len(history.events), _BLOCK):
            events = history.events[start : start + _BLOCK]
            yield {
                "subject": [history.subject] * len(events),
                "step": [event.step for event in events],
                "kind": [event.kind for event in events],
                "layer": [event.layer for event in events],
                "data": [event_json(event.data) for event in events],
            }


def event_json(data: Mapping[str, Any]) -> str:
    """An event's data as JSON of Python's kind, which has NaN and Infinity."""
    return json.dumps(data, ensure_ascii=False, default=str)


def told_events(run: Run) -> dict[tuple[str, int], str]:
    """(subject, step) -> what happened there, a line each: kind, layer, and data as JSON."""
    told: dict[tuple[str, int], list[str]] = {}
    for history in run.histories:
        for event in history.events:
            where = f" in {event.layer}" if event.layer else ""
            told.setdefault((history.subject, event.step), []).append(f"{event.kind}{where} {event_json(event.data)}")
    return {place: "\n".join(lines) for place, lines in told.items()}


# ---- keyed numbers --------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """What was read at one step: `time` in seconds since 1970, `values` by key."""

    step: int
    time: float
    values: dict[str, float]


def points(run: Run) -> Iterator[Point]:
    """All readings by key, in order of steps; what several subjects read at one step is one point."""
    each = [_points(history, _started(run), key_prefix(run, history.subject)) for history in run.histories]
    merged = heapq.merge(*each, key=lambda point: point.step)
    for step, found in itertools.groupby(merged, key=lambda point: point.step):
        first, *others = found
        for other in others:
            first.values.update(other.values)
        yield Point(step, first.time, first.values)


def key_prefix(run: Run, subject: str) -> str:
    """What the keys of a subject begin with: nothing where it is the only one."""
    return "" if len(run.histories) == 1 else f"{subject}/"


def _points(history: History, started: float, prefix: str) -> Iterator[Point]:
    axes: tuple[Axis, ...] = ("step", "group", "parameter", "layer")
    steps = np.unique(np.concatenate([_steps(history, axes), *(s.steps for _, _, s in _profiles(history))]))
    times = started + _seconds(history, steps)
    begun = 0
    for portion in _portions(steps, _num_keys(history)):
        found: list[dict[str, float]] = [{} for _ in portion]
        for axis in axes:
            names = [f"/{name}" for name in _names(history, axis)] if axis in ("parameter", "layer") else [""]
            for column, readings in _readings(history, (axis,), portion):
                _spread(found, readings, [f"{prefix}{column}{name}" for name in names])
        for statistic, layer, series in _profiles(history):
            rows = _rows_at(series, portion)
            keys = [f"{prefix}{export_name(statistic)}/{layer}/{call}" for call in range(rows.shape[1])]
            _spread(found, _existing(rows), keys)
        for i, values in enumerate(found):
            if values:
                yield Point(int(portion[i]), float(times[begun + i]), values)
        begun += len(portion)


def _spread(found: Sequence[dict[str, float]], readings: Any, keys: Sequence[str]) -> None:
    """Put the readings [S, N] that exist under their keys."""
    table = readings.reshape(len(found), len(keys))
    rows, columns = np.nonzero(~np.ma.getmaskarray(table))
    values = np.ma.getdata(table)[rows, columns]
    for row, column, value in zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True):
        found[row][keys[column]] = value


def _num_keys(history: History) -> int:
    every = [*history.series.values(), *(series for _, _, series in _profiles(history))]
    return sum(int(np.prod(series.values.shape[1:])) for series in every)


def _profiles(history: History) -> Iterator[tuple[str, str, Series]]:
    for statistic, layers in history.profiles.items():
        yield from ((statistic, layer, series) for layer, series in layers.items())


def _started(run: Run) -> float:
    """Seconds since 1970; 0 where the run does not say."""
    try:
        return datetime.fromisoformat(str(run.meta["started"]).replace("Z", "+00:00")).timestamp()
    except (KeyError, ValueError):
        return 0.0


def _seconds(history: History, steps: Integers) -> Floats:
    """[S] seconds from the start to each step; of rolled-up steps the median lasts for each of the span."""
    series = history.series.get("step_seconds")
    if series is None or not len(series):
        return np.zeros(len(steps))
    spans = np.diff(series.steps, prepend=-1)
    ends = np.cumsum(np.where(np.isfinite(series.values), series.values, 0.0) * spans)
    return np.asarray(np.interp(steps, [-1, *series.steps], [0.0, *ends]), dtype=np.float64)


# ---- readings -------------------------------------------------------------------------------------------------------


def _names(history: History, axis: Axis) -> list[str]:
    if axis == "parameter":
        return [parameter.name for parameter in history.parameters]
    return [layer.name for layer in history.layers] if axis == "layer" else [""]


def _steps(history: History, axes: Sequence[Axis]) -> Integers:
    """All steps at which something of these axes was read."""
    found = [s.steps for name, s in history.series.items() if STATISTICS[name].axis in axes]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def _portions(steps: Integers, width: int) -> Iterator[Integers]:
    length = max(1, _BLOCK // max(1, width))
    yield from (steps[start : start + length] for start in range(0, len(steps), length))


def _readings(history: History, axes: Sequence[Axis], steps: Integers) -> Iterator[tuple[str, Any]]:
    """(column, masked readings [S] or [S, N] at these steps) of each statistic; a column for each parameter group."""
    for statistic, series in history.series.items():
        axis = STATISTICS[statistic].axis
        if axis not in axes or not len(series):
            continue
        values = _rows_at(series, steps)
        readings = _existing(values, nonfinite=_is_nonfinite(history, statistic, steps))
        if axis != "group":
            yield export_name(statistic), readings
            continue
        yield from ((f"{export_name(statistic)}/{group}", readings[:, group]) for group in range(values.shape[1]))


def _existing(values: Floats, *, nonfinite: Any = False) -> Any:
    """`values`, masked where NaN means that there is no reading."""
    return np.ma.array(values, mask=np.isnan(values) & np.logical_not(nonfinite))


def _rows_at(series: Series, steps: Integers) -> Floats:
    """The rows of exactly these steps, NaN where there is none."""
    rows = np.full((len(steps), *series.values.shape[1:]), np.nan)
    if len(series):
        index = np.minimum(np.searchsorted(series.steps, steps), len(series) - 1)
        found = series.steps[index] == steps
        rows[found] = series.values[index[found]]
    return rows


def _is_nonfinite(history: History, statistic: str, steps: Integers) -> Any:
    """Where a NaN stands for a value that was not finite: bool [S] or [S, N], or False where nothing counts them."""
    if statistic in _RENAMED:  # a norm over all gradients is as finite as each of them
        counts = history.series.get("grad_nonfinite")
        return False if counts is None else np.any(_rows_at(counts, steps) > 0, axis=1)
    count = f"{statistic.partition('_')[0]}_nonfinite"
    known = STATISTICS.get(count)
    if known is None or known.axis != STATISTICS[statistic].axis or count not in history.series:
        return False
    return _rows_at(history.series[count], steps) > 0
