"""One model of a run: its tables in the run file, and the rows that its steps become."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isograd._history import Event, Layer
from isograd._judge import Reason
from isograd._statistics import STATISTICS
from isograd.frameworks import Recorder
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras._reading import Layout, Place, Tier, boundary_statistics, layer_statistics

LAYER_STATISTICS = tuple(s.name for s in STATISTICS.values() if s.axis == "layer")

_UNMEASURED: Mapping[str, str] = {
    "graph_nodes": "a compiled step has no autograd graph to look at",
    "carried_grad_norm": "Keras computes gradients anew at every step: none are carried over",
    "state_nonfinite": "the state of Keras's optimizers is not read",
    "attention_entropy": "the attention layers of Keras do not show their weights",
    "attention_logit_max": "the attention layers of Keras do not show their logits",
    "padding_fraction": "Keras hands masks on beside the values",
    "replica_difference": "one process trains alone",
}
"""What is never read from Keras, and why."""


class Subject:
    """Tables of one model, kept in step with the run file. Holds no reference to the user's objects."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self.step = name, 0
        self.deep_step: int | None = None
        self.bad_in_a_row = 0  # steps that have been left out
        self._recorder = recorder
        self._layers: dict[str, int] = {}
        self._positions: set[str] = set()
        self._parameters: dict[str, int] = {}
        self._known: dict[int, list[list[int]]] = {}  # id of a layout -> columns of the parameters by optimizer
        self._layouts: list[Layout] = []  # kept, so that an id stays the layout's own
        self._facts: list[Any] = []
        self._uses = 0
        self._told: set[str] = set()

    # ---- words ----------------------------------------------------------------------------------------------------

    def note_compiled(self, tier: Tier, seconds: float, *, first: bool) -> None:
        """A step has been compiled, which took `seconds` with its first run; only the second one is the watcher's."""
        data = {"tier": tier, "seconds": round(seconds, 3), "extra": not first}
        self._recorder.write_event(self.name, Event(step=self.step, kind="compiled", data=data))

    def cannot(self, tier: Tier, why: str) -> None:
        """Say in words what is not measured."""
        names = [s.name for s in STATISTICS.values() if tier == "cheap" or s.tier == "deep"]
        self._unmeasured(dict.fromkeys(names, why))

    def _unmeasured(self, whys: Mapping[str, str]) -> None:
        for statistic, why in whys.items():
            if statistic not in self._told:
                self._told.add(statistic)
                self._recorder.set_unmeasured(self.name, statistic, why)

    # ---- tables ---------------------------------------------------------------------------------------------------

    def _columns(self, layout: Layout, rates: list[float]) -> list[list[int]]:
        """The columns of the parameters that each optimizer of a step holds; what is new is added."""
        if id(layout) not in self._known:
            self._layouts.append(layout)
            self._known[id(layout)] = self._described(layout, rates)
            self._unmeasured(_UNMEASURED)
            if layout.unread:
                why = f"inside a loop of the backend: {', '.join(layout.unread[:5])}"
                self._unmeasured({"call_signal_norm": why})
        return self._known[id(layout)]

    def _described(self, layout: Layout, rates: list[float]) -> list[list[int]]:
        owners = {id(variable): (name, owner) for name, owner, variable in layout.variables}
        self._add_layers(layout)
        held: list[list[int]] = []
        groups = []
        for number, (optimizer, *variables) in enumerate(layout.optimizers):
            named = [(*owners.get(id(v), (str(getattr(v, "path", v.name)), "")), v) for v in variables]
            held.append([self._column_of(name, owner, v, number) for name, owner, v in named])
            groups.append(describe.hyperparameters(optimizer, len(variables), rates[number]))
        self._recorder.set_groups(self.name, groups)
        optimized = {id(v) for _, *variables in layout.optimizers for v in variables}
        for name, owner, variable in layout.variables:
            if id(variable) not in optimized:
                self._column_of(name, owner, variable, -1)
        return held

    def _column_of(self, name: str, owner: str, variable: Any, group: int) -> int:
        if name not in self._parameters:
            self._parameters[name] = len(self._parameters)
            self._recorder.add_parameters(self.name, [describe.parameter_of(name, owner, variable, group)])
        return self._parameters[name]

    def _add_layers(self, layout: Layout) -> None:
        for call in layout.calls:
            is_module = call.role == "module" and not call.times
            base = describe.layer_of(call.name, call.layer) if is_module else Layer(name=call.name)
            units = call.shape[call.axis] if call.shape else 0
            self._add_layer(
                replace(
                    base,
                    kind=call.kind,
                    type=call.type,
                    role=call.role,
                    position=float(self._uses),
                    units=max(units, 0),
                    shape=tuple(max(n, 1) for n in call.shape),
                    dtype=call.dtype,
                )
            )
        for boundary in layout.boundaries:
            position = -1.0 if boundary.role == "input" else math.inf
            shape = tuple(max(n, 1) for n in boundary.shape)
            units = shape[-1] if len(shape) > 1 else 1
            self._add_layer(
                Layer(name=boundary.name, kind=boundary.role, type=boundary.type, role=boundary.role,
                      position=position, units=units, shape=shape)
            )  # fmt: skip

    def _add_layer(self, layer: Layer) -> None:
        if layer.name not in self._layers:
            self._layers[layer.name] = len(self._layers)
            self._recorder.add_layers(self.name, [layer])
            self._uses += 1

    # ---- rows -----------------------------------------------------------------------------------------------------

    def write(
        self, layout: Layout, vector: NDArray[np.float32], seconds: float, own: float
    ) -> tuple[int, dict[str, float]]:
        """Write one step; its number, and what a progress line shows. `own`: the watcher's share of `seconds`."""
        step, self.step = self.step, self.step + 1
        found = layout.taken_apart(vector)
        columns = self._columns(layout, _rates(found, layout))
        cheap, deep = self._parameter_arrays(found, columns, layout)
        cheap |= self._numbers(found, cheap, layout, seconds, own)
        norms = cheap.pop("clipped")
        cheap["grad_norm"] = norms
        self._recorder.write_row(self.name, step, "cheap", cheap)
        if cheap["skipped"]:
            self._recorder.write_event(
                self.name, Event(step=step, kind="step-skipped", data={"loss_scale": cheap["loss_scale"]})
            )
        self._write_bad(found, cheap, columns, layout, step)
        if layout.tier == "deep":
            deep |= self._layer_arrays(found, layout)
            self._recorder.write_row(self.name, step, "deep", deep)
            self._write_times(found, layout, step)
            self._write_facts(layout, step)
            self.deep_step = step
        names = ("loss", "global_grad_norm", "loss_nonfinite")
        return step, {name: float(cheap[name]) for name in names}

    def _parameter_arrays(
        self, found: Mapping[Place, NDArray[np.float64]], columns: list[list[int]], layout: Layout
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        width = len(self._parameters)
        cheap = {name: np.full(width, np.nan) for name in ("grad_norm", "grad_max", "grad_nonfinite", "clipped")}
        names = ("grad_zero_fraction", "weight_norm", "weight_nonfinite", "update_norm", "update_ratio", "unit_spread")
        deep = {name: np.full(width, np.nan) for name in names} if layout.tier == "deep" else {}
        for number, places in enumerate(columns):
            if Place("parameters", number, "gradients") not in found:
                continue
            squares, peaks, bad = found[Place("parameters", number, "gradients")].T
            scale = float(found.get(Place("optimizer", number, "scale"), np.ones(())))
            present = ~np.isnan(bad)
            # A sum of squares that has overflown is Inf although every entry may be finite.
            overflown = np.isinf(squares) & np.isfinite(peaks) & (peaks > _LARGE)
            bad = np.where(present & overflown & (layout.tier == "cheap"), 0.0, bad)
            lost = bad > 0
            norms = np.where(lost, np.nan, np.sqrt(squares) / scale)
            cheap["grad_norm"][places] = norms
            cheap["grad_max"][places] = np.where(lost, np.nan, peaks / scale)
            cheap["grad_nonfinite"][places] = bad
            cheap["clipped"][places] = self._clipped(found, number, norms, lost, scale, layout)
            if deep:
                self._deep_arrays(found, number, places, deep, layout)
        return cheap, deep

    def _clipped(
        self,
        found: Mapping[Place, NDArray[np.float64]],
        number: int,
        norms: Any,
        lost: Any,
        scale: float,
        layout: Layout,
    ) -> Any:
        """Norms as the update sees them, behind the optimizer's own clipping."""
        acting = describe.inner(layout.optimizers[number][0])
        cut = found.get(Place("parameters", number, "clipped"))
        if cut is not None:
            return np.where(lost, np.nan, np.sqrt(cut) / scale)
        if acting.clipnorm is not None:
            return np.minimum(norms, float(acting.clipnorm))
        if acting.global_clipnorm is not None:
            total = math.sqrt(float(np.nansum(norms**2)))
            return norms * min(1.0, float(acting.global_clipnorm) / total) if total else norms
        return norms

    def _deep_arrays(
        self, found: Mapping[Place, NDArray[np.float64]], number: int, places: list[int], deep: dict[str, Any],
        layout: Layout,
    ) -> None:  # fmt: skip
        sizes = np.array([max(1, math.prod(v.shape)) for v in layout.optimizers[number][1:]], dtype=np.float64)
        deep["grad_zero_fraction"][places] = found[Place("parameters", number, "zeros")] / sizes
        squares, bad = found[Place("parameters", number, "weights")].T
        deep["weight_norm"][places] = weights = np.where(bad > 0, np.nan, np.sqrt(squares))
        deep["weight_nonfinite"][places] = bad
        spread = found[Place("parameters", number, "spread")]
        deep["unit_spread"][places] = np.where(np.isfinite(spread), spread, np.nan)
        moved = found.get(Place("parameters", number, "updates"))
        if moved is None:
            return
        waits = int(getattr(describe.inner(layout.optimizers[number][0]), "gradient_accumulation_steps", None) or 1)
        if waits > 1 and not moved.any():  # gradients are only added up at this step
            return
        updates = np.where(np.isfinite(moved), np.sqrt(moved), np.nan)
        deep["update_norm"][places] = updates
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = updates / weights
        deep["update_ratio"][places] = np.where(np.isfinite(ratio), ratio, np.nan)

    def _numbers(
        self, found: Mapping[Place, NDArray[np.float64]], cheap: Mapping[str, Any], layout: Layout, seconds: float,
        own: float,
    ) -> dict[str, Any]:  # fmt: skip
        losses = [float(value) for place, value in found.items() if place[::2] == ("step", "loss")]
        finite = [value for value in losses if math.isfinite(value)]
        raw, after = _total(cheap["grad_norm"], cheap), _total(cheap["clipped"], cheap)
        scales = [float(v) for place, v in found.items() if place[::2] == ("optimizer", "scale")]
        dynamic = any(hasattr(optimizer, "dynamic_scale") for optimizer, *_ in layout.optimizers)
        return {
            "loss": sum(finite) / len(finite) if finite and len(finite) == len(losses) else math.nan,
            "loss_nonfinite": float(len(losses) - len(finite)),
            "global_grad_norm": after,
            "global_grad_norm_unclipped": raw,
            "clip_factor": min(1.0, after / raw) if raw and not math.isnan(raw) and math.isfinite(raw) else 1.0,
            "micro_batches": float(max(1, len(losses))),
            "loss_scale": scales[0] if scales else 1.0,
            "skipped": float(dynamic and np.nansum(cheap["grad_nonfinite"]) > 0),
            "step_seconds": seconds,
            "watch_seconds": own,
            "learning_rate": _rates(found, layout),
        }

    def _write_bad(
        self, found: Mapping[Place, NDArray[np.float64]], cheap: Mapping[str, Any], columns: list[list[int]],
        layout: Layout, step: int,
    ) -> None:  # fmt: skip
        """Note each update that was left out (`_guarding.py`), and how many steps in a row had one."""
        flags = [found.get(Place("optimizer", number, "skipped")) for number in range(len(columns))]
        bad = [number for number, flag in enumerate(flags) if flag is not None and flag > 0]
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        names = {column: name for name, column in self._parameters.items()}
        for number in bad:
            lost = [names[place] for place in columns[number] if cheap["grad_nonfinite"][place] > 0]
            layer = lost[0] if lost else None
            reason = Reason(channel="grad_norm", layer=layer, observed=math.nan, limit=math.inf)
            data = {
                "optimizer": type(layout.optimizers[number][0]).__name__,
                "loss": cheap["loss"],
                "reasons": [reason.to_dict()],
                "why": str(reason),
            }
            self._recorder.write_event(self.name, Event(step=step, kind="bad-step-skipped", data=data))

    def _layer_arrays(self, found: Mapping[Place, NDArray[np.float64]], layout: Layout) -> dict[str, Any]:
        arrays = {name: np.full(len(self._layers), np.nan) for name in LAYER_STATISTICS}
        members: dict[str, list[int]] = {}
        for index, call in enumerate(layout.calls):
            if not call.times:
                members.setdefault(call.name, []).append(index)
        several = {name: layer_statistics(found, indices) for name, indices in members.items()}
        for index, boundary in enumerate(layout.boundaries):
            several[boundary.name] = boundary_statistics(found, index, boundary.role)
        for name, values in several.items():
            for statistic, value in values.items():
                arrays[statistic][self._layers[name]] = value
        return arrays

    def _write_times(self, found: Mapping[Place, NDArray[np.float64]], layout: Layout, step: int) -> None:
        """The gradient signal through time of recurrent layers, in the order of time."""
        for index, call in enumerate(layout.calls):
            squares = found.get(Place("call", index, "times"))
            if squares is not None and call.times:
                norms = np.sqrt(squares[::-1] if call.backwards else squares)
                values = np.where(np.isfinite(norms), norms, np.nan)
                self._recorder.write_profile(self.name, step, "call_signal_norm", call.name, values)

    def _write_facts(self, layout: Layout, step: int) -> None:
        if layout.facts is not None and layout.facts not in self._facts:
            self._facts.append(layout.facts)
            data = {key: value for key, value in layout.facts.items() if value != []}
            self._recorder.write_event(self.name, Event(step=step, kind="loss-graph", data=data))


def _rates(found: Mapping[Place, NDArray[np.float64]], layout: Layout) -> list[float]:
    """The learning rate of each optimizer."""
    places = [Place("optimizer", number, "learning_rate") for number in range(len(layout.optimizers))]
    return [float(found[place]) if place in found else math.nan for place in places]


_LARGE = 1e18
"""An entry beyond it explains a sum of squares beyond float32, whose largest number is 3.4e38."""


def _total(norms: Any, cheap: Mapping[str, Any]) -> float:
    """L2 norm of all gradients from those of the tensors; NaN where none has one or an entry is not finite."""
    present = norms[~np.isnan(norms)]
    if np.nansum(cheap["grad_nonfinite"]) or not len(present):
        return math.nan
    return math.sqrt(float(np.dot(present, present)))
