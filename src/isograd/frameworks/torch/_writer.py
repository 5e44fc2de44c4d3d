"""Writing steps: once a step's readings have arrived on the host, they go to the recorder and to the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from isograd._history import Event
from isograd._schedule import Schedule
from isograd.frameworks import Recorder
from isograd.frameworks.torch import _ranks as ranks
from isograd.frameworks.torch._rank_group import RankGroup
from isograd.frameworks.torch._row import Queue, Row
from isograd.frameworks.torch._step import LAYER_STATISTICS, Step, global_norm, unclipped
from isograd.frameworks.torch._subject import Subject
from isograd.frameworks.torch._window import Window

MODULE_STATISTICS = tuple(
    name
    for name in LAYER_STATISTICS
    if not name.startswith(("attention", "row_sum", "column", "output_std", "distinct"))
)
"""What is read where a module is called, and nowhere else."""

COMPILED = "the model is compiled: no values can be read inside"

_VARYING = frozenset({"nodes", "flat_share", "products", "shortcuts", "norms", "post_norms", "mixings"})
"""Facts of a loss graph that may change with every batch and are no news."""


class Writer:
    """Writes the steps of every subject in their order. On more than one rank, `ranks` makes the readings global.

    `on_step(subject, step, readings)` is called after each step with loss and gradient norm.
    """

    def __init__(self, recorder: Recorder, on_step: Callable[[str, int, dict[str, float]], None] | None) -> None:
        self._recorder, self._on_step = recorder, on_step
        self._queue = Queue()
        self.ranks: ranks.Ranks | None = None
        self.schedules: dict[str, Schedule] = {}
        self.deep_step: int | None = None
        self._heads: dict[str, Any] = {}
        self._unmeasured: set[tuple[str, str]] = set()
        self._read: set[str] = set()  # subjects of which a module was read

    def join_ranks(self, lag: int) -> None:
        """From now on readings are those of all ranks together, taken `lag` steps late; this rank's where not all of
        them are watched. Collective.
        """
        group = RankGroup.of_all()
        if group is not None:
            self.ranks, self._queue.lag = ranks.Ranks(group), lag

    def leave_ranks(self) -> None:
        """This rank writes no more."""
        if self.ranks is not None:
            self.ranks.leave()

    def push(self, step: Step, row: Row) -> None:
        """Write a step as soon as its readings have arrived, and those before it that have."""
        self._queue.push(row, lambda arrived: self._write(step, arrived))
        self._queue.drain()

    def drain(self) -> None:
        """Write what has been pushed so far, waiting for what is under way."""
        self._queue.drain(everything=True)

    def cannot(self, subject: Subject, statistics: Iterable[str], why: str) -> None:
        """Say once in words why statistics cannot be read."""
        for statistic in statistics:
            if (subject.name, statistic) not in self._unmeasured:
                self._unmeasured.add((subject.name, statistic))
                self._recorder.set_unmeasured(subject.name, statistic, why)

    # ---- events -----------------------------------------------------------------------------------------------------

    def write_events(self, subject: Subject, step: int, window: Window) -> None:
        """What happened in a window; a loss graph only when it differs from the last one."""
        for kind, facts in window.events:
            if kind == "loss-graph":
                graph = {key: value for key, value in facts.items() if key not in _VARYING}
                if self._heads.get(subject.name) == graph:
                    continue
                self._heads[subject.name] = graph
            layer = None
            if "leaf" in facts:
                parameter = subject.parameter_named(facts.pop("leaf") or 0)
                layer = parameter.layer or parameter.name if parameter is not None else None
            self._recorder.write_event(subject.name, Event(step=step, kind=kind, layer=layer, data=facts))

    def write_freezing(self, step: Step) -> None:
        """Parameters that have been frozen or thawed, and modules on which `requires_grad = False` froze nothing."""
        subject = step.subject
        changed = [
            parameter
            for pending, columns in zip(step.group, step.columns, strict=True)
            for parameter in subject.note_trainable(columns, pending.reading.trainable)
        ]
        if step.is_deep:
            changed += subject.note_others_trainable({column for columns in step.columns for column in columns})
            for name in subject.modules_frozen_in_name():
                event = Event(step=step.step, kind="freeze-attribute", data={"module": name})
                self._recorder.write_event(subject.name, event)
        for parameter in changed:
            facts = {"parameter": parameter.name, "value": parameter.trainable}
            self._recorder.write_event(subject.name, Event(step=step.step, kind="requires-grad", data=facts))

    # ---- readings ---------------------------------------------------------------------------------------------------

    def _write(self, done: Step, row: Row) -> None:
        """A step's readings have arrived on the host."""
        cheap, deep = done.parameter_arrays(row)
        numbers, norm = self._step_numbers(done, row, cheap)
        cheap |= numbers
        self._recorder.write_row(done.subject.name, done.step, "cheap", cheap)
        if done.is_deep:
            deep |= self._deep_readings(done, row, deep)
        if deep:
            self.deep_step = done.step
            self._recorder.write_row(done.subject.name, done.step, "deep", deep)
        self._observe(done, cheap, norm)
        if self._on_step is not None:
            shown = {name: float(cheap[name]) for name in ("loss", "global_grad_norm")}
            self._on_step(done.subject.name, done.step, shown)

    def _observe(self, done: Step, cheap: dict[str, Any], norm: float) -> None:
        """Tell the schedule what the step cost and whether anything about it was unusual."""
        readings = {"loss": _or_inf(cheap["loss"], cheap["loss_nonfinite"])} if done.losses else {}
        if not math.isnan(norm):
            readings["global_grad_norm"] = norm
        watch, total = float(cheap["watch_seconds"]), float(cheap["step_seconds"])
        self.schedules[done.subject.name].observe(
            done.step, deep=done.is_deep, seconds=total, watch_seconds=watch, readings=readings
        )

    def _step_numbers(self, done: Step, row: Row, cheap: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The step's own readings, and the gradient norm that all ranks schedule by: one rank's gradients may have
        gone wrong after they were averaged. Infinite where it is not finite, NaN where there is none.
        """
        values = row[done.losses]
        scale = row[done.scale][0] if done.scale else 1.0
        finite = [value / scale for value in values if math.isfinite(value)]
        skipped = float(any(done.skipped(row)))
        if skipped:
            event = Event(step=done.step, kind="step-skipped", data={"loss_scale": scale})
            self._recorder.write_event(done.subject.name, event)
        norm = global_norm(cheap["grad_norm"], cheap["grad_nonfinite"])
        bad_norm = math.inf if np.nansum(cheap["grad_nonfinite"]) else norm
        numbers = [sum(finite), len(finite), len(values) - len(finite), done.seconds, done.watch_seconds, bad_norm]
        if self.ranks is not None:
            numbers = self.ranks.total(numbers)
            numbers[3:] = [value / self.ranks.size for value in numbers[3:]]
        total, count, bad, seconds, watched, agreed = numbers
        clips = [(n, limit) for n, limit in zip(row[done.clips], done.limits, strict=True) if not math.isnan(n)]
        factors = [min(1.0, limit / (n + 1e-6)) for n, limit in clips]
        readings = {
            "loss": total / count if count and not bad else math.nan,
            "loss_nonfinite": bad,
            "global_grad_norm": norm,
            "global_grad_norm_unclipped": unclipped(norm, [n for n, _ in clips], factors),
            "clip_factor": min(factors, default=1.0),
            "micro_batches": float(len(values)),
            "loss_scale": scale,
            "skipped": skipped,
            "step_seconds": seconds,
            "watch_seconds": watched,
            "learning_rate": done.subject.learning_rates([(p.optimizer, p.reading.learning_rates) for p in done.group]),
        }
        return readings, agreed

    def _deep_readings(self, done: Step, row: Row, deep: dict[str, Any]) -> dict[str, Any]:
        found = self._layer_arrays(done, row)
        if self.ranks is not None:
            weights, bad = deep["weight_norm"], deep["weight_nonfinite"]
            found["replica_difference"] = ranks.replica_difference(self.ranks, weights, bad)
        for layer, norms in done.profiles(row):
            self._recorder.write_profile(done.subject.name, done.step, "call_signal_norm", layer, norms)
        found["carried_grad_norm"] = done.carried_norm(row)
        found["graph_nodes"] = float(done.graph_nodes) if done.graph_nodes else math.nan
        return found

    def _layer_arrays(self, done: Step, row: Row) -> dict[str, Any]:
        arrays = done.layer_arrays(row)
        if self.ranks is not None:
            if not self.ranks.agree(len(done.subject.layers)):
                self.cannot(done.subject, LAYER_STATISTICS, "the ranks do not run the same layers")
                return {}
            arrays = ranks.combine(self.ranks, arrays)
        if any(done.subject.layers[column].module is not None for column, _ in done.calls):
            self._read.add(done.subject.name)
        elif done.losses and done.subject.name not in self._read:
            why = COMPILED if done.compiled else "no layer was called as a module"
            self.cannot(done.subject, MODULE_STATISTICS, why)
        return arrays


def _or_inf(value: Any, nonfinite: float) -> float:
    return math.inf if nonfinite else float(value)
