"""A step on its way from the device to the run file: which readings it took, and the arrays that they become."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isograd._statistics import STATISTICS
from isograd.frameworks.torch import _calls as calls
from isograd.frameworks.torch._calls import Call
from isograd.frameworks.torch._row import Row
from isograd.frameworks.torch._subject import Subject
from isograd.frameworks.torch._window import Pending, Window

LAYER_STATISTICS = tuple(s.name for s in STATISTICS.values() if s.axis == "layer")


@dataclass
class Step:
    """A step whose readings are on their way to the host."""

    subject: Subject
    step: int
    group: list[Pending]
    columns: list[list[int]]
    losses: range
    clips: range
    limits: list[float]
    scale: range
    calls: list[tuple[int, list[Call]]]
    compiled: bool
    carried: list[range]
    graph_nodes: int

    def __post_init__(self) -> None:
        self.is_deep = any(pending.deep for pending in self.group)
        self.seconds = sum(pending.seconds for pending in self.group)
        self.watch_seconds = sum(pending.watch_seconds for pending in self.group)
        for pending in self.group:
            pending.window = Window()  # its readings have moved into the row

    def carried_norm(self, row: Row) -> float:
        """The least that each optimizer's gradients held when a pass began, all optimizers together."""
        least = [min(row[places]) for places in self.carried if places]
        return math.sqrt(sum(value * value for value in least)) if least else math.nan

    def skipped(self, row: Row) -> list[bool]:
        """Per optimizer whether it left its weights alone."""
        flags = [pending.reading.read(row).get("found_inf") for pending in self.group]
        return [p.skipped or (flag is not None and flag[1][0] > 0) for p, flag in zip(self.group, flags, strict=True)]

    def parameter_arrays(self, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
        """(cheap, deep) arrays over the subject's parameters."""
        width = len(self.subject.parameters)
        names = (*_CHEAP_READINGS, *(_DEEP_READINGS if self.is_deep else ("state_nonfinite",)))
        arrays = dict(zip(names, np.full((len(names), width), np.nan), strict=True))
        for pending, columns in zip(self.group, self.columns, strict=True):
            found = pending.reading.read(row)
            scale = found.pop("grad_scale", ([0], [1.0]))[1][0]
            found.pop("found_inf", None)
            for name, (present, values) in found.items():
                places = columns if len(present) == len(columns) else [columns[index] for index in present]
                arrays[name][places] = values if name not in _SCALED else np.divide(values, scale)
        if self.is_deep:
            return _cheap_arrays(arrays), _deep_arrays(arrays)
        state = arrays["state_nonfinite"]  # read at once where a gradient is not finite, whatever the schedule says
        return _cheap_arrays(arrays), {} if np.isnan(state).all() else {"state_nonfinite": state}

    def layer_arrays(self, row: Row) -> dict[str, Any]:
        """Deep arrays over the subject's layers."""
        arrays = {name: np.full(len(self.subject.layers), np.nan) for name in LAYER_STATISTICS}
        for column, found in self.calls:
            for name, value in calls.aggregate(found, row).items():
                arrays[name][column] = value
        return arrays

    def profiles(self, row: Row) -> list[tuple[str, list[float]]]:
        """(layer, signal norm of each call) of the layers that were called several times."""
        signals = [(column, [call.value("signal_norm", row) for call in found]) for column, found in self.calls]
        layers = self.subject.layers
        return [(layers[column].layer.name, norms) for column, norms in signals
                if len(norms) > 1 and not all(map(math.isnan, norms))]  # fmt: skip


_CHEAP_READINGS = ("grad_norm", "grad_max", "grad_nonfinite")
_DEEP_READINGS = (
    "grad_zero_fraction", "weight_norm", "weight_nonfinite", "state_nonfinite", "update_norm", "sampled_change",
    "sampled_norm", "unit_spread",
)  # fmt: skip
_SCALED = ("grad_norm", "grad_max")


def _cheap_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    """NaN readings become counts: a largest entry that is not finite means at least one entry that is not."""
    norms, peaks, counts = (arrays[name] for name in _CHEAP_READINGS)
    if not np.isfinite(peaks).all():
        read = ~(np.isnan(norms) & np.isnan(peaks) & np.isnan(counts))
        lost = read & ~np.isfinite(peaks)
        counts = np.where(np.isnan(counts) & read, lost.astype(float), counts)
        norms, peaks = np.where(lost, np.nan, norms), np.where(lost, np.nan, peaks)
    elif np.isnan(counts).any():
        counts = np.zeros_like(counts)
    return {"grad_norm": norms, "grad_max": peaks, "grad_nonfinite": counts}


def _deep_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    seen = ~np.isnan(arrays["sampled_norm"]) | ~np.isnan(arrays["weight_norm"]) | ~np.isnan(arrays["weight_nonfinite"])
    bad = np.where(np.isnan(arrays["weight_nonfinite"]), np.where(seen, 0.0, np.nan), arrays["weight_nonfinite"])
    lost = bad > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = arrays["sampled_change"] / arrays["sampled_norm"]
    return {
        "grad_zero_fraction": arrays["grad_zero_fraction"],
        "weight_norm": np.where(lost, np.nan, arrays["weight_norm"]),
        "weight_nonfinite": bad,
        "state_nonfinite": np.where(seen & np.isnan(arrays["state_nonfinite"]), 0.0, arrays["state_nonfinite"]),
        "update_norm": np.where(np.isfinite(arrays["update_norm"]), arrays["update_norm"], np.nan),
        "update_ratio": np.where(np.isfinite(ratio), ratio, np.nan),
        "unit_spread": np.where(np.isfinite(arrays["unit_spread"]), arrays["unit_spread"], np.nan),
    }


def global_norm(norms: Any, nonfinite: Any) -> float:
    """L2 norm of all gradients from those of the tensors; NaN where none has one or an entry is not finite."""
    norm = math.sqrt(np.dot(norms, norms)) if len(norms) else math.nan
    if math.isnan(norm):  # some tensors have no gradient, or one that is not finite
        present = norms[~np.isnan(norms)]
        lost = np.nansum(nonfinite) > 0
        norm = math.nan if lost or not len(present) else math.sqrt(np.dot(present, present))
    return norm


def unclipped(norm: float, clipped: Sequence[float], factors: Sequence[float]) -> float:
    """The norm before clipping: each part of the gradients that was clipped had a norm n, and has n times a factor."""
    lost = [n * n * (1 - factor * factor) for n, factor in zip(clipped, factors, strict=True)]
    return math.sqrt(norm * norm + sum(lost))
